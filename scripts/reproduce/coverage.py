"""How many runs of a step its file holds, and whether they are those that the step asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from totalprop.scripts.commands import parser_of
from totalprop.scripts.flag_types import split_flags
from totalprop.scripts.run.arguments import parse as parse_train
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.folder import read_json
from totalprop.scripts.studies import dreamer, pipps_table
from totalprop.scripts.studies.cells import read_rows
from totalprop.scripts.studies.grid import read_grid
from totalprop.scripts.studies.plot import swept

STUDIES = {"study dreamer": dreamer, "study pipps-table": pipps_table}


class Coverage(NamedTuple):
    """Runs that a file holds, of those that are wanted."""

    found: int
    wanted: int


def coverage(command: str, arguments: Sequence[str], path: Path) -> Coverage:
    """Count the runs that a file holds of those that a command asks for.

    Args:
        command: "sweep", "study dreamer" or "study pipps-table".
        arguments: of it.
        path: its results.json.
    Raises:
        UserError: the file is not one of the command, or its runs have other flags.
    """
    if command == "sweep":
        return _of_sweep(arguments, path)
    study = STUDIES[command]
    asked = study.parse(arguments)
    rows = read_rows(path.parent, asked.flags, study.run_of)
    wanted = {(cell, seed) for cell in asked.cells for seed in asked.options.seeds}
    return Coverage(len(wanted & rows.keys()), len(wanted))


def _of_sweep(arguments: Sequence[str], path: Path) -> Coverage:
    before, after = split_flags(arguments)
    grid = read_grid(parser_of("sweep").parse_args(before), after)
    record = read_json(path)
    try:
        command, results = record["command"], record["results"]
        seeds = {label: {int(seed) for seed in own} for label, own in results.items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} was not written by a sweep ({error!r})") from error
    found = 0
    for label, setting in grid.settings().items():
        if label not in seeds:
            continue
        found += len(seeds[label] & set(grid.seeds))
        wanted, own = parse_train(setting.command(0), usage="").flags(), swept(command, label, path)
        for name, value in own[0].flags().items():
            if name in wanted and value != wanted[name]:  # older runs have fewer flags
                raise UserError(
                    f"{path} has runs with {name}={value!r} of {label}, not {wanted[name]!r}, as "
                    "this reproduction needs: move it away, or leave --from out"
                )
    return Coverage(found, len(grid.settings()) * len(grid.seeds))
