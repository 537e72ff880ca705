"""Weight rules: they choose k, the weight of each score leg; the pathwise leg gets the rest.

Every rule is a function (rp, legs, probe) -> [k, ...], one k per leg, broadcastable to [N, ..., D],
or a tuple of one for each member of zeta (mean and std). `rp` is the pathwise cotangent of zeta and
`legs` are the cotangents of the score legs (usually one), all in the scale of the loss. `probe` is
described in `estimators.probes`; a rule marked `@having("takes_context")` gets a `Context` instead.
The node computes rp + Σ_l k_l (leg_l - rp). Where the weights sum to 1 or to NaN it uses the score
legs alone, so that an exploding or non-finite pathwise leg never reaches the result. Weights may
lie outside [0, 1].

With delta = leg - rp, minimising Var(rp + k·delta) is a regression of -rp on delta (Parmas et al.
2023, Eq. 6 and 8). `tpx`, `tpg` and the mixture of several legs all solve this regression, each in
its own space.

A rule of least variance follows RP wherever RP is precise, even where it is wrong: a jump that a
sample may or may not cross has no derivative. The guarded rules minimise an estimate of the mean
squared error instead. Their bias of RP is the difference of the legs' means, where that is z of its
standard errors with z² > min(CERTAIN², 2 log(1 + DOUBT V_LR / V_RP)); less is taken for noise. A
false alarm costs LR's variance, so the larger that is the rarer it is made: with normal noise its
probability is about exp(-z² / 2) / z, and its average cost below V_RP / DOUBT, up to a ratio of the
variances of 10⁶. Heavy tails make it larger: it is 6 % of V_RP for a cost x² and 300 samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from totalprop.estimators.declarations import having, without
from totalprop.estimators.probes import Probe, Zeta, gram, gram_of_variables

K = Tensor | tuple[Tensor, ...]  # one for all members of zeta, or one for each
Weight = Callable[[Zeta, Sequence[Zeta], Any], Sequence[K]]

COTANGENT_SHARE = 1e-2  # weight of `tpx-ivw`'s objective in that of `tpg`
CERTAIN = 6.0  # standard errors between the legs' means above which RP always counts as biased
# The average cost of false alarms, as a fraction of RP's variance, is below 1 / DOUBT.
DOUBT = 100.0
DOUBT_OF_GRAPH = 20.0  # where one test is made instead of one at each node
DOUBT_OF_ROUGHNESS = 1.0  # where the variance of the return is tested, beside ROUGH
ROUGH = 3.0  # standard errors by which a rough return always varies more than a smooth one can
RIDGE = 1e-9  # relative; keeps the small linear systems solvable when legs are collinear


class Context(NamedTuple):
    """What a rule marked `@having("takes_context")` is told about its node.

    Attributes:
        probe: of the policy's parameters, or None.
        zeta: (mean, std) or (logits,), each [N, ..., D].
        noise: [N, ..., D].
        returns: [N, ...] return-to-go of each sample, in the scale of the loss.
        value: [N, ...] a critic's estimate of it, or None.
    """

    probe: Probe | None
    zeta: Zeta
    noise: Tensor
    returns: Tensor
    value: Tensor | None


class GraphContext(NamedTuple):
    """What a whole-graph rule marked with "takes_context" is told, in the probe's place.

    Attributes:
        nodes: the contexts of all nodes that the loss depends on, in the order in which they were
            drawn.
        pathwise: the pathwise cotangent of each node's zeta, in the RP pass.
    """

    nodes: Sequence[Context]
    pathwise: Sequence[Zeta]


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


def ivw_h(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[K]:
    """Inverse-variance weighting of each coordinate of mean and std by itself.

    Onoda et al. 2026 (IVW-H), App. E, Alg. 1, Eq. 16-18, as reported by others; the paper's text
    was not at hand. There the nodes are actions, the score leg's baseline is a critic, and earlier
    states receive the pathwise signal (`Estimator.carry`).
    """
    members = [
        _inverse_variance(g, [leg[i] for leg in legs], summed=False) for i, g in enumerate(rp)
    ]
    return [tuple(own) for own in zip(*members, strict=True)]


@having("needs_no_leg")
@without("cross_fit", "several_legs")
def cut(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None, *, limit: float = 4.0) -> list[Tensor]:
    """Clip the pathwise gradient of each sample: with the leg `nothing`, the estimator `rp-cut`.

    A sample whose cotangent of the mean is longer than `limit` medians is scaled down to that; the
    median is of those that have a gradient. This ends explosions and is biased, the more the
    heavier the tails are (on clipping through time, see Metz et al. 2021).

    Args:
        rp: pathwise cotangents of zeta.
        legs: those of `legs.nothing`.
        probe: not used.
        limit: in medians of the length, over the samples.
    """
    length = torch.linalg.vector_norm(rp[0], dim=-1, keepdim=True)
    length = length.nan_to_num(nan=math.inf)
    none, n = (length == 0).sum(0, keepdim=True), len(length)
    median = length.sort(0).values.gather(0, (none + (n - 1 - none) // 2).clamp(max=n - 1))
    bound = limit * median
    return [1 - (bound / length.clamp_min(_tiny(length))).clamp(max=1.0)]


def tpx_ivw_scalar(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[Tensor]:
    """`tpx-ivw` with the variances summed over the coordinates. Parmas et al. 2023, App. D."""
    return _inverse_variance(rp[0], [leg[0] for leg in legs], summed=True)


@having("compares_means")
@without("several_legs")
def tpx_guarded(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[K]:
    """`tpx` of least mean squared error, where the means of the legs differ too much for chance.

    With variances V and covariance C of single samples, N samples and the mean d of LR - RP,

        k = (V_RP - C + b) / (V_LR + V_RP - 2 C + b),  b = N d² - Var(LR - RP)

    where the legs differ (see above); elsewhere b = 0, and k is that of `tpx`. Mean and std are
    tested each by itself. This project; no paper.
    """
    (leg,) = legs
    found = _compare(torch.cat(rp, -1), torch.cat(leg, -1))  # all members at once, for speed
    shared = torch.cat([found.k(0.0)[..., : rp[0].shape[-1]]] * len(rp), -1)
    k = torch.where(found.differs, found.k(found.square - found.difference), shared)
    return [k.chunk(len(rp), -1)]


class _Comparison(NamedTuple):
    """Two legs [N, ...], along their samples; squares in units of the largest |LR - RP|²."""

    gain: Tensor  # V_RP - C
    difference: Tensor  # Var(LR - RP)
    square: Tensor  # N d²
    ratio: Tensor  # V_LR / V_RP
    mean: Tensor  # of LR - RP
    centred: Tensor  # [N, ...] LR - RP less its mean

    @property
    def differs(self) -> Tensor:
        """Whether chance does not explain d."""
        return self.square > _evidence(self.ratio, DOUBT) * self.difference

    @property
    def differs_in_graph(self) -> Tensor:
        """The same for all coordinates, whose standard errors are corrected for skewness."""
        along = (self.centred * self.mean).sum(-1, keepdim=True)
        z = (self.square / self.difference.clamp_min(_tiny(self.square))).sqrt()
        return _corrected(z, along).square() > _evidence(self.ratio, DOUBT_OF_GRAPH)

    def k(self, bias: Tensor | float) -> Tensor:
        """The k in [0, 1] of least mean squared error, if RP's squared bias times N is this."""
        k = (self.gain + bias) / (self.difference + bias).clamp_min(_tiny(self.gain))
        return k.clamp(0.0, 1.0)


