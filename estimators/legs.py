"""Legs: the basic gradient estimates that an estimator mixes at a node.

A leg estimates the gradient (cotangent) of the loss w.r.t. a node's distribution parameters zeta.
zeta is (mean, std) for a Gaussian or (logits,) for a categorical, each [N, ..., D] with the samples
on axis 0. A cotangent is a tuple like zeta, in the scale of the loss. The pathwise leg is computed
from dL/dsample, the score legs from the returns-to-go. Weight rules (`mixing.py`) decide how much
of each leg is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from totalprop.estimators.baselines import Baseline, leave_one_out, none
from totalprop.estimators.declarations import having, of_at_least, part_named, without
from totalprop.estimators.mixing import GraphContext
from totalprop.estimators.probes import Zeta

Leg = Callable[[Zeta, Tensor, Tensor, Tensor | None, Baseline], Zeta]


def draw(zeta: Zeta, noise: Tensor) -> Tensor:
    """Sample a node: mean + std·noise, or the one-hot argmax of logits + Gumbel noise."""
    if len(zeta) == 2:
        return torch.addcmul(zeta[0], zeta[1], noise)
    logits = zeta[0]
    index = (logits + noise).argmax(-1, keepdim=True)
    # Unlike functional.one_hot, this never reads the indices on the host.
    return (index == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)


def broadcasts_to(shape: Sequence[int], like: Sequence[int]) -> bool:
    """Whether a tensor takes the shape of another in a product with it."""
    if len(shape) > len(like):
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(like)))


def pathwise(zeta: Zeta, noise: Tensor, g_sample: Tensor) -> Zeta:
    """Reparameterisation leg: (g, g·noise) for a Gaussian; straight-through for a categorical.

    The straight-through leg is biased: it treats the one-hot sample as if it were softmax(logits).
    Kingma & Welling 2014; Bengio et al. 2013.
    """
    if len(zeta) == 2:
        return g_sample, g_sample * noise
    p = zeta[0].softmax(-1)
    return (p * (g_sample - (p * g_sample).sum(-1, keepdim=True)),)


def score(
    zeta: Zeta, noise: Tensor, returns: Tensor, value: Tensor | None, baseline: Baseline
) -> Zeta:
    """Likelihood-ratio leg: (R - b) d log p(sample; zeta) / d zeta.

    Gaussian: (R - b) (noise / std, (noise² - 1) / std). Categorical: (R - b) (one-hot - p).
    Parmas et al. 2023, Sec. 3; Parmas et al. 2018, Sec. 2.3.

    Args:
        zeta: (mean, std) or (logits,), each [N, ..., D].
        noise: [N, ..., D] as in `draw`.
        returns: [N, ...] return-to-go of each sample. Categoricals [N, ..., G, D] with returns
            [N, ...] are one sample, whose log-probability is the sum over G.
        value: [N, ...] a critic's estimate of the return, made before the noise is drawn, or None.
        baseline: b, see `estimators.baselines`.
    Returns:
        The cotangent of zeta.
    """
    b = baseline(returns, value)
    if not broadcasts_to(b.shape, returns.shape):
        raise ValueError(
            f"a baseline of shape {list(b.shape)} cannot be subtracted from returns "
            f"{list(returns.shape)}: it needs one number per return, e.g. value.squeeze(-1)"
        )
    advantage = returns - b
    advantage = advantage[(...,) + (None,) * (zeta[0].ndim - advantage.ndim)]
    if len(zeta) == 1:
        return (advantage * (draw(zeta, noise) - zeta[0].softmax(-1)),)
    advantage = advantage / zeta[1]
    g_mean = advantage * noise
    return g_mean, torch.addcmul(-advantage, g_mean, noise)


@without("categorical_nodes", "more_axes", "needs_baseline")
def biw(
    zeta: Zeta, noise: Tensor, returns: Tensor, value: Tensor | None, baseline: Baseline
) -> Zeta:
    """Batch importance weighting: every sample contributes to the gradient of every Gaussian.

    q_i = Σ_j c_ij (R_j - b_i) d log p(x_j; zeta_i) / d zeta_i,
    c_ij = p(x_j; zeta_i) / Σ_k p(x_j; zeta_k),   b_i = Σ_{j≠i} c_ij R_j / Σ_{j≠i} c_ij.
    Parmas et al. 2018, Sec. 3.2. This b_i replaces the given baseline and biases the leg slightly.
    With `baselines.none`, b = 0 and the leg is unbiased.

    Arguments and return value are those of `score`, for a Gaussian of shape [N, D].

    Raises:
        ValueError: the node is not a Gaussian of shape [N, D].
    """
    if len(zeta) != 2 or zeta[0].ndim != 2:
        raise ValueError(
            f"leg 'biw' needs a Gaussian node of shape [N, D], got {list(zeta[0].shape)}; "
            "use legs='score'"
        )
    mean, std = zeta
    # [D, i, j]: the long axis is the inner one, and each pair's D numbers are not.
    x, m, s = (t.T.contiguous() for t in (draw(zeta, noise), mean, std))
    z = (x.unsqueeze(1) - m.unsqueeze(2)) * s.reciprocal().unsqueeze(2)
    square = z.square()
    log_p = -0.5 * square.sum(0) - std.log().sum(-1, keepdim=True)
    c = torch.softmax(log_p, 0)  # normalised over the Gaussians i, in log space
    if baseline is none:
        b = torch.zeros_like(returns)
    else:
        others = c.clone().fill_diagonal_(0)
        b = (others @ returns) / others.sum(1).clamp_min(torch.finfo(c.dtype).tiny)
    weighted = c * (returns - b.unsqueeze(1))  # [i, j]
    g_mean = torch.einsum("ij,dij->id", weighted, z) / std
    second_moment = torch.einsum("ij,dij->id", weighted, square)
    return g_mean, (second_moment - weighted.sum(1, keepdim=True)) / std


@without("needs_baseline")
def nothing(
    zeta: Zeta, noise: Tensor, returns: Tensor, value: Tensor | None, baseline: Baseline
) -> Zeta:
    """No gradient at all: what a rule mixes with RP to shrink it, see `mixing.cut`."""
    return tuple(torch.zeros_like(member) for member in zeta)


@having("needs_critic")
def lax(critic: Callable[[Tensor], Tensor]) -> Leg:
    """Likelihood-ratio leg with a critic of the sample as its control variate.

    mean: (R - a c(x) - b) noise / std + a c'(x)
    std: (R - a c(x) - b) (noise² - 1) / std + a c'(x) noise

    Grathwohl et al. 2018 (LAX), Sec. 3.1. The leg is unbiased for any critic, and the better the
    critic predicts the return-to-go, the less variance it has. Differs from the paper: a and b are
    a regression of the returns on the critic that leaves out the sample itself, which keeps the leg
    unbiased, instead of b = 0 and a trained critic in the returns' units.

    Args:
        critic: samples [N, ..., D] -> [N, ...], differentiable; of any scale and sign. It must not
            depend on the noise in another way.
    """

    @of_at_least(4)
    @without("categorical_nodes", "needs_baseline")
    def lax_leg(
        zeta: Zeta, noise: Tensor, returns: Tensor, value: Tensor | None, baseline: Baseline
    ) -> Zeta:
        # Unlike autograd.grad, vjp works within torch.func and torch.compile, too.
        c, pull_back, *_ = vjp(lambda x: _checked(critic(x), returns), draw(zeta, noise).detach())
        (slope_of_c,) = pull_back(torch.ones_like(c))
        c, slope_of_c = c.detach(), slope_of_c.detach()
        a, b = _left_out_line(c, returns)
        rest = ((returns - a * c - b).unsqueeze(-1)) / zeta[1]
        pathwise_part = a.unsqueeze(-1) * slope_of_c
        g_mean = rest * noise + pathwise_part
        return g_mean, rest * (noise.square() - 1) + pathwise_part * noise

    return lax_leg


@having("needs_graph")
def first_order(graph: GraphContext) -> Leg:
    """Likelihood-ratio leg with a first-order expansion of the return as its control variate.

    mean: (R - a f - b) noise / std + a s / std
    std: (R - a f - b) (noise² - 1) / std

    At node t, f = mean·g_t + Σ_{u >= t} s_u noise_u, where g_t is the average over samples of the
    pathwise gradient in the mean and s_u that in the noise. As in Gu et al. 2016 (MuProp), what is
    linear in the noise is left to the pathwise gradient, whose average has no jump's bias and
    little noise, and LR estimates the rest. Differs from the paper: the expansion is along a
    sampled rollout and averaged, and a and b are a regression of the returns on it; a is near 0
    where pathwise gradients explode or mislead. The averages are those of the other half of the
    batch and the regression leaves out the sample itself, so the leg is unbiased. What does not
    depend on the node's own noise is clipped, so that nothing is extrapolated to an outlying start.
    It makes no use of the estimator's baseline. At categorical nodes, and of fewer than 8 samples,
    it is `score`.

    Args:
        graph: of a pass of RP with the same noise, which `estimators.gradient` makes.
    Returns:
        A leg for one backward pass, to be called once at each node, the last one first.
    """
    return _FirstOrder(graph)


class _FirstOrder:
    """See `first_order`."""

    one_call_per_node = True
    needs_baseline = False

    def __init__(self, graph: GraphContext) -> None:
        self._graph = graph
        self._left = len(graph.nodes)
        self._future: dict[torch.Size, Tensor] = {}  # Σ_{u > t} s_u noise_u, by its shape [N, ...]

    def __call__(
        self, zeta: Zeta, noise: Tensor, returns: Tensor, value: Tensor | None, baseline: Baseline
    ) -> Zeta:
        self._left -= 1
        if len(zeta) == 1 or len(noise) < 8:
            return score(zeta, noise, returns, value, leave_one_out)
        mean, std = zeta
        g = self._graph.pathwise[self._left][0]
        g = torch.where(torch.isfinite(g).all(), g, 0.0)
        slope, s = _mean_of_other_half(g), _mean_of_other_half(g * std)
        shape = returns.shape
        of_own_noise, later = (s * noise).sum(-1), self._future.get(shape, 0.0)
        self._future[shape] = later + of_own_noise
        known = later + (slope * mean).sum(-1)
        f = torch.cat([_without_outliers(half) for half in known.tensor_split(2)]) + of_own_noise
        halves = zip(f.tensor_split(2), returns.tensor_split(2), strict=True)
        lines = [_left_out_line(*half) for half in halves]
        a, b = (torch.cat(parts) for parts in zip(*lines, strict=True))
        rest = (returns - a * f - b).unsqueeze(-1) / std
        linear = a.unsqueeze(-1) * s / std
        return torch.addcmul(linear, rest, noise), rest * (noise.square() - 1)


def _mean_of_other_half(x: Tensor) -> Tensor:
    """[N, ...] mean along axis 0 over the half that a sample is not in."""
    first, second = x.tensor_split(2)
    return torch.cat((second.mean(0).expand_as(first), first.mean(0).expand_as(second)))


def _mean_of_others(x: Tensor) -> Tensor:
    """[N, ...] mean along axis 0 over all other samples.

    It is the sum of those before and of those after a sample. The sum of all less the sample would
    leave nothing but round-off of others that are far smaller.
    """
    first = torch.zeros_like(x[:1])
    before = torch.cat((first, x[:-1].cumsum(0)))
    after = torch.cat((x[1:].flip(0).cumsum(0).flip(0), first))
    return (before + after) / (len(x) - 1)


def _left_out_line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept [N, ...] of y on x along axis 0, for each sample from all others.

    The slope is 0 where the others are all alike, and tell none.
    """
    tiny, eps = torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).eps
    middle, level = x.median(0).values, y.median(0).values  # no outlier moves them
    dx, dy = x - middle, y - level
    scale = torch.linalg.vector_norm(dx, math.inf, dim=0).clamp_min(tiny)
    dx = dx / scale  # or its square could overflow
    mean_x, mean_y, second, mixed = (_mean_of_others(z) for z in (dx, dy, dx.square(), dx * dy))
    variance = second - mean_x.square()
    slope = (mixed - mean_x * mean_y) / variance.clamp_min(tiny) / scale
    slope = torch.where(variance > 8 * eps * second, slope, 0.0)
    return slope, level + mean_y - slope * (middle + scale * mean_x)


