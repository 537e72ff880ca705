"""Quality of a gradient estimator: its variance, the sources of it, and its signal-to-noise ratio.

Everything here works on repeated evaluations of any gradient function, whatever computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class GradientStatistics(NamedTuple):
    """Statistics of a gradient g [P] over S starts with M evaluations each.

    Variances are traces. By the law of total variance, Var(g) = between + within (Parmas et al.
    2023, Eq. 18). Both terms are unbiased: the sampling error of each start's mean, within / M, is
    subtracted from `between` and from the signal.
    """

    mean: Tensor  # [P] over all evaluations
    within: float  # E_s[Var(g | s)]: the estimator's own noise, which a better estimator reduces
    between: float  # Var_s(E[g | s]): due to the choice of starts; nan with one start
    esnr: float  # E_s[Σ E[g | s]² / Σ Var(g | s)], Parmas et al. 2023, Eq. 19

    @property
    def total(self) -> float:
        """Var(g)."""
        return self.within + self.between


def gradient_statistics(
    gradient: Callable[[int], Tensor], *, repeats: int, starts: int = 1
) -> GradientStatistics:
    """Evaluate a gradient function `repeats` times at each of `starts` starts.

    Args:
        gradient: start index -> gradient [P], with fresh noise at every call.
        repeats: M >= 2 evaluations per start (the paper uses 50).
        starts: S, the number of starts (the paper uses 50).
    Raises:
        ValueError: there are fewer than two repeats.
    """
    if repeats < 2:
        raise ValueError(f"a variance needs repeats >= 2, got {repeats}")
    g = torch.stack([torch.stack([gradient(s) for _ in range(repeats)]) for s in range(starts)])
    return statistics_of(g)


def statistics_of(gradients: Tensor) -> GradientStatistics:
    """Compute the statistics of gradients [S, M, P] that were evaluated before."""
    m = gradients.shape[1]
    means = gradients.mean(1)  # [S, P]
    within = gradients.var(1).sum(-1)  # [S]
    signal = means.square().sum(-1) - within / m
    between = means.var(0).sum() - within.mean() / m if len(means) > 1 else torch.tensor(torch.nan)
    return GradientStatistics(
        means.mean(0), float(within.mean()), float(between), float((signal / within).mean())
    )
