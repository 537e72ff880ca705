"""The policy gradient of a rollout, by one call for nodewise and whole-graph estimators alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from totalprop.estimators.gauge import without_mixture
from totalprop.estimators.mixing import likelihood_ratio, pathwise, whole_graph_ivw
from totalprop.estimators.node import Estimator

RolloutLoss = Callable[[Estimator, "Tensor | None"], Tensor]


class PolicyGradient(NamedTuple):
    """The result of `gradient`."""

    loss: Tensor  # [] value of the loss, detached
    gradients: tuple[Tensor, ...]  # one per parameter, of its shape
    per_sample: Tensor | None  # [N, P] gradient of each sample, through the nodes only
    k: Tensor | None  # the meter's shape: total weight of the score legs
    gauge: Tensor | None = None  # the gauge's shape, for `estimators.gauge.read`


def gradient(
    rollout: RolloutLoss,
    parameters: Sequence[Tensor],
    estimator: Estimator,
    *,
    samples: int,
    per_sample: bool = False,
    tap_size: int | None = None,
    meter: Tensor | None = None,
    gauge: Tensor | None = None,
) -> PolicyGradient:
    """Compute the gradient of a rollout's loss w.r.t. the parameters.

    Nodewise estimators take one backward pass. The naive `ivw` takes two with the same noise, RP at
    every node and then LR at every node. It combines the two gradients once,
    g = k g_LR + (1 - k) g_RP, with k = V_RP / (V_RP + V_LR) from the per-sample gradients.
    Parmas et al. 2023, Sec. 3, Eq. 5.

    Args:
        rollout: (estimator, tap) -> loss []. It calls the estimator at its nodes, passes them the
            tap and a probe, and uses the same noise on every call.
        parameters: the tensors to differentiate w.r.t., P elements in all, in the probe's order.
        estimator: any estimator, for example `make("tpx")`.
        samples: N.
        per_sample: also return the per-sample gradients, which needs probes over all parameters.
            They sum to the gradient if the parameters act through the nodes only.
        tap_size: number of parameters covered by the rollout's probes, if fewer than P. `ivw` then
            chooses k from these alone.
        meter: zeros that require grad, which the rollout passes to its nodes to record k, or None.
        gauge: zeros [..., 4, 2] that require grad, which it passes to its nodes to measure their
            legs, or None. For `ivw` the gradient at a node is no mixture, and has no ratio.
    Returns:
        The loss and its gradients; the per-sample gradients and k if they were asked for.
    """
    size = tap_size or sum(p.numel() for p in parameters)

    def backward(estimator: Estimator, tapped: bool) -> PolicyGradient:
        tap = parameters[0].new_zeros(samples, size, requires_grad=True) if tapped else None
        loss = rollout(estimator, tap)
        extra = [x for x in (tap, meter, gauge) if x is not None]
        n = len(parameters)
        found = torch.autograd.grad(loss, [*parameters, *extra], materialize_grads=True)
        rest = iter(found[n:])
        of_tap, k, of_gauge = (None if x is None else next(rest) for x in (tap, meter, gauge))
        return PolicyGradient(loss.detach(), found[:n], of_tap, k, of_gauge)

    if not estimator.whole_graph:
        return backward(estimator, per_sample)
    rp = backward(replace(estimator, weight=pathwise, whole_graph=False), True)
    lr = backward(replace(estimator, weight=likelihood_ratio, whole_graph=False), True)
    assert rp.per_sample is not None and lr.per_sample is not None
    k = whole_graph_ivw(rp.per_sample, lr.per_sample)

    def mix(g_rp: Tensor, g_lr: Tensor) -> Tensor:
        return torch.where(k < 1, torch.lerp(g_rp, g_lr, k), g_lr)

    gradients = tuple(mix(*pair) for pair in zip(rp.gradients, lr.gradients, strict=True))
    used = None if meter is None else k.expand_as(meter)
    legs = rp.gauge
    if legs is not None:
        legs = without_mixture(legs)
    return PolicyGradient(rp.loss, gradients, mix(rp.per_sample, lr.per_sample), used, legs)
