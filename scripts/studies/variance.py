"""Decompose the variance of a policy gradient: would more actions or more states reduce it more?

    totalprop variance --env-id dm_control/cartpole-swingup-v0
    totalprop variance runs/daappo_cartpole-swingup-v0_dynamics_lr_seed0 --trajectories 200

At every state of real trajectories two actions are drawn. The environment is rewound to try the
second one. The value of each action is the mean return of several rollouts with independent noise,
so that the noise in the returns is not mistaken for variance due to the action. Prints the variance
components, the share that more actions can reduce, and the better way to spend a fixed budget.

Without a run folder, a new policy is used, after --updates steps of plain policy gradient.
Nauman & Cygan 2022, "On All-Action Policy Gradients", Lemma 1 and Table 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from totalprop.agents.persistence.safe_file import write_text
from totalprop.envs.rewind import Snapshot
from totalprop.estimators.analysis.many_actions import (
    Advice,
    VarianceComponents,
    advise,
    optimal_actions,
    table,
)
from totalprop.estimators.analysis.many_actions_data import ComponentEstimate, estimate_components
from totalprop.scripts.commands import parser_of
from totalprop.scripts.run.environments import make_env, our_id, parse_env_args
from totalprop.scripts.run.errors import UserError, ending_with_a_sentence
from totalprop.scripts.run.folder import RunFolder
from totalprop.scripts.run.normalisation import normalise_like, statistics_of
from totalprop.scripts.run.progress import counted

PAPER_SHARE = "96.9 to 99.9 % on four of its six tasks, 61 and 82 % on two; about 90 % on average"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = parser_of("variance")
    options = parser.parse_args(arguments)
    if options.run is not None:
        for name in ("env_id", "env_arg", "updates", "learning_rate"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(
                    f"--{name.replace('_', '-')} is for a new policy: leave it out with a run"
                )
    with ending_with_a_sentence(ValueError):
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Sample trajectories, estimate the components and print the report."""
    torch.set_num_threads(1)  # batches of one state do not benefit from threads
    env_id, env_arg = options.env_id, options.env_arg
    if env_arg is None:
        env_arg = ["action_repeat=4"] if our_id(env_id).startswith("dmc/") else []
    env_args = parse_env_args(tuple(env_arg))
    statistics = None
    if options.run is not None:
        folder = RunFolder.open(options.run, imports=options.imports)
        config = folder.read_config()
        if config["agent"] != "daappo":
            tool = "totalprop diagnose" if config["agent"] == "dreamer" else "totalprop evaluate"
            raise UserError(
                f"{folder.path} is a run of {config['agent']}, and variance decomposes DAAPPO's "
                f"gradient; use {tool} {folder.quoted}"
            )
        env_id, env_args = config["env_id"], config["env_args"]
        statistics = statistics_of(folder, config)
    env = make_env(env_id, env_args, seed=options.seed, rewindable=True)
    env = normalise_like(env, statistics)
    if not isinstance(env.action_space, spaces.Box):
        raise UserError(
            f"variance draws actions of a Gaussian, and {env_id} has choices as actions "
            f"({env.action_space}): take an environment whose actions are a Box"
        )
    policy = _policy(options, env)
    sampler = Sampler(env, policy, options)
    for _ in range(options.updates if options.run is None else 0):
        sampler.update(options.learning_rate)
    sampled = []
    with counted(options.trajectories, "trajectories") as advance:
        for _ in range(options.trajectories):
            sampled.append(sampler.trajectory())
            advance()
    gradients = torch.stack(sampled)
    if not torch.isfinite(gradients).all():
        raise UserError("a gradient is not finite: the policy, or a return, has exploded")
    generator = torch.Generator().manual_seed(options.seed)
    # Trajectories begin with a reset, whose distribution is not the stationary one.
    found = estimate_components(gradients, stationary=False, generator=generator)
    print(report(found, options, env_id, sampler.interactions))
    if options.json is not None:
        rows = rows_of(found)
        record = {
            **{name: row(found.components) for name, row in rows.items()},
            "intervals": {name: found.interval(row) for name, row in rows.items()},
            "options": vars(options),
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.json, json.dumps(record, indent=1, default=str) + "\n")
        print(f"written to {options.json}")


