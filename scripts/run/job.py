"""A run: its options, its agent's arguments, and the config.json that holds both."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from totalprop.agents import AGENTS
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.evaluation import MAX_STEPS
from totalprop.agents.core.processes import ALONE, Processes
from totalprop.agents.core.validation import AtLeast, constructor_hints, expectation
from totalprop.agents.persistence.safe_file import shown
from totalprop.scripts.run.environments import make_env, make_evaluation_env
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.normalisation import Normalised, normalise, normalise_like
from totalprop.scripts.run.policy_kwargs import (
    accepted,
    check_policy_kwargs,
    default_policy_kwargs,
    policy_kwargs_from_json,
)
from totalprop.scripts.run.program import current_commit
from totalprop.scripts.run.threads import owned_cores

if TYPE_CHECKING:
    from minari import MinariDataset

# Constructor arguments that are not flags: set by the run, or not expressible as text.
NOT_FLAGS = {
    "self", "env", "policy_kwargs", "cost_fn", "tensorboard_log", "verbose", "rollout_buffer_class",
    "rollout_buffer_kwargs", "group",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What to train on, and what to write."""

    env_id: str = ""
    """Gymnasium id of the environment; "module:id" imports the module first."""
    env_arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE passed to the environment's constructor; may be given several times."""
    offline: str = ""
    """Minari dataset, an id or a folder, to learn from without acting; dreamer only. Steps are then
    gradient updates, and the environment, --env-id or the dataset's own, serves evaluations only.
    """
    normalize: Normalised = "none"
    """Scale observations, rewards or both by running statistics (VecNormalize); daappo only. Images
    and choices stay as they are."""
    total_timesteps: Annotated[int, AtLeast(1)] = 1
    """Environment steps (decisions) to learn for; with --offline, gradient updates."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """"linear" decreases --learning-rate to 0 over the run, so that the policy settles."""
    runs: Path = Path("runs")
    """Folder in which the run's folder is created."""
    name: str = ""
    """Name of the run's folder; default: agent, environment, estimator and seed."""
    eval_episodes: Annotated[int, AtLeast(2)] = 30
    """Episodes per evaluation; they are not used for learning."""
    eval_max_steps: Annotated[int, AtLeast(1)] = MAX_STEPS
    """Steps after which an episode of an evaluation is cut, if the environment has not ended it."""
    eval_every: Annotated[int, AtLeast(0)] = 0
    """Steps between evaluations; 0: after each rollout and what is learned from it."""
    save_replay: bool = False
    """Also write DreamerTPX's replay to replay.npz, which `totalprop diagnose` reads."""
    checkpoint_seconds: Annotated[float, AtLeast(0)] = 60.0
    """Minimum time between checkpoints, in seconds; --resume RUN starts from the last one.
    Rounds of more than 5 s get one each."""
    step_timeout: Annotated[float, AtLeast(0)] = 600.0
    """Seconds after which a call of the environment counts as hung and ends the run; 0: never."""
    threads: Annotated[int, AtLeast(0)] = 0
    """CPU threads of PyTorch, at most one per core that the process may use (affinity, quota of its
    control group); 0: as many as that, or OMP_NUM_THREADS."""
    tensorboard: bool = True
    """Write TensorBoard events (scalars and figures)."""
    track: Literal["none", "wandb", "mlflow", "trackio"] = "none"
    """Also send scalars, figures and settings to Weights & Biases, MLflow or Trackio."""
    track_project: str = "totalprop"
    """Project of Weights & Biases or Trackio, or experiment of MLflow, that --track sends to."""
    progress: bool = True
    """Show progress bars."""

    def check(self) -> None:
        """Raise a UserError if an option is out of range."""
        for name, hint in constructor_hints(RunOptions).items():
            value = getattr(self, name)
            if expected := expectation(hint, value):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} must be {expected}, got {value}")
        if self.total_timesteps >= 2**63:  # more than a file can count
            raise UserError(f"--total-timesteps must be below 2^63, got {self.total_timesteps:.3g}")
        if self.threads > (cores := owned_cores()):
            raise UserError(
                f"--threads must be at most {cores}, the cores that this process may use, got "
                f"{self.threads}"
            )

    @property
    def unit(self) -> str:
        """What the steps of the run are."""
        return "gradient updates" if self.offline else "environment steps"


