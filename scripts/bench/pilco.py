"""Seconds per policy gradient of PILCO, as ratios to a peer and to the bare matrix work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

import totalprop.envs  # noqa: F401  (registers our environments)
from totalprop.agents.core.memory import keep_freed_memory
from totalprop.agents.pilco.presets import PRESETS
from totalprop.agents.pilco.propagation import MomentModel, predict, saturating
from totalprop.agents.trials.controllers import RBFPolicy
from totalprop.agents.trials.saturating_cost import SaturatingCost
from totalprop.scripts.bench.pilco_peer import make_gradient
from totalprop.scripts.bench.timing import interleaved_medians
from totalprop.world_models.gp_dynamics import GPDynamics, trig_features
from totalprop.world_models.moment_matching import Gaussian

PRESET = PRESETS["pipps2018"]
HORIZON: int = PRESET["horizon"]


class Problem(NamedTuple):
    """A policy gradient of the cart-pole to time."""

    dynamics: GPDynamics
    policy: RBFPolicy
    start: Gaussian  # [S]
    cost: SaturatingCost

    def gradient(self, horizon: int = HORIZON) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Predicted cost [] and the gradient of every parameter, as PILCO computes them."""
        model = MomentModel(self.dynamics, self.start, saturating(self.cost))
        loss = predict(model, self.policy, horizon).loss
        return loss.detach(), torch.autograd.grad(loss, list(self.policy.parameters()))


def bench_pilco(points: int, repeats: int, *, horizon: int = HORIZON) -> dict[str, float]:
    """Time one policy gradient.

    Args:
        points: data points n of the Gaussian processes.
        repeats: rounds, of which the median is taken.
        horizon: predicted steps H.

    Returns:
        One column of the table.
    """
    keep_freed_memory()  # as PILCO does
    problem = random_problem(points)
    peer = make_gradient(
        problem.dynamics, problem.policy, problem.start, problem.cost, horizon=horizon
    )
    tasks: dict[str, Callable[[], object]] = {
        "own": lambda: problem.gradient(horizon),
        "floor": lambda: matrix_work(problem, horizon),
    }
    if peer is None:
        print("GPyTorch is not installed and therefore skipped; pip install gpytorch to compare")
    else:
        tasks["peer"] = peer
    seconds = interleaved_medians(tasks, repeats)
    row = {
        "GP data points": points,
        "of them used": problem.dynamics.gp.kernel_sum().beta.shape[-1],
        "seconds": seconds["own"],
        "matrix work alone / ours": seconds["floor"] / seconds["own"],
    }
    if peer is not None:
        row["peer / ours (speed-up)"] = seconds["peer"] / seconds["own"]
        row["gradient, relative difference"] = relative_difference(
            problem.gradient(horizon), peer()
        )
    return row


def matrix_work(problem: Problem, horizon: int) -> None:
    """The work on arrays of n x n numbers that no gradient does without.

    Per step and pair of outputs (a, b), a <= b: the exponents (a product [n, D] x [D, n]), their
    exponentials and the sum over both points; backwards, one product of n x n numbers each for the
    derivative by the exponents and two products [n, n] x [n, D]. The same of the controller.
    """
    d, e = problem.dynamics.gp.inputs.shape[1], problem.dynamics.gp.targets.shape[1]
    _, a = problem.policy.weights.shape[::-1]
    for _ in range(horizon):
        for pairs, n, size in (
            (e * (e + 1) // 2, len(problem.dynamics.gp.inputs), d),
            (a * (a + 1) // 2, problem.policy.n_centres, problem.policy.n_features),
        ):
            left, right = torch.ones(2, pairs, n, size, dtype=torch.float64)
            weights = torch.ones(pairs, n, 1, dtype=torch.float64)
            pair = torch.bmm(left, right.mT).exp_()
            torch.bmm(pair, weights)
            pair.mul_(weights)
            torch.bmm(pair, right)
            torch.bmm(pair.mT, left)


def relative_difference(
    one: tuple[Tensor, tuple[Tensor, ...]], other: tuple[Tensor, tuple[Tensor, ...]]
) -> float:
    """Norm of the difference of two gradients over the norm of the first."""
    a, b = (torch.cat([g.flatten() for g in gradients]) for _, gradients in (one, other))
    return float((a - b).norm() / a.norm())


def random_problem(points: int, *, n_centres: int = 50) -> Problem:
    """Make a random policy, and a model fitted to cart-pole data from random actions."""
    env = gym.make("totalprop/CartPoleSwingUp-v0", cost="tip")
    env.action_space.seed(0)
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray, float]] = []
    observation, _ = env.reset(seed=0)
    while len(rows) < points:
        action = env.action_space.sample()
        new, reward, _, truncated, _ = env.step(action)
        rows.append((observation, action, new, float(reward)))
        observation = env.reset()[0] if truncated else new
    angles = PRESET["angle_dims"]
    dynamics = GPDynamics(4, 1, angle_dims=angles)
    dynamics.add(*(torch.as_tensor(np.stack(part), dtype=torch.float64) for part in zip(*rows)))
    dynamics.fit()
    torch.manual_seed(0)
    spaces: Any = (env.observation_space, env.action_space)
    policy = RBFPolicy(*spaces, angle_dims=angles, n_centres=n_centres)
    mean, std = map(torch.as_tensor, env.get_wrapper_attr("initial_distribution"))
    features = trig_features(mean, angles)
    policy.place(features, torch.ones_like(features))
    cost = SaturatingCost(**env.get_wrapper_attr("saturating_cost"))
    return Problem(dynamics, policy, Gaussian(mean, std.square().diag()), cost)
