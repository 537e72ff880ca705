"""Studies that train every cell of a table with several seeds, and keep a row per run."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from totalprop.scripts.run.errors import UserError, continuing_later
from totalprop.scripts.run.folder import read_json
from totalprop.scripts.studies.sweep import check_runs, train_runs

Run = TypeVar("Run")
Row = dict[str, Any]  # of results.json


class Asked(NamedTuple):
    """What the command line of a study asks for.

    Attributes:
        options: as parsed; `seeds` are those of each cell.
        cells: what is trained.
        jobs: name of a run -> arguments of `totalprop train`; in their order.
        flags: what results.json has as "flags".
    """

    options: argparse.Namespace
    cells: Sequence[Any]
    jobs: Mapping[str, Sequence[str]]
    flags: Sequence[str]


def read_rows(out: Path, flags: Sequence[str], run_of: Callable[[Row], Run]) -> dict[Run, Row]:
    """The runs that a study's results.json holds; their folders may be elsewhere.

    Args:
        out: folder of results.json, with "flags" and a list of "runs".
        flags: what the runs must have been trained with.
        run_of: the run of a row.
    Returns:
        Run -> its row.
    Raises:
        UserError: it has results of other flags, which would be lost, or is not one of the study.
    """
    path = out / "results.json"
    if not path.exists():
        return {}
    record = read_json(path)
    try:
        found, rows = record["flags"], {run_of(row): row for row in record["runs"]}
    except (LookupError, TypeError) as error:
        raise UserError(
            f"{path} was not written by this study ({error!r}); move it away"
        ) from error
    if found != list(flags):
        raise UserError(
            f"{path} holds runs with the flags {shlex.join(found) or 'of the defaults'}; choose "
            "another --out, or move it away"
        )
    return rows


def train_cells(
    asked: Asked, run_of: Callable[[Row], tuple[Any, int]],
    report: Callable[[Asked, Path, Mapping[Any, Row]], None],
) -> None:  # fmt: skip
    """Start or resume what is not finished, and write the report.

    Args:
        asked: what the command line asks for.
        run_of: the cell and the seed of a row of results.json.
        report: writes the results, from what is asked for, the folder of the runs, and the rows
            that results.json held before.
    Raises:
        UserError: nothing could be trained, or there is nothing to report.
        SystemExit: some of the runs failed.
    """
    options = asked.options
    runs = options.runs or Path("runs") / options.out.resolve().name
    with continuing_later():
        check_runs(asked.jobs, runs, n_settings=len(asked.cells))
        failed, earlier = 0, read_rows(options.out, asked.flags, run_of)
        if not options.report_only:
            kept = {cell.name(seed) for cell, seed in earlier}
            failed = train_runs(asked.jobs, runs, options.jobs, kept=kept)
        report(asked, runs, earlier)
    if failed:
        raise SystemExit(f"error: {failed} of the runs failed; the report covers the others")
