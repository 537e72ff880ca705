"""The environments of runs: how they are named, made and seeded, and what they may import."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

import totalprop.envs  # noqa: F401  (registers our environments)
from totalprop.agents.persistence.safe_file import shown
from totalprop.envs.rewind import Rewindable, can_rewind
from totalprop.scripts.run.errors import UsageError, UserError
from totalprop.scripts.run.watchdog import Watchdog, Watched

EVALUATION_ENVS = 5


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


def parse_env_args(
    arguments: tuple[str, ...], flag: str = "--env-arg", example: str = "noise=4"
) -> dict[str, Any]:
    """Parse NAME=VALUE arguments: ("cost=tip", "noise=4") -> {"cost": "tip", "noise": 4}.

    Values are Python's, or `true`, `false` and `null` as YAML and JSON have them; all else is text.
    """
    parsed: dict[str, Any] = {}
    for argument in arguments:
        name, separator, text = argument.partition("=")
        if not separator or not name.isidentifier():
            raise UserError(f"{flag} expects NAME=VALUE, got '{argument}'; for example {example}")
        try:
            parsed[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[name] = {"true": True, "false": False, "null": None}.get(text, text)
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
        hint = f"did you mean '{near}'?" if near else ""
        hint = hint or f"one that arm.py registers, say, is named with its module, 'arm:{env_id}'"
        raise UsageError(f"unknown environment '{env_id}'; {hint}")
    module, _, own = env_id.rpartition(":")
    if module and (module.endswith(".py") or not module.replace(".", "").isidentifier()):
        raise UsageError(
            f"'{env_id}' must name a module, and not a file, before its colon: "
            f"'{Path(module).stem}:{own}', from the folder of {Path(module).stem}.py"
        )
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
