"""Gymnasium environments; importing this package registers their ids."""

from typing import Any

import gymnasium as gym

from totalprop.envs.dm_control import SWIMMERS, TASKS


def _register(id: str, **spec: Any) -> None:
    if id not in gym.registry:  # in a checkout, this file may be imported under two names
        gym.register(id, **spec)


_register(
    id="totalprop/CartPoleSwingUp-v0",
    entry_point="totalprop.envs.cartpole:CartPoleSwingUpEnv",
    max_episode_steps=30,  # 3 s at 10 Hz: Parmas et al. 2018, Sec. 4.2
    reward_threshold=-15.0,  # INFERRED, see CartPoleSwingUpEnv
)
_register(
    id="totalprop/Unicycle-v0",
    entry_point="totalprop.envs.unicycle:UnicycleEnv",
    max_episode_steps=20,  # 2 s at 10 Hz: Parmas et al. 2018, Sec. 4.2
)
_register(
    id="totalprop/UnicyclePILCO-v0",
    entry_point="totalprop.envs.unicycle:UnicycleEnv",
    kwargs={"control_step": 0.15, "episode_steps": 67},
    max_episode_steps=67,  # 10 s: PILCO's settings_unicycle.m
)
for _domain, _task in (*TASKS, *(("swimmer", name) for name in SWIMMERS)):
    _register(
        id=f"dmc/{_domain}-{_task}-v0",
        entry_point="totalprop.envs.dm_control:DMControlEnv",
        kwargs={"domain": _domain, "task": _task},  # the suite enforces its own time limit
    )
