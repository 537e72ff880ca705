"""Exact snapshots of an environment: `snapshot`, `restore`, `rewound`, `can_rewind`.

A restored environment continues bit-identically, so several actions can be tried from one state.
This module walks through the wrappers, and knows the state of a dm_control simulation. Any other
environment becomes rewindable by implementing `get_state` and `set_state` (see `HasState`). For
vector environments there is the wrapper `Rewindable`.
"""

import contextlib
import copy
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import PassiveEnvChecker
from gymnasium.wrappers.utils import RunningMeanStd

# Arrays of the model that the suite's tasks randomise at reset; a test compares with all arrays.
MODEL_FIELDS = (
    *("body_pos", "body_quat", "dof_damping", "geom_pos", "geom_rgba", "geom_size"),
    *("hfield_data", "light_pos", "site_pos", "site_rgba", "site_size", "wrap_prm"),
)
# Attributes of wrappers that are no state of an episode: what every wrapper has, and a time limit.
_NOT_STATE = {
    *("env", "_action_space", "_observation_space", "_metadata", "_cached_spec"),
    "_max_episode_steps",
}
# What reset and step of gymnasium's classic control assign, besides the generator.
_CLASSIC_CONTROL = "gymnasium.envs.classic_control."
_CLASSIC_STATE = ("state", "last_u", "steps_beyond_terminated")
_PLAIN = (int, float, str, type(None), RunningMeanStd)


class HasState(Protocol):
    """What an environment or a wrapper implements to be rewindable.

    The state is everything that later steps depend on, except `np_random` and the configuration. It
    may hold numbers, strings, None, numeric arrays, and lists, tuples and string-keyed dicts of
    these. `get_state` may return live objects, since `snapshot` copies them, and `set_state` may
    keep what it is given. `set_state` raises ValueError, before it changes anything, if the state
    does not fit.
    """

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Snapshot:
    """State of an environment and its wrappers at one moment; read-only copies of plain values.

    Attributes:
        layers: (class name, state) of each wrapper, outermost first, then of the environment.
        np_random: state of the environment's generator.
        np_random_seed: seed of that generator.
    """

    layers: tuple[tuple[str, dict[str, Any]], ...]
    np_random: dict[str, Any]
    np_random_seed: int | None

    def state_dict(self) -> dict[str, Any]:
        """The same as a dict of plain values and arrays, which can be written to a file."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def can_rewind(env: Any) -> bool:
    """Whether `snapshot` and `restore` support the innermost environment."""
    return isinstance(env, gym.Env) and (
        _is_rewindable(env.unwrapped) or _is_classic(env.unwrapped)
    )


def snapshot(env: gym.Env) -> Snapshot:
    """Copy everything that the rest of the episode, and later episodes, depend on.

    This is the environment's `get_state` and `np_random`, and each wrapper's `get_state` or, if it
    has none, those of its attributes that are plain values: counters, flags, queues, statistics.
    TimeLimit's count, stacked frames and running means are thus included. The generator of
    `action_space` is not, so that actions sampled after each restore differ. Nor are files: what a
    Monitor writes at the end of an extra episode remains.

    Args:
        env: one environment, wrapped or not; `reset` need not have been called.

    Returns:
        The snapshot; later steps do not change it.

    Raises:
        ValueError: the environment cannot be rewound.
    """
    _check_rewindable(env)
    layers = []
    for layer in _layers(env):
        if _is_rewindable(layer):
            state = layer.get_state()
        else:
            names = vars(layer).keys() - _NOT_STATE
            if _is_classic(layer):
                names &= set(_CLASSIC_STATE)
            state = {name: vars(layer)[name] for name in sorted(names)}
            state = {name: value for name, value in state.items() if _is_plain(value)}
        layers.append((type(layer).__name__, _copy(state, writeable=False)))
    inner = env.unwrapped
    generator = inner.np_random.bit_generator.state  # the property creates the generator if needed
    return Snapshot(tuple(layers), _copy(generator, writeable=False), inner.np_random_seed)


def restore(env: gym.Env, start: Snapshot) -> None:
    """Restore a snapshot in the same environment, or in another of the same task and wrappers.

    The configuration (time limit, action repeat, kind of observation) does not change. Random
    numbers repeat too, so that rollouts from one snapshot share their noise.

    Args:
        env: the environment of the snapshot, or an equal one; it need not have been reset.
        start: the snapshot; it can be restored any number of times.

    Raises:
        ValueError: the environment cannot be rewound, or the snapshot does not fit. It is
            unchanged then.
    """
    _check_rewindable(env)
    layers = _layers(env)
    names, expected = [type(layer).__name__ for layer in layers], [name for name, _ in start.layers]
    if names != expected:
        raise ValueError(
            f"The snapshot is of {' > '.join(expected)}, the environment is {' > '.join(names)}: "
            "restore it into an environment of the same task and wrappers."
        )
    # Innermost first, since the environment is what may refuse its state.
    for layer, (_, state) in reversed(list(zip(layers, start.layers))):
        copied = _copy(state, writeable=True)
        if _is_rewindable(layer):
            layer.set_state(copied)
        else:
            _set_attributes(layer, copied)
    _release_checkers(env)
    inner = env.unwrapped
    inner.np_random.bit_generator.state = _copy(start.np_random, writeable=True)
    inner._np_random_seed = start.np_random_seed


@contextlib.contextmanager
def rewound(env: gym.Env) -> Iterator[Snapshot]:
    """Restore the environment at the end of `with`, errors or not: extra rollouts leave no trace.

    Args:
        env: as for `snapshot`.

    Yields:
        The snapshot taken at the start, to be restored before each further rollout.

    Raises:
        ValueError: the environment cannot be rewound.
    """
    start = snapshot(env)
    try:
        yield start
    finally:
        restore(env, start)


class Rewindable(gym.Wrapper):
    """Wrapper with the methods `snapshot`, `restore` and `extra_step`, for a VecEnv's `env_method`.

    Wrappers around this one do not see the extra steps. So put it inside the Monitor:
    `DummyVecEnv([lambda: Monitor(Rewindable(gym.make(name)))])`.

    Args:
        env: the environment in all wrappers that change what an agent sees.

    Raises:
        ValueError: the environment cannot be rewound.
    """

    def __init__(self, env: gym.Env) -> None:
        _check_rewindable(env)
        super().__init__(env)

    def snapshot(self) -> Snapshot:
        """Call `snapshot` on the wrapped environment."""
        return snapshot(self.env)

    def restore(self, start: Snapshot | Mapping[str, Any]) -> None:
        """Call `restore` on the wrapped environment, with a snapshot or its `state_dict`."""
        if not isinstance(start, Snapshot):
            layers = tuple((str(name), state) for name, state in start["layers"])
            start = Snapshot(layers, start["np_random"], start["np_random_seed"])
        restore(self.env, start)

    def extra_step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take a step that outer wrappers do not see; restore a snapshot before the next `step`.

        Returns:
            Observation, reward, terminated, truncated, info. The end of an episode resets nothing.
            The observation is a copy, since the environment may reuse its array.
        """
        observation, *rest = self.env.step(action)
        return (copy.deepcopy(observation), *rest)


