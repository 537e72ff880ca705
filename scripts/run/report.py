"""The report of a finished run: learning curve, videos, summary.json and the printed summary."""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv

from totalprop.agents import AGENTS
from totalprop.agents.core import figures
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.evaluation import Evaluation
from totalprop.agents.persistence import safe_file
from totalprop.agents.persistence.safe_file import in_one_line
from totalprop.scripts.run.environments import import_flag
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.job import RunOptions
from totalprop.scripts.run.normalisation import normalise_like
from totalprop.scripts.run.program import program
from totalprop.scripts.run.video import WHOLE, record_gif


def report(
    algorithm: Algorithm,
    folder: RunFolder,
    evaluation: Evaluation | None,
    options: RunOptions,
    env_args: dict[str, Any],
    seconds: float,
) -> None:
    """Write the learning curve, the videos and summary.json, and print the summary.

    Args:
        algorithm: the trained agent.
        folder: the run's folder.
        evaluation: the evaluations made during training; None for a run without an environment.
        options: the run's options.
        env_args: keyword arguments of the environment.
        seconds: time spent on training.
    """
    summary: dict[str, Any] = {}
    outcome, pictures = "DONE: not evaluated, for want of an environment,", list[str]()
    if evaluation is not None:
        summary, outcome, pictures = _evaluated(algorithm, folder, evaluation, options)
    summary |= {
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    pictures += _replay_and_pictures(algorithm, folder, options, env_args)
    # The presence of summary.json marks a run as finished, so it is written last.
    safe_file.write_text(folder.summary, json.dumps(summary, indent=2) + "\n")
    files, python = [*pictures, "progress.csv"], f"{program('python')} -m totalprop"
    next_steps = [f"{python} plot {folder.quoted}"]
    if options.tensorboard:
        files.append("TensorBoard")
        next_steps = [f"{program('tensorboard')} --logdir {quote(str(folder.path.parent))}"]
    if options.env_id:
        evaluate = f"{python} evaluate {folder.quoted}{import_flag(options.env_id)}"
        next_steps.insert(0, evaluate)
    print(
        f"{outcome} after {algorithm.num_timesteps} {options.unit}, {seconds / 60:.1f} min, "
        f"{summary['peak_memory_gb']} GB of memory at peak.\n"
        f"Results in {folder.path}/: {', '.join(files)}.\n"
        f"Next: {'   |   '.join(next_steps)}"
    )


def _evaluated(
    algorithm: Algorithm, folder: RunFolder, evaluation: Evaluation, options: RunOptions
) -> tuple[dict[str, Any], str, list[str]]:
    """Draw the learning curve.

    Returns:
        Entries of summary.json, the outcome in words, and the names of the files written.
    """
    is_cost = AGENTS[folder.read_config()["agent"]].quantity == "cost"
    sign, quantity = (-1, "cost") if is_cost else (1, "return")
    values = sign * np.array(evaluation.returns)
    threshold = reward_threshold(evaluation.eval_env)
    limit = None if threshold is None else sign * threshold
    xs, xlabel = np.array(evaluation.timesteps), "decisions (calls of env.step)"
    if options.offline:
        xlabel = "gradient updates"
    if is_cost:  # as in its papers, whose trials have one search each
        xs = np.arange(1, len(values) + 1)
        xlabel = "evaluation" if options.eval_every else "policy search"

    def draw_curve() -> list[Path]:
        curve = figures.learning_curve(
            xs,
            values,
            xlabel=xlabel,
            ylabel=f"{quantity} of an episode",
            threshold=limit,
            title=f"{type(algorithm).__name__}, {options.env_id}",
        )
        figures.save(curve, folder.learning_curve, dpi=150)
        return [folder.learning_curve]

    mean, std = float(values[-1].mean()), float(values[-1].std())
    success = None if limit is None else bool(sign * mean > sign * limit)
    summary = {
        f"final_{quantity}": mean,
        f"final_{quantity}_std": std,
        "success": success,
        "success_threshold": limit,
    }
    verdict = {True: "SUCCESS", False: "NO SUCCESS", None: "DONE"}[success]
    side = "below" if is_cost else "above"
    bound = "" if limit is None else f" (success {side} {limit:g})"
    outcome = f"{verdict}: {quantity} {mean:.2f} ± {std:.2f} over {values.shape[1]} rollouts{bound}"
    return summary, outcome, _drawn("learning curve", draw_curve)


def _replay_and_pictures(
    algorithm: Algorithm, folder: RunFolder, options: RunOptions, env_args: dict[str, Any]
) -> list[str]:
    """Write the replay if asked for, a GIF of the policy, and a world model's open-loop prediction.

    Returns:
        The names of the files written.
    """
    written = []
    has_replay = getattr(algorithm, "replay_buffer", None) is not None
    if options.save_replay and has_replay and isinstance(algorithm, AGENTS["dreamer"].cls):
        algorithm.save_replay_buffer(folder.replay)  # type: ignore[attr-defined]
        written.append(folder.replay.name)
    statistics = algorithm.get_vec_normalize_env()
    shown = None
    if options.env_id:
        shown = record_gif(
            options.env_id, env_args, algorithm, folder.video, seed=0,
            normalised=lambda env: normalise_like(env, statistics),
            max_steps=options.eval_max_steps,
        )  # fmt: skip
    if shown is not None:
        written.append(folder.video.name)
        if shown[0] != WHOLE:
            print(f"{folder.video.name} shows {shown[0]}")
    entry = AGENTS[folder.read_config()["agent"]]
    written += _drawn("picture of the agent", lambda: entry.pictures(algorithm, folder.path))
    return written


def _drawn(what: str, draw: Callable[[], Sequence[Path]]) -> list[str]:
    """Names of the pictures drawn; none, with a sentence, on an error: training has succeeded."""
    try:
        return [path.name for path in draw()]
    except Exception as error:
        print(f"no {what}: {in_one_line(error)}", file=sys.stderr)
        return []


def reward_threshold(env: VecEnv) -> float | None:
    """Return at which the environment counts as solved, from its registration; None if unknown."""
    spec = env.get_attr("spec")[0]
    threshold = None if spec is None else spec.reward_threshold
    return None if threshold is None or not math.isfinite(threshold) else float(threshold)
