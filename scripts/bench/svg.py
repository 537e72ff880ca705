"""Environment steps per second of SVG and of SB3's DDPG, with as many updates of equal networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
from stable_baselines3 import DDPG
from torch import nn

from totalprop.agents import AGENTS, SVG
from totalprop.scripts.bench.timing import interleaved_medians

ENV_ID = "Pendulum-v1"  # a cheap environment, so that the algorithm dominates the time
EPISODE, UPDATES = 200, 50  # its steps, and gradient steps after them
PRESET = "svg2015"
BATCH = 128
# "dpg" has the gradient of DDPG. Not "inf", whose gradient steps take episodes in place of batches.
VARIANTS = ("dpg", "0", "1-er")


def bench_svg(repeats: int, *, steps: int = EPISODE, updates: int = UPDATES) -> dict[str, float]:
    """Measure steps per second, and costs over DDPG's in the same run.

    Every learner makes `updates` gradient steps per round of `steps`, of each of its networks: DDPG
    of actor and critic, SVG of policy and critic and, for SVG(1), of the model. Batches hold 128
    transitions; actor and critic have the layers of preset `svg2015`.

    Args:
        repeats: rounds, of which the median is taken.
        steps: environment steps per round; whole episodes.
        updates: gradient steps of each network per round.

    Returns:
        One column of the table.
    """
    preset = AGENTS["svg"].presets[PRESET]
    common: dict[str, Any] = {"device": "cpu", "seed": 0, "batch_size": BATCH}
    actor, critic = preset["policy_kwargs"]["net_arch"], list(preset["value_hidden"])

    def learner(agent: DDPG | SVG) -> Callable[[], object]:
        return lambda: agent.learn(steps, reset_num_timesteps=False, log_interval=None)  # type: ignore[arg-type]

    ddpg = DDPG(
        "MlpPolicy",
        gym.make(ENV_ID),
        train_freq=steps,
        gradient_steps=updates,
        learning_starts=0,
        gamma=preset["gamma"],
        policy_kwargs={"net_arch": {"pi": actor, "qf": critic}, "activation_fn": nn.Tanh},
        **common,
    )
    tasks = {"DDPG": learner(ddpg)}
    for variant in VARIANTS:
        agent = SVG(
            "MlpPolicy",
            gym.make(ENV_ID),
            train_freq=steps,
            policy_updates=updates,
            value_updates=updates,
            model_updates=updates,
            learning_starts=0,
            **{**preset, "variant": variant},
            **common,
        )
        tasks[variant] = learner(agent)
    seconds = interleaved_medians(tasks, repeats)
    row = {"steps/s (stable-baselines3 DDPG)": steps / seconds["DDPG"]}
    row["dpg: steps/s over DDPG's"] = seconds["DDPG"] / seconds["dpg"]
    for variant in VARIANTS[1:]:
        row[f"{variant}: cost per step over DDPG's"] = seconds[variant] / seconds["DDPG"]
    return row
