"""The CSV files of studies that go on where they were stopped."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from totalprop.agents.persistence.safe_file import write_text


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
