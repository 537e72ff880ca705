r"""Train agents x values of flags x seeds; write raw results, tables and learning curves.

    totalprop sweep pipps --seeds 0 1 2 3 4 --out results/pipps -- --preset recommended
    totalprop sweep pipps --estimators tpx lr rp --seeds 0 1 2 3 4 --out results/pipps
    totalprop sweep daappo --vary action-source --values none dynamics --seeds 0 1 2 \
        --out results/daa_ppo/cartpole -- --preset recommended
    totalprop sweep dreamer --estimators rp tpx --seeds 0 1 2 --out results/dreamer/h60 \
        --watch train/actor_gradient_norm -- --preset laptop --horizon 60
    totalprop sweep daappo svg --vary env-id --values Pendulum-v1 MountainCarContinuous-v0 \
        --vary gamma --values 0.9 0.99 --seeds 0 1 --out results/grid
    totalprop sweep --grid grid.yaml --out results/grid --address auto --cpus-per-run 0.5

Every run is a separate `totalprop train`; its flags can be given after `--`. After a kill, the same
command continues the sweep: finished runs are not repeated, others are resumed, and one that is
still trained is waited for. A run folder that was trained with different flags is an error, and so
is a value that its run would refuse: each is tried before the first run starts. On another machine,
results.json in --out is enough: runs that it holds of the same flags are finished. Further values
and seeds are added to it.

The runs start on Ray if it is installed (the extra `ray`), on this machine or with --address on a
cluster, else from this process; with --slurm (the extra `slurm`) they are Slurm's jobs.

    totalprop sweep daappo --tune 40 --vary learning-rate --values 1e-5..1e-2:log \
        --vary clip-range --values 0.1 0.2 0.3 --seeds 100 101 --out results/tuned -- \
        --env-id Pendulum-v1 --total-timesteps 30000

searches instead (Optuna, the extra `tune`): 40 settings from ranges and choices, each trained on
seeds that no report uses, and judged by their mean final evaluation. The same command continues a
stopped search; a larger --tune extends it.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import difflib
import functools
import importlib.util
import io
import itertools
import json
import os
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from totalprop.agents import AGENTS
from totalprop.agents.core import figures
from totalprop.agents.core.validation import is_finite
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.commands import parser_of
from totalprop.scripts.flag_types import split_flags
from totalprop.scripts.run.arguments import parse
from totalprop.scripts.run.environments import parse_env_args
from totalprop.scripts.run.errors import UsageError, UserError, continuing_later
from totalprop.scripts.run.folder import RunFolder, read_json
from totalprop.scripts.run.job import Job
from totalprop.scripts.run.log import STEPS, table_of
from totalprop.scripts.studies.executors import Executor, Trial, chosen
from totalprop.scripts.studies.grid import Grid, grid_of, read_grid
from totalprop.scripts.studies.learning_curves import figure_of
from totalprop.scripts.studies.live import watched
from totalprop.scripts.studies.plot import labelled, read
from totalprop.scripts.studies.styles import styles_of
from totalprop.scripts.studies.tune import check_installed, tune
from totalprop.scripts.train import sentence

BESIDE = 2.5  # success is also shown for thresholds on the final cost so far below and above


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of("sweep")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own, extra = split_flags(arguments)
    options = parser.parse_args(own)
    for name in ("cpus_per_run", "gpus_per_run"):
        if options.slurm and (value := getattr(options, name) or 0) != int(value):
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"{flag} must be a whole number with --slurm, got {value}")
    if options.slurm and options.address:
        parser.error("--address is a cluster of Ray, --slurm one of Slurm: pass one of them")
    default = Path("runs") / options.out.resolve().name
    options.is_default, options.runs = options.runs in (None, default), options.runs or default
    with continuing_later():
        if options.tune is not None:
            _check_tune(options)
        grid = read_grid(options, extra)
        executor = chosen(
            address=options.address, cpus=options.cpus_per_run, gpus=options.gpus_per_run,
            slurm=options.slurm,
            parameters=parse_env_args(tuple(options.slurm_arg), "--slurm-arg", "timeout_min=600"),
        )  # fmt: skip
        if options.tune is not None:
            tune(options, grid, executor)
            return
        check_runs(jobs_of(grid), options.runs, n_settings=len(grid.settings()))
        earlier = read_earlier(options.out, grid)
        failed = 0 if options.report_only else train_all(options, grid, earlier, executor)
        report(options, grid, read_earlier(options.out, grid))  # others may have added to it
    if failed:
        raise SystemExit(f"error: {failed} of the runs failed; the report covers the others")


def _check_tune(options: argparse.Namespace) -> None:
    """Raise a UserError where a search cannot be what is asked for."""
    if options.slurm:
        raise UsageError("--tune needs each result before it proposes more: use --address on Ray")
    if options.address and not options.jobs:
        raise UsageError("--tune on a cluster needs --jobs, the runs at the same time")
    if options.watch or options.beside:
        raise UsageError("--watch and --beside are for a sweep's report, which --tune has none of")
    check_installed()


def jobs_of(grid: Grid) -> dict[str, list[str]]:
    """Name of each run -> its arguments of `totalprop train`, seed by seed."""
    return {
        setting.run_name(seed): setting.command(seed)
        for seed in grid.seeds
        for setting in grid.settings().values()
    }


def check_runs(jobs: Mapping[str, Sequence[str]], runs: Path, *, n_settings: int) -> None:
    """Check the flags of each setting, and each run that has a folder: a check takes 50 ms.

    Args:
        jobs: as of `train_runs`, seed by seed.
        runs: folder of the runs.
        n_settings: how many jobs have the first seed.
    Raises:
        UserError: flags are wrong, or a folder holds a run of other ones.
    """
    for number, (name, command) in enumerate(jobs.items()):
        if number < n_settings or (runs / name).exists():
            check_run(runs / name, command)


def check_run(path: Path, command: Sequence[str]) -> None:
    """Raise a UserError if a run's folder holds a run of other arguments of `totalprop train`."""
    folder = RunFolder(path)
    wanted = parse(command, usage="").flags()
    if not folder.config.exists():
        return
    found = Job.read(folder).flags()
    for name in sorted(wanted.keys() & found.keys()):  # older runs have fewer flags
        if wanted[name] != found[name]:
            raise UserError(
                f"{folder.path} is a run with {name}={found[name]!r}, not {wanted[name]!r}; choose "
                "another folder with --runs"
            )


