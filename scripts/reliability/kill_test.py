"""Kill and resume a run repeatedly, and verify that it ends in the same bits as an undisturbed run.

    totalprop kill-test --agents pipps dreamer daappo --kills 20 --out results/reliability

Processes get SIGKILL at random moments, and while they write checkpoints (before a file is synced).
The test compares all parameters, optimiser states, counters, generators, environments and replays
in the last checkpoint, the model file, evaluations.json, k.csv, and progress.csv except for its
times. Exit code 1 if anything differs.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

from totalprop.agents import AGENTS
from totalprop.agents.persistence import safe_file
from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.commands import parser_of
from totalprop.scripts.reliability.preload import PRELOAD
from totalprop.scripts.run.entry_runs import command
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.program import current_commit

COMMON = ["--threads", "1", "--no-progress", "--no-tensorboard", "--checkpoint-seconds", "0"]
COMMON += ["--eval-episodes", "2"]
RING = 200  # rows of a ring that are compared: the size of the smallest in a `small_run`
WHILE_TRAINING = 0.8  # share of the kills that come after the first checkpoint of a process
# Keys whose values depend on the clock, or on the step at which a process started.
TIMES = {
    "start_time", "stopwatch", "t", "_num_timesteps_at_start", "time/fps", "time/time_elapsed",
    "time/updates_per_second",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of("kill-test")
    options = parser.parse_args(arguments)
    records = []
    for agent in options.agents:
        with tempfile.TemporaryDirectory() as folder:
            record = kill_test(
                agent, Path(folder), options.kills, options.kills_in_checkpoints, options.seed,
                length=AGENTS[agent].kill_test_factor,
            )  # fmt: skip
        records.append(record)
        print(json.dumps(record), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"commit": current_commit(), "seed": options.seed, "agents": records}
        write_text(options.out / "kill_test.json", json.dumps(report, indent=1) + "\n")
    if any(record["differences"] for record in records):
        raise SystemExit(1)


def small_run(agent: str, **changes: Any) -> list[str]:
    """Arguments of `totalprop train` for the agent's small run."""
    return command(agent, {**AGENTS[agent].small_run, **changes})


def kill_test(
    agent: str,
    folder: Path,
    kills: int,
    kills_in_checkpoints: int,
    seed: int,
    *,
    length: float = 1,
) -> dict[str, Any]:
    """Train an agent once undisturbed and once with kills, and compare the results.

    Args:
        agent: name in `AGENTS`.
        folder: folder for both runs.
        kills: kills at random moments.
        kills_in_checkpoints: kills while a checkpoint is written.
        seed: seed of the moments.
        length: factor on the number of steps.
    Returns:
        A record of the kills and of the differences.
    """
    moments = random.Random(seed)
    steps = round(length * AGENTS[agent].small_run["total_timesteps"])
    arguments = [*small_run(agent, total_timesteps=steps), *COMMON, "--runs", str(folder)]
    quiet, killed = folder / "quiet", folder / "killed"
    process = _start([*arguments, "--name", "quiet"])
    _wait_for_checkpoint(process, quiet, -1)
    started = time.perf_counter()
    _wait(process)
    life = time.perf_counter() - started
    plan = ["moment"] * kills + ["checkpoint"] * kills_in_checkpoints
    moments.shuffle(plan)
    deaths: list[tuple[str, int]] = []

    def begin_or_resume() -> list[str]:
        if (killed / "config.json").exists():
            return ["--resume", str(killed)]
        return [*arguments, "--name", "killed"]

    for kind in plan:
        if (killed / "summary.json").exists():
            break
        process = _start(begin_or_resume(), moments.randrange(2, 12) if kind == "checkpoint" else 0)
        if kind == "moment":
            if moments.random() < WHILE_TRAINING:  # else possibly while it starts or resumes
                _wait_for_checkpoint(process, killed, _newest(killed))
            process.join(moments.random() * life / len(plan))
        else:
            process.join()
        if process.is_alive():
            process.kill()
            process.join()
        if process.exitcode == -signal.SIGKILL:
            deaths.append((kind, _newest(killed)))
        elif process.exitcode:
            raise RuntimeError(f"a run ended with exit code {process.exitcode}")
    if not (killed / "summary.json").exists():
        _wait(_start(begin_or_resume()))
    return {
        "agent": agent,
        "steps": steps,
        "kills": len(deaths),
        "kinds_and_newest_checkpoints": deaths,
        "seconds_of_the_quiet_run": round(life, 1),
        "differences": differences(agent, quiet, killed),
    }


