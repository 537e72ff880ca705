"""The C library's allocator, told to keep what a training step frees."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
TOP_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Reuse freed blocks of any size in this process from here on; False where that isn't glibc's.

    glibc hands large blocks back to the system when they are freed. A step of training frees and
    takes again gigabytes, and the system then has to clear and map them page by page: a third of
    the time of DreamerTPX's update from pixels, a fifth of PIPPS's policy gradient. The price: what
    was once used is not handed back before the process ends, so allocate what lives long before.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no such function; TypeError: Windows
        return False
    settings = ((M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD), (M_MMAP_MAX, 0))
    results = [mallopt(name, value) for name, value in settings]
    return all(results)
