"""Optimisers of a policy's simulated cost, from gradients that the agent evaluates.

Each changes the parameters in place, starts anew for every search and returns how many evaluations
it skipped because their gradient was not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters


class Evaluation(NamedTuple):
    """The cost at the current parameters, with its gradient."""

    loss: Tensor  # []
    gradient: Tensor  # [P], in the order of the parameters
    variance: Tensor | None = None  # [P] of the gradient as an estimate, which rmsprop2018 needs


Evaluate = Callable[[], Evaluation]


def adam(
    parameters: Sequence[Tensor],
    evaluate: Evaluate,
    *,
    steps: int,
    learning_rate: float,
    eps: float,
) -> int:
    """Adam with new moments, as in the demo of Parmas et al. 2023.

    Args:
        parameters: leaves that are changed in place.
        evaluate: cost and gradient at the current parameters.
        steps: number of evaluations.
        learning_rate: step size.
        eps: Adam's epsilon.

    Returns:
        Number of skipped steps.
    """
    optimizer, skipped = torch.optim.Adam(parameters, lr=learning_rate, eps=eps), 0
    sizes = [parameter.numel() for parameter in parameters]
    for _ in range(steps):
        gradient = evaluate().gradient
        if not torch.isfinite(gradient).all():
            skipped += 1
            continue
        for parameter, g in zip(parameters, gradient.split(sizes), strict=True):
            parameter.grad = g.view_as(parameter)
        optimizer.step()
    return skipped


def rmsprop2018(
    parameters: Sequence[Tensor],
    evaluate: Evaluate,
    *,
    steps: int,
    learning_rate: float,
    momentum: float,
) -> int:
    """m ← γ m + g / √z, θ ← θ - α m, z = E[g]² + V[g]. Parmas et al. 2018, Sec. 3.3.

    V[g] is the variance of the gradient as a mean over samples. The displayed equation has
    E[g²] + V[g]; the text defines z as here.

    Args:
        parameters: leaves that are changed in place.
        evaluate: cost, gradient and the gradient's variance at the current parameters.
        steps: number of evaluations.
        learning_rate: step size α.
        momentum: decay γ of m.

    Returns:
        Number of skipped steps.
    """
    skipped = 0
    velocity = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    velocity = velocity.to(parameters[0].device)
    for _ in range(steps):
        _, gradient, variance = evaluate()
        assert variance is not None
        direction = gradient / (gradient.square() + variance).sqrt().clamp_min(1e-30)
        if not torch.isfinite(direction).all():
            skipped += 1
            continue
        velocity = momentum * velocity + direction
        with torch.no_grad():
            theta = parameters_to_vector(parameters) - learning_rate * velocity
            vector_to_parameters(theta, parameters)
    return skipped


def quasi_newton(
    parameters: Sequence[Tensor],
    evaluate: Evaluate,
    *,
    evaluations: int,
    reach: float | None = None,
) -> int:
    """L-BFGS on a deterministic cost. Parmas et al. 2018, Sec. 3.3 (with fixed noise).

    The parameters become the best that were evaluated: a failed line search returns its start.

    Args:
        parameters: leaves that are changed in place.
        evaluate: cost and gradient at the current parameters.
        evaluations: their number, which SciPy may exceed to finish its last line search.
        reach: how far a parameter may move before L-BFGS starts anew, from the best so far, until
            `evaluations` are used up or nothing is gained. On a plateau its first step is
            otherwise as long as the curvature is small, and ends where no gradient leads back.

    Returns:
        Number of evaluations that were not finite, which the line search steps back from.
    """
    from scipy.optimize import minimize  # here: a help text needs no SciPy

    least, skipped, used = math.inf, 0, 0
    best = start = parameters_to_vector(parameters).detach().cpu().numpy()
    device = parameters[0].device

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal least, best, skipped, used
        used += 1
        with torch.no_grad():
            vector_to_parameters(torch.as_tensor(theta, device=device), parameters)
        loss, gradient, _ = evaluate()
        if not (torch.isfinite(loss) and torch.isfinite(gradient).all()):
            skipped += 1
            return 1e25, np.zeros_like(theta)  # a wall
        if float(loss) < least:
            least, best = float(loss), theta.copy()
        return float(loss), gradient.cpu().numpy()

    while used < evaluations:
        before = least
        minimize(
            objective,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=None if reach is None else np.stack((start - reach, start + reach), 1),
            options={"maxfun": evaluations - used},
        )
        if reach is None or not before - least > 1e-6 * abs(least):
            break
        start = best
    with torch.no_grad():
        vector_to_parameters(torch.as_tensor(best, device=device), parameters)
    return skipped
