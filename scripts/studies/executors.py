"""Where the runs of a sweep are trained: threads of this process, Ray, or Slurm.

A run is `totalprop train`, or `train --resume`, in a process of its own, and its folder is on
storage that all machines share. An executor starts these processes; whatever it loses, the next
attempt resumes, and the result has the same bits. Nothing here loads PyTorch, since every worker of
Ray imports this module.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import importlib.util
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from totalprop.agents.persistence.safe_file import in_one_line
from totalprop.scripts.run.errors import UserError, sigterm_stops
from totalprop.scripts.run.threads import owned_cores

ATTEMPTS = 10  # at a run whose process is killed, each from the last checkpoint
OBJECT_STORE = 80 * 2**20  # bytes, about the least that Ray takes; results are booleans
TIME_LIMIT = 24 * 60  # min of a Slurm job, if the user names none
REQUEUES = 1000  # of a Slurm job at its time limit
FOREVER = 1e9  # s; with a timeout, `subprocess.run` wakes now and then, as Ray's cancel needs


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run of a sweep: called, it trains the run to its end, from its last checkpoint on.

    Attributes:
        name: of the run's folder, and of its log beside it.
        runs: folder of the runs.
        arguments: of `totalprop train`, the agent first.
        working_directory: where `runs` and files that the arguments name are relative to.
    """

    name: str
    runs: str
    arguments: tuple[str, ...]
    working_directory: str

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.working_directory, self.runs, self.name)

    @property
    def log(self) -> Path:
        """The run's output."""
        return self.folder.with_name(f"{self.name}.log")

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        return (self.folder / "summary.json").exists()

    @property
    def is_running(self) -> bool:
        """Whether a process trains it, on any machine that shares the folder."""
        try:
            with open(self.log, "rb") as log:
                fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def __call__(self) -> bool:
        """Train, or wait for the process that does; return whether the run is finished."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a") as log:
            # The training process inherits the lock with its output, and so keeps it when whoever
            # started it is killed: a second process waits here instead of training the same run.
            fcntl.flock(log, fcntl.LOCK_EX)
            for _ in range(ATTEMPTS):
                if self.is_finished:
                    return True
                code = subprocess.run(
                    self._command(), stdout=log, stderr=log, cwd=self.working_directory,
                    env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=FOREVER,
                ).returncode  # fmt: skip
                was_killed = code < 0 or code == 128 + signal.SIGTERM
                if not was_killed or code == -signal.SIGINT:  # Ctrl-C ends the sweep, too
                    return code == 0
        return False

    def checkpoint(self) -> Any:
        """What Slurm is to run in place of this job when it is preempted: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "totalprop.scripts.train"]
        config = self.folder / "config.json"
        if not config.exists():
            agent, *flags = self.arguments
            command += [agent, "--runs", self.runs, "--name", self.name]
            return [*command, "--threads", "1", "--no-progress", "--no-tensorboard", *flags]
        module, colon, _ = json.loads(config.read_text())["env_id"].partition(":")
        command += ["--resume", str(Path(self.runs, self.name))]
        return [*command, "--import", module] if colon else command


# Trains runs, so many at a time at most, and yields each with whether it is finished. Those of
# threads and of Ray ask for a run when they can start it, so that it may depend on earlier ones.
Executor = Callable[[Iterable[Trial], int], Iterator[tuple[Trial, bool]]]


