"""Weight rules: they choose k, the weight of each score leg; the pathwise leg gets the rest.

Every rule is a function (rp, legs, probe) -> [k, ...], one k per leg, broadcastable to [N, ..., D].
`rp` is the pathwise cotangent of zeta and `legs` are the cotangents of the score legs (usually
one), all in the scale of the loss. `probe` is described in `estimators.probes`. The node computes
rp + Σ_l k_l (leg_l - rp). Where the weights sum to 1 or to NaN it uses the score legs alone, so
that an exploding or non-finite pathwise leg never reaches the result. Weights may lie outside
[0, 1].

With delta = leg - rp, minimising Var(rp + k·delta) is a regression of -rp on delta (Parmas et al.
2023, Eq. 6 and 8). `tpx`, `tpg` and the mixture of several legs all solve this regression, each in
its own space.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from totalprop.estimators.declarations import without
from totalprop.estimators.probes import Probe, gram, gram_of_variables

Zeta = tuple[Tensor, ...]
Weight = Callable[[Zeta, Sequence[Zeta], "Probe | None"], list[Tensor]]

COTANGENT_SHARE = 1e-2  # weight of `tpx-ivw`'s objective in that of `tpg`
RIDGE = 1e-9  # relative; keeps the small linear systems solvable when legs are collinear


@without("needs_score")
def pathwise(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[Tensor]:
    """k = 0: RP, plain backpropagation."""
    return [torch.zeros_like(rp[0][:1])] * len(legs)


@without("needs_pathwise")
def likelihood_ratio(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[Tensor]:
    """k = 1: LR."""
    return [torch.full_like(rp[0][:1], 1 / len(legs))] * len(legs)


def tpx(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[Tensor]:
    """One k per coordinate, from the variances and the covariance of the mean's cotangents.

    k = (V_RP - cov) / (V_LR + V_RP - 2 cov), clipped to [0, 1]; the std uses the same k.
    Parmas et al. 2023 (TPX), Eq. 8 and footnote 4. Differs from the paper: Eq. 8 has no clip
    (`tpx_unclipped`), which is nowhere much better (results/clip).
    """
    return _regress(rp[0], [leg[0] for leg in legs], summed=False)


def tpx_unclipped(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[Tensor]:
    """`tpx` without the clip, so that k may lie outside [0, 1].

    Parmas et al. 2023 (TPX), Eq. 8 and footnote 4.
    """
    return _regress(rp[0], [leg[0] for leg in legs], summed=False, clip=False)


def tpx_scalar(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[Tensor]:
    """`tpx` with numerator and denominator summed over the coordinates.

    Parmas et al. 2023, Sec. 4, App. D.
    """
    return _regress(rp[0], [leg[0] for leg in legs], summed=True)


def tpx_ivw(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[Tensor]:
    """`tpx` without the covariance: inverse-variance weighting.

    Parmas et al. 2023, Sec. 4, App. D.
    """
    return _inverse_variance(rp[0], [leg[0] for leg in legs], summed=False)


def tpx_ivw_scalar(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[Tensor]:
    """`tpx-ivw` with the variances summed over the coordinates. Parmas et al. 2023, App. D."""
    return _inverse_variance(rp[0], [leg[0] for leg in legs], summed=True)


def tp(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[Tensor]:
    """One scalar k per node, from the variances of the per-sample policy-parameter gradients.

    k = V_RP / (V_RP + V_LR) with V = Σ_p Var_i.
    Parmas et al. 2018 (PIPPS), Alg. 2; Parmas et al. 2023, Eq. 5. `tps` is the same rule with a
    probe over fewer parameters (Parmas et al. 2023, Sec. 4).
    """
    fields = [torch.stack(member) for member in zip(rp, *legs, strict=True)]  # [1 + L, N, ..., D]
    if len(legs) == 1:
        scale = torch.linalg.vector_norm(fields[0], math.inf)
    else:  # one scale per leg, so that an exploded leg costs the others no precision
        scale = torch.linalg.vector_norm(fields[0].flatten(1), math.inf, dim=1)
        scale = scale[(...,) + (None,) * rp[0].ndim]
    scale = scale.clamp_min(_tiny(fields[0]))
    covariance = gram(_require(probe, "tp"), tuple(f / scale for f in fields))
    variances = covariance.diagonal().clamp_min(0.0)
    if len(legs) == 1:
        return [_share(*variances.unbind()).view((1,) * rp[0].ndim)]
    return _shares(variances[(...,) + (None,) * rp[0].ndim].sqrt() * scale)


@without("more_axes", "several_legs")
def tpg(
    rp: Zeta, legs: Sequence[Zeta], probe: Probe | None, *, carried: float = 1.0
) -> list[Tensor]:
    """One k per variable, chosen jointly to minimise the variance in policy-parameter space.

    A variable is a coordinate of a Gaussian, whose mean and std share the k, or a categorical,
    whose logits share it.

    Let J_id be the Jacobian of variable d w.r.t. the parameters at sample i, and C_RP and C_LR
    the [D, D] covariances tr Cov_i(J_id g_id, J_ie g_ie) of the two legs. The rule minimises

        (1 - k)ᵀ C_RP (1 - k) + kᵀ C_LR k + carried Σ_d k_d² C_LR,dd

    over unconstrained k, and then clips k to [0, 1]. This project; no paper.

    A hundredth of `tpx-ivw`'s objective is added, in the same units. It decides k for a coordinate
    that the parameters do not reach in this step, such as a position in a model integrated by
    explicit Euler steps. Such a coordinate is absent from the objective above, yet its k decides
    what earlier nodes receive. Apart from this term and with carried = 0, the rule is `tp` if there
    is one coordinate, and `tpx-ivw` in parameter space if J keeps the coordinates apart.

    Three choices are empirical (results/chaos/table.md). The hundredth was chosen on another seed.
    The covariance between the legs is left out, because over a long chain the noise in its estimate
    costs more than the covariance gains. LR's own variance counts 1 + `carried` times, which at the
    edge of chaos lowers the variance of the whole gradient several-fold. At a single node it does
    not; there, `functools.partial(tpg, carried=0.0)` is the better rule.

    Args:
        rp: pathwise cotangents of zeta, each [N, D], or [N, ..., D] for categoricals.
        legs: exactly one score leg, cotangents like `rp`.
        probe: a probe over the policy's parameters; required.
        carried: extra weight of LR's own variance, >= 0.
    Raises:
        ValueError: several legs, a Gaussian node that is not [N, D], or no probe.
    """
    is_gaussian = len(rp) == 2
    if len(legs) != 1 or (is_gaussian and rp[0].ndim != 2):
        raise ValueError(
            f"weight rule 'tpg' takes one score leg and nodes [N, D], got {len(legs)} legs and a "
            f"node of shape {list(rp[0].shape)}; use weight=tpx"
        )
    # Leave out a pathwise leg that is not finite, or so large that k would round to 1.
    spread_rp, spread_lr = rp[0].std(0), legs[0][0].std(0)
    shape: tuple[int, ...] = spread_rp.shape
    if not is_gaussian:  # over all classes of a variable
        shape = (*shape[:-1], 1)
        spread_rp, spread_lr = (x.norm(dim=-1).flatten() for x in (spread_rp, spread_lr))
    usable = torch.isfinite(spread_rp) & ~(spread_rp > largest_usable(spread_lr))  # [V]
    spread_rp = torch.where(usable, spread_rp, 0.0)
    rp = tuple(torch.where(usable.view(shape), g, 0.0) for g in rp)
    largest = [torch.linalg.vector_norm(g, math.inf) for g in (rp[0], legs[0][0])]
    scale = torch.stack(largest).amax()
    scale = scale.clamp_min(_tiny(scale))
    scaled = [tuple(g / scale for g in leg) for leg in (rp, legs[0])]
    covariance = gram_of_variables(_require(probe, "tpg"), scaled)
    d = len(usable)
    c_rp, c_lr = covariance[:d, :d], covariance[d:, d:]
    penalty = carried * c_lr.diagonal()
    v_rp, v_lr = (spread_rp / scale).square(), (spread_lr / scale).square()
    unit = COTANGENT_SHARE * c_lr.trace() / v_lr.sum().clamp_min(_tiny(scale))
    penalty = penalty + unit * v_lr
    system = c_rp + c_lr + torch.diag(penalty + unit * v_rp)
    size = system.diagonal().clamp_min(_tiny(scale)).sqrt()
    # Solve for 1 - k: its right-hand side does not contain the (possibly exploded) pathwise leg.
    pathwise_weight = _solve(system, size, c_lr.sum(1) + penalty, usable)
    return [(1 - pathwise_weight).clamp(0.0, 1.0).view(1, *shape)]


def largest_usable(size: Tensor) -> Tensor:
    """Magnitude of the pathwise leg above which k rounds to 1, given that of the score leg."""
    return size / (8 * torch.finfo(size.dtype).eps) ** 0.5


def _solve(system: Tensor, size: Tensor, target: Tensor, usable: Tensor) -> Tensor:
    """Solve a small symmetric system in units of its diagonal; unusable unknowns are 0."""
    both = usable & usable.unsqueeze(1)
    eye = torch.eye(len(size), dtype=size.dtype, device=size.device)
    scaled = torch.where(both, system / size / size.unsqueeze(1), 0.0) * (1 - eye)
    target = torch.where(usable, target / size, 0.0)
    # The ridge makes the system solvable; `solve` would wait for the GPU to verify that.
    return torch.linalg.solve_ex(scaled + (1 + RIDGE) * eye, target)[0] / size


def whole_graph_ivw(rp: Tensor, lr: Tensor) -> Tensor:
    """One k = V_RP / (V_RP + V_LR) from per-sample gradients [N, P]. Parmas et al. 2023, Eq. 5."""
    return _inverse_variance(rp, [lr], summed=True)[0].squeeze().nan_to_num(nan=1.0)


def _regress(rp: Tensor, legs: list[Tensor], *, summed: bool, clip: bool = True) -> list[Tensor]:
    """Minimise Var_i(rp + Σ_l k_l (leg_l - rp)), per coordinate or summed over the last axis."""
    if len(legs) > 1:
        return _simplex([rp, *legs], summed=summed, clip=clip)[1:]
    delta = legs[0] - rp
    dims = (0, -1) if summed else (0,)
    # Divide by the largest entry: the squares cannot overflow, at any scale of the loss.
    scale = torch.linalg.vector_norm(delta, math.inf, dim=dims, keepdim=True)
    scale = scale.clamp_min(_tiny(scale))
    rp, delta = rp / scale, delta / scale
    rp = rp - rp.mean(0, keepdim=True)  # else the round-off of a large mean keeps k below 1
    delta = delta - delta.mean(0, keepdim=True)
    numerator = (delta * rp).sum(dims, keepdim=True)
    k = numerator / (delta * delta).sum(dims, keepdim=True).clamp_min(_tiny(scale))
    return [(-k).clamp(0.0, 1.0) if clip else -k]


def _simplex(legs: list[Tensor], *, summed: bool, clip: bool) -> list[Tensor]:
    """Minimum-variance weights with sum 1, with `clip` each >= 0: generalised least squares.

    Within a face of the simplex w ∝ S⁻¹ 1, with variance 1 / (1ᵀ S⁻¹ 1). With two or three legs the
    faces can be enumerated, which is exact where clipping is not. The covariance S is scaled to a
    unit diagonal, so that the legs may differ by many orders of magnitude.
    """
    x, last = torch.stack(legs), (-1,) if summed else ()
    largest = torch.linalg.vector_norm(x, math.inf, dim=(1, *last), keepdim=True)
    x = x / largest.clamp_min(_tiny(largest))
    x = x - x.mean(1, keepdim=True)
    s = torch.einsum("an...,bn...->...ab", x, x)
    if summed:
        s = s.sum(-3, keepdim=True)
    deviation = s.diagonal(dim1=-2, dim2=-1).sqrt()
    inverse = 1 / deviation.clamp_min(_tiny(s))
    correlation = s * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    correlation = correlation + RIDGE * torch.eye(len(legs), dtype=s.dtype, device=s.device)
    deviation = deviation * largest.squeeze(1).movedim(0, -1)
    unit = deviation.nan_to_num(nan=math.inf).amin(-1, keepdim=True)
    precision = 1 / (deviation / unit.clamp_min(_tiny(unit))).clamp_min(1e-6)  # [..., M]
    best = torch.full_like(deviation[..., :1], math.inf)
    weights = torch.zeros_like(deviation)
    for size in range(1, len(legs) + 1):
        for face in itertools.combinations(range(len(legs)), size):
            index = list(face)
            block = correlation[..., index, :][..., index]
            w = torch.linalg.solve_ex(block, precision[..., index].unsqueeze(-1))[0].squeeze(-1)
            w = w * precision[..., index]
            variance = 1 / w.sum(-1, keepdim=True)
            # Without a clip the whole simplex wins, unless one of its legs is not finite.
            inside = torch.isfinite(variance) & (variance > 0)
            if clip:
                inside = inside & (w >= 0).all(-1, keepdim=True)
            better = inside & (variance < best)
            full = torch.zeros_like(weights)
            full[..., index] = w * variance
            best, weights = torch.where(better, variance, best), torch.where(better, full, weights)
    return list(weights.movedim(-1, 0).unsqueeze(1))


def _inverse_variance(rp: Tensor, legs: list[Tensor], *, summed: bool) -> list[Tensor]:
    """k_l = V_l⁻¹ / (V_RP⁻¹ + Σ_m V_m⁻¹), per coordinate or summed over the last axis."""
    dims = (0, -1) if summed else (0,)
    gradients = [rp, *legs]
    norms = [torch.linalg.vector_norm(g, math.inf, dim=dims, keepdim=True) for g in gradients]
    if len(legs) == 1:  # one scale for both, since RP may be 0
        norms = [torch.maximum(*norms)] * 2
    scales = [norm.clamp_min(_tiny(rp)) for norm in norms]
    variances = [(g / scale).var(0, keepdim=True) for g, scale in zip(gradients, scales)]
    if summed:
        variances = [v.sum(-1, keepdim=True) for v in variances]
    if len(legs) == 1:
        return [_share(*variances)]
    return _shares(torch.stack([v.sqrt() * scale for v, scale in zip(variances, scales)]))


def _share(rp: Tensor, leg: Tensor) -> Tensor:
    """k = V_RP / (V_RP + V_LR); 0 where both are 0."""
    return rp / (leg + rp).clamp_min(_tiny(rp))


def _shares(deviations: Tensor) -> list[Tensor]:
    """Inverse-variance weights from standard deviations [1 + L, ...]; non-finite legs get 0."""
    deviations = deviations.nan_to_num(nan=math.inf, posinf=math.inf).clamp_min(_tiny(deviations))
    precisions = (deviations.amin(0) / deviations).square()
    return list(precisions[1:] / precisions.sum(0))


def _require(probe: Probe | None, name: str) -> Probe:
    if probe is None:
        raise ValueError(
            f"weight rule '{name}' works in policy-parameter space and needs probe=...; pass one "
            "(estimators.ParameterProbe) or choose estimator 'tpx', which needs none"
        )
    return probe


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny
