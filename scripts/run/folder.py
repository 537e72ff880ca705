"""The folder of a run: its files, and how its environment and agent are recreated from them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import glob
import os
import re
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from totalprop.agents import AGENTS
from totalprop.agents.core.validation import is_finite, is_whole
from totalprop.agents.persistence import safe_file
from totalprop.agents.persistence.safe_file import in_one_line, shown, write_text
from totalprop.scripts.run.environments import check_import, import_flag
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.interruption import is_trained_now

# Entries of config.json: their types, and whether all runs have them. Older ones lack the others.
CONFIG: dict[str, tuple[type, bool]] = {
    "agent": (str, True), "env_id": (str, True), "env_args": (dict, True),
    "arguments": (dict, True), "preset": (str, False), "options": (dict, False),
    "policy_kwargs": (dict, False),
}  # fmt: skip
ABANDONED = 3600.0  # s after which a folder that is still being created belongs to a killed run
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # what `safe_file.atomic_write` writes first


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of the files in a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        """Everything needed to recreate the environment and the agent, as JSON."""
        return self.path / "config.json"

    @property
    def model(self) -> Path:
        """The trained agent, for `load`."""
        return self.path / "model.zip"

    @property
    def best_model(self) -> Path:
        """The agent of the best evaluation so far, as SB3 names it; none without evaluations."""
        return self.path / "best_model.zip"

    @property
    def quoted(self) -> str:
        """The path, quoted for the shell."""
        return shlex.quote(str(self.path))

    @property
    def vec_normalize(self) -> Path:
        """Statistics of VecNormalize, if the run was trained with --normalize."""
        return self.path / "vec_normalize.json"

    @property
    def best_vec_normalize(self) -> Path:
        """Those that belong to `best_model`."""
        return self.path / "best_vec_normalize.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, from which training resumes."""
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """Returns of the evaluation rollouts, as JSON."""
        return self.path / "evaluations.json"

    @property
    def learning_curve(self) -> Path:
        """Plot of the evaluation returns over training."""
        return self.path / "learning_curve.png"

    @property
    def video(self) -> Path:
        """GIF of the final policy."""
        return self.path / "rollout.gif"

    @property
    def replay(self) -> Path:
        """The replay that a world model was trained on."""
        return self.path / "replay.npz"

    @property
    def summary(self) -> Path:
        """Final performance and timing, as JSON; exists once the run has finished."""
        return self.path / "summary.json"

    @staticmethod
    def create(root: Path, name: str, config: str) -> RunFolder:
        """Create the folder root/name, or root/name_2, ... if that exists, with its config.json.

        The folder appears together with its config or not at all, so that a run killed before then
        can be started again by the same command.

        Args:
            root: the folder that runs are written to.
            name: name of the new folder.
            config: text of config.json.
        Raises:
            UserError: the name contains a path, or the folder cannot be created.
        """
        if name != Path(name).name:
            raise UserError(f"--name must be a folder name, not a path, got '{name}' (see --runs)")
        path, number = root / name, 2
        try:
            root.mkdir(parents=True, exist_ok=True)
            _sweep(root, name)
            new = RunFolder(Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root)))
            new.path.chmod(root.stat().st_mode & 0o777)  # not only ours, as mkdtemp makes it
            write_text(new.config, config)
            while True:
                while path.exists():
                    path, number = root / f"{name}_{number}", number + 1
                try:
                    new.path.rename(path)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                else:  # no other run was given this name in the meantime
                    return RunFolder(path)
        except OSError as error:
            raise UserError(f"cannot create the run folder {path}: {error.strerror}") from error

    @staticmethod
    def open(path: Path, *, imports: Sequence[str] = ()) -> RunFolder:
        """Open the folder of an existing run, which may be a stranger's.

        The folder itself may be a link, but no file or folder in it: what is read, overwritten and
        deleted there must lie there.

        Args:
            path: the folder.
            imports: modules that the command line names; config.json may name no others.
        Raises:
            UserError: it is not a run folder, contains links, or its environment needs a module.
        """
        folder = RunFolder(path)
        if not folder.config.is_file():
            raise UserError(
                f"{path} is not a run folder (it has no config.json); "
                "pass the folder that totalprop train printed"
            )
        for entry in os.scandir(path):
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISLNK(mode):
                raise UserError(
                    f"{entry.path} is a link, and what it points to would be read or overwritten; "
                    "move the target into the folder, or make a link of the whole folder"
                )
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise UserError(f"{entry.path} is neither a file nor a folder; remove it")
        check_import(folder.read_config()["env_id"], folder.config, imports, within=path)
        return folder

    def sweep(self) -> None:
        """Remove the temporary files of killed processes; call it only while you hold the lock."""
        for path in self.path.glob(".*.tmp"):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)

    def read_config(self) -> dict[str, Any]:
        """Read config.json, and check that it has the entries of a run."""
        config = read_json(self.config)
        missing = [
            name for name, (_, is_needed) in CONFIG.items() if is_needed and name not in config
        ]
        if missing:
            raise UserError(
                f"{self.config} lacks {', '.join(missing)}: it is not the config of a run"
            )
        for name, (kind, is_needed) in CONFIG.items():
            is_there = is_needed or config.get(name) is not None
            if is_there and not isinstance(config[name], kind):
                noun = "a text" if kind is str else "an object"
                raise UserError(f"{self.config}: {name} must be {noun}, got {shown(config[name])}")
        if config["agent"] not in AGENTS:
            raise UserError(f"{self.config} names the unknown agent {shown(config['agent'])}")
        return config

    def written(self, name: str, *, best: bool) -> Path:
        """A file about the trained agent, or about that of the best evaluation."""
        return self.path / (f"best_{name}" if best else name)

    def read_evaluations(self) -> tuple[list[int], np.ndarray]:
        """Read evaluations.json: steps [K] and returns [K, episodes]."""
        record = read_json(self.evaluations)
        steps, returns = record.get("timesteps"), record.get("returns")
        is_right = (
            isinstance(steps, list)
            and isinstance(returns, list)
            and len(steps) == len(returns) > 0
            and all(map(is_whole, steps))
            and all(isinstance(r, list) and len(r) == len(returns[0]) > 0 for r in returns)
            and all(is_finite(x) for r in returns for x in r)
        )
        if not is_right:
            raise UserError(
                f"{self.evaluations} does not hold evaluations: timesteps, and as many lists of "
                "returns, all of one length"
            )
        assert isinstance(steps, list)
        return steps, np.array(returns)

    def check_model(self, *, best: bool = False) -> Path:
        """The file of the trained agent, or of that of the best evaluation.

        Raises:
            UserError: there is none (yet).
        """
        path = self.best_model if best else self.model
        if path.is_file():
            return path
        if best and self.summary.exists():
            raise UserError(
                f"{path} does not exist: the run was never evaluated, or by a version that did not "
                "keep its best agent; omit --best for the last one"
            )
        flag = import_flag(self.read_config()["env_id"])
        reason = "has had no evaluation yet" if best else "has not finished"
        remedy = f"continue it with totalprop train --resume {self.quoted}{flag}"
        if is_trained_now(self.path):
            reason, remedy = f"is being trained and {reason}", "wait for it"
        if self.best_model.exists():
            remedy += ", or pass --best for the agent of its best evaluation so far"
        raise UserError(f"{path} does not exist: the run {reason}; {remedy}")

    def load_agent(self, env: VecEnv, *, device: str = "auto", best: bool = False) -> BaseAlgorithm:
        """Load the trained agent of this run, or that of its best evaluation.

        Raises:
            UserError: there is none (yet), or its file is damaged.
        """
        path, config = self.check_model(best=best), self.read_config()
        try:
            return AGENTS[config["agent"]].cls.load(path, env=env, device=device)
        except ValueError as error:
            raise UserError(str(error)) from error


def _sweep(root: Path, name: str) -> None:
    """Remove what `RunFolder.create` left behind where it was killed, at least an hour ago."""
    for path in root.glob(f".{glob.escape(name)}.*"):
        # One that is being created holds config.json at most, and its process may run elsewhere.
        with contextlib.suppress(FileNotFoundError):  # it was just given its name
            is_old = time.time() - path.stat().st_mtime > ABANDONED
            if not is_old or not path.is_dir() or path.is_symlink():
                continue
            entries = list(path.iterdir())
            if all(entry.name == "config.json" or entry.suffix == ".tmp" for entry in entries):
                shutil.rmtree(path, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file."""
    try:
        found = safe_file.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {in_one_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"cannot read {path}: it is not a JSON object")
    return found
