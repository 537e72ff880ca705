"""Resize images by area: each pixel of the result is the mean of what it covers.

This is what OpenCV's INTER_AREA does when it shrinks an image. It does not alias, as picking or
interpolating single pixels would.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

LARGEST_EXACT = 2**24  # all whole numbers up to it are exact in float32


def area_resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resize images to squares; the aspect ratio is not kept.

    The means are taken in whole numbers, and rounded once, to the nearest (halves to even). So they
    are exact, and the same on every machine.

    Args:
        images: [..., H, W] uint8.
        size: pixels of each side of the result.

    Returns:
        [..., size, size] uint8.
    """
    left, right, area = _factors(*images.shape[-2:], size)
    return np.rint(left @ images.astype(left.dtype) @ right / area).astype(np.uint8)


def area_resize_tensors(images: Tensor, size: int) -> Tensor:
    """`area_resize` by operations on tensors, for graphs."""
    *factors, area = _factors(*images.shape[-2:], size)
    left, right = map(torch.tensor, factors)
    return (left @ images.to(left.dtype) @ right / area).round().to(torch.uint8)


@functools.lru_cache(maxsize=16)
def _factors(height: int, width: int, size: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Factors [size, H] and [W, size] that sum what a pixel covers, and how much that is.

    Their dtype holds every sum exactly.
    """
    rows, cols = _overlaps(height, size), _overlaps(width, size)
    area = int(rows[0].sum() * cols[0].sum())
    dtype = np.float32 if 255 * area < LARGEST_EXACT else np.float64
    return rows.astype(dtype), cols.astype(dtype).T, area


def _overlaps(n: int, size: int) -> np.ndarray:
    """[size, n] lengths that output pixels share with input pixels, in a unit that divides both.

    An image is size * n units long, if input pixels have `size` of them and output pixels n.
    """
    unit = math.gcd(n, size)
    ends = np.arange(size + 1)[:, None] * (n // unit)
    edges = np.arange(n + 1) * (size // unit)
    return np.clip(np.minimum(ends[1:], edges[1:]) - np.maximum(ends[:-1], edges[:-1]), 0, None)
