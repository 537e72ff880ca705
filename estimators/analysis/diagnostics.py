"""Quality of a gradient estimator: variance and its sources, signal-to-noise ratio, agreement.

Everything here works on repeated evaluations of any gradient function, whatever computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class MedianInterval(NamedTuple):
    """A sample's median, with an interval for the population's."""

    median: float
    low: float
    high: float


class GradientStatistics(NamedTuple):
    """Statistics of a gradient g [P] over S starts with M evaluations each.

    Variances are traces. By the law of total variance, Var(g) = between + within (Parmas et al.
    2023, Eq. 18). Both terms are unbiased: the sampling error of each start's mean, within / M, is
    subtracted from `between`.

    Attributes:
        mean: [P] mean over all evaluations.
        within: E_s[Var(g | s)], the estimator's own noise, which a better estimator reduces.
        between: Var_s(E[g | s]), due to the choice of starts; nan with one start.
        snr: [S] signal-to-noise ratio of each start, see `signal_to_noise`.
    """

    mean: Tensor
    within: float
    between: float
    snr: Tensor

    @property
    def total(self) -> float:
        """Var(g)."""
        return self.within + self.between

    @property
    def esnr(self) -> float:
        """The mean of `snr` over starts. Parmas et al. 2023, Eq. 19.

        A single start with little noise may dominate it; the median of `snr` is steadier.
        """
        return float(self.snr.mean())


def gradient_statistics(
    gradient: Callable[[int], Tensor], *, repeats: int, starts: int = 1
) -> GradientStatistics:
    """Evaluate a gradient function `repeats` times at each of `starts` starts.

    Args:
        gradient: start index -> gradient [P], with fresh noise at every call.
        repeats: M >= 2 evaluations per start (the paper uses 50); signal-to-noise ratios need 4.
        starts: S, the number of starts (the paper uses 50).
    Raises:
        ValueError: there are fewer than two repeats, or a gradient is no vector.
    """
    if repeats < 2:
        raise ValueError(f"a variance needs repeats >= 2, got {repeats}")
    g = torch.stack([torch.stack([gradient(s) for _ in range(repeats)]) for s in range(starts)])
    return statistics_of(g)


def statistics_of(gradients: Tensor) -> GradientStatistics:
    """Compute the statistics of gradients [S, M, P] that were evaluated before.

    Raises:
        ValueError: the gradients have another shape.
    """
    gradients = _evaluations(gradients)
    m = gradients.shape[1]
    means = gradients.mean(1)  # [S, P]
    within = gradients.var(1).sum(-1)  # [S]
    between = means.var(0).sum() - within.mean() / m if len(means) > 1 else torch.tensor(torch.nan)
    return GradientStatistics(
        means.mean(0), float(within.mean()), float(between), signal_to_noise(gradients)
    )


def signal_to_noise(gradients: Tensor) -> Tensor:
    """Estimate |E g|² / tr Var(g) at each start.

    With ḡ and W the mean and the trace of the sample covariance of M evaluations, the estimate is
    c |ḡ|² / W - 1 / M. The last term is the error of ḡ, which would count as signal. W is random,
    so that 1 / W is too large in the mean, by ν / (ν - 2) if W is a χ² variable with ν degrees of
    freedom: c = 1 - 2 / ν. Here ν = (M - 1) (tr Σ)² / tr Σ², with unbiased estimates of both traces
    (Srivastava 2005, "Some tests concerning the covariance matrix in high dimensional data").
    For normal g with one parameter the estimate is unbiased; otherwise what is left of
    the bias is of a higher order in 1 / M.

    Args:
        gradients: [S, M, P] evaluations of a gradient.

    Returns:
        [S] ratios, which may be slightly negative where there is no signal; nan if M < 4, where
        they have no mean.

    Raises:
        ValueError: the gradients have another shape.
    """
    gradients = _evaluations(gradients)
    starts, m, size = gradients.shape
    if m < 4:
        return gradients.new_full((starts,), torch.nan)
    means = gradients.mean(1, keepdim=True)
    centred = gradients - means
    gram = centred @ centred.mT / (m - 1)  # [S, M, M]; same traces as the sample covariance
    noise = gram.diagonal(dim1=1, dim2=2).sum(-1)
    n = m - 1
    trace_of_square = n**2 / ((n + 2) * (n - 1)) * (gram.square().sum((1, 2)) - noise.square() / n)
    square_of_trace = noise.square() - 2 * trace_of_square / n
    dimension = torch.where(trace_of_square > 0, square_of_trace / trace_of_square, size)
    factor = 1 - 2 / (n * dimension.clamp(1, size))
    return factor * means.square().sum((1, 2)) / noise - 1 / m


def mean_difference(first: Tensor, second: Tensor) -> float:
    """Measure how far the means of two estimators differ, in standard errors.

    With D_m the difference of a pair of evaluations, each start contributes
    z_s = Σ_{m≠n} D_m·D_n / (2 Σ_{m≠n} (D_m·D_n)²)^½, and the result is Σ_s z_s / S^½. If both
    estimators have the same mean and D is distributed symmetrically about it, then z has mean 0 and
    variance 1 exactly, for any number of parameters: random signs of the D_m change neither the
    distribution nor the denominator. The numerator estimates M (M - 1) |E D|² without bias
    (as in Chen and Qin 2010, "A two-sample test for high-dimensional data").

    Args:
        first: [S, M, P] evaluations of a gradient.
        second: [S, M, P] evaluations of another, which may share the first one's noise: the pairs
            are then compared the more sharply.

    Returns:
        z, 0 ± 1 if the means are equal, at most (S M (M - 1) / 2)^½; 0 if all pairs are equal.

    Raises:
        ValueError: the gradients have another shape.
    """
    difference = _evaluations(first) - _evaluations(second)
    scale = difference.abs().amax((1, 2), keepdim=True)
    difference = difference / torch.where(scale > 0, scale, 1.0)
    products = difference @ difference.mT  # [S, M, M]
    products = products - torch.diag_embed(products.diagonal(dim1=1, dim2=2))
    spread = (2 * products.square().sum((1, 2))).sqrt()
    z = products.sum((1, 2)) / torch.where(spread > 0, spread, 1.0)
    return float(z.sum() / len(z) ** 0.5)


def _evaluations(gradients: Tensor) -> Tensor:
    """Gradients [S, M, P] in float64, since squares of exploding ones overflow in float32."""
    if gradients.ndim != 3:
        raise ValueError(
            "gradients must be [S, M, P], a vector [P] for each start and evaluation, got "
            f"{list(gradients.shape)}; each gradient needs .reshape(-1)"
        )
    return gradients.double()


def median_interval(values: Tensor, confidence: float = 0.95) -> MedianInterval:
    """Return the median of [S] values, with an interval that holds for any distribution.

    The interval reaches from the j-th smallest value to the j-th largest, with the greatest j for
    which P(Binomial(S, ½) < j) <= (1 - confidence) / 2. It is infinite if there is none, as for
    fewer than 6 values at 95 %.
    """
    from scipy.stats import binom  # here: the estimators alone need no SciPy

    ordered = values.double().sort().values
    n = len(ordered)
    j = int((binom.cdf(range(n), n, 0.5) <= (1 - confidence) / 2).sum())
    middle = float(ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    if j == 0:
        return MedianInterval(middle, -math.inf, math.inf)
    return MedianInterval(middle, float(ordered[j - 1]), float(ordered[n - j]))
