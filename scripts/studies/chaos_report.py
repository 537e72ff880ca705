"""Report of the chaotic-RNN study: comparison of the estimators, table, summary and figure."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from totalprop.estimators import names
from totalprop.scripts.studies.styles import MARKERS, style_of

REGIONS = {"stable": (0, 2.25), "edge of chaos": (2.25, 2.75), "chaotic": (2.75, np.inf)}
OURS, LIMIT = "tpg", 1.1
Betas = tuple[float, ...]
Study = dict[Betas, dict[str, "Measured"]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """The gradients of one estimator at one grid point."""

    g: np.ndarray  # [R] dL/dβ_1
    ms: float  # CPU time per gradient
    run: int = 0  # index into the settings' "runs"

    @property
    def variance(self) -> float:
        """Variance of a gradient over the repeats; infinite if one of them is not finite."""
        if not np.isfinite(self.g).all():
            return float("inf")
        with np.errstate(over="ignore"):
            return float(self.g.var(ddof=1))

    @property
    def relative_se(self) -> float:
        """Standard error of the variance, relative to the variance, by the jackknife.

        It is sqrt(2 / (R - 1)) for Gaussian gradients, and about 1 if the variance is due to a
        single repeat.
        """
        n, deviation = len(self.g), self.g - self.g.mean()
        scaled = np.square(deviation / max(np.abs(deviation).max(), np.finfo(float).tiny))
        left_out = (scaled.sum() - n / (n - 1) * scaled) / (n - 2)
        variance = scaled.sum() / (n - 1)
        return float(left_out.std() * (n - 1) ** 0.5 / variance) if variance > 0 else np.nan


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`tpg` compared with the best of the other estimators at one grid point."""

    best: str
    ratio: float  # of the variances; below 1, tpg is better
    interval: tuple[float, float]  # 95 %, by a bootstrap over the (paired) repeats

    @property
    def verdict(self) -> str:
        """Whether tpg is worse by a factor above `LIMIT`, and whether this may be noise."""
        if self.ratio <= LIMIT:
            return ""
        return f"> {LIMIT}" if self.interval[0] > LIMIT else f"> {LIMIT}? (noise)"


def compare(point: dict[str, Measured], *, resamples: int = 2000) -> Comparison | None:
    """Compare the variance of tpg with that of the best other; None if either is missing."""
    others = {name: m for name, m in point.items() if name != OURS}
    if OURS not in point or not others:
        return None
    best = min(others, key=lambda name: others[name].variance)
    ours, other = point[OURS].g, others[best].g
    if not np.isfinite([point[OURS].variance, others[best].variance]).all():
        ratio = 0.0 if np.isfinite(point[OURS].variance) else float("inf")
        return Comparison(best, ratio, (ratio, ratio))
    n = len(ours)
    rows = np.random.default_rng(0).integers(n, size=(resamples, n))
    ratios = ours[rows].var(1) / np.maximum(other[rows].var(1), np.finfo(float).tiny)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Comparison(best, float(ours.var() / other.var()), (float(low), float(high)))


def table(name: str, settings: dict[str, Any], study: Study) -> str:
    """Markdown table of a study: variances, the best other estimator, and tpg's ratio to it."""
    columns = sorted({e for point in study.values() for e in point}, key=rank)
    head = ["β_1", *(["β_2"] if name == "double" else []), *(f"`{e}`" for e in columns)]
    if OURS in columns:
        head += ["best other", f"{OURS} / best other", "95 %", ""]
    sizes = ", ".join(f"{k} {settings[k]}" for k in ("samples", "repeats", "horizon", "seed"))
    lines = [f"## {name}", "", *_origins(settings["runs"], study, sizes), ""]
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
    if np.isfinite(list(costs.values())).all():
        lines.append(
            "CPU ms per gradient: " + ", ".join(f"{e} {ms:.0f}" for e, ms in costs.items()) + "."
        )
    return "\n".join(lines) + "\n"