class Sampler:
    """Samples trajectories with two actions per state, and Q-values of both.

    Υ = Q ∇ log π of the Gaussian policy, w.r.t. all parameters of its mean and standard deviation.
    """

    def __init__(self, env: VecEnv, policy: ActorCriticPolicy, options: argparse.Namespace) -> None:
        self.env, self.options = env, options
        self.normalised = unwrap_vec_normalize(env)
        space: Any = env.action_space
        self.low, self.high = space.low, space.high
        self.actor = _Actor(policy)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.noise = np.random.default_rng(options.seed)  # seeds of the environment's generator
        self.interactions = 0

        def score(parameters: dict[str, Tensor], state: Tensor, action: Tensor) -> Tensor:
            mean, log_std = functional_call(self.actor, parameters, (state.unsqueeze(0),))
            z = (action - mean[0]) * (-log_std).exp()
            return (-0.5 * z.square() - log_std).sum()

        self.score = vmap(grad(score), in_dims=(None, 0, 0))

    def trajectory(self) -> Tensor:
        """Sample one trajectory: [T, 2, K, P] of Υ, where action 0 drives the transition."""
        o = self.options
        observation = self._method("reset", seed=int(self._integer()))[0]
        states, actions, values = [], [], []
        for _ in range(o.steps):
            snapshot = self._method("snapshot")
            state = self._state(observation)
            pair = [self._draw(state) for _ in range(2)]
            q = [[self._value(snapshot, action) for _ in range(o.rollouts)] for action in pair]
            self._method("restore", snapshot)
            observation, _, terminated, truncated, _ = self._step(pair[0])
            states.append(state)
            actions.append(torch.stack(pair))
            values.append(q)
            if (terminated or truncated) and len(states) < o.steps:
                raise UserError(
                    f"an episode ended after {len(states)} steps, before --steps {o.steps}; choose "
                    "fewer steps"
                )
        parameters = {name: p.detach() for name, p in self.actor.named_parameters()}
        x = torch.stack(states).repeat_interleave(2, 0)
        scores = self.score(parameters, x, torch.stack(actions).flatten(0, 1))
        flat = torch.cat([g.flatten(1) for g in scores.values()], 1).unflatten(0, (-1, 2))
        return torch.tensor(values).unsqueeze(-1) * flat.unsqueeze(2)

    def update(self, rate: float) -> None:
        """Take one policy-gradient step, from a tenth of --trajectories."""
        n = max(self.options.trajectories // 10, 1)
        mean = torch.stack([self.trajectory().mean((0, 1, 2)) for _ in range(n)]).mean(0)
        with torch.no_grad():
            flat = nn.utils.parameters_to_vector(self.actor.parameters())
            nn.utils.vector_to_parameters(flat + rate * mean, self.actor.parameters())

    def _value(self, snapshot: Snapshot, action: Tensor) -> float:
        self._method("restore", self._with_new_noise(snapshot))
        total, weight = 0.0, 1.0
        for _ in range(self.options.horizon):
            observation, reward, terminated, truncated, _ = self._step(action)
            total += weight * float(reward)
            weight *= self.options.gamma
            if terminated or truncated:
                break
            action = self._draw(self._state(observation))
        return total

    def _with_new_noise(self, snapshot: Snapshot) -> Snapshot:
        """The same state with a fresh generator; a snapshot restores its own random numbers."""
        kind = getattr(np.random, snapshot.np_random["bit_generator"])
        return dataclasses.replace(snapshot, np_random=kind(self.noise.integers(2**63)).state)

    def _state(self, observation: np.ndarray) -> Tensor:
        """The policy's input; steps bypass VecNormalize, so observations are normalised here."""
        if self.normalised is not None:
            normalised: Any = self.normalised.normalize_obs(observation)
            observation = normalised
        return torch.as_tensor(np.asarray(observation, np.float32).ravel())

    @torch.no_grad()
    def _draw(self, state: Tensor) -> Tensor:
        mean, log_std = self.actor(state.unsqueeze(0))
        return mean[0] + log_std.exp() * torch.randn(mean[0].shape, generator=self.generator)

    def _step(self, action: Tensor) -> Any:
        self.interactions += 1
        return self._method("extra_step", np.clip(action.numpy(), self.low, self.high))

    def _method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.env.env_method(name, *args, **kwargs)[0]

    def _integer(self) -> Tensor:
        return torch.randint(2**31, (), generator=self.generator)


class _Actor(nn.Module):
    """Mean and log-std of an SB3 policy, without its critic."""

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.body, self.head = policy.mlp_extractor.policy_net, policy.action_net
        self.log_std = policy.log_std

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.body(states)), self.log_std


