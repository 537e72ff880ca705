"""Train an agent and write a run folder: config, model, progress.csv, TensorBoard, PNG and GIF.

totalprop train pipps                                  # cart-pole swing-up with tpx, in minutes
totalprop train pipps --estimator lr --seed 3
totalprop train pipps --preset pipps2018 --env-arg cost=tip --env-arg noise=4
totalprop train dreamer --preset recommended --env-id Pendulum-v1 --total-timesteps 5000
totalprop train dreamer --preset recommended --env-id dm_control/walker-walk-v0 --horizon 60
totalprop train dreamer --preset recommended --env-id dmc/walker-run-v0 --env-arg observation=pixels
totalprop train daappo --env-id dm_control/cartpole-swingup-v0 --env-arg action_repeat=4
totalprop train daappo --preset recommended --action-source rewind
totalprop train dreamer --preset recommended --offline mujoco/hopper/medium-v0   # from data alone
totalprop train daappo --track mlflow                  # or wandb, trackio: send the logs there, too
totalprop train --config runs/NAME --seed 1            # the settings of a run, with another seed
totalprop train --resume runs/NAME                     # continue after a kill or Ctrl-C
torchrun --nproc-per-node 2 -m totalprop train dreamer # one agent learned by two processes
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from totalprop.agents import AGENTS
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.evaluation import Evaluation
from totalprop.agents.core.processes import ALONE, Processes
from totalprop.agents.core.spaces import UnsupportedSpaceError
from totalprop.agents.persistence.checkpoint import Checkpoints, Stateful, TrainingStopped
from totalprop.agents.persistence.safe_file import in_one_line, write_text
from totalprop.scripts.commands import train_usage
from totalprop.scripts.run import trackers
from totalprop.scripts.run.arguments import parse, parse_resume
from totalprop.scripts.run.environments import registered_id
from totalprop.scripts.run.errors import UsageError, UserError
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.interruption import locked, stopping_on_signals
from totalprop.scripts.run.job import Job, RunOptions, naming_flags
from totalprop.scripts.run.log import make_logger
from totalprop.scripts.run.normalisation import save_agent
from totalprop.scripts.run.offline import dataset_of, environments, with_environment
from totalprop.scripts.run.progress import Pace, said
from totalprop.scripts.run.report import report
from totalprop.scripts.run.threads import owned_cores
from totalprop.scripts.run.torchrun import (
    check_agent,
    check_size,
    checkpoint_folder,
    load_together,
    processes_of_torchrun,
    resume_command,
)

if TYPE_CHECKING:
    from minari import MinariDataset


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. An error is printed as one line, without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    is_resumed = any(argument.partition("=")[0] == "--resume" for argument in arguments)
    resumed = parse_resume(arguments) if is_resumed else None
    job = None if resumed else parse(arguments, usage=train_usage())
    command = shlex.join(["totalprop", "train", *arguments])
    try:
        with processes_of_torchrun() as processes:
            if resumed:
                resume(*resumed, processes=processes, command=command)
            elif job:
                train(job, processes, command=command)
    except Exception as error:
        if os.environ.get("TOTALPROP_TRACEBACK"):
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        is_usage = isinstance(error, UsageError | UnsupportedSpaceError)
        raise SystemExit(2 if is_usage else 1) from None
    except KeyboardInterrupt:
        print("\nstopped; --resume RUN continues one that has a checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


class Stopwatch:
    """Measures the training time over all processes of a run; saved in its checkpoints."""

    def __init__(self) -> None:
        self._before, self._started = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._before + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint saves."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._before, self._started = float(state["seconds"]), time.perf_counter()


def sentence(error: Exception) -> str:
    """Describe an error, and what to do about it, in one line."""
    text = in_one_line(error)
    if isinstance(error, UserError | ValueError | AssertionError | FloatingPointError | OSError):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of GPU memory ({text[:150]}); reduce --batch-size, --sequence-length or "
            "--imagination-starts, or use --storage ram, and continue with --resume"
        )
    if isinstance(error, MemoryError):
        return f"out of memory: {text}; reduce --buffer-size or --dynamics-buffer-size"
    if "can't allocate memory" in text:  # PyTorch, on the CPU
        asked = re.search(r"you tried to allocate (\d+) bytes", text)
        size = f" for {int(asked[1]) / 2**30:,.1f} GiB at once" if asked else ""
        return (
            f"out of memory{size}: a size of the run is too large, of --batch-size, --horizon, "
            "--n-particles or the networks; start it again with a smaller one"
        )
    # Most likely raised by the environment; its author needs the traceback.
    return (
        f"{type(error).__name__}: {text}; TOTALPROP_TRACEBACK=1 shows the traceback, and --resume "
        "RUN continues one that has a checkpoint"
    )


def train(job: Job, processes: Processes = ALONE, *, command: str = "") -> RunFolder:
    """Make environment, agent and run folder, then train and report.

    Args:
        job: what to train.
        processes: that train it together; the first one writes the folder.
        command: what was typed, for the tracker.
    Returns:
        The run folder.
    """
    options, arguments = job.options, job.arguments
    options.check()
    check_agent(job.agent, processes)
    check_device(arguments["device"])
    trackers.check(options.track)
    if not options.threads:  # recorded, since bits depend on it
        number = owned_cores()
        if os.environ.get("OMP_NUM_THREADS"):
            number = min(number, torch.get_num_threads())
        options = dataclasses.replace(options, threads=number)
        job = dataclasses.replace(job, options=options)
    set_up_torch(options)
    say_what_surprises(job)
    # Whatever may fail is made before the folder, so that a typo leaves nothing behind.
    dataset = dataset_of(job, processes)
    if dataset is not None:
        job = with_environment(job, dataset)
        options = job.options
    env, eval_env = environments(job, dataset)
    algorithm = job.algorithm(env, processes, dataset)
    method = "_".join(str(arguments[name]) for name in AGENTS[job.agent].named_by)
    task, where = registered_id(options.env_id).rpartition("/")[2], options.env_id
    if dataset is not None:
        task = dataset.id.replace("/", "-")
        where = f"{dataset.total_steps:,} steps of {dataset.id}"
        where += f", evaluated in {options.env_id}" if eval_env else ""
    name = options.name or f"{job.agent}_{task}_{method}_seed{arguments['seed']}"
    folder = None
    if processes.rank == 0:
        folder = RunFolder.create(options.runs, name, job.config())
    folder = processes.objects(folder)[0]
    assert folder is not None
    print(f"Training {job.agent} ({method}) on {where}, writing to {folder.path}")
    try:
        with locked(folder.path) if processes.rank == 0 else contextlib.nullcontext():
            tracker = trackers.start(job, folder, command) if processes.rank == 0 else None
            with tracker or contextlib.nullcontext():
                learn(job, folder, algorithm, eval_env, processes=processes, tracker=tracker)
    except (MemoryError, trackers.TrackingError):
        is_begun = algorithm.num_timesteps > 0 or processes.size > 1
        if not is_begun:  # `learn` could not allocate the replay, say: nothing to resume
            shutil.rmtree(folder.path, ignore_errors=True)
        raise
    return folder


def check_device(device: str) -> None:
    """Raise a UserError if PyTorch cannot use the device."""
    try:
        torch.empty(0, device=None if device == "auto" else device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(
            f"--device must be auto, cpu or a device that PyTorch sees, got '{device}' ({reason})"
        ) from None


def say_what_surprises(job: Job) -> None:
    """Print which flags will have no effect, or an effect other than they say."""
    device = get_device(job.arguments["device"]).type
    if job.arguments.get("cuda_graph") and device != "cuda":
        print(f"--cuda-graph has no effect on {device}: it needs a CUDA device", file=sys.stderr)
    steps, every = job.options.total_timesteps, job.options.eval_every
    starts = max(job.arguments.get(name) or 0 for name in ("learning_starts", "n_steps"))
    if every and every < starts and not job.options.offline:  # no policy is new before
        print(
            f"the first evaluation is after about {min(starts, steps)} steps, the first that are "
            f"learned from, not after --eval-every {every}",
            file=sys.stderr,
        )


def resume(
    path: Path, total_timesteps: int | None = None, imports: Sequence[str] = (),
    *, processes: Processes = ALONE, command: str = "",
) -> RunFolder:  # fmt: skip
    """Resume a run from its last checkpoint.

    Args:
        path: the run folder.
        total_timesteps: steps at which to stop, to extend the run; None for its own number.
        imports: modules that the run's environment may import.
        processes: that train it together, as many as before.
        command: what was typed, for the tracker.
    Returns:
        The run folder.
    Raises:
        UserError: the run is finished, `total_timesteps` is less than its own number, or there
            were more or fewer processes.
    """
    folder = RunFolder.open(path, imports=imports)
    job = Job.read(folder)
    check_agent(job.agent, processes)
    check_size(folder, processes)
    check_device(job.arguments["device"])
    own = job.options.total_timesteps
    total_timesteps = own if total_timesteps is None else total_timesteps
    with locked(folder.path) if processes.rank == 0 else contextlib.nullcontext():
        if processes.rank == 0:
            folder.sweep()
        if folder.summary.exists() and total_timesteps <= own:
            raise UserError(
                f"{folder.path} is finished ({own} steps); to extend it, pass a larger "
                "--total-timesteps"
            )
        if total_timesteps < own:
            raise UserError(
                f"{folder.path} is a run of {own} steps, but --total-timesteps is "
                f"{total_timesteps}; pass more to extend the run, or omit it"
            )
        checkpoints = Checkpoints(checkpoint_folder(folder, processes.rank))
        if folder.summary.exists() and not checkpoints.paths():
            raise UserError(
                f"{folder.path} is finished and its checkpoints are gone: it would be trained from "
                "the beginning, and its model.zip overwritten; train a new run, or load the model "
                "in Python and call its learn"
            )
        if total_timesteps > own:
            options = dataclasses.replace(job.options, total_timesteps=total_timesteps)
            job = dataclasses.replace(job, options=options)
        set_up_torch(job.options)
        dataset = dataset_of(job, processes)
        env, eval_env = environments(job, dataset)
        tracker = trackers.resume(job, folder, command) if processes.rank == 0 else None
        with tracker or contextlib.nullcontext():
            learn(
                job, folder, None, eval_env, env,
                processes=processes, dataset=dataset, tracker=tracker,
            )  # fmt: skip
    return folder


def set_up_torch(options: RunOptions) -> None:
    """Set the number of CPU threads, and allow TF32 (10 bits of mantissa) for GPU products."""
    if options.threads:  # 0 in runs of version 0.1, which used PyTorch's own number
        torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = True


def close_bars() -> None:
    """Close progress bars, whose threads would otherwise draw on while Python shuts down."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def learn(
    job: Job,
    folder: RunFolder,
    algorithm: Algorithm | None,
    eval_env: VecEnv | None,
    env: VecEnv | None = None,
    *,
    processes: Processes = ALONE,
    dataset: MinariDataset | None = None,
    tracker: trackers.Tracker | None = None,
) -> None:
    """Train to the end with checkpoints, then save the agent and report.

    Args:
        job: what to train.
        folder: the run's folder.
        algorithm: the agent to train; None loads the newest checkpoint.
        eval_env: environment for evaluations, or None for none.
        env: environment of the loaded agent; required if `algorithm` is None.
        processes: that train together. The first one evaluates, logs and reports, and each writes
            checkpoints of its own.
        dataset: of an offline run, for an agent that no checkpoint holds yet.
        tracker: gets what the first one logs.
    """
    options, stopwatch = job.options, Stopwatch()
    evaluation = None if eval_env is None else evaluation_of(job, folder, eval_env)
    place, is_first = checkpoint_folder(folder, processes.rank), processes.rank == 0
    also: dict[str, Stateful] = {}
    if is_first:
        also = {"stopwatch": stopwatch}
        if evaluation is not None:
            also["evaluation"] = evaluation
    else:
        place.mkdir(parents=True, exist_ok=True)  # so that a resumed run knows how many there were
    checkpoints = Checkpoints(
        place, every_seconds=options.checkpoint_seconds, also=also, agree=processes.any
    )
    if algorithm is None:
        assert env is not None
        device = processes.device(job.arguments["device"])
        cls = AGENTS[job.agent].cls
        algorithm = load_together(checkpoints, cls, env, device, processes)
        algorithm = algorithm or job.algorithm(env, processes, dataset)
        print(f"Resuming {folder.path} after {algorithm.num_timesteps} steps")
    logger, is_drawing = Logger(None, []), is_first and (options.tensorboard or tracker is not None)
    if is_first:
        logger, tables = make_logger(
            folder.path, tensorboard=options.tensorboard, first_step=algorithm.num_timesteps,
            further=[] if tracker is None else [tracker],
        )  # fmt: skip
        also |= tables
        if tracker is not None:
            also["tracker"] = tracker
    checkpoints.also = also
    algorithm.set_logger(logger)
    algorithm.tensorboard_log = str(folder.path) if is_drawing else None
    callbacks: list[BaseCallback] = [Pace()] if is_first else []
    if evaluation is not None and is_first:
        callbacks.append(evaluation)
    if is_drawing:
        for name, pictures in AGENTS[job.agent].callbacks(options.total_timesteps).items():
            callbacks.append(pictures)
            also[name] = cast(Stateful, pictures)
    callbacks.append(checkpoints)
    checkpoints.restore(algorithm)
    is_resumed = env is not None and is_first
    if is_resumed and Job.read(folder) != job:  # it is extended, and could be restored
        folder.summary.unlink(missing_ok=True)  # first: a kill in between leaves it unfinished
        write_text(folder.config, job.config())
    if algorithm.n_cut_episodes:
        print(
            f"{algorithm.n_cut_episodes} running episode(s) could not be restored and were cut: "
            f"{options.env_id} does not expose its state (see envs.rewind)"
        )
    learn_on(algorithm, job, folder, callbacks, checkpoints, n_processes=processes.size)
    if not is_first:
        return
    if algorithm._n_updates == 0:
        print(
            f"nothing was learned: no update was made in {algorithm.num_timesteps:,} steps; pass a "
            "larger --total-timesteps, or start to learn earlier (--help says when it does)",
            file=sys.stderr,
        )
    save_agent(algorithm, folder.model, folder.vec_normalize)
    report(algorithm, folder, evaluation, options, job.env_args, stopwatch.seconds)


