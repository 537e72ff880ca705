r"""The curse of chaos: PIPPS's value and its gradients along a line of policies.

    totalprop study pipps-landscape                     # Fig. 2 of Parmas et al. 2018, some minutes
    totalprop study pipps-landscape --direction 3 --out runs/landscape_3
    totalprop study pipps-landscape --run runs/NAME --estimators rp lr+biw mine --out runs/mine

A trained policy is moved by Δ along a random unit vector of its parameters, with the noise of all
particles fixed. Where the simulated cart-pole becomes chaotic, RP's variance explodes, although its
gradient is the exact derivative of the value that is drawn; LR and what mixes the two stay usable.
The boxes show why: the value of a state x_1, which RP differentiates, is smooth at Δ = 0 and
erratic at the other end of the line.

An estimator with a plus has a likelihood ratio of another leg: lr+biw and tp+biw are the paper's LR
and TP, with batch importance weighting. "gr" has no gradient of a single particle; `totalprop study
pipps-particles` measures its variance.

--out gets landscape.csv, boxes.csv, table.md and landscape.png. A stopped study goes on with the
same command: what is in the files is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from totalprop.agents.core import figures
from totalprop.agents.core.memory import keep_freed_memory
from totalprop.agents.persistence.safe_file import write_text
from totalprop.agents.pipps.particles import Noise, simulate
from totalprop.estimators import make
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.errors import UserError, continuing_later
from totalprop.scripts.run.progress import counted
from totalprop.scripts.studies.measurements import Measurements, origin, read_measurements
from totalprop.scripts.studies.policy_line import RESAMPLED, PolicyLine, estimator_named
from totalprop.scripts.studies.styles import style_of

VALUE = "value"  # the quantity whose mean is J(Δ); the others are estimators of its derivative
KEYS, NUMBERS = ("delta", "quantity"), ("mean", "variance", "ms")
BOX = ("first", "second", "values")
CORNERS = 2.0  # of a box, in standard deviations of p(x_1): its sides are 4 (Sec. 4.1.1)
BOX_PARTICLES = 4  # whose trajectories are averaged at each point of a box (Sec. 4.1.1)
QUANTILE = 1.96  # of the 95 % intervals
SHOWN = 4  # estimators whose gradient is drawn, each in a panel of its own


class Landscape(NamedTuple):
    """What is known of a quantity along the line: arrays [D], by Δ."""

    delta: np.ndarray
    mean: np.ndarray
    variance: np.ndarray  # of a particle

    def growth(self) -> tuple[float, float]:
        """The largest variance in units of that at the first Δ, and where it is."""
        at = int(self.variance.argmax())
        return float(self.variance[at] / self.variance[0]), float(self.delta[at])


class Box(NamedTuple):
    """The value of states about the mean of p(x_1), over two entries that are predicted."""

    first: np.ndarray  # [X] of the cart-pole: m
    second: np.ndarray  # [Y] rad
    values: np.ndarray  # [Y, X]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    with continuing_later():
        if not options.report_only:
            measure(options, shlex.join(["totalprop", "study", "pipps-landscape", *arguments]))
        report(options.out)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; on wrong usage, exit with code 2."""
    parser = parser_of("study pipps-landscape")
    options = parser.parse_args(arguments)
    for name in options.estimators:
        if name == RESAMPLED:
            parser.error(
                f"{name} has no gradient of a particle: see totalprop study pipps-particles"
            )
        try:
            estimator_named(name)
        except ValueError as error:
            parser.error(str(error))
    return options


# ---------------------------------------------------------------------------- measuring


