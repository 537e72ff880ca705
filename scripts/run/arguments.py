"""The command line of scripts.train: flags per agent, presets, and a run's config.json."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from docstring_parser import parse as parse_docstring
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from totalprop.agents import AGENTS
from totalprop.agents.core.algorithm import Algorithm
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder, current_commit, make_env, parse_env_args
from totalprop.scripts.run.normalisation import Normalised, normalise, normalise_like

# Constructor arguments that are not flags: set below, or not expressible as text.
NOT_FLAGS = {"self", "env", "policy_kwargs", "cost_fn", "tensorboard_log", "verbose"}


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What is trained where, and what is written."""

    env_id: str = ""
    """Gymnasium id of the environment; "module:id" imports the module first."""
    env_arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE passed to the environment's constructor; may be given several times."""
    normalize: Normalised = "none"
    """Scale observations, rewards or both by running statistics (VecNormalize); daappo only."""
    total_timesteps: int = 0
    """Real environment steps (decisions). Episodes of the cart-pole have 30: 450 are 15 trials."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """"linear": --learning-rate falls to 0 over the training, so that the policy settles."""
    runs: Path = Path("runs")
    """Folder that the run's folder is created in."""
    name: str = ""
    """Name of the run's folder; default: agent, environment, estimator and seed."""
    eval_episodes: int = 30
    """Rollouts of each evaluation; they are not used for learning."""
    eval_every: int = 0
    """Steps between evaluations; 0: after each trial's policy search."""
    save_replay: bool = False
    """Also write the world model's replay to replay.npz, for totalprop.scripts.studies.diagnose."""
    checkpoint_seconds: float = 60.0
    """Least time between checkpoints; a killed run goes on from the last with --resume RUN."""
    step_timeout: float = 600.0
    """Seconds that one call of the environment may take before the process ends; 0: any."""
    threads: int = 0
    """CPU threads of PyTorch; 0: its own choice, one per core or OMP_NUM_THREADS."""
    tensorboard: bool = True
    """Write TensorBoard events (scalars and figures)."""
    progress: bool = True
    """Show progress bars."""


def config_class(agent: str) -> type:
    """Dataclass of the agent's flags, from its constructor's signature and docstring."""
    cls = AGENTS[agent].cls
    # stable-baselines3's GymEnv alias names VecEnv by a string.
    hints = typing.get_type_hints(cls.__init__, localns={"VecEnv": VecEnv})
    texts = {p.arg_name: p.description or "" for p in parse_docstring(cls.__doc__ or "").params}
    fields = []
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name in NOT_FLAGS or name.startswith("_"):
            continue
        kind = _flag_type(hints[name])
        doc = " ".join(texts.get(name, "").split())
        annotated = Annotated[kind, tyro.conf.arg(help=doc)]  # type: ignore[valid-type]
        fields.append((name, annotated, dataclasses.field(default=parameter.default)))
    return dataclasses.make_dataclass(f"{cls.__name__}Flags", fields, frozen=True)


def _flag_type(hint: Any) -> Any:
    """The part of a union that can be typed on a command line: float | Schedule -> float."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if is_union else ()
    plain = [m for m in members if m in (int, float, str, bool, type(None))]
    if not plain:
        return hint
    return typing.Union[tuple(plain)]  # noqa: UP007  (built at run time)


def parse(arguments: Sequence[str], usage: str) -> tuple[str, RunOptions, Any, str]:
    """(agent, options, flags, preset) of a command line; exits with 2 on wrong usage."""
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in AGENTS:
        print(usage)
        print("agents:", ", ".join(AGENTS), " (scripts.train AGENT --help lists its flags)")
        if arguments and arguments[0] not in ("-h", "--help"):
            known = ", ".join(AGENTS)
            print(f"error: unknown agent '{arguments[0]}'; choose one of {known}", file=sys.stderr)
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    agent, rest = arguments[0], list(arguments[1:])
    entry, preset = AGENTS[agent], _take_preset(agent, rest)
    flags_type = config_class(agent)
    names = {f.name for f in dataclasses.fields(flags_type)}
    values = entry.presets.get(preset, {})
    flags = flags_type(**{"seed": 0, **{k: v for k, v in values.items() if k in names}})
    run = {**entry.run, **entry.preset_runs.get(preset, {})}
    repeat = run.pop("action_repeat", 0)

    command = dataclasses.make_dataclass(
        "Command",
        [
            ("run", tyro.conf.OmitArgPrefixes[RunOptions]),
            ("agent", tyro.conf.OmitArgPrefixes[flags_type]),  # type: ignore[valid-type, misc]
        ],
    )
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            parsed = tyro.cli(
                command,
                args=rest,
                prog=f"scripts.train {agent}",
                description=f"{entry.cls.__doc__.splitlines()[0]}\n\n"  # type: ignore[union-attr]
                f"--preset {{{','.join(entry.presets)}}} sets a paper's numbers; flags beside it "
                "win.",
                default=command(RunOptions(**run), flags),
            )
    except SystemExit as stop:
        if stop.code:
            help_command = f"totalprop train {agent} --help lists the flags"
            print(f"error: {_unboxed(box.getvalue())}; {help_command}", file=sys.stderr)
        raise
    return agent, _repeated(parsed.run, repeat), parsed.agent, preset


def _repeated(options: RunOptions, repeat: int) -> RunOptions:
    """With a preset's action repeat in the control suite, which is what its paper trains on."""
    if not repeat or not options.env_id.startswith(("dmc/", "dm_control/")):
        return options
    # First, so that the command line's own wins.
    env_arg = (f"action_repeat={repeat}", *options.env_arg)
    return dataclasses.replace(options, env_arg=env_arg)


