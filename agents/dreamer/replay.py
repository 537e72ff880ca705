"""The replay of DreamerTPX: whole episodes in, windows of consecutive entries out.

Storage, the alignment of actions and rewards with observations, uniform sampling, and the file it
is saved in; collecting steps and training on windows is the agent's business.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from totalprop.agents.dreamer.storage import allocate, room, size_text
from totalprop.agents.persistence.segments import Segments

BLOCK_BYTES = 2**26  # a replay is saved and loaded in blocks, so neither needs it twice in memory
PATIENCE = 20  # sequences' worth of entries without one of them before that is an error


class SequenceBatch(NamedTuple):
    """B windows of L consecutive entries of one episode each, on the training device.

    Attributes:
        observation: [L, B, *observation_shape] in the stored dtype.
        action: [L, B, A] float32, the action that led to the observation; zeros where is_first.
        reward: [L, B] float32, received on arriving at the observation; 0 where is_first.
        is_first: [L, B] bool, the observation was given by a reset.
        is_terminal: [L, B] bool, the episode terminated here; False where it was truncated.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    is_first: Tensor
    is_terminal: Tensor


class SequenceReplay:
    """A ring of entries per environment; every stored window of one episode is equally likely.

    Entry t of an episode is (o_t, a_{t-1}, reward on arriving at o_t), with zeros for the action
    and reward of t = 0; an episode of T decisions has T + 1 entries. danijar/dreamer's convention.
    Differs from danijar/dreamer: it draws an episode, then a start in it (and never the last one).
    What is drawn depends on the stored entries and their order alone, not on where they lie.

    Args:
        capacity: entries over all environments; each ring holds capacity // n_envs.
        observation_shape, observation_dtype: of one observation; float64 is stored as float32.
        action_size: A.
        device: where batches go.
        storage: "ram", "disk" (memory-mapped, one scratch file per array in `folder`; the files
            have no name there and vanish with the process) or "device" (on `device`).
    Raises:
        MemoryError: the arrays are larger than the memory, disk or device they are meant for.
    """

    def __init__(
        self,
        capacity: int,
        observation_shape: Sequence[int],
        observation_dtype: npt.DTypeLike,
        action_size: int,
        n_envs: int = 1,
        *,
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
        kind = np.dtype(observation_dtype)
        self._kinds: dict[str, tuple[tuple[int, ...], np.dtype]] = {  # of one entry
            "observation": (tuple(observation_shape), np.dtype("f4") if kind == "f8" else kind),
            "action": ((action_size,), np.dtype("f4")),
            "reward": ((), np.dtype("f4")),
            "is_terminal": ((), np.dtype("?")),
        }
        homes: dict[str, tuple[torch.device | Path, str, str]] = {
            "ram": (torch.device("cpu"), "in RAM", "storage='disk'"),
            "disk": (Path(folder or ""), f"on disk in {folder}", "another folder"),
            "device": (self.device, f"on {self.device}", "storage='ram'"),
        }
        home, self._place, remedy = homes[storage]
        if isinstance(home, Path):
            home.mkdir(parents=True, exist_ok=True)
        free = room(home)
        if free is not None and self.bytes > free:
            raise MemoryError(
                f"a replay of {self.capacity:,} entries takes {size_text(self.bytes)} "
                f"{self._place}, which has {size_text(free)}: "
                f"take a smaller buffer_size or {remedy}"
            )
        self._arrays = {  # [n_envs, ring, ...]
            name: allocate((n_envs, self._ring, *shape), dtype, home)
            for name, (shape, dtype) in self._kinds.items()
        }
        # t of each entry; on the host, where windows are chosen. It says which entries are first.
        self._position = np.zeros((n_envs, self._ring), np.int32)
        self._count = [0] * n_envs  # entries ever added
        self._ends: tuple[int, np.ndarray] | None = None  # (length, ends) until an entry is added
        self._segments = self._new_segments()

    @property
    def capacity(self) -> int:
        """Entries over all environments."""
        return self.n_envs * self._ring

    @property
    def bytes(self) -> int:
        """Size of all arrays, whether touched or not."""
        entry = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._kinds.values())
        return self.capacity * (entry + np.dtype(np.int32).itemsize)

    def __len__(self) -> int:
        return sum(min(count, self._ring) for count in self._count)

    def __repr__(self) -> str:
        return f"SequenceReplay({len(self):,} of {self.capacity:,} entries {self._place})"

    def describe(self) -> str:
        """One line for the start of training: how much of what, and where."""
        shape, dtype = self._kinds["observation"]
        size = f"{size_text(self.bytes)} {self._place}"
        return f"replay: {self.capacity:,} entries of {shape} {dtype}, {size}"

    def start(self, observations: np.ndarray) -> None:
        """Begin an episode in every environment: call it after each `VecEnv.reset()`.

        Args:
            observations: [n_envs, *observation_shape] as reset() returned them.
        """
        for env, observation in zip(range(self.n_envs), observations, strict=True):
            self._add(env, observation)

    def step(
        self,
        actions: np.ndarray,
        observations: np.ndarray,
        rewards: np.ndarray,
        dones: np.ndarray,
        infos: Sequence[Mapping[str, Any]],
    ) -> None:
        """Store a step of every environment, two entries where an episode ended.

        Args:
            actions: [n_envs, A] as the model is to see them.
            observations, rewards, dones, infos: as `VecEnv.step()` returned them: the final
                observation in infos[env]["terminal_observation"], the reset one in observations.
        """
        if not all(self._count):
            raise ValueError("step() needs an episode: call start(observations) after env.reset()")
        for env, action, observation, reward, done, info in zip(
            range(self.n_envs), actions, observations, rewards, dones, infos, strict=True
        ):
            if not done:
                self._add(env, observation, action, reward)
                continue
            is_terminal = not info.get("TimeLimit.truncated", False)
            self._add(env, info["terminal_observation"], action, reward, is_terminal)
            self._add(env, observation)

    def sample(self, batch_size: int, length: int, generator: np.random.Generator) -> SequenceBatch:
        """Draw windows with replacement, each stored window of `length` entries equally likely.

        Raises:
            ValueError: no stored stretch of an episode is that long.
        """
        ends = self._window_ends(length)
        if not len(ends):
            raise ValueError(
                f"no window of {length} entries is stored, the longest stretch of one episode has "
                f"{self._longest()}: take a smaller sequence_length or collect more steps "
                f"(a ring keeps {self._ring:,} entries)"
            )
        ends = ends[generator.integers(len(ends), size=batch_size)]
        env, slot = np.divmod(ends, self._ring)
        steps = np.arange(1 - length, 1)[:, None]
        index = env * self._ring + (slot + steps) % self._ring  # [L, B]
        is_first = torch.from_numpy(self._position.reshape(-1)[index] == 0)
        rows = torch.from_numpy(index).to(self._arrays["reward"].device)
        return SequenceBatch(
            is_first=is_first.to(self.device),
            **{name: self._gather(array, rows) for name, array in self._arrays.items()},
        )

    def is_too_young(self, length: int) -> bool:
        """Whether no window is stored yet, and more steps will give one.

        2 `length` - 1 consecutive entries hold a window, unless an episode is shorter than one;
        after PATIENCE `length` entries all of them may be.
        """
        return min(self._count) < PATIENCE * length and not len(self._window_ends(length))

    def save(self, path: Path | str) -> None:
        """Write the stored entries, oldest first, to one .npz file that replaces `path`."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        block = max(1, BLOCK_BYTES * self.capacity // self.bytes)
        try:
            with zipfile.ZipFile(temporary, "w") as file:  # np.savez would need all blocks at once
                _write(file, "layout", np.array(self._layout()))
                _write(file, "filled", np.array([len(self._slots(e)) for e in range(self.n_envs)]))
                for env in range(self.n_envs):
                    slots = self._slots(env)
                    for start in range(0, len(slots), block):
                        chosen = slots[start : start + block]
                        _write(file, f"position/{env}/{start}", self._position[env, chosen])
                        for name, array in self._arrays.items():
                            rows = torch.from_numpy(chosen).to(array.device)
                            values = array[env].index_select(0, rows).cpu().numpy()
                            _write(file, f"{name}/{env}/{start}", values)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def check(self, path: Path | str) -> list[int]:
        """Entries of each environment in a saved replay; ValueError as for `load`."""
        try:
            with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
                layout, filled = file["layout"].item(), file["filled"].tolist()
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is not a replay that `save` wrote ({error})") from error
        if layout != self._layout():
            raise ValueError(f"{path} holds a replay of {layout}, this one is of {self._layout()}")
        if max(filled) > self._ring:
            raise ValueError(
                f"{path} holds {max(filled):,} entries of one environment, this replay has "
                f"room for {self._ring:,}: raise buffer_size"
            )
        return list(filled)

    def load(self, path: Path | str) -> None:
        """Replace what is stored by a saved replay; the rings may be larger than they were.

        Raises:
            ValueError: not a replay, or it holds entries of another kind, or more than fit.
        """
        filled = self.check(path)
        with np.load(path, allow_pickle=False) as file:
            # A load that fails half-way leaves an empty replay, not a mixed one.
            self._count, self._ends = [0] * self.n_envs, None
            self._segments = self._new_segments()  # the old ones hold other entries
            arrays = {"position": torch.from_numpy(self._position), **self._arrays}
            for key in file.files:
                if "/" in key:
                    name, env, start = key.split("/")
                    block = torch.from_numpy(file[key])
                    arrays[name][int(env), int(start) : int(start) + len(block)] = block
            self._count = filled

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Write the entries that no segment holds yet.

        Returns:
            "replay": the segments of each environment. "files": the names of all segments.
        """
        segments = [
            own.save(folder, count, self._ring, partial(self._rows, env))
            for env, (own, count) in enumerate(zip(self._segments, self._count, strict=True))
        ]
        return {"replay": segments, "files": [name for own in segments for *_, name in own]}

    def load_state_dict(self, state: Mapping[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state is of another number of environments, a segment cannot be read,
                or its entries are not of this replay's kind.
        """
        if len(state["replay"]) != self.n_envs:
            raise ValueError(
                f"the checkpoint is of {len(state['replay'])} environments, here are {self.n_envs}"
            )
        for env, segments in enumerate(state["replay"]):
            self._segments[env].load(folder, segments, self._ring, partial(self._put_rows, env))

    def _rows(self, env: int, first: int, stop: int) -> dict[str, np.ndarray]:
        """Stored entries of an environment, numbered from the first ever added."""
        slots = np.arange(first, stop) % self._ring
        found = {"position": self._position[env, slots]}
        for name, array in self._arrays.items():
            chosen = torch.from_numpy(slots).to(array.device)
            found[name] = array[env].index_select(0, chosen).cpu().numpy()
        return found

    def _put_rows(self, env: int, first: int, rows: Mapping[str, np.ndarray]) -> None:
        """Store what `_rows` returned; calls for one environment go from old to new."""
        if set(rows) != {"position", *self._kinds}:
            raise ValueError(f"rows of {sorted(rows)}; expected those of {self._layout()}")
        n = len(rows["position"])
        slots = np.arange(first, first + n) % self._ring
        for name, (shape, dtype) in self._kinds.items():
            if rows[name].shape != (n, *shape) or rows[name].dtype != dtype:
                raise ValueError(
                    f"{name} is {rows[name].shape[1:]} {rows[name].dtype}, "
                    f"the replay stores {shape} {dtype}"
                )
            target = self._arrays[name]
            chosen = torch.from_numpy(slots).to(target.device)
            target[env].index_copy_(0, chosen, torch.from_numpy(rows[name]).to(target.device))
        self._position[env, slots] = rows["position"]
        self._count[env], self._ends = first + n, None

    def _add(
        self,
        env: int,
        observation: np.ndarray,
        action: np.ndarray | None = None,
        reward: float = 0.0,
        is_terminal: bool = False,
    ) -> None:
        """Add an entry; without an action it is the first of an episode."""
        slot = self._count[env] % self._ring
        entry = {
            "observation": observation,
            "action": np.zeros(self._kinds["action"][0]) if action is None else action,
            "reward": reward,
            "is_terminal": is_terminal,
        }
        for name, value in entry.items():
            shape, dtype = self._kinds[name]
            value = np.asarray(value)
            if value.shape != shape or not np.can_cast(value.dtype, dtype, "same_kind"):
                raise ValueError(
                    f"{name} of environment {env} is {value.shape} {value.dtype}, "
                    f"the replay stores {shape} {dtype}"
                )
            # The copy is for torch, which takes no negative strides (a flipped image).
            self._arrays[name][env, slot] = torch.from_numpy(value.astype(dtype, order="C"))
        # At slot 0, slot - 1 is the end of the ring, as it should be.
        self._position[env, slot] = 0 if action is None else self._position[env, slot - 1] + 1
        self._count[env] += 1
        self._ends = None

    def _slots(self, env: int) -> np.ndarray:
        """[n] where the entries of an environment lie, oldest first."""
        filled = min(self._count[env], self._ring)
        return (np.arange(filled) + self._count[env] - filled) % self._ring

    def _window_ends(self, length: int) -> np.ndarray:
        """[n] flat indices of every entry that ends a window, by environment, oldest first."""
        if self._ends is not None and self._ends[0] == length:
            return self._ends[1]
        found = []
        for env in range(self.n_envs):
            slots, before = self._before(env)
            found.append(env * self._ring + slots[before >= length - 1])
        self._ends = length, np.concatenate(found)
        return self._ends[1]

    def _longest(self) -> int:
        """Entries of the longest stored stretch of one episode."""
        return max(1 + int(self._before(env)[1].max(initial=-1)) for env in range(self.n_envs))

    def _before(self, env: int) -> tuple[np.ndarray, np.ndarray]:
        """[n] slots, oldest first, and the stored entries before each that are of its episode."""
        slots = self._slots(env)
        return slots, np.minimum(self._position[env, slots], np.arange(len(slots)))

    def _gather(self, array: Tensor, rows: Tensor) -> Tensor:
        """[L, B, ...] on the training device, of [n_envs, ring, ...] and flat rows [L, B]."""
        pinned = array.device.type == "cpu" and self.device.type == "cuda"
        # A pinned block is not reused before its copy has run: torch's host allocator sees to it.
        shape = (rows.numel(), *array.shape[2:])
        out = torch.empty(shape, dtype=array.dtype, device=array.device, pin_memory=pinned)
        torch.index_select(array.flatten(0, 1), 0, rows.flatten(), out=out)
        return out.unflatten(0, rows.shape).to(self.device, non_blocking=pinned)

    def _new_segments(self) -> list[Segments]:
        return [Segments(f"replay{env}") for env in range(self.n_envs)]

    def _layout(self) -> str:
        """What must agree between a saved replay and the one that loads it."""
        (shape, dtype), (action_shape, _) = self._kinds["observation"], self._kinds["action"]
        return f"{self.n_envs} environment(s), observations {shape} {dtype}, actions {action_shape}"


def _write(file: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with file.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)
