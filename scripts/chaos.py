"""Gradient variance on chaotic RNNs: which estimator is best where, and is tpg ever the worse?

    python -m scripts.chaos                     # one chain: variance of dL/dβ_1 against β_1
    python -m scripts.chaos --study double      # two chains: Fig. 3 of Parmas et al. 2023 (TPX)
    python -m scripts.chaos --report-only       # figures and table again, from the CSV files

A grid point is R repeats of the gradient w.r.t. β_1, each from N samples; at one point all
estimators see the same noise, at another point other noise. Rules with a probe (tp, tpg, ivw) count
the gradients w.r.t. all β; tps counts β_1 only (with one chain it is tp). Results go into --out:
<study>.csv, <study>.png and table.md. A stopped study goes on where it stopped: points that are in
the CSV file already are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from estimators import make, names
from scripts.chaotic_rnn import STD, draw_noise, gradients
from scripts.run_folder import UserError

GRIDS = {
    "single": (
        *(1.0, 1.25, 1.5, 1.75, 2.0, 2.15, 2.25, 2.3, 2.35, 2.4, 2.45, 2.5, 2.55, 2.6, 2.65),
        *(2.7, 2.85, 3.0, 3.25, 3.5, 3.75, 4.0),
    ),
    "double": (1.0, 1.5, 2.0, 2.2, 2.35, 2.45, 2.5, 2.6, 2.75, 3.0, 3.5, 4.0),
}
SECOND_BETAS = (1.5, 2.5, 3.5)
REGIONS = {"stable": (0, 2.25), "edge of chaos": (2.25, 2.75), "chaotic": (2.75, np.inf)}
OURS, LIMIT = "tpg", 1.1
COLUMNS = ("beta_1", "beta_2", "estimator", "variance", "relative_se", "mean", "se", "ms", "g")
# Okabe & Ito's colours; the variants of a rule are thin.
STYLES: dict[str, dict[str, Any]] = {
    "rp": {"color": "#E69F00", "marker": "v"},
    "lr": {"color": "#56B4E9", "marker": "^"},
    "tp": {"color": "#009E73", "marker": "s"},
    "tpx": {"color": "#CC79A7", "marker": "D"},
    "tpg": {"color": "black", "marker": "o", "lw": 2.2},
    "tps": {"color": "#009E73", "ls": "--", "lw": 1},
    "ivw": {"color": "#D55E00", "ls": "-.", "lw": 1.2},
    "tpx-scalar": {"color": "#CC79A7", "ls": "--", "lw": 1},
    "tpx-ivw": {"color": "#0072B2", "ls": ":", "lw": 1.3},
    "tpx-ivw-scalar": {"color": "#0072B2", "ls": "--", "lw": 1},
}

Betas = tuple[float, ...]
Study = dict[Betas, dict[str, "Measured"]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one estimator did at one grid point."""

    g: np.ndarray  # [R] dL/dβ_1
    ms: float  # of CPU time per gradient

    @property
    def variance(self) -> float:
        """Of one gradient, from the repeats."""
        return float(self.g.var(ddof=1))

    @property
    def relative_se(self) -> float:
        """Standard error of the variance over the variance, by the jackknife.

        sqrt(2 / (R - 1)) for Gaussian gradients, about 1 where one repeat is all of the variance.
        """
        n, deviation = len(self.g), self.g - self.g.mean()
        scaled = np.square(deviation / max(np.abs(deviation).max(), np.finfo(float).tiny))
        left_out = (scaled.sum() - n / (n - 1) * scaled) / (n - 2)
        variance = scaled.sum() / (n - 1)
        return float(left_out.std() * (n - 1) ** 0.5 / variance) if variance > 0 else np.nan


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parse(arguments)
    torch.set_num_threads(1)
    try:
        if not options.report_only:
            measure(options)
        report(options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; wrong usage ends with one sentence and code 2."""
    parser = _Parser(
        prog="python -m scripts.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--study", choices=list(GRIDS), default="single", help="default: single")
    add("--betas", nargs="+", type=float, help="grid of β_1; default: 22 (single), 12 (double)")
    add(
        "--second-betas",
        nargs="+",
        type=float,
        default=SECOND_BETAS,
        help="β_2; default: 1.5 2.5 3.5",
    )
    add("--estimators", nargs="+", default=names(), help="default: all that are registered")
    add("--samples", type=int, default=1000, help="N per gradient; default: 1000")
    add("--repeats", type=int, default=40, help="R per grid point; default: 40")
    add("--horizon", type=int, default=100, help="H steps; default: 100")
    add("--seed", type=int, default=0, help="of the noise; default: 0")
    add("--out", type=Path, default=Path("results/chaos"), help="folder; default: results/chaos")
    add("--redo", nargs="+", default=[], metavar="ESTIMATOR", help="measure these again")
    add("--report-only", action="store_true", help="measure nothing, only write figures and table")
    options = parser.parse_args(arguments)
    options.command = shlex.join(sys.argv[1:] if arguments is None else list(arguments))
    options.betas = options.betas or GRIDS[options.study]
    for name, least in (("samples", 3), ("repeats", 3), ("horizon", 1), ("seed", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    for beta in (*options.betas, *options.second_betas):
        if not 0 < beta <= 10:
            parser.error(f"every β must be in (0, 10], got {beta:g}")
    for name in (*options.estimators, *options.redo):
        try:
            make(name)
        except ValueError as error:
            parser.error(str(error))
    return options


# ---------------------------------------------------------------------------- measuring


def measure(options: argparse.Namespace) -> None:
    """Measure the grid points that the CSV file does not have, and write it after each."""
    path = options.out / f"{options.study}.csv"
    keys = ("study", "samples", "repeats", "horizon", "seed")
    settings: dict[str, Any] = {**{k: getattr(options, k) for k in keys}, "noise_std": STD}
    study: Study = {}
    if path.exists():
        found, study = read(path)
        for key, value in settings.items():
            if found.get(key) != value:
                raise UserError(
                    f"{path} was measured with {key} = {found.get(key)}, not {value}: "
                    "choose another --out, or delete the file"
                )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {options.out}: {error.strerror}") from error
    settings |= {"command": f"python -m scripts.chaos {options.command}".strip()}
    settings |= {"commit": _commit(), "torch": torch.__version__}

    seconds = options.second_betas if options.study == "double" else [None]
    points = [(b,) if c is None else (b, c) for c in seconds for b in options.betas]
    # With one chain tps is tp: both count the only β.
    asked = [e for e in options.estimators if options.study == "double" or e != "tps"]
    jobs = {p: [e for e in asked if e not in study.get(p, {}) or e in options.redo] for p in points}
    todo = sum(map(len, jobs.values()))
    with tqdm(total=todo, desc=options.study, unit="variance", disable=None) as bar:
        for betas, estimators in jobs.items():
            if not estimators:
                continue
            sizes = {k: getattr(options, k) for k in ("repeats", "samples", "horizon", "seed")}
            noise = draw_noise(betas, **sizes)
            for name in estimators:
                bar.set_postfix_str(f"β = {', '.join(map(str, betas))}: {name}")
                began = time.process_time()
                g = gradients(make(name), betas, noise)[:, 0].numpy()
                ms = 1000 * (time.process_time() - began) / options.repeats
                study.setdefault(betas, {})[name] = Measured(g, ms)
                bar.update()
            write(path, settings, study)


def write(path: Path, settings: dict[str, Any], study: Study) -> None:
    """CSV below the settings (a comment, JSON); replaced at once, so never half-written."""
    new = path.with_suffix(".tmp")
    with open(new, "w", newline="") as file:
        file.write(f"# {json.dumps(settings)}\n")
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(COLUMNS)
        for betas in sorted(study, key=lambda b: (b[1:], b)):
            for name, m in sorted(study[betas].items(), key=lambda item: _rank(item[0])):
                se = m.g.std(ddof=1) / len(m.g) ** 0.5
                shown = [f"{v:.4g}" for v in (m.variance, m.relative_se, m.g.mean(), se, m.ms)]
                second = betas[1] if len(betas) > 1 else ""
                rows.writerow([betas[0], second, name, *shown, " ".join(f"{g:.8g}" for g in m.g)])
    os.replace(new, path)


def read(path: Path) -> tuple[dict[str, Any], Study]:
    """Settings and measurements of a CSV file."""
    study: Study = {}
    try:
        with open(path, newline="") as file:
            settings = json.loads(file.readline().removeprefix("#"))
            for row in csv.DictReader(file):
                betas = tuple(float(row[b]) for b in ("beta_1", "beta_2") if row[b])
                g = np.array(row["g"].split(), float)
                study.setdefault(betas, {})[row["estimator"]] = Measured(g, float(row["ms"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error!r}; delete it to measure again") from error
    return settings, study


def _rank(name: str) -> int:
    return names().index(name) if name in names() else len(names())


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


# ---------------------------------------------------------------------------- reporting


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`tpg` against the best of all others at one point."""

    best: str
    ratio: float  # of the variances; below 1 tpg is the better
    interval: tuple[float, float]  # 95 %, bootstrap over the repeats, which are paired

    @property
    def verdict(self) -> str:
        """Whether it is worse by more than noise can explain."""
        if self.ratio <= LIMIT:
            return ""
        return f"> {LIMIT}" if self.interval[0] > LIMIT else f"> {LIMIT}? (noise)"


def compare(point: dict[str, Measured], *, resamples: int = 2000) -> Comparison | None:
    """Ratio of variances, tpg to the best other; None if one of them is missing."""
    others = {name: m for name, m in point.items() if name != OURS}
    if OURS not in point or not others:
        return None
    best = min(others, key=lambda name: others[name].variance)
    ours, other = point[OURS].g, others[best].g
    n = len(ours)
    rows = np.random.default_rng(0).integers(n, size=(resamples, n))
    ratios = ours[rows].var(1) / np.maximum(other[rows].var(1), np.finfo(float).tiny)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Comparison(best, float(ours.var() / other.var()), (float(low), float(high)))


def report(out: Path) -> None:
    """Figures, table.md and a summary of every study in the folder."""
    studies = {s: read(out / f"{s}.csv") for s in GRIDS if (out / f"{s}.csv").exists()}
    if not studies:
        raise UserError(f"no single.csv or double.csv in {out}; run without --report-only first")
    text, lines = [], []
    for name, (settings, study) in studies.items():
        _figure(study).savefig(out / f"{name}.png", dpi=150)
        text.append(_table(name, settings, study))
        lines += _summary(name, study)
    summary = "\n".join(f"- {line}" for line in lines)
    table = "# Variance of dL/dβ_1 on chaotic RNNs\n\n" + summary + "\n\n" + "\n".join(text)
    (out / "table.md").write_text(table)
    written = ", ".join([*(f"{s}.csv, {s}.png" for s in studies), "table.md"])
    print(f"{table}\n{summary}\nwritten to {out}: {written}")


def _table(name: str, settings: dict[str, Any], study: Study) -> str:
    columns = sorted({e for point in study.values() for e in point}, key=_rank)
    head = ["β_1", *(["β_2"] if name == "double" else []), *(f"`{e}`" for e in columns)]
    head += ["best other", "tpg / best other", "95 %", ""]
    sizes = ", ".join(f"{k} {settings[k]}" for k in ("samples", "repeats", "horizon", "seed"))
    lines = [f"## {name}", "", f"`{settings['command']}` ({sizes})", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for betas, point in study.items():
        cells = [f"{b:g}" for b in betas]
        cells += [f"{point[e].variance:.1e}" if e in point else "" for e in columns]
        c = compare(point)
        if c is not None:
            low, high = c.interval
            cells += [f"`{c.best}`", f"{c.ratio:.2f}", f"{low:.2f} to {high:.2f}", c.verdict]
        lines.append(f"| {' | '.join(cells)} |")
    errors = [m.relative_se for point in study.values() for e, m in point.items() if e != "rp"]
    errors_rp = [point["rp"].relative_se for point in study.values() if "rp" in point]
    lines += [
        "",
        f"Relative standard error of a variance (jackknife): median {np.median(errors):.2f}",
    ]
    lines[-1] += f"; rp up to {max(errors_rp):.2f}." if errors_rp else "."
    costs = {e: np.median([p[e].ms for p in study.values() if e in p]) for e in columns}
    lines.append(
        "CPU ms per gradient: " + ", ".join(f"{e} {ms:.0f}" for e, ms in costs.items()) + "."
    )
    return "\n".join(lines) + "\n"


def _summary(name: str, study: Study) -> list[str]:
    """What the study shows, a sentence each."""
    lines = []
    for region, (low, high) in REGIONS.items():
        points = [p for betas, p in study.items() if low <= betas[0] < high]
        common = set.intersection(*(set(p) for p in points)) if points else set()
        if len(common) < 2:
            continue
        logs = {e: np.mean([np.log(p[e].variance + 1e-300) for p in points]) for e in common}
        first, *rest = sorted(common, key=lambda e: logs[e])
        after = ", ".join(f"{e} {np.exp(logs[e] - logs[first]):.3g}x" for e in rest[:3])
        lines.append(
            f"{name}, β_1 {region}: least variance {first}, then {after} (geometric means)"
        )
    compared = {b: c for b, p in study.items() if (c := compare(p)) is not None}
    if compared:
        worst = max(compared, key=lambda b: compared[b].ratio)
        c, low = compared[worst], sum(c.interval[0] > LIMIT for c in compared.values())
        lines.append(
            f"{name}: worst {OURS} / best other = {c.ratio:.2f} (95 %: {c.interval[0]:.2f} to "
            f"{c.interval[1]:.2f}) at β = {worst} against {c.best}; {low} of {len(compared)} "
            f"points are above {LIMIT} by more than noise"
        )
    z = [
        (d.mean() / (d.std(ddof=1) / len(d) ** 0.5 + 1e-300))
        for p in study.values()
        if {OURS, "lr"} <= set(p)
        for d in [p[OURS].g - p["lr"].g]
    ]
    if z:
        lines.append(
            f"{name}: mean of {OURS} less mean of lr (unbiased) in standard errors: "
            f"root mean square {np.sqrt(np.mean(np.square(z))):.2f} (1 if unbiased), "
            f"largest {np.abs(z).max():.1f}"
        )
    for betas, better, worse in (((2.45,), ["tp"], ["rp", "lr"]), ((1.5, 3.5), ["tpx"], ["tp"])):
        point = study.get(betas, {})
        if {*better, *worse} <= set(point):
            gain = min(point[e].variance for e in worse) / point[better[0]].variance
            lines.append(
                f"{name}, β = {betas}: {better[0]} beats {' and '.join(worse)} by {gain:.3g}x"
            )
    return lines


def _figure(study: Study) -> Figure:
    """Above the variances, below tpg against the best other; one column for each β_2."""
    groups: dict[Betas, list[Betas]] = {}
    for betas in study:
        groups.setdefault(betas[1:], []).append(betas)
    n = len(groups)
    figure = Figure(figsize=(7.5 if n == 1 else 4 * n, 6.5), layout="constrained")
    axes = figure.subplots(2, n, sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    seen = sorted({e for point in study.values() for e in point}, key=_rank)
    for (second, points), top, bottom in zip(groups.items(), *axes, strict=True):
        for name in [e for e in seen if e != OURS] + [e for e in seen if e == OURS]:  # ours on top
            here = [b for b in points if name in study[b]]
            style = {"lw": 1.6, "ms": 4, **STYLES.get(name, {"ls": "-."})}
            y = [study[b][name].variance for b in here]
            top.plot([b[0] for b in here], y, label=name, **style)
        compared = [(b[0], c) for b in points if (c := compare(study[b])) is not None]
        for x, c in compared:
            bottom.plot([x, x], c.interval, color="0.55", lw=1.2)
        bottom.plot([x for x, _ in compared], [c.ratio for _, c in compared], "o", color="k", ms=4)
        bottom.axhline(1, color="0.3", lw=0.8)
        bottom.axhline(LIMIT, color="0.3", lw=0.8, ls=":")
        for axis in (top, bottom):
            axis.axvline(2.5, color="0.85", lw=4, zorder=0)
            axis.grid(alpha=0.25)
        top.set_title(f"$\\beta_2 = {second[0]:g}$" if second else "one chain", fontsize=11)
        bottom.set_xlabel("$\\beta_1$" if second else "$\\beta$")
    finite = [m.variance for p in study.values() for e, m in p.items() if e != "rp"]
    lowest = min((m.variance for p in study.values() for m in p.values()), default=1.0)
    axes[0, 0].set(yscale="log", ylabel="variance of $dL/d\\beta_1$")
    axes[0, 0].set_ylim(max(lowest, 1e-12) / 5, max([*finite, lowest], default=1.0) * 30)
    axes[1, 0].set(yscale="log", ylabel=f"{OURS} / best other")
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10)
    axes[1, 0].set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes[1, 0].minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncol=min(len(labels), 5), frameon=False
    )
    return figure


if __name__ == "__main__":
    main()
