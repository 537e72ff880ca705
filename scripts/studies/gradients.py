r"""Which estimator is nearest to the true gradient? Measure all of them on more than 100 points.

    totalprop study gradients                                   # all of it, 30 minutes on 2 cores
    totalprop study gradients --problems jump --samples 300 --out runs/gradients
    totalprop study gradients --estimators rp lr tpx mine --import my_module --out runs/gradients
    totalprop study gradients --problems runs/pipps_* --samples 100 300 --out runs/gradients

A point is a problem (`scripts/studies/problems.py`: smooth, stiff, with a jump, or chaotic) with a
horizon H and a number of samples N. The folder of a run of pipps or dreamer is a problem, too: the
gradient that trains its policy. At a point every estimator computes R gradients, all from the same
noise, and its error is their root mean square distance from the true gradient. The truth is a
closed form, or the mean of up to a million samples of an estimator that is right there, LR where
something jumps. Truths are kept in truths.json and measured once.

--out gets gradients.csv with every gradient, table.md and errors.png. A stopped study goes on with
the same command: points that are in the file are not measured again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from totalprop.agents.core import figures
from totalprop.agents.persistence.safe_file import write_text
from totalprop.estimators import Estimator, make, mixing
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.environments import search_here
from totalprop.scripts.run.errors import UserError, continuing_later
from totalprop.scripts.run.folder import RunFolder, read_json
from totalprop.scripts.run.progress import counted
from totalprop.scripts.studies.agent_problems import (
    DreamerProblem,
    PIPPSProblem,
    agent_problem,
)
from totalprop.scripts.studies.estimator_names import estimator_with_leg
from totalprop.scripts.studies.measurements import Key, Measurements, read_measurements
from totalprop.scripts.studies.problems import KINDS, PROBLEMS, Problem

GAMMAS = (0.03, 0.3, 3.0, 30.0)  # of aobg, whose tolerated bias is in units of the gradient
MANY = 5000  # samples of a point that has half of the repeats, and of a part of the truth
PARTS = 200  # of the truth
MANY_IN_MODELS = 1000  # samples of a part, where a sample is of a learned model
OURS = "safe"
RIVALS = ("rp", "lr", "tp", "tpx", "ivw-h", "ddcg", *(f"aobg-{gamma:g}" for gamma in GAMMAS))
OTHERS = ("lr-first-order", "tpg", "tpx-guarded", "tpg-guarded", "rp-cut")
LIMIT = 1.1  # times the least error of a rival
DRAWS = 1000  # of the bootstrap
FEW = 24  # points that the figure names one by one
KEYS, VALUES = ("problem", "horizon", "samples", "estimator"), ("ms", "gradients")


class Point(NamedTuple):
    """Where estimators are compared."""

    problem: str
    horizon: int
    samples: int


class Truth(NamedTuple):
    """The true gradient, its standard error (both [P]) and where it is from."""

    gradient: np.ndarray
    error: np.ndarray
    source: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    with continuing_later():
        if not options.report_only:
            measure(options, arguments)
        report(options.out)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; on wrong usage, exit with code 2."""
    parser = parser_of("study gradients")
    options = parser.parse_args(arguments)
    _import(options.imports)
    chosen = options.problems or list(PROBLEMS)
    runs = [name for name in chosen if Path(name).is_dir()]
    if unknown := set(chosen) - set(PROBLEMS) - set(KINDS) - set(runs):
        known = ", ".join((*KINDS[:-1], *PROBLEMS))
        parser.error(f"--problems are {known} and runs, got {', '.join(sorted(unknown))}")
    options.problems = [
        name for name, problem in PROBLEMS.items() if name in chosen or problem.kind in chosen
    ]
    options.problems += [str(Path(run)) for run in runs]
    options.estimators = options.estimators or [OURS, *RIVALS, *OTHERS]
    for name in options.estimators:
        try:
            needs_critic = estimator_named(name).needs_critic
        except ValueError as error:
            parser.error(str(error))
        if needs_critic and any(problem in PROBLEMS for problem in options.problems):
            parser.error(f"{name} needs a critic: choose --problems that are runs of dreamer")
    return options


