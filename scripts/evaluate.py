"""Evaluate a trained run: print the mean and spread of its returns, and record a GIF of its policy.

totalprop evaluate runs/pipps_CartPoleSwingUp-v0_tpx_seed0 --episodes 100
totalprop evaluate runs/dreamer_Pendulum-v1_tpx_seed0 --best   # of its best evaluation so far

The policy acts deterministically, in newly seeded episodes. Returns are raw (not normalised).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from totalprop.agents import AGENTS
from totalprop.agents.core.evaluation import evaluate as evaluate_agent
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.environments import EVALUATION_ENVS, make_env
from totalprop.scripts.run.errors import UserError, ending_with_a_sentence
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.hub import local
from totalprop.scripts.run.normalisation import normalise_like, statistics_of
from totalprop.scripts.run.video import record_gif


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of("evaluate")
    options = parser.parse_args(arguments)
    with ending_with_a_sentence():
        evaluate(options)


def check_picture(path: Path) -> None:
    """Raise a UserError now, before the rollouts, if the GIF cannot be written."""
    if path.suffix.lower() != ".gif":
        raise UserError(f"--gif must be a file name that ends in .gif, got '{path}'")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(
            f"cannot write {path}: {path.parent} is not a writable folder; create it, or choose "
            "another with --gif"
        )


def evaluate(options: argparse.Namespace) -> None:
    """Load the agent, roll it out, print the returns or costs and record the GIF."""
    folder = RunFolder.open(local(options.run), imports=options.imports)
    path = options.gif or folder.written("evaluation.gif", best=options.best)
    if options.gif is not None and not options.no_gif:
        check_picture(path)
    folder.check_model(best=options.best)
    config = folder.read_config()
    n_envs = min(EVALUATION_ENVS, options.episodes)
    env = make_env(
        config["env_id"], config["env_args"], seed=options.seed, n_envs=n_envs,
        rewindable=AGENTS[config["agent"]].rewinds(config["arguments"]),
    )  # fmt: skip
    statistics = statistics_of(folder, config, best=options.best)
    env = normalise_like(env, statistics)
    agent = folder.load_agent(env, best=options.best)
    env.seed(options.seed)
    found = evaluate_agent(agent, env, options.episodes, max_steps=options.max_steps)
    quantity = AGENTS[config["agent"]].quantity
    sign = -1 if quantity == "cost" else 1
    r = sign * np.array(found.returns)
    low, high = np.percentile(r, (5, 95))
    print(
        f"{folder.path}: {quantity} {r.mean():.2f} ± {r.std():.2f} over {len(r)} episodes "
        f"(percentiles: 5 % {low:.2f}, 95 % {high:.2f}; mean length "
        f"{np.mean(found.lengths):.0f} steps)"
    )
    if found.n_cut:
        print(found.describe_cut(options.max_steps, "--max-steps"))
    if options.no_gif:
        return
    shown = record_gif(
        config["env_id"], config["env_args"], agent, path, seed=options.seed,
        normalised=lambda env: normalise_like(env, statistics), max_steps=options.max_steps,
    )  # fmt: skip
    if shown is not None:
        print(f"GIF of {shown[0]} ({quantity} {sign * shown[1]:.2f}): {path}")


if __name__ == "__main__":
    main()
