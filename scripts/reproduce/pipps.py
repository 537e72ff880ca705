"""Parmas et al. 2018 (PIPPS): Fig. 2 and 3, Tables 1 and 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from totalprop.scripts.reproduce import readers
from totalprop.scripts.reproduce.intervals import (
    difference_of_rates,
    mean_of,
    ratio_of_variances,
)
from totalprop.scripts.reproduce.protocol import (
    Claim,
    Data,
    Missing,
    Number,
    Reproduction,
    Scale,
    Step,
)
from totalprop.scripts.reproduce.verdicts import Part, Rule
from totalprop.scripts.studies import pipps_landscape, pipps_particles, pipps_table
from totalprop.scripts.studies.measurements import read_measurements
from totalprop.scripts.studies.pipps_landscape import VALUE, Landscape, central_differences
from totalprop.scripts.studies.pipps_table import PUBLISHED, PUBLISHED_RUNS, Cell

PAPER = "Parmas et al. 2018 (PIPPS)"

ENDS = (0.0, 6.0)  # Δ at the ends of the line of policies

# ---------------------------------------------------------------------------- Fig. 2

DIRECTIONS = tuple(d for d in range(10) if d != 8)  # 8 is the drawn one, chosen among the ten
NEW = ("lr+biw", "tp+biw")  # the paper's estimators


def _lines(data: Data, step: str) -> dict[str, Landscape]:
    return readers.lines(data[step], ENDS[1])[1]


def _over_directions(data: Data, number: Callable[[dict[str, Landscape]], float]) -> np.ndarray:
    """[directions] a number of each line but the drawn one, which was chosen."""
    steps = readers.present(data, [f"direction_{d}" for d in DIRECTIONS])
    if len(steps) < 2:
        raise Missing("an interval over directions needs two of them")
    return np.array([number(_lines(data, step)) for step in steps])


def _growth(estimator: str) -> Callable[[dict[str, Landscape]], float]:
    """log10 of the largest variance along a line over that at its start."""
    return lambda lines: math.log10(lines[estimator].growth()[0])


def _explodes(data: Data) -> list[Part]:
    growths = _over_directions(data, _growth("rp"))
    return [mean_of("rp, mean over the directions", growths)]


def _robust(data: Data) -> list[Part]:
    growths = {name: _over_directions(data, _growth(name)) for name in ("rp", *NEW)}
    return [
        mean_of(f"rp - {name}, mean over the directions", growths["rp"] - growths[name])
        for name in NEW
    ]


def _distance(estimator: str) -> Callable[[dict[str, Landscape]], float]:
    """log10 of the root-mean-square distance from the slope of the value along a line."""

    def number(lines: dict[str, Landscape]) -> float:
        errors = lines[estimator].mean[1:-1] - central_differences(lines[VALUE])
        return math.log10(np.sqrt(np.square(errors).mean()))

    return number


def _follows(data: Data) -> list[Part]:
    found = {name: _over_directions(data, _distance(name)) for name in ("rp", *NEW)}
    return [
        mean_of(f"distance of rp / of {name}, mean over the directions", found["rp"] - found[name])
        for name in NEW
    ]


def _fig2_figure(data: Data) -> Figure:
    settings, lines = readers.lines(data["landscape"], ENDS[1])
    path = data["landscape"].with_name("boxes.csv")
    if not path.exists():
        raise Missing(f"{path} has not been measured")
    of_boxes, rows = read_measurements(path, ("delta", *pipps_landscape.BOX))
    boxes = {
        float(row["delta"]): pipps_landscape.box_of(
            *(np.array(row[part].split(), float) for part in pipps_landscape.BOX)
        )
        for row in rows
    }
    return pipps_landscape.figure_of(lines, boxes, of_boxes["axes"], settings["particles"])


def _fig2_raw(data: Data) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for step in data:
        found[step] = {
            name: {"delta": own.delta.tolist(), "mean": own.mean.tolist(),
                   "variance": own.variance.tolist()}
            for name, own in _lines(data, step).items()
        }  # fmt: skip
    return found


def _growth_of(data: Data) -> str:
    growth, at = _lines(data, "landscape")["rp"].growth()
    return f"{growth:.1e} (at Δ = {at:g})"


def _line(name: str, *arguments: str, committed: str = "") -> Step:
    own = (*arguments, "--out", "{out}")
    return Step(name, "study pipps-landscape", own, "landscape.csv", committed=committed)


FIG2_STEPS = (
    _line("landscape", committed="pipps/landscape/landscape.csv"),
    *(
        _line(f"direction_{d}", "--direction", str(d), "--estimators", "rp", *NEW, "--points",
              "13", "--box-points", "2")
        for d in DIRECTIONS
    ),
)  # fmt: skip
FIG2_DIFFERS = (
    "another policy, and Δ in units of the parameters up to 6 (the paper's unit is unknown); the "
    "drawn direction is the one of ten with the largest growth, the intervals are over the nine "
    "others"
)
PIPPS_FIG2 = Reproduction(
    title="the curse of chaos along a line of policies",
    source=f"{PAPER}, Sec. 4.1, Fig. 2",
    scales={
        "small": Scale(FIG2_STEPS, 0.25, FIG2_DIFFERS),
        "paper": Scale(FIG2_STEPS, 0.25, FIG2_DIFFERS),
    },
    claims=(
        Claim(
            "explodes", "As the policy is moved along a random direction, RP's variance explodes.",
            "Sec. 4.1.1",
            "log10 of the growth of the variance from Δ = 0 to its largest, above 3 (thousandfold)",
            Rule(low=3.0), _explodes,
        ),
        Claim(
            "robust", "LR and TP with batch importance weighting are robust to it.",
            "Sec. 4.1.1, Fig. 2e, f",
            "log10 of RP's growth over theirs, above 1 (tenfold) for both",
            Rule(low=1.0), _robust,
        ),
        Claim(
            "follows", "Their gradients agree with finite differences of the value where RP's do "
            "not.", "Sec. 4.1.1",
            "log10 of the ratio of root-mean-square distances from central differences along a "
            "line, above 1 (tenfold) for both",
            Rule(low=1.0), _follows,
        ),
    ),
    numbers=(
        Number("growth of RP's variance on the drawn line", "about 4·10⁵ (at its Δ = 1.5)",
               _growth_of),
    ),
    raw=_fig2_raw,
    figures={"figure": _fig2_figure},
)  # fmt: skip

# ---------------------------------------------------------------------------- Fig. 3


def _by_particles(
    data: Data, first: str, second: str, deltas: Sequence[float] = ENDS
) -> list[Part]:
    """A part for each end of the line: the mean over the numbers of particles."""
    curves, parts = readers.particles(data["particles"]), []
    for delta in deltas:
        own = curves[delta]
        pairs = [(own[first][n].g, own[second][n].g) for n in own[first]]
        what = f"{first} / {second} at Δ = {delta:g}, mean over P"
        parts.append(ratio_of_variances(what, pairs))
    return parts


def _tp_best(data: Data) -> list[Part]:
    return [
        part for other in ("rp", "lr", "lr+biw") for part in _by_particles(data, other, "tp+biw")
    ]


def _fig3_raw(data: Data) -> dict[str, Any]:
    return {
        f"{delta:g}": {
            name: {str(n): m.variance for n, m in by.items()} for name, by in own.items()
        }
        for delta, own in readers.particles(data["particles"]).items()
    }


def _reduction(data: Data) -> str:
    own = readers.particles(data["particles"])[ENDS[1]]
    shares = {n: 1 - m.variance / own["lr+biw"][n].variance for n, m in own["tp+biw"].items()}
    return ", ".join(f"{share:.0%} (P = {n})" for n, share in shares.items())


def _rp_over_others(data: Data) -> str:
    own = readers.particles(data["particles"])[ENDS[1]]
    ratios = [m.variance / own["lr+biw"][n].variance for n, m in own["rp"].items()]
    return f"{min(ratios):.1e} to {max(ratios):.1e} (over `lr+biw`)"


def _particles(*arguments: str, committed: str = "") -> tuple[Step, ...]:
    own = (*arguments, "--out", "{out}")
    return (Step("particles", "study pipps-particles", own, "particles.csv", committed=committed),)


FIG3_DIFFERS = (
    "the drawn line of Fig. 2 up to Δ = 6, the one of ten on which RP's variance grows most; the "
    "paper does not say how many gradients it took"
)
PIPPS_FIG3 = Reproduction(
    title="variance of PIPPS's gradient by number of particles",
    source=f"{PAPER}, Sec. 4.1.2, Fig. 3",
    scales={
        "small": Scale(
            _particles(committed="pipps/particles/particles.csv"), 0.1,
            f"30 gradients per variance; {FIG3_DIFFERS}",
        ),
        "paper": Scale(
            _particles("--repeats", "300"), 1.0, f"300 gradients per variance; {FIG3_DIFFERS}"
        ),
    },
    claims=(
        Claim(
            "biw", "Batch importance weighting reduces LR's variance significantly.",
            "Sec. 4.1.2", "log10 of the ratio of variances, above 0 at both ends", Rule(),
            lambda data: _by_particles(data, "lr", "lr+biw"),
        ),
        Claim(
            "tp-best", "TP has the least variance, at both ends.", "Sec. 4.1.2",
            "log10 of the ratio of variances of each other estimator and TP, above 0", Rule(),
            _tp_best,
        ),
        Claim(
            "rp-hopeless", "In the chaotic region RP's variance is over 10⁶ times larger than the "
            "others'.", "Sec. 4.1.2",
            "log10 of the ratio of variances at Δ = 6, above 6 for each of LR and TP",
            Rule(low=6.0),
            lambda data: [
                part for other in NEW for part in _by_particles(data, "rp", other, ENDS[1:])
            ],
        ),
        Claim(
            "tp-chaos",
            "There TP, which uses RP over shorter paths, has less variance than LR with batch "
            "importance weighting.",
            "Sec. 4.1.2",
            "log10 of the ratio of variances at Δ = 6, above 0",
            Rule(),
            lambda data: _by_particles(data, "lr+biw", "tp+biw", ENDS[1:]),
        ),
    ),
    numbers=(
        Number("variance that TP saves at the chaotic end, beside LR with weighting",
               "10 to 50 % for 250 particles and fewer", _reduction),
        Number("RP's variance there, in units of the others'", "over 10⁶", _rp_over_others),
    ),
    raw=_fig3_raw,
    figures={"figure": lambda data: pipps_particles.figure_of(
        readers.particles(data["particles"]))},
)  # fmt: skip

# ---------------------------------------------------------------------------- Tables 1 and 2


def _finals(data: Data) -> dict[Cell, list[float]]:
    found: dict[Cell, list[float]] = {}
    for row in readers.rows(data["rates"]):
        found.setdefault(pipps_table.cell_of(row), []).append(row["costs"][-1])
    return found


def _rate(finals: dict[Cell, list[float]], cell: Cell) -> tuple[int, int]:
    if cell not in finals:
        raise Missing(f"no run of {cell.method} on {cell.task} at k = {cell.noise:g}")
    costs = np.array(finals[cell])
    return int((costs < pipps_table.TASKS[cell.task].threshold).sum()), len(costs)


def _rates(data: Data, pairs: Sequence[tuple[Cell, Cell]]) -> list[Part]:
    """The differences of success rates of pairs of cells; those that have no runs are left out."""
    finals, parts = _finals(data), []
    for first, second in pairs:
        if first in finals and second in finals:
            place = f"{first.task}, k = {first.noise:g}"
            what = (
                f"{first.method} - {second.method}, {place}"
                if first.noise == second.noise
                else f"{first.method}, {place}, - at k = {second.noise:g}"
            )
            parts.append(difference_of_rates(what, _rate(finals, first), _rate(finals, second)))
    if not parts:
        raise Missing("no pair of cells has runs")
    return parts


def _angle(noise: float, method: str) -> Cell:
    return Cell("angle", noise, method)


def _published(tasks: Sequence[str]) -> tuple[Number, ...]:
    def ours(cell: Cell) -> Any:
        def text(data: Data) -> str:
            k, n = _rate(_finals(data), cell)
            return f"{k / n:.2f} ({k}/{n})"

        return text

    return tuple(
        Number(f"success of {method}, {task}, k = {noise:g}", f"{rate:.2f}",
               ours(Cell(task, noise, method)))
        for (task, noise), row in PUBLISHED.items() if task in tasks
        for method, rate in row.items()
    )  # fmt: skip


def _table_step(*arguments: str, committed: str = "") -> Step:
    return Step("rates", "study pipps-table", arguments, "results.json", committed=committed,
                trains=True)  # fmt: skip


HIGH = (4.0, 9.0, 16.0)
LEARNED = f"the threshold of success is ours; the paper's rates are of {PUBLISHED_RUNS} runs"
PIPPS_TABLE2 = Reproduction(
    title="success rates of learning the cart-pole under noise",
    source=f"{PAPER}, Sec. 4.2 and 5.1, Table 2",
    scales={
        "small": Scale(
            (_table_step("--scale", "small", committed="pipps/success/results.json"),), 7.0,
            "5 seeds of 12 trials, k of 1 and 16, Adam with 100 particles and 100 gradient steps "
            "(Tip Cost: 300 and 250), at 0.03, and at 0.01 for RP and GR; "
            + LEARNED, tuple(range(5)),
        ),
        "paper": Scale(
            (_table_step("--scale", "paper", "--tasks", "angle", "tip"),), 20_000.0, LEARNED,
            tuple(range(100)),
        ),
    },
    claims=(
        Claim(
            "noise", "PILCO performs well without noise and deteriorates with it.", "Sec. 5.1",
            "difference of success rates on the Angle Cost, above 0 (the lowest k against 16)",
            Rule(),
            lambda data: _rates(data, [(_angle(k, "PILCO"), _angle(16.0, "PILCO"))
                                       for k in (0.01, 1.0)]),
        ),
        Claim(
            "tp-pilco", "TP consistently outperforms PILCO with high noise.", "Sec. 5.1",
            "difference of success rates on the Angle Cost, above 0 at each k of 4, 9 and 16 that "
            "was run",
            Rule(),
            lambda data: _rates(data, [(_angle(k, "TP"), _angle(k, "PILCO")) for k in HIGH]),
        ),
        Claim(
            "tp-rp", "TP succeeds more often than RP.", "Table 2",
            "difference of success rates, above 0 in more than half of the rows that were run",
            Rule(needs="most"),
            lambda data: _rates(data, [(Cell(task, k, "TP"), Cell(task, k, "RP"))
                                       for task, k in PUBLISHED if task != "unicycle"]),
        ),
        Claim(
            "low-noise", "At low noise TP and LR succeed less often, since all particles come from "
            "a small region.", "Sec. 5.1",
            "difference of success rates on the Angle Cost, k = 1 less k = 0.01, above 0", Rule(),
            lambda data: _rates(data, [(_angle(1.0, m), _angle(0.01, m)) for m in ("TP", "LR")]),
        ),
        Claim(
            "more-noise", "There, increasing the model's noise (TP + σn) helps.", "Sec. 5.1",
            "difference of success rates at k = 0.01, above 0", Rule(),
            lambda data: _rates(data, [(_angle(0.01, "TP+sn"), _angle(0.01, "TP"))]),
        ),
    ),
    numbers=_published(("angle", "tip")),
    raw=lambda data: readers.rows(data["rates"]),
    figures={"figure": lambda data: pipps_table.figure_of(_finals(data))},
)  # fmt: skip
UNICYCLE_METHODS = ("PILCO", "RP", "GR", "LR", "TP")


def _unicycle(method: str) -> Cell:
    return Cell("unicycle", 1.0, method)


PIPPS_TABLE1 = Reproduction(
    title="success rates of learning to balance a unicycle",
    source=f"{PAPER}, Sec. 4.2, Table 1",
    scales={
        "small": Scale(
            (_table_step("--scale", "small", "--tasks", "unicycle", "--methods",
                         *UNICYCLE_METHODS),),
            8.0,
            "3 seeds of 15 trials, Adam with 100 particles and 100 gradient steps, at 0.03, and at "
            "0.01 for RP and GR; " + LEARNED,
            (0, 1, 2),
        ),
        "paper": Scale(
            (_table_step("--scale", "paper", "--tasks", "unicycle"),), 10_000.0, LEARNED,
            tuple(range(100)),
        ),
    },
    claims=(
        Claim(
            "matches", "TP matches PILCO.", "Sec. 4.2, Fig. 4, Table 1",
            "difference of success rates within ±0.15", Rule(-0.15, 0.15),
            lambda data: _rates(data, [(_unicycle("TP"), _unicycle("PILCO"))]),
        ),
        Claim(
            "tp-others", "TP succeeds more often than RP and than LR.", "Table 1",
            "difference of success rates, above 0 for both", Rule(),
            lambda data: _rates(data, [(_unicycle("TP"), _unicycle(m)) for m in ("RP", "LR")]),
        ),
    ),
    numbers=_published(("unicycle",)),
    raw=lambda data: readers.rows(data["rates"]),
    figures={"figure": lambda data: pipps_table.figure_of(_finals(data))},
)  # fmt: skip

ENTRIES = {
    "pipps-fig2": PIPPS_FIG2,
    "pipps-fig3": PIPPS_FIG3,
    "pipps-table1": PIPPS_TABLE1,
    "pipps-table2": PIPPS_TABLE2,
}
