"""Actions as the world model sees them: numbers in [-1, 1], or one-hot choices.

Replay, filter and imagination hold actions in this form, [n, A]. The actors are in `policy` and
`categorical_actor`.
"""

from __future__ import annotations

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor


class Continuous:
    """A bounded Box, scaled to [-1, 1] and flattened.

    Args:
        space: the environment's.
    """

    def __init__(self, space: spaces.Box) -> None:
        self.space = space
        self.size = int(np.prod(space.shape))  # A

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """[n, A] -> [n, *shape] in the environment's units and dtype."""
        low, high = self.space.low, self.space.high
        scaled = actions.reshape(-1, *self.space.shape)
        found: np.ndarray = low + 0.5 * (scaled + 1.0) * (high - low)
        return np.clip(found, low, high).astype(self.space.dtype)

    def from_env(self, actions: np.ndarray) -> np.ndarray:
        """[n, *shape] in the environment's units -> [n, A]; in [-1, 1] where within the bounds."""
        low, high = self.space.low.astype("f8"), self.space.high.astype("f8")
        span = np.where(high > low, high - low, np.inf)  # 0 where there is nothing to choose
        scaled = 2.0 * (actions - low) / span - (high > low)
        return scaled.reshape(len(actions), self.size).astype(np.float32)

    def random(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """[n, A] uniformly random actions."""
        return rng.uniform(-1.0, 1.0, (n, self.size)).astype(np.float32)

    def extreme(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """[n, A] random actions at the bounds, which move a system most (Seyde et al. 2021)."""
        return rng.choice(np.array([-1.0, 1.0], np.float32), (n, self.size))

    def explore(self, actions: Tensor, amount: float, generator: torch.Generator) -> Tensor:
        """Add normal noise of standard deviation `amount`, within the bounds."""
        noise = torch.randn(actions.shape, generator=generator, device=actions.device)
        return (actions + amount * noise).clamp(-1.0, 1.0)


class Choices:
    """Discrete or MultiDiscrete: a one-hot vector for each choice, one after another.

    Args:
        space: the environment's.
    """

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete) -> None:
        self.space = space
        numbers = space.n if isinstance(space, spaces.Discrete) else space.nvec
        self.sizes = [int(n) for n in np.ravel(numbers)]  # options of each choice
        self.size = sum(self.sizes)  # A

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """[n, A] -> [n, *shape] whole numbers of the environment's dtype, from its start on."""
        parts = np.split(actions, np.cumsum(self.sizes)[:-1], axis=1)
        numbers = np.stack([part.argmax(1) for part in parts], axis=1)
        shaped = numbers.reshape(-1, *np.shape(self.space.start))
        found: np.ndarray = (shaped + self.space.start).astype(self.space.dtype)
        return found

    def from_env(self, actions: np.ndarray) -> np.ndarray:
        """[n, *shape] whole numbers as the environment takes them -> [n, A] one-hot vectors.

        Raises:
            ValueError: a number is none of the options.
        """
        numbers = (actions - self.space.start).reshape(len(actions), -1)
        if ((numbers < 0) | (numbers >= self.sizes)).any():
            row = np.flatnonzero(((numbers < 0) | (numbers >= self.sizes)).any(1))[0]
            raise ValueError(f"action {actions[row]} is not in {self.space}")
        parts = [np.eye(k, dtype=np.float32)[numbers[:, i]] for i, k in enumerate(self.sizes)]
        return np.concatenate(parts, axis=1)

    def random(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """[n, A] uniformly random actions."""
        parts = [np.eye(k, dtype=np.float32)[rng.integers(k, size=n)] for k in self.sizes]
        return np.concatenate(parts, axis=1)

    def extreme(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """[n, A] uniformly random actions: no choice is more extreme than another."""
        return self.random(n, rng)

    def explore(self, actions: Tensor, amount: float, generator: torch.Generator) -> Tensor:
        """Replace each action by a uniformly random one, with probability `amount`.

        Hafner et al. 2020, App. A (discrete control); danijar/dreamer, `epsilon_greedy`.
        """
        n, device = len(actions), actions.device
        replaced = torch.rand((n, 1), generator=generator, device=device) < amount
        parts = []
        for k in self.sizes:
            drawn = torch.randint(k, (n,), generator=generator, device=device)
            parts.append(torch.eye(k, dtype=actions.dtype, device=device)[drawn])
        return torch.where(replaced, torch.cat(parts, 1), actions)


ActionForm = Continuous | Choices


def action_form(space: spaces.Space) -> ActionForm:
    """How actions of a space look to the world model."""
    if isinstance(space, spaces.Box):
        return Continuous(space)
    assert isinstance(space, spaces.Discrete | spaces.MultiDiscrete)
    return Choices(space)
