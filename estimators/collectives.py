"""A batch whose samples are spread over processes: gathers and sums over a process group.

A node of an estimator with a `group` sees the samples of all its processes, in the order of their
ranks, so that rules and baselines need not know how many there are. Every process has equally many
samples and makes the same calls in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def own(group: dist.ProcessGroup, whole: Tensor, axis: int = 0) -> Tensor:
    """This process's part of what all samples have along an axis."""
    n = whole.shape[axis] // group.size()
    return whole.narrow(axis, group.rank() * n, n)


def gathered(group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The samples of all processes, [N, ...] -> [W N, ...] each, by one transfer."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    flat = torch.cat([x.detach().reshape(len(x), -1).to(dtype) for x in tensors], 1)
    of_each = [torch.empty_like(flat) for _ in range(group.size())]
    dist.all_gather(of_each, flat, group=group)
    parts = torch.cat(of_each).split([x[0].numel() for x in tensors], 1)
    return [part.reshape(-1, *x.shape[1:]).to(x.dtype) for part, x in zip(parts, tensors)]


def summed(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """The sum over the processes."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
