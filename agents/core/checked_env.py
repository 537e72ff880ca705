"""Checks what an environment returns, and keeps its terminal observations.

stable-baselines3's DummyVecEnv takes an environment's word for it. An observation of a wrong shape
may be broadcast into its buffer, and the last observation of an episode is kept by reference and
then overwritten by the next reset, if the environment writes every observation into one array.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from totalprop.agents.core.spaces import describe


class CheckedEnv(gym.Wrapper):
    """Refuses what is not Gymnasium's, and copies the observation with which an episode ends."""

    def __getattr__(self, name: str) -> Any:
        """What the environment has beyond Gymnasium's methods, for wrappers that call it."""
        if name == "env" or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.env, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set it on the environment, as `VecEnv.set_attr` means it, but for what is private."""
        if name == "env" or name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self.env, name, value)

    def set_wrapper_attr(self, name: str, value: Any, *, force: bool = True) -> bool:
        """Set it on what it belongs to, which is never this wrapper."""
        return self.env.set_wrapper_attr(name, value, force=force)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Like the environment's.

        Raises:
            ValueError: it does not return (observation, info), or the observation's shape is wrong.
        """
        returned = self.env.reset(**kwargs)
        if not (isinstance(returned, tuple) and len(returned) == 2):
            self._refuse("reset", returned, "(observation, info)")
        self._check(returned[0], "reset")
        return returned

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Like the environment's.

        Raises:
            ValueError: it does not return five values, the observation's shape is wrong, the reward
                is no number, or the info no dictionary.
        """
        five = "(observation, reward, terminated, truncated, info)"
        try:
            returned = self.env.step(action)
        except ValueError as error:  # of a wrapper such as TimeLimit
            if "values to unpack (expected 5" in str(error):
                self._refuse("step", None, five, error)
            raise
        if not (isinstance(returned, tuple) and len(returned) == 5):
            self._refuse("step", returned, five)
        observation, reward, terminated, truncated, info = returned
        self._check(observation, "step")
        number = np.asarray(reward)
        if number.dtype.kind not in "biuf" or number.ndim:
            raise ValueError(
                f"step() of {self._name} returned the reward {reward!r}, expected one number; "
                "return float(reward)"
            )
        if not isinstance(info, dict):
            raise ValueError(
                f"step() of {self._name} returned the info {info!r}, expected a dictionary; "
                "return {} where there is nothing to say"
            )
        if terminated or truncated:
            observation = _kept(observation, self.observation_space)
        return observation, reward, terminated, truncated, info

    def _refuse(
        self, method: str, returned: Any, expected: str, cause: Exception | None = None
    ) -> NoReturn:
        kind = "another number of values"
        if returned is not None:
            is_tuple = isinstance(returned, tuple)
            kind = f"{len(returned)} values" if is_tuple else f"a {type(returned).__name__}"
        raise ValueError(
            f"{method}() of {self._name} returned {kind}, expected {expected}; convert an "
            "environment of the old Gym with shimmy.GymV21CompatibilityV0(env=env)"
        ) from cause

    def _check(self, observation: Any, method: str) -> None:
        parts = [(self.observation_space, observation)]
        if isinstance(self.observation_space, spaces.Dict):
            names = set(self.observation_space)
            if not isinstance(observation, dict) or not observation.keys() >= names:
                raise ValueError(
                    f"{method}() of {self._name} returned {_kind(observation)}, its "
                    f"observation space is {describe(self.observation_space)}; make them agree"
                )
            parts = [(space, observation[k]) for k, space in self.observation_space.items()]
        for space, part in parts:
            if isinstance(space, spaces.Box) and np.shape(part) != space.shape:
                raise ValueError(
                    f"{method}() of {self._name} returned an observation of shape "
                    f"{list(np.shape(part))}, its observation space says {list(space.shape)}; "
                    "make them agree"
                )

    @property
    def _name(self) -> str:
        return type(self.env.unwrapped).__name__


def _kept(observation: Any, space: spaces.Space) -> Any:
    """A copy, as an array where it may be a list."""
    if isinstance(space, spaces.Dict):
        return {name: _kept(observation[name], part) for name, part in space.items()}
    if isinstance(space, spaces.Box):
        return np.array(observation, space.dtype)
    return copy.deepcopy(observation)


def _kind(observation: Any) -> str:
    if isinstance(observation, dict):
        return f"a dictionary of {', '.join(map(repr, observation))}"
    return f"a {type(observation).__name__}"


def check_environments(env: VecEnv) -> VecEnv:
    """Put every environment of a DummyVecEnv into a CheckedEnv.

    It is put under the outermost wrapper, such as a Monitor, on which `set_attr` and users' own
    code rely. SubprocVecEnv's environments are out of reach: wrap them where they are made.

    Args:
        env: any vector environment, changed in place.

    Returns:
        `env`.
    """
    inner = env.unwrapped
    if isinstance(inner, DummyVecEnv):
        for i, one in enumerate(inner.envs):
            if not _is_checked(one):
                if isinstance(one, gym.Wrapper):
                    one.env = CheckedEnv(one.env)
                else:
                    inner.envs[i] = CheckedEnv(one)
    return env


def _is_checked(env: gym.Env) -> bool:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, CheckedEnv):
            return True
        env = env.env
    return False
