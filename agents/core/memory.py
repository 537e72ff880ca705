"""Setting of the C library's allocator: keep the memory that a gradient step frees."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h of glibc
TOP_PAD = 64 * 2**20
MADV_HUGEPAGE = 14  # mman.h of Linux
HUGE_PAGE = 2 * 2**20
RESERVED = 512 * 2**20  # of addresses; a page takes memory when it is first used


def keep_freed_memory() -> bool:
    """Make this process reuse freed blocks of any size; it needs glibc.

    By default glibc returns large blocks to the operating system when they are freed. A gradient
    step frees and allocates gigabytes again, and the system has to clear and map them page by page:
    a third of the time of DreamerTPX's update from pixels, a fifth of PIPPS's policy gradient. In
    exchange, freed memory is not returned before the process ends. So call this after allocating
    what lives long.

    A freed block serves any request that fits into it. PyTorch asks for memory aligned to 64 bytes,
    for which glibc needs a block larger by the alignment, so an equal request may take new memory
    the first few times (up to 7 of 128 MiB were seen).

    Returns:
        Whether the setting took effect.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc; TypeError on Windows
        return False
    settings = ((M_TRIM_THRESHOLD, -1), (M_TOP_PAD, TOP_PAD), (M_MMAP_MAX, 0))
    results = [mallopt(name, value) for name, value in settings]
    _reserve_huge_pages(RESERVED)
    return all(results)


def _reserve_huge_pages(size: int) -> None:
    """Put what the process allocates next on pages of 2 MiB, where the system lets it ask for them.

    A gradient step walks through tens of megabytes of small matrices and back, and the processor
    caches the addresses of some thousand pages. The block is freed at once, and its addresses serve
    the following requests. Only addresses are reserved: resident memory stays what it was.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if not block:
        return
    first = -(-block // HUGE_PAGE) * HUGE_PAGE
    last = (block + size) // HUGE_PAGE * HUGE_PAGE
    libc.madvise(first, last - first, MADV_HUGEPAGE)  # without effect where it is refused
    libc.free(block)
