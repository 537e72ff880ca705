"""SVG's replay: transitions with the log-densities of their actions, and the episodes in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from totalprop.agents.persistence import safe_file
from totalprop.agents.persistence.safe_file import BadFileError
from totalprop.agents.persistence.segments import Segments
from totalprop.world_models.transitions import TransitionBuffer

KIND = "replay of SVG"


class Replay(TransitionBuffer):
    """The newest transitions of n environments, and which of them are whole episodes of a round.

    A round is what was collected since the last updates.

    Args:
        capacity: number of transitions kept.
        state_size: S, the length of a state.
        action_size: A, the length of an action.
        state_dtype: of the states.
        n_envs: environments, whose transitions take turns.
        horizon: steps after which an episode that goes on counts as finished.

    Attributes:
        round_start: number of the round's first transition.
        finished: (first, last) transition of each episode that finished in the round.
    """

    _ARRAYS = (*TransitionBuffer._ARRAYS, "log_probs")

    def __init__(
        self,
        capacity: int,
        state_size: int,
        action_size: int,
        state_dtype: np.dtype | type = np.float32,
        *,
        n_envs: int,
        horizon: int,
    ) -> None:
        super().__init__(capacity, state_size, action_size, state_dtype)
        self.log_probs = np.empty(capacity, np.float32)
        self.n_envs, self.horizon = n_envs, horizon
        self.round_start = 0
        self.finished: list[tuple[int, int]] = []
        self._path_starts = np.zeros(n_envs, np.int64)
        self._segments = Segments("transitions")

    def step(
        self, *columns: np.ndarray, log_probs: np.ndarray, starts: np.ndarray, dones: np.ndarray
    ) -> None:
        """Store a step of every environment.

        Args:
            columns: states, actions, rewards, next states and whether they terminated, as `add`
                takes them.
            log_probs: [n] of the actions under the policy that drew them.
            starts: [n] whether an episode began with this step.
            dones: [n] whether it ended with this step.
        """
        rows = self.count + np.arange(self.n_envs)
        self._path_starts[starts] = rows[starts]
        self.log_probs[rows % self.capacity] = log_probs
        self.add(*columns)
        lengths = (rows - self._path_starts) // self.n_envs + 1
        is_over = dones | (lengths >= self.horizon)
        for i in np.flatnonzero(is_over):
            self.finished.append((int(self._path_starts[i]), int(rows[i])))
        self._path_starts[is_over] = rows[is_over] + self.n_envs

    def begin_round(self) -> None:
        """What comes from now on is the next round's."""
        self.round_start, self.finished = self.count, []

    def take(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Transitions by their numbers, by field; they must still be in the buffer."""
        slots = numbers % self.capacity
        return {name: getattr(self, name)[slots] for name in self._ARRAYS}

    def recent(self) -> np.ndarray:
        """Numbers of the round's transitions."""
        return np.arange(max(self.round_start, self.count - self.capacity), self.count)

    def draw(self, n: int, rng: np.random.Generator, *, recent: bool) -> dict[str, np.ndarray]:
        """Draw n different transitions uniformly; all of them if there are fewer.

        Args:
            n: how many.
            rng: draws them.
            recent: from the round only.
        """
        first = self.recent()[0] if recent else self.count - len(self)
        available = self.count - first
        chosen = rng.choice(available, min(n, available), replace=False, shuffle=False)
        return self.take(first + chosen)

    def episodes(self) -> list[dict[str, np.ndarray]]:
        """The round's finished episodes, by field, in the order in which they ended."""
        return [self.take(np.arange(a, b + 1, self.n_envs)) for a, b in self.finished]

    def size(self) -> int:
        """Number of transitions, as in stable-baselines3."""
        return len(self)

    def save(self, path: Path | IO[bytes]) -> None:
        """Write the transitions, oldest first, to one file, which is replaced atomically."""
        safe_file.write(path, KIND, self.rows(self.count - len(self), self.count))

    def load(self, path: Path | IO[bytes]) -> None:
        """Replace the transitions by those of a file; of more than fit, the newest are kept.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no replay of SVG, or of other states and actions; nothing changes.
        """
        try:
            rows = safe_file.read(path, KIND)
            if not all(isinstance(own, np.ndarray) and own.ndim for own in rows.values()):
                raise BadFileError("it does not hold arrays alone")
            self.put_rows(0, {name: own[-self.capacity :] for name, own in rows.items()})
        except BadFileError as error:
            raise ValueError(f"cannot load a replay from {path}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path} is a replay of another agent: {error}") from error
        self._segments = Segments("transitions")  # the old ones hold other transitions
        self.begin_round()

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """The transitions in segments, files of their own in `folder`, and where episodes are."""
        segments = self._segments.save(folder, self.count, self.capacity, self.rows)
        return {
            "transitions": segments,
            "files": [name for *_, name in segments],
            "round_start": self.round_start,
            "finished": [list(pair) for pair in self.finished],
            "path_starts": self._path_starts.copy(),
        }

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned."""
        segments: Sequence[Any] = state["transitions"]
        self._segments.load(folder, list(segments), self.capacity, self.put_rows)
        self.round_start = int(state["round_start"])
        self.finished = [(int(a), int(b)) for a, b in state["finished"]]
        self._path_starts[:] = state["path_starts"]
