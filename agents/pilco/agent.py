"""PILCO: policy search in a Gaussian-process model by moment matching.

Loop: one episode on the real system -> fit the model to all data -> optimise the policy on the
predicted cost, whose gradient is in closed form -> next episode. Deisenroth & Rasmussen 2011. The
prediction is in propagation.py; what every function does to a Gaussian is in
world_models/moment_matching.py. Shared with PIPPS: agents/trials/, with the loop (algorithm), the
problem (cost and start), the controllers, the optimisers and the metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from totalprop.agents.core.metrics import QUIET
from totalprop.agents.core.validation import Above, AtLeast, Finite, Within
from totalprop.agents.pilco.propagation import (
    MomentModel,
    Prediction,
    minus_reward,
    predict,
    saturating,
)
from totalprop.agents.trials import optimisers
from totalprop.agents.trials.algorithm import OnStep, SpeedIntegration, TrialAlgorithm
from totalprop.agents.trials.controllers import ControllerPolicy
from totalprop.agents.trials.optimisers import Evaluation
from totalprop.agents.trials.problem import Problem
from totalprop.agents.trials.saturating_cost import SaturatingCost
from totalprop.world_models.moment_matching import Gaussian

ADAM_EPS = 1e-8  # PyTorch's: the gradient has no noise
REACH = 1.0  # of L-BFGS, in log lengthscales and weights; a factor of e is a long step
QUANTILES = 41  # of each predicted state, for the figure of a trial


class PILCO(TrialAlgorithm):
    """Moment-matching policy search on any environment with Box observations and actions.

    It has no `estimator`: nothing is sampled, and the gradient is that of the predicted cost.

    Args:
        policy: "RBFPolicy" (cart-pole) or "LinearPolicy" (unicycle), or a class with `match`.
        env: environment or id. Predictions use its `saturating_cost` (target, weights, angles), its
            `initial_distribution` (mean, std) and its `invariant_dims`, where it has them.
        learning_rate: step size of "adam", or a schedule over training progress.
        optimizer: "quasi-newton" (L-BFGS, which needs no step size) or "adam".
        horizon: predicted steps H; the length of a real episode.
        gradient_steps: evaluations of the predicted cost and its gradient after each trial.
        random_trials: first episodes, with uniformly random actions.
        random_scale: these actions as a fraction of the action space, about its middle.
        cost_fn: a `SaturatingCost` of the next states. Without it the environment's own
            `saturating_cost` is used; if it has none, a GP is fitted to the rewards.
        exploration: factor of the standard deviation of each step's cost, added to its mean;
            negative numbers seek what is uncertain.
        termination: "ignore" if predictions are to go on beyond the end of episodes that terminate,
            without a warning.
        angle_dims: entries of the observation that are angles: model and policy see their sine and
            cosine.
        invariant_dims: entries of the observation that no change of it depends on, such as a yaw:
            the model of the dynamics does not see them. None: the environment's own
            `invariant_dims`, or none.
        speed_integration: "on": predict velocities alone and integrate the positions, q' = q + T/2
            (q̇ + q̇'): fewer Gaussian processes, for second-order systems (Amadio et al. 2022).
            "auto": where the environment declares its velocities. "off": a process for each entry,
            as in the papers.
        integrated_dims: pairs (position, velocity) of entries of the observation, for
            speed_integration. None: the environment's own `integrated_dims`.
        time_step: time T between two observations, for speed_integration. None: the environment's
            own `time_step`.
        start_means: observations that predictions start from, equally likely, each with the
            deviation of the start. None: the environment's own mean or means, or that of its
            resets.
        process_noise: add the learned noise variance to every predicted step.
        gp_evaluations: likelihood evaluations per output and fit.
        max_points: newest real steps that the model keeps; 0 for all, as in the paper. A fit takes
            time cubic in their number.
        policy_kwargs: arguments of the policy class, for example {"n_centres": 50}.
        stats_window_size: episodes that rollout/ep_rew_mean averages over.
        tensorboard_log: folder for TensorBoard events, or None.
        verbose: 1 prints the logged scalars.
        seed: seeds everything random; the same seed gives the same run on the same CPU.
        device: "cpu", "cuda", or "auto" for a GPU if there is one. All is float64.

    Raises:
        ValueError: a value out of range, with what was expected. Spaces other than a vector of
            real numbers raise an UnsupportedSpaceError, which is an AssertionError, too.
    """

    unknown_end: ClassVar[str] = (
        "predictions go on beyond the end, at the costs of the states there: moments are matched "
        "for all trials together. Pass termination='ignore' if that is meant, or take PIPPS, whose "
        "particles end"
    )

    def __init__(
        self,
        policy: str | type[ControllerPolicy] = "RBFPolicy",
        env: GymEnv | str | None = None,
        learning_rate: Annotated[float, AtLeast(0)] | Schedule = 0.03,
        *,
        optimizer: Literal["quasi-newton", "adam"] = "quasi-newton",
        horizon: Annotated[int, AtLeast(1)] = 30,
        gradient_steps: Annotated[int, AtLeast(1)] = 150,
        random_trials: Annotated[int, AtLeast(1)] = 1,
        random_scale: Annotated[float, Within(0, 1)] = 1.0,
        cost_fn: SaturatingCost | None = None,
        exploration: Annotated[float, Finite()] = 0.0,
        termination: Literal["ignore"] | None = None,
        angle_dims: tuple[int, ...] = (),
        invariant_dims: tuple[int, ...] | None = None,
        speed_integration: SpeedIntegration = "off",
        integrated_dims: tuple[tuple[int, int], ...] | None = None,
        time_step: Annotated[float, Above(0)] | None = None,
        start_means: Sequence[Sequence[float]] | None = None,
        process_noise: bool = True,
        gp_evaluations: Annotated[int, AtLeast(1)] = 200,
        max_points: Annotated[int, AtLeast(0)] = 0,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: Annotated[int, AtLeast(1)] = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            horizon=horizon,
            gradient_steps=gradient_steps,
            random_trials=random_trials,
            random_scale=random_scale,
            cost_fn=cost_fn,
            termination=termination,
            angle_dims=angle_dims,
            invariant_dims=invariant_dims,
            speed_integration=speed_integration,
            integrated_dims=integrated_dims,
            time_step=time_step,
            start_means=start_means,
            gp_evaluations=gp_evaluations,
            max_points=max_points,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.optimizer, self.process_noise = optimizer, process_noise
        self.exploration = exploration
        if _init_setup_model:
            self._setup_model()

    def _find_problem(self) -> Problem:
        problem = super()._find_problem()
        problem.termination = None  # an end has no closed form, the environment's own neither
        return problem

    # ----------------------------------------------------------------------------------------
    # the policy search
    # ----------------------------------------------------------------------------------------

    def _search(self, on_step: OnStep) -> int:
        model, parameters = self._moment_model(), list(self.policy.parameters())
        losses: list[float] = []
        first = math.nan  # expected cost before the search
        norms: list[float] = []
        least, best = math.inf, parameters_to_vector(parameters).detach().clone()

        def evaluate() -> Evaluation:
            nonlocal least, best, first
            found = predict(model, self.policy, self.horizon)
            loss = found.loss
            gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])
            if not losses:
                first = float(found.costs.sum(0).mean())
            losses.append(float(loss.detach()))
            norms.append(float(gradient.norm()))
            if math.isfinite(norms[-1]) and losses[-1] < least:
                least, best = losses[-1], parameters_to_vector(parameters).detach().clone()
            on_step(len(losses) - 1, losses[-1])
            return Evaluation(loss.detach(), gradient)

        if self.optimizer == "adam":
            rate = self._step_size()
            skipped = optimisers.adam(
                parameters, evaluate, steps=self.gradient_steps, learning_rate=rate, eps=ADAM_EPS
            )
        else:
            skipped = optimisers.quasi_newton(
                parameters, evaluate, evaluations=self.gradient_steps, reach=REACH
            )
        if skipped == len(losses):
            raise FloatingPointError(
                f"none of the {skipped} policy gradients was finite; choose a shorter horizon, or "
                "more random_trials for a model that knows more"
            )
        with torch.no_grad():
            found = predict(model, self.policy, self.horizon)
            if not float(found.loss) <= least:  # Adam's last steps may have led uphill
                vector_to_parameters(best, parameters)
                found = predict(model, self.policy, self.horizon)
        self._predicted = _quantiles(found)
        self._record(found, first, norms, skipped)
        return len(losses)

    def _moment_model(self) -> MomentModel:
        """The model that policies are searched in.

        Raises:
            ValueError: the agent was made with a cost_fn and loaded without it.
        """
        self._check_given_again()
        mean, std = self._start()
        own = self._problem.saturating_cost
        if own is None:
            self.world_model.fit_reward(max_evaluations=self.gp_evaluations)
        return MomentModel(
            dynamics=self.world_model,
            start=Gaussian(mean, std.square().diag().expand(*mean.shape, -1)),
            cost=minus_reward(self.world_model) if own is None else saturating(own),
            process_noise=self.process_noise,
            exploration=self.exploration,
        )

    def _record(self, found: Prediction, first: float, norms: list[float], skipped: int) -> None:
        record, finite = self.logger.record, [norm for norm in norms if math.isfinite(norm)]
        record("train/loss", float(found.costs.sum(0).mean()))
        if self.exploration:
            record("train/objective", float(found.loss))
        if self.optimizer == "adam":
            record("train/learning_rate", self._step_size())
        record("train/loss_first", first, exclude=QUIET)
        record("train/gradient_norm", float(np.mean(finite)))
        record("train/gradient_norm_last", finite[-1], exclude=QUIET)
        record("train/skipped_steps", skipped, exclude=QUIET)
        spread = found.covariances[-1].diagonal(dim1=-2, dim2=-1).sqrt()  # [S], or of M starts
        for d, value in enumerate(spread.view(-1, spread.shape[-1]).mean(0).tolist()):
            record(f"prediction/last_std_{d}", value, exclude=QUIET)

    # ----------------------------------------------------------------------------------------
    # arguments
    # ----------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        """One sentence per wrong value, before any work is done."""
        super()._check_arguments()
        cost: Any = self.cost_fn
        if cost is not None and not isinstance(cost, SaturatingCost):
            raise ValueError(
                "cost_fn must be a SaturatingCost(target, weights, angles=...), whose expectation "
                f"is known, got a {type(cost).__name__}; without cost_fn a Gaussian process learns "
                "the rewards, and PIPPS takes any differentiable function"
            )
        if getattr(self.policy_class, "match", None) in (None, ControllerPolicy.match):
            raise ValueError(
                f"PILCO needs the moments of the policy's output, and {self.policy_class.__name__} "
                "has no `match`; choose 'RBFPolicy' or 'LinearPolicy', or write it"
            )

    def _remarks(self) -> list[str]:
        if self._problem.cost is None or self._problem.saturating_cost is not None:
            return []
        return [
            "the environment has a `cost`, but no `saturating_cost` whose expectation is known: a "
            "Gaussian process learns it from the rewards; pass cost_fn=SaturatingCost(...) if it "
            "is one"
        ]


def _quantiles(found: Prediction) -> np.ndarray:
    """Predicted states [H + 1, N, S], evenly spread over the probability of each.

    N is QUANTILES, of each start.
    """
    level = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    z = torch.special.ndtri(level).to(found.means)
    std = found.covariances.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    states = found.means.unsqueeze(-2) + std.unsqueeze(-2) * z[:, None]
    return states.flatten(1, -2).cpu().numpy()