def estimator_named(name: str) -> Estimator:
    """An estimator by name, with a leg (tpx+lax) or a tolerated bias (aobg-0.3)."""
    gamma = _tolerance(name)
    if gamma is None:
        return estimator_with_leg(name)
    return make("aobg", weight=functools.partial(mixing.aobg, gamma=gamma))


def _tolerance(name: str) -> float | None:
    """The tolerated bias in a name such as aobg-0.3."""
    kind, _, gamma = name.partition("aobg-")
    return float(gamma) if kind == "" and gamma else None


@functools.cache
def problem_named(name: str) -> Problem | PIPPSProblem | DreamerProblem:
    """A problem, or the agent of a run's folder."""
    return PROBLEMS[name] if name in PROBLEMS else agent_problem(Path(name))


def kind_of(name: str) -> str:
    """The kind of a problem, without loading it."""
    return PROBLEMS[name].kind if name in PROBLEMS else "agent"


# ---------------------------------------------------------------------------- measuring


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Measure what is missing in the files, and rewrite them after each point."""
    path = options.out / "gradients.csv"
    # A run that goes on, or is trained again under its name, is another agent.
    agents = {
        name: hashlib.sha256(RunFolder(Path(name)).model.read_bytes()).hexdigest()[:12]
        for name in options.problems if name not in PROBLEMS
    }  # fmt: skip
    found = Measurements(
        path, {"repeats": options.repeats, "seed": options.seed}, keys=KEYS, values=VALUES,
        command=shlex.join(["totalprop", "study", "gradients", *arguments]),
    )  # fmt: skip
    known = found.recorded.get("agents", {})
    for name in agents.keys() & known.keys():
        if agents[name] != known[name]:
            raise UserError(
                f"{path} was measured with another agent of {name}; choose another --out, or "
                "delete its files"
            )
    found.settings["agents"] = {**known, **agents}
    points = [
        Point(name, horizon, n)
        for name in options.problems
        for horizon in problem_named(name).horizons
        for n in options.samples
    ]
    todo = {p: [e for e in options.estimators if _key(p, e) not in found.rows] for p in points}
    todo = {p: missing for p, missing in todo.items() if missing}
    truths = read_truths(options.out)
    unknown = {(p.problem, p.horizon) for p in points} - truths.keys()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        options.jobs, mp_context=context, initializer=_prepare, initargs=(options.imports,)
    ) as pool:
        with counted(len(unknown), "truths") as advance:
            jobs = {pool.submit(true_gradient, *key): key for key in sorted(unknown)}
            for job in as_completed(jobs):
                truths[jobs[job]] = job.result()
                write_truths(options.out, truths)
                advance()
        with counted(len(todo), "points") as advance:
            pending = {
                pool.submit(gradients_at, p, missing, options.repeats, options.seed): p
                for p, missing in todo.items()
            }
            for done in as_completed(pending):
                point = pending[done]
                found.add_all(
                    {
                        _key(point, name): [f"{ms:.3g}", " ".join(f"{x:.6g}" for x in g.flatten())]
                        for name, (g, ms) in done.result().items()
                    }
                )
                advance()


def _key(point: Point, estimator: str) -> Key:
    return (*map(str, point), estimator)


def _prepare(imports: Sequence[str]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _import(imports)


def _import(modules: Sequence[str]) -> None:
    """Import what the command line names, which may lie in the current folder."""
    if modules:
        search_here()
    for module in modules:
        importlib.import_module(module)


def _end_with_parent() -> None:
    """End this process when the study is killed, which tells its workers nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def repeats_at(point: Point, repeats: int) -> int:
    """Number of gradients of each estimator."""
    return repeats if point.samples < MANY else repeats // 2