def _newest(run: Path) -> int:
    """Number of steps of a run's newest checkpoint, or -1 if there is none."""
    return Checkpoints(RunFolder(run).checkpoints).newest_step()


def _wait_for_checkpoint(process: BaseProcess, run: Path, after: int) -> None:
    while process.is_alive() and _newest(run) <= after:
        time.sleep(0.01)


def _start(arguments: list[str], die_at_sync: int = 0) -> BaseProcess:
    """Train in a separate process, forked from a server that has imported everything.

    Args:
        arguments: the command line of `totalprop train`.
        die_at_sync: the fsync at which the process kills itself; 0 for never.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_train, args=(arguments, die_at_sync))
    process.start()
    return process


def _train(arguments: list[str], die_at_sync: int) -> None:
    from totalprop.scripts import train

    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 1)
    if die_at_sync:
        os.fsync = _dying(os.fsync, die_at_sync)  # type: ignore[assignment]
    train.main(arguments)


def _dying(sync: Callable[[int], None], at: int) -> Callable[[int], None]:
    """Wrap fsync so that call number `at` kills the process before anything is synced."""
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    return fsync


def _wait(process: BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a run ended with exit code {process.exitcode}")


# --------------------------------------------------------------------------------------------
# comparison
# --------------------------------------------------------------------------------------------


def differences(agent: str, first: Path, second: Path) -> list[str]:
    """List where the final states of two runs differ in any bit.

    Args:
        agent: name of the agent.
        first: folder of one run.
        second: folder of the other run.
    """
    ends = []
    for path in (first, second):
        folder = RunFolder(path)
        newest = Checkpoints(folder.checkpoints).paths()[-1]
        name = AGENTS[agent].cls.__name__
        state = safe_file.read(newest, f"{name} checkpoint")
        state["training"] |= _joined(state["training"], folder.checkpoints)
        state.pop("files")
        # Its attributes tell how long the run was to be then, which may have been extended.
        best = safe_file.read(folder.best_model, f"{name} model")["parameters"]
        ends.append(
            {
                "checkpoint": state,
                "model": safe_file.read(folder.model, f"{name} model"),
                "best model": best,
                "evaluations": json.loads(folder.evaluations.read_text()),
                "progress": _rows(path / "progress.csv"),
                "weights": _rows(path / "k.csv"),
            }
        )
    found: list[str] = []
    _compare(ends[0], ends[1], "", found)
    return found


def _joined(training: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Join the segments of each ring into arrays, since the cuts depend on checkpoint times."""

    def ring(segments: list[Any]) -> dict[str, Any]:
        parts = [safe_file.read(folder / name, "replay segment") for *_, name in segments]
        oldest = max(0, segments[-1][1] - RING)
        whole = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        first = segments[0][0]
        return {key: value[max(0, oldest - first) :] for key, value in whole.items()}

    joined: dict[str, Any] = {}
    if training.get("replay"):
        joined["replay"] = [ring(segments) for segments in training["replay"]]
    if training.get("transitions"):
        joined["transitions"] = ring(training["transitions"])
    return joined


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():  # not every agent has weights
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _compare(a: Any, b: Any, where: str, found: list[str]) -> None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            if key in TIMES:
                continue
            if key not in a or key not in b:
                found.append(f"{where}/{key} is in one only")
            else:
                _compare(a[key], b[key], f"{where}/{key}", found)
        return
    if hasattr(a, "__len__") and hasattr(a, "__iter__") and not isinstance(a, str | torch.Tensor):
        if isinstance(a, np.ndarray):
            same = a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
            if not same:
                found.append(where)
        elif type(a) is not type(b) or len(a) != len(b):
            found.append(f"{where}: {len(a)} and {len(b)} entries")
        else:
            for i, (x, y) in enumerate(zip(a, b)):
                _compare(x, y, f"{where}/{i}", found)
        return
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            found.append(where)
    elif isinstance(a, safe_file.NotInFile):
        pass
    elif isinstance(a, FloatSchedule | LinearSchedule) and type(a) is type(b):
        _compare(vars(a), vars(b), where, found)
    elif a != b and not (a != a and b != b):
        found.append(f"{where}: {a!r} and {b!r}")


if __name__ == "__main__":
    main()
