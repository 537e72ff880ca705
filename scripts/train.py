"""Train an agent and leave a run folder: config, model, progress.csv, TensorBoard, PNG and GIF.

python -m scripts.train pipps                                  # cart-pole swing-up, tpx, minutes
python -m scripts.train pipps --estimator lr --seed 3
python -m scripts.train pipps --preset pipps2018 --env-arg cost=tip --env-arg noise=4
python -m scripts.train dreamer --preset laptop --env-id dm_control/cartpole-balance-v0
python -m scripts.train dreamer --preset laptop --env-id dm_control/walker-walk-v0 --horizon 60
python -m scripts.train dreamer --env-id dm_control/walker-walk-v0 --env-arg observation=pixels
python -m scripts.train daappo --env-id dm_control/cartpole-swingup-v0 --env-arg action_repeat=4
python -m scripts.train daappo --preset recommended --action-source rewind
python -m scripts.train --resume runs/NAME                     # go on after a kill or Ctrl-C
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import math
import os
import resource
import sys
import time
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from docstring_parser import parse as parse_docstring
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from agents import PIPPS, DreamerTPX, figures, open_loop, presets, safe_file
from agents.callbacks import Evaluation, OpenLoopPictures
from agents.checkpoint import Checkpoints, Stateful, TrainingStopped
from agents.saving import SafeSaving
from scripts.interruption import locked, stopping_between_rollouts
from scripts.normalisation import Normalised, normalise, normalise_like, save_statistics
from scripts.run_folder import (
    AGENTS,
    RunFolder,
    UserError,
    make_env,
    parse_env_args,
    read_json,
    record_gif,
    save_gif,
)
from scripts.run_log import make_logger

# Constructor arguments that are not flags: set below, or not expressible as text.
NOT_FLAGS = {"self", "env", "policy_kwargs", "cost_fn", "tensorboard_log", "verbose"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "pipps": {"env_id": "totalprop/CartPoleSwingUp-v0", "total_timesteps": 450},
    "dreamer": {
        "env_id": "dmc/cartpole-balance-v0",
        "total_timesteps": 20_000,
        "eval_episodes": 5,
        "eval_every": 2_500,
    },
    "daappo": {
        "env_id": "dmc/cartpole-swingup-v0",
        "normalize": "both",
        "total_timesteps": 100_000,
        "eval_episodes": 5,
        "eval_every": 5_000,
    },
}
PRESETS = {"pipps": presets.PIPPS, "dreamer": presets.DREAMER, "daappo": presets.DAAPPO}


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
    runs: Path = Path("runs")
    """Folder that the run's folder is created in."""
    name: str = ""
    """Name of the run's folder; default: agent, environment, estimator and seed."""
    eval_episodes: int = 30
    """Rollouts of each evaluation; they are not used for learning."""
    eval_every: int = 0
    """Steps between evaluations; 0: after each trial's policy search."""
    save_replay: bool = False
    """Also write the world model's replay to replay.npz, for scripts.diagnose."""
    checkpoint_seconds: float = 60.0
    """Least time between checkpoints; a killed run goes on from the last with --resume RUN."""
    threads: int = 0
    """CPU threads of PyTorch; 0: one per core."""
    tensorboard: bool = True
    """Write TensorBoard events (scalars and figures)."""
    progress: bool = True
    """Show progress bars."""


def config_class(agent: str) -> type:
    """Dataclass of the agent's flags, from its constructor's signature and docstring."""
    cls = AGENTS[agent]
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


def parse(arguments: Sequence[str]) -> tuple[str, RunOptions, Any, str]:
    """(agent, options, flags, preset) of a command line; exits with 2 on wrong usage."""
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0] not in AGENTS:
        print(__doc__)
        print("agents:", ", ".join(AGENTS), " (scripts.train AGENT --help lists its flags)")
        if arguments and arguments[0] not in ("-h", "--help"):
            print(f"error: unknown agent '{arguments[0]}'; choose one of {', '.join(AGENTS)}")
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    agent, rest = arguments[0], list(arguments[1:])
    preset = _take_preset(agent, rest)
    flags_type = config_class(agent)
    known = {f.name for f in dataclasses.fields(flags_type)}
    values = PRESETS[agent].get(preset, {})
    flags = flags_type(**{"seed": 0, **{k: v for k, v in values.items() if k in known}})

    command = dataclasses.make_dataclass(
        "Command",
        [
            ("run", tyro.conf.OmitArgPrefixes[RunOptions]),
            ("agent", tyro.conf.OmitArgPrefixes[flags_type]),  # type: ignore[valid-type]
        ],
    )
    parsed = tyro.cli(
        command,
        args=rest,
        prog=f"scripts.train {agent}",
        description=f"{AGENTS[agent].__doc__.splitlines()[0]}\n\n"  # type: ignore[union-attr]
        f"--preset {{{','.join(PRESETS[agent])}}} sets a paper's numbers; flags beside it win.",
        default=command(RunOptions(**DEFAULTS[agent]), flags),
    )
    return agent, parsed.run, parsed.agent, preset


