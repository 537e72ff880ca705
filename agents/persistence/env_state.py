"""Snapshots of a vector environment as plain values, for files.

Each environment has to be in an `envs.rewind.Rewindable`, and the vector wrappers have to be among
`LAYERS`. Otherwise a snapshot still holds the wrappers' statistics, but not the running episodes.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv
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
MONITOR: dict[str, type] = {
    "rewards": list, "needs_reset": bool, "episode_returns": list, "episode_lengths": list,
    "total_steps": int,
}  # fmt: skip
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
    # A worker of a SubprocVecEnv that is asked for what it does not have dies: hence `has_attr`.
    is_known = inner is not None and all(type(layer) in LAYERS for layer in layers)
    if inner is not None and is_known and inner.has_attr("snapshot"):
        try:
            environments = [start.state_dict() for start in inner.env_method("snapshot")]
        except (AttributeError, ValueError):
            environments = None
    monitors = [_attribute(inner, name) for name in MONITOR] if inner is not None else []
    seeds = [] if inner is None else list(inner._seeds)  # for the next reset
    return {"layers": found, "environments": environments, "monitors": monitors, "seeds": seeds}


def check_number(expected: int, env: GymEnv) -> None:
    """Raise ValueError if `env` has another number of environments than a checkpoint."""
    number = env.num_envs if isinstance(env, VecEnv | VectorEnv) else 1
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
        ValueError: the state is not one of such environments; nothing but wrappers has changed.
    """
    layers, inner = layers_of(env)
    _check(state, inner)
    if len(layers) != len(state["layers"]):
        raise OtherEnvironment(
            f"the checkpoint's environment has {len(state['layers'])} vector wrapper(s), env has "
            f"{len(layers)}; wrap it as it was (VecNormalize, VecMonitor, ...)"
        )
    for layer, values in zip(layers, state["layers"], strict=True):
        _check_layer(layer, values)
        for name, value in values.items():
            current = getattr(layer, name, None)
            if isinstance(current, RunningMeanStd):
                vars(current).update(value)
            elif _is_statistics(current):
                for part, own in value.items():
                    vars(current[part]).update(own)
            else:
                setattr(layer, name, value)
    if state["environments"] is None or inner is None:
        return False
    inner._seeds = state["seeds"]
    for i, values in enumerate(state["environments"]):
        inner.env_method("restore", values, indices=i)
    for name, of_each in zip(MONITOR, state["monitors"], strict=True):
        for i, value in enumerate(of_each or ()):
            plain = value.tolist() if isinstance(value, np.ndarray) else value
            # Unlike `set_attr`, which sets it on the outermost wrapper, whatever that is.
            inner.env_method("set_wrapper_attr", name, plain, indices=i)
    return True


def _check(state: dict[str, Any], inner: VecEnv | None) -> None:
    """Raise ValueError for a state that `snapshot` does not return; a file may hold any."""
    n, environments = 0 if inner is None else inner.num_envs, state["environments"]
    if environments is not None and not (isinstance(environments, list) and len(environments) == n):
        raise ValueError(f"it does not hold the states of {n} environments")
    is_right = len(state["seeds"]) == n and all(
        seed is None or isinstance(seed, int | np.integer) for seed in state["seeds"]
    )
    monitors = dict(zip(MONITOR, state["monitors"], strict=environments is not None))
    for name, of_each in monitors.items():
        is_right &= of_each is None or (
            len(of_each) == n and all(_is_record(value, MONITOR[name]) for value in of_each)
        )
    if not is_right:
        raise ValueError(f"its seeds, or Monitor's records, are not those of {n} environments")


def _check_layer(layer: VecEnvWrapper, values: dict[str, Any]) -> None:
    names = LAYERS.get(type(layer), ())
    needed = {name for name in names if hasattr(layer, name)}
    if not needed <= values.keys() <= set(names):
        raise ValueError(f"it does not hold the state of {type(layer).__name__}")
    for name, value in values.items():
        current = getattr(layer, name, None)
        if isinstance(current, RunningMeanStd):
            _check_statistics(name, current, value)
        elif _is_statistics(current):
            if not isinstance(value, dict) or value.keys() != current.keys():
                raise ValueError(f"its {name} is not that of {', '.join(current)}")
            for part, own in value.items():
                _check_statistics(name, current[part], own)
        elif name == "episode_count":
            if not isinstance(value, int):
                raise ValueError(f"its {name} is not a whole number")
        elif isinstance(layer.observation_space, spaces.Dict) and isinstance(value, dict):
            continue
        elif not _is_of_each(value, layer.num_envs):
            raise ValueError(f"its {name} is not that of {layer.num_envs} environments")


def _check_statistics(name: str, current: RunningMeanStd, value: dict[str, Any]) -> None:
    mean, var, count = (np.asarray(value[key]) for key in ("mean", "var", "count"))
    is_right = (
        mean.shape == var.shape == np.shape(current.mean)
        and mean.dtype.kind == var.dtype.kind == count.dtype.kind == "f"
        and bool(np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all())
        and bool(np.isfinite(count) and count > 0)
    )
    if not is_right:
        raise ValueError(f"its {name} is not a mean and variance of shape {np.shape(current.mean)}")


def _is_of_each(value: Any, n: int) -> bool:
    is_array = isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
    is_array = is_array and (value.shape[:1] == (n,) or not value.size)  # none before a step
    return is_array and bool(np.isfinite(value).all())


def layers_of(env: VecEnv | None) -> tuple[list[VecEnvWrapper], VecEnv | None]:
    """The wrappers of a vector environment, outermost first, and what they wrap."""
    layers = []
    while isinstance(env, VecEnvWrapper):
        layers.append(env)
        env = env.venv
    return layers, env


def _is_record(value: Any, kind: type) -> bool:
    """Whether it is a number of Monitor's, or one of its lists: arrays, in older files lists."""
    is_array = isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "if"
    return isinstance(value, kind) or (kind is list and is_array)


def _is_statistics(value: Any) -> TypeGuard[dict[str, RunningMeanStd]]:
    """Whether it is VecNormalize's of a dictionary's parts."""
    return isinstance(value, dict) and any(isinstance(v, RunningMeanStd) for v in value.values())


def _plain(value: Any) -> Any:
    if isinstance(value, RunningMeanStd):
        mean, var = np.asarray(value.mean), np.asarray(value.var)
        return {"mean": mean, "var": var, "count": float(value.count)}
    if _is_statistics(value):
        return {part: _plain(own) for part, own in value.items()}
    return value


def _attribute(env: VecEnv, name: str) -> list[Any] | None:
    """The attribute of each environment; lists of numbers as arrays, since they may be long."""
    if not env.has_attr(name):
        return None
    return [np.array(x) if MONITOR[name] is list else x for x in env.get_attr(name)]
