"""Where large arrays are kept (RAM, a file, a GPU), and how much fits there."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def available_bytes(place: torch.device | Path) -> int | None:
    """Bytes that a folder's disk, a GPU or the host can hold; None where unknown.

    For a disk and a GPU that is what is free now, for the host all of its memory, or the limit of
    the container.
    """
    if isinstance(place, Path):
        return shutil.disk_usage(place).free
    if place.type != "cpu":
        return torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else None
    limits = []
    with suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(ValueError, OSError):  # a container's limit; "max" if there is none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)


def allocate(shape: tuple[int, ...], dtype: np.dtype, place: torch.device | Path) -> Tensor:
    """An uninitialised array on a device or, memory-mapped, in a nameless file of a folder.

    RAM and disk are taken page by page, as the pages are first written.
    """
    if isinstance(place, Path):
        with tempfile.TemporaryFile(dir=place) as file:
            return torch.from_numpy(np.memmap(file, dtype, "w+", shape=shape))
    return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=place)


def format_bytes(size: int) -> str:
    """The size in GB or MB, for messages."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
