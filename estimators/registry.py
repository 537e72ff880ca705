"""The registry of estimators; each is a weight rule with its legs and a baseline.

Every agent resolves the name once, in its constructor, with `make`. Other packages add their own
with `register`, or with an entry point in the group `totalprop.estimators` that names an
`Estimator`.
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
    "rp": Estimator(pathwise, source="Kingma & Welling 2014; Parmas et al. 2023, Sec. 3"),
    "lr": Estimator(likelihood_ratio, source="Williams 1992; Parmas et al. 2023, Sec. 3"),
    "tp": Estimator(
        tp, probe="all", source="Parmas et al. 2018, Alg. 2; Parmas et al. 2023, Eq. 5"
    ),
    "tps": Estimator(tp, probe="subset", source="Parmas et al. 2023, Sec. 4"),
    "tpx": Estimator(tpx, source="Parmas et al. 2023, Eq. 8, footnote 4"),
    "tpx-scalar": Estimator(tpx_scalar, source="Parmas et al. 2023, App. D"),
    "tpx-ivw": Estimator(tpx_ivw, source="Parmas et al. 2023, App. D"),
    "tpx-ivw-scalar": Estimator(tpx_ivw_scalar, source="Parmas et al. 2023, App. D"),
    "ivw": Estimator(pathwise, probe="all", whole_graph=True, source="Parmas et al. 2023, Sec. 3"),
    "tpg": Estimator(tpg, probe="all", source="this project"),
}


def register(name: str, estimator: Estimator) -> None:
    """Register an estimator under a new name, which every agent then accepts as `estimator=`.

    Args:
        name: a name that is not registered yet.
        estimator: the estimator it stands for.
    Raises:
        ValueError: the name is taken.
        TypeError: `estimator` is not an `Estimator`.
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"expected an Estimator, got {type(estimator).__name__}")
    if name in _REGISTRY:
        raise ValueError(f"estimator '{name}' is already registered; choose another name")
    _REGISTRY[name] = estimator


def names() -> list[str]:
    """List all registered names, this project's first."""
    return [*_REGISTRY, *(name for name in _plugins() if name not in _REGISTRY)]


def make(name: str | Estimator, **changes: Any) -> Estimator:
    """Look up an estimator by name, with some of its fields replaced.

    Args:
        name: a registered name, or an `Estimator` (so that agents can take either).
        changes: fields of `Estimator` to replace, for example baseline=baselines.mean.
    Returns:
        The estimator; the registered one is not modified.
    Raises:
        ValueError: the name is unknown; the message suggests the nearest known name.
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
    """Error message for an unknown estimator, which suggests the nearest known name."""
    near = difflib.get_close_matches(str(name), known, 1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"unknown estimator {name!r}: {hint}choose one of {', '.join(known)}"


def _plugins() -> Iterator[str]:
    return iter(entry_points(group=ENTRY_POINT_GROUP).names)
