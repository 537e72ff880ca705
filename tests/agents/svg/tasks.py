"""A noisy linear-quadratic task, whose best return is known, for SVG's tests."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from torch import Tensor

STEPS = 20


class Regulator(gym.Env):
    """s' = s + u + noise in the plane; reward -|s|² on arriving; episodes of 20 steps.

    Starts at [±1, 0]. Without control the return is -20.2 (20 x 1, and 0.0008 x 210 of the noise),
    with u = -s / 2 about -0.36.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, terminates: bool = False) -> None:
        self.terminates = terminates

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time = 0
        self.state = np.array([self.np_random.choice([-1.0, 1.0]), 0.0])
        return self.state.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action)
        self.time += 1
        self.state = self.state + action + 0.02 * self.np_random.normal(size=2)
        reward, over = -float((self.state**2).sum()), self.time >= STEPS
        ends = over and self.terminates
        return self.state.astype(np.float32), reward, ends, over and not ends, {}


class CostRegulator(Regulator):
    """The same, which knows its cost."""

    @staticmethod
    def cost(states: Tensor) -> Tensor:
        return states.square().sum(-1)