class Earlier(NamedTuple):
    """What results.json in --out holds, of runs whose folders may be elsewhere."""

    grid: Grid  # which runs it is about
    results: dict[str, dict[str, Any]]  # label of a setting -> seed -> entry
    commits: set[str]


def read_earlier(out: Path, grid: Grid) -> Earlier:
    """Read what results.json holds of a grid's agents and flags, of any values and seeds.

    Raises:
        UserError: it has results of another sweep, which would be lost, or is not one of a sweep.
    """
    path = out / "results.json"
    if not path.exists():
        return Earlier(grid._replace(seeds=()), {}, set())
    record = read_json(path)
    try:
        own = grid_of(record["command"])
        results = {label: dict(seeds) for label, seeds in record["results"].items()}
        commits = set(record["commit"].split(", "))
    except (LookupError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{path} was not written by a sweep ({error!r}); move it away") from error
    same = [(g.agents, list(g.axes), list(g.flags)) for g in (own, grid)]
    if same[0] != same[1]:
        raise UserError(
            f"{path} holds the results of `{record['command']}`, another sweep; choose another "
            "--out, or move it away"
        )
    own.joined(grid).settings()  # raises where two of them would be called the same
    return Earlier(own, results, commits)


def train_all(options: argparse.Namespace, grid: Grid, earlier: Earlier, executor: Executor) -> int:
    """Start or resume all unfinished runs; return the number of runs that failed."""
    jobs = jobs_of(grid)
    kept = {
        setting.run_name(seed)
        for seed in grid.seeds
        for label, setting in grid.settings().items()
        if str(seed) in earlier.results.get(label, {})
    }
    is_elsewhere = options.address or options.slurm
    workers = options.jobs or (len(jobs) if is_elsewhere else os.cpu_count() or 1)
    return train_runs(jobs, options.runs, workers, executor, kept=kept)


def train_runs(
    jobs: Mapping[str, Sequence[str]], runs: Path, workers: int, executor: Executor | None = None,
    *, kept: Collection[str] = (),
) -> int:  # fmt: skip
    """Start or resume unfinished runs in their order, one thread each.

    Args:
        jobs: name of a run -> arguments of `totalprop train`.
        runs: folder of the runs.
        workers: runs at the same time.
        executor: where they are started; None for Ray on this machine, or threads without it.
        kept: names of runs whose results a results.json holds: finished, unless they have a folder
            here that is not.
    Returns:
        The number of runs that failed.
    """
    trials = [
        Trial(name, str(runs), tuple(arguments), os.getcwd())
        for name, arguments in jobs.items()
        if name not in kept or (runs / name).exists()
    ]
    unfinished, failed = [trial for trial in trials if not trial.is_finished], 0
    try_out({t.name: t.arguments for t in unfinished if not t.folder.exists()})
    if unfinished:
        with watched(unfinished) as end:
            for trial, succeeded in (executor or chosen())(unfinished, workers):
                failed += not succeeded
                end(trial, succeeded)
    return failed


def try_out(jobs: Mapping[str, Sequence[str]]) -> None:
    """Make environments and agents as runs will, so that what one refuses is said before hours.

    Each value of a flag is tried once, not each combination of values.

    Args:
        jobs: name of a run -> its arguments of `totalprop train`.
    Raises:
        UserError: a run would be refused, and how it is called.
    """
    tried: set[tuple[str, str]] = set()
    for name, command in jobs.items():
        at = command.index("--seed")
        pairs = set(itertools.pairwise((*command[:at], *command[at + 2 :])))
        if pairs <= tried:
            continue
        tried |= pairs
        job = parse(command, usage="")
        if job.options.offline:
            continue
        try:
            job.options.check()
            # The device of this machine may not be that of a cluster.
            job = dataclasses.replace(job, arguments={**job.arguments, "device": "cpu"})
            with contextlib.ExitStack() as stack:
                env, eval_env = job.environments()
                stack.callback(env.close)
                stack.callback(eval_env.close)
                job.algorithm(env)
        except Exception as error:
            raise UserError(f"the run {name} cannot begin: {sentence(error)}") from error


def report(options: argparse.Namespace, grid: Grid, earlier: Earlier) -> None:
    """Write results.json, table.md and learning_curves.png, and a table of all evaluations."""
    grid = earlier.grid.joined(grid)
    quantities = {AGENTS[agent].quantity for agent in grid.agents}
    quantity = quantities.pop() if len(quantities) == 1 else "return"
    results: dict[str, dict[str, Any]] = {}
    commits = set(earlier.commits)
    for (label, setting), seed in itertools.product(grid.settings().items(), grid.seeds):
        folder = RunFolder(options.runs / setting.run_name(seed))
        if folder.summary.exists():
            summary, (steps, returns) = read_json(folder.summary), folder.read_evaluations()
            own = AGENTS[setting.agent].quantity
            if not is_finite(summary.get(f"final_{own}")):
                raise UserError(f"{folder.summary} has no number final_{own}")
            if own != quantity:  # beside an agent of the other one
                summary[f"final_{quantity}"] = -summary[f"final_{own}"]
            commits.add(str(read_json(folder.config).get("commit", "unknown")))
            means = (-1 if quantity == "cost" else 1) * returns.mean(1)
            curve = {
                "timesteps": steps,
                f"{quantity}s": means.round(3).tolist(),
            }
            entry = {**summary, **curve}
            if options.watch:
                entry[options.watch] = _watched(folder, options.watch)
            results.setdefault(label, {})[str(seed)] = entry
        elif str(seed) in earlier.results.get(label, {}):
            results.setdefault(label, {})[str(seed)] = earlier.results[label][str(seed)]
    if not results:
        raise UserError(f"no finished run in {options.runs}; see the .log files there")
    others = _read_others(options.beside, quantity, results)
    options.out.mkdir(parents=True, exist_ok=True)
    words = ["--seeds", *map(str, grid.seeds), "--out", str(options.out)]
    words += [] if options.is_default else ["--runs", str(options.runs)]
    words += ["--watch", options.watch] if options.watch else []
    words += ["--beside", *map(str, options.beside)] if options.beside else []
    words += ["--", *grid.flags] if grid.flags else []
    record = {
        "command": f"{grid.command()} {shlex.join(words)}",
        "commit": ", ".join(sorted(commits)),
        "results": results,
    }
    write_text(options.out / "results.json", json.dumps(record, indent=1) + "\n")
    table = _table({**results, **others}, quantity, grid.varied)
    write_text(options.out / "table.md", table)
    curves, legend, _ = labelled(read([options.out / "results.json", *options.beside]))
    styles = styles_of(curve.label for curve in curves)
    settings = [label for label, seeds in results.items() for _ in seeds]  # of the first curves
    lines = {label: styles[curve.label] for label, curve in zip(settings, curves, strict=False)}
    beside = functools.partial(_draw_watched, results=results, watched=options.watch, styles=lines)
    picture = figure_of(curves, legend, further=[beside] if options.watch else [])
    figures.save(picture, options.out / "learning_curves.png", dpi=150)
    evaluations = _write_evaluations(options.runs, grid, results, quantity)
    print(
        f"{table}\nwritten to {options.out}: results.json, table.md, learning_curves.png; all "
        f"evaluations: {evaluations}"
    )


def _write_evaluations(
    runs: Path, grid: Grid, results: dict[str, dict[str, Any]], quantity: str
) -> Path:
    """Write a tidy table beside the runs, as CSV and, with pyarrow, as Parquet: a row each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["agent", *grid.axes, "seed", "decisions", quantity])
    settings = grid.settings()
    for label, seeds in results.items():
        own = settings[label]
        for seed, entry in seeds.items():
            for steps, value in zip(entry["timesteps"], entry[f"{quantity}s"]):
                writer.writerow([own.agent, *own.values.values(), seed, steps, value])
    path = runs / "evaluations.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
    if importlib.util.find_spec("pyarrow"):
        from pyarrow import csv as arrow_csv
        from pyarrow import parquet

        parquet.write_table(arrow_csv.read_csv(path), path.with_suffix(".parquet"))
    return path


def _read_others(
    paths: Sequence[Path], quantity: str, taken: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Read the results of peers and of other sweeps: name -> seed -> curve.

    Those of a name that is taken, by this sweep or an earlier file, have their folder's with it.

    Raises:
        UserError: a file does not hold such results.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        for name, seeds in read_json(path).get("results", {}).items():
            needed = {f"final_{quantity}", f"{quantity}s", "timesteps"}
            if not seeds or any(needed - seed.keys() for seed in seeds.values()):
                raise UserError(f"{path} holds no {quantity}s of {name}: pass a peer's file")
            if name in taken or name in found:
                name = f"{name} ({path.resolve().parent.name})"
            found[name] = seeds
    return found


def _watched(folder: RunFolder, column: str) -> dict[str, list[float]]:
    """Read one column of a run's progress.csv or k.csv, with the steps at which it was logged."""
    path = table_of(folder.path, column)
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    known = [key for key in rows[0] if key is not None] if rows else []
    if column not in known:
        near = difflib.get_close_matches(column, known, cutoff=0.3)
        raise UserError(f"{path} has no column {column!r}; close to it: {', '.join(near)}")
    rows = [row for row in rows if row[column]]
    try:
        return {
            "timesteps": [float(row[STEPS]) for row in rows],
            "values": [float(f"{float(row[column]):.4g}") for row in rows],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not hold numbers under {column} and {STEPS} ({error})"
        ) from error


def _table(results: dict[str, dict[str, Any]], quantity: str, varied: str) -> str:
    known = {seed.get("success_threshold") for seeds in results.values() for seed in seeds.values()}
    thresholds: tuple[float, ...] = ()
    if quantity == "cost" and len(known) == 1 and None not in known:  # of one task
        (own,) = known
        thresholds = (own - BESIDE, own, own + BESIDE)
    limits = "".join(f" success < {t:g} |" for t in thresholds)
    lines = [
        f"| {varied} | seeds | final {quantity}, mean ± SE | average over training, mean ± SE "
        f"| final per seed |{limits}"
    ]
    lines.append("|---" * (5 + len(thresholds)) + "|")
    for value, seeds in results.items():
        final = np.array([seed[f"final_{quantity}"] for seed in seeds.values()])
        average = np.array([np.mean(seed[f"{quantity}s"]) for seed in seeds.values()])
        success = "".join(f" {(final < t).sum()}/{len(final)} |" for t in thresholds)
        each = ", ".join(f"{c:.1f}" for c in final)
        lines.append(
            f"| `{value}` | {len(final)} | {_mean_and_error(final)} | {_mean_and_error(average)} "
            f"| {each} |{success}"
        )
    return "\n".join(lines) + "\n"


def _mean_and_error(values: np.ndarray) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{values.mean():.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


def _draw_watched(
    axis: Axes, results: dict[str, dict[str, Any]], watched: str, styles: dict[str, dict[str, Any]]
) -> None:
    """Plot one line per seed; there is no mean, as the runs log at different steps."""
    lowest = np.inf
    for label, seeds in results.items():
        for seed in seeds.values():
            if watched not in seed:  # of another machine, where it was not asked for
                continue
            series = seed[watched]
            axis.plot(series["timesteps"], series["values"], lw=0.8, alpha=0.7, **styles[label])
            lowest = min(lowest, *series["values"])
    axis.set(xlabel="decisions", ylabel=watched, yscale="log" if lowest > 0 else "linear")


if __name__ == "__main__":
    main()