def gradients_at(
    point: Point, estimators: Sequence[str], repeats: int, seed: int
) -> dict[str, tuple[np.ndarray, float]]:
    """The gradients [R, P] of each estimator, and milliseconds of processor time of one."""
    problem: Any = problem_named(point.problem)
    chosen = {name: estimator_named(name) for name in estimators}
    found: dict[str, list[np.ndarray]] = {name: [] for name in estimators}
    seconds = dict.fromkeys(estimators, 0.0)
    tolerances = [name for name in estimators if _tolerance(name) is not None]
    for r in range(repeats_at(point, repeats)):
        noise = problem.draw(point.horizon, point.samples, _seed_of(point, seed, r))
        for name, estimator in chosen.items():
            began = time.process_time()
            if name not in tolerances:
                found[name].append(problem.gradient(estimator, noise).numpy())
            elif name == tolerances[0]:
                for other, g in _at_all_tolerances(tolerances, problem, noise).items():
                    found[other].append(g.numpy())
            seconds[name] += time.process_time() - began
    for name in tolerances[1:]:
        seconds[name] = seconds[tolerances[0]]
    return {n: (np.stack(g), 1000 * seconds[n] / len(g)) for n, g in found.items()}


def _at_all_tolerances(names: Sequence[str], problem: Any, noise: Any) -> dict[str, torch.Tensor]:
    """The gradients of aobg-0.3 and the like, which mix the same gradients of RP and LR."""
    chosen: dict[str, torch.Tensor] = {}

    def rule(rp: mixing.Zeta, legs: Sequence[mixing.Zeta], probe: Any) -> list[torch.Tensor]:
        for name in names:
            (chosen[name],) = mixing.aobg(rp, legs, probe, gamma=_tolerance(name) or 0.0)
        return [torch.ones(())]

    lr = problem.gradient(make("aobg", weight=rule), noise)
    rp = problem.gradient(make("rp"), noise)
    weights = {name: k.reshape(()) for name, k in chosen.items()}
    return {name: torch.where(k < 1, torch.lerp(rp, lr, k), lr) for name, k in weights.items()}


def _seed_of(point: Point, seed: int, repeat: int) -> int:
    """Different for each point and repeat."""
    key = [seed, repeat, point.horizon, point.samples, *point.problem.encode()]
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def true_gradient(name: str, horizon: int) -> Truth:
    """The closed form, or the mean over PARTS batches of an estimator that is right."""
    problem: Any = problem_named(name)
    if problem.exact is not None:
        gradient = problem.exact(horizon).numpy()
        return Truth(gradient, np.zeros_like(gradient), "closed form")
    n = MANY if name in PROBLEMS else MANY_IN_MODELS
    estimator = make(problem.truth, cross_fit=True)
    parts = np.stack([
        problem.gradient(estimator, problem.draw(horizon, n, seed)).numpy()
        for seed in range(10**6, 10**6 + PARTS)
    ])  # fmt: skip
    source = f"{problem.truth}, {n * PARTS:,} samples"
    return Truth(parts.mean(0), parts.std(0, ddof=1) / PARTS**0.5, source)


# ---------------------------------------------------------------------------- files


def read_truths(out: Path) -> dict[tuple[str, int], Truth]:
    """What truths.json holds."""
    path = out / "truths.json"
    if not path.exists():
        return {}
    return {
        (record["problem"], record["horizon"]): Truth(
            np.array(record["gradient"]), np.array(record["standard_error"]), record["source"]
        )
        for record in read_json(path)["truths"]
    }


def write_truths(out: Path, truths: dict[tuple[str, int], Truth]) -> None:
    """Write truths.json."""
    records = [
        {
            "problem": name, "horizon": horizon, "gradient": truth.gradient.tolist(),
            "standard_error": truth.error.tolist(), "source": truth.source,
        }
        for (name, horizon), truth in sorted(truths.items())
    ]  # fmt: skip
    write_text(out / "truths.json", json.dumps({"truths": records}, indent=1) + "\n")


# ---------------------------------------------------------------------------- report


class Errors(NamedTuple):
    """What one point says of its estimators."""

    point: Point
    rmse: dict[str, float]
    rival: str  # with the least error
    ratio: tuple[float, float, float]  # of ours to it: estimate and ends of the 95 % interval
    wrong_sign: list[str]  # estimators whose mean has a sign that the truth has not, by 3 SE


