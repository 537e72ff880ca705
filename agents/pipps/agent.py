"""PIPPS: policy search in a Gaussian-process model, with a plug-in policy gradient.

Loop: one episode on the real system -> fit the model to all data -> optimise the policy on
simulated particles -> next episode. Parmas, Rasmussen, Peters & Doya 2018 (PIPPS); Parmas, Seno &
Aoki 2023 (TPX), App. B. The simulation is in particles.py, the policy search in search.py. Shared
with other GP-based agents: the model in world_models/gp_dynamics.py, and agents/trials/ with the
loop (algorithm), the problem (cost and start), the controllers, the optimisers and the metrics.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import Tensor

import totalprop.estimators as estimators
from totalprop.agents.core.validation import Above, AtLeast, Finite, Within, try_estimator
from totalprop.agents.pipps.particles import Noise, ParticleModel, simulate
from totalprop.agents.pipps.search import OptimizerName, SearchSettings, optimise_policy
from totalprop.agents.trials.algorithm import OnStep, SpeedIntegration, TrialAlgorithm
from totalprop.agents.trials.controllers import ControllerPolicy
from totalprop.estimators import Estimator
from totalprop.world_models.gp import Kernel

# Variants of the 2018 paper that are not estimators of a node: (resample, fixed noise).
VARIANTS = {"gr": (True, False), "rp-fs": (False, True), "gr-fs": (True, True)}


class PIPPS(TrialAlgorithm):
    """Particle model-based policy search on any environment with Box observations and actions.

    Args:
        policy: "RBFPolicy" (both papers, cart-pole) or "LinearPolicy" (unicycle), or a class.
        env: environment or id. Simulations use its differentiable `cost(states)`, its
            `initial_distribution` (mean, std) and its `invariant_dims`, where it has them.
        learning_rate: step size of the policy optimizer, or a schedule over training progress.
        estimator: name in the registry ("rp", "lr", "tp", "tps", "tpx", "tpg", ...), "gr"
            (Gaussian resampling), "rp-fs" or "gr-fs" (fixed noise and a quasi-Newton optimizer), or
            an `estimators.Estimator`.
        leg: how the likelihood ratio is formed: "score", "biw" (batch importance weighting) or
            "first-order" (with a control variate); an `estimators.Estimator` brings its own.
        cross_fit: choose k for each half of the particles from the other half; an
            `estimators.Estimator` brings its own.
        n_particles: simulated particles N.
        horizon: simulated steps H; the papers use the length of a real episode.
        gradient_steps: policy updates after each trial.
        optimizer: "adam" (2023), "rmsprop2018" (2018, Sec. 3.3) or "quasi-newton" (L-BFGS, which
            needs fixed noise and is implied by "rp-fs" and "gr-fs"). "rmsprop2018" divides by the
            gradient's variance, which it underestimates with "gr", whose particles depend on each
            other.
        adam_eps: Adam's epsilon.
        momentum: momentum of "rmsprop2018".
        dropout: probability that a search leaves out a basis function of the policy, in each step
            of each particle; half of it in the second third of the search, 0 in the last. Amadio et
            al. 2022 (MC-PILCO): 0.25. It halves the step size from third to third and needs "adam",
            like noise_stop.
        noise_stop: a third of a search ends as soon as the directions of its gradients agree by
            less than this many standard errors, for example 2, and the search with its last third.
            0: a search takes all gradient_steps.
        keep_best: end a search with the policy whose cost, averaged over 10 successive gradients,
            was lowest, and not with the last one; with fewer than 10 gradients, with the last. The
            search of "rp-fs" and "gr-fs" ends with its best in any case.
        random_trials: first episodes, with uniformly random actions.
        random_scale: these actions as a fraction of the action space, about its middle.
        cost_fn: differentiable cost of the next states, [..., S] -> [...] (torch, float64). Without
            it the environment's own `cost` is used; if it has none, a GP is fitted to the rewards.
        termination: whether an episode ends on arriving in the next states, [..., S] -> [...]
            (torch): True or False, or, so that a pathwise gradient sees the end, the probability.
            Without it the environment's own `termination` is used; "ignore" if simulations are to
            go on beyond the end.
        termination_cost: cost of every simulated step after the end; at 0, what the environment
            gives, an end is good where costs are positive.
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
        start_means: observations that particles start from in equal shares, each with the deviation
            of the start. None: the environment's own mean or means, or that of its resets.
        model_uncertainty: spread particles by the GP's own uncertainty; off: "TP - σ_f" of 2018.
        noise_multiplier: factor on the learned noise variance in simulation; 100: "TP + σ_n".
        kernel: of the dynamics: "rbf", as in the papers, or "rbf+linear", whose mean far from the
            data goes on along a plane, as in MC-PILCO.
        gp_evaluations: likelihood evaluations per output and fit.
        max_points: newest real steps that the model keeps; 0 for all, as in the papers. A fit takes
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

    fixed_arguments: ClassVar[tuple[str, ...]] = (*TrialAlgorithm.fixed_arguments, "kernel")
    unknown_end: ClassVar[str] = (
        "simulated particles do not end: they go on beyond it, at the costs of the states there. "
        "Pass termination=..., a function of the states, and termination_cost=..., the cost of a "
        "step after the end; or termination='ignore'"
    )

    def __init__(
        self,
        policy: str | type[ControllerPolicy] = "RBFPolicy",
        env: GymEnv | str | None = None,
        learning_rate: Annotated[float, AtLeast(0)] | Schedule = 0.03,
        estimator: str | Estimator = "tpx",
        *,
        leg: Literal["score", "biw", "first-order"] = "score",
        cross_fit: bool = False,
        n_particles: Annotated[int, AtLeast(3)] = 300,
        horizon: Annotated[int, AtLeast(1)] = 30,
        gradient_steps: Annotated[int, AtLeast(1)] = 250,
        optimizer: OptimizerName = "adam",
        adam_eps: Annotated[float, Above(0)] = 1e-4,
        momentum: Annotated[float, Within(0, 1, open_above=True)] = 0.9,
        dropout: Annotated[float, Within(0, 1, open_above=True)] = 0.0,
        noise_stop: Annotated[float, AtLeast(0)] = 0.0,
        keep_best: bool = False,
        random_trials: Annotated[int, AtLeast(1)] = 1,
        random_scale: Annotated[float, Within(0, 1)] = 1.0,
        cost_fn: Callable[[Tensor], Tensor] | None = None,
        termination: Callable[[Tensor], Tensor] | Literal["ignore"] | None = None,
        termination_cost: Annotated[float, Finite()] = 0.0,
        angle_dims: tuple[int, ...] = (),
        invariant_dims: tuple[int, ...] | None = None,
        speed_integration: SpeedIntegration = "off",
        integrated_dims: tuple[tuple[int, int], ...] | None = None,
        time_step: Annotated[float, Above(0)] | None = None,
        start_means: Sequence[Sequence[float]] | None = None,
        model_uncertainty: bool = True,
        noise_multiplier: Annotated[float, Above(0)] = 1.0,
        kernel: Kernel = "rbf",
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
        self.estimator = estimator
        self.leg, self.cross_fit, self.kernel = leg, cross_fit, kernel
        self.n_particles, self.optimizer = n_particles, optimizer
        self.adam_eps, self.momentum = adam_eps, momentum
        self.dropout, self.noise_stop, self.keep_best = dropout, noise_stop, keep_best
        self.termination_cost, self._warned_of_free_end = termination_cost, False
        self.model_uncertainty, self.noise_multiplier = model_uncertainty, noise_multiplier
        if _init_setup_model:
            self._setup_model()

    def _search(self, on_step: OnStep) -> int:
        model = self._particle_model()
        settings = self._settings()
        log = optimise_policy(self.policy, model, settings, self._generator, on_step)
        loss, self._predicted = self._simulate_trial(model)
        self.logger.record("train/loss", loss)
        if settings.optimizer != "quasi-newton":
            self.logger.record("train/learning_rate", settings.learning_rate)
        log.record(self.logger, draw=self.tensorboard_log is not None)
        return len(log.losses)

    def _warn_of_costs(self, next_states: Tensor, rewards: Tensor, done: Tensor) -> None:
        """Say once that every step costs something, and none after the end does."""
        super()._warn_of_costs(next_states, rewards, done)
        cost, termination = self._problem.cost, self._problem.termination
        if termination is None or self.termination_cost or self._warned_of_free_end:
            return
        costs = -rewards if cost is None else cost(next_states).detach()
        if (costs >= 0).all() and (costs > 0).any():
            self._warned_of_free_end = True
            warnings.warn(
                "steps after the end of an episode cost nothing (termination_cost=0), and steps "
                f"before it {costs.mean():.2g} on average, so that an early end is best; unless it "
                f"is the goal, pass termination_cost={costs.max():.2g}, what a bad step costs",
                stacklevel=6,
            )

    def _particle_model(self) -> ParticleModel:
        """The model that policies are searched in.

        Raises:
            ValueError: the agent was made with a cost_fn or termination and loaded without it.
        """
        self._check_given_again()
        if self._problem.cost is None:
            self.world_model.fit_reward(max_evaluations=self.gp_evaluations)
        mean, std = self._start()
        self._check_starts(mean.view(-1, mean.shape[-1]).shape[0])
        return ParticleModel(
            dynamics=self.world_model,
            start_mean=mean,
            start_std=std,
            cost=self._problem.step_cost(self.world_model),
            model_uncertainty=self.model_uncertainty,
            noise_multiplier=self.noise_multiplier,
            termination=self._problem.termination,
            termination_cost=self.termination_cost,
        )

    def _settings(self) -> SearchSettings:
        resample, fixed_noise = self._variant()
        return SearchSettings(
            estimator=self._resolved_estimator(),
            optimizer="quasi-newton" if fixed_noise else self.optimizer,
            learning_rate=self._step_size(),
            gradient_steps=self.gradient_steps,
            n_particles=self.n_particles,
            horizon=self.horizon,
            resample=resample,
            fixed_noise=fixed_noise,
            adam_eps=self.adam_eps,
            momentum=self.momentum,
            dropout=self.dropout,
            noise_stop=self.noise_stop,
            keep_best=self.keep_best and not fixed_noise,
        )

    def _variant(self) -> tuple[bool, bool]:
        """Whether the estimator's name asks for Gaussian resampling, and for fixed noise."""
        name = self.estimator
        return VARIANTS.get(name, (False, False)) if isinstance(name, str) else (False, False)

    def _resolved_estimator(self) -> Estimator:
        """The estimator of the nodes, with the agent's leg and cross_fit where it is a name."""
        if isinstance(self.estimator, Estimator):
            return self.estimator
        changes: dict[str, Any] = {}  # only what was asked for: a registered estimator has its own
        if self.leg != "score":
            changes["legs"] = self.leg
        if self.cross_fit:
            changes["cross_fit"] = True
        return estimators.make("rp" if self.estimator in VARIANTS else self.estimator, **changes)

    def _simulate_trial(self, model: ParticleModel) -> tuple[float, np.ndarray]:
        """Cost and states [H + 1, N, S] that the new policy is predicted to have in a trial."""
        size = self.horizon, self.n_particles, model.n_states
        noise = Noise.draw(*size, self._generator, resample=False)
        with torch.no_grad():
            loss, _, states = simulate(model, self.policy, noise, estimators.make("rp"))
        return float(loss), states.cpu().numpy()

    # ----------------------------------------------------------------------------------------
    # arguments
    # ----------------------------------------------------------------------------------------

    def _remarks(self) -> list[str]:
        if self._problem.termination is None:
            if not self.termination_cost:
                return []
            return [
                f"termination_cost={self.termination_cost:g} has no effect, since simulated "
                "particles do not end: pass termination=..., a function of the states"
            ]
        if self._problem.end_has_gradient or not self._resolved_estimator().needs_pathwise:
            return []
        return [
            "termination gives True or False, of which a pathwise gradient sees nothing; give a "
            "probability, such as torch.sigmoid((x - bound) / width), or choose estimator='lr'"
        ]

    def _check_arguments(self) -> None:
        """One sentence per wrong value, before any work is done."""
        super()._check_arguments()
        has_halves = getattr(self.estimator, "cross_fit", self.cross_fit)
        if has_halves and self.n_particles < 6:  # two halves of 3
            raise ValueError(
                f"n_particles must be at least 6 with cross_fit, got {self.n_particles}"
            )
        if self.optimizer == "quasi-newton" and not self._variant()[1]:
            raise ValueError(
                "optimizer 'quasi-newton' needs a deterministic objective; "
                "choose estimator 'rp-fs' or 'gr-fs'"
            )
        self._check_search()
        self._check_estimator()

    def _check_search(self) -> None:
        """What the search's options need of each other."""
        if self._variant()[1] and self.optimizer == "rmsprop2018":
            raise ValueError(
                f"estimator={self.estimator!r} fixes the noise for optimizer 'quasi-newton', got "
                f"{self.optimizer!r}: leave optimizer out, or take estimator 'rp' or 'gr'"
            )
        if (self.dropout or self.noise_stop) and (self.optimizer != "adam" or self._variant()[1]):
            raise ValueError(
                f"dropout={self.dropout:g} and noise_stop={self.noise_stop:g} scale the steps of "
                "optimizer 'adam', whose gradients are noisy; leave both at 0 with another "
                "optimizer, and with 'rp-fs' and 'gr-fs'"
            )
        if self.dropout and self.policy_class.n_basis is ControllerPolicy.n_basis:  # type: ignore[attr-defined]
            raise ValueError(
                f"dropout={self.dropout:g} leaves out basis functions, and "
                f"{self.policy_class.__name__} has none; take 'RBFPolicy', or dropout=0"
            )
        self._check_starts(len(self.start_means or ()))

    def _check_starts(self, starts: int) -> None:
        """That there are particles for every start, given or of the environment."""
        if starts > self.n_particles:
            raise ValueError(
                f"n_particles must be at least {starts}, one for each mean of the start, "
                f"got {self.n_particles}"
            )
        if starts > 1 and self._variant()[0]:
            raise ValueError(
                f"estimator={self.estimator!r} fits one Gaussian to all particles, which start "
                f"from {starts} means; pass start_means=[...] with one, or another estimator"
            )

    def _check_estimator(self) -> None:
        """Its parts by name, and that they work together, on a node of as many particles."""
        if isinstance(self.estimator, Estimator):
            if self.leg != "score" or self.cross_fit:
                raise ValueError(
                    "an Estimator brings its own legs and cross_fit: pass leg and cross_fit to "
                    "estimators.make(...), not to PIPPS"
                )
        elif self.estimator not in (known := [*estimators.names(), *VARIANTS]):
            raise ValueError(estimators.unknown_name(self.estimator, known))
        try_estimator(self._resolved_estimator(), [self.n_particles])
