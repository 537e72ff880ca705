r"""Draw any runs in one picture: learning curves by task, success rates, performance profiles.

    totalprop plot runs/pendulum_seed0 runs/pendulum_seed1
    totalprop plot results/dreamer/pendulum_h15 results/dreamer/pendulum_h60
    totalprop plot results/daa_ppo/cartpole-swingup results/daa_ppo/walker-walk --profile
    totalprop plot results/pipps --labels TPX TP TPG LR RP --out plots/swing_up

A run is a folder of `totalprop train`, finished or not. A sweep is results.json of `totalprop
sweep` or `totalprop study`, or the file of `totalprop peer`, or the folder of one. A folder that
has neither is searched one level down. Runs that are named one by one and differ in nothing but
their seed are one line. Each file or searched folder has lines of its own.

Thin lines are seeds. The thick line is their interquartile mean (Agarwal et al. 2021), or the mean
of fewer than 4 seeds, as far as all seeds have come. From 4 seeds on it has a 95 % interval, by a
bootstrap, which is still narrow for so few: it covers 88 % with 4 normal seeds, and 93 % with 8.
Costs are drawn by evaluation, one after each policy search if --eval-every was left out, and
have another panel: the share of seeds that succeed, with Wilson intervals.

--profile scales the ends of the thick lines to scores, and draws the share of runs above each score
and the interquartile mean, the median and the optimality gap over the tasks that all lines have.
The bootstrap draws seeds within each task.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from totalprop.agents import AGENTS
from totalprop.agents.core import figures
from totalprop.agents.core.validation import is_finite, is_whole
from totalprop.envs.dm_control import DMControlEnv
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.arguments import parse
from totalprop.scripts.run.environments import our_id
from totalprop.scripts.run.errors import UsageError, UserError, ending_with_a_sentence
from totalprop.scripts.run.folder import RunFolder, read_json
from totalprop.scripts.run.job import Job
from totalprop.scripts.studies import scores
from totalprop.scripts.studies.grid import grid_of
from totalprop.scripts.studies.learning_curves import (
    AGGREGATES,
    Curve,
    Unit,
    by,
    figure_of,
    has_interval,
    profile_figure,
    together,
)
from totalprop.scripts.studies.scores import MIN_RUNS, Scores

SUITE, SUITE_RANGE = "dmc/", (0.0, 1000.0)
SOURCE = "source"  # a setting that labels name last: where runs come from
# What does not make a run another one, and what rows of a study hold besides settings.
IGNORED = {
    "env_id", "seed", "device", "total_timesteps", "eval_every", "eval_episodes", "eval_max_steps",
    "task", "score", "commit", "seconds", "timesteps", "returns", "costs",
}  # fmt: skip


class Found(NamedTuple):
    """A run without a label yet.

    Attributes:
        curve: its evaluations.
        settings: what labels can name, as text.
        path: the file that holds them.
    """

    curve: Curve
    settings: dict[str, str]
    path: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parser_of("plot").parse_args(sys.argv[1:] if arguments is None else arguments)
    with ending_with_a_sentence(OSError):
        check(options)
        found = read(options.runs, threshold=options.success)
        curves, legend, hidden = labelled(found, options.labels)
        if options.x == "frames" and any(curve.action_repeat is None for curve in curves):
            task = next(curve.task for curve in curves if curve.action_repeat is None)
            raise UsageError(f"the frames of a decision in {task} are unknown; draw --x decisions")
        pictures = {"learning_curves": figure_of(curves, legend, options.x)}
        texts = [table(own, legend, options.x) for own in by(curves, "quantity").values()]
        if options.profile:
            lines, tasks = normalised(curves, options.normalise)
            pictures["profile"] = profile_figure(lines, legend)
            texts.append(f"Scores on {', '.join(tasks)}:\n\n{score_table(lines, legend)}")
        out = options.out or Path("plots") / _name_of(options.runs)
        out.mkdir(parents=True, exist_ok=True)
        written = [f"{name}.{kind}" for name in pictures for kind in ("png", "svg")]
        for name in written:
            figures.save(pictures[Path(name).stem], out / name, dpi=150)
    print("\n".join(texts))
    if hidden:
        more = f" and {len(hidden) - 6} more" if len(hidden) > 6 else ""
        print(f"The lines differ in more than their labels say: {', '.join(hidden[:6])}{more}.")
    print(f"written to {out}: {', '.join(written)}")


def check(options: argparse.Namespace) -> None:
    """Raise a UsageError if the bounds of scores are none, or have no use."""
    bounds = options.normalise
    if bounds is not None and not options.profile:
        raise UsageError("--normalise scales the scores of --profile; add --profile")
    if bounds is not None and not (all(map(is_finite, bounds)) and bounds[0] != bounds[1]):
        raise UsageError(f"--normalise needs two different numbers, got {bounds[0]} {bounds[1]}")


def _name_of(paths: Sequence[Path]) -> str:
    """Name for the pictures of these paths: a folder's own, or what tells several paths apart."""
    folders = [path.parent if path.is_file() else path for path in map(Path.resolve, paths)]
    if len(set(folders)) == 1:
        return folders[0].name or "runs"
    parts = _distinct(set(map(str, folders)))
    own = sorted(
        (part or Path(path).name).replace("/", "_") for path, part in parts.items() if path
    )
    name = "_".join(own)
    return name if len(name) <= 80 else f"{own[0][:60]}_and_{len(own) - 1}_more"


