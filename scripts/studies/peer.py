r"""Train a peer, stable-baselines3's SAC, TD3 or DDPG, where our agents learn; write its returns.

    totalprop peer sac --env-id dmc/walker-walk-v0 --total-timesteps 50000 --seeds 0 1 2 3 \
        --out results/dreamer/recommended/walker/sac.json
    totalprop sweep dreamer ... --beside results/dreamer/recommended/walker/sac.json

The environments, their seeds and the evaluations are those of `totalprop train`; the peer's
settings are stable-baselines3's defaults. TD3 and DDPG, which do not explore with these, add normal
noise of 0.1 of half the actions' range (Fujimoto et al. 2018, and RL-Zoo). Seeds that the file has
are not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import stable_baselines3
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from totalprop.agents.core.evaluation import Evaluation
from totalprop.agents.persistence.safe_file import write_text
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.environments import make_env, make_evaluation_env, parse_env_args
from totalprop.scripts.run.errors import UserError, continuing_later
from totalprop.scripts.run.folder import read_json
from totalprop.scripts.run.program import current_commit
from totalprop.scripts.run.progress import said

ALGORITHMS: dict[str, type[OffPolicyAlgorithm]] = {
    "sac": stable_baselines3.SAC,
    "td3": stable_baselines3.TD3,
    "ddpg": stable_baselines3.DDPG,
}
NOISE = 0.1  # of actions scaled to [-1, 1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    with continuing_later():
        record = read_record(options)
        torch.set_num_threads(1)
        own = record["results"][options.algorithm]
        for seed in options.seeds:
            if str(seed) in own:
                print(f"seed {seed} is in {options.out}")
                continue
            entry = train(options, seed)
            record = read_record(options)  # another call may have added seeds meanwhile
            own = record["results"][options.algorithm]
            own[str(seed)] = entry
            options.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(options.out, json.dumps(record, indent=1) + "\n")
            print(f"seed {seed}: return {own[str(seed)]['final_return']:.1f}, in {options.out}")
    print(f"Next: totalprop sweep dreamer ... --beside {options.out}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; on wrong usage, exit with code 2."""
    return parser_of("peer").parse_args(arguments)


def read_record(options: argparse.Namespace) -> dict[str, Any]:
    """Read the file of an earlier call with the same settings, or begin a new one.

    Raises:
        UserError: the file holds runs with other settings.
    """
    settings = {
        "env_id": options.env_id, "env_args": parse_env_args(tuple(options.env_arg)),
        "total_timesteps": options.total_timesteps, "eval_every": options.eval_every,
        "eval_episodes": options.eval_episodes,
    }  # fmt: skip
    record: dict[str, Any] = {
        "library": f"stable-baselines3 {stable_baselines3.__version__}",
        "commit": current_commit(),
        "settings": settings,
        "results": {options.algorithm: {}},
    }
    if not options.out.exists():
        return record
    found = read_json(options.out)
    if found.get("settings") != settings or list(found.get("results", ())) != [options.algorithm]:
        raise UserError(
            f"{options.out} holds other runs than these ({found.get('settings')}); choose another "
            "file with --out"
        )
    for name in ("library", "commit"):  # of all seeds
        found[name] = ", ".join(dict.fromkeys((*str(found[name]).split(", "), record[name])))
    return found


def train(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one seed; return its evaluations as a sweep's results.json holds them."""
    env_args = parse_env_args(tuple(options.env_arg))
    env = make_env(options.env_id, env_args, seed=None)
    if not isinstance(env.action_space, spaces.Box):
        raise UserError(
            f"{options.algorithm} needs actions in a Box; those of {options.env_id} are "
            f"{env.action_space}"
        )
    eval_env = make_evaluation_env(options.env_id, env_args, seed=seed)
    noise = None
    if options.algorithm != "sac":  # whose policy is random
        zeros = np.zeros_like(env.action_space.sample())
        noise = NormalActionNoise(zeros, zeros + NOISE)
    make: Callable[..., OffPolicyAlgorithm] = ALGORITHMS[options.algorithm]
    agent = make("MlpPolicy", env, action_noise=noise, seed=seed, device="cpu")
    evaluation = Evaluation(eval_env, n_episodes=options.eval_episodes, every=options.eval_every)
    callbacks: list[BaseCallback] = [evaluation]
    started, total = time.perf_counter(), options.total_timesteps
    with said(lambda: f"seed {seed}: {agent.num_timesteps} of {total} steps"):
        agent.learn(total, callback=callbacks)
    means = np.array(evaluation.returns).mean(1).round(3).tolist()
    return {
        "final_return": means[-1],
        "seconds": round(time.perf_counter() - started, 1),
        "timesteps": evaluation.timesteps,
        "returns": means,
    }


if __name__ == "__main__":
    main()
