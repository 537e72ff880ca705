"""A run's folder: what is in it, and how environments and agents are made again from it."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

import totalprop.envs  # noqa: F401  (registers our environments)
from totalprop.agents import AGENTS
from totalprop.agents.persistence.safe_file import write_text
from totalprop.envs.rewind import Rewindable, can_rewind
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.watchdog import Watchdog, Watched

MAX_GIF_FRAMES = 125  # a GIF of 500 frames of 240 x 320 would take 10 MB and more

CONFIG = ("agent", "env_id", "env_args", "arguments")


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """Everything needed to make environment and agent again, as JSON."""
        return self.path / "config.json"

    @property
    def model(self) -> Path:
        """The trained agent, for `load`."""
        return self.path / "model.zip"

    @property
    def quoted(self) -> str:
        """As a shell takes it."""
        return shlex.quote(str(self.path))

    @property
    def vec_normalize(self) -> Path:
        """Statistics of VecNormalize, where --normalize was given."""
        return self.path / "vec_normalize.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of what a training goes on from."""
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """Returns of the evaluation rollouts, as JSON."""
        return self.path / "evaluations.json"

    @property
    def learning_curve(self) -> Path:
        """Picture of the evaluations."""
        return self.path / "learning_curve.png"

    @property
    def video(self) -> Path:
        """The final policy, as a GIF."""
        return self.path / "rollout.gif"

    @property
    def replay(self) -> Path:
        """The replay of a world model's training sequences."""
        return self.path / "replay.npz"

    @property
    def open_loop(self) -> Path:
        """A world model's open-loop prediction, suffix .gif, or .png for vectors."""
        return self.path / "open_loop"

    @property
    def summary(self) -> Path:
        """Result and timing, as JSON."""
        return self.path / "summary.json"

    @staticmethod
    def create(root: Path, name: str, config: str) -> RunFolder:
        """A new folder root/name, or root/name_2, ... if that is taken, with its config.json.

        It appears with its config or not at all: a run killed before is begun again as it was.
        """
        if name != Path(name).name:
            raise UserError(f"--name is one folder's name, in the folder --runs, got '{name}'")
        path, number = root / name, 2
        while path.exists():
            path, number = root / f"{name}_{number}", number + 1
        try:
            new = RunFolder(path.with_name(f".{path.name}.{os.getpid()}"))
            new.path.mkdir(parents=True, exist_ok=True)
            write_text(new.config, config)
            new.path.rename(path)
        except OSError as error:
            raise UserError(f"cannot create the run folder {path}: {error.strerror}") from error
        return RunFolder(path)

    @staticmethod
    def open(path: Path) -> RunFolder:
        """An existing run."""
        folder = RunFolder(path)
        if not folder.config.is_file():
            raise UserError(
                f"{path} is no run folder (it has no config.json); "
                "pass the folder that scripts/train.py printed"
            )
        return folder

    def read_config(self) -> dict[str, Any]:
        """config.json, with the entries that every run has."""
        config = read_json(self.config)
        missing = [name for name in CONFIG if name not in config]
        if missing:
            raise UserError(f"{self.config} lacks {', '.join(missing)}: it is no run's")
        if config["agent"] not in AGENTS:
            raise UserError(f"{self.config} names the unknown agent {config['agent']!r}")
        return config

    def load_agent(self, env: VecEnv) -> BaseAlgorithm:
        """The trained agent of this run."""
        config = self.read_config()
        try:
            return AGENTS[config["agent"]].cls.load(self.model, env=env)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.model} does not exist: the run has not finished; train it again"
            ) from error
        except ValueError as error:
            raise UserError(str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object")
    return found


def program(name: str) -> str:
    """How to call python, or what is installed beside it: by its path unless that is active."""
    path = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(path):
        return name
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def current_commit() -> str:
    """Short hash of the checkout, for records of results; with "-dirty" where code was changed.

    "unknown" where there is no checkout, or no git.
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


def parse_env_args(arguments: tuple[str, ...]) -> dict[str, Any]:
    """["cost=tip", "noise=4"] -> {"cost": "tip", "noise": 4}."""
    parsed: dict[str, Any] = {}
    for argument in arguments:
        name, separator, text = argument.partition("=")
        if not separator or not name.isidentifier():
            raise UserError(f"--env-arg expects NAME=VALUE, got '{argument}'; for example noise=4")
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[name] = text
    return parsed


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
    """Vector environment of an id, each monitored and seeded.

    `dm_control/walker-walk-v0` (shimmy's name) is our `dmc/walker-walk-v0`. Those that can be
    rewound have the methods of `envs.rewind.Rewindable`; with `rewindable` all must. A call that
    takes longer than `step_timeout` seconds ends the process (0: never).
    """
    env_id = env_id.replace("dm_control/", "dmc/", 1)
    if env_id not in gym.registry and ":" not in env_id:
        near = difflib.get_close_matches(env_id, list(gym.registry), 1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"unknown environment '{env_id}'{hint}")
    kwargs = {**env_args, "render_mode": "rgb_array" if render else None}

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


def record_gif(agent: BaseAlgorithm, env: VecEnv, path: Path, *, episodes: int = 1) -> float:
    """Roll the policy out and write what the environment renders; returns the mean return."""
    try:
        return _record_gif(agent, env, path, episodes)
    except (ImportError, RuntimeError, gym.error.Error) as error:  # of OpenGL: RuntimeError
        raise UserError(f"cannot record a GIF: {error}") from error


def save_gif(frames: Sequence[np.ndarray], path: Path, *, fps: float) -> None:
    """Write frames [H, W, 3] uint8; of long episodes every second, third, ... at the same speed."""
    from PIL import Image

    step = -(-len(frames) // MAX_GIF_FRAMES)
    pictures = [Image.fromarray(frame) for frame in frames[::step]]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=round(1000 * step / fps), loop=0
    )


def _record_gif(agent: BaseAlgorithm, env: VecEnv, path: Path, episodes: int) -> float:
    fps = env.get_attr("metadata")[0].get("render_fps", 30)
    frames: list[np.ndarray | None] = []
    returns: list[float] = []
    observations = env.reset()
    state, starts, total = None, np.ones(1, dtype=bool), 0.0
    frames.append(env.render())
    while len(returns) < episodes:
        actions, state = agent.predict(observations, state, starts, deterministic=True)  # type: ignore[arg-type]
        observations, rewards, starts, _ = env.step(actions)
        total += float(rewards[0])
        if starts[0]:
            returns.append(total)
            total = 0.0
        else:  # after the end the environment has reset already: that frame is the next episode's
            frames.append(env.render())
    pictures = [np.asarray(frame) for frame in frames if frame is not None]
    if not pictures:
        raise UserError("the environment renders nothing; does it support render_mode='rgb_array'?")
    save_gif(pictures, path, fps=fps)
    return float(np.mean(returns))