def _policy(options: argparse.Namespace, env: VecEnv) -> ActorCriticPolicy:
    if options.run is not None:
        policy = RunFolder(options.run).load_agent(env).policy
        if not isinstance(policy, ActorCriticPolicy):
            raise UserError(f"{options.run} has no actor-critic policy; pass a run of daappo")
        return policy
    torch.manual_seed(options.seed)
    kwargs = {"net_arch": {"pi": [128], "vf": []}}  # Table 1: one hidden layer of 128
    return ActorCriticPolicy(env.observation_space, env.action_space, lambda _: 0.0, **kwargs)  # type: ignore[arg-type]


def rows_of(found: ComponentEstimate) -> dict[str, Callable[[VarianceComponents], float]]:
    """The rows of Table 1 and the policy's share, each as a function of the components."""
    rows: dict[str, Callable[[VarianceComponents], float]] = {
        name: lambda c, name=name: table(c)[name]  # type: ignore[misc]
        for name in table(found.components)
    }
    return {**rows, "policy_share": lambda c: c.policy_share}


def report(
    found: ComponentEstimate, options: argparse.Namespace, env_id: str, interactions: int
) -> str:
    """Text of the report: Table 1 with 95 % intervals, the policy's share, and the advice."""
    lines = [
        f"{env_id}: {options.trajectories} trajectories of {options.steps} steps, 2 actions x "
        f"{options.rollouts} rollouts of {options.horizon} steps each; {interactions} steps in all",
        "",
        f"{'component (mean over the parameters)':<40} {'estimate':>11}   95 % interval",
    ]
    c, rows = found.components, rows_of(found)
    share = rows.pop("policy_share")
    for name, row in rows.items():
        low, high = found.interval(row)
        lines.append(f"{name:<40} {row(c):11.4g}   [{low:.4g}, {high:.4g}]")
    low, high = found.interval(share)
    lines.append("")
    lines.append(
        f"policy-dependent share: {c.policy_share:.1%} [{low:.1%}, {high:.1%}]; in the paper: "
        f"{PAPER_SHARE}"
    )
    advice = advise(c, options.delta, states="trajectories")
    best = optimal_actions(c, options.delta, states="trajectories")
    mean = 1 / c.n_parameters  # traces to means over the parameters, as in the table
    lines.append(
        f"one more action per state changes the variance by {advice.delta_actions * mean:.3g}; "
        f"more trajectories at the same cost change it by {advice.delta_states * mean:.3g}:"
    )
    low, high = found.interval(
        lambda c: mean * _preference(advise(c, options.delta, states="trajectories"))
    )
    if low < 0 < high:
        lines.append(
            f"the difference is within its noise, [{low:.3g}, {high:.3g}]; increase "
            "--trajectories to decide."
        )
    else:
        lines.append(
            f"{advice.choice}. Best at the cost of {options.steps} single-action states and delta "
            f"= {options.delta:g}: {best.n_actions} actions in each of {best.n_steps:.0f} states."
        )
    return "\n".join(lines)


def _preference(advice: Advice) -> float:
    """Negative if more actions reduce the variance more than more states."""
    return advice.delta_actions - advice.delta_states


if __name__ == "__main__":
    gym.logger.min_level = gym.logger.ERROR
    main()
