"""Losses on importance ratios at a node: their value, and the weight that the credit gets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Surrogate(NamedTuple):
    """A loss whose gradient reaches the policy only through a node; both fields are detached.

    With the node's credit, `loss + advantage·weight·credit'` has the value of the loss. Through a
    score leg without a baseline it also has its gradient, as advantage·weight = dloss / dlog π. The
    pathwise signal of the same loss is weight·(dadvantage / daction).
    """

    loss: Tensor  # like the advantages
    weight: Tensor  # like the advantages: -r, and 0 where clipped


def clipped(
    advantage: Tensor, log_prob: Tensor, old_log_prob: Tensor, clip_range: float
) -> Surrogate:
    """PPO's clipped loss max(-A r, -A clip(r, 1 ± ε)) with r = π / π_old, elementwise.

    Schulman et al. 2017 (PPO), Eq. 7.

    Args:
        advantage: A, of any shape; detached here.
        log_prob: log π of the action, like `advantage`; detached here.
        old_log_prob: log π_old of the action, like `advantage`.
        clip_range: ε > 0.
    """
    advantage, ratio = advantage.detach(), (log_prob.detach() - old_log_prob).exp()
    plain = -advantage * ratio
    bounded = -advantage * ratio.clamp(1 - clip_range, 1 + clip_range)
    return Surrogate(
        torch.maximum(plain, bounded),
        torch.where(plain >= bounded, -ratio, torch.zeros_like(plain)),
    )