def _take_preset(agent: str, arguments: list[str]) -> str:
    """Remove --preset NAME from the arguments: it sets the defaults of all other flags."""
    for i, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name != "--preset":
            continue
        preset = value if separator else (arguments[i + 1] if i + 1 < len(arguments) else "")
        del arguments[i : i + (1 if separator else 2)]
        if preset not in PRESETS[agent]:
            known = ", ".join(PRESETS[agent])
            print(f"error: unknown preset '{preset}'; choose one of {known}", file=sys.stderr)
            raise SystemExit(2)
        return preset
    return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: wrong input ends with one sentence, never with a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    is_resumed = bool(arguments) and arguments[0].partition("=")[0] == "--resume"
    command = parse_resume(arguments) if is_resumed else parse(arguments)
    try:
        resume(*command) if is_resumed else train(*command)
    except (UserError, ValueError, AssertionError, FloatingPointError, OSError) as error:
        if os.environ.get("TOTALPROP_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nstopped; the run goes on from its last checkpoint with --resume", file=sys.stderr)
        raise SystemExit(130) from None


def parse_resume(arguments: Sequence[str]) -> tuple[Path, int]:
    """(run folder, steps) of `--resume RUN`."""
    parser = argparse.ArgumentParser("scripts.train", description="Go on with a run.")
    parser.add_argument("--resume", type=Path, required=True, metavar="RUN", help="its folder")
    parser.add_argument(
        "--total-timesteps", type=int, default=0, help="steps in all, if more than it was to do"
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

    def environments(self) -> tuple[VecEnv, VecEnv]:
        """To train in and to evaluate in."""
        env_id, is_rewound = self.options.env_id, self.arguments.get("action_source") == "rewind"
        env = make_env(env_id, self.env_args, seed=None, rewindable=is_rewound)
        eval_env = make_env(env_id, self.env_args, seed=1000 + self.arguments["seed"], n_envs=5)
        env = normalise(env, self.options.normalize, gamma=self.arguments.get("gamma", 1.0))
        return env, normalise_like(eval_env, unwrap_vec_normalize(env))

    def algorithm(self, env: VecEnv) -> SafeSaving:
        """The untrained agent."""
        policy_kwargs = PRESETS[self.agent].get(self.preset, {}).get("policy_kwargs")
        return AGENTS[self.agent](env=env, policy_kwargs=policy_kwargs, **self.arguments)  # type: ignore[call-arg]

    def write(self, folder: RunFolder) -> None:
        """config.json."""
        options = dataclasses.asdict(self.options)
        config = {
            "agent": self.agent,
            "preset": self.preset,
            "env_id": self.options.env_id,
            "env_args": self.env_args,
            "arguments": self.arguments,
            "options": {**options, "runs": str(options["runs"])},
        }
        text = json.dumps(config, indent=2) + "\n"
        safe_file.write_text(folder.config, text)

    @staticmethod
    def read(folder: RunFolder) -> Job:
        """What `write` wrote."""
        config = read_json(folder.config)
        try:
            options = {**config["options"], "runs": Path(config["options"]["runs"])}
            options["env_arg"] = tuple(options["env_arg"])
            return Job(
                config["agent"], config["preset"], RunOptions(**options), config["env_args"],
                {k: tuple(v) if isinstance(v, list) else v for k, v in config["arguments"].items()},
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder.config} is not a run's of this version: {error}") from error


class Stopwatch:
    """Seconds of training over all processes of a run; kept in its checkpoints."""

    def __init__(self) -> None:
        self._before, self._started = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + time.perf_counter() - self._started

    def get_state(self) -> dict[str, Any]:
        """For `agents.checkpoint`."""
        return {"seconds": self.seconds}

    def set_state(self, state: dict[str, Any]) -> None:
        """Put back what `get_state` returned."""
        self._before, self._started = state["seconds"], time.perf_counter()


def train(agent: str, options: RunOptions, flags: Any, preset: str = "") -> RunFolder:
    """Make environment, agent and run folder, learn, and report."""
    set_threads(options)
    if options.total_timesteps < 1:
        raise UserError(f"--total-timesteps must be at least 1, got {options.total_timesteps}")
    if options.eval_episodes < 2:
        raise UserError(f"--eval-episodes must be at least 2, got {options.eval_episodes}")
    job = Job(agent, preset, options, parse_env_args(options.env_arg), dataclasses.asdict(flags))
    # Everything that can be wrong is made before the folder: nothing is left behind by a typo.
    env, eval_env = job.environments()
    algorithm = job.algorithm(env)
    name = options.name or "_".join(
        [agent, options.env_id.rsplit("/", 1)[-1], _method(job.arguments), f"seed{flags.seed}"]
    )
    folder = RunFolder.create(options.runs, name)
    job.write(folder)
    print(f"Training {agent} ({flags.estimator}) on {options.env_id}, writing to {folder.path}")
    with locked(folder.path):
        learn(job, folder, algorithm, eval_env)
    return folder


def resume(path: Path, total_timesteps: int = 0) -> RunFolder:
    """Go on with a run from its last checkpoint, to its end or to more steps."""
    folder = RunFolder.open(path)
    job = Job.read(folder)
    with locked(folder.path):
        if folder.summary.exists() and total_timesteps <= job.options.total_timesteps:
            raise UserError(
                f"{folder.path} is finished ({job.options.total_timesteps} steps); to go on, add "
                "--total-timesteps with more"
            )
        if total_timesteps > job.options.total_timesteps:
            options = dataclasses.replace(job.options, total_timesteps=total_timesteps)
            job = dataclasses.replace(job, options=options)
            job.write(folder)
            folder.summary.unlink(missing_ok=True)
        set_threads(job.options)
        env, eval_env = job.environments()
        learn(job, folder, None, eval_env, env)
    return folder


def set_threads(options: RunOptions) -> None:
    """CPU threads of PyTorch."""
    torch.set_num_threads(options.threads or os.cpu_count() or 1)


def learn(
    job: Job,
    folder: RunFolder,
    algorithm: SafeSaving | None,
    eval_env: VecEnv,
    env: VecEnv | None = None,
) -> None:
    """Learn to the end under checkpoints, save, and report; without an agent: the checkpoint's."""
    options = job.options
    evaluation = Evaluation(
        eval_env,
        n_episodes=options.eval_episodes,
        every=options.eval_every,
        path=folder.evaluations,
        verbose=1,
    )
    stopwatch = Stopwatch()
    also: dict[str, Stateful] = {"evaluation": evaluation, "stopwatch": stopwatch}
    checkpoints = Checkpoints(
        folder.checkpoints, every_seconds=options.checkpoint_seconds, also=also
    )
    if algorithm is None:
        assert env is not None
        algorithm = checkpoints.load(AGENTS[job.agent], env) or job.algorithm(env)
        print(f"Going on with {folder.path} after {algorithm.num_timesteps} steps")
    logger, also["table"] = make_logger(
        folder.path, tensorboard=options.tensorboard, first_step=algorithm.num_timesteps
    )
    checkpoints.also = also
    algorithm.set_logger(logger)
    algorithm.tensorboard_log = str(folder.path) if options.tensorboard else None
    callbacks: list[BaseCallback] = [evaluation]
    if isinstance(algorithm, DreamerTPX) and options.tensorboard:
        pictures = OpenLoopPictures(max(options.total_timesteps // 10, 1))
        callbacks.append(pictures)
        also["pictures"] = pictures
    callbacks.append(checkpoints)
    checkpoints.restore(algorithm)
    remaining = options.total_timesteps - algorithm.num_timesteps
    with stopping_between_rollouts(checkpoints) as signals:
        try:
            if remaining > 0:
                algorithm.learn(
                    remaining,
                    callback=callbacks,
                    progress_bar=options.progress,
                    reset_num_timesteps=False,
                )
        except TrainingStopped:
            print(
                f"stopped after {algorithm.num_timesteps} of {options.total_timesteps} steps; go "
                f"on with: python -m scripts.train --resume {folder.path}",
                file=sys.stderr,
            )
            raise SystemExit(128 + signals[0]) from None
    algorithm.save(folder.model)
    statistics = algorithm.get_vec_normalize_env()
    if statistics is not None:
        save_statistics(statistics, folder.vec_normalize)
    report(algorithm, folder, evaluation, options, job.env_args, stopwatch.seconds)


def _method(keywords: dict[str, Any]) -> str:
    """What tells runs apart: the estimator, and where DAAPPO's extra actions come from."""
    source = keywords.get("action_source")
    return "_".join([*([source] if source else []), str(keywords["estimator"])])


def report(
    algorithm: SafeSaving,
    folder: RunFolder,
    evaluation: Evaluation,
    options: RunOptions,
    env_args: dict[str, Any],
    seconds: float,
) -> None:
    """Curve, videos and the summary line."""
    # PIPPS minimises a cost and counts trials, as its papers do; the others have returns and steps.
    is_cost = isinstance(algorithm, PIPPS)
    sign, quantity = (-1, "cost") if is_cost else (1, "return")
    values = sign * np.array(evaluation.returns)
    threshold = reward_threshold(evaluation.eval_env)
    limit = None if threshold is None else sign * threshold
    figures.learning_curve(
        np.arange(1, len(values) + 1) if is_cost else np.array(evaluation.timesteps),
        values,
        xlabel="trial (real episodes seen)" if is_cost else "decisions (calls of env.step)",
        ylabel=f"{quantity} of an episode",
        threshold=limit,
        title=f"{type(algorithm).__name__}, {options.env_id}",
    ).savefig(folder.learning_curve, dpi=150)
    mean, std = float(values[-1].mean()), float(values[-1].std())
    success = None if limit is None else bool(sign * mean > sign * limit)
    summary = {
        f"final_{quantity}": mean,
        f"final_{quantity}_std": std,
        "success": success,
        "success_threshold": limit,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    safe_file.write_text(folder.summary, json.dumps(summary, indent=2) + "\n")
    pictures = [folder.learning_curve.name, *_videos(algorithm, folder, options, env_args)]
    verdict = {True: "SUCCESS", False: "NO SUCCESS", None: "DONE"}[success]
    side = "below" if is_cost else "above"
    bound = "" if limit is None else f" (success {side} {limit:g})"
    print(
        f"{verdict}: {quantity} {mean:.2f} ± {std:.2f} over {values.shape[1]} rollouts{bound} "
        f"after {algorithm.num_timesteps} real steps, {seconds / 60:.1f} min, "
        f"{summary['peak_memory_gb']} GB of memory at most.\n"
        f"Look at {folder.path}/: {', '.join(pictures)}, progress.csv, TensorBoard.\n"
        f"Next: python -m scripts.evaluate {folder.path}"
        f"   |   tensorboard --logdir {folder.path.parent}"
    )


def _videos(
    algorithm: SafeSaving, folder: RunFolder, options: RunOptions, env_args: dict[str, Any]
) -> list[str]:
    """GIF of the policy, and a world model's open-loop prediction; the files' names."""
    written = []
    try:
        render_env = make_env(options.env_id, env_args, seed=0, render=True)
        render_env = normalise_like(render_env, algorithm.get_vec_normalize_env())
        record_gif(algorithm, render_env, folder.video)
        written.append(folder.video.name)
    except UserError as error:  # the training is done: a missing picture must not hide it
        print(f"no video: {error}", file=sys.stderr)
    if isinstance(algorithm, DreamerTPX) and algorithm.replay_buffer is not None:
        if options.save_replay:
            algorithm.save_replay_buffer(folder.replay)
            written.append(folder.replay.name)
        try:
            truth, model = open_loop.predict_sequences(algorithm)
        except ValueError as error:
            print(f"no open-loop prediction: {error}", file=sys.stderr)
            return written
        if truth.ndim == 3:
            path = folder.open_loop.with_suffix(".png")
            figure = figures.traces(truth[:, 0], model[:, 0], open_loop.CONTEXT)
            figure.savefig(path, dpi=120)
        else:
            path = folder.open_loop.with_suffix(".gif")
            save_gif(list(open_loop.video(truth, model)), path, fps=10)
        written.append(path.name)
    return written


def reward_threshold(env: VecEnv) -> float | None:
    """Return that counts as solved, from the environment's registration, or None."""
    spec = env.get_attr("spec")[0]
    threshold = None if spec is None else spec.reward_threshold
    return None if threshold is None or not math.isfinite(threshold) else float(threshold)


if __name__ == "__main__":
    main()