def _without_outliers(x: Tensor) -> Tensor:
    """[N, ...] clipped along axis 0: no further from the central 90 % than these are wide.

    Of fewer than 20 samples none is.
    """
    ordered, left_out = x.sort(0).values, len(x) // 20
    low, high = ordered[left_out], ordered[-1 - left_out]
    return torch.minimum(torch.maximum(x, 2 * low - high), 2 * high - low)


def _checked(c: Tensor, returns: Tensor) -> Tensor:
    """A critic's output, which must have one number for each return."""
    if c.shape != returns.shape:
        raise ValueError(
            f"the critic of a node must give one number per sample, {list(returns.shape)}, got "
            f"{list(c.shape)}; a network's [N, 1] needs .squeeze(-1)"
        )
    return c


@having("needs_critic")
def mvd(critic: Callable[[Tensor], Tensor]) -> Leg:
    """Measure-valued derivative of a critic's mean: it needs no derivative, only differences.

    d/dmean_d E c = E [c(x | x_d = m_d + s_d W) - c(x | x_d = m_d - s_d W)] / (s_d √(2π)),
    d/dstd_d E c = E [c(x | x_d = m_d + s_d M) - c(x)] / s_d

    with Rayleigh W and M of the double-sided Maxwell distribution; all other coordinates are those
    of the sample. Mohamed et al. 2020, Sec. 6, Table 1; Carvalho et al. 2021 for critics. As a
    function of the critic it is unbiased; the returns are used for its scale alone, so that an
    error in the critic is one in the gradient.

    Args:
        critic: samples [N, D] -> [N]; of any scale and sign, since a regression of the returns on
            it fits both.
    """

    @of_at_least(4)
    @without("categorical_nodes", "more_axes", "needs_baseline")
    def mvd_leg(
        zeta: Zeta, noise: Tensor, returns: Tensor, value: Tensor | None, baseline: Baseline
    ) -> Zeta:
        (mean, std), x = zeta, draw(zeta, noise)
        c = _checked(critic(x), returns)
        slope, _ = _left_out_line(c, returns)
        # Nothing is drawn here: both are functions of the noise, by their distribution functions.
        rank = torch.special.ndtr(noise)
        rayleigh = (-2 * torch.special.log_ndtr(-noise)).sqrt()
        maxwell = _maxwell(2 * (rank - 0.5).abs()) * (rank - 0.5).sign()
        by_mean, by_std = [], []
        for d in range(x.shape[-1]):
            at = [x.clone() for _ in range(3)]
            for moved, z in zip(at, (rayleigh, -rayleigh, maxwell), strict=True):
                moved[:, d] = mean[:, d] + std[:, d] * z[:, d]
            up, down, wide = (critic(moved) for moved in at)
            by_mean.append((up - down) / (std[:, d] * math.sqrt(2 * math.pi)))
            by_std.append((wide - c) / std[:, d])
        scale = slope.unsqueeze(-1)
        return scale * torch.stack(by_mean, -1), scale * torch.stack(by_std, -1)

    return mvd_leg


def _maxwell(rank: Tensor) -> Tensor:
    """Quantiles of the Maxwell distribution, by bisection of erf(x/√2) - x √(2/π) exp(-x²/2)."""
    low, high = torch.zeros_like(rank), torch.full_like(rank, 12.0)
    for _ in range(60):
        x = (low + high) / 2
        below = torch.erf(x / 2**0.5) - x * (2 / math.pi) ** 0.5 * (-0.5 * x * x).exp() < rank
        low, high = torch.where(below, x, low), torch.where(below, high, x)
    return (low + high) / 2


LEGS: dict[str, Any] = {
    "score": score,
    "biw": biw,
    "first-order": first_order,
    "lax": lax,
    "mvd": mvd,
}


def legs_named(legs: str | Leg | Sequence[str | Leg]) -> tuple[Leg, ...]:
    """Look up score legs by name: one, such as "biw", or a sequence; functions pass through."""
    several = (legs,) if isinstance(legs, str) or callable(legs) else legs
    return tuple(part_named("leg", leg, LEGS) for leg in several)