def _evidence(ratio: Tensor, doubt: float) -> Tensor:
    """Squared number of standard errors up to which chance explains a difference."""
    return (2 * torch.log1p(doubt * ratio)).clamp(max=CERTAIN**2)


def _compare(rp: Tensor, lr: Tensor, *, summed: bool = False) -> _Comparison:
    """Compare RP and LR per coordinate, or all coordinates of the last axis together."""
    delta, n = lr - rp, len(rp)
    dims = (0, -1) if summed else (0,)
    scale = torch.linalg.vector_norm(delta, math.inf, dim=dims, keepdim=True)
    scale = scale.clamp_min(_tiny(delta))
    rp, lr, delta = rp / scale, lr / scale, delta / scale
    mean = delta.mean(0, keepdim=True)
    centred = [x - x.mean(0, keepdim=True) for x in (rp, lr)]
    centred.append(delta - mean)

    def spread(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dims, keepdim=True) / max(n - 1, 1)

    v_rp, v_lr, difference = (spread(x, x) for x in centred)
    square = n * (mean.square().sum(-1, keepdim=True) if summed else mean.square())
    ratio = v_lr / v_rp.clamp_min(_tiny(v_rp))
    gain = -spread(centred[2], centred[0])
    return _Comparison(gain, difference, square, ratio, mean, centred[2])


