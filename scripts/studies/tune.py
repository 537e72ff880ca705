"""Hyperparameter search of `totalprop sweep --tune`: Optuna proposes, the sweep's executor trains.

A proposal is trained on all seeds of the search, which are not those of any report, and judged by
the mean of the final evaluations. Optuna's own file of the study, study.log, is all that a stopped
search needs to continue, and what its dashboard shows.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from totalprop.agents import AGENTS
from totalprop.agents.core import figures
from totalprop.agents.core.validation import is_finite
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.run.arguments import parse
from totalprop.scripts.run.environments import import_flag
from totalprop.scripts.run.errors import UsageError, UserError
from totalprop.scripts.run.folder import read_json
from totalprop.scripts.studies.executors import Executor, Trial
from totalprop.scripts.studies.grid import Grid, Setting
from totalprop.scripts.studies.live import watched

if TYPE_CHECKING:  # an extra
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

FIRST_SEED = 100  # of a search: those below are for reports
SHOWN = 10  # proposals in table.md
RANGE = re.compile(r"(?P<low>.+?)\.\.(?P<high>.+?)(?P<log>:log)?")
SPACE, VALUES = "totalprop:space", "totalprop:values {}"  # attributes of a study


class Space(NamedTuple):
    """What a search varies.

    Attributes:
        distributions: flag without dashes -> Optuna's distribution of its values.
        ends: flag -> two of its values, the ends of a range.
    """

    distributions: dict[str, BaseDistribution]
    ends: dict[str, tuple[str, str]]


def check_installed() -> None:
    """Raise a UserError if Optuna is missing."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError("--tune needs optuna: pip install 'totalprop[tune]'")


def space_of(grid: Grid) -> Space:
    """The search space that a grid's axes describe: `low..high`, `low..high:log`, or choices.

    A range of whole numbers has whole numbers only.

    Raises:
        UsageError: a range is none, several agents are named, or a seed is one of a report.
    """
    from optuna import distributions

    if len(grid.agents) > 1:
        raise UsageError(f"--tune searches for one agent, got {' '.join(grid.agents)}")
    if reported := [seed for seed in grid.seeds if seed < FIRST_SEED]:
        raise UsageError(
            f"--tune needs seeds that no report uses, from {FIRST_SEED} on, got {reported[0]}"
        )
    found: dict[str, BaseDistribution] = {}
    ends: dict[str, tuple[str, str]] = {}
    for flag, values in grid.axes.items():
        match = RANGE.fullmatch(values[0]) if len(values) == 1 else None
        if match is None:
            found[flag] = distributions.CategoricalDistribution(tuple(values))
            ends[flag] = values[0], values[-1]
            continue
        low, high, is_log = match["low"], match["high"], match["log"] is not None
        try:
            if all(re.fullmatch(r"-?\d+", end) for end in (low, high)):
                found[flag] = distributions.IntDistribution(int(low), int(high), is_log)
            else:
                found[flag] = distributions.FloatDistribution(float(low), float(high), is_log)
        except ValueError as error:
            raise UsageError(
                f"--{flag}: {values[0]} is not a range such as 0.9..0.99 or 1e-5..1e-2:log "
                f"({error})"
            ) from error
        ends[flag] = low, high
    return Space(found, ends)


def check_ends(grid: Grid, space: Space) -> None:
    """Exit as `totalprop train` would where it refuses an end of a range, or a choice."""
    first = {flag: values[0] for flag, values in space.ends.items()}
    for flag, (_, last) in space.ends.items():
        values = [*grid.axes[flag]] if len(grid.axes[flag]) > 1 else [last]
        for value in (first[flag], *values):
            setting = Setting("", grid.agents[0], {**first, flag: value}, grid.flags)
            parse(setting.command(grid.seeds[0]), usage="")


