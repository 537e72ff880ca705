"""Optimisers of a policy's simulated cost, from gradients that the agent evaluates.

Each changes the parameters in place, starts anew for every search and returns how many evaluations
it skipped because their gradient was not finite.
"""

from __future__ import annotations

import math
from collections import deque
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


class Cooling:
    """Three phases of a search, whose step sizes are 1, 1/2 and 1/4 of the first.

    A phase ends where the gradient is within its noise. Gradients of successive steps are
    independent estimates: with a signal their directions agree, in noise alone the cosine of the
    angle between them has mean 0, and where steps jump across a minimum it is negative. With the
    mean c and the deviation s of the last n cosines, a phase ends at c < z s / √n, and the search
    with its third phase. To halve a constant step size when the inner products of successive
    gradients say that it has done what it can is from Chee & Toulis 2018, after Pflug; to cool a
    search in such phases and end it by itself, from Amadio et al. 2022 (MC-PILCO), and code
    (MC_PILCO.py). Differs from MC-PILCO, which watches the changes of the cost.

    Args:
        significance: z; 0: no phase ends before its time.
        steps: gradient steps of the search. A phase takes a third of them at most.
        window: n, the cosines that a test is of.

    Attributes:
        phase: 0, 1 or 2.
        is_over: the search has ended.
    """

    PHASES = 3

    def __init__(self, significance: float, steps: int, window: int = 50) -> None:
        self.significance, self.window = significance, window
        self.longest = -(-steps // self.PHASES)
        self.phase, self.is_over = 0, False
        self._steps = 0
        self._direction: Tensor | None = None
        self._cosines = deque[float](maxlen=window)

    @property
    def scale(self) -> float:
        """Factor on the step size."""
        return 0.5**self.phase

    def add(self, gradient: Tensor) -> None:
        """Take in the gradient [P] of a step; those that are not finite count as steps alone."""
        self._steps += 1
        norm = float(gradient.norm())
        if math.isfinite(norm) and norm > 0:
            direction = gradient / norm
            if self._direction is not None:
                self._cosines.append(float(direction @ self._direction))
            self._direction = direction
        if self._steps >= self.longest or self._is_noise():
            self.is_over = self.phase == self.PHASES - 1
            self.phase = min(self.phase + 1, self.PHASES - 1)
            self._steps = 0
            self._cosines.clear()

    def _is_noise(self) -> bool:
        if self.significance == 0 or len(self._cosines) < self.window:
            return False
        cosines = np.array(self._cosines)
        limit = self.significance * cosines.std(ddof=1) / self.window**0.5
        return bool(cosines.mean() < limit)


def adam(
    parameters: Sequence[Tensor],
    evaluate: Evaluate,
    *,
    steps: int,
    learning_rate: float,
    eps: float,
    cooling: Cooling | None = None,
) -> int:
    """Adam with new moments, as in the demo of Parmas et al. 2023.

    Args:
        parameters: leaves that are changed in place.
        evaluate: cost and gradient at the current parameters.
        steps: number of evaluations.
        learning_rate: step size.
        eps: Adam's epsilon.
        cooling: scales the step size and may end the search early.

    Returns:
        Number of skipped steps.
    """
    optimizer, skipped = torch.optim.Adam(parameters, lr=learning_rate, eps=eps), 0
    sizes = [parameter.numel() for parameter in parameters]
    for _ in range(steps):
        if cooling is not None:
            if cooling.is_over:
                break
            optimizer.param_groups[0]["lr"] = learning_rate * cooling.scale
        gradient = evaluate().gradient
        if cooling is not None:
            cooling.add(gradient)
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
