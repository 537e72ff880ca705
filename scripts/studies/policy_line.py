"""A line of policies through that of a trained PIPPS, and the gradients along it.

What Figures 2 and 3 of Parmas et al. 2018 (PIPPS) are measured on: the value and its gradient where
the parameters are perturbed "in a randomly chosen fixed direction" (Sec. 4.1).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from totalprop.agents.core.validation import try_estimator
from totalprop.agents.pipps.particles import Noise, policy_gradient, simulate
from totalprop.estimators import Estimator, make
from totalprop.scripts.run.errors import UserError
from totalprop.scripts.studies.agent_problems import PIPPSProblem, agent_problem
from totalprop.scripts.studies.estimator_names import estimator_with_leg

RESAMPLED = "gr"  # RP through Gaussian resampling, which is no estimator of a node


def estimator_named(name: str) -> Estimator:
    """A registered estimator, with a leg of its own after a plus: "tp", "lr+biw"; or "gr".

    Raises:
        ValueError: there is none of that name, or none without a critic.
    """
    estimator = make("rp") if name == RESAMPLED else estimator_with_leg(name)
    try_estimator(estimator, [6])  # the least number of particles
    return estimator


class PolicyLine:
    """The policies θ + Δ v: θ of a trained PIPPS, v a random unit vector, Δ ≥ 0.

    Args:
        run: folder of a run of pipps, of which the policy and the model are taken.
        direction: seed of v.

    Attributes:
        model: what is simulated, for `horizon` steps.
        policy: the policy at Δ, after `move`.
        state_names: S names of the state's entries.
        direction: v [P].

    Raises:
        UserError: the folder is not one of a run of pipps.
    """

    def __init__(self, run: Path, direction: int) -> None:
        if not (run / "config.json").exists():
            raise UserError(
                f"--run must be the folder of a run of totalprop train pipps, got '{run}' (the "
                "default is in the repository, and not in a wheel)"
            )
        problem = agent_problem(run)
        if not isinstance(problem, PIPPSProblem):
            raise UserError(f"{run} is no run of pipps, whose policy search is measured here")
        self.model, self.policy = problem.model, problem.policy
        self.state_names = problem.state_names
        (self.horizon,) = problem.horizons
        self._parameters = problem.parameters
        self._start = parameters_to_vector(self._parameters).detach().clone()
        generator = torch.Generator().manual_seed(direction)
        v = torch.randn(len(self._start), generator=generator, dtype=torch.float64)
        self.direction = (v / v.norm()).to(self._start)

    @property
    def digest(self) -> str:
        """Tells the policy at Δ = 0 from others."""
        return hashlib.sha256(self._start.cpu().numpy().tobytes()).hexdigest()[:12]

    def move(self, delta: float) -> None:
        """Set the policy's parameters to θ + Δ v."""
        vector_to_parameters(self._start + delta * self.direction, self._parameters)

    def draw(self, n: int, seed: int, *, resample: bool = False) -> Noise:
        """The noise of n particles, from a seed."""
        generator = torch.Generator(self._start.device).manual_seed(seed)
        return Noise.draw(self.horizon, n, self.model.n_states, generator, resample=resample)

    def returns(self, noise: Noise) -> Tensor:
        """[N] the cost of each particle's trajectory at the policy."""
        with torch.no_grad():
            _, costs, _ = simulate(self.model, self.policy, noise, make("rp"))
        return costs.sum(0)

    def slope(self, estimator: Estimator, noise: Noise) -> Tensor:
        """[] vᵀ dJ/dθ, the gradient along the line."""
        found = policy_gradient(self.model, self.policy, noise, estimator)
        return torch.cat([g.flatten() for g in found.gradients]) @ self.direction

    def slopes(self, estimator: Estimator, noise: Noise) -> Tensor:
        """[N] the gradient along the line of each particle; `slope` is their mean."""
        found = policy_gradient(self.model, self.policy, noise, estimator, per_sample=True)
        assert found.per_sample is not None
        return len(found.per_sample) * (found.per_sample @ self.direction)
