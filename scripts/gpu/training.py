"""What a run of `totalprop gpu` shows for its time: an evaluation, a curve and an open-loop film.

Works from the run's newest checkpoint, since the run was stopped. Started as
`python -m totalprop.scripts.gpu.training RUN PICTURES JSON`.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

from totalprop.agents import AGENTS
from totalprop.agents.core import figures
from totalprop.agents.core.evaluation import evaluate
from totalprop.agents.persistence.checkpoint import Checkpoints
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.run.errors import UserError, ending_with_a_sentence
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.job import Job
from totalprop.scripts.train import set_up_torch

EPISODES = 10
SPEEDS = ("time/updates_per_second", "time/fps")  # columns of progress.csv


def main() -> None:
    """Entry point."""
    run, pictures, record = map(Path, sys.argv[1:])
    with ending_with_a_sentence(ValueError):
        report(run, pictures, record)


def report(run: Path, pictures: Path, record: Path) -> None:
    """Write the record after each figure, the cheapest first: the time may be up at any moment.

    Args:
        run: folder of a run of the Dreamer.
        pictures: folder for learning_curve.png and the film (open_loop.gif, of vectors a .png).
        record: JSON file for the numbers.
    """
    folder = RunFolder.open(run)
    job = Job.read(folder)
    set_up_torch(job.options)
    found: dict[str, Any] = {
        "env_id": job.options.env_id, "env_args": job.env_args, "preset": job.preset,
        "arguments": job.arguments, "policy_kwargs": job.policy_kwargs,
    }  # fmt: skip

    def write() -> None:
        write_text(record, json.dumps(found, indent=1) + "\n")

    checkpoints = Checkpoints(folder.checkpoints)
    found |= {"decisions": max(checkpoints.newest_step(), 0), **speeds(folder.path)}
    if folder.evaluations.exists():
        steps, returns = folder.read_evaluations()
        found["evaluations"] = {"decisions": steps, "returns": returns.tolist()}
        curve = figures.learning_curve(
            np.array(steps),
            returns,
            xlabel="decisions (calls of env.step)",
            ylabel="return of an episode",
            title=f"{job.preset}, {job.options.env_id}",
        )
        figures.save(curve, pictures / "learning_curve.png", dpi=150)
    write()
    env, eval_env = job.environments()
    agent = checkpoints.load(AGENTS[job.agent].cls, env, job.arguments["device"])
    if agent is None:
        raise UserError(f"{run} was stopped before its first checkpoint; give it more --minutes")
    found["updates"] = agent._n_updates
    write()
    drawn = AGENTS[job.agent].pictures(agent, pictures)
    print(f"drawn: {', '.join(path.name for path in drawn)}", flush=True)
    episodes = evaluate(agent, eval_env, EPISODES, max_steps=job.options.eval_max_steps)
    found["final_returns"] = episodes.returns
    write()
    mean, std = np.mean(episodes.returns), np.std(episodes.returns)
    print(
        f"return {mean:.1f} ± {std:.1f} over {EPISODES} episodes after {agent.num_timesteps} steps"
    )


def speeds(run: Path) -> dict[str, float]:
    """Medians of the columns in `SPEEDS` of progress.csv, those that it has."""
    path, found = run / "progress.csv", {}
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for name in SPEEDS:
            if values := [float(row[name]) for row in rows if row.get(name)]:
                found[name.split("/")[1]] = statistics.median(values)
    return found


if __name__ == "__main__":
    main()