# ---------------------------------------------------------------------------- reading


def read(paths: Sequence[Path], threshold: float | None = None) -> list[Found]:
    """Read runs and sweeps.

    Args:
        paths: as on the command line.
        threshold: cost below which an evaluation is a success; None for the environment's own.
    Raises:
        UserError: a path holds no learning curves.
    """
    found = [run for path in paths for run in _read(path, threshold)]
    if not found:
        raise UserError("none of the runs has been evaluated yet")
    sources = _distinct({run.settings[SOURCE] for run in found})
    return [run._replace(settings={**run.settings, SOURCE: sources[run.settings[SOURCE]]})
            for run in found]  # fmt: skip


def _read(path: Path, threshold: float | None) -> Iterator[Found]:
    if (path / "config.json").is_file():
        yield from _read_run(RunFolder(path), "", threshold)
        return
    files, runs = [path] if path.is_file() else [], []
    if not files:
        inside = [path] if (path / "results.json").is_file() else sorted(path.glob("*"))
        files = [file for entry in inside if (file := entry / "results.json").is_file()]
        runs = [RunFolder(entry) for entry in inside if (entry / "config.json").is_file()]
    if not (files or runs):
        raise UserError(
            f"{path} holds no learning curves: pass folders of totalprop train, or results.json of "
            "totalprop sweep, peer or study"
        )
    for file in files:
        yield from _read_results(file, threshold)
    for run in runs:
        yield from _read_run(run, str(path), threshold)


def _read_run(folder: RunFolder, source: str, threshold: float | None) -> Iterator[Found]:
    """A run folder; an unfinished one has the evaluations that were made so far, if any."""
    job = Job.read(folder)
    if not folder.evaluations.exists():
        print(f"{folder.path} has not been evaluated yet and is left out", file=sys.stderr)
        return
    steps, returns = folder.read_evaluations()
    quantity = AGENTS[job.agent].quantity
    values = returns.mean(1) * (-1 if quantity == "cost" else 1)
    record = {"timesteps": steps, f"{quantity}s": values.tolist()}
    if folder.summary.exists():
        record["success_threshold"] = read_json(folder.summary).get("success_threshold")
    yield _found(record, _described(job), source, folder.evaluations, threshold)


def _read_results(path: Path, threshold: float | None) -> Iterator[Found]:
    """A file of a sweep, a peer or a study."""
    record, source = read_json(path), str(path.parent)
    try:
        if isinstance(rows := record.get("runs"), list):
            for row in rows:
                yield _found(row, row, source, path, threshold)
            return
        for name, seeds in record["results"].items():
            varied: dict[str, str] = {}
            if "settings" in record:  # of a peer
                settings = {"agent": name, **record["settings"]}
            else:
                job, varied = swept(record["command"], name, path)
                settings = _described(job)
            for seed, entry in seeds.items():
                run = _found(entry, {**settings, "seed": seed}, source, path, threshold)
                yield run._replace(settings={**varied, **run.settings, **varied})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} holds no learning curves; pass what totalprop sweep, peer or study wrote"
        ) from error


def swept(command: str, label: str, path: Path) -> tuple[Job, dict[str, str]]:
    """A run of one setting of a sweep's command, and that setting's values of the flags varied."""
    said = io.StringIO()
    try:
        setting = grid_of(command).settings()[label]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            job = parse(setting.command(0), usage="")
    except (SystemExit, ValueError, UsageError) as error:
        text = said.getvalue() if isinstance(error, SystemExit) else str(error)
        reason = " ".join(text.rpartition("error: ")[2].split())
        raise UserError(
            f"{path} is of a command that this version does not know: {reason}"
        ) from None
    return job, {name.replace("-", "_"): value for name, value in setting.values.items()}


def _described(job: Job) -> dict[str, Any]:
    """The settings of a run; the first of them that differ are what labels name."""
    flags = job.flags()
    return {name: flags[name] for name in ("agent", "estimator") if name in flags} | flags


