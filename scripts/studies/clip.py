"""Measure what clipping k to [0, 1] does to the gradient variance of `tpx`, in PIPPS.

    python -m totalprop.scripts.studies.clip                # writes results/clip/pipps_trained.json
    python -m totalprop.scripts.studies.clip --model untrained --repeats 100
    totalprop chaos --estimators tpx tpx-unclipped          # the same question on chaotic RNNs
    totalprop diagnose RUN --estimators tpx tpx-unclipped   # and in Dreamer

Eq. 8 of Parmas et al. 2023 has no clip. PIPPS learns the cart-pole swing-up for a few trials, or
("untrained") its model is fitted to random actions and its policy is random. There the gradient is
computed R times by each estimator from the same noise, with each number of particles. Prints and
records, for each, the trace of the gradient's variance with its standard error, the ratio unclipped
/ clipped with a 95 % interval (bootstrap over the repeats, paired), and the share of k outside
[0, 1].
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from totalprop import PIPPS
from totalprop.agents.persistence.safe_file import write_text
from totalprop.agents.pipps.particles import Noise, ParticleModel, policy_gradient
from totalprop.agents.trials.controllers import ControllerPolicy
from totalprop.estimators import make
from totalprop.scripts.bench.pipps import random_problem
from totalprop.scripts.flag_types import Parser
from totalprop.scripts.run.program import current_commit

ESTIMATORS = ("tpx", "tpx-unclipped")
STEPS = 30  # of a trial on the cart-pole


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=("trained", "untrained"), default="trained", help="(default: trained)")
    add("--points", type=int, nargs="+", default=[30, 90], help="untrained: data (default: 30 90)")
    add("--trials", type=int, nargs="+", default=[3], help="trials learned (default: 3)")
    add("--particles", type=int, nargs="+", default=[100, 300], help="P (default: 100 300)")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="seeds of PIPPS (default: 0 1)")
    add("--repeats", type=int, default=50, help="gradients R of each estimator (default: 50)")
    add("--gradient-steps", type=int, default=60, help="of each search (default: 60)")
    add("--out", type=Path, default=Path("results/clip"), help="(default: results/clip)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given = sys.argv[1:] if arguments is None else arguments
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "totalprop.scripts.studies.clip", *given]),
        "commit": current_commit(),
        "torch": torch.__version__,
        "rows": [],
    }
    path = options.out / f"pipps_{options.model}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    for what, model, policy in problems(options):
        for particles in options.particles:
            row = {**what, "particles": particles}
            row |= compare(model, policy, particles, options.repeats)
            record["rows"].append(row)
            print(json.dumps(row), flush=True)
            write_text(path, json.dumps(record, indent=1) + "\n")


def problems(
    options: argparse.Namespace,
) -> Iterator[tuple[dict[str, int], ParticleModel, ControllerPolicy]]:
    """Yield what is measured: its settings, the model, and the policy."""
    if options.model == "untrained":
        for points in options.points:
            yield {"points": points}, *random_problem(points)
        return
    for seed in options.seeds:
        for trials in options.trials:
            agent = PIPPS(
                "RBFPolicy",
                "totalprop/CartPoleSwingUp-v0",
                seed=seed,
                gradient_steps=options.gradient_steps,
            ).learn(trials * STEPS)
            yield {"seed": seed, "trials": trials}, agent._particle_model(), agent.policy


def compare(
    model: ParticleModel, policy: ControllerPolicy, particles: int, repeats: int
) -> dict[str, Any]:
    """Variances of both estimators at one policy, and their ratio."""
    found = {name: gradients(name, model, policy, particles, repeats) for name in ESTIMATORS}
    squares = {name: (g - g.mean(0)).square().sum(1) for name, (g, _) in found.items()}  # [R]
    row: dict[str, Any] = {}
    for name, square in squares.items():
        row[name] = float(square.sum() / (repeats - 1))
        row[f"{name} se"] = float(square.std() * repeats**0.5 / (repeats - 1))
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(repeats, (2000, repeats), generator=generator)
    ratios = squares["tpx-unclipped"][chosen].sum(1) / squares["tpx"][chosen].sum(1)
    row["ratio"] = row["tpx-unclipped"] / row["tpx"]
    row["ratio 95 %"] = [float(q) for q in ratios.quantile(torch.tensor([0.025, 0.975]).to(ratios))]
    k = found["tpx-unclipped"][1]
    row["k outside"] = float(((k < 0) | (k > 1)).to(k).mean())
    return row


def gradients(
    name: str, model: ParticleModel, policy: ControllerPolicy, particles: int, repeats: int
) -> tuple[Tensor, Tensor]:
    """[R, P] gradients and [R, H, S] weights k; the noise is the same for all estimators."""
    rows, weights = [], []
    generator, states = torch.Generator().manual_seed(0), model.n_states
    for _ in range(repeats):
        noise = Noise.draw(STEPS, particles, states, generator, resample=False)
        meter = torch.zeros(STEPS, states, dtype=torch.float64, requires_grad=True)
        found = policy_gradient(model, policy, noise, make(name), meter=meter)
        assert found.k is not None
        rows.append(torch.cat([g.flatten() for g in found.gradients]))
        weights.append(found.k)
    return torch.stack(rows), torch.stack(weights)


if __name__ == "__main__":
    main()