def measure(options: argparse.Namespace, command: str) -> None:
    """Measure what is missing in the files."""
    line = PolicyLine(options.run, options.direction)
    settings: dict[str, Any] = {"policy": line.digest}
    settings |= {name: getattr(options, name) for name in ("direction", "particles", "seed")}
    axes = [line.state_names[d] for d in line.model.dynamics.predicted_dims[:2]]
    of_boxes: dict[str, Any] = {"box_points": options.box_points, "axes": axes}
    if min(len(axes), line.horizon) < 2:
        raise UserError(
            f"{options.run} has one step, or predicts one entry of the state: a box needs two"
        )
    found = Measurements(
        options.out / "landscape.csv", settings, keys=KEYS, values=NUMBERS, command=command
    )
    boxes = Measurements(
        options.out / "boxes.csv", {**settings, **of_boxes},
        keys=("delta",), values=BOX, command=command,
    )  # fmt: skip
    deltas = [f"{delta:g}" for delta in np.linspace(0, options.end, options.points)]
    points = [(d, name) for d in deltas for name in (VALUE, *options.estimators)]
    points = [key for key in points if key not in found.rows]
    ends = [d for d in (deltas[0], deltas[-1]) if (d,) not in boxes.rows]
    noise = line.draw(options.particles, options.seed)
    with counted(len(points) + len(ends), "points") as advance:
        for delta, name in points:
            line.move(float(delta))
            began = time.process_time()
            if name == VALUE:
                numbers = line.returns(noise)
            else:
                numbers = line.slopes(estimator_named(name), noise)
            ms = 1000 * (time.process_time() - began)
            shown = (float(numbers.mean()), float(numbers.var()), ms)
            found.add((delta, name), [f"{x:.6g}" for x in shown])
            advance()
        for delta in ends:
            line.move(float(delta))
            box = box_at(line, options.box_points, options.seed)
            boxes.add((delta,), [" ".join(f"{x:.6g}" for x in part.flat) for part in box])
            advance()


def box_at(line: PolicyLine, points: int, seed: int) -> Box:
    """The value around the mean prediction of x_1 from the centre of the (first) start.

    V(x_1) = Σ_{t≥1} c(x_t), averaged over BOX_PARTICLES seeds that are the same at every x_1. All
    predicted entries of x_1 but the first two are those of the mean. Parmas et al. 2018,
    Sec. 4.1.1.

    Args:
        line: at the policy.
        points: on each side.
        seed: of the particles' noise.
    """
    model, horizon = line.model, line.horizon
    own = line.draw(BOX_PARTICLES, seed)
    with torch.no_grad():
        centre = model.start_mean.view(-1, model.n_states)[:1]
        found = model.dynamics.predict(centre, line.policy.controller()(centre))
        mean = found.mean[0]
        variance = model.dynamics.noise.square() * model.noise_multiplier
        if model.model_uncertainty:
            variance = variance + found.variance[0]
        std = variance.sqrt()
        z = torch.linspace(-CORNERS, CORNERS, points).to(mean)
        corners = mean.new_zeros(points, points, len(mean))
        corners[..., 0], corners[..., 1] = z, z.unsqueeze(1)  # [second, first, E]
        corners = corners.view(-1, len(mean)).repeat_interleave(BOX_PARTICLES, 0)
        x1 = model.dynamics.complete(centre, mean + std * corners)
        moving = own.model[: horizon - 1].repeat(1, points * points, 1)
        noise = Noise(torch.zeros_like(x1), moving, None)
        from_x1 = dataclasses.replace(model, start_mean=x1)
        _, costs, _ = simulate(from_x1, line.policy, noise, make("rp"))
        first = model.cost(x1, line.policy.controller()(x1))
    values = (first + costs.sum(0)).view(points, points, BOX_PARTICLES).mean(-1)
    sides: list[Tensor] = [mean[d] + std[d] * z for d in (0, 1)]
    return Box(*(part.cpu().numpy() for part in (*sides, values)))


# ---------------------------------------------------------------------------- report


def report(out: Path) -> None:
    """Write table.md and landscape.png from the files."""
    settings, rows = read_measurements(out / "landscape.csv", (*KEYS, *NUMBERS))
    lines = landscapes(rows)
    of_boxes, rows = read_measurements(out / "boxes.csv", ("delta", *BOX))
    boxes = {
        float(row["delta"]): box_of(*(np.array(row[part].split(), float) for part in BOX))
        for row in rows
    }
    text = table(lines, settings)
    write_text(out / "table.md", text)
    picture = figure_of(lines, boxes, of_boxes["axes"], settings["particles"])
    figures.save(picture, out / "landscape.png", dpi=150)
    print(
        f"{text}\nwritten to {out}: landscape.csv, boxes.csv, table.md, landscape.png\n"
        "Next: totalprop study pipps-particles   (the variance against the number of particles)"
    )


def landscapes(rows: Sequence[dict[str, str]]) -> dict[str, Landscape]:
    """Quantity -> what landscape.csv holds of it, in the order of the file."""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        numbers = [float(row[column]) for column in ("delta", "mean", "variance")]
        found.setdefault(row["quantity"], []).append(numbers)
    return {name: Landscape(*np.array(sorted(own)).T) for name, own in found.items()}


