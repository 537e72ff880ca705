"""Train each agent for an hour, and monitor its memory and its open files.

    totalprop soak --minutes 60 --out results/reliability
    totalprop soak --agents dreamer --minutes 5

All agents train at the same time with `totalprop train`, one thread each, with evaluations,
TensorBoard and a checkpoint every minute, and are stopped by SIGTERM. The first third of the time
is warm-up. After it, a line fitted to the resident memory must not rise by more than 2 %, and the
usual number of open files must not change. Exit code 1 if either does. Linux only.
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from totalprop.agents import AGENTS
from totalprop.agents.core import figures
from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.entry_runs import command
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.program import current_commit

WARM_UP = 1 / 3  # share of the time
MOST_GROWTH = 0.02  # of the memory, over the remaining time
MEGABYTE = 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of("soak")
    options = parser.parse_args(arguments)
    seconds = 60 * options.minutes
    if not (0 < 8 * options.every <= seconds * (1 - WARM_UP) < math.inf):
        parser.error("--minutes must leave at least 8 samples after the warm-up (its first third)")
    with tempfile.TemporaryDirectory() as folder:
        records = soak(options.agents, Path(folder), seconds, options.every)
    for record in records:
        print(sentence(record))
    if options.out is not None:
        path = options.out / "soak.json"
        before = json.loads(path.read_text()) if path.exists() else []  # other agents' records
        everything = {record["agent"]: record for record in [*before, *records]}
        options.out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(list(everything.values())) + "\n")
        figures.save(draw(list(everything.values())), options.out / "soak.png", dpi=120)
        print(f"wrote {path} and soak.png")
    if not all(record["is_flat"] and record["is_constant"] for record in records):
        raise SystemExit(1)


def long_run(agent: str) -> list[str]:
    """Arguments of `totalprop train` for the agent's `long_run`."""
    return command(agent, AGENTS[agent].long_run)


def soak(agents: Sequence[str], folder: Path, seconds: float, every: float) -> list[dict[str, Any]]:
    """Train the agents, sample their memory and open files, stop them, and judge the samples.

    Args:
        agents: names in `AGENTS`.
        folder: folder for the runs.
        seconds: duration.
        every: seconds between samples.
    Returns:
        One record per agent.
    """
    trainings = {agent: _start(agent, folder) for agent in agents}
    samples: dict[str, list[tuple[float, float, int]]] = {agent: [] for agent in agents}
    started = time.monotonic()
    try:
        while (now := time.monotonic() - started) < seconds:
            for agent, process in trainings.items():
                if process.poll() is not None:
                    raise SystemExit(f"error: {agent} ended after {now:.0f} s: see above")
                samples[agent].append((now, *_usage(process.pid)))
            time.sleep(every)
    finally:
        for process in trainings.values():
            process.send_signal(signal.SIGTERM)
        ends = {agent: process.wait() for agent, process in trainings.items()}
    records = []
    for agent in agents:
        if ends[agent] != 128 + signal.SIGTERM:
            raise SystemExit(f"error: {agent} ended with exit code {ends[agent]} on SIGTERM")
        steps = Checkpoints(RunFolder(folder / agent).checkpoints).newest_step()
        text = " ".join(["totalprop train", *long_run(agent)])
        about = {"agent": agent, "command": text, "commit": current_commit(), "steps": steps}
        records.append(about | judge(samples[agent]))
    return records


def judge(samples: Sequence[tuple[float, float, int]]) -> dict[str, Any]:
    """Judge whether memory and open files stay constant after the warm-up.

    Args:
        samples: (seconds, resident MB, open files) of each sample.
    Returns:
        Statistics of the samples, with the verdicts "is_flat" and "is_constant".
    """
    times, memory, files = (np.array(column) for column in zip(*samples))
    later = times >= WARM_UP * times[-1]
    slope = float(np.polyfit(times[later], memory[later], 1)[0])  # MB/s
    level = float(memory[later].mean())
    growth = slope * float(times[-1] - times[later][0]) / level
    quarters = [statistics.mode(part.tolist()) for part in np.array_split(files[later], 4)]
    return {
        "seconds": round(float(times[-1])),
        "megabytes": round(level, 1),
        "megabytes_per_hour": round(3600 * slope, 2),
        "growth": round(growth, 5),
        "open_files": int(quarters[-1]),
        "most_open_files": int(files[later].max()),
        "is_flat": growth <= MOST_GROWTH,
        "is_constant": len(set(quarters)) == 1,
        "samples": [[round(t), round(m, 1), f] for t, m, f in samples],
    }


def sentence(record: dict[str, Any]) -> str:
    """Summarise a record in one line."""
    flat = "flat" if record["is_flat"] else "NOT FLAT"
    constant = "constant" if record["is_constant"] else "NOT CONSTANT"
    return (
        f"{record['agent']}: {record['steps']} steps in {record['seconds']} s, "
        f"{record['megabytes']:.0f} MB ({record['megabytes_per_hour']:+.1f} MB/h, {flat}), "
        f"{record['open_files']} open files ({constant}, at most {record['most_open_files']})"
    )


def draw(records: Sequence[dict[str, Any]]) -> Figure:
    """Plot memory and open files over time."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    memory, files = figure.subplots(1, 2)
    for record in records:
        times, megabytes, counts = zip(*record["samples"])
        minutes = np.array(times) / 60
        memory.plot(minutes, megabytes, label=record["agent"])
        files.plot(minutes, counts, label=record["agent"], drawstyle="steps-post")
    for axes, name in ((memory, "resident memory [MB]"), (files, "open files")):
        axes.set(xlabel="minutes", ylabel=name, ylim=(0, None))
        axes.axvspan(0, WARM_UP * minutes[-1], color="0.93", label="warm-up")
        axes.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    return figure


def _start(agent: str, folder: Path) -> subprocess.Popen[bytes]:
    train = [sys.executable, "-m", "totalprop.scripts.train", *long_run(agent), "--threads", "1"]
    train += ["--no-progress", "--runs", str(folder), "--name", agent]
    return subprocess.Popen(train, stdout=subprocess.DEVNULL)


def _usage(pid: int) -> tuple[float, int]:
    """(resident MB, open files) of a process."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE, len(list((process / "fd").iterdir()))


if __name__ == "__main__":
    main()
