"""Losses of importance ratios at a node: their value, and what they owe the node's credit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    """A loss whose gradient reaches the policy through a node only; both parts are detached.

    With the node's credit, `loss + advantage·weight·credit'` has the loss's value and, through a
    score leg without a baseline, its gradient: advantage·weight = dloss / dlog π. The pathwise
    signal of the same loss is weight·(dadvantage / daction).
    """

    loss: Tensor
    weight: Tensor  # -r, and 0 where clipped


def clipped(
    advantage: Tensor, log_prob: Tensor, old_log_prob: Tensor, clip_range: float
) -> Surrogate:
    """PPO's loss max(-A r, -A clip(r, 1 ± ε)), r = π / π_old, elementwise.

    Schulman et al. 2017 (PPO), Eq. 7.
    """
    advantage, ratio = advantage.detach(), (log_prob.detach() - old_log_prob).exp()
    plain = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    return Surrogate(
        torch.maximum(plain, bounded),
        torch.where(plain >= bounded, -ratio, torch.zeros_like(plain)),
    )
