r"""How many particles does PIPPS's gradient need? Its variance against their number.

    totalprop study pipps-particles                     # Fig. 3 of Parmas et al. 2018, some minutes
    totalprop study pipps-particles --particles 25 50 100 250 500 1000 --repeats 100 --out runs/many
    totalprop study pipps-particles --run runs/NAME --estimators rp lr+biw mine --out runs/mine

The two ends of the line of `totalprop study pipps-landscape`: a trained policy, and one that makes
the simulated cart-pole chaotic. At each of them every estimator computes R gradients, each from P
new particles; drawn is the variance of the gradient along the line. All estimators see the same
noise.

An estimator with a plus has a likelihood ratio of another leg: lr+biw is LR with batch importance
weighting. "gr" is RP through Gaussian resampling.

--out gets particles.csv with every gradient, table.md and particles.png. A stopped study goes on
with the same command: what is in the file is not measured again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from totalprop.agents.core import figures
from totalprop.agents.core.memory import keep_freed_memory
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.errors import continuing_later
from totalprop.scripts.run.progress import counted
from totalprop.scripts.studies.chaos_report import Measured
from totalprop.scripts.studies.estimator_names import LEG
from totalprop.scripts.studies.measurements import Measurements, origin, read_measurements
from totalprop.scripts.studies.policy_line import RESAMPLED, PolicyLine, estimator_named
from totalprop.scripts.studies.styles import style_of

KEYS, NUMBERS = ("delta", "particles", "estimator"), ("ms", "gradients")

Curves = dict[float, dict[str, dict[int, Measured]]]  # Δ -> estimator -> P -> its gradients


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    with continuing_later():
        if not options.report_only:
            measure(options, shlex.join(["totalprop", "study", "pipps-particles", *arguments]))
        report(options.out)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; on wrong usage, exit with code 2."""
    parser = parser_of("study pipps-particles")
    options = parser.parse_args(arguments)
    for name in options.estimators:
        try:
            estimator_named(name)
        except ValueError as error:
            parser.error(str(error))
    return options


# ---------------------------------------------------------------------------- measuring


def measure(options: argparse.Namespace, command: str) -> None:
    """Measure what is missing in the file."""
    line = PolicyLine(options.run, options.direction)
    settings: dict[str, Any] = {"policy": line.digest}
    settings |= {name: getattr(options, name) for name in ("direction", "repeats", "seed")}
    found = Measurements(
        options.out / "particles.csv", settings, keys=KEYS, values=NUMBERS, command=command
    )
    points = [
        (delta, n, name)
        for n in options.particles  # the quick ones first
        for delta in (0.0, options.end)
        for name in options.estimators
        if (f"{delta:g}", str(n), name) not in found.rows
    ]
    with counted(len(points), "variances") as advance:
        for delta, n, name in points:
            line.move(delta)
            began = time.process_time()
            slopes = slopes_of(line, name, n, options.repeats, options.seed)
            ms = 1000 * (time.process_time() - began) / options.repeats
            numbers = " ".join(f"{x:.8g}" for x in slopes)
            found.add((f"{delta:g}", str(n), name), [f"{ms:.4g}", numbers])
            advance()


def slopes_of(line: PolicyLine, name: str, n: int, repeats: int, seed: int) -> list[float]:
    """[R] gradients along the line, each from n particles of its own."""
    estimator, resample = estimator_named(name), name == RESAMPLED
    seeds = np.random.SeedSequence([seed, n]).generate_state(repeats, np.uint64) >> np.uint64(1)
    noises = (line.draw(n, int(own), resample=resample) for own in seeds)
    return [float(line.slope(estimator, noise)) for noise in noises]


# ---------------------------------------------------------------------------- report


def report(out: Path) -> None:
    """Write table.md and particles.png from the file."""
    settings, rows = read_measurements(out / "particles.csv", (*KEYS, *NUMBERS))
    curves = curves_of(rows)
    text = table(curves, settings)
    write_text(out / "table.md", text)
    figures.save(figure_of(curves), out / "particles.png", dpi=150)
    print(f"{text}\nwritten to {out}: particles.csv, table.md, particles.png")


def curves_of(rows: Sequence[dict[str, str]]) -> Curves:
    """What particles.csv holds, by Δ, estimator and P."""
    curves: Curves = {}
    for row in sorted(rows, key=lambda row: (float(row["delta"]), int(row["particles"]))):
        own = curves.setdefault(float(row["delta"]), {}).setdefault(row["estimator"], {})
        gradients = np.array(row["gradients"].split(), float)
        own[int(row["particles"])] = Measured(gradients, float(row["ms"]))
    return curves


def table(curves: Curves, settings: dict[str, Any]) -> str:
    """table.md."""
    text = [
        "# Variance of PIPPS's gradient against the number of particles", "",
        origin(settings), "",
        f"Variances of {settings['repeats']} gradients along the line (direction "
        f"{settings['direction']}, seed {settings['seed']}), ± their standard error by the "
        "jackknife; ms: processor time of a gradient with the most particles.",
    ]  # fmt: skip
    for delta, own in curves.items():
        sizes = sorted({n for of_n in own.values() for n in of_n})
        heads = [f"P = {n}" for n in sizes]
        text += ["", f"## Δ = {delta:g}", "", f"| estimator | {' | '.join(heads)} | ms |"]
        text.append("|---" * (len(sizes) + 2) + "|")
        for name, of_n in own.items():
            cells = [
                f"{m.variance:.2g} ± {m.relative_se * m.variance:.1g}" if m else ""
                for m in map(of_n.get, sizes)
            ]
            text.append(f"| `{name}` | {' | '.join(cells)} | {of_n[max(of_n)].ms:.0f} |")
        text += ["", *weighting(own)]
    return "\n".join(text) + "\n"


def weighting(own: dict[str, dict[int, Measured]]) -> list[str]:
    """What batch importance weighting divides the variances by, a sentence per rule."""
    found = []
    for name, with_biw in own.items():
        rule, _, leg = name.partition(LEG)
        if leg != "biw" or rule not in own:
            continue
        ratios = [
            f"{own[rule][n].variance / m.variance:.2g} (P = {n})"
            for n, m in with_biw.items()
            if n in own[rule]
        ]
        found.append(f"- Batch importance weighting divides `{rule}`'s by {', '.join(ratios)}.")
    return found


def figure_of(curves: Curves) -> Figure:
    """Fig. 3 of Parmas et al. 2018: variance against P, one panel per end of the line."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (delta, own) in zip(axes, curves.items()):
        for name, of_n in own.items():
            sizes, measured = list(of_n), list(of_n.values())
            variance = np.array([m.variance for m in measured])
            error = variance * [m.relative_se for m in measured]
            low = np.maximum(variance - error, variance / 10)
            axis.fill_between(
                sizes, low, variance + error, color=style_of(name)["color"], alpha=0.08, lw=0
            )
            axis.plot(sizes, variance, label=name, marker="o", ms=3, **style_of(name))
        ticks = sorted({n for of_n in own.values() for n in of_n})
        axis.set(xscale="log", yscale="log", xlabel="particles P", title=f"policy at Δ = {delta:g}")
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("variance of the gradient along the line")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


if __name__ == "__main__":
    main()
