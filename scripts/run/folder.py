"""The folder of a run: its files, and how its environment and agent are recreated from them."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import errno
import glob
import importlib.util
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import load_env_creator
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

import totalprop.envs  # noqa: F401  (registers our environments)
from totalprop.agents import AGENTS
from totalprop.agents.core import figures
from totalprop.agents.core.validation import is_finite, is_whole
from totalprop.agents.persistence import safe_file
from totalprop.agents.persistence.safe_file import in_one_line, shown, write_text
from totalprop.envs.mujoco_backend import choose_backend
from totalprop.envs.rewind import Rewindable, can_rewind
from totalprop.scripts.run.errors import UsageError, UserError
from totalprop.scripts.run.interruption import is_trained_now
from totalprop.scripts.run.watchdog import Watchdog, Watched

# Entries of config.json: their types, and whether all runs have them. Older ones lack the others.
CONFIG: dict[str, tuple[type, bool]] = {
    "agent": (str, True), "env_id": (str, True), "env_args": (dict, True),
    "arguments": (dict, True), "preset": (str, False), "options": (dict, False),
    "policy_kwargs": (dict, False),
}  # fmt: skip
MAX_VIDEO_STEPS = 1000  # of an episode that is shown as a GIF; all its frames are in memory
WHOLE = "one episode"
EVALUATION_ENVS = 5
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


def search_here() -> None:
    """Find a module that the user has named in the current folder, too, and there last of all.

    `python -m totalprop` does so for all modules, and the command `totalprop` for none.
    """
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def check_import(
    env_id: str, source: Path, imports: Sequence[str], *, within: Path | None = None
) -> None:
    """Check that an environment which a file names runs no code but what the user has named.

    Gymnasium imports the module of "module:id" from the current folder, too.

    Args:
        env_id: id of the environment.
        source: the file.
        imports: modules that the command line names.
        within: folder of the run, in which no module may lie.
    Raises:
        UserError: the module is not among `imports`, or lies in the folder.
    """
    module, colon, _ = env_id.partition(":")
    if not colon:
        return
    if module not in imports:
        raise UserError(
            f"{source} names the environment {shown(env_id)}, which would import and run a module; "
            f"if you know and trust it, add --import {shlex.quote(shown(module)[1:-1])}"
        )
    search_here()
    if within is None:
        return
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return  # making the environment says what is wrong with it
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    if any(Path(p).resolve().is_relative_to(within.resolve()) for p in places if p is not None):
        raise UserError(
            f"the module {module} lies in {within}, a run's folder, from which no code is run; "
            "move it elsewhere on Python's path"
        )


def import_flag(env_id: str) -> str:
    """What commands that read the run's folder need to type after it; "" for most environments."""
    module, colon, _ = env_id.partition(":")
    return f" --import {shlex.quote(module)}" if colon else ""


def program(name: str) -> str:
    """How to call python or a program installed with it: by name if on PATH, else by path."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path):
        return name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def current_commit() -> str:
    """Short hash of the current commit, to be recorded with results.

    "-dirty" is appended if code was changed. "unknown" outside a checkout or without git.
    """

    def git(*arguments: str) -> str:
        command, here = ["git", *arguments], Path(__file__).parents[1]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    is_changed = commit and git("status", "--porcelain", "--", "*.py", "constraints.txt")
    return commit + "-dirty" * bool(is_changed) or "unknown"


def parse_env_args(
    arguments: tuple[str, ...], flag: str = "--env-arg", example: str = "noise=4"
) -> dict[str, Any]:
    """Parse NAME=VALUE arguments: ("cost=tip", "noise=4") -> {"cost": "tip", "noise": 4}."""
    parsed: dict[str, Any] = {}
    for argument in arguments:
        name, separator, text = argument.partition("=")
        if not separator or not name.isidentifier():
            raise UserError(f"{flag} expects NAME=VALUE, got '{argument}'; for example {example}")
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[name] = text
    return parsed


def env_arg_flags(values: Mapping[str, Any]) -> list[str]:
    """The flags --env-arg=NAME=VALUE that `parse_env_args` reads as these values: "4" is no 4."""
    flags = []
    for name, value in values.items():
        is_read = parse_env_args((f"{name}={value}",))[name] == value
        flags.append(f"--env-arg={name}={value if is_read else repr(value)}")
    return flags


def our_id(env_id: str) -> str:
    """The id itself, except of shimmy's `dm_control/walker-walk-v0`: our `dmc/walker-walk-v0`."""
    return env_id.replace("dm_control/", "dmc/", 1)


