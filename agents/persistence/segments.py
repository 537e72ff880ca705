"""Segment files of a ring buffer: saving it writes the new rows, not the whole ring."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from totalprop.agents.persistence import safe_file

KIND = "replay segment"
# Names of the agents' segments; older versions wrote them without the token.
SEGMENT = re.compile(r"(replay\d+|transitions)_\d+_\d+(_[0-9a-f]+)?\.zip")
Rows = Callable[[int, int], dict[str, np.ndarray]]  # (first, stop) -> arrays of stop - first rows


class Segments:
    """The files that hold one ring buffer. Rows are numbered from the first ever added.

    Args:
        name: prefix of the file names; unique in the folder.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[tuple[int, int, str]] = []  # first row, row after the last, file name

    def save(self, folder: Path, count: int, size: int, rows: Rows) -> list[tuple[int, int, str]]:
        """Write the rows that no segment holds yet; drop segments that the ring has overwritten.

        Args:
            folder: where the segments are.
            count: rows ever added.
            size: capacity of the ring, in rows.
            rows: reads rows that are still in the ring.

        Returns:
            The segments that together hold the ring: (first row, row after the last, file name).
        """
        first = oldest = max(0, count - size)
        kept = []
        for segment in self.entries:
            start, stop, file = segment
            if stop <= oldest:
                continue
            # If a segment is missing, its rows and all newer ones are written again.
            if start > first or stop > count or not (folder / file).exists():
                break
            kept.append(segment)
            first = stop
        if first < count:
            # Another run may have left segments here: same row numbers, different rows.
            token = secrets.token_hex(4)
            file = f"{self.name}_{first:012d}_{count:012d}_{token}.zip"
            safe_file.write(folder / file, KIND, rows(first, count))
            kept.append((first, count, file))
        self.entries = kept
        return list(kept)

    def load(
        self,
        folder: Path,
        segments: list[Any],
        size: int,
        put: Callable[[int, dict[str, np.ndarray]], None],
    ) -> None:
        """Read the segments and pass their rows to `put`, oldest first.

        Args:
            folder: where the segments are.
            segments: what `save` returned.
            size: capacity of the ring, in rows. Older rows are skipped.
            put: stores the arrays of consecutive rows, given the number of the first.

        Raises:
            BadFileError: a segment is damaged, does not hold the rows that its name states, or does
                not begin where the previous one ends.
        """
        self.entries = [(int(a), int(b), str(file)) for a, b, file in segments]
        if len({file for *_, file in self.entries}) < len(self.entries):
            raise safe_file.BadFileError("two segments have the same name")
        count = self.entries[-1][1] if self.entries else 0
        expected = min(self.entries[0][0], max(0, count - size)) if self.entries else 0
        for first, stop, file in self.entries:
            if Path(file).name != file:
                raise safe_file.BadFileError(f"a segment is named {file!r}")
            if first != expected:
                raise safe_file.BadFileError(
                    f"rows {expected} to {first} are in no file (was the buffer smaller?)"
                )
            if stop <= first:
                raise safe_file.BadFileError(f"{file} has rows {first} to {stop}")
            expected = stop
            if stop <= count - size:  # the ring has since overwritten all of them
                continue
            arrays = safe_file.read(folder / file, KIND)
            is_right = all(
                isinstance(array, np.ndarray) and array.shape[:1] == (stop - first,)
                for array in arrays.values()
            )
            if not is_right:
                raise safe_file.BadFileError(f"{file} does not hold {stop - first} rows")
            skip = max(0, count - size - first)  # rows that the ring has since overwritten
            put(first + skip, {name: array[skip:] for name, array in arrays.items()})