def simulation_state(dm_env: Any) -> dict[str, Any]:
    """Return everything that later steps of a dm_control environment depend on, as live arrays.

    This is MuJoCo's full integration state, the step counter, the task's generator and numbers, and
    the parts of the model that tasks randomise at reset. The integration state includes the
    solver's warm start, without which results agree only to 1e-10.

    Args:
        dm_env: a `dm_control.rl.control.Environment`.

    Returns:
        A state for `set_simulation_state`.
    """
    import mujoco

    model, data = dm_env.physics.model.ptr, dm_env.physics.data.ptr
    parts = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(model, parts))
    mujoco.mj_getState(model, data, integration, parts)
    numbers = {
        name: value
        for name, value in vars(dm_env.task).items()
        if isinstance(value, int | float | np.ndarray)
    }
    return {
        "integration": integration,
        "model": {name: getattr(model, name) for name in MODEL_FIELDS},
        "task_numbers": numbers,
        "task_random": dm_env.task.random.get_state(legacy=False),
        "step_count": dm_env._step_count,
        "reset_next_step": dm_env._reset_next_step,
    }


def set_simulation_state(dm_env: Any, state: dict[str, Any]) -> None:
    """Restore a `simulation_state` of this dm_control environment, or of an equal one.

    Raises:
        ValueError: the state is from another model or another version of MuJoCo.
    """
    import mujoco

    physics, task = dm_env.physics, dm_env.task
    model, data = physics.model.ptr, physics.data.ptr
    parts = mujoco.mjtState.mjSTATE_INTEGRATION
    size, expected = state["integration"].size, mujoco.mj_stateSize(model, parts)
    if size != expected:
        raise ValueError(
            f"The snapshot holds {size} numbers, MuJoCo {mujoco.__version__} expects {expected} "
            "for this model: take it with the same task and the same version of MuJoCo."
        )
    new_terrain = not np.array_equal(model.hfield_data, state["model"]["hfield_data"])
    for name, value in state["model"].items():
        getattr(model, name)[...] = value
    mujoco.mj_setState(model, data, state["integration"], parts)
    # dm_control's next step begins with mj_step2, which needs what only forward() computes.
    physics.forward()
    vars(task).update(state["task_numbers"])
    task.random.set_state(state["task_random"])
    dm_env._step_count = state["step_count"]
    dm_env._reset_next_step = state["reset_next_step"]
    if new_terrain and physics._contexts:  # OpenGL has a copy of its own
        with physics._contexts.gl.make_current() as context:
            for index in range(model.nhfield):
                target = physics._contexts.mujoco.ptr
                context.call(mujoco.mjr_uploadHField, model, target, index)


