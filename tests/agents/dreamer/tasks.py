"""Small tasks for DreamerTPX, whose observations are like those of well-known suites.

Learn one with `python -m tests.agents.dreamer.tasks room --seed 100`.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

from totalprop.agents import DreamerTPX
from totalprop.agents.dreamer.presets import PRESETS

EMPTY, RED, BLUE, AGENT = range(4)
STEPS = np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])  # east, south, west, north


class Room(gym.Env):
    """Go to the goal of the wanted colour, in a room like MiniGrid's.

    The goals are in opposite corners. The agent starts anywhere else, in any direction.
    The observation is a dictionary: the room's cells as symbols, the agent's direction, the wanted
    colour, and the share of time that is left. The actions turn left, turn right, and go forward.
    The wanted goal gives 1 and the other -1; each ends the episode.
    """

    def __init__(self, size: int = 4, limit: int = 25) -> None:
        self.size, self.limit = size, limit
        self.observation_space = spaces.Dict(
            {
                "cells": spaces.MultiDiscrete(np.full((size, size), 4)),
                "direction": spaces.Discrete(4),
                "wanted": spaces.Discrete(2, start=1),
                "time_left": spaces.Box(0, 1, (1,), np.float32),
            }
        )
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.red, self.blue = np.zeros(2, int), np.full(2, self.size - 1)
        self.at = np.array(divmod(self.np_random.integers(1, self.size**2 - 1), self.size))
        self.direction, self.time = int(self.np_random.integers(4)), 0
        self.wanted = int(self.np_random.integers(1, 3))
        return self._look(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        self.time += 1
        self.direction = (self.direction + (-1, 1, 0)[action]) % 4
        if action == 2:
            self.at = (self.at + STEPS[self.direction]).clip(0, self.size - 1)
        found = {RED: (self.at == self.red).all(), BLUE: (self.at == self.blue).all()}
        reward = float(found[self.wanted]) - float(found[RED + BLUE - self.wanted])
        return self._look(), reward, any(found.values()), self.time >= self.limit, {}

    def _look(self) -> dict[str, Any]:
        cells = np.full((self.size, self.size), EMPTY)
        cells[tuple(self.red)], cells[tuple(self.blue)] = RED, BLUE
        cells[tuple(self.at)] = AGENT
        left = np.array([1 - self.time / self.limit], np.float32)
        return {
            "cells": cells, "direction": self.direction, "wanted": self.wanted, "time_left": left,
        }  # fmt: skip


class Catch(gym.Env):
    """Catch falling balls with a paddle, on a screen like Atari's.

    The actions move the paddle to the left, not at all, and to the right. A ball that is caught
    gives 1, one that is missed -1. An episode has four balls.

    Args:
        shape: of the screen, (210, 160, 3) or (84, 84) for example.
    """

    def __init__(self, shape: tuple[int, ...] = (210, 160, 3)) -> None:
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.paddle, self.balls = 0.5, 0
        self._drop()
        return self._look(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        self.paddle = float(np.clip(self.paddle + 0.12 * (action - 1), 0.12, 0.88))
        self.y += 0.1
        reward = 0.0
        if self.y > 0.93:
            reward = 1.0 if abs(self.x - self.paddle) < 0.17 else -1.0
            self.balls += 1
            self._drop()
        return self._look(), reward, False, self.balls == 4, {}

    def _drop(self) -> None:
        self.x, self.y = float(self.np_random.uniform(0.06, 0.94)), 0.1

    def _look(self) -> np.ndarray:
        screen = np.zeros(self.observation_space.shape, np.uint8)
        self._draw(screen, self.x, self.y, 0.06, (255, 255, 80))
        self._draw(screen, self.paddle, 0.96, 0.12, (90, 160, 255))
        return screen

    def _draw(self, screen: np.ndarray, x: float, y: float, half: float, colour: Any) -> None:
        """A bar of width 2 half and height 0.08 at (x, y), which are in [0, 1]."""
        height, width = screen.shape[:2]
        rows = slice(round((y - 0.04) * height), round((y + 0.04) * height))
        columns = slice(round((x - half) * width), round((x + half) * width))
        screen[rows, columns] = colour if screen.ndim == 3 else 255


TASKS = {"room": Room, "catch": Catch, "catch-grey": lambda: Catch((84, 84))}


class Curve(BaseCallback):
    """Evaluates every so many steps, and prints steps, mean return and CPU seconds."""

    def __init__(self, env: gym.Env, every: int, episodes: int) -> None:
        super().__init__()
        self.env, self.every, self.episodes = Monitor(env), every, episodes
        self.returns: list[float] = []
        self.started = time.process_time()

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            self.env.reset(seed=12345)
            mean, _ = evaluate_policy(self.model, self.env, self.episodes, deterministic=True)
            self.returns.append(float(mean))
            seconds = time.process_time() - self.started
            print(f"{self.num_timesteps:6d} {mean:6.2f} {seconds:7.0f} s", flush=True)
        return True


def learn(
    name: str, seed: int, steps: int, every: int, episodes: int = 20, **changes: Any
) -> Curve:
    """Learn a task with the preset `recommended`, and return the learning curve."""
    make = TASKS[name]
    curve = Curve(make(), every, episodes)
    arguments = {**PRESETS["recommended"], "seed": seed, "device": "cpu", **changes}
    DreamerTPX("DreamerPolicy", make(), **arguments).learn(steps, curve)
    return curve


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--every", type=int, default=1000)
    options = parser.parse_args(arguments)
    learn(options.task, options.seed, options.steps, options.every)


if __name__ == "__main__":
    main(sys.argv[1:])
