"""Cost of a checkpoint: seconds, bytes, and share of the training time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.logger import configure

from totalprop.agents import AGENTS, DAAPPO, PIPPS, DreamerTPX
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.persistence.checkpoint import MAX_TIME_FRACTION, Checkpoints
from totalprop.envs.rewind import Rewindable
from totalprop.scripts.run.entry_runs import untrained


def bench_checkpoint(repeats: int) -> list[dict[str, Any]]:
    """Time checkpoints of every agent, of PIPPS with 450 points and DreamerTPX on images, too.

    Before each checkpoint the agent makes as many new steps as it makes in a minute of training at
    most.

    Args:
        repeats: number of checkpoints, of which the median is taken.
    Returns:
        One column of the table for each agent.
    """
    found = []
    for agent in AGENTS:
        columns = TRAINED.get(agent, [(agent, partial(_in_long_run, agent), 1000)])
        found += [{"agent": name, **_column(make, n, repeats)} for name, make, n in columns]
    return found


def _column(make: Callable[[], Algorithm], steps: int, repeats: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        agent = make()
        agent.set_logger(configure(name, []))
        checkpoints = Checkpoints(folder / "checkpoints")
        checkpoints.init_callback(agent)
        agent.learn(2 * steps)
        checkpoints.save()
        seconds, sizes = [], []
        for _ in range(repeats):
            agent.learn(steps, reset_num_timesteps=False)
            before = {path.name for path in checkpoints.folder.iterdir()}
            started = time.perf_counter()
            checkpoints.save()
            seconds.append(time.perf_counter() - started)
            new = [path for path in checkpoints.folder.iterdir() if path.name not in before]
            sizes.append(sum(path.stat().st_size for path in new))
    cost = float(np.median(seconds))
    interval = max(checkpoints.every_seconds, cost / MAX_TIME_FRACTION)
    return {
        "new steps": steps,
        "seconds": cost,
        "MB written": float(np.median(sizes)) / 1e6,
        "% of the time at the default": 100 * cost / interval,
    }


def _pipps() -> Algorithm:
    env = Rewindable(gym.make("totalprop/CartPoleSwingUp-v0"))
    return PIPPS("RBFPolicy", env, gradient_steps=1, gp_evaluations=2, seed=0, device="cpu")


def _dreamer(observation: str) -> Algorithm:
    env = Rewindable(gym.make("dmc/cartpole-balance-v0", observation=observation, render="fast"))
    settings = {**AGENTS["dreamer"].presets["laptop"], "train_freq": 500, "gradient_steps": 1}
    return DreamerTPX("DreamerPolicy", env, seed=0, device="cpu", **settings)


def _daappo() -> Algorithm:
    env = Rewindable(gym.make("dmc/cartpole-swingup-v0", action_repeat=4))
    settings = {**AGENTS["daappo"].presets["recommended"], "n_epochs": 1}
    return DAAPPO("MlpPolicy", env, seed=0, device="cpu", **settings)


def _in_long_run(agent: str) -> Algorithm:
    return untrained(agent, AGENTS[agent].long_run)


# Agent -> (name, what to measure, new steps of each checkpoint); others: in their `long_run`.
TRAINED: dict[str, list[tuple[str, Callable[[], Algorithm], int]]] = {
    "pipps": [("pipps", _pipps, 150)],
    "dreamer": [
        ("dreamer, vectors", lambda: _dreamer("vector"), 1500),
        ("dreamer, pixels", lambda: _dreamer("pixels"), 500),
    ],
    "daappo": [("daappo", _daappo, 10_240)],
}