def _all_layers(env: gym.Env) -> list[Any]:
    layers: list[Any] = [env]
    while isinstance(layers[-1], gym.Wrapper):
        layers.append(layers[-1].env)
    return layers


def _layers(env: gym.Env) -> list[Any]:
    # A checker's only state is what it has checked; restored, it would check again each time.
    return [layer for layer in _all_layers(env) if not isinstance(layer, PassiveEnvChecker)]


def _release_checkers(env: gym.Env) -> None:
    # A checker compares the first step with the first reset, and fails if there was no reset.
    for layer in _all_layers(env):
        if isinstance(layer, PassiveEnvChecker) and not layer.checked_reset:
            vars(layer).update(checked_reset=True, checked_step=True, checked_data_reuse=True)


def _is_rewindable(layer: Any) -> bool:
    # Ask the class, since some wrappers forward unknown attributes to what they wrap.
    return all(callable(getattr(type(layer), name, None)) for name in ("get_state", "set_state"))


def _is_classic(env: Any) -> bool:
    # By module, which excludes users' subclasses: they may have more state.
    return type(env).__module__.startswith(_CLASSIC_CONTROL)


def _check_rewindable(env: Any) -> None:
    if can_rewind(env):
        return
    name = type(env.unwrapped if isinstance(env, gym.Env) else env).__name__
    raise ValueError(
        f"{name} cannot be rewound: pass one dmc/ environment, totalprop/CartPoleSwingUp-v0, "
        "totalprop/Unicycle-v0, one of gymnasium's classic control or an environment with "
        'get_state() and set_state(), or choose action_source="dynamics".'
    )


def _is_plain(value: Any, *, is_inside: bool = False) -> bool:
    """Whether a value can be restored, even from a file; a deque only if it is an attribute."""
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "biuf"
    if (isinstance(value, deque) and not is_inside) or type(value) in (list, tuple):
        return all(_is_plain(entry, is_inside=True) for entry in value)
    if type(value) is dict:
        inside = value.values()
        return all(isinstance(key, str) for key in value) and all(
            _is_plain(entry, is_inside=True) for entry in inside
        )
    return isinstance(value, _PLAIN)


def _copy(value: Any, *, writeable: bool) -> Any:
    if isinstance(value, np.ndarray):
        copied = np.array(value)
        copied.flags.writeable = writeable
        return copied
    if isinstance(value, RunningMeanStd):
        value = vars(value)
    if isinstance(value, dict):
        return {name: _copy(entry, writeable=writeable) for name, entry in value.items()}
    if isinstance(value, list | tuple | deque):
        kind = tuple if isinstance(value, tuple) else list
        return kind(_copy(entry, writeable=writeable) for entry in value)
    return value


def _set_attributes(wrapper: gym.Wrapper, state: dict[str, Any]) -> None:
    for name, value in state.items():
        current = vars(wrapper).get(name)
        if isinstance(current, RunningMeanStd):
            vars(current).update(value)
        elif isinstance(current, deque):  # keeps its maxlen
            current.clear()
            current.extend(value)
        else:
            vars(wrapper)[name] = value
