"""Variance of many-action policy gradients, estimated from data with two actions per visited state.

`many_actions.py` defines the components and uses them. The memory needed is about two float64
copies of the gradients, averaged over the samples of Q; no array is [.., P, P].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from totalprop.estimators.analysis.many_actions import VarianceComponents

BLOCK = 2**22  # numbers in a temporary array


class Interval(NamedTuple):
    """A percentile bootstrap interval."""

    low: float
    high: float


@dataclass(frozen=True, eq=False)
class ComponentEstimate:
    """Unbiased estimates of the components of Lemma 1, with B bootstrap resamplings.

    >>> found = estimate_components(gradients, generator=torch.Generator().manual_seed(0))
    >>> found.interval(lambda c: c.policy_share)
    """

    components: VarianceComponents
    marginal: Tensor  # [B, L] resampled α_t
    policy: Tensor  # [B, L] resampled α^e_t
    q_noise: Tensor  # [B] resampled variance due to the noise of one Q sample

    def resampled(self, statistic: Callable[[VarianceComponents], float]) -> Tensor:
        """[B] values of a statistic, one for each resampling."""
        records = (
            replace(self.components, marginal=m, policy=p, q_noise=float(q))
            for m, p, q in zip(self.marginal, self.policy, self.q_noise)
        )
        return torch.tensor([statistic(c) for c in records], dtype=torch.float64)

    def interval(
        self, statistic: Callable[[VarianceComponents], float], *, level: float = 0.95
    ) -> Interval:
        """Bootstrap interval of a statistic.

        Args:
            statistic: any function of the components.
            level: coverage of the interval.
        Raises:
            ValueError: there are fewer than two resamplings.
        """
        values = self.resampled(statistic)
        if len(values) < 2:
            raise ValueError(
                f"an interval needs at least two resamplings, got {len(values)}: estimate with "
                "n_bootstrap=1000"
            )
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)
        low, high = values.quantile(ends).tolist()
        return Interval(low, high)


def estimate_components(
    gradients: Tensor,
    *,
    gamma: float = 1.0,
    stationary: bool = True,
    n_bootstrap: int = 1000,
    generator: torch.Generator | None = None,
) -> ComponentEstimate:
    """Estimate the components of Lemma 1 (Nauman & Cygan 2022, Eq. 5-7) without bias.

    Let Υ¹ belong to the action that drives the transition and Υ² to the extra one, and let
    Ῡ = (Υ¹ + Υ²) / 2. Since Υ² does not influence the future,
    V_s = Cov(Υ¹_0, Υ²_0),  α_t = Cov(Υ²_0, Ῡ_t),  E_a = E[(Υ¹_0 - Υ²_0)²] / 2,
    α^e_t = Cov(Υ¹_0 - Υ²_0, Ῡ_t).
    Covariances are taken over the trajectories at each step (with n - 1), then averaged over the
    steps. With K > 1 independent samples of Q per action, the square in E_a is a product of two
    different samples, so the noise of Q appears in `q_noise` only. With K = 1 it inflates E_a, and
    `q_noise` is nan.

    The estimators are ours; the paper does not describe how it measures the components.

    Args:
        gradients: [n, T, 2, P] or [n, T, 2, K, P], Υ without γ^t; action 0 drives the transition.
            They come from n independent trajectories of T steps, none cut short, from the starts of
            interest. Segments of one long run are not independent: the estimates are then slightly
            biased and the intervals too narrow.
        gamma: γ of the components, see `VarianceComponents`.
        stationary: whether every step has the same distribution; the components then extend to
            other T and γ. If False, the average over steps is weighted by γ^{2i}, which is unbiased
            for this T and γ.
        n_bootstrap: B, the number of resamplings of whole trajectories.
        generator: CPU generator for the resampling.
    Returns:
        The components and their resamplings.
    Raises:
        ValueError: the shape is wrong, or there are fewer than two trajectories.
    """
    _check_gradients(gradients)
    samples = _with_replicates(gradients)  # [n, T, 2, K, P]
    n, n_steps = samples.shape[:2]
    mean = samples.mean(3, dtype=torch.float64)  # [n, T, 2, P]
    weight = mean.new_ones(n_steps)
    if not stationary:
        weight = gamma ** (2 * torch.arange(n_steps).to(mean))
    mean = mean - mean.mean((0, 2)).unsqueeze(1)  # no effect but on round-off (cancellation)
    raw = torch.cat([_moments(part, weight) for part in mean.split(_block(mean[0]))])  # [n, 3, T]
    noise, e_a = _within_state(samples, weight)  # [n], [n]

    def components(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        share = counts / n  # [B, n]
        averages = torch.einsum("bn,ntap->btap", share, mean)
        products = torch.einsum("bn,nmt->bmt", share, raw)
        extra, driven, pair = ((products - _moments(averages, weight)) * n / (n - 1)).unbind(1)
        marginal, policy = extra, driven - extra  # [B, T]
        marginal[:, 0], policy[:, 0] = pair[:, 0], share @ e_a
        return marginal, policy, share @ noise

    marginal, policy, q_noise = components(mean.new_ones(1, n))
    record = VarianceComponents(
        marginal[0],
        policy[0],
        n_steps,
        samples.shape[-1],
        gamma=gamma,
        stationary=stationary,
        q_noise=float(q_noise),
    )
    drawn = torch.randint(n, (n_bootstrap, n), generator=generator).to(mean.device)
    counts = mean.new_zeros(n_bootstrap, n).scatter_add_(1, drawn, mean.new_ones(drawn.shape))
    parts = [components(part) for part in counts.split(_block(mean[0]))]
    return ComponentEstimate(record, *(torch.cat(column) for column in zip(*parts)))


def direct_variance(gradients: Tensor, *, n_actions: int, gamma: float = 1.0) -> float:
    """Estimate V(T, N) directly, as the estimator's variance over trajectories, N = 1 or 2.

    A check of the components. In expectation it equals
    `components.sampled_q(K).variance(n_actions)` of the same data. If K = 1 it equals
    `components.variance(n_actions)`, whose E_a already contains the noise of Q.
    Nauman & Cygan 2022, Eq. 3.

    Args:
        gradients: as in `estimate_components`.
        n_actions: N, 1 or 2.
        gamma: γ.
    Raises:
        ValueError: the shape is wrong, there are fewer than two trajectories, or N is not 1 or 2.
    """
    _check_gradients(gradients)
    if n_actions not in (1, 2):
        raise ValueError(f"n_actions is {n_actions}, expected 1 or 2: the data has two per state")
    mean = _with_replicates(gradients)[:, :, :n_actions].mean(
        (2, 3), dtype=torch.float64
    )  # [n, T, P]
    discount = gamma ** torch.arange(mean.shape[1]).to(mean)
    return float((discount.view(-1, 1) * mean).mean(1).var(0).sum())


def _moments(mean: Tensor, weight: Tensor) -> Tensor:
    """Lag averages of Υ²_i·Ῡ_{i+t}, Υ¹_i·Ῡ_{i+t} and, at lag 0 only, Υ¹_i·Υ²_i.

    Args:
        mean: [B, T, 2, P] Υ, averaged over the samples of Q.
        weight: [T] weights of the steps.
    Returns:
        [B, 3, T].
    """
    driver, extra = mean.unbind(2)  # [B, T, P]
    future = (driver + extra) / 2
    n_steps = len(weight)
    found = mean.new_zeros(len(mean), 3, n_steps)
    for row, (first, second) in enumerate([(extra, future), (driver, future)]):
        gram = (weight.unsqueeze(-1) * first) @ second.mT  # [B, T, T]
        for lag in range(n_steps):
            found[:, row, lag] = gram.diagonal(lag, -2, -1).sum(-1) / weight[: n_steps - lag].sum()
    found[:, 2, 0] = (driver * extra).sum(-1) @ weight / weight.sum()
    return found


def _within_state(samples: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n] variance due to one Q sample's noise (nan if K = 1), and [n] E_a without this noise."""
    noise, e_a = [], []
    k = samples.shape[3]
    weight = weight / weight.sum()
    for part in samples.split(_block(samples[0])):
        part = part.double()
        half_gap = (part[:, :, 0] - part[:, :, 1]).mean(2).square().sum(-1) / 2  # [., T]
        spread = torch.full_like(half_gap, torch.nan)
        if k > 1:
            spread = part.var(3).sum(-1).mean(2)  # [., T]
            # The mean over all pairs of different samples, as the full square minus its diagonal.
            half_gap = half_gap - spread / k
        noise.append(spread @ weight)
        e_a.append(half_gap @ weight)
    return torch.cat(noise), torch.cat(e_a)


def _with_replicates(gradients: Tensor) -> Tensor:
    return gradients if gradients.dim() == 5 else gradients.unsqueeze(3)


def _block(example: Tensor) -> int:
    """Number of tensors like `example`, or of their Gram matrices over steps, in one block."""
    n_steps = example.shape[0]
    return max(1, BLOCK // max(example.numel(), n_steps * n_steps))


def _check_gradients(gradients: Tensor) -> None:
    shape = list(gradients.shape)
    if len(shape) not in (4, 5) or shape[2] != 2 or 0 in shape:
        raise ValueError(
            f"gradients are {shape}, expected [trajectories, T, 2, P] or [.., T, 2, K, P]: put the "
            "action that drives the transition and one extra action on axis 2"
        )
    if shape[0] < 2:
        raise ValueError(f"a variance needs at least 2 trajectories, got {shape[0]}: record more")