def _unboxed(box: str) -> str:
    """The message of tyro's box of several lines, and the flag that it takes for meant."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    # Rulers part title, message and help; where lines can be drawn, the title is in the first one.
    groups = itertools.groupby(lines, lambda line: line[:1] in "╭╰" or not line.strip("─-"))
    blocks = [" ".join(group) for is_ruler, group in groups if not is_ruler]
    message = blocks[0 if box.startswith("╭") else 1].partition("  Got errors")[0].rstrip(".")
    near = re.search(r"Perhaps you meant: (--[\w-]+)", " ".join(blocks))
    return f"{message}; did you mean {near[1]}?" if near else message


def _take_preset(agent: str, arguments: list[str]) -> str:
    """Remove --preset NAME from the arguments: it sets the defaults of all other flags."""
    for i, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name != "--preset":
            continue
        preset = value if separator else (arguments[i + 1] if i + 1 < len(arguments) else "")
        del arguments[i : i + (1 if separator else 2)]
        if preset not in AGENTS[agent].presets:
            known = ", ".join(AGENTS[agent].presets)
            print(f"error: unknown preset '{preset}'; choose one of {known}", file=sys.stderr)
            raise SystemExit(2)
        return preset
    return ""


def parse_resume(arguments: Sequence[str]) -> tuple[Path, int | None]:
    """(run folder, steps or None) of `--resume RUN`."""
    parser = argparse.ArgumentParser("totalprop.scripts.train", description="Go on with a run.")
    parser.add_argument("--resume", type=Path, required=True, metavar="RUN", help="its folder")
    parser.add_argument(
        "--total-timesteps", type=int, help="steps in all, if more than it was to do"
    )
    options = parser.parse_args(arguments)
    return options.resume, options.total_timesteps


@dataclasses.dataclass(frozen=True)
class Job:
    """What config.json says: enough to make everything again."""

    agent: str
    preset: str
    options: RunOptions
    env_args: dict[str, Any]
    arguments: dict[str, Any]  # of the agent's constructor

    @staticmethod
    def of(agent: str, options: RunOptions, flags: Any, preset: str = "") -> Job:
        """What `parse` found on a command line."""
        env_args = parse_env_args(options.env_arg)
        return Job(agent, preset, options, env_args, dataclasses.asdict(flags))

    def environments(self) -> tuple[VecEnv, VecEnv]:
        """To train in and to evaluate in."""
        env_id, is_rewound = self.options.env_id, self.arguments.get("action_source") == "rewind"
        limit, seed = self.options.step_timeout, self.arguments["seed"]
        env = make_env(env_id, self.env_args, seed=None, rewindable=is_rewound, step_timeout=limit)
        eval_env = make_env(
            env_id, self.env_args, seed=None if seed is None else 1000 + seed, n_envs=5,
            step_timeout=limit,
        )  # fmt: skip
        env = normalise(env, self.options.normalize, gamma=self.arguments.get("gamma", 1.0))
        return env, normalise_like(eval_env, unwrap_vec_normalize(env))

    def algorithm(self, env: VecEnv) -> Algorithm:
        """The untrained agent."""
        policy_kwargs = AGENTS[self.agent].presets.get(self.preset, {}).get("policy_kwargs")
        arguments = dict(self.arguments)
        if self.options.learning_rate_schedule == "linear":
            rate = arguments["learning_rate"]
            if not 0 < rate < math.inf:
                raise UserError(f"--learning-rate must be above 0, got {rate}")
            arguments["learning_rate"] = LinearSchedule(rate, end=0.0, end_fraction=1.0)
        return AGENTS[self.agent].cls(env=env, policy_kwargs=policy_kwargs, **arguments)

    def flags(self) -> dict[str, Any]:
        """What two runs must have in common to be the same training."""
        learning = (
            "env_id",
            "total_timesteps",
            "learning_rate_schedule",
            "normalize",
            "eval_every",
            "eval_episodes",
        )
        options = {name: getattr(self.options, name) for name in learning}
        return {
            "agent": self.agent,
            "preset": self.preset,
            "env_args": self.env_args,
            **options,
            **self.arguments,
        }

    def config(self) -> str:
        """The text of config.json."""
        options = dataclasses.asdict(self.options)
        config = {
            "commit": current_commit(),
            "agent": self.agent,
            "preset": self.preset,
            "env_id": self.options.env_id,
            "env_args": self.env_args,
            "arguments": self.arguments,
            "options": {**options, "runs": str(options["runs"])},
        }
        return json.dumps(config, indent=2) + "\n"

    @staticmethod
    def read(folder: RunFolder) -> Job:
        """What config.json says."""
        config = folder.read_config()
        try:
            options = {**config["options"], "runs": Path(config["options"]["runs"])}
            options["env_arg"] = tuple(options["env_arg"])
            return Job(
                config["agent"], config["preset"], RunOptions(**options), config["env_args"],
                {k: tuple(v) if isinstance(v, list) else v for k, v in config["arguments"].items()},
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder.config} is not a run's of this version: {error}") from error
