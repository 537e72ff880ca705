"""An agent's entry in the registry, which train, sweep, bench and the reliability tests read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stable_baselines3.common.callbacks import BaseCallback

from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.deployment import Deployed


@dataclass(frozen=True)
class AgentEntry:
    """One agent in `totalprop.agents.AGENTS`; the agent's package defines it as ENTRY.

    Options of a run are named as in Python (env_id, total_timesteps); several values of one
    option are a list.

    Attributes:
        cls: class of the agent.
        run: the agent's defaults for options of the command line, such as env_id.
        presets: name -> constructor arguments.
        preset_runs: name -> options of the command line that a preset sets, and `action_repeat` in
            the control suite; `env_arg` counts in the preset's own `env_id` alone.
        policy_flags: arguments of the policies that are flags of the command line.
        quantity: what evaluations report, an episode's "return" or its "cost" (-return).
        named_by: constructor arguments whose values are part of the name of a run's folder.
        rewinds: whether an agent with these constructor arguments rewinds its environment, which
            must then support it.
        callbacks: steps of a run -> callbacks that draw for TensorBoard, by their names in
            checkpoints, which keep their state.
        pictures: draws what a trained agent has to show besides its learning curve into the run's
            folder; returns the paths, and raises ValueError if it cannot.
        deployed: the policy as a module of tensors.
        small_run: options of a run of seconds that uses every part of a run, for the kill test.
        kill_test_factor: factor on the steps of `small_run`, for 20 kills or more.
        long_run: options of a run whose memory is bounded, and full within minutes, for the soak
            test.
    """

    cls: type[Algorithm]
    run: Mapping[str, Any]
    presets: Mapping[str, dict[str, Any]]
    preset_runs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    policy_flags: tuple[str, ...] = ()
    quantity: Literal["return", "cost"] = "return"
    named_by: tuple[str, ...] = ("estimator",)
    rewinds: Callable[[Mapping[str, Any]], bool] = lambda arguments: False
    callbacks: Callable[[int], Mapping[str, BaseCallback]] = lambda total_timesteps: {}
    pictures: Callable[[Any, Path], Sequence[Path]] = lambda agent, folder: ()
    deployed: type[Deployed] = Deployed
    small_run: Mapping[str, Any] = field(default_factory=dict)
    kill_test_factor: int = 1
    long_run: Mapping[str, Any] = field(default_factory=dict)
