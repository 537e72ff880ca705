"""What train, sweep, bench, the kill test and the soak test know of an agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from totalprop.agents.core.algorithm import Algorithm


@dataclass(frozen=True)
class AgentEntry:
    """An agent's entry in `totalprop.agents.AGENTS`; the agent's package holds it as ENTRY.

    Attributes:
        cls: the agent's class.
        run: defaults of the command line's options, for example env_id and total_timesteps.
        presets: name -> constructor arguments.
        preset_runs: name -> options of the command line that belong to a preset.
        policy_flags: arguments of the policies that are flags of the command line.
        quantity: what evaluations report, the "return" of an episode or its "cost" (-return).
    """

    cls: type[Algorithm]
    run: Mapping[str, Any]
    presets: Mapping[str, dict[str, Any]]
    preset_runs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    policy_flags: tuple[str, ...] = ()
    quantity: Literal["return", "cost"] = "return"
