"""Agents with stable-baselines3's interface whose policy gradient is a plug-in.

An agent is a package here whose `__init__` holds its class and its `ENTRY`, and one line in
`AGENTS`. Nothing is imported before it is asked for: DreamerTPX does not load PIPPS.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from totalprop.agents.registry import AGENTS

if TYPE_CHECKING:
    from totalprop.agents.daappo import DAAPPO
    from totalprop.agents.dreamer import DreamerTPX
    from totalprop.agents.pilco import PILCO
    from totalprop.agents.pipps import PIPPS
    from totalprop.agents.svg import SVG

__all__ = ["AGENTS", "DAAPPO", "PILCO", "PIPPS", "SVG", "DreamerTPX"]


def __getattr__(name: str) -> Any:
    for package, class_name in AGENTS.class_names.items():
        if class_name == name:
            return getattr(import_module(f"totalprop.agents.{package}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