class Search:
    """A search on its way: which runs are to be trained, and what becomes of their results.

    Args:
        options: those of the sweep: out, runs and tune.
        grid: agent, axes, seeds and flags.
    Raises:
        UserError: the study in --out is one of another space, or study.log is not Optuna's.
    """

    def __init__(self, options: argparse.Namespace, grid: Grid) -> None:
        self.options, self.grid = options, grid
        self.agent = grid.agents[0]
        self.quantity = AGENTS[self.agent].quantity
        self.space = space_of(grid)
        check_ends(grid, self.space)
        self.study = self._open()
        self.runs: list[Trial] = []  # that were handed out
        self._proposals: dict[str, tuple[int, int]] = {}  # name of a run -> proposal, seed
        self._values: dict[int, dict[int, float]] = {}  # proposal -> seed -> final value

    def _open(self) -> Study:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.options.out.mkdir(parents=True, exist_ok=True)
        path = self.options.out / "study.log"
        space = [self.grid.command(), list(self.grid.seeds), list(self.grid.flags)]
        try:
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(path))),
                study_name=f"totalprop-{self.agent}",
                direction="minimize" if self.quantity == "cost" else "maximize",
                load_if_exists=True,
            )
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{path} is not Optuna's ({error}); move it away") from error
        known = study.user_attrs.get(SPACE, space)
        if known != space:
            raise UserError(
                f"{path} is a search of `{known[0]}` on the seeds {known[1]} with the flags "
                f"{shlex.join(known[2]) or 'of the defaults'}; choose another --out"
            )
        study.set_user_attr(SPACE, space)
        # The state of a sampler is not in the file: seeded alike, it would repeat its proposals.
        study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
        return study

    def __iter__(self) -> Iterator[Trial]:
        """The runs, each proposed when it is asked for; those of a stopped search first."""
        from optuna.trial import TrialState

        for begun in self.study.get_trials(states=[TrialState.RUNNING]):
            yield from self._runs_of(begun.number, begun.params)
        while len(self.study.get_trials(deepcopy=False)) < self.options.tune:
            asked = self.study.ask(self.space.distributions)
            yield from self._runs_of(asked.number, asked.params)

    def _runs_of(self, number: int, params: Mapping[str, Any]) -> Iterator[Trial]:
        values = {flag: str(value) for flag, value in params.items()}
        setting = Setting(f"trial{number:03d}", self.agent, values, self.grid.flags)
        for seed in self.grid.seeds:
            name = setting.run_name(seed)
            self._proposals[name] = number, seed
            self.runs.append(
                Trial(name, str(self.options.runs), tuple(setting.command(seed)), os.getcwd())
            )
            yield self.runs[-1]

    def take(self, run: Trial, succeeded: bool) -> None:
        """Note a run's result; with the last of a proposal's seeds, Optuna is told."""
        from optuna.trial import TrialState

        number, seed = self._proposals[run.name]
        summary = read_json(run.folder / "summary.json") if succeeded else {}
        found: Any = summary.get(f"final_{self.quantity}")
        value = float(found) if is_finite(found) else float("nan")
        values = self._values.setdefault(number, {})
        values[seed] = value
        if len(values) < len(self.grid.seeds):
            return
        mean = float(np.mean(list(values.values())))
        if np.isfinite(mean):
            self.study.set_user_attr(
                VALUES.format(number), [values[seed] for seed in self.grid.seeds]
            )
            told = self.study.tell(number, mean)
            best = self.study.best_trial
            print(
                f"trial {number}: {mean:.4g}, best {best.value:.4g} (trial {best.number}); "
                f"{_shown(told.params)}", flush=True,
            )  # fmt: skip
        else:
            self.study.tell(number, state=TrialState.FAIL)
            print(f"trial {number}: failed, see {run.log}", flush=True)

    def values(self, trial: FrozenTrial) -> list[float]:
        """The final values of a proposal, by seed."""
        found: list[float] = self.study.user_attrs[VALUES.format(trial.number)]
        return found


def tune(options: argparse.Namespace, grid: Grid, executor: Executor) -> None:
    """Search until there are as many proposals as --tune says, and write the report.

    Args:
        options: of the sweep.
        grid: whose axes are the space.
        executor: starts the runs.
    Raises:
        UserError: no proposal succeeded.
    """
    search = Search(options, grid)
    if not options.report_only:
        workers = options.jobs or os.cpu_count() or 1
        with watched(search.runs, total=options.tune * len(grid.seeds)) as end:
            for run, succeeded in executor(search, workers):
                search.take(run, succeeded)
                end(run, succeeded)
    report(options, search)


