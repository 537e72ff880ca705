"""Several processes that learn one agent together, and what they have to agree on.

Every process has its own environments and its share of each batch. Gradients and statistics are
averaged over all of them, so that parameters stay equal. Alone, nothing here does anything.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from totalprop.estimators.collectives import gathered, summed


@dataclass(frozen=True)
class Processes:
    """The processes of a group; without one, this process alone.

    All of them make the same calls in the same order.
    """

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """The number of this one, from 0."""
        return 0 if self.group is None else self.group.rank()

    def device(self, device: str) -> str:
        """What "cuda" means here: on GPUs, each process has one of its own."""
        is_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if self.size > 1 and is_cuda:
            return f"cuda:{torch.cuda.current_device()}"
        return device

    def share(self, **numbers: int) -> int:
        """This process's part of a number, given by its name.

        Raises:
            ValueError: the number cannot be divided equally.
        """
        ((name, number),) = numbers.items()
        if number % self.size:
            raise ValueError(
                f"{name} must be a multiple of the {self.size} processes, which take equal parts "
                f"of it, got {number}"
            )
        return number // self.size

    def seed(self, seed: int) -> int:
        """A seed of this process's own; that of the first one is the given one."""
        if self.rank == 0:
            return seed
        return int(np.random.SeedSequence([seed, self.rank]).generate_state(1)[0]) % 2**31

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The means over the processes, by one transfer."""
        if self.group is None:
            return list(tensors)
        mean = summed(self.group, torch.cat([x.flatten() for x in tensors])) / self.size
        parts = mean.split([x.numel() for x in tensors])
        return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]

    def average_one(self, x: Tensor) -> Tensor:
        """The mean over the processes."""
        return self.average([x])[0]

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the parameters' gradients by their means over the processes."""
        if self.group is None:
            return
        found = [p for p in parameters if p.grad is not None]
        gradients = self.average([p.grad for p in found if p.grad is not None])
        for parameter, gradient in zip(found, gradients, strict=True):
            parameter.grad = gradient

    def gathered(self, x: Tensor) -> Tensor:
        """[N, ...] -> [W N, ...], the rows of all processes by rank."""
        return x if self.group is None else gathered(self.group, [x])[0]

    def objects(self, value: Any) -> list[Any]:
        """What each process gives, by rank."""
        if self.group is None:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def any(self, flag: bool) -> bool:
        """Whether it holds in any of the processes."""
        return any(self.objects(bool(flag)))

    def send(self, module: nn.Module) -> None:
        """Give all processes the parameters and buffers of the first one."""
        if self.group is None:
            return
        for x in module.state_dict().values():
            contiguous = x.detach().contiguous()
            dist.broadcast(contiguous, group=self.group, group_src=0)
            x.copy_(contiguous)


ALONE = Processes()


class SharedStatistics(RunningMeanStd):
    """Running statistics of what all processes see.

    Args:
        own: what they go on from.
        processes: that call `update` together.
    """

    def __init__(self, own: RunningMeanStd, processes: Processes) -> None:
        vars(self).update(vars(own))
        self._processes = processes

    def update(self, arr: np.ndarray) -> None:
        """Add the rows [n, ...] of all processes."""
        super().update(np.concatenate(self._processes.objects(arr)))

    def __deepcopy__(self, memo: dict[int, Any]) -> RunningMeanStd:
        return self.copy()

    def __reduce__(self) -> Any:
        """Pickled, as by `VecNormalize.save`, they are statistics alone: processes cannot be."""
        return copy.copy, (self.copy(),)


def share_statistics(env: VecNormalize | None, processes: Processes) -> None:
    """Let VecNormalize's statistics be those of the environments of all processes."""
    if env is None or processes.size == 1:
        return

    def shared(own: Any) -> Any:
        if isinstance(own, dict):
            return {name: shared(part) for name, part in own.items()}
        return own if isinstance(own, SharedStatistics) else SharedStatistics(own, processes)

    env.ret_rms = shared(env.ret_rms)
    if hasattr(env, "obs_rms"):
        env.obs_rms = shared(env.obs_rms)
