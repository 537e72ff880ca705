"""DreamerTPX's replay: stores steps as they come, samples windows of consecutive entries.

It aligns actions and rewards with observations, and reads and writes its files. Collecting steps
and training on windows is left to the agent.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from totalprop.agents.dreamer.replay_file import (
    Block,
    checked_blocks,
    layout_and_filled,
    read_blocks,
    write_member,
)
from totalprop.agents.dreamer.storage import allocate, available_bytes, format_bytes
from totalprop.agents.persistence.safe_file import atomic_write
from totalprop.agents.persistence.segments import Segments
from totalprop.world_models.latent.observations import Observation

BLOCK_BYTES = 2**26  # `save` and `load` work in blocks, so that neither needs a second copy in RAM


class SequenceBatch(NamedTuple):
    """B windows of L consecutive entries of one environment each; on the training device.

    A window may hold the end of an episode and the beginning of the next.

    Attributes:
        observation: [L, B, *observation_shape] in the stored dtype, or a dictionary of such
            entries.
        action: [L, B, A] float32, the action that led to the observation; zeros where is_first.
        reward: [L, B] float32, received on arriving at the observation; 0 where is_first.
        is_first: [L, B] bool, True where the observation comes from a reset.
        is_terminal: [L, B] bool, True where the episode terminated, False where it was truncated.
    """

    observation: Observation
    action: Tensor
    reward: Tensor
    is_first: Tensor
    is_terminal: Tensor

    def columns(self, index: Tensor) -> SequenceBatch:
        """Some of the windows."""
        seen = self.observation
        if isinstance(seen, dict):
            return self._columns({name: x[:, index] for name, x in seen.items()}, index)
        return self._columns(seen[:, index], index)

    def _columns(self, observation: Observation, index: Tensor) -> SequenceBatch:
        return SequenceBatch(observation, *(x[:, index] for x in self[1:]))


class SequenceReplay:
    """One ring buffer per environment; all windows of consecutive entries are equally likely.

    As in danijar/dreamer, entry t of an episode is (o_t, a_{t-1}, reward on arriving at o_t), where
    the action and reward of t = 0 are zeros. An episode of T decisions has T + 1 entries.
    Windows cross the borders of episodes, as in DreamerV3, so that episodes shorter than a window
    are learned from, too. danijar/dreamer draws an episode, then a start in it, and never sees an
    episode that is shorter. Samples depend only on the stored entries and their order, not on
    their slots in the ring: a window never reaches from the newest entry to the oldest.

    Args:
        capacity: entries over all environments; each ring holds capacity // n_envs.
        observation_shape: shape of one observation; of a dictionary, name -> shape.
        observation_dtype: dtype of one observation; of a dictionary, name -> dtype.
        options: name -> number of options of each choice, for entries that are choices. Files with
            others are refused.
        action_size: A.
        n_envs: number of environments.
        device: where batches are put.
        storage: "ram", "device" (on `device`) or "disk" (memory-mapped scratch files in `folder`,
            nameless, so that they vanish with the process).
        folder: for the scratch files of "disk".

    Raises:
        MemoryError: the arrays do not fit in the RAM, disk or device they are meant for.
    """

    def __init__(
        self,
        capacity: int,
        observation_shape: Sequence[int] | Mapping[str, Sequence[int]],
        observation_dtype: npt.DTypeLike | Mapping[str, npt.DTypeLike],
        action_size: int,
        n_envs: int = 1,
        *,
        options: Mapping[str, Sequence[int]] = MappingProxyType({}),
        device: torch.device | str = "cpu",
        storage: str = "ram",
        folder: Path | str | None = None,
    ):
        if not 1 <= n_envs <= capacity:
            raise ValueError(f"capacity must be at least n_envs = {n_envs}, got {capacity}")
        if storage not in ("ram", "disk", "device") or (storage == "disk" and folder is None):
            raise ValueError(
                f"storage must be 'ram', 'device' or 'disk' with a folder, got {storage!r}"
            )
        self.n_envs, self.device = n_envs, torch.device(device)
        self._ring = capacity // n_envs
        # Name of an entry of the observations -> field; {} where observations are one array. Fields
        # are numbered, since entries may have any name, and fields name the members of files.
        self._parts: dict[str, str] = {}
        seen: dict[str, tuple[Any, Any]] = {"observation": (observation_shape, observation_dtype)}
        if isinstance(observation_shape, Mapping):
            dtypes: Any = observation_dtype
            names = sorted(observation_shape)
            self._parts = {name: f"observation.{i}" for i, name in enumerate(names)}
            seen = {f: (observation_shape[name], dtypes[name]) for name, f in self._parts.items()}
        self._options = {self._parts[name]: np.array(sizes) for name, sizes in options.items()}
        self._fields: dict[str, tuple[tuple[int, ...], np.dtype]] = {  # of one entry
            **{field: (tuple(shape), np.dtype(dtype)) for field, (shape, dtype) in seen.items()},
            "action": ((action_size,), np.dtype("f4")),
            "reward": ((), np.dtype("f4")),
            "is_terminal": ((), np.dtype("?")),
        }
        places: dict[str, tuple[torch.device | Path, str, str]] = {
            "ram": (torch.device("cpu"), "in RAM", "storage='disk'"),
            "disk": (Path(folder or ""), f"on disk in {folder}", "another folder (set TMPDIR)"),
            "device": (self.device, f"on {self.device}", "storage='ram'"),
        }
        place, self._where, remedy = places[storage]
        if isinstance(place, Path):
            place.mkdir(parents=True, exist_ok=True)
        available = available_bytes(place)
        if available is not None and self.bytes > available:
            raise MemoryError(
                f"a replay of {self.capacity:,} entries takes {format_bytes(self.bytes)} "
                f"{self._where}, which has {format_bytes(available)}: "
                f"take a smaller buffer_size or {remedy}"
            )
        self._arrays = {  # [n_envs, ring, ...]
            name: allocate((n_envs, self._ring, *shape), dtype, place)
            for name, (shape, dtype) in self._fields.items()
        }
        # t of each entry, 0 for the first of an episode. On the host, where windows are chosen.
        self._position = np.zeros((n_envs, self._ring), np.int32)
        self._count = [0] * n_envs  # entries ever added
        self._segments = self._new_segments()

    @property
    def capacity(self) -> int:
        """Entries over all environments."""
        return self.n_envs * self._ring

    @property
    def bytes(self) -> int:
        """Size of all arrays, including pages that are not in use yet."""
        entry = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._fields.values())
        return self.capacity * (entry + np.dtype(np.int32).itemsize)

    def __len__(self) -> int:
        return sum(min(count, self._ring) for count in self._count)

    def size(self) -> int:
        """Entries that are stored, over all environments, as in stable-baselines3."""
        return len(self)

    def __repr__(self) -> str:
        return f"SequenceReplay({len(self):,} of {self.capacity:,} entries {self._where})"

    def describe(self) -> str:
        """One line that says how many entries of which shape are kept where, and their size."""
        size = f"{format_bytes(self.bytes)} {self._where}"
        return f"replay: {self.capacity:,} entries of {self._observations()}, {size}"

    def start(self, observations: np.ndarray | dict[str, np.ndarray]) -> None:
        """Begin an episode in every environment; call it after each `VecEnv.reset()`.

        Args:
            observations: [n_envs, *observation_shape], as `VecEnv.reset()` returned them, or a
                dictionary of such entries.
        """
        for env, observation in zip(range(self.n_envs), self._of_each(observations), strict=True):
            self._add(env, observation)

    def step(
        self,
        actions: np.ndarray,
        observations: np.ndarray | dict[str, np.ndarray],
        rewards: np.ndarray,
        dones: np.ndarray,
        infos: Sequence[Mapping[str, Any]],
    ) -> None:
        """Store a step of every environment; where an episode ended, that makes two entries.

        Args:
            actions: [n_envs, A], scaled as the model sees them.
            observations: [n_envs, *observation_shape], as `VecEnv.step()` returned them: where an
                episode ended, the first one of the next.
            rewards: [n_envs], as `VecEnv.step()` returned them.
            dones: [n_envs], as `VecEnv.step()` returned them.
            infos: as `VecEnv.step()` returned them. Where an episode ended, "terminal_observation"
                is its last observation.
        """
        if not all(self._count):
            raise ValueError("step() needs an episode: call start(observations) after env.reset()")
        seen = self._of_each(observations)
        for env, action, observation, reward, done, info in zip(
            range(self.n_envs), actions, seen, rewards, dones, infos, strict=True
        ):
            if not done:
                self._add(env, observation, action, reward)
                continue
            is_terminal = not info.get("TimeLimit.truncated", False)
            self._add(env, info["terminal_observation"], action, reward, is_terminal)
            self._add(env, observation)

    def append(
        self,
        observations: np.ndarray | dict[str, np.ndarray],
        actions: np.ndarray,
        rewards: np.ndarray,
        *,
        terminated: bool,
    ) -> None:
        """Store a whole episode of T steps, in the ring that holds the least; nothing is lost.

        Args:
            observations: [T + 1, *observation_shape], or a dictionary of such entries.
            actions: [T, A], scaled as the model sees them; the first leads to the second
                observation.
            rewards: [T], each received on arriving at the next observation.
            terminated: whether the last observation is terminal; otherwise it was truncated.

        Raises:
            ValueError: there is no room, or an array is not of these shapes or not finite.
        """
        n = len(rewards) + 1
        env = int(np.argmin(self._count))
        first = self._count[env]
        if first + n > self._ring:
            raise ValueError(
                f"{repr(self)[:-1]}, has no room for an episode of {n:,} more: raise buffer_size"
            )
        seen: dict[str, Any] = {"observation": observations}
        if self._parts:
            assert isinstance(observations, dict)
            seen = {field: observations[name] for name, field in self._parts.items()}
        no_action = np.zeros((1, *self._fields["action"][0]))
        rows = {
            **seen,
            "action": np.concatenate([no_action, actions]),
            "reward": np.concatenate([[0.0], rewards]),
            "is_terminal": np.arange(n) == (n - 1 if terminated else n),
        }
        for name, (_, dtype) in self._fields.items():
            if np.can_cast(rows[name].dtype, dtype, "same_kind"):  # `_put_rows` refuses others
                rows[name] = np.ascontiguousarray(rows[name], dtype)
        self._put_rows(env, first, {**rows, "position": np.arange(n, dtype=np.int32)})

    def sample(self, batch_size: int, length: int, generator: np.random.Generator) -> SequenceBatch:
        """Draw windows with replacement, uniformly from the stored windows of `length` entries.

        Raises:
            ValueError: no window of this length is stored.
        """
        count = np.array(self._count)
        filled = np.minimum(count, self._ring)
        windows = np.maximum(filled - length + 1, 0)  # of each environment
        last = windows.cumsum()
        if not last[-1]:
            raise ValueError(
                f"no window of {length} entries is stored, an environment has {max(filled)} at "
                f"most: take a smaller sequence_length or collect more steps "
                f"(a ring holds {self._ring:,} entries)"
            )
        drawn = generator.integers(last[-1], size=batch_size)
        env = last.searchsorted(drawn, side="right")
        first = (count - filled)[env] + drawn - (last - windows)[env]  # numbered as they were added
        slot = (first + np.arange(length)[:, None]) % self._ring
        index = env * self._ring + slot  # [L, B]
        is_first = torch.from_numpy(self._position.reshape(-1)[index] == 0)
        rows = torch.from_numpy(index).to(self._arrays["reward"].device)
        found: dict[str, Any] = {
            name: self._gather(array, rows) for name, array in self._arrays.items()
        }
        if self._parts:
            found["observation"] = {name: found.pop(field) for name, field in self._parts.items()}
        return SequenceBatch(is_first=is_first.to(self.device), **found)

    def has_windows(self, length: int) -> bool:
        """Whether every environment has `length` entries, so that each of them can be drawn."""
        return min(min(self._count), self._ring) >= length

    def has_terminal(self) -> bool:
        """Whether an episode that terminated is stored."""
        ends = self._arrays["is_terminal"]
        return any(
            bool(ends[env, : min(count, self._ring)].any()) for env, count in enumerate(self._count)
        )

    def oldest(self) -> np.ndarray | dict[str, np.ndarray]:
        """The oldest stored observation of the first environment, as a batch [1, ...]."""
        count = self._count[0]
        first = count - min(count, self._ring)
        rows = self._rows(0, first, first + 1)
        if self._parts:
            return {name: rows[field] for name, field in self._parts.items()}
        return rows["observation"]

    def returns(self, gamma: float) -> tuple[np.ndarray, np.ndarray]:
        """What the stored experience earned.

        Args:
            gamma: discount per decision.

        Returns:
            The undiscounted return of each episode, as far as it is stored, and the discounted
            return rₜ + γ rₜ₊₁ + ... from each entry but the first of an episode to the end of that
            episode. What would have followed a truncation is not in them.
        """
        from scipy.signal import lfilter  # here: a help text needs no SciPy

        whole, to_go = [], []
        for env in range(self.n_envs):
            slots = self._slots(env)
            position = self._position[env, slots]
            rows = torch.from_numpy(slots).to(self._arrays["reward"].device)
            reward = self._arrays["reward"][env].index_select(0, rows).cpu().numpy().astype("f8")
            # Before the first episode whose beginning is stored: the rest of one, or nothing.
            rest, *episodes = np.split(reward, np.flatnonzero(position == 0))
            for earned in (rest, *(e[1:] for e in episodes)):  # the first entry has no reward
                if len(earned):
                    whole.append(earned.sum())
                    to_go.append(lfilter([1.0], [1.0, -gamma], earned[::-1])[::-1])
        return np.array(whole), np.concatenate(to_go) if to_go else np.zeros(0)

    def save(self, path: Path | str) -> None:
        """Write the stored entries, oldest first, to one .npz file, replacing `path` atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        block = max(1, BLOCK_BYTES * self.capacity // self.bytes)
        slots = [self._slots(env) for env in range(self.n_envs)]
        # np.savez wants all blocks at once
        with atomic_write(path) as target, zipfile.ZipFile(target, "w") as file:
            write_member(file, "layout", np.array(self._layout()))
            write_member(file, "filled", np.array([len(own) for own in slots]))
            for env, own in enumerate(slots):
                for start in range(0, len(own), block):
                    chosen = own[start : start + block]
                    write_member(file, f"position/{env}/{start}", self._position[env, chosen])
                    for name, array in self._arrays.items():
                        rows = torch.from_numpy(chosen).to(array.device)
                        values = array[env].index_select(0, rows).cpu().numpy()
                        write_member(file, f"{name}/{env}/{start}", values)

    def check(self, path: Path | str) -> list[int]:
        """Count the entries of each environment in a saved replay, without loading it.

        Raises:
            ValueError: as for `load`.
        """
        return self._check(Path(path))[0]

    def load(self, path: Path | str) -> None:
        """Replace the stored entries by those of a saved replay, whose rings may be smaller.

        Raises:
            ValueError: the file is not a replay, holds entries of another shape or dtype, not all
                of them, or more than fit.
        """
        filled, blocks = self._check(Path(path))
        # If loading fails half-way, the replay is left empty, not mixed.
        self._count = [0] * self.n_envs
        self._segments = self._new_segments()  # the old ones hold different entries
        arrays = {"position": torch.from_numpy(self._position), **self._arrays}
        for (name, env, start, stop, _), rows in read_blocks(Path(path), blocks):
            self._check_values(name, rows)
            arrays[name][env, start:stop] = torch.from_numpy(rows)
        self._count = filled

    def _check(self, path: Path) -> tuple[list[int], list[Block]]:
        layout, found = layout_and_filled(path)
        fields = {"position": ((), self._position.dtype), **self._fields}
        shape, dtype = self._fields.get("observation", ((), np.dtype("f4")))
        if dtype == "f8" and layout == self._layout(np.dtype("f4")):  # as older versions stored it
            fields["observation"] = shape, np.dtype("f4")
        elif layout != self._layout():
            raise ValueError(
                f"{path} holds a replay of {layout[:200]}, this one is of {self._layout()}"
            )
        filled = found.tolist()
        if len(filled) != self.n_envs or min(filled) < 0:
            raise ValueError(f"{path} is not a replay that `save` wrote (it counts {filled[:9]})")
        if max(filled) > self._ring:
            raise ValueError(
                f"{path} holds {max(filled):,} entries of one environment, this replay has "
                f"room for {self._ring:,}: raise buffer_size"
            )
        return filled, checked_blocks(path, filled, fields)

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Write the entries that no segment in the folder holds yet.

        Returns:
            The segments of each environment under "replay", the names of all under "files".
        """
        segments = [
            own.save(folder, count, self._ring, partial(self._rows, env))
            for env, (own, count) in enumerate(zip(self._segments, self._count, strict=True))
        ]
        return {"replay": segments, "files": [name for own in segments for *_, name in own]}

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state is for another number of environments, a segment cannot be read,
                or its entries have another shape or dtype.
        """
        if len(state["replay"]) != self.n_envs:
            raise ValueError(
                f"the checkpoint has {len(state['replay'])} environment(s), the replay has "
                f"{self.n_envs}"
            )
        for env, segments in enumerate(state["replay"]):
            if not segments:  # an episode begins with an entry
                raise ValueError(f"it holds no entries of environment {env}")
            self._segments[env].load(folder, segments, self._ring, partial(self._put_rows, env))

    def _rows(self, env: int, first: int, stop: int) -> dict[str, np.ndarray]:
        """Stored entries of an environment; they are numbered from the first ever added."""
        slots = np.arange(first, stop) % self._ring
        found = {"position": self._position[env, slots]}
        for name, array in self._arrays.items():
            chosen = torch.from_numpy(slots).to(array.device)
            found[name] = array[env].index_select(0, chosen).cpu().numpy()
        return found

    def _put_rows(self, env: int, first: int, rows: Mapping[str, np.ndarray]) -> None:
        """Store what `_rows` returned; within an environment, older rows must come first."""
        if set(rows) != {"position", *self._fields}:
            raise ValueError(f"rows of {sorted(rows)}; expected those of {self._layout()}")
        n = len(rows["position"])
        slots = np.arange(first, first + n) % self._ring
        for name, (shape, dtype) in self._fields.items():
            values = rows[name]
            if name == "observation" and dtype == "f8" and values.dtype == "f4":
                values = values.astype(dtype)  # older versions stored float64 as float32
            if values.shape != (n, *shape) or values.dtype != dtype:
                raise ValueError(
                    f"{name} is {rows[name].shape[1:]} {rows[name].dtype}, "
                    f"the replay stores {shape} {dtype}"
                )
            self._check_values(name, rows[name])
            target = self._arrays[name]
            chosen = torch.from_numpy(slots).to(target.device)
            target[env].index_copy_(0, chosen, torch.from_numpy(values).to(target.device))
        if rows["position"].shape != (n,) or rows["position"].dtype != self._position.dtype:
            raise ValueError(f"position is not {n} whole numbers")
        self._check_values("position", rows["position"])
        self._position[env, slots] = rows["position"]
        self._count[env] = first + n

    def _add(
        self,
        env: int,
        observation: np.ndarray | dict[str, np.ndarray],
        action: np.ndarray | None = None,
        reward: float = 0.0,
        is_terminal: bool = False,
    ) -> None:
        """Add an entry; without an action, it is the first of an episode."""
        slot = self._count[env] % self._ring
        seen: dict[str, Any] = {"observation": observation}
        if self._parts:
            assert isinstance(observation, dict)
            seen = {field: observation[name] for name, field in self._parts.items()}
        entry = {
            **seen,
            "action": np.zeros(self._fields["action"][0]) if action is None else action,
            "reward": reward,
            "is_terminal": is_terminal,
        }
        for name, value in entry.items():
            shape, dtype = self._fields[name]
            value = np.asarray(value)
            if value.shape != shape or not np.can_cast(value.dtype, dtype, "same_kind"):
                raise ValueError(
                    f"{name} of environment {env} is {value.shape} {value.dtype}, "
                    f"the replay stores {shape} {dtype}"
                )
            # torch accepts no negative strides (a flipped image), so copy.
            self._arrays[name][env, slot] = torch.from_numpy(value.astype(dtype, order="C"))
        # At slot 0, index -1 is the last slot of the ring, which is the previous entry.
        self._position[env, slot] = 0 if action is None else self._position[env, slot - 1] + 1
        self._count[env] += 1

    def _of_each(self, observations: Any) -> Sequence[Any]:
        """The observations of a VecEnv as one of each environment."""
        if not self._parts:
            return observations
        columns = {name: observations[name] for name in self._parts}
        if found := {name: len(x) for name, x in columns.items() if len(x) != self.n_envs}:
            raise ValueError(f"expected observations of {self.n_envs} environments, got {found}")
        return [{name: x[env] for name, x in columns.items()} for env in range(self.n_envs)]

    def _slots(self, env: int) -> np.ndarray:
        """[n] slots of an environment's entries, oldest first."""
        filled = min(self._count[env], self._ring)
        return (np.arange(filled) + self._count[env] - filled) % self._ring

    def _gather(self, array: Tensor, rows: Tensor) -> Tensor:
        """Rows [L, B] of an array [n_envs, ring, ...], as [L, B, ...] on the training device."""
        pinned = array.device.type == "cpu" and self.device.type == "cuda"
        # torch's host allocator does not reuse a pinned block before its copy is complete.
        shape = (rows.numel(), *array.shape[2:])
        out = torch.empty(shape, dtype=array.dtype, device=array.device, pin_memory=pinned)
        torch.index_select(array.flatten(0, 1), 0, rows.flatten(), out=out)
        return out.unflatten(0, rows.shape).to(self.device, non_blocking=pinned)

    def _new_segments(self) -> list[Segments]:
        return [Segments(f"replay{env}") for env in range(self.n_envs)]

    def _layout(self, stored_as: np.dtype | None = None) -> str:
        """What a saved replay and the one that loads it must have in common."""
        action_shape, _ = self._fields["action"]
        seen = self._observations(stored_as)
        return f"{self.n_envs} environment(s), observations {seen}, actions {action_shape}"

    def _observations(self, stored_as: np.dtype | None = None) -> str:
        """Shape and dtype of an observation, or of each entry of it."""
        if not self._parts:
            shape, dtype = self._fields["observation"]
            return f"{shape} {stored_as or dtype}"
        fields = {name: self._fields[field] for name, field in self._parts.items()}
        return ", ".join(f"{name!r} {shape} {dtype}" for name, (shape, dtype) in fields.items())

    def _check_values(self, name: str, rows: np.ndarray) -> None:
        """Raise ValueError for rows that no episode gives.

        These are positions that jump, a NaN or infinity, and choices of no option.
        """
        if name == "position":
            is_next = (rows[1:] == 0) | (rows[1:] == rows[:-1] + 1)
            if len(rows) and (rows.min() < 0 or not is_next.all()):
                raise ValueError("the positions of its entries are not those of episodes")
        elif rows.dtype.kind == "f" and not np.isfinite(rows).all():
            raise ValueError(f"{name} holds a NaN or infinity")
        elif name in self._options and ((rows < 0) | (rows >= self._options[name])).any():
            raise ValueError(f"{name} holds a choice that is none of its options")
