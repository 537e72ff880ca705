"""Legs: the basic gradient estimates that an estimator mixes at a node.

A leg estimates the gradient (cotangent) of the loss w.r.t. a node's distribution parameters zeta.
zeta is (mean, std) for a Gaussian or (logits,) for a categorical, each [N, ..., D] with the samples
on axis 0. A cotangent is a tuple like zeta, in the scale of the loss. The pathwise leg is computed
from dL/dsample, the score legs from the returns-to-go. Weight rules (`mixing.py`) decide how much
of each leg is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from totalprop.estimators.baselines import Baseline, none
from totalprop.estimators.declarations import part_named, without

Zeta = tuple[Tensor, ...]
Leg = Callable[[Zeta, Tensor, Tensor, Tensor | None, Baseline], Zeta]


def draw(zeta: Zeta, noise: Tensor) -> Tensor:
    """Sample a node: mean + std·noise, or the one-hot argmax of logits + Gumbel noise."""
    if len(zeta) == 2:
        return torch.addcmul(zeta[0], zeta[1], noise)
    logits = zeta[0]
    index = (logits + noise).argmax(-1, keepdim=True)
    # Unlike functional.one_hot, this never reads the indices on the host.
    return (index == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)


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
        returns: [N, ...] return-to-go of each sample.
        value: [N, ...] a critic's estimate of the return, made before the noise is drawn, or None.
        baseline: b, see `estimators.baselines`.
    Returns:
        The cotangent of zeta.
    """
    advantage = (returns - baseline(returns, value)).unsqueeze(-1)
    if len(zeta) == 1:
        return (advantage * (draw(zeta, noise) - zeta[0].softmax(-1)),)
    advantage = advantage / zeta[1]
    g_mean = advantage * noise
    return g_mean, torch.addcmul(-advantage, g_mean, noise)


@without("any_node")
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
            "use leg=score"
        )
    mean, std = zeta
    z = (draw(zeta, noise) - mean.unsqueeze(1)) / std.unsqueeze(1)  # [i, j, D]
    log_p = -0.5 * z.square().sum(-1) - std.log().sum(-1, keepdim=True)
    c = torch.softmax(log_p, 0)  # normalised over the Gaussians i, in log space
    if baseline is none:
        b = torch.zeros_like(returns)
    else:
        others = c - torch.diag(c.diagonal())
        b = (others @ returns) / others.sum(1).clamp_min(torch.finfo(c.dtype).tiny)
    weighted = c * (returns - b.unsqueeze(1))  # [i, j]
    g_mean = torch.einsum("ij,ijd->id", weighted, z) / std
    second_moment = torch.einsum("ij,ijd->id", weighted, z.square())
    return g_mean, (second_moment - weighted.sum(1, keepdim=True)) / std


LEGS: dict[str, Leg] = {"score": score, "biw": biw}


def legs_named(legs: str | Leg | Sequence[str | Leg]) -> tuple[Leg, ...]:
    """Look up score legs by name: one, such as "biw", or a sequence; functions pass through."""
    several = (legs,) if isinstance(legs, str) or callable(legs) else legs
    return tuple(part_named("leg", leg, LEGS) for leg in several)