def report(out: Path) -> None:
    """Write table.md and errors.png from the files."""
    settings, rows = read_measurements(out / "gradients.csv", (*KEYS, *VALUES))
    truths = read_truths(out)
    measured: dict[Point, dict[str, np.ndarray]] = {}  # gradients [R, P] of each estimator
    ms: dict[str, dict[Point, float]] = {}
    for row in rows:
        point = Point(row["problem"], int(row["horizon"]), int(row["samples"]))
        truth = truths.get((point.problem, point.horizon))
        if truth is not None:
            g = np.array(row["gradients"].split(), float).reshape(-1, len(truth.gradient))
            measured.setdefault(point, {})[row["estimator"]] = g
            ms.setdefault(row["estimator"], {})[point] = float(row["ms"])
    order = {name: i for i, name in enumerate(PROBLEMS)}
    points = sorted(measured, key=lambda point: (order.get(point.problem, len(order)), point))
    found = [
        errors_at(point, measured[point], truths[point.problem, point.horizon]) for point in points
    ]
    text = table(found, ms, settings)
    write_text(out / "table.md", text)
    figures.save(heat_map(found), out / "errors.png", dpi=150)
    print(f"{text}\nwritten to {out}: gradients.csv, truths.json, table.md, errors.png")


def errors_at(point: Point, gradients: dict[str, np.ndarray], truth: Truth) -> Errors:
    """Errors of all estimators at a point."""
    distances = {name: squared_errors(g, truth) for name, g in gradients.items()}
    rmse = {name: float(d.mean() ** 0.5) for name, d in distances.items()}
    rivals = [name for name in RIVALS if name in rmse] or list(rmse)
    rival = min(rivals, key=lambda name: rmse[name])
    ratio = (np.nan, np.nan, np.nan)
    if OURS in distances:
        ratio = ratio_of(distances[OURS], distances[rival])
    wrong = [name for name, g in gradients.items() if has_wrong_sign(g, truth)]
    return Errors(point, rmse, rival, ratio, wrong)


def squared_errors(g: np.ndarray, truth: Truth) -> np.ndarray:
    """[R] squared distances from the truth, less what the truth's own error adds on average."""
    distances: np.ndarray = np.square(np.nan_to_num(g, nan=np.inf) - truth.gradient).sum(1)
    spread = g.var(0, ddof=1).sum()
    excess = min(float(np.square(truth.error).sum()), max(float(distances.mean() - spread), 0.0))
    return distances - excess


