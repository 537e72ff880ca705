"""An agent's entry in the registry, which train, sweep, bench and the reliability tests read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from totalprop.agents.core.algorithm import Algorithm


@dataclass(frozen=True)
class AgentEntry:
    """One agent in `totalprop.agents.AGENTS`; the agent's package defines it as ENTRY.

    Attributes:
        cls: class of the agent.
        run: the agent's defaults for options of the command line, such as env_id.
        presets: name -> constructor arguments.
        preset_runs: name -> options of the command line that a preset sets.
        policy_flags: arguments of the policies that are flags of the command line.
        quantity: what evaluations report, an episode's "return" or its "cost" (-return).
    """

    cls: type[Algorithm]
    run: Mapping[str, Any]
    presets: Mapping[str, dict[str, Any]]
    preset_runs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    policy_flags: tuple[str, ...] = ()
    quantity: Literal["return", "cost"] = "return"
