"""Baselines b, which the likelihood-ratio leg subtracts from the returns.

Each is a function (returns [N, ...], value [N, ...] | None) -> b, broadcastable to the returns,
with the samples on axis 0. All keep the leg unbiased except `mean`, which shrinks its expectation
by (N - 1) / N.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from totalprop.estimators.declarations import having, of_at_least, part_named, without

Baseline = Callable[[Tensor, "Tensor | None"], Tensor]


@without("needs_value")
def none(returns: Tensor, value: Tensor | None) -> Tensor:
    """b = 0: unbiased, with high variance."""
    return torch.zeros_like(returns)


@without("needs_value")
def mean(returns: Tensor, value: Tensor | None) -> Tensor:
    """b = batch mean; shrinks LR's expectation by (N - 1) / N. Parmas et al. 2023, Sec. 3."""
    return returns.mean(0, keepdim=True)


@of_at_least(2)
@without("needs_value")
def leave_one_out(returns: Tensor, value: Tensor | None) -> Tensor:
    """b_i = Σ_{j≠i} R_j / (N - 1). Mnih & Rezende 2016; Parmas et al. 2018, Sec. 2.2."""
    n = returns.shape[0]
    if n < 2:
        raise ValueError(
            f"baseline 'leave_one_out' needs at least 2 samples on axis 0, got {n}; "
            "use more samples or baseline=none"
        )
    return (returns.sum(0, keepdim=True) - returns) / (n - 1)


@of_at_least(3)
@having("needs_value")
def critic(returns: Tensor, value: Tensor | None) -> Tensor:
    """b_i = leave-one-out linear regression of the returns on a state value.

    The scale of `value` does not matter (the loss divides by N, the critic does not), since the
    regression R ≈ a + c·value fits it. The prediction for sample i is fitted without sample i,
    using the hat matrix: b_i = R_i - e_i / (1 - h_i). The leg therefore stays unbiased as long as
    `value` depends only on what is known before the node's noise is drawn.

    Args:
        returns: [N, ...] returns-to-go, N >= 3.
        value: [N, ...] the critic's estimate of the return.
    Returns:
        [N, ...] the baseline of each sample.
    Raises:
        ValueError: the node was called without `value`, or with fewer than 3 samples.
    """
    if value is None:
        raise ValueError("baseline 'critic' needs value=[N, ...]: pass it to the estimator's call")
    n = returns.shape[0]
    if n < 3:
        raise ValueError(f"baseline 'critic' needs at least 3 samples on axis 0, got {n}")
    centred = value - value.mean(0, keepdim=True)
    tiny = torch.finfo(centred.dtype).tiny
    spread = centred.square().sum(0, keepdim=True).clamp_min(tiny)
    centred_returns = returns - returns.mean(0, keepdim=True)
    slope = (centred * centred_returns).sum(0, keepdim=True) / spread
    residual = centred_returns - slope * centred
    leverage = 1 / n + centred.square() / spread
    # A sample that (almost) alone determines the slope cannot be predicted from the others. Which
    # samples these are depends on the values only, so the leg stays unbiased.
    alone = 1 - leverage < 0.01
    left_out = residual / torch.where(alone, torch.ones_like(leverage), 1 - leverage)
    return torch.where(alone, leave_one_out(returns, None), returns - left_out)


BASELINES: dict[str, Baseline] = {
    "none": none,
    "mean": mean,
    "leave-one-out": leave_one_out,
    "critic": critic,
}


def baseline_named(baseline: str | Baseline) -> Baseline:
    """Look up a baseline by name; a function passes through."""
    return part_named("baseline", baseline, BASELINES)
