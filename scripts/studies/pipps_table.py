r"""Does PIPPS learn under noise? The success rates of Tables 1 and 2 of Parmas et al. 2018.

    totalprop study pipps-table                              # 140 runs, 3 to 4 hours on 2 cores
    totalprop study pipps-table --tasks angle --methods RP TP --noise 1 --seeds 0 1 --out runs/some
    totalprop study pipps-table --report-only
    totalprop study pipps-table --scale paper --out results/pipps/table_paper   # weeks

Every task x noise multiplier k x method x seed is a `totalprop train`; a run succeeds if its last
policy costs less than the task's threshold. "angle" and "tip" are the cart-pole with the two costs
of the paper, "unicycle" is its other task. LR, TP and ours (TPX, TPG) have batch importance
weighting, and all methods see the angle itself with the Angle Cost and its sine and cosine with the
Tip Cost, as PILCO does.

--scale small has 5 seeds of 12 learned trials, and a search of 100 steps of Adam with 100 particles
(Tip Cost: 250 with 300; PILCO: 250 evaluations). Adam's step size is 0.03, and 0.01 for RP and GR:
Parmas et al. 2023, App. B.1, found them the best for TP and RP. --scale paper is the paper's
protocol: 100 seeds of 15 learned trials (30 of the unicycle), and 600 steps of its own optimizer
with 300 particles. Flags of `totalprop train` after -- count in all runs of either scale.

A killed study goes on with the same command: finished runs are not repeated, others are resumed. On
another machine, results.json in --out is enough. table.md has the rates with their 95 % intervals
(Wilson's) beside the published ones, success.png draws both.
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
from totalprop.scripts.commands import PIPPS_METHODS, PIPPS_TASKS, parser_of
from totalprop.scripts.flag_types import split_flags
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import RunFolder, read_json
from totalprop.scripts.studies.cells import Asked, train_cells
from totalprop.scripts.studies.scores import Rate, rate_of

PUBLISHED_RUNS = 100  # of each published rate


class Task(NamedTuple):
    """A task of the study.

    Attributes:
        flags: of `totalprop train`, with either agent.
        pipps: flags with pipps.
        pilco: flags with pilco.
        threshold: cost of an episode below which a run counts as a success. INFERRED, since the
            paper states none: between what is reached and what doing nothing costs (29.8 and 30.0
            on the cart-pole, 13.5 ± 1.1 on the unicycle, which falls).
        margin: of the other thresholds in the table.
    """

    flags: tuple[str, ...]
    pipps: tuple[str, ...]
    pilco: tuple[str, ...]
    threshold: float
    margin: float


def _cart_pole(cost: str, angle_dims: tuple[str, ...]) -> Task:
    flags = (
        "--preset", "pipps2018", "--env-id", "totalprop/CartPoleSwingUp-v0",
        "--env-arg", f"cost={cost}", "--angle-dims", *angle_dims,
    )  # fmt: skip
    return Task(flags, (), (), threshold=15.0, margin=2.5)


TASKS = {
    "angle": _cart_pole("angle", ()),
    "tip": _cart_pole("tip", ("1",)),
    "unicycle": Task(
        ("--env-id", "totalprop/Unicycle-v0"),
        ("--preset", "pipps2018-unicycle"),
        (
            "--preset", "pipps2018", "--policy", "LinearPolicy", "--horizon", "20", "--angle-dims",
            "--random-trials", "5", "--random-scale", "0.2", "--termination", "ignore",
        ),
        threshold=10.0,
        margin=2.5,
    ),
}  # fmt: skip
METHODS: dict[str, tuple[str, ...]] = {  # agent and its flags
    "PILCO": ("pilco",),
    "RP": ("pipps", "--estimator", "rp"),
    "RP-FS": ("pipps", "--estimator", "rp-fs"),
    "GR": ("pipps", "--estimator", "gr"),
    "GR-FS": ("pipps", "--estimator", "gr-fs"),
    "LR": ("pipps", "--estimator", "lr"),
    "TP": ("pipps", "--estimator", "tp"),
    "TP-sf": ("pipps", "--estimator", "tp", "--no-model-uncertainty"),
    "TP+sn": ("pipps", "--estimator", "tp", "--noise-multiplier", "100"),
    "TPX": ("pipps", "--estimator", "tpx"),
    "TPG": ("pipps", "--estimator", "tpg"),
}


class Scale(NamedTuple):
    """How much is done for a table.

    Attributes:
        seeds: of each cell.
        tasks: the default of --tasks.
        noises: the default of --noise.
        methods: the default of --methods.
        steps: real steps on the cart-pole.
        unicycle_steps: real steps on the unicycle.
        flags: of each agent.
        tip_flags: of each agent with the Tip Cost, besides.
        method_flags: of some methods, besides.
    """

    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    noises: tuple[float, ...]
    methods: tuple[str, ...]
    steps: int
    unicycle_steps: int
    flags: Mapping[str, tuple[str, ...]]
    tip_flags: Mapping[str, tuple[str, ...]] = {}
    method_flags: Mapping[str, tuple[str, ...]] = {}

    def flags_of(self, cell: Cell, agent: str) -> tuple[str, ...]:
        """Flags of a run, of which the later count."""
        of_task = self.tip_flags.get(agent, ()) if cell.task == "tip" else ()
        return (*self.flags[agent], *of_task, *self.method_flags.get(cell.method, ()))


SCALES = {
    "small": Scale(
        seeds=tuple(range(5)),
        tasks=("angle", "tip"),
        noises=(1.0, 16.0),
        methods=("PILCO", "RP", "GR", "LR", "TP", "TPX", "TPG"),
        steps=360,
        unicycle_steps=400,
        flags={
            "pipps": (
                "--n-particles", "100", "--gradient-steps", "100",
                "--optimizer", "adam", "--learning-rate", "0.03",
            ),
            "pilco": ("--gradient-steps", "250"),
        },
        # It has plateaus: with 100 of each, TPX did not get across.
        tip_flags={"pipps": ("--n-particles", "300", "--gradient-steps", "250")},
        method_flags=dict.fromkeys(("RP", "GR"), ("--learning-rate", "0.01")),
    ),
    "paper": Scale(
        seeds=tuple(range(100)),
        tasks=PIPPS_TASKS,
        noises=(0.01, 1.0, 4.0, 9.0, 16.0),
        methods=PIPPS_METHODS,
        steps=450,
        unicycle_steps=700,
        flags={"pipps": (), "pilco": ()},
    ),
}  # fmt: skip

# Parmas et al. 2018, Table 2 (cart-pole) and Table 1 (unicycle); without a number where it has none
_COLUMNS = ("PILCO", "RP", "RP-FS", "GR", "GR-FS", "LR", "TP", "TP-sf", "TP+sn")
PUBLISHED: dict[tuple[str, float], dict[str, float]] = {
    ("angle", 0.01): dict(zip(_COLUMNS, (0.88, 0.69, 0.24, 0.63, 0.74, 0.57, 0.82))),
    ("angle", 1.0): dict(zip(_COLUMNS, (0.79, 0.74, 0.23, 0.89, 0.71, 0.96, 0.99, 0.93))),
    ("angle", 4.0): dict(zip(_COLUMNS, (0.70, 0.58, 0.08, 0.62, 0.41, 0.94, 0.95))),
    ("angle", 9.0): dict(zip(_COLUMNS, (0.37, 0.44, 0.04, 0.34, 0.25, 0.86, 0.83))),
    ("angle", 16.0): dict(zip(_COLUMNS, (0.01, 0.11, 0.00, 0.08, 0.02, 0.45, 0.40))),
    ("tip", 0.01): dict(zip(_COLUMNS, (0.92, 0.44, 0.20, 0.47, 0.78, 0.36, 0.54))),
    ("tip", 1.0): dict(zip(_COLUMNS, (0.73, 0.15, 0.08, 0.68, 0.50, 0.28, 0.48))),
    ("unicycle", 1.0): dict(zip(_COLUMNS, (0.91, 0.80, 0.39, 0.96, 0.63, 0.47, 0.94))),
}
PUBLISHED["angle", 0.01]["TP+sn"] = 0.96


class Cell(NamedTuple):
    """What has one success rate; the unicycle's only noise is 1."""

    task: str
    noise: float
    method: str

    def name(self, seed: int) -> str:
        """Name of a run."""
        return f"{self.task}_k{self.noise:g}_{self.method}_seed{seed}"

    def command(self, seed: int, scale: Scale, extra: Sequence[str]) -> list[str]:
        """Arguments of `totalprop train`."""
        task, (agent, *flags) = TASKS[self.task], METHODS[self.method]
        own = task.pilco if agent == "pilco" else task.pipps
        steps = scale.unicycle_steps if self.task == "unicycle" else scale.steps
        return [
            agent, "--seed", str(seed), *task.flags, "--env-arg", f"noise={self.noise:g}", *own,
            "--total-timesteps", str(steps), *scale.flags_of(self, agent), *flags, *extra,
        ]  # fmt: skip


