"""Where large arrays live (the host's memory, a file, a GPU), and how much fits there."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def room(home: torch.device | Path) -> int | None:
    """Bytes that a disk, a GPU or the host has for a replay; None where unknown."""
    if isinstance(home, Path):
        return shutil.disk_usage(home).free
    if home.type != "cpu":
        return torch.cuda.mem_get_info(home)[0] if home.type == "cuda" else None
    limits = []
    with suppress(AttributeError, ValueError, OSError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(ValueError, OSError):  # of a container; "max" where there is no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)


def allocate(shape: tuple[int, ...], dtype: np.dtype, home: torch.device | Path) -> Tensor:
    """An array whose pages are taken when they are first written."""
    if isinstance(home, Path):
        with tempfile.TemporaryFile(dir=home) as file:
            return torch.from_numpy(np.memmap(file, dtype, "w+", shape=shape))
    return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, device=home)


def size_text(size: int) -> str:
    """In GB or MB, for people."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
