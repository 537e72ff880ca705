"""Segments: what is written, what is left out, and what is refused."""

import numpy as np
import pytest

from totalprop.agents.persistence import safe_file
from totalprop.agents.persistence.segments import Segments


def test_a_ring_is_saved_in_segments_that_hold_what_changed(tmp_path):
    size, data = 10, np.arange(100)

    def rows(first, stop):
        return {"x": data[first:stop]}

    ring = Segments("ring")
    for count, expected in (
        (4, [(0, 4)]), (4, [(0, 4)]), (9, [(0, 4), (4, 9)]), (13, [(0, 4), (4, 9), (9, 13)]),
        (15, [(4, 9), (9, 13), (13, 15)]), (40, [(30, 40)]),
    ):  # fmt: skip
        segments = ring.save(tmp_path, count, size, rows)
        assert [(a, b) for a, b, _ in segments] == expected
        found = np.full(size, -1)

        def put(first, arrays, found=found):
            found[np.arange(first, first + len(arrays["x"])) % size] = arrays["x"]

        loaded = Segments("ring")
        loaded.load(tmp_path, segments, size, put)
        kept = np.arange(max(0, count - size), count)
        assert (found[kept % size] == kept).all()
        assert loaded.entries == segments


def test_a_segment_that_lies_is_refused(tmp_path):
    safe_file.write(tmp_path / "a.zip", "replay segment", {"x": np.zeros(3)})
    wrong = [
        [(0, 4, "a.zip")], [(0, 3, "../a.zip")], [(0, 3, "a.zip"), (3, 6, "a.zip")],
        [(0, 0, "a.zip")], [(0, -3, "a.zip")],
    ]  # fmt: skip
    for segments in wrong:
        with pytest.raises(safe_file.BadFileError):
            Segments("a").load(tmp_path, segments, 10, lambda *_: None)


def test_a_segment_that_was_lost_is_written_again(tmp_path):
    def rows(first, stop):
        return {"x": np.arange(first, stop)}

    ring = Segments("ring")
    for count in (4, 9, 13):
        segments = ring.save(tmp_path, count, 20, rows)
    (tmp_path / segments[1][2]).unlink()
    segments = ring.save(tmp_path, 15, 20, rows)
    assert [(a, b) for a, b, _ in segments] == [(0, 4), (4, 15)]


def test_segments_with_a_gap_are_refused(tmp_path):
    """The rows in the gap would hold whatever was in memory."""
    ring = Segments("ring")
    for count in (4, 9, 13):
        segments = ring.save(tmp_path, count, 20, lambda a, b: {"x": np.arange(a, b)})
    for gap in (segments[1:], [segments[0], segments[2]]):
        with pytest.raises(safe_file.BadFileError, match="are in no file"):
            Segments("ring").load(tmp_path, gap, 20, lambda *_: None)
