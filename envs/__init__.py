"""Gymnasium environments; importing this package registers their ids."""

import gymnasium as gym

from envs.dm_control import TASKS

gym.register(
    id="totalprop/CartPoleSwingUp-v0",
    entry_point="envs.cartpole:CartPoleSwingUpEnv",
    max_episode_steps=30,  # 3 s at 10 Hz: Parmas et al. 2018, Sec. 4.2
    reward_threshold=-15.0,  # INFERRED, see CartPoleSwingUpEnv
)
for _domain, _task in TASKS:
    gym.register(
        id=f"dmc/{_domain}-{_task}-v0",
        entry_point="envs.dm_control:DMControlEnv",
        kwargs={"domain": _domain, "task": _task},  # the suite keeps its own time limit
    )