def _origins(runs: list[dict[str, str]], study: Study, sizes: str) -> list[str]:
    """The command and commit that measured the rows; if several, which rows each measured."""
    rows: dict[int, dict[str, int]] = {}
    for point in study.values():
        for name, m in point.items():
            of_run = rows.setdefault(m.run, {})
            of_run[name] = of_run.get(name, 0) + 1
    if len(rows) == 1:
        run = runs[next(iter(rows))]
        return [f"`{run['command']}` ({sizes}), commit {run['commit']}"]
    lines = [f"Measured by {len(rows)} commands ({sizes}):", ""]
    for number, points in sorted(rows.items()):
        run = runs[number]
        counts = ", ".join(f"{e} at {points[e]}" for e in sorted(points, key=rank))
        lines.append(f"- `{run['command']}`, commit {run['commit']}: {counts} point(s)")
    return lines


def summary(name: str, study: Study) -> list[str]:
    """Findings of the study, one sentence each."""
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
    several = any(len(betas) > 1 for betas in study)  # chains: where their k cannot be one
    better, worse = ("tpx", ["tp"]) if several else ("tp", ["rp", "lr"])
    gains = {
        betas: min(point[e].variance for e in worse) / point[better].variance
        for betas, point in study.items()
        if {better, *worse} <= set(point)
    }
    if gains:
        betas, gain = max(gains.items(), key=lambda item: item[1])
        lines.append(f"{name}, β = {betas}: {better} beats {' and '.join(worse)} by {gain:.3g}x")
    return lines


def figure_of(study: Study) -> Figure:
    """Variances, and below the ratio of tpg to the best other if there is one; a column per β_2."""
    groups: dict[Betas, list[Betas]] = {}
    for betas in study:
        groups.setdefault(betas[1:], []).append(betas)
    n = len(groups)
    seen = sorted({e for point in study.values() for e in point}, key=rank)
    ratios = (3, 1) if OURS in seen else (3,)
    size = 7.5 if n == 1 else 4 * n, 6.5 if OURS in seen else 5
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(
        len(ratios), n, sharex=True, sharey="row", squeeze=False, height_ratios=ratios
    )
    for (second, points), column in zip(groups.items(), axes.T, strict=True):
        top, lowest_axis = column[0], column[-1]
        for name in [e for e in seen if e != OURS] + [e for e in seen if e == OURS]:  # tpg on top
            here = [b for b in points if name in study[b]]
            style = {"lw": 1.6, "ms": 4, "marker": MARKERS.get(name), **style_of(name)}
            y = [study[b][name].variance for b in here]
            top.plot([b[0] for b in here], y, label=name, **style)
        for bottom in column[1:]:
            compared = [(b[0], c) for b in points if (c := compare(study[b])) is not None]
            for x, c in compared:
                bottom.plot([x, x], c.interval, color="0.55", lw=1.2)
            ratio = [c.ratio for _, c in compared]
            bottom.plot([x for x, _ in compared], ratio, "o", color="k", ms=4)
            bottom.axhline(1, color="0.3", lw=0.8)
            bottom.axhline(LIMIT, color="0.3", lw=0.8, ls=":")
        for axis in column:
            axis.axvline(2.5, color="0.85", lw=4, zorder=0)
            axis.grid(alpha=0.25)
        top.set_title(f"$\\beta_2 = {second[0]:g}$" if second else "one chain", fontsize=11)
        lowest_axis.set_xlabel("$\\beta_1$" if second else "$\\beta$")
    shown = [m.variance for p in study.values() for e, m in p.items() if e != "rp"]
    shown = [v for v in shown if np.isfinite(v)]
    lowest = min((m.variance for p in study.values() for m in p.values()), default=1.0)
    lowest = min(max(lowest, 1e-12), 1.0)
    axes[0, 0].set(yscale="log", ylabel="variance of $dL/d\\beta_1$")
    axes[0, 0].set_ylim(lowest / 5, max([*shown, lowest]) * 30)
    for bottom in axes[1:, 0]:
        bottom.set(yscale="log", ylabel=f"{OURS} / best other")
        ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10)
        bottom.set_yticks(ticks, [f"{t:g}" for t in ticks])
        bottom.minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncol=min(len(labels), 5), frameon=False
    )
    return figure


def rank(name: str) -> int:
    """Position of an estimator in the registry; unknown ones come last."""
    return names().index(name) if name in names() else len(names())
