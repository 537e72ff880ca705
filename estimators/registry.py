"""The registry of estimators; each is a weight rule with its legs and a baseline.

Every agent resolves the name once, in its constructor, with `make`. Other packages add their own
with `register`, or with an entry point in the group `totalprop.estimators` that names an
`Estimator`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from totalprop.estimators.baselines import baseline_named
from totalprop.estimators.declarations import unknown_name
from totalprop.estimators.legs import first_order, legs_named, nothing
from totalprop.estimators.mixing import (
    aobg,
    cut,
    ddcg,
    guard,
    ivw_h,
    likelihood_ratio,
    pathwise,
    tp,
    tp_guarded,
    tpg,
    tpg_guarded,
    tpx,
    tpx_guarded,
    tpx_ivw,
    tpx_ivw_scalar,
    tpx_scalar,
    tpx_unclipped,
)
from totalprop.estimators.node import Estimator

ENTRY_POINT_GROUP = "totalprop.estimators"

_REGISTRY: dict[str, Estimator] = {
    "rp": Estimator(pathwise, source="Kingma & Welling 2014; Parmas et al. 2023, Sec. 3"),
    "lr": Estimator(likelihood_ratio, source="Williams 1992; Parmas et al. 2023, Sec. 3"),
    "tp": Estimator(
        tp, probe="all", source="Parmas et al. 2018, Alg. 2; Parmas et al. 2023, Eq. 5"
    ),
    "tp-guarded": Estimator(tp_guarded, probe="all", source="this project"),
    "tps": Estimator(tp, probe="subset", source="Parmas et al. 2023, Sec. 4"),
    "tpx": Estimator(tpx, source="Parmas et al. 2023, Eq. 8, footnote 4"),
    "tpx-guarded": Estimator(tpx_guarded, source="this project"),
    "tpx-unclipped": Estimator(tpx_unclipped, source="Parmas et al. 2023, Eq. 8, footnote 4"),
    "tpx-scalar": Estimator(tpx_scalar, source="Parmas et al. 2023, App. D"),
    "tpx-ivw": Estimator(tpx_ivw, source="Parmas et al. 2023, App. D"),
    "tpx-ivw-scalar": Estimator(tpx_ivw_scalar, source="Parmas et al. 2023, App. D"),
    "ivw": Estimator(
        tpx_ivw_scalar, probe="all", whole_graph=True, source="Parmas et al. 2023, Sec. 3, Eq. 5"
    ),
    "ivw-h": Estimator(ivw_h, carry="pathwise", source="Onoda et al. 2026, App. E"),
    "rp-cut": Estimator(cut, legs=(nothing,), source="common practice; Metz et al. 2021"),
    "aobg": Estimator(
        aobg, probe="all", whole_graph=True, source="Suh et al. 2022, Eq. 4, Lemma 4.4"
    ),
    "ddcg": Estimator(ddcg, probe="all", whole_graph=True, source="Onoda et al. 2026, Eq. 8, 14"),
    "tpg": Estimator(tpg, probe="all", source="this project"),
    "tpg-guarded": Estimator(tpg_guarded, probe="all", source="this project"),
    "lr-first-order": Estimator(
        likelihood_ratio, legs=(first_order,), source="this project; Gu et al. 2016 (MuProp)"
    ),
    "safe": Estimator(
        guard,
        legs=(first_order,),
        probe="all",
        whole_graph=True,
        base=(
            Estimator(tpx, legs=(first_order,)),
            Estimator(tpg, legs=(first_order,), probe="all"),
        ),
        source="this project",
    ),
}


def register(name: str, estimator: Estimator, *, replace: bool = False) -> None:
    """Register an estimator under a name, which every agent then accepts as `estimator=`.

    Args:
        name: a name that is not registered yet.
        estimator: the estimator it stands for.
        replace: the name may be registered, and stands for this estimator from now on.
    Raises:
        ValueError: the name is taken, without `replace`.
        TypeError: `estimator` is not an `Estimator`.
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"expected an Estimator, got {type(estimator).__name__}")
    if name in _REGISTRY and not replace:
        raise ValueError(
            f"estimator '{name}' is already registered; choose another name, or pass replace=True"
        )
    _REGISTRY[name] = estimator


def names() -> list[str]:
    """List all registered names, this project's first."""
    return [*_REGISTRY, *(name for name in _plugins() if name not in _REGISTRY)]


def make(name: str | Estimator, **changes: Any) -> Estimator:
    """Look up an estimator by name, with some of its fields replaced.

    >>> make("tpx", baseline="mean", legs="biw")

    Args:
        name: a registered name, or an `Estimator` (so that agents can take either).
        changes: fields of `Estimator` to replace. `baseline` and `legs` take names ("none", "mean",
            "leave-one-out", "critic"; "score", "biw", "first-order", "lax", "mvd") or functions,
            `legs` also a sequence of them.
    Returns:
        The estimator; the registered one is not modified.
    Raises:
        ValueError: a name is unknown (the message suggests the nearest known one), or the options
            do not work together.
        TypeError: there is no such option, or it has another type.
    """
    if not changes:  # a compiled rollout makes its estimator, and cannot trace what follows
        return _registered(name)
    known = [field.name for field in dataclasses.fields(Estimator)]
    for option in changes:
        if option not in known:
            raise TypeError(
                f"an estimator has no option '{option}': choose among {', '.join(known)}"
            )
    if "baseline" in changes:
        changes["baseline"] = baseline_named(changes["baseline"])
    if "legs" in changes:
        changes["legs"] = legs_named(changes["legs"])
    return dataclasses.replace(_registered(name), **changes)


def _registered(name: str | Estimator) -> Estimator:
    if isinstance(name, Estimator):
        return name
    if name in _REGISTRY:
        return _REGISTRY[name]
    if name in _plugins():
        estimator: Estimator = entry_points(group=ENTRY_POINT_GROUP)[name].load()
        register(name, estimator)
        return estimator
    raise ValueError(unknown_name(name, names()))


def _plugins() -> Iterator[str]:
    return iter(entry_points(group=ENTRY_POINT_GROUP).names)
