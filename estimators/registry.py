"""The registry: an estimator is a weight rule, its legs and a baseline, found by name.

Every agent resolves a name once, in its constructor, with `make`. Other packages add theirs with
`register`, or by an entry point in the group `totalprop.estimators` that names an `Estimator`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any, Literal

from torch import Tensor

from estimators import baselines, legs, weights
from estimators.legs import Baseline, Leg
from estimators.node import stochastic_node
from estimators.probes import Probe
from estimators.weights import Weight

ENTRY_POINT_GROUP = "totalprop.estimators"


@dataclass(frozen=True)
class Estimator:
    """A policy-gradient estimator: called at every stochastic node in place of `mean + std·noise`.

    Attributes:
        weight: rule for k (0 = pathwise, 1 = score legs), see `estimators.weights`.
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
    legs: tuple[Leg, ...] = (legs.score,)
    baseline: Baseline = baselines.leave_one_out
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


_REGISTRY: dict[str, Estimator] = {
    "rp": Estimator(weights.pathwise, source="Kingma & Welling 2014; TPX 2023, Sec. 3"),
    "lr": Estimator(weights.likelihood_ratio, source="Williams 1992; TPX 2023, Sec. 3"),
    "tp": Estimator(weights.tp, probe="all", source="PIPPS 2018, Alg. 2; TPX 2023, Eq. 5"),
    "tps": Estimator(weights.tp, probe="subset", source="TPX 2023, Sec. 4"),
    "tpx": Estimator(weights.tpx, source="TPX 2023, Eq. 8, footnote 4"),
    "tpx-scalar": Estimator(weights.tpx_scalar, source="TPX 2023, App. D"),
    "tpx-ivw": Estimator(weights.tpx_ivw, source="TPX 2023, App. D"),
    "tpx-ivw-scalar": Estimator(weights.tpx_ivw_scalar, source="TPX 2023, App. D"),
    "ivw": Estimator(weights.pathwise, probe="all", whole_graph=True, source="TPX 2023, Sec. 3"),
    "tpg": Estimator(weights.tpg, probe="all", source="this project"),
}


def register(name: str, estimator: Estimator) -> None:
    """Add an estimator under a new name; it is then a valid `estimator=` of every agent.

    Raises:
        ValueError: the name is taken. TypeError: not an `Estimator`.
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"expected an Estimator, got {type(estimator).__name__}")
    if name in _REGISTRY:
        raise ValueError(f"estimator '{name}' is registered already; choose another name")
    _REGISTRY[name] = estimator


def names() -> list[str]:
    """All registered names, this project's first."""
    return [*_REGISTRY, *(name for name in _plugins() if name not in _REGISTRY)]


def make(name: str | Estimator, **changes: Any) -> Estimator:
    """The estimator of that name, with fields of `Estimator` changed by keyword.

    An `Estimator` is accepted in place of a name, so that agents take either.

    Raises:
        ValueError: unknown name (the nearest known one is suggested).
    """
    if isinstance(name, Estimator):
        return replace(name, **changes)
    if name in _REGISTRY:
        return replace(_REGISTRY[name], **changes)
    if name in _plugins():
        estimator = entry_points(group=ENTRY_POINT_GROUP)[name].load()
        register(name, estimator)
        return replace(estimator, **changes)
    raise ValueError(unknown_name(name, names()))


def unknown_name(name: object, known: Sequence[str]) -> str:
    """Message for an estimator that is not known, with the nearest known name."""
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown estimator {name!r}: {hint}choose one of {', '.join(known)}"


def _plugins() -> Iterator[str]:
    return iter(entry_points(group=ENTRY_POINT_GROUP).names)
