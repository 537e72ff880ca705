"""A ring buffer of transitions, which are numbered from the first one ever added."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

UNKNOWN = -1  # whether a transition terminated, where older files do not say


class TransitionBuffer:
    """The newest transitions between vector states, in the environment's own units.

    Args:
        capacity: number of transitions kept; after that, the oldest are overwritten.
        state_size: S, the length of a state.
        action_size: A, the length of an action.
        state_dtype: of the states; float64 keeps the digits of numbers around a large one.
    """

    _ARRAYS: tuple[str, ...] = ("states", "actions", "rewards", "next_states", "terminated")

    def __init__(
        self,
        capacity: int,
        state_size: int,
        action_size: int,
        state_dtype: np.dtype | type = np.float32,
    ) -> None:
        self.capacity = capacity
        self.states = np.empty((capacity, state_size), state_dtype)
        self.actions = np.empty((capacity, action_size), np.float32)
        self.rewards = np.empty(capacity, np.float32)
        self.next_states = np.empty((capacity, state_size), state_dtype)
        self.terminated = np.empty(capacity, np.int8)  # 1, 0 or UNKNOWN
        self.count = 0  # transitions ever added

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    def add(
        self,
        states: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        next_states: np.ndarray,
        terminated: np.ndarray | int = UNKNOWN,
    ) -> None:
        """Store n transitions.

        Args:
            states: [n, S].
            actions: [n, A].
            rewards: [n].
            next_states: [n, S]; at the end of an episode its last state, not the reset's.
            terminated: [n] whether the episode terminated; False where a time limit cut it off.
        """
        slots = (self.count + np.arange(len(states))) % self.capacity
        self.states[slots], self.actions[slots] = states, actions
        self.rewards[slots], self.next_states[slots] = rewards, next_states
        self.terminated[slots] = terminated
        self.count += len(states)

    def rows(self, first: int, stop: int) -> dict[str, np.ndarray]:
        """Transitions number `first` to `stop` - 1, by field; they must still be in the buffer."""
        slots = np.arange(first, stop) % self.capacity
        return {name: getattr(self, name)[slots] for name in self._ARRAYS}

    def put_rows(self, first: int, rows: Mapping[str, np.ndarray]) -> None:
        """Store what `rows` returned, from number `first` on; older transitions come first.

        Raises:
            ValueError: an array is missing, or has another shape or dtype; nothing is stored.
        """
        n = len(rows.get("rewards", ()))
        for name in self._ARRAYS:
            own, given = getattr(self, name), rows.get(name)
            if given is None or given.shape != (n, *own.shape[1:]) or given.dtype != own.dtype:
                found = "missing" if given is None else f"{given.dtype} of {given.shape}"
                raise ValueError(f"{name} of {n} transitions are {found}, not as stored here")
            if not np.isfinite(given).all():
                raise ValueError(f"{name} hold a NaN or infinity")
        slots = np.arange(first, first + n) % self.capacity
        for name in self._ARRAYS:
            getattr(self, name)[slots] = rows[name]
        self.count = first + n

    def sample(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Draw n different transitions uniformly; all of them if there are fewer.

        Returns:
            States [n, S], actions [n, A], rewards [n], next states [n, S] and whether they
            terminated [n].
        """
        rows = rng.choice(len(self), min(n, len(self)), replace=False, shuffle=False)
        return tuple(getattr(self, name)[rows] for name in self._ARRAYS)