def _corrected(z: Tensor, samples: Tensor) -> Tensor:
    """A number of standard errors of a mean, as normal samples would have it.

    Where a long tail decides the mean, a batch that misses it has a small mean and a small spread,
    so that chance seems impossible; and one sample of it that was caught counts for more than its
    standard error says. Hall 1992, "On the removal of skewness by transformation", Eq. 1.

    Args:
        z: [1, ...], along the direction in which the samples are given.
        samples: [N, ...] less their mean, in any unit.
    """
    scale = torch.linalg.vector_norm(samples, math.inf, dim=0, keepdim=True)
    samples = samples / scale.clamp_min(_tiny(samples))
    spread = samples.square().mean(0, keepdim=True).sqrt()
    skewness = samples.pow(3).mean(0, keepdim=True) / spread.pow(3).clamp_min(_tiny(samples))
    third, z = skewness / (3 * len(samples) ** 0.5), z.clamp(-1e6, 1e6)
    return z + third * (z.square() + 0.5) + third.square() * z.pow(3) / 3


def tp(
    rp: Zeta, legs: Sequence[Zeta], probe: Probe | None, *, guarded: bool = False
) -> list[Tensor]:
    """One scalar k per node, from the variances of the per-sample policy-parameter gradients.

    k = V_RP / (V_RP + V_LR) with V = Σ_p Var_i.
    Parmas et al. 2018 (PIPPS), Alg. 2; Parmas et al. 2023, Eq. 5. `tps` is the same rule with a
    probe over fewer parameters (Parmas et al. 2023, Sec. 4).

    Args:
        rp: pathwise cotangents of zeta.
        legs: cotangents of the score legs; one if it is guarded.
        probe: a probe over the policy's parameters; required.
        guarded: see `tp_guarded`.
    """
    fields = [torch.stack(member) for member in zip(rp, *legs, strict=True)]  # [1 + L, N, ..., D]
    if len(legs) == 1:
        scale = torch.linalg.vector_norm(fields[0], math.inf)
    else:  # one scale per leg, so that an exploded leg costs the others no precision
        scale = torch.linalg.vector_norm(fields[0].flatten(1), math.inf, dim=1)
        scale = scale[(...,) + (None,) * rp[0].ndim]
    scale = scale.clamp_min(_tiny(fields[0]))
    products = gram(_require(probe, "tp"), tuple(f / scale for f in fields))
    variances = products.covariance.diagonal().clamp_min(0.0)
    if len(legs) == 1:
        v_rp, v_lr = variances.unbind()
        if guarded:
            doubted = torch.stack([x.any() for x in _doubted(rp, legs[0])]).any()
            square, variance = (
                m[0, 0] + m[1, 1] - 2 * m[0, 1] for m in (products.mean, products.covariance)
            )
            bias = (square * (len(rp[0]) - 1) - variance).clamp_min(0.0)
            v_rp = v_rp + torch.where(doubted, bias, 0.0)
        return [_share(v_rp, v_lr).view((1,) * rp[0].ndim)]
    return _shares(variances[(...,) + (None,) * rp[0].ndim].sqrt() * scale)


@having("compares_means")
@without("several_legs")
def tp_guarded(rp: Zeta, legs: Sequence[Zeta], probe: Probe | None) -> list[Tensor]:
    """`tp` with the squared bias of RP added to its variance.

    If the means of the legs differ too much for chance at any coordinate, the bias is the
    difference of their mean parameter gradients. This project; no paper.
    """
    return tp(rp, legs, probe, guarded=True)


