"""The CSV files of studies that go on where they were stopped."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.run.program import current_commit

Key = tuple[str, ...]


class Measurements:
    """A CSV file that each row is added to as soon as it is measured, and once.

    Args:
        path: the file. It is read if it is there, and written with the first new row.
        settings: what all its rows have in common.
        keys: columns that say what was measured.
        values: columns that say what was found.
        command: the command that measures, recorded with the commit in the rows that it adds.

    Attributes:
        recorded: all settings that the file had, with its "runs"; empty if it was not there.
        rows: the values of each key, and the number of the run that measured them.

    Raises:
        UserError: the file cannot be read or written, or was measured with other settings.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        *,
        keys: Sequence[str],
        values: Sequence[str],
        command: str,
    ) -> None:
        self.path, self.settings = path, settings
        self.columns = (*keys, *values, "run")
        self.recorded: dict[str, Any] = {}
        self.rows: dict[Key, list[str]] = {}
        if path.exists():
            self.recorded, rows = read_measurements(path, self.columns)
            for name, value in settings.items():
                if (found := self.recorded.get(name)) != value:
                    raise UserError(
                        f"{path} was measured with {name} {found}, not {value}; choose another "
                        "--out, or delete the file"
                    )
            n = len(keys)
            for row in rows:
                cells = [row[column] for column in self.columns]
                self.rows[tuple(cells[:n])] = cells[n:]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {path.parent}: {error.strerror}") from error
        own = {"command": command, "commit": current_commit(), "torch": torch.__version__}
        runs = self.recorded.get("runs", [])
        self._runs: list[dict[str, str]] = runs if own in runs else [*runs, own]
        self._run = str(self._runs.index(own))

    def add(self, key: Key, values: Sequence[str]) -> None:
        """Add a row in place of an earlier one of its key, and write the file."""
        self.add_all({key: values})

    def add_all(self, rows: Mapping[Key, Sequence[str]]) -> None:
        """Add rows likewise, and write the file once."""
        self.rows |= {key: [*values, self._run] for key, values in rows.items()}
        self.write()

    def write(self) -> None:
        """Write all rows."""
        rows = [[*key, *values] for key, values in self.rows.items()]
        write_measurements(self.path, {**self.settings, "runs": self._runs}, self.columns, rows)


def read_measurements(
    path: Path, columns: Sequence[str]
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The settings and rows of a file; the settings have the "runs" that measured it.

    Raises:
        UserError: the file is not there, or not one with these columns.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; run without --report-only first")
    try:
        with open(path, newline="") as file:
            settings = json.loads(file.readline().removeprefix("#"))
            rows = list(csv.DictReader(file))
        settings["runs"]
        if missing := [name for name in columns for row in rows if not row.get(name)]:
            raise ValueError(f"a row without {missing[0]}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}; delete it to measure again") from error
    return settings, rows


def origin(settings: dict[str, Any]) -> str:
    """The commands and commits that measured a file, as a line of Markdown."""
    runs = [f"`{run['command']}`, commit {run['commit']}" for run in settings["runs"]]
    return f"Measured by {'; '.join(runs)}."


def write_measurements(
    path: Path, settings: dict[str, Any], columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """Write the settings (JSON in a comment) and the rows; replaces the file atomically."""
    file = io.StringIO(newline="")
    file.write(f"# {json.dumps(settings)}\n")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, file.getvalue())
