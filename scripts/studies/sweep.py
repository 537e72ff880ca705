r"""Train several estimators with several seeds; write raw results, a table and learning curves.

    totalprop sweep pipps --estimators tpx lr rp --seeds 0 1 2 3 4 --out results/pipps
    totalprop sweep daappo --vary action-source --values none dynamics --seeds 0 1 2 \
        --out results/daa_ppo/cartpole -- --preset recommended
    totalprop sweep dreamer --estimators rp tpx --seeds 0 1 2 --out results/dreamer/h60 \
        --watch train/actor_gradient_norm -- --preset laptop --horizon 60

Every run is a separate `totalprop train`; its flags can be given after `--`. After a kill, the same
command continues the sweep: finished runs are not repeated, others are resumed. A run folder that
was trained with different flags is an error. On another machine, results.json in --out is enough:
runs that it holds of the same flags are finished.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import functools
import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from totalprop.agents import AGENTS
from totalprop.agents.core import figures
from totalprop.agents.core.validation import is_finite
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.arguments import parse
from totalprop.scripts.run.errors import UserError, ending_with_a_sentence
from totalprop.scripts.run.folder import RunFolder, import_flag, read_json
from totalprop.scripts.run.job import Job
from totalprop.scripts.run.progress import counted
from totalprop.scripts.studies.learning_curves import figure_of, style
from totalprop.scripts.studies.plot import labelled, read

THRESHOLDS = (12.5, 15.0, 17.5)  # sensitivity of "success" to the threshold on the final cost


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of("sweep")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, extra = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    default = Path("runs") / options.out.resolve().name
    options.is_default, options.runs = options.runs in (None, default), options.runs or default
    with ending_with_a_sentence():
        for value in options.values:
            for seed in options.seeds:
                flags = [f"--{options.vary}", value, "--seed", str(seed), *extra]
                check_run(options.runs / run_name(value, seed), [options.agent, *flags])
        earlier = read_earlier(options, extra)
        failed = 0 if options.report_only else train_all(options, extra, earlier)
        report(options, extra, earlier)
    if failed:
        raise SystemExit(f"error: {failed} of the runs failed; the report covers the others")


def run_name(value: str, seed: int) -> str:
    """Name of a run's folder and log; slashes in values (paths, environment ids) are replaced."""
    return f"{value.replace('/', '_')}_seed{seed}"


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
    """What results.json holds of the runs that are asked for, where their folders are not here."""

    results: dict[str, dict[str, Any]]  # value -> seed -> entry
    commits: set[str]


def read_earlier(options: argparse.Namespace, extra: list[str]) -> Earlier:
    """Read the runs of the same flags that results.json in --out holds, maybe of another machine.

    Raises:
        UserError: the file is not one that a sweep wrote.
    """
    path, found = options.out / "results.json", Earlier({}, set())
    if not path.exists():
        return found
    record = read_json(path)
    try:
        command = shlex.split(record["command"])
        split = command.index("--") if "--" in command else len(command)
        prefix = shlex.split(_start_of_command(options))
        if command[: len(prefix)] != prefix or command[split + 1 :] != extra:
            return found
        for value, seed in itertools.product(options.values, map(str, options.seeds)):
            is_here = RunFolder(options.runs / run_name(value, int(seed))).path.exists()
            if not is_here and seed in record["results"].get(value, {}):
                found.results.setdefault(value, {})[seed] = record["results"][value][seed]
        found.commits.update(record["commit"].split(", ") if found.results else [])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} was not written by a sweep ({error!r}); move it away") from error
    return found


def read_rows(
    out: Path, runs: Path, flags: Sequence[str], name_of: Callable[[dict[str, Any]], str]
) -> dict[str, dict[str, Any]]:
    """The runs of a study's results.json, of the same flags and without a folder here.

    Args:
        out: folder of results.json, with "flags" and a list of "runs".
        runs: folder of the runs.
        flags: what the runs must have been trained with.
        name_of: the name of the run of a row.
    Returns:
        Name of a run -> its row.
    Raises:
        UserError: the file is not one of the study.
    """
    path = out / "results.json"
    if not path.exists():
        return {}
    record = read_json(path)
    try:
        if record["flags"] != list(flags):
            return {}
        named = {name_of(row): row for row in record["runs"]}
    except (LookupError, TypeError) as error:
        raise UserError(
            f"{path} was not written by this study ({error!r}); move it away"
        ) from error
    return {name: row for name, row in named.items() if not (runs / name).exists()}


def train_all(options: argparse.Namespace, extra: list[str], earlier: Earlier) -> int:
    """Start or resume all unfinished runs; return the number of runs that failed."""
    jobs = {
        run_name(value, seed): [
            options.agent, f"--{options.vary}", value, "--seed", str(seed), *extra
        ]
        for seed in options.seeds
        for value in options.values
        if str(seed) not in earlier.results.get(value, {})
    }  # fmt: skip
    return train_runs(jobs, options.runs, options.jobs)


def train_runs(jobs: Mapping[str, Sequence[str]], runs: Path, workers: int) -> int:
    """Start or resume unfinished runs in their order, one thread each.

    Args:
        jobs: name of a run -> arguments of `totalprop train`.
        runs: folder of the runs.
        workers: runs at the same time.
    Returns:
        The number of runs that failed.
    """

    def run(name: str) -> bool:
        folder = RunFolder(runs / name)
        if folder.summary.exists():
            return True
        command = [sys.executable, "-m", "totalprop.scripts.train"]
        if folder.config.exists():
            command += ["--resume", str(folder.path)]
            command += shlex.split(import_flag(Job.read(folder).options.env_id))
        else:
            agent, *flags = jobs[name]
            command += [agent, "--runs", str(runs), "--name", name]
            command += ["--threads", "1", "--no-progress", "--no-tensorboard", *flags]
        runs.mkdir(parents=True, exist_ok=True)
        with open(runs / f"{name}.log", "a") as log:
            code = subprocess.run(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            ).returncode
        print(f"{name}: {'done' if code == 0 else f'FAILED, see {log.name}'}", flush=True)
        return code == 0

    failed = 0
    with ThreadPoolExecutor(workers) as pool, counted(len(jobs), "runs") as advance:
        for succeeded in pool.map(run, jobs):
            failed += not succeeded
            advance()
    return failed