@dataclasses.dataclass(frozen=True)
class Job:
    """One run as config.json describes it: enough to recreate its environment and agent."""

    agent: str
    preset: str
    options: RunOptions
    env_args: dict[str, Any]
    arguments: dict[str, Any]  # arguments of the agent's constructor
    policy_kwargs: dict[str, Any]  # as JSON; `policy_kwargs_from_json` turns names into classes

    def environments(self) -> tuple[VecEnv, VecEnv]:
        """Make the environments for training and for evaluation."""
        with naming_flags("action_source"):  # an environment speaks of its own arguments
            env = make_env(
                self.options.env_id, self.env_args, seed=None,
                step_timeout=self.options.step_timeout,
                rewindable=AGENTS[self.agent].rewinds(self.arguments),
            )  # fmt: skip
        env = self.normalised(env)
        return env, normalise_like(self.evaluation_environment(), unwrap_vec_normalize(env))

    def evaluation_environment(self) -> VecEnv:
        """Make the environment for evaluation, not normalised."""
        return make_evaluation_env(
            self.options.env_id, self.env_args, seed=self.arguments["seed"],
            step_timeout=self.options.step_timeout,
        )  # fmt: skip

    def normalised(self, env: VecEnv) -> VecEnv:
        """The environment for training in the VecNormalize that the options ask for."""
        return normalise(env, self.options.normalize, gamma=self.arguments.get("gamma", 1.0))

    def algorithm(
        self, env: VecEnv, processes: Processes = ALONE, dataset: MinariDataset | None = None
    ) -> Algorithm:
        """Make the untrained agent.

        Args:
            env: its environment.
            processes: that learn it together.
            dataset: that fills its replay, or None.
        """
        arguments = dict(self.arguments)
        if processes.size > 1:
            arguments["group"] = processes.group
            arguments["device"] = processes.device(arguments["device"])
        if self.options.learning_rate_schedule == "linear":
            rate = arguments["learning_rate"]
            if not 0 < rate < math.inf:
                raise UserError(f"--learning-rate must be above 0, got {rate}")
            arguments["learning_rate"] = LinearSchedule(rate, end=0.0, end_fraction=1.0)
        cls = AGENTS[self.agent].cls
        kwargs = accepted(cls, arguments["policy"], self.policy_kwargs)
        with naming_flags(*self.arguments, *self.policy_kwargs):
            made = cls(env=env, policy_kwargs=policy_kwargs_from_json(kwargs), **arguments)
            if dataset is not None:
                made.load_dataset(dataset)  # type: ignore[attr-defined]
        return made

    def flags(self) -> dict[str, Any]:
        """The settings that determine what a run learns."""
        learning = (
            "env_id",
            "offline",
            "total_timesteps",
            "learning_rate_schedule",
            "normalize",
            "eval_every",
            "eval_episodes",
            "eval_max_steps",
        )
        options = {name: getattr(self.options, name) for name in learning}
        options["env_args"] = self.env_args
        if self.options.offline:  # the environment evaluates only, and may be the dataset's own
            del options["env_id"], options["env_args"]
        return {
            "agent": self.agent,
            "preset": self.preset,
            **options,
            **self.arguments,
            "policy_kwargs": self.policy_kwargs,
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
            "policy_kwargs": self.policy_kwargs,
            "options": {**options, "runs": str(options["runs"])},
        }
        return json.dumps(config, indent=2) + "\n"

    @staticmethod
    def read(folder: RunFolder) -> Job:
        """Read the job of a run folder.

        Raises:
            UserError: config.json is not that of a run of this version.
        """
        config = folder.read_config()
        agent, preset = config["agent"], config.get("preset") or ""
        cls, entry = AGENTS[agent].cls, AGENTS[agent]
        if preset not in ("", *entry.presets):
            raise UserError(f"{folder.config} names the unknown preset {shown(preset)}")
        policy_kwargs = config.get("policy_kwargs")
        if policy_kwargs is None:  # runs of version 0.1 took them from the preset
            policy_kwargs = default_policy_kwargs(agent, preset)
        options, arguments = config.get("options") or {}, config["arguments"]
        hints = constructor_hints(cls)
        flags = {name: hint for name, hint in hints.items() if name not in NOT_FLAGS}
        kinds = {**constructor_hints(RunOptions), "runs": str}
        _check("options", options, kinds, kinds.keys() & ("env_id", "env_arg", "runs"), folder)
        _check("arguments", arguments, flags, flags.keys() & ("policy", "seed", "device"), folder)
        try:
            check_policy_kwargs(agent, policy_kwargs)
        except UserError as error:
            raise UserError(f"{folder.config}: {error}") from error
        changes = {"runs": Path(options["runs"]), "env_arg": tuple(options["env_arg"])}
        return Job(
            agent=agent,
            preset=preset,
            options=RunOptions(**{**options, **changes}),
            env_args=config["env_args"],
            arguments={k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()},
            policy_kwargs=policy_kwargs,
        )


