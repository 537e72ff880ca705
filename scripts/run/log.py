"""The logs of a run: CSV files that a resumed run continues, and TensorBoard events."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import (
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    filter_excluded_keys,
)

from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.run.errors import UserError

STEPS = "time/total_timesteps"  # the column that says when a row was logged, in every table


def is_weight(key: str) -> bool:
    """Whether a key is one of the many weights k of single nodes, which have their own table."""
    return key.startswith("k/")


def table_of(folder: Path, key: str) -> Path:
    """The CSV file of a run's folder that has a key as a column."""
    own = folder / "k.csv"  # older runs have no such file, but all columns in progress.csv
    return own if is_weight(key) and own.exists() else folder / "progress.csv"


class ResumableCSV(KVWriter):
    """Writer of a table, one row per dump and one column per key, which survives kills.

    Differs from SB3's CSVOutputFormat in three ways. An existing file is kept until
    `load_state_dict`, or the first row, determines which of its rows are valid. New columns are
    added by replacing the file atomically. Columns have a fixed order.

    Args:
        path: the file.
        holds: which keys it holds; a dump of none of them has no row. Steps are a column of every
            table.
    """

    def __init__(self, path: Path, holds: Callable[[str], bool] = lambda key: True) -> None:
        self.path, self.holds = path, holds
        self.keys: list[str] = []
        self.n_rows = 0

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        """Append a row."""
        values = filter_excluded_keys(key_values, key_excluded, "csv")
        row = {
            key: str(value)
            for key, value in values.items()
            if value is not None and (key == STEPS or self.holds(key))
        }
        if not row.keys() - {STEPS}:
            return
        new = sorted(row.keys() - set(self.keys))
        if new or not self.n_rows:
            rows = self._read()
            self.keys.extend(new)
            self._replace([*rows, row])
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.keys, lineterminator="\n").writerow(row)
        self.n_rows += 1

    def _read(self) -> list[dict[str, str]]:
        """The valid rows of the file."""
        if not self.n_rows:  # there may be no file yet
            return []
        try:
            with open(self.path, newline="") as file:
                rows = itertools.islice(csv.DictReader(file), self.n_rows)
                return [{key: row[key] for key in self.keys} for row in rows]
        except (KeyError, ValueError, csv.Error) as error:
            raise UserError(
                f"{self.path} is damaged ({type(error).__name__}: {str(error)[:100]}); restore it, "
                "or delete it to continue the run without its rows"
            ) from error

    def _replace(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path, text.getvalue())

    def close(self) -> None:
        """Do nothing; no file is kept open."""

    def state_dict(self) -> dict[str, Any]:
        """Number of rows and names of the columns, for a checkpoint."""
        return {"rows": self.n_rows, "keys": list(self.keys)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the checkpoint's last row; rows written after it are dropped."""
        self.keys, self.n_rows = list(state["keys"]), state["rows"]
        if not (isinstance(self.n_rows, int) and all(isinstance(key, str) for key in self.keys)):
            raise ValueError("it does not hold the columns and the number of rows of a table")
        if self.n_rows and not self.path.exists():
            print(f"{self.path} is gone: its first {self.n_rows} rows are lost, logging continues")
            self.n_rows = 0
        if self.n_rows:
            self._replace(self._read())


def make_logger(
    folder: Path, *, tensorboard: bool, first_step: int = 0, further: Sequence[KVWriter] = ()
) -> tuple[Logger, dict[str, ResumableCSV]]:
    """Make the logger of a run.

    Args:
        folder: the run's folder.
        tensorboard: whether to write TensorBoard events too.
        first_step: the step from which a run resumes; TensorBoard hides the events that an earlier
            process logged after it.
        further: writers that get everything, too.
    Returns:
        The logger, and its tables by their names in checkpoints, where their state belongs.
    """
    tables = {
        "table": ResumableCSV(folder / "progress.csv", lambda key: not is_weight(key)),
        "weights": ResumableCSV(folder / "k.csv", is_weight),
    }
    formats: list[KVWriter] = [*tables.values()]
    if tensorboard:
        events = TensorBoardOutputFormat(str(folder))
        if first_step:
            from torch.utils.tensorboard import SummaryWriter

            events.writer.close()
            events.writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        formats.append(events)
    return Logger(str(folder), [*formats, *further]), tables
