"""Reads the files of Weights & Biases's offline mode, for which wandb has no reader in Python.

A file is a log of LevelDB's format after a header of 7 bytes: blocks of 32 KiB, of records with a
checksum, a length and a type. What they hold is wandb's own protocol buffers.
"""

import json
import struct
from pathlib import Path

BLOCK, HEADER = 32 * 1024, 7
FULL, FIRST, LAST = 1, 2, 4


def records(path: Path):
    """The records of a file, in their order; one that was being written at a kill is left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), HEADER, []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # too few bytes for another header: padding
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        chunk = data[at + 7 : at + 7 + length]
        if kind == 0 or len(chunk) < length:
            return
        parts = [chunk] if kind in (FULL, FIRST) else [*parts, chunk]
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(b"".join(parts))
            yield record
        at += 7 + length


def values(items) -> dict:
    """Key, of one part or more -> value of wandb's lists of items."""
    return {tuple(i.nested_key) or (i.key,): json.loads(i.value_json) for i in items}
