"""The policy gradient of a rollout: one call for every estimator, nodewise or whole-graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from totalprop.estimators.mixing import likelihood_ratio, pathwise, whole_graph_ivw
from totalprop.estimators.node import Estimator

Rollout = Callable[[Estimator, "Tensor | None"], Tensor]


class PolicyGradient(NamedTuple):
    """What `gradient` returns."""

    loss: Tensor  # [] value of the loss, detached
    gradients: tuple[Tensor, ...]  # like the parameters
    per_sample: Tensor | None  # [N, P] contributions of each sample, through the nodes
    k: Tensor | None  # like the meter: weight of the score legs


def gradient(
    rollout: Rollout,
    parameters: Sequence[Tensor],
    estimator: Estimator,
    *,
    samples: int,
    per_sample: bool = False,
    tap_size: int | None = None,
    meter: Tensor | None = None,
) -> PolicyGradient:
    """Gradient of a rollout's loss w.r.t. the parameters.

    Nodewise estimators take one backward pass. The naive `ivw` takes two, all RP and all LR over
    the same noise, and combines them once, g = k g_LR + (1 - k) g_RP with
    k = V_RP / (V_RP + V_LR) from the per-sample gradients (TPX 2023, Sec. 3, Eq. 5).

    Args:
        rollout: (estimator, tap) -> loss []. Calls the estimator at its nodes, passes the tap and a
            probe on, and draws the same noise each time it is called.
        parameters: what to differentiate by; P elements in all, in the probe's order.
        samples: N.
        per_sample: also return the per-sample gradients (needs probes of all parameters). They sum
            to the gradient where the parameters act through the nodes alone.
        tap_size: parameters that the rollout's probes know of, if not all P; then `ivw` chooses its
            k by these alone.
        meter: the zeros that the rollout passes to its nodes to learn k (requires grad), or None.
    """
    size = tap_size or sum(p.numel() for p in parameters)

    def backward(estimator: Estimator, tapped: bool) -> PolicyGradient:
        tap = parameters[0].new_zeros(samples, size, requires_grad=True) if tapped else None
        loss = rollout(estimator, tap)
        extra = [x for x in (tap, meter) if x is not None]
        found = torch.autograd.grad(loss, [*parameters, *extra], materialize_grads=True)
        n = len(parameters)
        return PolicyGradient(
            loss.detach(),
            found[:n],
            found[n] if tap is not None else None,
            found[-1] if meter is not None else None,
        )

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
    return PolicyGradient(rp.loss, gradients, mix(rp.per_sample, lr.per_sample), used)
