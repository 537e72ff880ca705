"""Kill workers, runs and the driver of a sweep on Ray, and verify that it ends in the same bits.

    totalprop kill-sweep --out results/reliability

Two sweeps of the same runs are trained with two runs at a time: one undisturbed; of the other,
processes get SIGKILL at random moments, and its command is given again where it was itself killed.
Every run is compared as by `totalprop kill-test`. Exit code 1 if anything differs, or if a run was
trained to its end twice.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from totalprop.agents import AGENTS
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.commands import parser_of
from totalprop.scripts.reliability.kill_test import differences
from totalprop.scripts.run.errors import UserError, ending_with_a_sentence
from totalprop.scripts.run.program import current_commit
from totalprop.scripts.studies.executors import chosen, in_threads

SETTINGS = {"eval_episodes": 2, "checkpoint_seconds": 0}
AT_ONCE = 2  # runs


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parser_of("kill-sweep").parse_args(arguments)
    with ending_with_a_sentence(), tempfile.TemporaryDirectory() as folder:
        if chosen() is in_threads:
            raise UserError("kill-sweep needs Ray: pip install 'totalprop[ray]'")
        kills = {"worker": options.workers, "run": options.runs, "driver": options.drivers}
        record = kill_sweep(options.agent, Path(folder), options.trials, kills, options.seed)
    print(json.dumps(record))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {"commit": current_commit(), "seed": options.seed, **record}
        write_text(options.out / "kill_sweep.json", json.dumps(report, indent=1) + "\n")
    if record["differences"] or record["trained_twice"]:
        raise SystemExit(1)


def kill_sweep(
    agent: str, folder: Path, trials: int, kills: dict[str, int], seed: int
) -> dict[str, Any]:
    """Train a sweep once undisturbed and once with kills, and compare the results.

    Args:
        agent: name in `AGENTS`, whose `small_run` is trained.
        folder: folder for both sweeps.
        trials: runs of a sweep, of as many seeds.
        kills: processes to kill: workers of Ray, runs, and the sweep's own.
        seed: seed of the moments.
    Returns:
        A record of the kills, the differences, and the runs that were trained to their end twice.
    """
    moments = random.Random(seed)
    grid = {"agent": agent, "seed": list(range(trials)), **AGENTS[agent].small_run, **SETTINGS}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    started = time.perf_counter()
    _wait(_start(folder, "quiet"))
    life = time.perf_counter() - started
    victims = [kind for kind, number in kills.items() for _ in range(number)]
    moments.shuffle(victims)
    killed: list[tuple[str, int]] = []
    started, driver = time.perf_counter(), _start(folder, "killed")
    for kind in victims:
        running = _wait_for_runs(driver, folder / "killed")
        time.sleep(moments.random() * life / (2 * len(victims)))
        running = _wait_for_runs(driver, folder / "killed")
        if not running:
            break
        run, worker = moments.choice(running)
        victim = {"driver": driver.pid, "worker": worker, "run": run}[kind]
        if victim is None:
            continue
        os.kill(victim, signal.SIGKILL)
        killed.append((kind, len(list(folder.glob("killed/runs/*/summary.json")))))
        if kind == "driver":
            driver.wait()
            driver = _start(folder, "killed")
    _wait(driver)
    names = {f"{agent}_seed{i}" for i in grid["seed"]}
    runs = folder / "killed" / "runs"
    logs = {name: (runs / f"{name}.log").read_text() for name in names}
    return {
        "agent": agent,
        "trials": trials,
        "steps": grid["total_timesteps"],
        "kinds_of_kills_and_finished_runs": killed,
        "seconds": [round(life, 1), round(time.perf_counter() - started, 1)],
        "trained_twice": sorted(
            {name for name, log in logs.items() if log.count("Results in ") > 1}
            | {path.name for path in runs.glob("*/") if path.name not in names}
        ),
        "differences": [
            f"{name}: {each}"
            for name in sorted(names)
            for each in differences(agent, folder / "quiet" / "runs" / name, runs / name)
        ],
    }


def _start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    """Start a sweep, or start it again."""
    command = [sys.executable, "-m", "totalprop", "sweep", "--grid", str(folder / "grid.yaml")]
    command += ["--out", str(folder / name), "--runs", str(folder / name / "runs")]
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen([*command, "--jobs", str(AT_ONCE)], stdout=log, stderr=log)


def _wait(driver: subprocess.Popen[bytes]) -> None:
    if code := driver.wait():
        raise RuntimeError(f"a sweep ended with exit code {code}")


def _wait_for_runs(driver: subprocess.Popen[bytes], sweep: Path) -> list[tuple[int, int | None]]:
    """The runs that are trained, once there are some; [] at the sweep's end.

    Returns:
        The training process and its worker of Ray, None for an orphan, of each.
    """
    while driver.poll() is None:
        listing = subprocess.run(
            ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        rows = [line.split(maxsplit=2) for line in listing.splitlines()]
        workers = {int(row[0]) for row in rows if row[-1].startswith("ray::")}
        found = [
            (int(row[0]), int(row[1]) if int(row[1]) in workers else None)
            for row in rows
            if "totalprop.scripts.train" in row[-1] and f"{sweep}/" in row[-1]
        ]
        if found:
            return found
        time.sleep(0.1)
    return []


if __name__ == "__main__":
    main()