def evaluation_of(job: Job, folder: RunFolder, eval_env: VecEnv) -> Evaluation:
    """The callback that evaluates a run, and keeps its best agent in the folder."""
    options = job.options

    def keep(agent: BaseAlgorithm) -> None:
        save_agent(agent, folder.best_model, folder.best_vec_normalize)

    return Evaluation(
        eval_env,
        n_episodes=options.eval_episodes,
        every=options.eval_every,
        max_steps=options.eval_max_steps,
        path=folder.evaluations,
        verbose=1,
        quantity=AGENTS[job.agent].quantity,
        unit="updates" if options.offline else "real steps",
        on_new_best=keep,
    )


def learn_on(
    algorithm: Algorithm, job: Job, folder: RunFolder, callbacks: list[BaseCallback],
    checkpoints: Checkpoints, *, n_processes: int,
) -> None:  # fmt: skip
    """Make the steps that are left. A signal writes a checkpoint and exits with a sentence."""
    options = job.options
    remaining = options.total_timesteps - algorithm.num_timesteps
    if remaining <= 0 and algorithm.num_timesteps:
        print(f"Nothing is left to do: {algorithm.num_timesteps} steps were made.")
    is_drawn = options.progress and sys.stdout.isatty()
    with stopping_on_signals(checkpoints) as signals, contextlib.ExitStack() as stack:
        if not is_drawn:

            def progress() -> str:
                steps = f"{algorithm.num_timesteps} of {options.total_timesteps} steps"
                return f"{steps}; {algorithm.phase}" if algorithm.phase else steps

            stack.enter_context(said(progress))
        try:
            if remaining > 0:
                name = "learn_offline" if options.offline else "learn"
                with naming_flags("total_timesteps", *job.arguments, *job.policy_kwargs):
                    getattr(algorithm, name)(
                        remaining,
                        callback=callbacks,
                        progress_bar=is_drawn,
                        reset_num_timesteps=False,
                    )
        except TrainingStopped:
            close_bars()  # above the sentence, which is the last word
            print(
                f"stopped after {checkpoints.newest_step()} of {options.total_timesteps} steps; "
                f"continue with: {resume_command(folder, n_processes)}",
                file=sys.stderr,
            )
            raise SystemExit(128 + (signals or [signal.SIGTERM])[0]) from None
        finally:
            close_bars()


if __name__ == "__main__":
    main()