@without("more_axes", "several_legs")
def tpg(
    rp: Zeta,
    legs: Sequence[Zeta],
    probe: Probe | None,
    *,
    carried: float = 1.0,
    guarded: bool = False,
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
        guarded: see `tpg_guarded`.
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
    covariance, means, _ = gram_of_variables(_require(probe, "tpg"), scaled)
    d = len(usable)
    c_rp, c_lr = covariance[:d, :d], covariance[d:, d:]
    penalty = carried * c_lr.diagonal()
    v_rp, v_lr = (spread_rp / scale).square(), (spread_lr / scale).square()
    if guarded:
        b, b_cotangent = _bias_of_variables(scaled, means)
        c_rp, v_rp = c_rp + b, v_rp + b_cotangent
    unit = COTANGENT_SHARE * c_lr.trace() / v_lr.sum().clamp_min(_tiny(scale))
    penalty = penalty + unit * v_lr
    system = c_rp + c_lr + torch.diag(penalty + unit * v_rp)
    size = system.diagonal().clamp_min(_tiny(scale)).sqrt()
    # Solve for 1 - k: its right-hand side does not contain the (possibly exploded) pathwise leg.
    pathwise_weight = _solve(system, size, c_lr.sum(1) + penalty, usable)
    return [(1 - pathwise_weight).clamp(0.0, 1.0).view(1, *shape)]


@having("compares_means")
@without("more_axes", "several_legs")
def tpg_guarded(
    rp: Zeta, legs: Sequence[Zeta], probe: Probe | None, *, carried: float = 1.0
) -> list[Tensor]:
    """`tpg` of least mean squared error.

    With N d_d the sum over the samples of J_id (LR - RP) of variable d, N |Σ_d (1 - k_d) d_d|² is
    added to the objective, for the variables whose legs differ in mean too much for chance. This
    project; no paper.
    """
    return tpg(rp, legs, probe, carried=carried, guarded=True)


def _bias_of_variables(legs: Sequence[Zeta], means: Tensor) -> tuple[Tensor, Tensor]:
    """The squared bias of RP [V, V] in the scale of `Gram.covariance`, and that of cotangents [V].

    Both are 0 for variables whose means do not differ more than noise explains.

    Args:
        legs: cotangents of RP and LR.
        means: [2 V, 2 V] `Gram.mean` of the variables of both.
    """
    rp, lr = legs
    v, n = len(means) // 2, len(rp[0])
    doubted = torch.stack([_by_variable(x, v) for x in _doubted(rp, lr)]).any(0)
    square = means[:v, :v] + means[v:, v:] - means[:v, v:] - means[v:, :v]
    both = doubted & doubted.unsqueeze(1)
    mean = (lr[0] - rp[0]).mean(0).square()
    of_cotangent = n * (mean if len(rp) == 2 else mean.sum(-1).flatten())
    return torch.where(both, (n - 1) * square, 0.0), torch.where(doubted, of_cotangent, 0.0)


def _doubted(rp: Zeta, lr: Zeta) -> list[Tensor]:
    """Where the means of the legs differ by more than chance explains, [1, ..., D] each."""
    return [_compare(*pair).differs for pair in zip(rp, lr, strict=True)]


def _by_variable(doubted: Tensor, variables: int) -> Tensor:
    """[1, ..., D] -> [V], whether any entry of a variable is doubted."""
    return doubted.reshape(variables, -1).any(1)


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


# Rules of whole-graph estimators: zeta has one member, the parameters, and the cotangents are the
# per-sample gradients [N, P] of RP and of LR. Any other rule that chooses one k is one, too: `ivw`
# is `tpx_ivw_scalar`.


def aobg(
    rp: Zeta,
    legs: Sequence[Zeta],
    probe: Probe | None,
    *,
    gamma: float = 1.0,
    confidence: float = 0.95,
) -> list[Tensor]:
    """Alpha-order batched gradient: inverse variances, as long as the bias stays below `gamma`.

    With the mean gradients g and l of RP and LR, their variances s1² and s0² and B = |g - l|,

        1 - k = α = s0² / (s0² + s1²),  if  α B <= γ - ε,  else (γ - ε) / B,  and 0 if ε > γ.

    ε bounds the error of l by the vector Bernstein inequality. Suh et al. 2022, Eq. 4, Lemma 4.4.
    Differs from the paper: the largest |l_i - l| stands for its almost sure bound.

    Args:
        rp: per-sample gradients ([N, P],) of RP, in the scale of the loss.
        legs: those of LR.
        probe: not used.
        gamma: tolerated bias γ, in units of the gradient.
        confidence: of the bound, 1 - δ.
    """
    (g,), (lr,) = rp, legs[0]
    n, d = lr.shape
    centred = n * (lr - lr.mean(0))
    v_lr = centred.square().sum() / max(n - 1, 1)
    bound = torch.linalg.vector_norm(centred, dim=1).amax()
    log = math.log((d + 1) / (1 - confidence))
    epsilon = (2 * v_lr * log / n).sqrt() + 2 * bound * log / (3 * n)
    alpha = 1 - _inverse_variance(g, [lr], summed=True)[0]
    bias = torch.linalg.vector_norm((g - lr).sum(0))
    allowed = (gamma - epsilon).clamp_min(0.0) / bias.clamp_min(_tiny(bias))
    return [1 - torch.minimum(alpha, allowed)]


@having("compares_means", "takes_context")
def guard(rp: Zeta, legs: Sequence[Zeta], context: GraphContext) -> list[Tensor]:
    """k of least mean squared error where the means differ too much for chance; else k = 0.

    With a biased but precise first gradient and LR, k is that of `tpx_guarded`, with variances and
    squares summed over the parameters. Over a long chain a bias that no single node can tell from
    noise adds up, and is seen here. Where few samples say little about the means, the return itself
    may tell: k = 1 if it varies more than a smooth one with these gradients can, see `_is_rough`.
    Here, too, more evidence is asked for where LR would add more variance.
    The number of standard errors is corrected for skewness. This project; no paper.
    """
    found = _compare(rp[0], legs[0][0], summed=True)
    k = found.k((found.square - found.difference).clamp_min(0.0))
    k = torch.where(found.differs_in_graph, k, 0.0)
    at_stake = _evidence(found.ratio.nan_to_num(nan=0.0), DOUBT_OF_ROUGHNESS)
    return [torch.where(_is_rough(context, at_stake.reshape(())), 1.0, k)]


def _sensitivities(context: GraphContext) -> Tensor:
    """[N, T] derivatives of each sample's return in the noise of all nodes."""
    return torch.cat(
        [
            (cotangent[0] * node.zeta[1]).flatten(1)
            for cotangent, node in zip(context.pathwise, context.nodes, strict=True)
        ],
        1,
    )


def _is_rough(context: GraphContext, at_stake: Tensor) -> Tensor:
    """Whether the return R varies more than a smooth function of the noise can.

    With the derivatives s of R in all noise, Hermite polynomials give Σ Var(s) = Σ_k k a_k² over
    the orders k >= 2, where Σ_k a_k² = Var(R) - Σ mean(s)². So for a smooth R

        2 Var(R) - 2 Σ mean(s)² - Σ Var(s) <= 0,

    the inequality of `ddcg` (Onoda et al. 2026) without its slack. Here it must be broken by z
    standard errors, from the influence of each sample, with z > ROUGH and z² > `at_stake` []. It is
    not asked where the samples start from different states, whose share of Var(R) is unknown, nor
    where a node is categorical.
    """
    nodes = context.nodes
    if any(len(node.zeta) != 2 for node in nodes):
        return torch.zeros((), dtype=torch.bool, device=nodes[0].returns.device)
    start_alike = torch.stack([(x == x[:1]).all() for x in nodes[0].zeta]).all()
    returns, s = nodes[0].returns, _sensitivities(context)
    returns = returns.reshape(len(s), -1).sum(1)
    scale = torch.linalg.vector_norm(returns - returns.mean(), math.inf)
    scale = scale.clamp_min(_tiny(returns))
    centred, mean = (returns - returns.mean()) / scale, s.mean(0) / scale
    s = s / scale - mean
    excess = 2 * centred.square() - s.square().sum(1)
    influence = excess - 4 * s @ mean
    error = influence.std() / len(s) ** 0.5
    # An unbiased Σ mean(s)²: its estimate is too large by the variance of the mean.
    linear = mean.square().sum() - s.square().sum() / (len(s) * max(len(s) - 1, 1))
    z = (excess.mean() - 2 * linear) / error.clamp_min(_tiny(error))
    z = _corrected(z, influence - influence.mean())
    return start_alike & (z > ROUGH) & (z.square() > at_stake)


@having("takes_context")
@without("categorical_nodes")
def ddcg(
    rp: Zeta, legs: Sequence[Zeta], context: GraphContext, *, slack: float = 0.3
) -> list[Tensor]:
    """Inverse variances, unless the return varies more than a smooth one with these gradients can.

    Expand a smooth R(x + σ ε) in Hermite polynomials of ε: its variance, less what is linear in ε,
    is at most half of σ² Var(R'). So k = 1 if

        Σ σ² Var(g) < 2 (1 - c) Var(R) - 2 Σ σ² mean(g)²,

    summed over all coordinates of all nodes, with the pathwise gradient g of the return in a
    coordinate. Onoda et al. 2026 (DDCG), Eq. 8 and 14, c = 0.3, for one node whose mean is the
    parameter; as reported by others, the paper's text was not at hand. What varies between the
    starts counts as a jump.

    Args:
        rp: per-sample gradients ([N, P],) of RP.
        legs: those of LR.
        context: of the graph.
        slack: c.
    """
    k = _inverse_variance(rp[0], [legs[0][0]], summed=True)[0]
    s, variance = _sensitivities(context), context.nodes[0].returns.var()
    spread, linear = s.var(0).sum(), s.mean(0).square().sum()
    return [torch.where(spread < 2 * (1 - slack) * variance - 2 * linear, 1.0, k)]


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