def _found(
    record: Mapping[str, Any],
    settings: Mapping[str, Any],
    source: str,
    path: Path,
    threshold: float | None,
) -> Found:
    """A run from its evaluations and its settings, of which env_id, env_args and seed count here.

    Raises:
        UserError: the record holds no evaluations.
    """
    quantity = "cost" if "costs" in record else "return"
    values = record.get(f"{quantity}s")
    n = len(values) if isinstance(values, list) else 0
    times = list(range(1, n + 1)) if quantity == "cost" else record.get("timesteps")
    is_right = (
        isinstance(values, list) and isinstance(times, list) and len(times) == n > 0
        and all(map(is_finite, values)) and all(map(is_whole, times))
        and all(a < b for a, b in itertools.pairwise(times))
    )  # fmt: skip
    if not is_right:
        raise UserError(
            f"{path} holds no learning curves: each run needs timesteps that grow, and as many "
            "returns, or costs"
        )
    if threshold is None and is_finite(known := record.get("success_threshold")):
        threshold = known  # of an environment that need not be registered here
    env_id = our_id(str(settings.get("env_id", "")))
    curve = Curve(
        label="",
        task=env_id or str(settings.get("task", path.parent.name)),
        seed=str(settings.get("seed", "")),
        quantity=quantity,
        times=np.array(times),
        values=np.array(values, dtype=float),
        action_repeat=_action_repeat(env_id, settings.get("env_args") or {}),
        threshold=_threshold(env_id, threshold) if quantity == "cost" else None,
    )
    return Found(curve, {**_flat(settings), SOURCE: source}, path)


def _flat(settings: Mapping[str, Any]) -> dict[str, str]:
    """What labels can name: settings as text, those of environment and networks among them."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat.update(_flat(value))
        elif name not in IGNORED:
            is_list = isinstance(value, list | tuple)
            flat[name] = " ".join(map(_text, value)) if is_list else _text(value)
    return flat


def _text(value: Any) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


def _action_repeat(env_id: str, env_args: Mapping[str, Any]) -> int | None:
    """Frames per decision; None where the task is not given by an environment."""
    default = 1
    if env_id.startswith(SUITE):
        default = inspect.signature(DMControlEnv).parameters["action_repeat"].default
    repeat = env_args.get("action_repeat", default)
    return repeat if env_id and is_whole(repeat) else None


def _threshold(env_id: str, given: float | None) -> float | None:
    """Cost below which an environment counts as solved: the given one, or its registration's."""
    if given is not None:
        return given
    spec = gym.registry.get(env_id)
    return None if spec is None or spec.reward_threshold is None else -spec.reward_threshold


def _distinct(paths: set[str]) -> dict[str, str]:
    """Paths without the folders, first and last, that they have in common."""

    def shared(all_parts: Iterable[Sequence[str]]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda x: len(set(x)) == 1, zip(*all_parts)))

    parts = {path: Path(path).parts for path in paths if path}
    start = shared(parts.values())
    parts = {path: own[start:] for path, own in parts.items()}
    end = shared(own[::-1] for own in parts.values())
    return {path: "/".join(own[: len(own) - end]) for path, own in parts.items()} | {"": ""}


# ---------------------------------------------------------------------------- labels


def labelled(
    found: Sequence[Found], names: Sequence[str] = ()
) -> tuple[list[Curve], str, list[str]]:
    """Label runs by what differs between those of a task: a few settings that tell them apart.

    Args:
        found: runs.
        names: labels to use instead, one per line in their order.
    Returns:
        The curves, what the labels name, and the settings that differ without being named.
    Raises:
        UserError: there is another number of lines, or a run is there twice.
    """
    known = list(dict.fromkeys(name for run in found for name in run.settings))
    # Last of all what some runs lack, as older ones do.
    known.sort(key=lambda name: (name == SOURCE, any(name not in run.settings for run in found)))

    def count(keys: Sequence[str]) -> int:
        return len({(run.curve.panel, *_values(run, keys)) for run in found})

    chosen: list[str] = []
    for name in known:
        if count([*chosen, name]) > count(chosen) and count(chosen) < count(known):
            chosen.append(name)
    hidden = []
    for name in known:
        seen = {(run.curve.panel, run.settings[name]) for run in found if name in run.settings}
        if name not in (*chosen, SOURCE) and len(seen) > len({panel for panel, _ in seen}):
            hidden.append(name)
    shown = chosen or [name for name in ("estimator", "agent") if name in known][:1]
    labels = [", ".join(filter(None, _values(run, shown))) or "runs" for run in found]
    lines = list(dict.fromkeys(labels))
    legend = ", ".join(name.replace("_", "-") for name in shown) or "runs"
    if names:
        if len(names) != len(lines):
            raise UsageError(
                f"--labels has {len(names)} names for {len(lines)} lines, which are, in this "
                f"order: {'; '.join(lines)}"
            )
        renamed = dict(zip(lines, names))
        labels, legend = [renamed[label] for label in labels], "line"
    curves = [run.curve._replace(label=label) for run, label in zip(found, labels)]
    files: dict[tuple[str, str, str], Path] = {}
    for curve, run in zip(curves, found):
        key = (curve.label, curve.task, curve.seed)
        if key in files:
            raise UserError(
                f"seed {curve.seed} of {curve.label!r} in {curve.task} is there twice, in "
                f"{files[key]} and {run.path}: pass one of them"
            )
        files[key] = run.path
    return curves, legend, hidden


