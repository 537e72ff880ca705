"""The policy gradient of a rollout, by one call for nodewise and whole-graph estimators alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from totalprop.estimators.collectives import gathered, own
from totalprop.estimators.declarations import declared, has
from totalprop.estimators.gauge import without_mixture
from totalprop.estimators.legs import nothing
from totalprop.estimators.mixing import (
    Context,
    GraphContext,
    likelihood_ratio,
    pathwise,
)
from totalprop.estimators.node import Estimator
from totalprop.estimators.probes import Zeta
from totalprop.estimators.registry import make

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
    parameters: Iterable[Tensor],
    estimator: str | Estimator,
    *,
    samples: int,
    per_sample: bool = False,
    tap_size: int | None = None,
    meter: Tensor | None = None,
    gauge: Tensor | None = None,
) -> PolicyGradient:
    """Compute the gradient of a rollout's loss w.r.t. the parameters.

    Nodewise estimators take one backward pass. All others take several with the same noise: first
    RP at every node, from which legs such as `legs.first_order` are made. Whole-graph estimators go
    on with their `base`, if they have one, and LR at every node. They combine two gradients once,
    g = k g_LR + (1 - k) g_RP, with a k from the per-sample gradients; that of `ivw` is
    V_RP / (V_RP + V_LR) (Parmas et al. 2023, Sec. 3, Eq. 5). With a `base`, the calmest of RP
    and the base has the place of RP.

    Args:
        rollout: (estimator, tap) -> loss []. It calls the estimator at its nodes, passes them the
            tap and a probe, and uses the same noise on every call.
        parameters: the tensors to differentiate w.r.t., P elements in all, in the probe's order.
        estimator: a registered name, or an `Estimator`.
        samples: N.
        per_sample: also return the per-sample gradients, which needs probes over all parameters.
            They sum to the gradient if the parameters act through the nodes only.
        tap_size: number of parameters covered by the rollout's probes, if fewer than P. A
            whole-graph rule then chooses k from these alone.
        meter: zeros that require grad, which the rollout passes to its nodes to record k, or None.
        gauge: zeros [..., 4, 2] that require grad, which it passes to its nodes to measure their
            legs, or None. For whole-graph rules the gradient at a node is no mixture, and has no
            ratio.
    Returns:
        The loss and its gradients; the per-sample gradients and k if they were asked for.
    Raises:
        ValueError: there are no parameters, or one needs no gradient; the loss depends on no node;
            the estimator's name is unknown or does not fit the nodes; per-sample gradients are
            needed, and the nodes were called without the tap.
    """
    estimator, parameters = make(estimator), list(parameters)
    if not parameters or not all(p.requires_grad for p in parameters):
        raise ValueError(
            "gradient needs parameters with requires_grad=True, got "
            f"{[list(p.shape) for p in parameters if not p.requires_grad] or 'none'}"
        )
    size = tap_size or sum(p.numel() for p in parameters)
    passes = _Passes(rollout, parameters, samples, size, meter, gauge, estimator.group)
    if not estimator.several_passes:
        return passes.one(estimator, per_sample)
    recorder = _Recorder(estimator)
    of_rp = replace(_nodewise(estimator), weight=recorder, legs=(nothing,))
    rp = passes.of_all(of_rp) if estimator.whole_graph else passes.one(of_rp, False)
    graph = recorder.graph()
    if not graph.nodes:
        raise ValueError(
            "the loss depends on no stochastic node: call the estimator that the rollout is given "
            "at every node, and average the credited costs"
        )
    is_gaussian = all(len(node.zeta) == 2 for node in graph.nodes)
    if not is_gaussian and not declared(estimator.weight, "categorical_nodes"):
        raise ValueError(
            "the estimator needs Gaussian nodes, got categorical ones; use estimator 'tpx'"
        )
    if not estimator.whole_graph:
        return passes.one(_bound(estimator, graph, estimator.group), per_sample)
    return _whole_graph(passes, estimator, graph, rp)


class _Passes(NamedTuple):
    """Backward passes through the same rollout, of one estimator each."""

    rollout: RolloutLoss
    parameters: list[Tensor]
    samples: int
    size: int  # of a row of the tap
    meter: Tensor | None
    gauge: Tensor | None
    group: dist.ProcessGroup | None

    def one(self, estimator: Estimator, tapped: bool) -> PolicyGradient:
        """One pass; its per-sample gradients are this process's."""
        parameters, tap = self.parameters, None
        if tapped:
            tap = parameters[0].new_zeros(self.samples, self.size, requires_grad=True)
        loss = self.rollout(estimator, tap)
        extra = [x for x in (tap, self.meter, self.gauge) if x is not None]
        n = len(parameters)
        found = torch.autograd.grad(loss, [*parameters, *extra], allow_unused=True)
        if tap is not None and found[n] is None:
            raise ValueError(
                "per-sample gradients are needed, and no node of the loss recorded them: pass the "
                "tap that the rollout is given, and a probe, to every node"
            )
        found = tuple(
            torch.zeros_like(x) if g is None else g
            for x, g in zip([*parameters, *extra], found, strict=True)
        )
        rest = iter(found[n:])
        of_tap, k, of_gauge = (
            None if x is None else next(rest) for x in (tap, self.meter, self.gauge)
        )
        return PolicyGradient(loss.detach(), found[:n], of_tap, k, of_gauge)

    def of_all(self, estimator: Estimator) -> PolicyGradient:
        """One pass; its per-sample gradients are of all processes."""
        found = self.one(estimator, True)
        if self.group is None:
            return found
        assert found.per_sample is not None
        return found._replace(per_sample=gathered(self.group, [found.per_sample])[0])