def cell_of(row: Mapping[str, Any]) -> Cell:
    """The cell of a row of results.json."""
    return Cell(*(row[field] for field in Cell._fields))


def run_of(row: Mapping[str, Any]) -> tuple[Cell, int]:
    """The run of a row of results.json."""
    return cell_of(row), row["seed"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    train_cells(parse(sys.argv[1:] if arguments is None else arguments), run_of, report)


def parse(arguments: Sequence[str]) -> Asked:
    """Parse the command line; on wrong usage, exit with code 2."""
    own, extra = split_flags(arguments)
    options = parser_of("study pipps-table").parse_args(own)
    scale = SCALES[options.scale]
    options.tasks = options.tasks or scale.tasks
    options.noise = options.noise or scale.noises
    options.methods = options.methods or scale.methods
    options.seeds = scale.seeds if options.seeds is None else options.seeds
    cells = [
        Cell(task, noise, method)
        for task in options.tasks
        for noise in ([1.0] if task == "unicycle" else options.noise)
        for method in options.methods
    ]
    flags = ["--scale", options.scale, *(["--", *extra] if extra else [])]
    jobs = {c.name(seed): c.command(seed, scale, extra) for seed in options.seeds for c in cells}
    return Asked(options, cells, jobs, flags)


# ---------------------------------------------------------------------------- report


def _order(run: tuple[Cell, int]) -> tuple[int, float, int, int]:
    (task, noise, method), seed = run
    return list(TASKS).index(task), noise, PIPPS_METHODS.index(method), seed


def published_of(cell: Cell) -> Rate | None:
    """The paper's rate, or None."""
    rate = PUBLISHED.get((cell.task, cell.noise), {}).get(cell.method)
    return None if rate is None else rate_of(round(rate * PUBLISHED_RUNS), PUBLISHED_RUNS)


def report(asked: Asked, runs: Path, earlier: Mapping[tuple[Cell, int], dict[str, Any]]) -> None:
    """Write results.json, table.md and success.png from the runs that are finished."""
    out, found = asked.options.out, dict(earlier)
    wanted = list(itertools.product(asked.cells, asked.options.seeds))
    for cell, seed in wanted:
        folder = RunFolder(runs / cell.name(seed))
        if folder.summary.exists():
            steps, returns = folder.read_evaluations()
            found[cell, seed] = {
                **cell._asdict(), "seed": seed, "timesteps": list(steps),
                "costs": (-returns.mean(1)).round(3).tolist(),
                "seconds": read_json(folder.summary).get("seconds"),
                "commit": str(read_json(folder.config).get("commit", "unknown")),
            }  # fmt: skip
    rows = [found[run] for run in sorted(found, key=_order)]
    if not rows:
        raise UserError(f"no finished run in {runs}; see the .log files there")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.json", json.dumps({"flags": asked.flags, "runs": rows}) + "\n")
    finals: dict[Cell, list[float]] = {}
    for row in rows:
        finals.setdefault(cell_of(row), []).append(row["costs"][-1])
    expected = len({*found, *wanted})
    text = table(finals, asked.flags, sorted({row["commit"] for row in rows}), expected)
    write_text(out / "table.md", text)
    figures.save(figure_of(finals), out / "success.png", dpi=150)
    print(f"{text}\nwritten to {out}: results.json, table.md, success.png")
    if len(rows) < expected:
        print("Next: the same command trains the runs that are missing")


def table(
    finals: Mapping[Cell, Sequence[float]],
    flags: Sequence[str],
    commits: Sequence[str],
    expected: int,
) -> str:
    """table.md."""
    done = sum(map(len, finals.values()))
    lines = [
        "# Success rates of PIPPS and PILCO", "",
        f"`totalprop study pipps-table {' '.join(flags)}`, commit {', '.join(commits)}; {done} of "
        f"{expected} runs. Published: Parmas et al. 2018, Tables 1 and 2, {PUBLISHED_RUNS} runs "
        "each, at the scale `paper`. The paper does not state its threshold of success; ours is 15 "
        "on the cart-pole and 10 on the unicycle, and the last column has the numbers of successes "
        "2.5 below and above it. Intervals: 95 %, Wilson.", "",
        "| task | k | method | successes | rate | interval | published | its interval "
        "| median cost | other thresholds |",
        "|---" * 10 + "|",
    ]  # fmt: skip
    for cell, costs in finals.items():
        task, final = TASKS[cell.task], np.array(costs)
        own, theirs = rate_of(int((final < task.threshold).sum()), len(final)), published_of(cell)
        published = " | " if theirs is None else f"{theirs.rate:.2f} | {_interval(theirs)}"
        others = [
            f"{(final < task.threshold + sign * task.margin).sum()}/{len(final)}"
            for sign in (-1, 1)
        ]
        lines.append(
            f"| {cell.task} | {cell.noise:g} | {cell.method} | {own.successes}/{own.runs} | "
            f"{own.rate:.2f} | {_interval(own)} | {published} | {np.median(final):.1f} | "
            f"{', '.join(others)} |"
        )
    return "\n".join(lines) + "\n"


def _interval(rate: Rate) -> str:
    return f"{rate.low:.2f} to {rate.high:.2f}"


def figure_of(finals: Mapping[Cell, Sequence[float]]) -> Figure:
    """Our rates and the published ones with their intervals, a panel per task and noise."""
    panels = list(dict.fromkeys((cell.task, cell.noise) for cell in finals))
    methods = list(dict.fromkeys(cell.method for cell in finals))
    figure = Figure(figsize=(max(3.2 * len(panels), 4.5), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (task, noise) in zip(axes, panels):
        for x, method in enumerate(methods):
            cell = Cell(task, noise, method)
            own = None
            if cell in finals:
                final = np.array(finals[cell])
                own = rate_of(int((final < TASKS[task].threshold).sum()), len(final))
            drawn = ((own, -0.12, "k", "o"), (published_of(cell), 0.12, "#D55E00", "D"))
            for rate, shift, color, marker in drawn:
                if rate is not None:
                    axis.plot([x + shift] * 2, [rate.low, rate.high], color=color, lw=1.5)
                    axis.plot(x + shift, rate.rate, marker, color=color, ms=5)
        axis.set_xticks(range(len(methods)), methods, rotation=45, fontsize="small")
        sides = (-0.5, len(methods) - 0.5)
        axis.set(title=f"{task}, k = {noise:g}", xlim=sides, ylim=(-0.03, 1.03))
        axis.grid(axis="y", alpha=0.25)
    for label, color, marker in (("here", "k", "o"), ("published", "#D55E00", "D")):
        axes[0].plot([], [], marker, color=color, label=label)
    axes[0].set_ylabel("share of runs that succeed, 95 %")
    figure.legend(loc="outside right center", frameon=False)
    return figure


if __name__ == "__main__":
    main()