def report(options: argparse.Namespace, search: Search) -> None:
    """Write trials.csv, table.md, tuning.png and best.json."""
    from optuna.trial import TrialState

    out, study = options.out, search.study
    done = study.get_trials(states=[TrialState.COMPLETE])
    failed = len(study.get_trials(states=[TrialState.FAIL]))
    if not done:
        raise UserError(f"no proposal succeeded; see the .log files in {options.runs}")
    ranked = sorted(done, key=_value, reverse=search.quantity != "cost")
    best = ranked[0]
    write_text(out / "trials.csv", _rows(ranked, search))
    table = _table(ranked, failed, search)
    write_text(out / "table.md", table)
    figures.save(_figure(done, search), out / "tuning.png", dpi=150)
    config = options.runs / f"trial{best.number:03d}_seed{search.grid.seeds[0]}" / "config.json"
    then = ""
    if config.exists():  # else the runs are on another machine
        flag = import_flag(str(read_json(config).get("env_id", "")))
        then = f" --{flag}" if flag else ""
        write_text(out / "best.json", config.read_text())
    print(
        f"{table}\nwritten to {out}: study.log, trials.csv, table.md, tuning.png, best.json\n"
        f"Next: totalprop sweep {search.agent} --vary config --values {out / 'best.json'} "
        f"--seeds 0 1 2 3 --out {out / 'reported'}{then}   (the best on seeds of its own)"
    )


def _value(trial: FrozenTrial) -> float:
    value: float | None = trial.value
    assert value is not None
    return value


def _shown(params: Mapping[str, Any]) -> str:
    """Parameters with four digits."""
    return ", ".join(
        f"{flag} {value:.4g}" if isinstance(value, float) else f"{flag} {value}"
        for flag, value in params.items()
    )


def _rows(ranked: list[FrozenTrial], search: Search) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = [f"{search.quantity}_seed{seed}" for seed in search.grid.seeds]
    writer.writerow(["trial", f"mean_{search.quantity}", *seeds, *search.space.distributions])
    for trial in ranked:
        params = [trial.params[flag] for flag in search.space.distributions]
        writer.writerow([trial.number, trial.value, *search.values(trial), *params])
    return text.getvalue()


def _table(ranked: list[FrozenTrial], failed: int, search: Search) -> str:
    flags = list(search.space.distributions)
    lines = [
        f"# Search: {len(ranked)} proposals, {failed} failed", "",
        f"`{search.grid.command()} --seeds {' '.join(map(str, search.grid.seeds))} "
        f"--tune {search.options.tune}`"
        + (f" with `{shlex.join(search.grid.flags)}`" if search.grid.flags else ""), "",
        f"The best of several is better than it will be on new seeds: report the {search.quantity} "
        "of those.", "",
        f"| trial | final {search.quantity}, mean | per seed | {' | '.join(flags)} |",
        "|---" * (3 + len(flags)) + "|",
    ]  # fmt: skip
    for trial in ranked[:SHOWN]:
        each = ", ".join(f"{value:.4g}" for value in search.values(trial))
        values = (trial.params[flag] for flag in flags)
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
        lines.append(f"| {trial.number} | {trial.value:.4g} | {each} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figure(done: list[FrozenTrial], search: Search) -> Figure:
    """Value by proposal, with the best so far, and by each parameter."""
    from optuna.distributions import CategoricalDistribution

    spaces = search.space.distributions
    columns = min(1 + len(spaces), 4)
    rows = -(-(1 + len(spaces)) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.0 * rows), layout="constrained")
    figure.suptitle(
        f"{search.agent}: settings that were tried, seeds: {', '.join(map(str, search.grid.seeds))}"
    )
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    numbers, values = [trial.number for trial in done], np.array([_value(t) for t in done])
    bests = (np.minimum if search.quantity == "cost" else np.maximum).accumulate(values)
    axes[0].plot(numbers, values, "o", ms=4, alpha=0.7)
    axes[0].step(numbers, bests, where="post", color="k", lw=1, label="best so far")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="trial", ylabel=f"final {search.quantity}, mean over seeds")
    axes[0].legend(frameon=False, fontsize="small")
    for axis, (flag, own) in zip(axes[1:], spaces.items()):
        x = [trial.params[flag] for trial in done]
        if isinstance(own, CategoricalDistribution):
            order = [str(choice) for choice in own.choices]
            axis.plot([order.index(value) for value in x], values, "o", ms=4, alpha=0.7)
            axis.set_xticks(range(len(order)), order, rotation=30 if len(order) > 3 else 0)
            axis.set_xlim(-0.5, len(order) - 0.5)
        else:
            axis.plot(x, values, "o", ms=4, alpha=0.7)
            if getattr(own, "log", False):
                axis.set_xscale("log")
                # Below a decade its ticks have long labels, such as 3 x 10^-4.
                axis.tick_params(axis="x", which="both", labelrotation=30)
            else:
                axis.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axis.set(xlabel=flag)
    for axis in axes[1 + len(spaces) :]:
        axis.set_visible(False)
    for axis in axes:
        axis.grid(alpha=0.25)
    return figure
