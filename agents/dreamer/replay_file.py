"""The .npz file of a replay: arrays in blocks of rows, all checked before the first is copied.

Members are `layout`, `filled` (rows of each environment) and NAME/ENVIRONMENT/FIRST_ROW, stored
without compression, so that reading one takes no more memory than it takes in the file.
"""

from __future__ import annotations

import math
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from totalprop.agents.persistence.safe_file import (
    UNREADABLE,
    BadFileError,
    check_regular,
    in_one_line,
    shown,
)

Fields = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # name -> shape and dtype of one row


class Block(NamedTuple):
    """Rows `start` to `stop` - 1 of one array of an environment."""

    name: str
    env: int
    start: int
    stop: int
    member: zipfile.ZipInfo


def write_member(file: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Add an array."""
    with file.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def layout_and_filled(path: Path) -> tuple[str, np.ndarray]:
    """What a saved replay is of, and how many rows it holds of each environment.

    Raises:
        ValueError: the file is not a replay.
    """
    with _opened(path) as file:
        members = {member.filename: member for member in file.infolist()}
        layout, filled = (_small(file, members.get(f"{x}.npy")) for x in ("layout", "filled"))
        if layout.dtype.kind != "U" or layout.shape != ():
            raise BadFileError("its layout is not a text")
        if filled.dtype.kind not in "iu" or filled.ndim != 1:
            raise BadFileError("its counts of entries are not whole numbers")
    return layout.item(), filled


def checked_blocks(path: Path, filled: list[int], fields: Fields) -> list[Block]:
    """All blocks, after a check that together they hold every row once and nothing else.

    Args:
        path: the file.
        filled: rows of each environment.
        fields: the arrays.

    Raises:
        ValueError: an array is missing, incomplete, or of another shape or dtype.
    """
    with _opened(path) as file:
        blocks = [
            _block(file, member, fields, len(filled))
            for member in file.infolist()
            if member.filename not in ("layout.npy", "filled.npy")
        ]
        blocks.sort(key=lambda block: block[:3])
        of_each: dict[tuple[str, int], list[Block]] = defaultdict(list)
        for block in blocks:
            of_each[block.name, block.env].append(block)
        for name in fields:
            for env, rows in enumerate(filled):
                _check_cover(name, env, rows, of_each[name, env])
    return blocks


def read_blocks(path: Path, blocks: list[Block]) -> Iterator[tuple[Block, np.ndarray]]:
    """The rows of each block."""
    with _opened(path) as file:
        for block in blocks:
            with file.open(block.member) as content:
                yield block, np.lib.format.read_array(content, allow_pickle=False)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the zip; a sentence that names the file stands for whatever is wrong with it."""
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as file:
            yield file
    except (zipfile.BadZipFile, EOFError, *UNREADABLE) as error:
        raise BadFileError(
            f"{path} is not a replay that `save` wrote ({in_one_line(error, 200)})"
        ) from error


def _small(file: zipfile.ZipFile, member: zipfile.ZipInfo | None) -> np.ndarray:
    if member is None:
        raise BadFileError("it lacks its layout, or the number of its entries")
    shape, dtype = _header(file, member)
    if dtype.hasobject or member.file_size > 2**20:
        raise BadFileError(f"{member.filename} holds {dtype} of {shape}")
    with file.open(member) as content:
        return np.lib.format.read_array(content, allow_pickle=False)


def _header(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a member, whose bytes have to be exactly those of such an array."""
    sizes = member.compress_size, member.file_size
    if member.compress_type != zipfile.ZIP_STORED or sizes[0] != sizes[1]:
        raise BadFileError("its members are compressed, which `save` never does")
    with file.open(member) as content:
        version = np.lib.format.read_magic(content)
        if version != (1, 0):
            raise BadFileError(f"{shown(member.filename)} has .npy version {version}")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(content)
        size = content.tell()
    if is_fortran or size + dtype.itemsize * math.prod(shape) != member.file_size:
        raise BadFileError(f"{shown(member.filename)} is not as long as its header says")
    return shape, dtype


def _block(file: zipfile.ZipFile, member: zipfile.ZipInfo, fields: Fields, n_envs: int) -> Block:
    name, *place = member.filename.removesuffix(".npy").split("/")
    if name not in fields or len(place) != 2 or not all(p.isdecimal() for p in place):
        raise BadFileError(f"it has the unknown member {shown(member.filename)}")
    env, start = map(int, place)
    shape, dtype = _header(file, member)
    expected, kind = fields[name]
    if env >= n_envs or shape[1:] != expected or len(shape) != 1 + len(expected) or dtype != kind:
        raise BadFileError(
            f"{shown(member.filename)} holds {dtype} of {shape}, expected {kind} of "
            f"(entries, {', '.join(map(str, expected))}) of {n_envs} environment(s)"
        )
    return Block(name, env, start, start + shape[0], member)


def _check_cover(name: str, env: int, rows: int, blocks: list[Block]) -> None:
    """The blocks of an array must hold every row once: the others would be uninitialised memory."""
    end = 0
    for block in blocks:
        if block.start != end or block.stop <= end:
            break
        end = block.stop
    if end != rows or sum(b.stop - b.start for b in blocks) != rows:
        raise BadFileError(f"{name} of environment {env} does not hold its {rows:,} entries")