def report(options: argparse.Namespace, extra: list[str], earlier: Earlier) -> None:
    """Write results.json (raw results per seed), table.md and learning_curves.png."""
    quantity = AGENTS[options.agent].quantity
    sign = -1 if quantity == "cost" else 1
    results: dict[str, dict[str, Any]] = {}
    commits = set(earlier.commits)
    for value in options.values:
        for seed in options.seeds:
            if str(seed) in earlier.results.get(value, {}):
                results.setdefault(value, {})[str(seed)] = earlier.results[value][str(seed)]
                continue
            folder = RunFolder(options.runs / run_name(value, seed))
            if folder.summary.exists():
                summary, (steps, returns) = read_json(folder.summary), folder.read_evaluations()
                if not is_finite(summary.get(f"final_{quantity}")):
                    raise UserError(f"{folder.summary} has no number final_{quantity}")
                commits.add(str(read_json(folder.config).get("commit", "unknown")))
                means = sign * returns.mean(1)
                curve = {
                    "timesteps": steps,
                    f"{quantity}s": means.round(3).tolist(),
                }
                entry = {**summary, **curve}
                if options.watch:
                    entry[options.watch] = _watched(folder, options.watch)
                results.setdefault(value, {})[str(seed)] = entry
    if not results:
        raise UserError(f"no finished run in {options.runs}; see the .log files there")
    others = _read_others(options.beside, quantity)
    options.out.mkdir(parents=True, exist_ok=True)
    command = f"{_start_of_command(options)} {' '.join(options.values)} "
    command += f"--seeds {' '.join(map(str, options.seeds))} --out {options.out}"
    command += "" if options.is_default else f" --runs {options.runs}"
    command += f" --watch {options.watch}" if options.watch else ""
    command += f" --beside {' '.join(map(str, options.beside))}" if options.beside else ""
    command += f" -- {' '.join(extra)}" if extra else ""
    record = {"command": command, "commit": ", ".join(sorted(commits)), "results": results}
    write_text(options.out / "results.json", json.dumps(record, indent=1) + "\n")
    table = _table({**results, **others}, quantity, options.vary)
    write_text(options.out / "table.md", table)
    watched = functools.partial(_draw_watched, results=results, watched=options.watch)
    curves, legend, _ = labelled(read([options.out / "results.json", *options.beside]))
    picture = figure_of(curves, legend, further=[watched] if options.watch else [])
    figures.save(picture, options.out / "learning_curves.png", dpi=150)
    print(f"{table}\nwritten to {options.out}: results.json, table.md, learning_curves.png")


def _start_of_command(options: argparse.Namespace) -> str:
    """The sweep's command up to the values of the flag that it varies."""
    varied = "--estimators" if options.vary == "estimator" else f"--vary {options.vary} --values"
    return f"totalprop sweep {options.agent} {varied}"


def _read_others(paths: Sequence[Path], quantity: str) -> dict[str, dict[str, Any]]:
    """Read the results of peers and of other sweeps: name -> seed -> curve.

    Raises:
        UserError: a file does not hold such results.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        for name, seeds in read_json(path).get("results", {}).items():
            needed = {f"final_{quantity}", f"{quantity}s", "timesteps"}
            if not seeds or any(needed - seed.keys() for seed in seeds.values()):
                raise UserError(f"{path} holds no {quantity}s of {name}: pass a peer's file")
            found[name] = seeds
    return found


def _watched(folder: RunFolder, column: str) -> dict[str, list[float]]:
    """Read one column of a run's progress.csv, with the steps at which it was logged."""
    path = folder.path / "progress.csv"
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    known = [key for key in rows[0] if key is not None] if rows else []
    if column not in known:
        near = difflib.get_close_matches(column, known, cutoff=0.3)
        raise UserError(
            f"{folder.path}/progress.csv has no column {column!r}; close to it: {', '.join(near)}"
        )
    rows = [row for row in rows if row[column]]
    try:
        return {
            "timesteps": [float(row["time/total_timesteps"]) for row in rows],
            "values": [float(f"{float(row[column]):.4g}") for row in rows],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not hold numbers under {column} and time/total_timesteps ({error})"
        ) from error


def _table(results: dict[str, dict[str, Any]], quantity: str, varied: str) -> str:
    thresholds = THRESHOLDS if quantity == "cost" else ()
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


def _draw_watched(axis: Axes, results: dict[str, dict[str, Any]], watched: str) -> None:
    """Plot one line per seed; there is no mean, as the runs log at different steps."""
    lowest = np.inf
    for i, seeds in enumerate(results.values()):
        for seed in seeds.values():
            if watched not in seed:  # of another machine, where it was not asked for
                continue
            series = seed[watched]
            axis.plot(series["timesteps"], series["values"], lw=0.8, alpha=0.7, **style(i))
            lowest = min(lowest, *series["values"])
    axis.set(xlabel="decisions", ylabel=watched, yscale="log" if lowest > 0 else "linear")


if __name__ == "__main__":
    main()
