"""CartPole-v1, whose actions are choices: does DreamerTPX learn it?

    python -m tests.agents.dreamer.cartpole --seed 100 --estimator lr

It prints the mean return of 5 deterministic evaluation episodes (at most 500) and an exploring
agent's return so far, every 500 steps.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import safe_mean

from totalprop.agents.dreamer import DreamerTPX
from totalprop.agents.dreamer.presets import PRESETS

EVALUATED = 5  # episodes


def settings(**changes: Any) -> dict[str, Any]:
    """The preset `laptop` with the remedies of DreamerV2 and V3, and half of its batch."""
    heads = {"layer_norm": True, "reward_head": "two-hot", "critic_head": "two-hot"}
    preset = PRESETS["laptop"]
    return {
        **preset,
        "policy_kwargs": {**preset["policy_kwargs"], **heads},
        "slow_critic_rate": 0.02,
        "scale_returns": True,
        "entropy_scale": 3e-3,
        "exploration_noise": 0.05,
        "batch_size": 8,
        "imagination_starts": 128,
        "learning_starts": 500,
        "gradient_steps": 4,
        **changes,
    }


def main() -> None:
    """Train, and print one line for each evaluation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--estimator", default="lr")
    parser.add_argument("--node", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    agent = DreamerTPX(
        "DreamerPolicy", "CartPole-v1", seed=options.seed, device="cpu",
        **settings(estimator=options.estimator, node=options.node),
    )  # fmt: skip
    env, started = gym.make("CartPole-v1"), time.perf_counter()
    for _ in range(options.steps // 500):
        agent.learn(500, reset_num_timesteps=False)
        env.reset(seed=options.seed)
        returns, _ = evaluate_policy(agent, env, EVALUATED, return_episode_rewards=True, warn=False)
        seen = safe_mean([info["r"] for info in agent.ep_info_buffer or []])
        print(
            f"step {agent.num_timesteps:6d}  evaluated {sum(returns) / EVALUATED:6.1f}  "
            f"collected {seen:6.1f}  {time.perf_counter() - started:5.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
