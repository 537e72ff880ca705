"""What the contract is tested in: every number that these environments return is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

LENGTH = 7  # of an episode
RETURN = -28.0  # of an episode of that length
LOW, HIGH = np.array([-2.0, 0.0], np.float32), np.array([4.0, 1.0], np.float32)


class CountingEnv(gym.Env):
    """Observation (episode, time, the action that led here); reward -time on arriving.

    Ends after `length` steps. Nothing is random; actions must lie in [-2, 4] x [0, 1] and come in
    the space's dtype.
    """

    def __init__(self, length: int = LENGTH, first: int = 0) -> None:
        self.observation_space = spaces.Box(-1e3, 1e3, (4,), np.float32)
        self.action_space = spaces.Box(LOW, HIGH)
        self.length, self.episode = length, first
        self.time = self.resets = self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.episode, self.time, self.resets = self.episode + 1, 0, self.resets + 1
        return np.array([self.episode, 0, 0, 0], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        assert action.dtype == self.action_space.dtype and self.action_space.contains(action)
        self.time, self.steps = self.time + 1, self.steps + 1
        observation = np.array([self.episode, self.time, *action], np.float32)
        done = self.time >= self.length
        info = {"is_success": self.episode % 2 == 0} if done else {}
        return observation, -float(self.time), done, False, info


class BrokenEnv(CountingEnv):
    """Returns a number that is none: at the first reset, in step 3, or as a reward in step 3."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        observation, info = super().reset(**kwargs)
        is_bad = self.where == "reset" and self.episode == 1
        return (observation * np.float32(np.nan) if is_bad else observation), info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        observation, reward, *rest = super().step(action)
        if self.time == 3 and self.where == "observation":
            observation = observation * np.float32(np.nan)
        return observation, (np.inf if self.time == 3 and self.where == "reward" else reward), *rest


class NoisyEnv(CountingEnv):
    """The first entry of the observation is a random walk from a random start."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        observation, info = super().reset(**kwargs)
        self.x = float(self.np_random.normal())
        observation[0] = self.x
        return observation, info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        observation, reward, *rest = super().step(action)
        self.x += 0.1 * float(self.np_random.normal())
        observation[0] = self.x
        return observation, reward, *rest


class ReusingEnv(NoisyEnv):
    """The same, but every observation is written into one array, which is what it returns."""

    buffer: np.ndarray | None = None

    def _own(self, observation: np.ndarray) -> np.ndarray:
        if self.buffer is None:
            self.buffer = np.empty_like(observation)
        self.buffer[:] = observation
        return self.buffer

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        observation, info = super().reset(**kwargs)
        return self._own(observation), info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        observation, *rest = super().step(action)
        return (self._own(observation), *rest)


class MeasuredEnv(NoisyEnv):
    """The same in other units and from another origin: scale * observation + offset.

    Observations are multiples of 2^-10, so that float64 holds them exactly at offsets up to 2^40;
    `seen` lists them without scale and offset.
    """

    def __init__(self, scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.scale, self.offset = scale, offset
        self.seen: list[np.ndarray] = []

    def measured(self, observation: np.ndarray) -> np.ndarray:
        return self.scale * observation + self.offset

    def _see(self, observation: np.ndarray) -> np.ndarray:
        self.seen.append(np.round(observation.astype(np.float64) * 2**10) / 2**10)
        return self.measured(self.seen[-1])

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        observation, info = super().reset(**kwargs)
        return self._see(observation), info

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        observation, *rest = super().step(action)
        return (self._see(observation), *rest)


class RewindableEnv(NoisyEnv):
    """The same, which knows its state."""

    def get_state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("x", "time", "episode", "steps")}

    def set_state(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class OtherSpaces(CountingEnv):
    """The same with an action less."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)


class Mixed(gym.ObservationWrapper):
    """Observations as a dictionary of vectors, a choice and a grey image of 20x30."""

    observation_space = spaces.Dict(
        {
            "actions": spaces.Box(-2, 4, (2,), np.float32),
            "episode": spaces.Box(-1e3, 1e3, (1,), np.float64),
            "time": spaces.Discrete(20),
            "picture": spaces.Box(0, 255, (20, 30), np.uint8),
        }
    )

    def observation(self, observation: np.ndarray) -> dict[str, Any]:
        picture = np.zeros((20, 30), np.uint8)
        picture[int(observation[1])] = 255
        return {
            "actions": observation[2:], "episode": observation[:1].astype(np.float64),
            "time": int(observation[1]), "picture": picture,
        }  # fmt: skip


class Filmed(gym.ObservationWrapper):
    """Observations as colour images of 84x50: the numbers as grey levels of four bars."""

    observation_space = spaces.Box(0, 255, (84, 50, 3), np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        bars = (128 + 16 * observation).clip(0, 255).astype(np.uint8)
        return np.broadcast_to(bars.repeat(21)[:, None, None], (84, 50, 3)).copy()


class Timed(gym.ObservationWrapper):
    """The time as the only observation, a choice."""

    observation_space = spaces.Discrete(20)

    def observation(self, observation: np.ndarray) -> np.int64:
        return np.int64(observation[1])


# What agents may see instead of a vector.
SEEN = {"dictionary": Mixed, "image": Filmed, "choice": Timed}


def vector(*lengths: int) -> DummyVecEnv:
    """Counting environments of these lengths; number i starts its episodes at 100 i."""
    makers: Sequence[Callable[[], gym.Env]] = [
        lambda length=length, i=i: Monitor(CountingEnv(length, first=100 * i))
        for i, length in enumerate(lengths)
    ]
    return DummyVecEnv(list(makers))