def ratio_of(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """RMSE of ours over theirs, with a bootstrap over the repeats, which have the same noise."""
    generator = np.random.default_rng(0)
    rows = generator.integers(0, len(ours), (DRAWS, len(ours)))
    tiny = np.finfo(float).tiny
    draws = np.sqrt(np.maximum(ours[rows].mean(1), 0) / np.maximum(theirs[rows].mean(1), tiny))
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(np.sqrt(ours.mean() / max(theirs.mean(), tiny))), float(low), float(high)


def has_wrong_sign(g: np.ndarray, truth: Truth) -> bool:
    """Whether a mean gradient has the wrong sign by more than 3 standard errors, of both."""
    mean, error = g.mean(0), g.std(0, ddof=1) / len(g) ** 0.5
    wrong = (np.sign(mean) != np.sign(truth.gradient)) & (np.abs(mean) > 3 * error)
    return bool((wrong & (np.abs(truth.gradient) > 3 * truth.error)).any())


def _order(names: Iterable[str]) -> list[str]:
    """Ours, then the rivals, then all others."""
    first = {name: i for i, name in enumerate((OURS, *RIVALS))}
    return sorted(names, key=lambda name: (first.get(name, len(first)), name))


def table(
    found: Sequence[Errors], ms: dict[str, dict[Point, float]], settings: dict[str, Any]
) -> str:
    """table.md."""
    names = _order({name for errors in found for name in errors.rmse})
    lines = [
        "# Errors of gradient estimators", "",
        f"{len(found)} points. An estimator's error is its root mean square distance from the true "
        f"gradient, here in units of the least error of {', '.join(RIVALS)} at the point. "
        f"{settings['repeats']} gradients per point and estimator (half of that from {MANY} "
        "samples on), so a ratio is known to some 15 to 25 %. "
        "A wrong sign is that of a mean over all gradients, by 3 standard errors.", "",
        f"| estimator | within {LIMIT} | median | 90 % below | largest | wrong signs | time / rp |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in names:
        own = [e for e in found if name in e.rmse]
        ratios = np.array([e.rmse[name] / max(e.rmse[e.rival], 1e-300) for e in own])
        slower = [t / ms["rp"][p] for p, t in ms[name].items() if p in ms.get("rp", {})]
        wrong = sum(name in e.wrong_sign for e in own)
        lines.append(
            f"| `{name}` | {np.mean(ratios <= LIMIT):.0%} | {np.median(ratios):.2f} | "
            f"{np.quantile(ratios, 0.9):.3g} | {ratios.max():.3g} | {wrong} | "
            f"{np.median(slower) if slower else np.nan:.1f} |"
        )
    misses = [e for e in found if e.ratio[1] > LIMIT]
    judged = [e for e in found if not np.isnan(e.ratio[0])]
    if judged:
        lines += [
            "",
            f"`{OURS}` is above {LIMIT} times the best of the others, beyond the noise of the "
            f"repeats, at {len(misses)} of {len(judged)} points{':' if misses else '.'}",
        ]
    if misses:
        lines += [
            "",
            "| problem | H | N | ratio | 95 % interval | best |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {Path(e.point.problem).name} | {e.point.horizon} | {e.point.samples} | "
            f"{e.ratio[0]:.2f} | {e.ratio[1]:.2f} to {e.ratio[2]:.2f} | `{e.rival}` |"
            for e in sorted(misses, key=lambda e: -e.ratio[0])
        ]
    return "\n".join(lines) + "\n"


def heat_map(found: Sequence[Errors]) -> Figure:
    """Every estimator at every point: the darker, the further from the best."""
    names = _order({name for errors in found for name in errors.rmse})
    kinds = [kind_of(errors.point.problem) for errors in found]
    order = sorted(range(len(found)), key=lambda i: (KINDS.index(kinds[i]), found[i].point))
    ratios = np.full((len(names), len(found)), np.nan)
    for column, i in enumerate(order):
        for row, name in enumerate(names):
            if name in found[i].rmse:
                ratios[row, column] = found[i].rmse[name] / found[i].rmse[found[i].rival]
    figure = Figure(figsize=(11, 0.28 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        np.clip(ratios, 1, 100), aspect="auto", cmap="Reds", norm=LogNorm(1, 100),
        interpolation="none",
    )  # fmt: skip
    axes.set_facecolor("0.85")  # seen where nothing was measured: white is the best
    axes.set_yticks(range(len(names)), names, fontsize="small")
    edges, ticks = [0], []
    for kind in KINDS:
        own = kinds.count(kind)
        if own:
            ticks.append((edges[-1] + (own - 1) / 2, f"{kind}\n({own} points)"))
            edges.append(edges[-1] + own)
    if len(found) > FEW:
        axes.set_xticks([at for at, _ in ticks], [label for _, label in ticks])
    else:
        points = [found[i].point for i in order]
        labels = [f"{Path(p.problem).name}\nH {p.horizon}, N {p.samples}" for p in points]
        axes.set_xticks(range(len(found)), labels, fontsize="x-small", rotation=90)
    for edge in edges[1:-1]:
        axes.axvline(edge - 0.5, color="black", lw=0.8)
    axes.set_title(
        "Error of the gradient, in units of the best rival's: white is best", fontsize=10
    )
    bar = figure.colorbar(image, ax=axes, ticks=[1, 2, 5, 10, 100], pad=0.01)
    bar.ax.set_yticklabels(["1", "2", "5", "10", "≥ 100"])
    return figure


if __name__ == "__main__":
    main()