@contextlib.contextmanager
def naming_flags(*names: str) -> Iterator[None]:
    """Refusals and warnings name flags, not arguments; an error stays of its kind."""
    say = warnings.formatwarning

    def say_flags(message: Warning | str, *where: Any) -> str:
        return in_flags(say(message, *where), names)

    warnings.formatwarning = say_flags  # type: ignore[assignment]
    try:
        yield
    except (UserError, ValueError, AssertionError, FloatingPointError) as error:
        error.args = (in_flags(str(error), names),)
        raise
    finally:
        warnings.formatwarning = say


def in_flags(text: str, names: Iterable[str]) -> str:
    """A constructor's refusal in the words of the command line.

    >>> in_flags("horizon must be at least 2, got 1: choose credit='all'", ["horizon", "credit"])
    '--horizon must be at least 2, got 1: choose --credit all'

    Args:
        text: the message.
        names: arguments that are flags.
    """
    known = set(names)

    def flag(match: re.Match[str]) -> str:
        name, value = match["name"], (match["value"] or "").strip("'\"")
        is_word = "_" not in name and not value  # it may be a word of the sentence
        if name not in known or (is_word and not text.startswith(" must be ", match.end())):
            return match[0]
        dashed = name.replace("_", "-")
        if value in ("True", "False"):
            return f"--{dashed}" if value == "True" else f"--no-{dashed}"
        return f"--{dashed} {value}" if value else f"--{dashed}"

    value = r"""(?:=(?P<value>'[^']*'|"[^"]*"|[\w.+-]*\w))?"""
    return re.sub(rf"(?<![\w.'-])(?P<name>[a-z]\w*){value}(?![\w=(])", flag, text)


def _check(
    part: str, values: dict[str, Any], hints: dict[str, Any], needed: Set[str], folder: RunFolder
) -> None:
    """Raise a UserError if a part of config.json lacks an entry, or has one that is not right."""
    if missing := sorted(needed - values.keys()):
        raise UserError(f"{folder.config} lacks {missing[0]} in its {part}")
    for name, value in values.items():
        if name not in hints:
            near = ", ".join(difflib.get_close_matches(name, hints, 1))
            hint = f"; did you mean {near}?" if near else ", which this version does not know"
            raise UserError(f"{folder.config} has {shown(name)} in its {part}{hint}")
        if expected := expectation(hints[name], value, exact=True):
            raise UserError(f"{folder.config}: {name} must be {expected}, got {shown(value)}")
