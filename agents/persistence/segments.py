"""A ring buffer on disk, in segments: saving writes the rows that are new, not the whole ring."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from totalprop.agents.persistence import safe_file

KIND = "replay segment"
# Files of the agents' rings; older ones have no token.
SEGMENT = re.compile(r"(replay\d+|transitions)_\d+_\d+(_[0-9a-f]+)?\.zip")
Rows = Callable[[int, int], dict[str, np.ndarray]]  # (first, stop) -> arrays of stop - first rows


class RingFiles:
    """The segments of one ring: (first row, row after the last, file name), rows counted for ever.

    Args:
        name: begins the files' names; unique in the folder.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.segments: list[tuple[int, int, str]] = []

    def save(self, folder: Path, count: int, size: int, rows: Rows) -> list[tuple[int, int, str]]:
        """Write rows up to `count` that no segment holds; drop segments that the ring forgot.

        Args:
            count: rows ever added. size: rows that the ring holds at most.
            rows: reads rows that are in the ring.
        Returns:
            The segments that together hold the ring.
        """
        first = oldest = max(0, count - size)
        kept = []
        for segment in self.segments:  # up to the first that is missing: its rows and all newer
            start, stop, file = segment
            if stop <= oldest:
                continue
            if start > first or stop > count or not (folder / file).exists():
                break
            kept.append(segment)
            first = stop
        if first < count:
            # Another training may have been here: its rows of these numbers are others.
            token = secrets.token_hex(4)
            file = f"{self.name}_{first:012d}_{count:012d}_{token}.zip"
            safe_file.write(folder / file, KIND, rows(first, count))
            kept.append((first, count, file))
        self.segments = kept
        return list(kept)

    def load(
        self,
        folder: Path,
        segments: list[Any],
        size: int,
        put: Callable[[int, dict[str, np.ndarray]], None],
    ) -> None:
        """Read what `save` wrote; `put(first, arrays)` is called with the rows of the ring.

        Raises:
            BadFileError: a segment is damaged, does not hold the rows it is named after, or does
                not begin where the one before it ends.
        """
        self.segments = [(int(a), int(b), str(file)) for a, b, file in segments]
        count = self.segments[-1][1] if self.segments else 0
        expected = min(self.segments[0][0], max(0, count - size)) if self.segments else 0
        for first, stop, file in self.segments:
            if Path(file).name != file:
                raise safe_file.BadFileError(f"a segment is named {file!r}")
            if first != expected:
                raise safe_file.BadFileError(
                    f"rows {expected} to {first} are in no file (was the buffer smaller?)"
                )
            expected = stop
            arrays = safe_file.read(folder / file, KIND)
            if any(len(array) != stop - first for array in arrays.values()):
                raise safe_file.BadFileError(f"{file} does not hold {stop - first} rows")
            skip = max(0, count - size - first)  # overwritten in the ring since
            put(first + skip, {name: array[skip:] for name, array in arrays.items()})
