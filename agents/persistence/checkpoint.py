"""Checkpoints: a run killed at any moment resumes bit-identically (on CPU).

Checkpoints are written between rollouts. One holds the agent with its optimisers and generators,
the replay (of which only new rows are written), the environments where they can be rewound, the
global generators, the scalars that the logger has not written yet, and any callbacks it is given.
Files are numbered in the order in which they are written; the newest two are kept.
"""

from __future__ import annotations

import math
import random
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from totalprop.agents.persistence import env_state, safe_file
from totalprop.agents.persistence.segments import SEGMENT


class Stateful(Protocol):
    """An object whose state a checkpoint keeps: plain values, arrays and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Resumable(Protocol):
    """What a checkpoint needs of an agent; `agents.core.algorithm.Algorithm` provides it.

    `file_values` and `from_values` cover what a model file holds, `state_dict` and
    `load_state_dict` what `learn` needs beside it. Large parts of the state may be files of their
    own in the folder; "files" lists their names.
    """

    num_timesteps: int
    env: VecEnv | None

    @property
    def logger(self) -> Logger: ...

    def file_values(self) -> dict[str, Any]: ...

    @classmethod
    def from_values(
        cls: type[Agent],
        values: dict[str, Any],
        env: GymEnv | None,
        device: torch.device | str,
        replaced: dict[str, Any],
        *,
        force_reset: bool = True,
    ) -> Agent: ...

    def state_dict(self, folder: Path) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None: ...

    def cut_episodes(self) -> None: ...


Agent = TypeVar("Agent", bound=Resumable)

KIND = "checkpoint"
KEPT = 2  # checkpoints left in the folder
MAX_TIME_FRACTION = 0.02  # of the run time, for writing checkpoints
GRACE = 5.0  # s that a run which was told to stop may take to end its round

# Number of the checkpoint in its folder (missing in older files), and the agent's steps.
_CHECKPOINT = re.compile(r"checkpoint_(?:(\d+)_)?(\d+)\.zip")
# What `safe_file.atomic_write` leaves behind when it is killed.
_TEMPORARY = re.compile(rf"\.({_CHECKPOINT.pattern}|{SEGMENT.pattern})\.\d+\.tmp")


class TrainingStopped(BaseException):
    """A run stops, to resume from its newest checkpoint.

    No `Exception`, like KeyboardInterrupt: it may be raised anywhere, and nothing should catch it.
    """


class Checkpoints(BaseCallback):
    """Callback that writes checkpoints while an agent learns; pass it last in the list.

        checkpoints = Checkpoints(folder)
        agent = checkpoints.load(PIPPS, env) or PIPPS("RBFPolicy", env)
        checkpoints.restore(agent)
        agent.learn(450 - agent.num_timesteps, callback=checkpoints, reset_num_timesteps=False)

    Args:
        folder: where the checkpoints go; created if missing. Other files in it are left alone.
        every_seconds: least time between checkpoints. A round that takes longer than GRACE gets one
            of its own, since a run that is told to stop does not wait for its end. Writing
            checkpoints takes at most 2 % of the run time.
        also: other objects whose state is kept, by name: callbacks, a log file.
        agree: of several processes that learn one agent, each with a folder of its own: whether any
            of them passed True. They save together, and none is more than one checkpoint ahead.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_seconds: float = 60.0,
        also: Mapping[str, Stateful] | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        super().__init__()
        self.agree = agree
        self.folder, self.every_seconds, self.also = Path(folder), every_seconds, dict(also or {})
        self.cost = 0.0  # s of the last save
        self._last = self._began = time.monotonic()  # last save, begin of the round
        self.is_saving = False
        self._values: dict[str, Any] | None = None
        self._loaded = Path()  # the checkpoint that they are of
        self._pending: dict[str, tuple[float, int, tuple[str, ...]]] = {}
        self._files: dict[str, list[str]] = {}  # checkpoint's name -> the segments it needs
        self._stop = False

    # ----------------------------------------------------------------------------------------
    # writing
    # ----------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Save before the next rollout, then raise TrainingStopped; safe in signal handlers."""
        self._stop = True

    def _on_training_start(self) -> None:
        self._began = time.monotonic()
        # The first round may be the one that is interrupted.
        self._last = self._began if self.paths() else -math.inf
        pending, self._pending = self._pending, {}
        for name, (value, count, excluded) in pending.items():
            self.logger.record(name, value, excluded)
            self.logger.name_to_count[name] = count

    def _on_rollout_start(self) -> None:
        now = time.monotonic()
        waited, least = now - self._last, self.every_seconds if now - self._began < GRACE else 0.0
        if self.agree(self._stop or waited >= max(least, self.cost / MAX_TIME_FRACTION)):
            self.save()
        self._began = time.monotonic()
        if self.agree(self._stop):
            raise TrainingStopped

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self.agree(True):
            self.save()

    def save(self) -> None:
        """Write a checkpoint; valid only between rollouts.

        Raises:
            FloatingPointError: a parameter is not finite; the older checkpoints are kept.
        """
        self.is_saving = True
        try:
            self._save()
        finally:
            self.is_saving = False

    def _save(self) -> None:
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        agent: Resumable = self.model  # type: ignore[assignment]
        own = agent.file_values()  # the first step: it raises if the result could not be loaded
        state = agent.state_dict(self.folder)
        files = state.pop("files", [])
        values = {
            "agent": own,
            "training": state,
            "files": files,
            "environments": env_state.snapshot(agent.env),
            "generators": _generator_states(),
            "pending": _pending_scalars(agent),
            "also": {name: thing.state_dict() for name, thing in self.also.items()},
        }
        paths = self.paths()
        # Steps would not do as the order: a second `learn` may begin at step 0 again.
        number = _number_and_steps(paths[-1])[0] + 1 if paths else 1
        path = self.folder / f"checkpoint_{number:06d}_{agent.num_timesteps:012d}.zip"
        safe_file.write(path, f"{type(agent).__name__} {KIND}", values)
        self._files[path.name] = list(files)
        self._clean()
        self._last = time.monotonic()
        self.cost = self._last - started

    def _clean(self) -> None:
        """Remove all checkpoints but the last two, and the segments that neither of them needs.

        Nothing else in the folder is touched.
        """
        paths = self.paths()
        for path in paths[:-KEPT]:
            path.unlink()
        self._files = {path.name: self._needed(path) for path in paths[-KEPT:]}
        needed = {name for files in self._files.values() for name in files}
        for path in self.folder.iterdir():
            is_segment = SEGMENT.fullmatch(path.name) and path.name not in needed
            if (is_segment or _TEMPORARY.fullmatch(path.name)) and path.is_file():
                path.unlink()

    def _needed(self, path: Path) -> list[str]:
        """Names of a checkpoint's segments, read from the file if another object wrote it."""
        if path.name not in self._files:
            try:
                return list(safe_file.read(path)["files"])
            except (ValueError, OSError, KeyError):  # unreadable for `load` too
                return []
        return self._files[path.name]

    # ----------------------------------------------------------------------------------------
    # reading
    # ----------------------------------------------------------------------------------------

    def paths(self) -> list[Path]:
        """All checkpoints in the folder, in the order in which they were written."""
        found = self.folder.glob("checkpoint_*.zip")
        return sorted((p for p in found if _CHECKPOINT.fullmatch(p.name)), key=_number_and_steps)

    def newest_step(self) -> int:
        """The agent's steps in the newest checkpoint; -1 if there is none."""
        paths = self.paths()
        return _number_and_steps(paths[-1])[1] if paths else -1

    def newest_number(self) -> int:
        """The number of the newest checkpoint; 0 if there is none."""
        paths = self.paths()
        return _number_and_steps(paths[-1])[0] if paths else 0

    def forget_after(self, number: int) -> None:
        """Remove the checkpoints that have larger numbers, which other processes lack."""
        for path in self.paths():
            if _number_and_steps(path)[0] > number:
                path.unlink()

    def load(
        self, cls: type[Agent], env: GymEnv, device: torch.device | str = "auto", **replaced: Any
    ) -> Agent | None:
        """Load the agent from the newest readable checkpoint.

        Args:
            cls: class of the agent.
            env: environment to continue in; as many of them as in the checkpoint.
            device: where the agent's tensors are put.
            **replaced: attributes that files cannot hold, as for the agent's `load`.

        Returns:
            The agent, or None if the folder has no checkpoint.

        Raises:
            ValueError: no checkpoint in the folder can be read, or the newest readable one has
                another number of environments.
        """
        problems: dict[Path, str] = {}
        for path in reversed(self.paths()):
            try:
                values = safe_file.read(path, f"{cls.__name__} {KIND}")
                n_envs = int(values["agent"]["attributes"]["n_envs"])
                if not all(isinstance(name, str) for name in values["files"]):
                    raise ValueError("its files are not names")
            except (OSError, *safe_file.UNREADABLE) as error:
                problems[path] = _reason(path, error)
                continue
            env_state.check_number(n_envs, env)  # outside `try`: the file is not to blame
            try:
                agent = cls.from_values(values["agent"], env, device, replaced, force_reset=False)
                agent.load_state_dict(values["training"], self.folder)
            except (OSError, *safe_file.UNREADABLE) as error:
                problems[path] = _reason(path, error)
                continue
            for broken in problems:  # renamed, or it would remain the newest
                broken.rename(broken.with_name(f"unreadable_{broken.name}"))
                print(f"skipped {problems[broken]}", file=sys.stderr)
            self._values, self._files[path.name] = values, list(values["files"])
            self._loaded = path
            return agent
        if problems:
            reasons = "; ".join(problems.values())
            raise ValueError(f"no checkpoint in {self.folder} can be read; {reasons}")
        return None

    def restore(self, agent: Resumable) -> None:
        """Restore all that is around a loaded agent; the last call before `learn`.

        This is the environments, the global generators, the logger and the objects in `also`.

        Raises:
            ValueError: the environment has other wrappers, or the checkpoint is damaged.
        """
        if self._values is None:
            return
        values, self._values = self._values, None
        try:
            self._restore(agent, values)
        except env_state.OtherEnvironment:
            raise
        except safe_file.UNREADABLE as error:
            raise ValueError(
                f"{_reason(self._loaded, error)}: it does not fit this run; move the file away to "
                "resume from the checkpoint before it"
            ) from error

    def _restore(self, agent: Resumable, values: dict[str, Any]) -> None:
        for name, state in values["also"].items():
            if name in self.also:
                self.also[name].load_state_dict(state)
        self._pending = values["pending"]  # recorded in `_on_training_start`, which has a logger
        if not env_state.restore(agent.env, values["environments"]):
            agent.cut_episodes()
        _set_generator_states(values["generators"])


def _reason(path: Path, error: Exception) -> str:
    return f"{path.name}: {safe_file.in_one_line(error)}"


def _number_and_steps(path: Path) -> tuple[int, int]:
    """Parse the name of a checkpoint; unnumbered files are older, and sort first."""
    match = _CHECKPOINT.fullmatch(path.name)
    assert match is not None
    return int(match[1] or 0), int(match[2])


def _pending_scalars(agent: Resumable) -> dict[str, tuple[float, int, tuple[str, ...]]]:
    """Scalars recorded since the logger's last dump: (value, count, excluded formats)."""
    logger = agent.logger
    return {
        name: (value, logger.name_to_count[name], logger.name_to_excluded[name])
        for name, value in logger.name_to_value.items()
        if isinstance(value, int | float | np.number)
    }


def _generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002  (stable-baselines3 draws from it)
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_generator_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
