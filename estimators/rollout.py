"""A rollout that carries the credit from node to node, so that none is forgotten."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from totalprop.estimators.node import Estimator, assign_credit, is_transformed
from totalprop.estimators.registry import make


class Rollout:
    """Carry the credit of one rollout.

    >>> r = Rollout("tpx")
    >>> x = r.sample(mean, std)          # instead of mean + std * noise
    >>> loss = r.cost(c(x)).mean()       # for every cost

    Use a new one for each rollout. For branching rollouts, call an `Estimator` and `assign_credit`.

    Args:
        estimator: a registered name, or an `Estimator`.
        generator: source of the noise, by default PyTorch's global one. None within
            `torch.utils.checkpoint`, which restores the global one only: the recomputation would
            draw other noise, and LR would be wrong. Leave it out there and keep
            `preserve_rng_state=True`, or draw the noise outside and pass it to `sample`.
    """

    def __init__(
        self, estimator: str | Estimator = "tpx", *, generator: torch.Generator | None = None
    ) -> None:
        self.estimator = make(estimator)
        self.generator = generator
        self.credit: Tensor | None = None  # what the last node returned

    def sample(
        self,
        mean: Tensor,
        std: Tensor | None,
        *,
        noise: Tensor | None = None,
        joint: bool = False,
        **extra: Any,
    ) -> Tensor:
        """Sample a node: mean + std·noise.

        Args:
            mean: [N, ..., D], samples on axis 0; the logits of a one-hot categorical if `std` is
                None.
            std: [N, ..., D], positive, or None.
            noise: like `mean`; drawn here if None.
            joint: at the first node, the samples are counted by axis 0 alone: the categoricals of
                logits [N, ..., D] are one sample, with one return. Later nodes go by the first.
            extra: `probe`, `value`, `critic`, `meter`, `gauge`, `tap` and `carried` of
                `Estimator.__call__`.
        Returns:
            [N, ..., D] the sample.
        """
        if noise is None and isinstance(mean, Tensor):
            noise = self._draw(mean, is_gaussian=std is not None)
        credit = self.credit
        if credit is None and isinstance(mean, Tensor):
            credit = mean.new_zeros(mean.shape[:1] if joint else mean.shape[:-1])
        sample, self.credit = self.estimator(mean, std, noise, credit, **extra)
        return sample

    def cost(self, cost: Tensor) -> Tensor:
        """Credit a cost, one number for each sample, to all nodes so far; its value is unchanged.

        Args:
            cost: [N] or [..., N], any term of the loss, before it is averaged.
        Returns:
            The credited cost, of the cost's shape.
        """
        return cost if self.credit is None else assign_credit(cost, self.credit)

    def _draw(self, like: Tensor, *, is_gaussian: bool) -> Tensor:
        if not like.is_floating_point():
            return like  # the node refuses such a mean
        # A draw in place needs the axis of a vmap, which rand_like has and empty_like has not.
        made_like = torch.rand_like if is_transformed() else torch.empty_like
        noise = made_like(like, requires_grad=False)
        if is_gaussian:
            return noise.normal_(generator=self.generator)
        return -noise.exponential_(generator=self.generator).log()
