"""Train several estimators and seeds, and write the numbers, a table and learning curves.

    python -m scripts.sweep pipps --estimators tpx lr rp --seeds 0 1 2 3 4 --out results/pipps

Every run is a `scripts.train` of its own, so a killed sweep goes on where it stopped: finished runs
are not repeated. Flags of scripts.train follow after `--`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from scripts.run_folder import AGENTS, RunFolder, UserError, current_commit, read_json

THRESHOLDS = (12.5, 15.0, 17.5)  # sensitivity of "success" to the threshold on the final cost


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("agent", choices=list(AGENTS))
    parser.add_argument("--estimators", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--runs", type=Path, default=Path("runs/sweep"), help="folder of the runs")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time, 1 thread each"
    )
    parser.add_argument("--report-only", action="store_true", help="no training, only the report")
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, extra = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    try:
        if not options.report_only:
            train_all(options, extra)
        report(options, extra)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def train_all(options: argparse.Namespace, extra: list[str]) -> None:
    """Run what is not finished; seeds outside, so that a stopped sweep is balanced."""
    jobs = [(e, s) for s in options.seeds for e in options.estimators]

    def run(job: tuple[str, int]) -> None:
        estimator, seed = job
        name = f"{estimator}_seed{seed}"
        if (options.runs / name / "summary.json").exists():
            return
        # Else the new run would get another name, which the report does not look for.
        shutil.rmtree(options.runs / name, ignore_errors=True)
        options.runs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "scripts.train", options.agent, "--estimator", estimator]
        command += ["--seed", str(seed), "--runs", str(options.runs), "--name", name]
        command += ["--threads", "1", "--no-progress", "--no-tensorboard", *extra]
        with open(options.runs / f"{name}.log", "w") as log:
            code = subprocess.run(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            ).returncode
        print(f"{name}: {'done' if code == 0 else f'FAILED, see {log.name}'}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, jobs))


def report(options: argparse.Namespace, extra: list[str]) -> None:
    """results.json (raw numbers per seed), table.md and learning_curves.png."""
    quantity, sign = ("cost", -1) if options.agent == "pipps" else ("return", 1)
    results: dict[str, dict[str, Any]] = {}
    for estimator in options.estimators:
        for seed in options.seeds:
            folder = RunFolder(options.runs / f"{estimator}_seed{seed}")
            if folder.summary.exists():
                summary, evaluations = read_json(folder.summary), read_json(folder.evaluations)
                means = sign * np.array(evaluations["returns"]).mean(1)
                curve = {
                    "timesteps": evaluations["timesteps"],
                    f"{quantity}s": means.round(3).tolist(),
                }
                entry = {**summary, **curve}
                results.setdefault(estimator, {})[str(seed)] = entry
    if not results:
        raise UserError(f"no finished run in {options.runs}; look at the .log files there")
    options.out.mkdir(parents=True, exist_ok=True)
    command = (
        f"python -m scripts.sweep {options.agent} --estimators {' '.join(options.estimators)} "
    )
    command += f"--seeds {' '.join(map(str, options.seeds))} --out {options.out}"
    command += f" -- {' '.join(extra)}" if extra else ""
    record = {"command": command, "commit": current_commit(), "results": results}
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    table = _table(results, quantity)
    (options.out / "table.md").write_text(table)
    _curves(results, quantity).savefig(options.out / "learning_curves.png", dpi=150)
    print(f"{table}\nwritten to {options.out}: results.json, table.md, learning_curves.png")


def _table(results: dict[str, dict[str, Any]], quantity: str) -> str:
    thresholds = THRESHOLDS if quantity == "cost" else ()
    limits = "".join(f" success < {t:g} |" for t in thresholds)
    lines = [f"| estimator | seeds | final {quantity}, mean ± SE | per seed |{limits}"]
    lines.append("|---" * (4 + len(thresholds)) + "|")
    for estimator, seeds in results.items():
        final = np.array([seed[f"final_{quantity}"] for seed in seeds.values()])
        error = final.std(ddof=1) / len(final) ** 0.5 if len(final) > 1 else np.nan
        success = "".join(f" {(final < t).sum()}/{len(final)} |" for t in thresholds)
        each = ", ".join(f"{c:.1f}" for c in final)
        mean = f"{final.mean():.2f} ± {error:.2f}"
        lines.append(f"| `{estimator}` | {len(final)} | {mean} | {each} |{success}")
    return "\n".join(lines) + "\n"


def _curves(results: dict[str, dict[str, Any]], quantity: str) -> Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, (estimator, seeds) in enumerate(results.items()):
        length = min(len(seed["timesteps"]) for seed in seeds.values())
        values = np.array([seed[f"{quantity}s"][:length] for seed in seeds.values()])
        x = np.arange(1, length + 1)
        if quantity == "return":
            x = np.array(next(iter(seeds.values()))["timesteps"][:length])
        axis.plot(x, values.T, color=f"C{i}", lw=0.6, alpha=0.4)
        axis.plot(x, values.mean(0), color=f"C{i}", lw=2, label=f"{estimator} ({len(values)})")
    if quantity == "cost":
        axis.axhline(THRESHOLDS[1], color="0.4", ls="--", lw=1)
    xlabel = "trial" if quantity == "cost" else "decisions (calls of env.step)"
    axis.set(
        xlabel=xlabel, ylabel=f"{quantity} of an episode", title="thin: seeds, thick: their mean"
    )
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, title="estimator (seeds)")
    return figure


if __name__ == "__main__":
    main()
