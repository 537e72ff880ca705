r"""Which gradient does a Dreamer need? Train each, at each node, at short and long horizons.

    totalprop study dreamer --out results/dreamer/gradients --seeds 0 1 2
    totalprop study dreamer --out results/dreamer/gradients --seeds 0 1 2 --tasks pendulum
    totalprop study dreamer --out results/dreamer/gradients --seeds 0 1 2 --report-only

Every task x horizon x (blocked or open) x gradient x seed is a `totalprop train` with the preset
`recommended`. "Blocked" is DreamerV1's block of the gradient into the state that an action was
chosen in, "open" is without it. After a kill, the same command goes on; on another machine,
results.json in --out is enough. The report has one number per run, the mean return over the last
third of its evaluations, scaled to 0 for random actions and 1 for the task's best known return. It
shows their interquartile mean and performance profiles, with intervals of a bootstrap over the
seeds of each task (Agarwal et al. 2021).
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from totalprop.agents.core import figures
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.commands import parser_of
from totalprop.scripts.flag_types import split_flags
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder, read_json
from totalprop.scripts.studies.cells import Asked, train_cells
from totalprop.scripts.studies.learning_curves import draw_profile, has_interval
from totalprop.scripts.studies.scores import interval, iqm
from totalprop.scripts.studies.styles import styles_of


class Task(NamedTuple):
    """A task of the study.

    Attributes:
        flags: of `totalprop train`.
        random: return of uniformly random actions, mean of 30 episodes.
        best: the best known return.
    """

    flags: tuple[str, ...]
    random: float
    best: float


def _suite(name: str, steps: int) -> tuple[str, ...]:
    return (
        "--env-id", f"dmc/cartpole-{name}-v0", "--env-arg", "action_repeat=8",
        "--total-timesteps", str(steps),
    )  # fmt: skip


TASKS = {
    "pendulum": Task(
        ("--env-id", "Pendulum-v1", "--total-timesteps", "4000"), random=-1240.0, best=-150.0
    ),
    "balance": Task(_suite("balance", 5000), random=260.0, best=1000.0),
    "swingup": Task(_suite("swingup", 10_000), random=120.0, best=880.0),
}
# DreamerV1's credit, whose gradients are some twenty times larger, and an entropy that fits it.
SUMMED = ("--node", "latent", "--credit", "all", "--entropy-scale", "0.003")
GRADIENTS: dict[str, tuple[str, ...]] = {
    "rp": ("--estimator", "rp", *SUMMED),
    "lr, latent": ("--estimator", "lr", *SUMMED),
    "lr, action": (  # the actor of DreamerV2 and V3
        "--estimator", "lr", "--node", "action", "--credit", "own", "--baseline", "critic",
    ),
    "tpx": ("--estimator", "tpx", *SUMMED),
    "tpg": ("--estimator", "tpg", *SUMMED),
}  # fmt: skip
GATES = {"blocked": "--stop-grad-actor-input", "open": "--no-stop-grad-actor-input"}
UNGATED = {"lr, action"}  # no path bypasses its nodes: blocked and open are one and the same run
# Imagined steps, at any horizon: at 15, from 256 starts.
IMAGINED = 256 * 15


class Cell(NamedTuple):
    """What is compared with its like."""

    task: str
    horizon: int
    gate: str
    gradient: str

    def name(self, seed: int) -> str:
        """Name of a run."""
        gradient = self.gradient.replace(", ", "-")
        gate = "" if self.gradient in UNGATED else f"_{self.gate}"
        return f"{self.task}_h{self.horizon}{gate}_{gradient}_seed{seed}"

    def command(self, seed: int, extra: Sequence[str]) -> list[str]:
        """Arguments of `totalprop train`."""
        gate = "blocked" if self.gradient in UNGATED else self.gate
        return [
            "dreamer", "--preset", "recommended", "--seed", str(seed), *TASKS[self.task].flags,
            "--horizon", str(self.horizon), "--imagination-starts", str(IMAGINED // self.horizon),
            GATES[gate], *GRADIENTS[self.gradient], "--eval-every", "500",
            "--eval-episodes", "5", *extra,
        ]  # fmt: skip


def run_of(row: Mapping[str, Any]) -> tuple[Cell, int]:
    """The run of a row of results.json."""
    return Cell(*(row[field] for field in Cell._fields)), row["seed"]


def parse(arguments: Sequence[str]) -> Asked:
    """Parse the command line; on wrong usage, exit with code 2."""
    own, extra = split_flags(arguments)
    parser = parser_of("study dreamer")
    options = parser.parse_args(own)
    for name, known in (("tasks", TASKS), ("gates", GATES), ("gradients", GRADIENTS)):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name} are {', '.join(known)}, got {', '.join(sorted(unknown))}")
    cells = [
        Cell(*parts)
        for parts in itertools.product(
            options.tasks, options.horizons, options.gates, options.gradients
        )
    ]
    jobs = {c.name(seed): c.command(seed, extra) for seed in options.seeds for c in cells}
    return Asked(options, cells, jobs, flags=extra)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    train_cells(parse(sys.argv[1:] if arguments is None else arguments), run_of, report)


def report(asked: Asked, runs: Path, earlier: Mapping[tuple[Cell, int], dict[str, Any]]) -> None:
    """Write results.json, table.md and profiles.png from the runs that are finished."""
    found = dict(earlier)
    named = {cell.name(seed): row for (cell, seed), row in earlier.items()}
    for cell, seed in itertools.product(asked.cells, asked.options.seeds):
        folder = RunFolder(runs / cell.name(seed))
        if folder.summary.exists():
            steps, returns = folder.read_evaluations()
            means = returns.mean(1)
            found[cell, seed] = {
                **cell._asdict(), "seed": seed, "score": round(score(cell.task, means), 4),
                "timesteps": list(steps), "returns": means.round(2).tolist(),
                "commit": str(read_json(folder.config).get("commit", "unknown")),
            }  # fmt: skip
        elif cell.name(seed) in named:  # maybe of the other gate
            found[cell, seed] = {**named[cell.name(seed)], **cell._asdict()}
    rows = list(found.values())
    if not rows:
        raise UserError(f"no finished run in {runs}; see the .log files there")
    out = asked.options.out
    out.mkdir(parents=True, exist_ok=True)
    record = {"flags": asked.flags, "runs": rows}
    write_text(out / "results.json", json.dumps(record, indent=1) + "\n")
    table = _table(rows)
    write_text(out / "table.md", table)
    figures.save(profiles(rows), out / "profiles.png", dpi=150)
    print(f"{table}\nwritten to {out}: results.json, table.md, profiles.png")


def score(task: str, returns: np.ndarray) -> float:
    """Mean of the last third of [evaluations] returns; 0 for random actions, 1 for the best."""
    _, random, best = TASKS[task]
    last = returns[-max(1, len(returns) // 3) :]
    return float((last.mean() - random) / (best - random))


def _of_tasks(rows: Sequence[dict[str, Any]], **wanted: Any) -> list[np.ndarray]:
    """Scores [seeds] of each task that has some."""
    chosen = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    by_task = [[row["score"] for row in chosen if row["task"] == task] for task in TASKS]
    return [np.array(own) for own in by_task if own]


def _settings(rows: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
    return sorted({(row["horizon"], row["gate"]) for row in rows})


def _table(rows: Sequence[dict[str, Any]]) -> str:
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    lines = [f"| horizon | gradient into the actor's input | gradient | {' | '.join(tasks)} "
             "| interquartile mean | 95 % interval |"]  # fmt: skip
    lines.append("|---" * (5 + len(tasks)) + "|")
    for horizon, gate in _settings(rows):
        for gradient in GRADIENTS:
            own = _of_tasks(rows, horizon=horizon, gate=gate, gradient=gradient)
            if not own:
                continue
            cells = []
            for task in tasks:
                found = _of_tasks(rows, horizon=horizon, gate=gate, gradient=gradient, task=task)
                cells.append(", ".join(f"{x:.2f}" for x in found[0]) if found else "")
            limits = ""
            if has_interval(own):
                limits = "{:.2f} to {:.2f}".format(*interval(own, iqm))
            lines.append(
                f"| {horizon} | {gate} | `{gradient}` | {' | '.join(cells)} "
                f"| {iqm(own):.2f} | {limits} |"
            )
    return "\n".join(lines) + "\n"


def profiles(rows: Sequence[dict[str, Any]]) -> Figure:
    """Performance profiles: the share of runs above each score (Agarwal et al. 2021, Sec. 4.2)."""
    settings = _settings(rows)
    figure = Figure(figsize=(4 * len(settings), 3.6), layout="constrained")
    axes = figure.subplots(1, len(settings), squeeze=False, sharey=True)[0]
    styles = styles_of(GRADIENTS)
    for axis, (horizon, gate) in zip(axes, settings):
        found = {
            gradient: own for gradient in GRADIENTS
            if (own := _of_tasks(rows, horizon=horizon, gate=gate, gradient=gradient))
        }  # fmt: skip
        draw_profile(axis, found, styles, np.linspace(0, 1, 101))
        axis.set_title(f"H = {horizon}, {gate}")
        axis.legend(frameon=False, fontsize="small", title="gradient (runs)")
        axis.label_outer()
    return figure


if __name__ == "__main__":
    main()
