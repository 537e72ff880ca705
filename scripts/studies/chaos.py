"""Measure the gradient variance of every estimator on chaotic RNNs.

    totalprop chaos                     # one chain: variance of dL/dβ_1 against β_1
    totalprop chaos --study double      # two chains: Parmas et al. 2023 (TPX), Fig. 3
    totalprop chaos --report-only       # redraw figures and table from the CSV files

The study shows which estimator is best in which regime, and whether tpg, this project's own rule,
is ever worse than the best of the others. A chain is stable for β < 2.5 and chaotic above. At each
grid point the gradient w.r.t. β_1 is computed R times, each time from N samples. All estimators see
the same noise at a point; different points have different noise. Rules with a probe (tp, tpg, ivw)
use the gradients w.r.t. all β, tps only those w.r.t. β_1 (with one chain it equals tp).

Results are written to --out: <study>.csv, <study>.png and table.md. A stopped study can be
continued by the same command, since points that are in the CSV file are not measured again. Every
row records the command and the commit that produced it.
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

from totalprop.agents.core import figures
from totalprop.agents.persistence.safe_file import write_text
from totalprop.estimators import make, names
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.errors import UserError, continuing_later
from totalprop.scripts.run.progress import counted
from totalprop.scripts.studies.chaos_report import Measured, Study, figure_of, rank, summary, table
from totalprop.scripts.studies.chaotic_rnn import STD, draw_noise, gradients
from totalprop.scripts.studies.measurements import Measurements, read_measurements

GRIDS = {
    "single": (
        *(1.0, 1.25, 1.5, 1.75, 2.0, 2.15, 2.25, 2.3, 2.35, 2.4, 2.45, 2.5, 2.55, 2.6, 2.65),
        *(2.7, 2.85, 3.0, 3.25, 3.5, 3.75, 4.0),
    ),
    "double": (1.0, 1.5, 2.0, 2.2, 2.35, 2.45, 2.5, 2.6, 2.75, 3.0, 3.5, 4.0),
}
SECOND_BETAS = (1.5, 2.5, 3.5)
KEYS = {"single": ("beta_1", "estimator"), "double": ("beta_1", "beta_2", "estimator")}
NUMBERS = ("variance", "relative_se", "mean", "se", "ms", "g")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parse(arguments)
    torch.set_num_threads(1)
    with continuing_later():
        if not options.report_only:
            measure(options)
        report(options.out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; on wrong usage, print one line and exit with code 2."""
    parser = parser_of("chaos")
    options = parser.parse_args(arguments)
    arguments = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["totalprop", "chaos", *arguments])
    options.betas = options.betas or GRIDS[options.study]
    options.second_betas = options.second_betas or SECOND_BETAS
    options.estimators = options.estimators or names()
    for name in (*options.estimators, *options.redo):
        try:
            make(name)
        except ValueError as error:
            parser.error(str(error))
    return options


# ---------------------------------------------------------------------------- measuring


def measure(options: argparse.Namespace) -> None:
    """Measure the grid points that are missing in the CSV file, and rewrite it after each."""
    names_ = ("study", "samples", "repeats", "horizon", "seed")
    settings: dict[str, Any] = {**{k: getattr(options, k) for k in names_}, "noise_std": STD}
    keys, path = KEYS[options.study], options.out / f"{options.study}.csv"
    found = Measurements(path, settings, keys=keys, values=NUMBERS, command=options.command)

    seconds = options.second_betas if options.study == "double" else [None]
    points = [(b,) if c is None else (b, c) for c in seconds for b in options.betas]
    # With one chain there is one β, and tps equals tp.
    asked = list(dict.fromkeys([*options.estimators, *options.redo]))
    asked = [e for e in asked if options.study == "double" or e != "tps"]
    jobs = {
        betas: [e for e in asked if e in options.redo or (*map(str, betas), e) not in found.rows]
        for betas in points
    }
    todo = sum(map(len, jobs.values()))
    if todo:  # warm up: the first gradient of a process includes PyTorch's set-up time
        gradients(
            make("rp"), points[0], draw_noise(points[0], repeats=1, samples=9, horizon=1, seed=0)
        )
    with counted(todo, f"variances ({options.study})") as advance:
        for betas, estimators in jobs.items():
            if not estimators:
                continue
            sizes = {k: getattr(options, k) for k in ("repeats", "samples", "horizon", "seed")}
            noise = draw_noise(betas, **sizes)
            for name in estimators:
                began = time.process_time()
                g = gradients(make(name), betas, noise)[:, 0].numpy()
                ms = 1000 * (time.process_time() - began) / options.repeats
                found.add((*map(str, betas), name), cells(Measured(g, ms)))
                advance()


def cells(found: Measured) -> list[str]:
    """The `NUMBERS` of a row; `read` needs the milliseconds and the gradients alone."""
    se = found.g.std(ddof=1) / len(found.g) ** 0.5
    shown = (found.variance, found.relative_se, found.g.mean(), se, found.ms)
    return [*(f"{number:.4g}" for number in shown), " ".join(f"{g:.8g}" for g in found.g)]


def read(path: Path) -> tuple[dict[str, Any], Study]:
    """Read a CSV file: its settings, including the "runs" that rows refer to, and its rows.

    Raises:
        UserError: the file is not there, or not one of this study.
    """
    settings, rows = read_measurements(path, ("estimator", "ms", "run", "g"))
    study: Study = {}
    try:
        *of_betas, _ = KEYS[settings["study"]]
        for row in rows:
            g, run = np.array(row["g"].split(), float), int(row["run"])
            settings["runs"][run]  # raises IndexError if the row refers to no run
            betas = tuple(float(row[name]) for name in of_betas)
            study.setdefault(betas, {})[row["estimator"]] = Measured(g, float(row["ms"]), run)
    except (ValueError, LookupError) as error:
        raise UserError(f"cannot read {path}: {error!r}; delete it to measure again") from error
    points = sorted(study.items(), key=lambda item: (item[0][1:], item[0]))
    return settings, {b: dict(sorted(own.items(), key=lambda e: rank(e[0]))) for b, own in points}


# ---------------------------------------------------------------------------- reporting


def report(out: Path) -> None:
    """Write the figures and table.md for every study in the folder, and print the table."""
    studies = {s: read(out / f"{s}.csv") for s in GRIDS if (out / f"{s}.csv").exists()}
    if not studies:
        raise UserError(f"no single.csv or double.csv in {out}; run without --report-only first")
    text, lines = [], []
    for name, (settings, study) in studies.items():
        figures.save(figure_of(study), out / f"{name}.png", dpi=150)
        text.append(table(name, settings, study))
        lines += summary(name, study)
    shown = "\n".join(f"- {line}" for line in lines)
    page = "# Variance of dL/dβ_1 on chaotic RNNs\n\n" + shown + "\n\n" + "\n".join(text)
    write_text(out / "table.md", page)
    written = ", ".join([*(f"{s}.csv, {s}.png" for s in studies), "table.md"])
    print(f"{page}\n{shown}\nwritten to {out}: {written}")


if __name__ == "__main__":
    main()