def box_of(first: np.ndarray, second: np.ndarray, values: np.ndarray) -> Box:
    """A box from the flat arrays of boxes.csv."""
    return Box(first, second, values.reshape(len(second), len(first)))


def table(lines: dict[str, Landscape], settings: dict[str, Any]) -> str:
    """table.md."""
    value = lines[VALUE]
    end = value.delta[-1]
    text = [
        "# Variance of PIPPS's gradient along a line of policies", "",
        origin(settings), "",
        f"{settings['particles']} particles with fixed noise (seed {settings['seed']}), direction "
        f"{settings['direction']}. The value is {value.mean[0]:.1f} at Δ = 0 and "
        f"{value.mean[-1]:.1f} at Δ = {end:g}. A variance is that of one particle's gradient along "
        "the line; that of their mean is its P-th part.", "",
        f"| estimator | variance at Δ = 0 | at Δ = {end:g} | largest | at Δ = | growth to the "
        "largest |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, own in lines.items():
        if name == VALUE:
            continue
        growth, at = own.growth()
        text.append(
            f"| `{name}` | {own.variance[0]:.2g} | {own.variance[-1]:.2g} | "
            f"{own.variance.max():.2g} | {at:g} | {growth:.2g} |"
        )
    return "\n".join(text) + "\n"


def central_differences(value: Landscape) -> np.ndarray:
    """[D - 2] slope of the value at each Δ that has two neighbours."""
    return (value.mean[2:] - value.mean[:-2]) / (value.delta[2:] - value.delta[:-2])


def figure_of(
    lines: dict[str, Landscape], boxes: dict[float, Box], axes: Sequence[str], particles: int
) -> Figure:
    """Fig. 2 of Parmas et al. 2018, and the variances of all estimators.

    Args:
        lines: the value and the gradients.
        boxes: Δ -> its box; the first and the last are drawn.
        axes: names of a box's two sides.
        particles: P.
    """
    figure = Figure(figsize=(13, 6), layout="constrained")
    figure.suptitle(f"One line of policies, {particles} particles with the same noise everywhere")
    top, bottom = figure.subplots(2, SHOWN)
    value = lines[VALUE]
    top[0].fill_between(value.delta, *_interval(value, particles), color="0.6", lw=0)
    top[0].plot(value.delta, value.mean, color="k", lw=1)
    top[0].set(title="value J", xlabel="Δ", ylabel="cost of an episode")
    for axis, (delta, box) in zip(top[1:], sorted(boxes.items())[:: max(len(boxes) - 1, 1)]):
        image = axis.pcolormesh(*box, cmap="viridis", rasterized=True)
        axis.set(title=f"V(x₁) at Δ = {delta:g}", xlabel=axes[0], ylabel=axes[1])
        figure.colorbar(image, ax=axis)
    estimators = [name for name in lines if name != VALUE]
    for name in estimators:
        own = lines[name]
        top[-1].plot(own.delta, own.variance, label=name, **style_of(name))
    top[-1].set(title="variance of a particle's gradient", xlabel="Δ", yscale="log")
    top[-1].grid(alpha=0.25)
    top[-1].legend(frameon=False, fontsize="x-small", loc="upper left")
    differences = central_differences(value)
    calm = [lines[name] for name in estimators[:SHOWN] if name != "rp"]
    ends = np.concatenate([differences, *(e for own in calm for e in _interval(own, particles))])
    low, high = float(ends.min()), float(ends.max())
    for axis, name in zip(bottom, estimators):
        own = lines[name]
        color = style_of(name)["color"]
        axis.fill_between(own.delta, *_interval(own, particles), color=color, alpha=0.35, lw=0)
        axis.plot(own.delta, own.mean, color=color, lw=1.2)
        axis.plot(value.delta[1:-1], differences, color="k", ls=":", lw=1)
        axis.set(title=f"gradient: {name}", xlabel="Δ", ylim=(low, high))
    for axis in bottom[len(estimators) :]:
        axis.set_visible(False)
    for axis in (*top, *bottom):
        axis.title.set_fontsize(10)
    bottom[0].set_ylabel("dJ/dΔ, 95 % interval\n(dotted: differences of J)")
    return figure


def _interval(own: Landscape, particles: int) -> tuple[np.ndarray, np.ndarray]:
    half = QUANTILE * np.sqrt(own.variance / particles)
    return own.mean - half, own.mean + half


if __name__ == "__main__":
    main()
