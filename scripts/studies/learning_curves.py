"""Pictures of many runs in one style: learning curves, success rates and performance profiles.

The colours are those of Okabe & Ito 2008, which colour-blind readers tell apart, too. Reading runs
is up to scripts/studies/plot.py.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from totalprop.scripts.studies import scores
from totalprop.scripts.studies.scores import MIN_RUNS, Scores
from totalprop.scripts.studies.styles import Styles, styles_of

MAX_COLUMNS = 3
CAPTION = (
    f"thin: seeds; thick: their interquartile mean, of fewer than {MIN_RUNS} the mean; "
    f"band: 95 % interval, from {MIN_RUNS} seeds on"
)
Unit = Literal["decisions", "frames"]


class Curve(NamedTuple):
    """The evaluations of one run.

    Attributes:
        label: of the line that the run belongs to.
        task: of the panel.
        seed: of the run.
        quantity: what an evaluation gives, an episode's "return" or its "cost".
        times: [K] decisions, or 1 to K if the quantity is a cost: one for each policy search.
        values: [K] mean over an evaluation's episodes.
        action_repeat: frames per decision; None if unknown.
        threshold: cost below which an evaluation is a success; None if unknown.
    """

    label: str
    task: str
    seed: str
    quantity: str
    times: np.ndarray
    values: np.ndarray
    action_repeat: int | None = None
    threshold: float | None = None

    @property
    def panel(self) -> tuple[str, str]:
        """What shares a panel."""
        return self.task, self.quantity

    def x(self, unit: Unit) -> np.ndarray:
        """[K] where the values are drawn: evaluations, or decisions or frames."""
        is_frames = unit == "frames" and self.quantity == "return"
        return self.times * (self.action_repeat or 1) if is_frames else self.times


def by(curves: Iterable[Curve], *names: str) -> dict[Any, list[Curve]]:
    """The curves of each value of an attribute, or of several, in the order of their appearance."""
    groups: dict[Any, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(attrgetter(*names)(curve), []).append(curve)
    return groups


def together(curves: Sequence[Curve], unit: Unit = "decisions") -> tuple[np.ndarray, np.ndarray]:
    """The stretch on which all curves are: x [K] and values [seeds, K]; K may be 0.

    Between its evaluations, a curve is linear.
    """
    xs = [curve.x(unit) for curve in curves]
    grid = np.unique(np.concatenate(xs))
    grid = grid[(grid >= max(x[0] for x in xs)) & (grid <= min(x[-1] for x in xs))]
    return grid, np.array([np.interp(grid, x, c.values) for x, c in zip(xs, curves)])


def figure_of(
    curves: Sequence[Curve],
    legend: str,
    unit: Unit = "decisions",
    further: Sequence[Callable[[Axes], None]] = (),
) -> Figure:
    """Draw the learning curves, a panel per task; costs have another panel with the success rate.

    Args:
        curves: of all seeds, lines and tasks.
        legend: what the labels name.
        unit: of the horizontal axis, where it does not count evaluations.
        further: draw further panels.
    """
    styles = styles_of(curve.label for curve in curves)
    panels: list[Callable[[Axes], None]] = []
    caption = CAPTION
    for own in by(curves, "panel").values():
        panels.append(partial(draw, curves=own, styles=styles, unit=unit))
        if any(curve.threshold is not None for curve in own):
            panels.append(partial(draw_success, curves=own, styles=styles))
            caption = f"{CAPTION}; bars: 95 % intervals of Wilson"
    panels += further
    columns = min(len(panels), MAX_COLUMNS)
    rows = -(-len(panels) // columns)
    counts = {label: _seeds(own) for label, own in by(curves, "label").items()}
    width, height = max(4.2 * columns, 6.0), max(3.7 * rows, 0.25 * len(counts) + 1)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, paint in itertools.zip_longest(axes, panels):
        paint(axis) if paint is not None else axis.set_visible(False)
    _add_legend(figure, counts, styles, f"{legend} (seeds)")
    figure.supxlabel(caption, fontsize="small", color="0.35")
    return figure


def _seeds(curves: Sequence[Curve]) -> str:
    """Seeds of a line per task, as in 5 or 3-5."""
    counts = sorted({len(own) for own in by(curves, "panel").values()})
    return "-".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def _add_legend(figure: Figure, counts: Mapping[str, Any], styles: Styles, title: str) -> None:
    """Add a legend to the right, for which the figure becomes wider."""
    names = {label: f"{label} ({count})" for label, count in counts.items()}
    lines = [Line2D([], [], lw=2, label=name, **styles[label]) for label, name in names.items()]
    title = textwrap.fill(title, 24, break_long_words=False)
    longest = max(map(len, [*names.values(), *title.splitlines()]))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + 0.5 + 0.085 * longest, height)
    figure.legend(handles=lines, title=title, loc="outside right upper", frameon=False)


def draw(
    axis: Axes,
    curves: Sequence[Curve],
    styles: Styles,
    unit: Unit = "decisions",
) -> None:
    """Draw the learning curves of one task, with frames above the decisions if they are known."""
    task, quantity = curves[0].panel
    for label, own in by(curves, "label").items():
        for curve in own:
            marker = "" if len(curve.values) > 1 else "."  # a line of one point is none
            axis.plot(
                curve.x(unit), curve.values, marker=marker, lw=0.7, alpha=0.5, **styles[label]
            )
        x, values = together(own, unit)
        if not len(x):
            continue
        axis.plot(
            x, scores.iqm([values]), lw=2, marker="." if len(x) <= 30 else "", **styles[label]
        )
        if len(own) >= MIN_RUNS:
            low, high = scores.interval([values], scores.iqm)
            axis.fill_between(x, low, high, color=styles[label]["color"], alpha=0.15, lw=0)
    for threshold in _thresholds(curves):
        axis.axhline(threshold, color="0.4", ls="--", lw=1)
    is_cost = quantity == "cost"
    axis.set(
        title=task, xlabel="evaluation" if is_cost else unit, ylabel=f"{quantity} of an episode"
    )
    values = np.concatenate([curve.values for curve in curves])
    low, high = values.min(), values.max()
    margin = 0.05 * (high - min(low, 0)) or 1
    axis.set_ylim(0 if low >= 0 else low - margin, high + margin)  # fits the runs, not the bands
    axis.grid(alpha=0.25)
    if is_cost:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
    repeat, *others = {curve.action_repeat for curve in curves}
    if unit == "decisions" and not is_cost and not others and repeat not in (None, 1):
        functions = (lambda x: x * repeat, lambda x: x / repeat)
        above = axis.secondary_xaxis("top", functions=functions)
        above.set_xlabel("frames", fontsize="small")
        above.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_success(axis: Axes, curves: Sequence[Curve], styles: Styles) -> None:
    """Draw the share of seeds whose cost is below the threshold, with Wilson intervals."""
    known = [curve for curve in curves if curve.threshold is not None]
    lines = by(known, "label")
    for i, (label, own) in enumerate(lines.items()):
        x, values = together(own)
        if not len(x):
            continue
        successes = (values < np.array([[curve.threshold] for curve in own])).sum(0)
        rates = [scores.rate_of(int(count), len(own)) for count in successes]
        beside = x + 0.7 * ((i + 0.5) / len(lines) - 0.5)  # equal rates do not hide each other
        axis.plot(beside, [rate.rate for rate in rates], marker="o", ms=3, lw=1, **styles[label])
        low, high = [rate.low for rate in rates], [rate.high for rate in rates]
        axis.vlines(beside, low, high, color=styles[label]["color"], lw=1.2, alpha=0.5)
    limits = ", ".join(f"{limit:g}" for limit in _thresholds(known))
    axis.set(title=f"{curves[0].task}: success", xlabel="evaluation", ylim=(-0.03, 1.03))
    axis.set_ylabel(f"share of seeds with a cost below {limits}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.25)


def _thresholds(curves: Sequence[Curve]) -> list[float]:
    return sorted({curve.threshold for curve in curves if curve.threshold is not None})


def draw_profile(
    axis: Axes,
    lines: Mapping[str, Scores],
    styles: Styles,
    thresholds: np.ndarray,
) -> None:
    """Draw performance profiles, with bands where each task has several runs.

    Args:
        axis: to draw on.
        lines: scores of each task, by label.
        styles: colour and dashes of each label.
        thresholds: scores at which the share of runs above them is drawn.
    """
    for label, own in lines.items():
        name = f"{label} ({sum(map(len, own))})"
        axis.plot(thresholds, scores.profile(own, thresholds), label=name, **styles[label])
        if has_interval(own):
            low, high = scores.interval(own, lambda drawn: scores.profile(drawn, thresholds))
            axis.fill_between(thresholds, low, high, color=styles[label]["color"], alpha=0.12, lw=0)
    axis.set(xlabel="score τ", xlim=(thresholds[0], thresholds[-1]), ylim=(0, 1.02))
    axis.set_ylabel("share of runs with a score above τ")
    axis.grid(alpha=0.25)


def has_interval(own: Scores) -> bool:
    """Whether there are 4 runs in all, and of no task only one: then resampling says something."""
    return sum(map(len, own)) >= MIN_RUNS and min(map(len, own)) > 1


AGGREGATES: dict[str, Callable[[Scores], Any]] = {
    "interquartile mean": scores.iqm,
    "median": scores.median,
    "optimality gap": scores.optimality_gap,
}


def profile_figure(lines: Mapping[str, Scores], legend: str) -> Figure:
    """Performance profiles, and beside them each aggregate with its interval.

    Args:
        lines: scores of each task, by label.
        legend: what the labels name.
    """
    styles = styles_of(lines)
    figure = Figure(figsize=(11, max(3.8, 0.25 * len(lines) + 1)), layout="constrained")
    wide, *narrow = figure.subplots(1, 1 + len(AGGREGATES), width_ratios=(2.2, 1, 1, 1))
    everything = np.concatenate([own for tasks in lines.values() for own in tasks])
    limits = min(0.0, everything.min()), max(1.0, everything.max())
    draw_profile(wide, lines, styles, np.linspace(*limits, 201))
    for axis, (name, statistic) in zip(narrow, AGGREGATES.items()):
        for y, (label, own) in enumerate(lines.items()):
            color = styles[label]["color"]
            if has_interval(own):
                low, high = scores.interval(own, statistic)
                axis.barh(y, high - low, left=low, height=0.5, alpha=0.3, color=color)
            axis.plot(statistic(own), y, "|", ms=16, mew=2.5, color=color)
        axis.use_sticky_edges = False  # or the bars touch the frame
        axis.set(title=name, xlabel="score", ylim=(len(lines) - 0.5, -0.5))
        axis.set_yticks(range(len(lines)), list(lines) if axis is narrow[0] else [""] * len(lines))
        axis.grid(axis="x", alpha=0.25)
    counts = {label: sum(map(len, own)) for label, own in lines.items()}
    _add_legend(figure, counts, styles, f"{legend} (runs)")
    return figure