def make_env(
    env_id: str,
    env_args: dict[str, Any],
    *,
    seed: int | None,
    n_envs: int = 1,
    render: bool = False,
    rewindable: bool = False,
    step_timeout: float = 0.0,
) -> VecEnv:
    """Make a vector environment whose copies are monitored and seeded.

    Environments that can be rewound get the methods of `envs.rewind.Rewindable`.

    Args:
        env_id: Gymnasium id, see `our_id`.
        env_args: keyword arguments of the environment.
        seed: seed of the first copy, increased by 1 for each further copy; None for no seed.
        n_envs: number of copies.
        render: whether to render RGB arrays.
        rewindable: whether the environment must support rewinding.
        step_timeout: seconds that one call may take before the process ends; 0 for no limit.
    Raises:
        UsageError: the id is unknown.
        UserError: the environment cannot be made.
    """
    env_id = our_id(env_id)
    if not env_id:
        raise UsageError(
            "no environment is named (a run of --offline may have none): pass --env-id"
        )
    if env_id not in gym.registry and ":" not in env_id:
        near = nearest_env(env_id)
        hint = f"; did you mean '{near}'?" if near else ""
        raise UsageError(f"unknown environment '{env_id}'{hint}")
    if ":" in env_id:
        search_here()
    kwargs = {**env_args, "render_mode": "rgb_array"} if render else env_args

    watchdog = Watchdog(step_timeout)

    def make(**kwargs: Any) -> gym.Env[Any, Any]:
        env = gym.make(env_id, **kwargs)
        if rewindable or can_rewind(env):
            env = Rewindable(env)
        return Watched(env, watchdog) if step_timeout else env

    try:
        return make_vec_env(make, n_envs, seed=seed, env_kwargs=kwargs)
    except (ValueError, TypeError, ImportError, RuntimeError, gym.error.Error) as error:
        raise UserError(f"cannot make the environment '{env_id}': {error}") from error


def make_evaluation_env(
    env_id: str, env_args: dict[str, Any], *, seed: int | None, step_timeout: float = 0.0
) -> VecEnv:
    """Make the environments that a run, or a peer with the same seed, is evaluated in.

    They are `EVALUATION_ENVS` copies whose seeds no other run's copies have: runs of neighbouring
    seeds that start their evaluations alike would agree better than they are precise.

    Args:
        env_id: see `make_env`.
        env_args: see `make_env`.
        seed: of the run; None for no seed.
        step_timeout: see `make_env`.
    """
    seed = None if seed is None else 1000 + 100 * seed
    return make_env(env_id, env_args, seed=seed, n_envs=EVALUATION_ENVS, step_timeout=step_timeout)


def nearest_env(env_id: str) -> str:
    """The registered id most like a misspelt one, whose namespace may be missing; "" if none is."""
    wanted, best, likeness = env_id.lower(), "", 0.6
    for known in gym.registry:
        for text in (known.lower(), known.lower().rpartition("/")[2]):
            ratio = difflib.SequenceMatcher(None, wanted, text).ratio()
            if ratio > likeness:
                best, likeness = known, ratio
    return best


def registered_id(env_id: str) -> str:
    """The id in Gymnasium's registry: MODULE:ID is ID there, once its module is imported."""
    return our_id(env_id).rpartition(":")[2]


def renders(env_id: str) -> bool:
    """Whether an environment says that it renders images, or does not say."""
    made_by: Any = gym.spec(registered_id(env_id)).entry_point
    if isinstance(made_by, str):
        made_by = load_env_creator(made_by)
    modes = getattr(made_by, "metadata", {}).get("render_modes")
    return modes is None or "rgb_array" in modes


def record_gif(
    env_id: str,
    env_args: dict[str, Any],
    agent: BaseAlgorithm,
    path: Path,
    *,
    seed: int,
    normalised: Callable[[VecEnv], VecEnv] = lambda env: env,
    max_steps: int = MAX_VIDEO_STEPS,
) -> tuple[str, float] | None:
    """Roll out the policy for one episode and save the rendered frames as a GIF.

    A picture is never worth an error: whatever an environment, a renderer or a file system raises
    is printed in one sentence.

    Args:
        env_id: Gymnasium id.
        env_args: keyword arguments of the environment.
        agent: whose policy is shown.
        path: the GIF.
        seed: seed of the environment.
        normalised: wraps the environment as in training.
        max_steps: steps after which the episode is cut, at most MAX_VIDEO_STEPS.
    Returns:
        What the GIF shows (WHOLE or a part) and its return, or None if there is no GIF.
    """
    env: VecEnv | None = None
    try:
        if not renders(env_id):
            print("no GIF: the environment does not render", file=sys.stderr)
            return None
        if "mujoco" in str(getattr(gym.registry.get(registered_id(env_id)), "entry_point", "")):
            choose_backend()  # without a display, Gymnasium's renderer would try GLFW first
        env = normalised(make_env(env_id, env_args, seed=seed, render=True))
        return _record_gif(agent, env, path, min(max_steps, MAX_VIDEO_STEPS))
    except Exception as error:
        print(f"no GIF: {in_one_line(error)}", file=sys.stderr)
        return None
    finally:
        if env is not None:
            with contextlib.suppress(Exception):
                env.close()


def _record_gif(agent: BaseAlgorithm, env: VecEnv, path: Path, max_steps: int) -> tuple[str, float]:
    fps = env.get_attr("metadata")[0].get("render_fps", 30)
    observations = env.reset()
    state, starts, total = None, np.ones(1, dtype=bool), 0.0
    frames = [env.render()]
    for _ in range(max_steps):
        actions, state = agent.predict(observations, state, starts, deterministic=True)  # type: ignore[arg-type]
        observations, rewards, starts, _ = env.step(actions)
        total += float(rewards[0])
        if starts[0]:  # the environment would render the next episode's first frame
            break
        frames.append(env.render())
    pictures = [np.asarray(frame) for frame in frames if frame is not None]
    if not pictures:
        raise UserError(
            "the environment rendered no frames; does it support render_mode='rgb_array'?"
        )
    figures.save_gif(pictures, path, fps=fps)
    return WHOLE if starts[0] else f"the first {max_steps} steps of an episode", total
