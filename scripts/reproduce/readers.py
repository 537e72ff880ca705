"""The numbers of studies and sweeps, as the claims take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from matplotlib.figure import Figure

from totalprop.scripts.reproduce.protocol import Data, Missing
from totalprop.scripts.run.folder import read_json
from totalprop.scripts.studies.chaos import read as read_chaos
from totalprop.scripts.studies.chaos_report import Study
from totalprop.scripts.studies.learning_curves import figure_of
from totalprop.scripts.studies.measurements import read_measurements
from totalprop.scripts.studies.pipps_landscape import KEYS as LANDSCAPE_KEYS
from totalprop.scripts.studies.pipps_landscape import NUMBERS as LANDSCAPE_NUMBERS
from totalprop.scripts.studies.pipps_landscape import Landscape, landscapes
from totalprop.scripts.studies.pipps_particles import KEYS as PARTICLE_KEYS
from totalprop.scripts.studies.pipps_particles import NUMBERS as PARTICLE_NUMBERS
from totalprop.scripts.studies.pipps_particles import Curves, curves_of
from totalprop.scripts.studies.plot import Found, labelled, read

K = TypeVar("K")
V = TypeVar("V")


class Partial(dict[K, V], Generic[K, V]):
    """What a study has measured; what it lacks (yet) is `Missing`."""

    def __missing__(self, key: K) -> V:
        raise Missing(f"{key} has not been measured")


def chaos(path: Path) -> Study:
    """Gradients by grid point and estimator, of `totalprop chaos`."""
    return Partial({betas: Partial(own) for betas, own in read_chaos(path)[1].items()})


def lines(path: Path, end: float) -> tuple[dict[str, Any], dict[str, Landscape]]:
    """Settings and quantities along a line, of `totalprop study pipps-landscape`.

    Raises:
        Missing: the measurement was stopped before it had all quantities at the line's end.
    """
    settings, rows = read_measurements(path, (*LANDSCAPE_KEYS, *LANDSCAPE_NUMBERS))
    found = landscapes(rows)
    if any(own.delta[-1] != end for own in found.values()):
        raise Missing(f"{path} has not been measured to its end")
    return settings, Partial(found)


def particles(path: Path) -> Curves:
    """Gradients by Δ, estimator and P, of `totalprop study pipps-particles`.

    Raises:
        Missing: the measurement was stopped before it had all estimators at all Δ and P.
    """
    found = curves_of(read_measurements(path, (*PARTICLE_KEYS, *PARTICLE_NUMBERS))[1])
    measured = {(name, n) for by in found.values() for name, own in by.items() for n in own}
    if any(n not in by.get(name, {}) for by in found.values() for name, n in measured):
        raise Missing(f"{path} has not been measured to its end")
    return Partial({delta: Partial(own) for delta, own in found.items()})


def rows(path: Path) -> list[dict[str, Any]]:
    """The runs of a study's results.json."""
    found: list[dict[str, Any]] = read_json(path)["runs"]
    return found


QUANTITIES: dict[str, Callable[[dict[str, Any]], float]] = {  # of a seed in a sweep's results.json
    "average return": lambda own: float(np.mean(own["returns"])),
    "final return": lambda own: float(own["final_return"]),
    "first return": lambda own: float(own["returns"][0]),
    "final cost": lambda own: float(own["final_cost"]),
    "seconds": lambda own: float(own["seconds"]),
}


def seeds(data: Data, step: str, label: str, quantity: str) -> np.ndarray:
    """[seeds] a quantity of the runs that a sweep has of one setting, in the order of the seeds."""
    results = read_json(data[step])["results"]
    if label not in results:
        raise Missing(f"{step} has no finished run of {label}")
    own = sorted(results[label].items(), key=lambda item: int(item[0]))
    return np.array([QUANTITIES[quantity](entry) for _, entry in own])


def present(data: Data, steps: Sequence[str]) -> list[str]:
    """The steps that have been run.

    Raises:
        Missing: none has.
    """
    found = [step for step in steps if step in data]
    if not found:
        raise Missing(f"none of {', '.join(steps)} has been run")
    return found


def sweeps_raw(data: Data, steps: Sequence[str], quantities: Sequence[str]) -> dict[str, Any]:
    """Step -> label -> quantity -> the number of each seed."""
    return {
        step: {
            label: {q: seeds(data, step, label, q).round(3).tolist() for q in quantities}
            for label in read_json(data[step])["results"]
        }
        for step in steps
        if step in data
    }


def sweeps_figure(data: Data, steps: Sequence[str], labels: Sequence[str] = ()) -> Figure:
    """Learning curves of several sweeps, a panel per task.

    Args:
        data: of the reproduction.
        steps: the sweeps.
        labels: settings to draw; empty for all.
    """
    found: list[Found] = [
        run
        for run in read([data[step] for step in present(data, steps)])
        if not labels or set(labels) & set(run.settings.values())
    ]
    curves, legend, _ = labelled(found)
    return figure_of(curves, legend)