def _values(run: Found, keys: Sequence[str]) -> list[str]:
    return [run.settings.get(key, "") for key in keys]


# ---------------------------------------------------------------------------- tables


def table(curves: Sequence[Curve], legend: str, unit: Unit) -> str:
    """The end of every thick line, in Markdown; the curves are all of costs, or all of returns."""
    is_cost = curves[0].quantity == "cost"
    lines = by(curves, "panel", "label").values()
    middle_of = "mean" if max(map(len, lines)) < MIN_RUNS else "interquartile mean"
    heads = ["task", legend, "seeds", "until", f"{middle_of} of the {curves[0].quantity}s",
             "95 %", "each seed", *(["success"] if is_cost else [])]  # fmt: skip
    rows = [heads, ["---"] * len(heads)]
    for own in lines:
        x, values = together(own, unit)
        until, middle, ends, success = "no seed together with all others", "", "", ""
        last = values[:, -1] if len(x) else np.array([])
        if len(x):
            counted = "evaluation" if x[-1] == 1 else "evaluations"
            until = f"{x[-1]} {counted if is_cost else unit}"
            middle = f"{scores.iqm([last]):.2f}"
            if len(own) >= MIN_RUNS:
                ends = _interval(scores.interval([last], scores.iqm))
            limits = [curve.threshold for curve in own]
            if is_cost and None not in limits:
                rate = scores.rate_of(int((last < np.array(limits)).sum()), len(own))
                ends_of_rate = _interval((rate.low, rate.high))
                success = f"{rate.successes}/{rate.runs} ({ends_of_rate})"
        each = ", ".join(f"{value:.1f}" for value in last)
        row = [own[0].task, own[0].label, str(len(own)), until, middle, ends, each, success]
        rows.append(row[: len(heads)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _interval(ends: Sequence[float] | np.ndarray) -> str:
    return f"{ends[0]:.2f} to {ends[1]:.2f}"


def normalised(
    curves: Sequence[Curve], bounds: Sequence[float] | None
) -> tuple[dict[str, Scores], list[str]]:
    """Scores [seeds] of each line on the tasks that all lines have, and those tasks.

    A score is the end of the thick line of one seed, 0 at the first of the bounds and 1 at the
    second.

    Raises:
        UserError: no task has all lines, or its bounds are unknown.
    """
    lines = by(curves, "label")
    tasks = [
        panel for panel, own in by(curves, "panel").items()
        if {curve.label for curve in own} == lines.keys()
    ]  # fmt: skip
    if not tasks:
        raise UserError("no task has runs of all lines, so their scores cannot be compared")
    found: dict[str, Scores] = {}
    for label, own in lines.items():
        by_task = by(own, "panel")
        ends = {panel: together(by_task[panel])[1] for panel in tasks}
        for (task, quantity), values in ends.items():
            if bounds is None and (not task.startswith(SUITE) or quantity == "cost"):
                raise UserError(
                    f"the range of the {quantity}s of {task} is unknown: give --normalise LOW HIGH,"
                    " the values with scores 0 and 1"
                )
            if not values.size:
                raise UserError(f"the seeds of {label!r} in {task} have no step in common")
        low, high = bounds or SUITE_RANGE
        found[label] = [(values[:, -1] - low) / (high - low) for values in ends.values()]
    return found, [task for task, _ in tasks]


def score_table(lines: Mapping[str, Scores], legend: str) -> str:
    """The aggregates of every line with their intervals, in Markdown."""
    rows = [f"| {legend} | runs | {' | '.join(AGGREGATES)} |", "|---" * (2 + len(AGGREGATES)) + "|"]
    for label, own in lines.items():
        cells = []
        for statistic in AGGREGATES.values():
            ends = scores.interval(own, statistic) if has_interval(own) else None
            suffix = "" if ends is None else f" ({_interval(ends)})"
            cells.append(f"{statistic(own):.3f}{suffix}")
        rows.append(f"| {label} | {sum(map(len, own))} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    main()
