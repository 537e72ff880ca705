"""The registry: an estimator is a weight rule, its legs and a baseline, found by name.

Every agent resolves a name once, in its constructor, with `make`. Other packages add theirs with
`register`, or by an entry point in the group `totalprop.estimators` that names an `Estimator`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from totalprop.estimators.mixing import (
    likelihood_ratio,
    pathwise,
    tp,
    tpg,
    tpx,
    tpx_ivw,
    tpx_ivw_scalar,
    tpx_scalar,
)
from totalprop.estimators.node import Estimator

ENTRY_POINT_GROUP = "totalprop.estimators"

_REGISTRY: dict[str, Estimator] = {
    "rp": Estimator(pathwise, source="Kingma & Welling 2014; TPX 2023, Sec. 3"),
    "lr": Estimator(likelihood_ratio, source="Williams 1992; TPX 2023, Sec. 3"),
    "tp": Estimator(tp, probe="all", source="PIPPS 2018, Alg. 2; TPX 2023, Eq. 5"),
    "tps": Estimator(tp, probe="subset", source="TPX 2023, Sec. 4"),
    "tpx": Estimator(tpx, source="TPX 2023, Eq. 8, footnote 4"),
    "tpx-scalar": Estimator(tpx_scalar, source="TPX 2023, App. D"),
    "tpx-ivw": Estimator(tpx_ivw, source="TPX 2023, App. D"),
    "tpx-ivw-scalar": Estimator(tpx_ivw_scalar, source="TPX 2023, App. D"),
    "ivw": Estimator(pathwise, probe="all", whole_graph=True, source="TPX 2023, Sec. 3"),
    "tpg": Estimator(tpg, probe="all", source="this project"),
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
