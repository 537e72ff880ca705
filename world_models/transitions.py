"""A first-in, first-out buffer of transitions, numbered from the first ever added."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class TransitionBuffer:
    """First in, first out: transitions of vectors in their environment's own units.

    Args:
        capacity: transitions held. state_size: S. action_size: A.
    """

    _ARRAYS = ("states", "actions", "rewards", "next_states")

    def __init__(self, capacity: int, state_size: int, action_size: int) -> None:
        self.capacity = capacity
        self.states = np.empty((capacity, state_size), np.float32)
        self.actions = np.empty((capacity, action_size), np.float32)
        self.rewards = np.empty(capacity, np.float32)
        self.next_states = np.empty((capacity, state_size), np.float32)
        self.count = 0  # ever added

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    def add(
        self, states: np.ndarray, actions: np.ndarray, rewards: np.ndarray, next_states: np.ndarray
    ) -> None:
        """Store n transitions: [n, S], [n, A], [n], [n, S] (the true next states of an end)."""
        slots = (self.count + np.arange(len(states))) % self.capacity
        self.states[slots], self.actions[slots] = states, actions
        self.rewards[slots], self.next_states[slots] = rewards, next_states
        self.count += len(states)

    def rows(self, first: int, stop: int) -> dict[str, np.ndarray]:
        """Stored transitions, numbered from the first ever added."""
        slots = np.arange(first, stop) % self.capacity
        return {name: getattr(self, name)[slots] for name in self._ARRAYS}

    def put_rows(self, first: int, rows: Mapping[str, np.ndarray]) -> None:
        """Store what `rows` returned; calls go from old to new."""
        n = len(rows["rewards"])
        slots = np.arange(first, first + n) % self.capacity
        for name in self._ARRAYS:
            getattr(self, name)[slots] = rows[name]
        self.count = first + n

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """n different transitions (all there are, if fewer), drawn uniformly."""
        rows = rng.choice(len(self), min(n, len(self)), replace=False, shuffle=False)
        return self.states[rows], self.actions[rows], self.rewards[rows], self.next_states[rows]
