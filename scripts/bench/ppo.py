"""Environment steps per second of DAAPPO and of SB3's PPO, with the same settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
from stable_baselines3 import PPO

from totalprop.agents import AGENTS, DAAPPO
from totalprop.scripts.bench.timing import interleaved_medians

OWN = ("n_steps", "batch_size", "n_epochs", "normalize_advantage", "policy_kwargs")
ENV_ID = "Pendulum-v1"  # a cheap environment, so that the algorithm dominates the time


def bench_ppo(repeats: int, *, iterations: int = 1) -> dict[str, float]:
    """Measure steps per second, and ratios to PPO in the same run.

    Args:
        repeats: rounds, of which the median is taken.
        iterations: rollouts with updates per task and round.
    Returns:
        One column of the table.
    """
    recommended = AGENTS["daappo"].presets["recommended"]
    common: dict[str, Any] = {k: recommended[k] for k in OWN if k in recommended}
    common |= {"device": "cpu", "seed": 0}
    steps = common["n_steps"] * iterations

    def learner(cls: type[PPO], **changes: Any) -> Callable[[], object]:
        agent = cls("MlpPolicy", gym.make(ENV_ID), **{**common, **changes})
        return lambda: agent.learn(steps, reset_num_timesteps=False, log_interval=None)  # type: ignore[arg-type]

    tasks = {"PPO": learner(PPO), "none": learner(DAAPPO, action_source="none")}
    for source in ("dynamics", "q", "states"):
        tasks[source] = learner(DAAPPO, **{**recommended, "action_source": source})
    tasks["dynamics, tpx"] = learner(DAAPPO, **{**recommended, "estimator": "tpx"})
    seconds = interleaved_medians(tasks, repeats)
    row = {"steps/s (stable-baselines3 PPO)": steps / seconds["PPO"]}
    row["none: steps/s over PPO's"] = seconds["PPO"] / seconds["none"]
    for name in ("dynamics", "dynamics, tpx", "q", "states"):
        row[f"{name}: cost per step over PPO's"] = seconds[name] / seconds["PPO"]
    return row
