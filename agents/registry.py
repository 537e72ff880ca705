"""The registry of agents: a new agent is a package beside this file, and one line here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from totalprop.agents.core.entry import AgentEntry


class Agents(Mapping[str, "AgentEntry"]):
    """Name on the command line -> `AgentEntry`; an agent is imported when it is looked up.

    Args:
        class_names: name, which is also the agent's package in `totalprop.agents`, -> class.
    """

    def __init__(self, class_names: Mapping[str, str]) -> None:
        self.class_names = dict(class_names)

    def __getitem__(self, name: str) -> AgentEntry:
        if name not in self.class_names:
            raise KeyError(name)
        entry: AgentEntry = import_module(f"totalprop.agents.{name}").ENTRY
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self.class_names)

    def __len__(self) -> int:
        return len(self.class_names)


AGENTS = Agents(
    {
        "pipps": "PIPPS",
        "pilco": "PILCO",
        "dreamer": "DreamerTPX",
        "daappo": "DAAPPO",
        "svg": "SVG",
    }
)
