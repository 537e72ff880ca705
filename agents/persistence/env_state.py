"""Snapshots of a vector environment as plain values, for files.

Each environment has to be in an `envs.rewind.Rewindable`, and the vector wrappers have to be among
`LAYERS`. Otherwise a snapshot still holds the wrappers' statistics, but not the running episodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import (
    VecCheckNan,
    VecEnv,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)
from stable_baselines3.common.vec_env.base_vec_env import VecEnvWrapper

# Attributes of stable-baselines3's Monitor, which wraps the Rewindable from outside.
MONITOR = ("rewards", "needs_reset", "episode_returns", "episode_lengths", "total_steps")
LAYERS: dict[type, tuple[str, ...]] = {  # stable-baselines3's vector wrappers: their state
    VecTransposeImage: (),
    VecCheckNan: (),
    VecMonitor: ("episode_count", "episode_returns", "episode_lengths"),
    VecNormalize: ("returns", "old_obs", "old_reward", "obs_rms", "ret_rms"),
}


class OtherEnvironment(ValueError):
    """The environment is not like the checkpoint's."""


def snapshot(env: VecEnv | None) -> dict[str, Any]:
    """Copy the state of all wrappers and environments.

    Returns:
        A state for `restore`; "environments" is None if they cannot be rewound.
    """
    layers, inner = layers_of(env)
    found = []
    for layer in layers:
        names = LAYERS.get(type(layer), ())
        found.append({name: _plain(getattr(layer, name)) for name in names if hasattr(layer, name)})
    environments = None
    if inner is not None and all(type(layer) in LAYERS for layer in layers):
        try:
            environments = [start.state_dict() for start in inner.env_method("snapshot")]
        except (AttributeError, ValueError):
            environments = None
    monitors = [_attribute(inner, name) for name in MONITOR] if inner is not None else []
    seeds = [] if inner is None else list(inner._seeds)  # for the next reset
    return {"layers": found, "environments": environments, "monitors": monitors, "seeds": seeds}


def check_number(expected: int, env: GymEnv) -> None:
    """Raise ValueError if `env` has another number of environments than a checkpoint."""
    number = env.num_envs if isinstance(env, VecEnv) else 1
    if number != expected:
        raise ValueError(
            f"the checkpoint has {expected} environment(s), env has {number}; resume with "
            f"{expected}, or `load` a model file, which works with any number"
        )


def restore(env: VecEnv | None, state: dict[str, Any]) -> bool:
    """Restore what `snapshot` returned.

    Returns:
        Whether the running episodes were restored too; if not, new ones have to begin.

    Raises:
        OtherEnvironment: the vector environment has another number of wrappers.
    """
    layers, inner = layers_of(env)
    if len(layers) != len(state["layers"]):
        raise OtherEnvironment(
            f"the checkpoint's environment has {len(state['layers'])} vector wrapper(s), env has "
            f"{len(layers)}; wrap it as it was (VecNormalize, VecMonitor, ...)"
        )
    for layer, values in zip(layers, state["layers"], strict=True):
        for name, value in values.items():
            current = getattr(layer, name, None)
            if isinstance(current, RunningMeanStd):
                vars(current).update(value)
            else:
                setattr(layer, name, value)
    if state["environments"] is None or inner is None:
        return False
    inner._seeds = state["seeds"]
    for i, values in enumerate(state["environments"]):
        inner.env_method("restore", values, indices=i)
    for name, of_each in zip(MONITOR, state["monitors"], strict=True):
        for i, value in enumerate(of_each or ()):
            inner.set_attr(name, value, indices=i)
    return True


def layers_of(env: VecEnv | None) -> tuple[list[VecEnvWrapper], VecEnv | None]:
    """The wrappers of a vector environment, outermost first, and what they wrap."""
    layers = []
    while isinstance(env, VecEnvWrapper):
        layers.append(env)
        env = env.venv
    return layers, env


def _plain(value: Any) -> Any:
    if isinstance(value, RunningMeanStd):
        mean, var = np.asarray(value.mean), np.asarray(value.var)
        return {"mean": mean, "var": var, "count": float(value.count)}
    return value


def _attribute(env: VecEnv, name: str) -> list[Any] | None:
    try:
        return env.get_attr(name)
    except AttributeError:
        return None