def chosen(
    *,
    address: str = "",
    cpus: float | None = None,
    gpus: float | None = None,
    slurm: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Executor:
    """The executor that flags ask for; without any, Ray where it is installed, else threads.

    Args:
        address: of a cluster of Ray.
        cpus: cores that a run occupies.
        gpus: GPUs that a run occupies.
        slurm: "slurm", or a stand-in for it; None for Ray or threads.
        parameters: of Slurm's jobs.
    Raises:
        UserError: what they ask for is not installed.
    """
    needed, extra = ("submitit", "slurm") if slurm else ("ray", "ray")
    spec = importlib.util.find_spec(needed)
    is_there = spec is not None and spec.origin is not None  # not a folder that is called ray
    if not is_there and (slurm or address or cpus or gpus):
        flags = "--slurm needs" if slurm else "--address, --cpus-per-run and --gpus-per-run need"
        raise UserError(f"{flags} {needed}: pip install 'totalprop[{extra}]'")
    if slurm:
        return functools.partial(
            on_slurm, cluster=slurm, cpus=cpus, gpus=gpus, parameters=parameters
        )
    if is_there:
        return functools.partial(on_ray, address=address, cpus=cpus, gpus=gpus)
    return in_threads


def in_threads(trials: Iterable[Trial], jobs: int) -> Iterator[tuple[Trial, bool]]:
    """Start the runs from threads of this process."""
    waiting, running = iter(trials), dict[Future[bool], Trial]()
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            room = jobs - len(running)
            running.update((pool.submit(t), t) for t in itertools.islice(waiting, room))
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()


def on_ray(
    trials: Iterable[Trial],
    jobs: int,
    *,
    address: str = "",
    cpus: float | None = None,
    gpus: float | None = None,
) -> Iterator[tuple[Trial, bool]]:
    """Start the runs from workers of Ray, which are replaced where they die.

    Args:
        trials: the runs.
        jobs: runs at the same time.
        address: a cluster's; "" for one of this machine, which is started and stopped.
        cpus: cores that a run occupies, may be a fraction; None for 1 on a cluster, and for as
            many runs as `jobs` says on this machine.
        gpus: GPUs that a run occupies, likewise; None leaves all of them visible to each run.
    Raises:
        UserError: there is no cluster, or none of its machines has as much.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no run loses its GPUs
    os.environ.setdefault("RAY_worker_niceness", "0")  # a run is as fast as from threads
    import ray

    local: dict[str, Any] = {
        "num_cpus": jobs if cpus is None else owned_cores(),
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE,
    }
    running: dict[Any, Trial] = {}
    try:
        ray.init(
            address or "local", log_to_driver=False, logging_level=logging.ERROR,
            **({} if address else local),
        )  # fmt: skip
        for flag, kind, number in (("cpus", "CPU", cpus), ("gpus", "GPU", gpus)):
            most = max(node["Resources"].get(kind, 0) for node in ray.nodes())
            if number is not None and number > most:
                raise UserError(
                    f"--{flag}-per-run must be at most {most:g}, what one machine has, got "
                    f"{number:g}"
                )
        train = ray.remote(
            num_cpus=1 if cpus is None else cpus, num_gpus=gpus or 0, max_retries=-1
        )(_train)
        waiting = iter(trials)
        running.update((train.remote(trial), trial) for trial in itertools.islice(waiting, jobs))
        with sigterm_stops():  # Ray's own handler prints a dump and exits
            while running:
                (done, *_), _ = ray.wait(list(running))
                yield running.pop(done), ray.get(done)
                more = itertools.islice(waiting, 1)
                running.update((train.remote(trial), trial) for trial in more)
    except ConnectionError as error:
        raise UserError(f"no cluster of Ray answers at {address} ({error})") from error
    finally:
        for task in running:
            ray.cancel(task)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=10)
        ray.shutdown()


def _train(trial: Trial) -> bool:
    return trial()


def on_slurm(
    trials: Iterable[Trial],
    jobs: int,
    *,
    cluster: str = "slurm",
    cpus: float | None = None,
    gpus: float | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Trial, bool]]:
    """Submit the runs as an array of Slurm's jobs, and wait for them.

    A job that is preempted, or at its time limit, is requeued and resumes its run.

    Args:
        trials: the runs.
        jobs: jobs that run at the same time.
        cluster: "slurm", or "local" for submitit's stand-in: processes of this machine, all at
            once.
        cpus: cores of a job; None for 1.
        gpus: GPUs of a job; None for 0.
        parameters: further ones of submitit's executor, such as slurm_partition.
    Raises:
        UserError: there is no Slurm here, or a parameter is not one.
    """
    import submitit

    trials = list(trials)
    wanted: dict[str, Any] = {
        "name": "totalprop", "timeout_min": TIME_LIMIT, "slurm_array_parallelism": jobs,
        "cpus_per_task": int(cpus or 1),
    }  # fmt: skip
    if gpus:
        wanted["gpus_per_node"] = int(gpus)
    try:
        executor = submitit.AutoExecutor(
            trials[0].folder.with_name("slurm"), cluster=cluster, slurm_max_num_timeout=REQUEUES
        )
        executor.update_parameters(**{**wanted, **(parameters or {})})
        with executor.batch():
            submitted = [executor.submit(trial) for trial in trials]
    except (RuntimeError, NameError, ValueError, AssertionError) as error:
        raise UserError(f"--slurm: {in_one_line(error)}") from error
    number = {job.job_id: i for i, job in enumerate(submitted)}
    poll = 10.0 if cluster == "slurm" else 0.5
    for job in submitit.helpers.as_completed(submitted, poll_frequency=poll):
        trial = trials[number[job.job_id]]
        yield trial, trial.is_finished
