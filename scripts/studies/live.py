"""How far the runs of a sweep are: a table on a terminal, elsewhere lines."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.live import Live
from rich.table import Table

from totalprop.scripts.run.progress import said
from totalprop.scripts.studies.executors import Trial


@contextlib.contextmanager
def watched(
    trials: Sequence[Trial], total: int | None = None
) -> Iterator[Callable[[Trial, bool], None]]:
    """Show runs while they are trained.

    Args:
        trials: the runs, to which more may be added.
        total: how many there will be; None for those that are there.
    Yields:
        A function to be called with each run that ends, and whether it is finished.
    """
    ended: dict[str, bool] = {}
    is_drawn, total = sys.stdout.isatty(), len(trials) if total is None else total

    def end(trial: Trial, succeeded: bool) -> None:
        ended[trial.name] = succeeded
        if not is_drawn:
            result = "done" if succeeded else f"FAILED, see {trial.log}{_last_words(trial)}"
            print(f"{trial.name}: {result}", flush=True)

    with contextlib.ExitStack() as stack:
        if is_drawn:
            stack.enter_context(
                Live(get_renderable=lambda: table(trials, ended, total), refresh_per_second=1)
            )
        else:
            stack.enter_context(said(lambda: f"{len(ended)} of {total} runs"))
        yield end


def table(trials: Sequence[Trial], ended: Mapping[str, bool], total: int) -> Table:
    """The runs that are trained now, those that failed, and how many are done."""
    failed = [trial for trial in trials if ended.get(trial.name) is False]
    running = [trial for trial in trials if trial.name not in ended and trial.is_running]
    drawn = Table(
        caption=f"{sum(ended.values())} of {total} runs done, {len(running)} running, "
        f"{len(failed)} failed",
        caption_justify="left",
    )
    for column in ("run", "", "decisions", "return"):
        drawn.add_column(column, justify="right" if column in ("decisions", "return") else "left")
    for trial in failed:
        drawn.add_row(trial.name, f"failed, see {trial.log}{_last_words(trial)}")
    for trial in running:
        drawn.add_row(trial.name, "running", *_newest_evaluation(trial))
    return drawn


def _last_words(trial: Trial) -> str:
    """The last line of a run's log, which says why it failed."""
    try:
        lines = trial.log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return f" ({lines[-1][:200]})" if lines else ""


def _newest_evaluation(trial: Trial) -> tuple[str, str]:
    try:
        record = json.loads((trial.folder / "evaluations.json").read_text())
        options = json.loads((trial.folder / "config.json").read_text())["options"]
        steps = f"{record['timesteps'][-1]:,} of {options['total_timesteps']:,}"
        return steps, f"{statistics.fmean(record['returns'][-1]):.1f}"
    except (OSError, LookupError, TypeError, ValueError):  # there is none yet
        return "", ""
