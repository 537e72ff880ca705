"""The stochastic node: one pure autograd function in which legs are mixed, and the credit.

    (zeta, noise, credit) -> (sample, credit')

`credit` is a tensor of zeros, one per sample, threaded through the rollout; every cost that a node
can influence is multiplied by (1 + credit). Forward, nothing changes. Backward, the node receives
dL/dsample, the pathwise signal, and dL/dcredit', which *is* the return-to-go of each sample in the
loss's own scale. It forms its legs from them, lets the weight rule choose k and returns the mixture
to zeta. What bypasses the node is ordinary autograd.

Schulman et al. 2015 (stochastic computation graphs); Parmas 2018 (total propagation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from totalprop.estimators.baselines import Baseline, leave_one_out
from totalprop.estimators.declarations import declared
from totalprop.estimators.legs import Leg, Zeta, draw, pathwise, score
from totalprop.estimators.mixing import Weight, largest_usable
from totalprop.estimators.probes import Probe, restrict


def assign_credit(cost: Tensor, credit: Tensor) -> Tensor:
    """The cost, credited: cost·(1 + credit), same value.

    Every differentiable term downstream of a node must be credited with the credit that left the
    last node before it; an uncredited term is silently shrunk by (1 - k).

    Args:
        cost: [N] or [..., N], any term of the loss. credit: [N], or the cost's shape.

    Raises:
        ValueError: the product would have another shape than the cost. A cost [N, 1] and a credit
            [N] would give [N, N], and every sample the returns of all.
    """
    shape = torch.broadcast_shapes(cost.shape, credit.shape)
    if shape != cost.shape:
        raise ValueError(
            f"a cost of shape {list(cost.shape)} cannot take a credit of shape "
            f"{list(credit.shape)}: one number per sample is needed, e.g. cost.squeeze(-1)"
        )
    return cost * (1 + credit)


def infer_noise(mean: Tensor, std: Tensor, sample: Tensor) -> Tensor:
    """The noise that gives a known sample: (sample - mean) / std, detached, [N, ..., D].

    For nodes on real data: with it the node returns the data and differentiates as usual.
    """
    return ((sample - mean) / std).detach()


@dataclass(frozen=True)
class Estimator:
    """A policy-gradient estimator: called at every stochastic node in place of `mean + std·noise`.

    Attributes:
        weight: rule for k (0 = pathwise, 1 = score legs), see `estimators.mixing`.
        legs: the score legs, see `estimators.legs`; usually one.
        baseline: what is subtracted from the returns, see `estimators.baselines`.
        cross_fit: choose k for each half of the batch from the other half. At a single node this
            makes a composite unbiased; in a chain what is left is of second order (the other
            half's k depends on k's further down the chain, which depend on this half). A half
            whose own pathwise leg explodes does without it.
        probe: what the rule needs to know of policy-parameter space: nothing, all parameters, or a
            subset of them (Dreamer, PIPPS: the policy's last layer). The caller builds the probe.
        whole_graph: combine once, over the whole graph, with `estimators.gradient` (only `ivw`).
        source: paper and equation.

    Raises:
        ValueError: cross_fit of a whole-graph estimator, which has one k for all samples.
    """

    weight: Weight
    legs: tuple[Leg, ...] = (score,)
    baseline: Baseline = leave_one_out
    cross_fit: bool = False
    probe: Literal["none", "all", "subset"] = "none"
    whole_graph: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        if self.whole_graph and self.cross_fit:
            raise ValueError(
                "a whole-graph estimator combines once, with one k for all samples: cross_fit must "
                "be False, or choose a nodewise estimator such as 'tpx'"
            )

    @property
    def needs_pathwise(self) -> bool:
        """Whether the rule may use the pathwise leg: the loss must be differentiable then."""
        return declared(self.weight, "needs_pathwise")

    @property
    def needs_score(self) -> bool:
        """Whether the rule may use the score legs."""
        return declared(self.weight, "needs_score")

    @property
    def needs_value(self) -> bool:
        """Whether the baseline asks for a critic's `value`."""
        return declared(self.baseline, "needs_value")

    def __call__(
        self,
        mean: Tensor,
        std: Tensor | None,
        noise: Tensor,
        credit: Tensor,
        *,
        probe: Probe | None = None,
        value: Tensor | None = None,
        meter: Tensor | None = None,
        tap: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample the node; its backward mixes the legs.

        Args:
            mean: [N, ..., D], samples on axis 0; gradients flow. With `std=None`: the logits of a
                one-hot categorical.
            std: [N, ..., D], positive; gradients flow. None for a categorical.
            noise: [N, ..., D] standard normal (categorical: Gumbel), or from `infer_noise`.
            credit: [N, ...] the credit that left the previous node, or zeros at the start.
            probe: needed by `tp`, `tps`, `tpg`, see `estimators.probes`.
            value: [N, ...] critic's estimate of the return, for baselines.critic; no gradient.
            meter: zeros broadcastable from [1, ..., D]; its gradient becomes k (mean over samples).
            tap: zeros [N, P]; its gradient collects per-sample parameter gradients (with probe).
        Returns:
            sample [N, ..., D] and the credit for every cost and node downstream.
        Raises:
            ValueError: an argument of the wrong shape; whole-graph estimators, which cannot be
                called.
        """
        if self.whole_graph:
            raise ValueError(
                "this estimator combines whole-graph gradients and has no node of its own; "
                "call estimators.gradient(rollout, ...) instead"
            )
        zeta = (mean,) if std is None else (mean, std)
        return stochastic_node(
            self, zeta, noise, credit, probe=probe, value=value, meter=meter, tap=tap
        )


def stochastic_node(
    estimator: Estimator,
    zeta: Zeta,
    noise: Tensor,
    credit: Tensor,
    *,
    probe: Probe | None = None,
    value: Tensor | None = None,
    meter: Tensor | None = None,
    tap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample a node whose backward is the estimator's. See `Estimator.__call__`."""
    shape, samples = zeta[0].shape, zeta[0].shape[:-1]
    if credit.shape != samples:
        raise ValueError(
            f"credit must have the node's shape without its last axis, {list(samples)}, "
            f"got {list(credit.shape)}; start a rollout with credit = mean.new_zeros(N)"
        )
    if value is not None and value.shape != samples:
        raise ValueError(
            f"value must have the credit's shape, {list(samples)}, got {list(value.shape)}; "
            "a critic's [N, 1] needs value.squeeze(-1)"
        )
    for name, x, own in (
        ("std", zeta[-1], "std.expand_as(mean)"), ("noise", noise, "torch.randn_like(mean)")
    ):  # fmt: skip
        if not isinstance(x, Tensor) or x.shape != shape:
            got = list(x.shape) if isinstance(x, Tensor) else repr(x)
            raise ValueError(
                f"{name} must have the node's shape, {list(shape)}, got {got}; "
                f"every entry needs its own: {own}"
            )
    if credit.dtype != zeta[0].dtype:
        raise ValueError(
            f"credit must have the node's dtype, {zeta[0].dtype}, got {credit.dtype}; start a "
            "rollout with credit = mean.new_zeros(N)"
        )
    if tap is not None and probe is None:
        raise ValueError("tap=... collects per-sample parameter gradients and needs probe=... too")
    sample, credit = _Node.apply(estimator, probe, noise, credit, value, meter, tap, *zeta)
    return sample, credit


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        estimator: Estimator,
        probe: Probe | None,
        noise: Tensor,
        credit: Tensor,
        value: Tensor | None,
        meter: Tensor | None,
        tap: Tensor | None,
        *zeta: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.estimator, ctx.probe = estimator, probe
        ctx.meter_shape = None if meter is None else meter.shape
        ctx.has_tap = tap is not None
        ctx.save_for_backward(noise, value, *zeta)
        return draw(zeta, noise), credit.clone()

    @staticmethod
    def backward(ctx: Any, g_sample: Tensor, returns: Tensor) -> tuple[Tensor | None, ...]:
        noise, value, *zeta = ctx.saved_tensors
        g_zeta, k = mix(ctx.estimator, tuple(zeta), noise, g_sample, returns, value, ctx.probe)
        if torch.is_grad_enabled() and ctx.estimator.needs_score:
            g_zeta = _Once.apply(*g_zeta, g_sample, returns, *zeta)[: len(g_zeta)]
        g_meter = None
        if ctx.meter_shape is not None:
            g_meter = torch.where(_has_pathwise(k), k, 1.0).mean(0).expand(ctx.meter_shape)
        g_tap = ctx.probe(g_zeta) if ctx.has_tap else None
        return (None, None, None, returns, None, g_meter, g_tap, *g_zeta)


class _Once(torch.autograd.Function):
    """The same tensors, which cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "the derivative of a score leg is not that of the gradient it estimates: second "
            "derivatives pass through the nodes of estimator 'rp' only"
        )


def mix(
    estimator: Estimator,
    zeta: Zeta,
    noise: Tensor,
    g_sample: Tensor,
    returns: Tensor,
    value: Tensor | None,
    probe: Probe | None,
) -> tuple[Zeta, Tensor]:
    """The backward of a node as a pure function of what it saved and received.

    Returns:
        The cotangent of zeta, and the total weight k of the score legs, broadcastable to zeta, as
        the rule gave it.
    """
    rp = pathwise(zeta, noise, g_sample)
    if not estimator.needs_score:
        return rp, torch.zeros_like(rp[0][:1])
    if not estimator.cross_fit:
        return _combine(rp, *_weigh(estimator, zeta, noise, rp, returns, value, probe))
    # Each half has its own baseline, and uses the k of the other: nothing of a sample is in its k.
    n = len(noise)

    def half(rows: slice) -> tuple[Zeta, list[Zeta], list[Tensor]]:
        part, part_zeta = tuple(g[rows] for g in rp), tuple(z[rows] for z in zeta)
        part_value = None if value is None else value[rows]
        part_probe = probe and restrict(probe, rows, n)
        return part, *_weigh(
            estimator, part_zeta, noise[rows], part, returns[rows], part_value, part_probe
        )

    (rp_1, legs_1, k_1), (rp_2, legs_2, k_2) = half(slice(0, n // 2)), half(slice(n // 2, n))
    first = _combine(rp_1, legs_1, _borrowed(k_2, k_1, rp_1, legs_1))
    second = _combine(rp_2, legs_2, _borrowed(k_1, k_2, rp_2, legs_2))
    g_zeta = tuple(torch.cat(pair) for pair in zip(first[0], second[0], strict=True))
    return g_zeta, torch.cat((first[1], second[1]))


def _borrowed(k: list[Tensor], own: list[Tensor], rp: Zeta, legs: list[Zeta]) -> list[Tensor]:
    """The other half's k, but the own, which is 1, for an exploded pathwise leg.

    Exploded is not finite, or so far above the score legs that k would round to 1. That k is 1 says
    less: a clipped one often is, and to use the own then would bias the mixture.
    """
    dims = tuple(range(rp[0].ndim - 1))  # all but the coordinates
    largest = torch.stack([leg[0].abs().amax(dims) for leg in legs]).amax(0)
    is_usable = rp[0].abs().amax(dims) <= largest_usable(largest)  # [D]
    return [torch.where(is_usable, *pair) for pair in zip(k, own, strict=True)]


def _weigh(
    estimator: Estimator,
    zeta: Zeta,
    noise: Tensor,
    rp: Zeta,
    returns: Tensor,
    value: Tensor | None,
    probe: Probe | None,
) -> tuple[list[Zeta], list[Tensor]]:
    """The score legs, and the weight of each."""
    legs = [leg(zeta, noise, returns, value, estimator.baseline) for leg in estimator.legs]
    return legs, estimator.weight(rp, legs, probe)


def _has_pathwise(k: Tensor) -> Tensor:
    """Where the pathwise leg has a weight.

    Within round-off of k = 1 the remainder is noise, which an exploded pathwise leg would amplify;
    a k that is not a number comes from a pathwise leg that is not finite.
    """
    return k < 1 - 8 * torch.finfo(k.dtype).eps


def _combine(rp: Zeta, legs: list[Zeta], k: list[Tensor]) -> tuple[Zeta, Tensor]:
    """rp + Σ_l k_l (leg_l - rp), and Σ_l k_l; without a pathwise weight the score legs alone."""
    total = k[0] if len(k) == 1 else torch.stack(k).sum(0)
    has_rp = _has_pathwise(total)
    mixed = []
    for member, g_rp in enumerate(rp):
        if len(k) == 1:
            g_legs, g = legs[0][member], torch.lerp(g_rp, legs[0][member], total)
        else:
            g_legs = sum(
                (w * leg[member] for w, leg in zip(k, legs, strict=True)),
                start=torch.zeros_like(g_rp),
            )
            g = g_rp * (1 - total) + g_legs
        mixed.append(torch.where(has_rp, g, g_legs))
    return tuple(mixed), total
