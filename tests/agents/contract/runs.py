"""Runs of an agent under `Checkpoints`, stopped and resumed in new objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from tests.agents.contract.conftest import Maker
from tests.agents.contract.environments import NoisyEnv, RewindableEnv
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.evaluation import Evaluation
from totalprop.agents.persistence.checkpoint import Checkpoints, TrainingStopped
from totalprop.envs.rewind import Rewindable

TOTAL = 84  # steps of two environments: 6 episodes of each


class StopAt(BaseCallback):
    """Requests a stop once `step` is reached."""

    def __init__(self, checkpoints: Checkpoints, step: int) -> None:
        super().__init__()
        self.checkpoints, self.step = checkpoints, step

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.step:
            self.checkpoints.request_stop()
        return True


def make_env(make: Maker, *, rewindable: bool = True, n_envs: int = 2) -> VecEnv:
    """Noisy environments, in VecNormalize where the agent takes that."""

    def one(**_: Any) -> gym.Env:
        return Rewindable(make.see(RewindableEnv())) if rewindable else make.see(NoisyEnv())

    env = make_vec_env(one, n_envs)
    return VecNormalize(env) if takes_vec_normalize(make) else env


def takes_vec_normalize(make: Maker) -> bool:
    """Whether the constructor does; agents that learn a model of the environment refuse it."""
    try:
        make(VecNormalize(make_vec_env(lambda **_: make.see(NoisyEnv()), 1)))
    except ValueError:
        return False
    return True


def new_agent(make: Maker, **changes: Any) -> Algorithm:
    return make(make_env(make), **{"seed": 3, **changes})


def load(checkpoints: Checkpoints, make: Maker, env: VecEnv | None = None) -> Algorithm:
    """The newest checkpoint's agent."""
    agent = checkpoints.load(make.cls, make_env(make) if env is None else env, "cpu")
    assert agent is not None
    return agent


def run(
    make: Maker, folder: Path, stops: Sequence[int] = (), **env_args: Any
) -> tuple[Algorithm, Evaluation]:
    """Learn for TOTAL steps, stopped and resumed in new objects at each of `stops`."""
    for stop in [*stops, None]:
        evaluation = Evaluation(make_env(make), n_episodes=2, every=20)
        if isinstance(evaluation.eval_env, VecNormalize):
            evaluation.eval_env.training = False
        evaluation.eval_env.seed(7)
        checkpoints = Checkpoints(
            folder / "checkpoints", every_seconds=0, also={"evaluation": evaluation}
        )
        env = make_env(make, **env_args)
        agent = checkpoints.load(make.cls, env, "cpu") or make(env, seed=3)
        checkpoints.restore(agent)
        callbacks = [evaluation, checkpoints]
        if stop is not None:
            callbacks.append(StopAt(checkpoints, stop))
        try:
            agent.learn(TOTAL - agent.num_timesteps, callbacks, reset_num_timesteps=False)
        except TrainingStopped:
            assert stop is not None
    return agent, evaluation


def state_of(agent: Algorithm, folder: Path) -> dict[str, Any]:
    """Everything that a further step depends on, as a flat dict of comparable values."""
    values = {"agent": agent.file_values(), "training": agent.state_dict(folder)}
    for key in ("start_time", "_num_timesteps_at_start", "ep_info_buffer"):
        values["agent"]["attributes"].pop(key)
    for key in ("files", "replay", "transitions"):  # names of segments
        values["training"].pop(key, None)
    flat: dict[str, Any] = {}

    def walk(value: Any, where: str) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                walk(entry, f"{where}/{key}")
        elif isinstance(value, list | tuple):
            for i, entry in enumerate(value):
                walk(entry, f"{where}/{i}")
        else:
            flat[where] = value

    walk(values, "")
    return flat


def assert_same_states(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bit for bit; other objects are not compared."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor | np.ndarray):
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), key
        elif isinstance(value, int | float | str | bool | type(None)):
            assert found[key] == value, key