def _whole_graph(
    passes: _Passes, estimator: Estimator, graph: GraphContext, rp: PolicyGradient
) -> PolicyGradient:
    """Combine RP's gradient, or a calmer one of the bases, with LR's by one k."""
    group = passes.group
    if estimator.base:
        # The composites' k were fitted to the same samples, one for each node that a coordinate's
        # gradient came through; so their variance counts more (Akaike 1974; Mallows 1973).
        whole = passes.samples if group is None else passes.samples * group.size()
        factor = 1 + 2 * len(graph.nodes) / whole
        bases = (passes.of_all(_bound(base, graph, group)) for base in estimator.base)
        rp = _calmer(functools.reduce(_calmer, bases), rp, factor**0.5)
    of_lr = replace(_nodewise(estimator), weight=likelihood_ratio)
    lr = passes.of_all(_bound(of_lr, graph, group))
    assert rp.per_sample is not None and lr.per_sample is not None
    told = graph if has(estimator.weight, "takes_context") else None
    (found,) = estimator.weight((rp.per_sample,), [(lr.per_sample,)], told)
    k = _one_weight(found)

    def mix(g_rp: Tensor, g_lr: Tensor) -> Tensor:
        return torch.where(k < 1, torch.lerp(g_rp, g_lr, k), g_lr)

    gradients = tuple(mix(*pair) for pair in zip(rp.gradients, lr.gradients, strict=True))
    used = None if passes.meter is None else k.expand_as(passes.meter)
    legs = None if rp.gauge is None else without_mixture(rp.gauge)
    mixed = mix(rp.per_sample, lr.per_sample)
    if group is not None:
        mixed = own(group, mixed)
    return PolicyGradient(rp.loss, gradients, mixed, used, legs)


def _nodewise(estimator: Estimator) -> Estimator:
    """The estimator without what is done to the whole graph."""
    return replace(estimator, whole_graph=False, base=())


def _bound(estimator: Estimator, graph: GraphContext, group: dist.ProcessGroup | None) -> Estimator:
    """The estimator of a group's processes, with those legs made that need the graph."""
    made = [leg(graph) if has(leg, "needs_graph") else leg for leg in estimator.legs]
    return replace(estimator, legs=tuple(made), group=group)


def _calmer(a: PolicyGradient, b: PolicyGradient, factor: float = 1.0) -> PolicyGradient:
    """The one of two gradients whose per-sample gradients vary less; those of a count more."""
    assert a.per_sample is not None and b.per_sample is not None
    is_b = _spread(b.per_sample) < factor * _spread(a.per_sample)

    def pick(of_a: Tensor | None, of_b: Tensor | None) -> Tensor | None:
        return None if of_a is None or of_b is None else torch.where(is_b, of_b, of_a)

    gradients = tuple(torch.where(is_b, y, x) for x, y in zip(a.gradients, b.gradients))
    return PolicyGradient(a.loss, gradients, *(pick(x, y) for x, y in zip(a[2:], b[2:])))


def _spread(per_sample: Tensor) -> Tensor:
    """Total standard deviation over the samples, without overflow; infinite if not finite."""
    largest = torch.linalg.vector_norm(per_sample, math.inf)
    largest = largest.clamp_min(torch.finfo(per_sample.dtype).tiny)
    return ((per_sample / largest).var(0).sum().sqrt() * largest).nan_to_num(nan=math.inf)


class _Recorder:
    """The pathwise rule, which keeps what each node is told. The last node comes first."""

    takes_context = True

    def __init__(self, estimator: Estimator) -> None:
        """Of a pass of this estimator."""
        rule = estimator.weight
        self.compares_means = has(rule, "compares_means") or not declared(rule, "needs_pathwise")
        self.nodes: list[Context] = []
        self.pathwise: list[Zeta] = []

    def __call__(self, rp: Zeta, legs: Sequence[Zeta], context: Context) -> list[Tensor]:
        self.nodes.append(context)
        self.pathwise.append(rp)
        return pathwise(rp, legs, context.probe)

    def graph(self) -> GraphContext:
        """All nodes, in the order in which they were drawn; they are forgotten here.

        Each holds a part of the loss's graph, which holds this rule: a cycle through autograd that
        Python's garbage collector does not see.
        """
        nodes, pathwise_legs = self.nodes[::-1], self.pathwise[::-1]
        self.nodes, self.pathwise = [], []
        return GraphContext(nodes, pathwise_legs)


def _one_weight(k: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The single k [] of a whole-graph rule; 1 where it is not a number."""
    if isinstance(k, tuple) or k.numel() != 1:
        raise ValueError(
            "a whole-graph rule returns one k for all parameters, got "
            f"{[list(x.shape) for x in k] if isinstance(k, tuple) else list(k.shape)}; use it "
            "without whole_graph=True, at every node"
        )
    return k.reshape(()).nan_to_num(nan=1.0)
