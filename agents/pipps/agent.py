"""PIPPS: policy search in a Gaussian-process model, with a plug-in policy gradient.

Loop: one episode on the real system -> fit the model to all data -> optimise the policy on
simulated particles -> next episode. Parmas, Rasmussen, Peters & Doya 2018 (PIPPS); Parmas, Seno &
Aoki 2023 (TPX), App. B. The simulation is in particles.py, the policy search in search.py. Shared
with other GP-based agents: the model in world_models/gp_dynamics.py, and agents/trials/ with the
problem (cost and start), the controllers, the optimisers and the metrics.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, ProgressBarCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from torch import Tensor

import totalprop.estimators as estimators
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.memory import keep_freed_memory
from totalprop.agents.core.metrics import QUIET, record_progress
from totalprop.agents.core.spaces import describe, to_vector
from totalprop.agents.core.validation import (
    Above,
    AtLeast,
    Finite,
    Within,
    check_arguments,
    check_finite,
    try_estimator,
)
from totalprop.agents.core.workers import explain_dead_workers
from totalprop.agents.pipps.particles import Noise, ParticleModel, simulate
from totalprop.agents.pipps.search import OptimizerName, SearchSettings, optimise_policy
from totalprop.agents.trials import metrics
from totalprop.agents.trials.controllers import ControllerPolicy, LinearPolicy, RBFPolicy
from totalprop.agents.trials.problem import Problem
from totalprop.estimators import Estimator
from totalprop.world_models.gp import ROUNDING, GaussianProcess
from totalprop.world_models.gp_dynamics import GPDynamics

# Variants of the 2018 paper that are not estimators of a node: (resample, fixed noise).
VARIANTS = {"gr": (True, False), "rp-fs": (False, True), "gr-fs": (True, True)}


SelfPIPPS = TypeVar("SelfPIPPS", bound="PIPPS")


class PIPPS(Algorithm):
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
        model_uncertainty: spread particles by the GP's own uncertainty; off: "TP - σ_f" of 2018.
        noise_multiplier: factor on the learned noise variance in simulation; 100: "TP + σ_n".
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
        ValueError: a value out of range, with what was expected. Spaces other than Box raise
            stable-baselines3's AssertionError.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "RBFPolicy": RBFPolicy,
        "LinearPolicy": LinearPolicy,
    }
    action_spaces = (spaces.Box,)
    fixed_arguments: ClassVar[tuple[str, ...]] = ("policy_kwargs", "angle_dims", "invariant_dims")
    no_vec_normalize: ClassVar[str] = (
        "PIPPS fits its model to raw observations, whose scale VecNormalize keeps changing; "
        "pass the environment without VecNormalize (the GP scales its inputs itself)"
    )
    policy: ControllerPolicy

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
        random_trials: Annotated[int, AtLeast(1)] = 1,
        random_scale: Annotated[float, Within(0, 1)] = 1.0,
        cost_fn: Callable[[Tensor], Tensor] | None = None,
        termination: Callable[[Tensor], Tensor] | Literal["ignore"] | None = None,
        termination_cost: Annotated[float, Finite()] = 0.0,
        angle_dims: tuple[int, ...] = (),
        invariant_dims: tuple[int, ...] | None = None,
        model_uncertainty: bool = True,
        noise_multiplier: Annotated[float, Above(0)] = 1.0,
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
            policy=policy,
            env=env,
            learning_rate=learning_rate,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
        )
        self.estimator = estimator
        self.leg, self.cross_fit = leg, cross_fit
        self.n_particles, self.horizon = n_particles, horizon
        self.gradient_steps, self.optimizer = gradient_steps, optimizer
        self.adam_eps, self.momentum = adam_eps, momentum
        self.random_trials, self.random_scale = random_trials, random_scale
        self.cost_fn = cost_fn
        self.termination, self.termination_cost = termination, termination_cost
        for name, dims in (("angle_dims", angle_dims), ("invariant_dims", invariant_dims or ())):
            if not isinstance(dims, Iterable):
                raise ValueError(
                    f"{name} must be entries of the observation, e.g. (1,), got {dims!r}"
                )
        self.angle_dims = tuple(angle_dims)
        self.invariant_dims = None if invariant_dims is None else tuple(invariant_dims)
        self.model_uncertainty, self.noise_multiplier = model_uncertainty, noise_multiplier
        self.gp_evaluations, self.max_points = gp_evaluations, max_points
        self._n_trials = 0
        self._needs_cost_fn = self._needs_termination = False
        self._warned_of_end = self._warned_of_cut = False
        self._start_observations: list[np.ndarray] = []
        self._predicted: np.ndarray | None = None  # [H + 1, N, S] for the next trial
        if _init_setup_model:
            self._setup_model()

    # ----------------------------------------------------------------------------------------
    # set-up
    # ----------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        self.angle_dims = tuple(self.angle_dims)  # a list where it comes from a file
        if self.invariant_dims is not None:
            self.invariant_dims = tuple(self.invariant_dims)
        self._check_arguments()
        self._problem = self._find_problem()
        if self.invariant_dims is None:
            self.invariant_dims = self._problem.invariant_dims
        # They may have been given to `load`.
        self._needs_cost_fn |= self.cost_fn is not None
        self._needs_termination |= callable(self.termination)
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        kwargs = {"angle_dims": self.angle_dims, **self.policy_kwargs}
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **kwargs
        ).to(self.device)
        states, controls = self.observation_space.shape[0], self.action_space.shape[0]  # type: ignore[index]
        kind = np.float32 if self.observation_space.dtype == np.float32 else np.float64
        model = GPDynamics(
            states,
            controls,
            angle_dims=self.angle_dims,
            invariant_dims=self.invariant_dims,
            rounding=ROUNDING[kind],
        )
        self.world_model = model.to(self.device)
        self._fix_arguments()

    @property
    def dynamics(self) -> GaussianProcess:
        """The GP of state differences; files hold it under this name."""
        return self.world_model.gp

    @property
    def reward_model(self) -> GaussianProcess:
        """The GP of rewards; files hold it under this name."""
        return self.world_model.reward_gp

    def _find_problem(self) -> Problem:
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        return Problem(
            self.env,
            space,
            cost_fn=self.cost_fn,
            termination=self.termination,
            device=self.device,
        )

    def _adopt_env(self) -> None:
        """Take cost, start and end from the environment."""
        self._problem = self._find_problem()

    # ----------------------------------------------------------------------------------------
    # the loop
    # ----------------------------------------------------------------------------------------

    @explain_dead_workers
    def learn(
        self: SelfPIPPS,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "PIPPS",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfPIPPS:
        """Run trials until `total_timesteps` real steps are done; a policy search follows each.

        Random trials count. With 30-step episodes, 450 steps are the papers' 15 searches, the last
        one on all data. Simulated steps neither count nor trigger callbacks. A trial in an
        environment without a time limit (gymnasium's TimeLimit) is truncated after `horizon` steps.

        Args:
            total_timesteps: real environment steps; exact up to the number of environments.
            callback: as in stable-baselines3.
            log_interval: trials between log dumps.
            tb_log_name: as in stable-baselines3.
            reset_num_timesteps: as in stable-baselines3.
            progress_bar: as in stable-baselines3, with a line below for each policy search, which
                is where the time goes.

        Raises:
            ValueError: an observation or reward is not finite.
            RuntimeError: an environment's process died.
        """
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        self._problem = self._find_problem()  # attributes may have been set since
        self._warn_before(total_timesteps - self.num_timesteps)
        if self.device.type == "cpu":
            keep_freed_memory()
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps:
            # Before the trial: after it, the last search would have no progress and no step left.
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            if self._n_trials >= self.random_trials and not self.policy.is_placed:
                # A callback stopped an earlier `learn` before the first search.
                self._improve_policy(callback)
            if not self._collect_trial(callback, total_timesteps):
                break
            if self._n_trials >= self.random_trials:
                self._improve_policy(callback)
            if log_interval and self._n_trials % log_interval == 0:
                self.dump_logs()
        callback.on_training_end()
        return self

    def _warn_before(self, total_timesteps: int) -> None:
        """Say at the start what would be noticed after the run: settings that do not fit."""
        assert self.env is not None
        limit, horizon, found = self._problem.time_limit, self.horizon, []
        if limit is not None and horizon != limit:
            found.append(
                f"horizon={horizon}, but the environment's episodes are truncated after {limit} "
                "steps: the policy is optimised for "
                + (f"the first {horizon} only" if horizon < limit else "steps that never come")
                + f"; choose horizon={limit}, or another TimeLimit"
            )
        trial = self.env.num_envs * (horizon if limit is None else limit)
        still_random = self.random_trials - self._n_trials
        if 0 < total_timesteps <= trial * (still_random - 1):
            found.append(
                f"total_timesteps={total_timesteps} are used up by random_trials="
                f"{self.random_trials}, of {trial} steps each: the policy will not be optimised"
            )
        elif 0 < total_timesteps < trial and not self.world_model.n_points:
            found.append(
                f"total_timesteps={total_timesteps} are less than one trial, of {trial} steps: the "
                "model will know only how an episode begins"
            )
        has_end = self._problem.termination is not None
        if (
            has_end
            and self._resolved_estimator().needs_pathwise
            and not self._problem.end_has_gradient
        ):
            found.append(
                "termination gives True or False, of which a pathwise gradient sees nothing; give "
                "a probability, such as torch.sigmoid((x - bound) / width), or choose "
                "estimator='lr'"
            )
        for text in found:
            warnings.warn(text, stacklevel=4)

    def _collect_trial(self, callback: BaseCallback, total_timesteps: int) -> bool:
        """One episode of every environment; False if a callback asked to stop.

        Where the environment has no time limit, an episode is truncated after `horizon` steps.
        """
        assert self.env is not None and self._last_obs is not None
        callback.on_rollout_start()
        is_random = self._n_trials < self.random_trials
        finished = np.zeros(self.env.num_envs, dtype=bool)
        check_finite(self.num_timesteps, np.array(self._last_obs))
        path, transitions = [np.array(self._last_obs)], []
        from_start = bool(np.asarray(self._last_episode_starts)[0])
        limit = self.horizon if self._problem.time_limit is None else math.inf
        steps = 0
        while not finished.all() and self.num_timesteps < total_timesteps and steps < limit:
            observations = np.array(self._last_obs)
            if is_random:
                actions = np.stack([self._random_action() for _ in finished])
            else:
                actions, _ = self.predict(observations)
            new_obs, rewards, dones, infos = self.env.step(actions)
            self.num_timesteps += self.env.num_envs
            steps += 1
            next_observations = np.array(new_obs)
            for i in np.flatnonzero(dones):  # already reset: take the true end
                next_observations[i] = infos[i]["terminal_observation"]
            check_finite(self.num_timesteps, next_observations, rewards)
            starts = np.asarray(self._last_episode_starts, dtype=bool)
            self._start_observations.extend(observations[starts])
            transitions.append((observations, actions, next_observations, rewards))
            if not finished[0]:
                path.append(next_observations)
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones
            finished |= dones
            self._warn_of_end(dones, infos)
            callback.update_locals(locals())
            if not callback.on_step():
                self._n_trials += int(finished.all())
                self._store(transitions)
                return False
            self._update_info_buffer(infos, dones)
        self._n_trials += 1
        self._store(transitions)
        if steps >= limit and not finished.all():
            self._truncate(finished, transitions)
        if self._predicted is not None and from_start and self.tensorboard_log is not None:
            seen = np.stack(path)[:, 0]
            metrics.record_prediction(self.logger, self._problem, self._predicted, seen)
        callback.on_rollout_end()
        return True

    def _random_action(self) -> np.ndarray:
        action: np.ndarray = self.action_space.sample()
        if self.random_scale == 1:
            return action
        assert isinstance(self.action_space, spaces.Box)
        middle = (self.action_space.low + self.action_space.high) / 2
        return (middle + self.random_scale * (action - middle)).astype(action.dtype)

    def _truncate(
        self, finished: np.ndarray, transitions: Sequence[tuple[np.ndarray, ...]]
    ) -> None:
        """Begin new episodes; the running ones of this trial count as truncated."""
        assert self.env is not None
        if not self._warned_of_cut:
            self._warned_of_cut = True
            warnings.warn(
                f"the environment declares no time limit: a trial is truncated after "
                f"horizon={self.horizon} steps; gymnasium.wrappers.TimeLimit sets another one",
                stacklevel=4,
            )
        rewards = np.stack([step[3] for step in transitions])  # [T, n_envs]
        for sum_of_rewards in rewards.sum(0)[~finished]:
            episode = {"r": float(sum_of_rewards), "l": len(rewards), "t": 0.0}
            self._update_info_buffer([{"episode": episode}])
        self._last_obs = self.env.reset()  # type: ignore[assignment]
        self._last_episode_starts = np.ones(self.env.num_envs, dtype=bool)

    def _warn_of_end(self, dones: np.ndarray, infos: Sequence[dict[str, Any]]) -> None:
        """Say once that episodes terminate, which simulations do not know unless they are told."""
        is_known = self._problem.termination is not None or self.termination == "ignore"
        if is_known or self._warned_of_end:
            return
        ended = [info for info, done in zip(infos, dones, strict=True) if done]
        if not all(info.get("TimeLimit.truncated", False) for info in ended):
            self._warned_of_end = True
            warnings.warn(
                f"an episode terminated at step {self.num_timesteps}, but simulated particles do "
                "not end: they go on beyond it, at the costs of the states there. Pass "
                "termination=..., a function of the states, and termination_cost=..., the cost of "
                "a step after the end; or termination='ignore'",
                stacklevel=4,
            )

    def _store(self, transitions: Sequence[tuple[np.ndarray, ...]]) -> None:
        """Add a trial to the data of the model, which is first tested on it."""
        x, u, x_next, reward = (np.concatenate(parts) for parts in zip(*transitions, strict=True))
        states, controls, next_states, rewards = (
            torch.as_tensor(part, dtype=torch.float64, device=self.device)
            for part in (x, self.policy.scale_action(u), x_next, reward)
        )
        model = self.world_model
        if model.is_fitted:
            metrics.record_model_fit(self.logger, model, states, controls, next_states)
        model.add(states, controls, next_states, rewards, keep=self.max_points)

    def dump_logs(self) -> None:
        """Write everything recorded since the last dump; called once per `log_interval` trials."""
        self.logger.record("time/fps", record_progress(self))
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew", self.ep_info_buffer[-1]["r"])
        self.logger.record("time/trials", self._n_trials)
        self.logger.dump(step=self.num_timesteps)

    # ----------------------------------------------------------------------------------------
    # the policy search
    # ----------------------------------------------------------------------------------------

    def _improve_policy(self, callback: BaseCallback) -> None:
        """Fit the model and search the policy, the two phases of a trial that take time."""
        self._problem = self._find_problem()  # attributes may have been set since
        likelihoods = self.world_model.fit(max_evaluations=self.gp_evaluations)
        model = self._particle_model()
        if not self.policy.is_placed:
            self._problem.place(self.policy, self.world_model)
        settings = self._settings()
        title = f"trial {self._n_trials}: policy search on {self.world_model.n_points} points"
        with _search_bar(callback, title, settings.gradient_steps) as on_step:
            log = optimise_policy(self.policy, model, settings, self._generator, on_step)
        self._n_updates += len(log.losses)
        self._predicted = self._simulate_trial(model)
        log.record(self.logger, draw=self.tensorboard_log is not None)
        self.logger.record("train/learning_rate", settings.learning_rate)
        self.logger.record("train/n_updates", self._n_updates, exclude=QUIET)
        metrics.record_gp(self.logger, self.world_model, likelihoods)

    def _particle_model(self) -> ParticleModel:
        """The model that policies are searched in.

        Raises:
            ValueError: the agent was made with a cost_fn or termination and loaded without it.
        """
        if self._needs_cost_fn and self.cost_fn is None:
            raise ValueError(
                "this agent was made with a cost_fn, which is not in its file; "
                "pass it again: PIPPS.load(path, env=env, cost_fn=...)"
            )
        if self._needs_termination and self.termination is None:
            raise ValueError(
                "this agent was made with a termination, which is not in its file; "
                "pass it again: PIPPS.load(path, env=env, termination=...)"
            )
        if self._problem.cost is None:
            self.world_model.fit_reward(max_evaluations=self.gp_evaluations)
        mean, std = self._problem.start_distribution(
            self._start_observations, self.world_model.noise
        )
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
            learning_rate=self.lr_schedule(self._current_progress_remaining),
            gradient_steps=self.gradient_steps,
            n_particles=self.n_particles,
            horizon=self.horizon,
            resample=resample,
            fixed_noise=fixed_noise,
            adam_eps=self.adam_eps,
            momentum=self.momentum,
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

    def _simulate_trial(self, model: ParticleModel) -> np.ndarray:
        """States [H + 1, N, S] that the new policy is predicted to visit in the next trial."""
        size = self.horizon, self.n_particles, len(model.start_mean)
        noise = Noise.draw(*size, self._generator, resample=False)
        with torch.no_grad():
            _, _, states = simulate(model, self.policy, noise, estimators.make("rp"))
        return states.cpu().numpy()

    # ----------------------------------------------------------------------------------------
    # files
    # ----------------------------------------------------------------------------------------

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """In addition: the simulations' generator and the prediction for the next trial."""
        own = {"generator": self._generator.get_state(), "predicted": self._predicted}
        return {**super().state_dict(folder), **own}

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state, folder)
        self._generator.set_state(state["generator"])
        self._predicted = state["predicted"]

    def _excluded_save_params(self) -> list[str]:
        own = ["world_model", "cost_fn", "_problem", "_generator", "_predicted"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "dynamics", "reward_model"], []

    # ----------------------------------------------------------------------------------------
    # arguments
    # ----------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        """One sentence per wrong value, before any work is done."""
        check_arguments(self)
        if any(np.shape(x) != self.observation_space.shape for x in self._start_observations):
            raise ValueError("_start_observations in the file are not observations")
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
        if "angle_dims" in self.policy_kwargs:
            raise ValueError(
                "angle_dims is for model and policy: pass it to PIPPS, not in policy_kwargs"
            )
        self._check_spaces()
        self._check_estimator()

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

    def _check_spaces(self) -> None:
        space = self.observation_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            remedy = to_vector(space, otherwise="take DreamerTPX, which learns from images")
            raise ValueError(
                f"PIPPS models a vector of real numbers, got {describe(space)} as observation; "
                f"{remedy}"
            )
        actions: Any = self.action_space
        if (
            len(actions.shape) != 1
            or actions.dtype.kind != "f"
            or not (actions.low < actions.high).all()
        ):
            raise ValueError(
                "PIPPS needs a vector of real numbers as action, each with some room between its "
                f"bounds, got {describe(actions)} from {actions.low.tolist()} to "
                f"{actions.high.tolist()}"
            )
        self.refuse_vec_normalize(self.env)
        for name in ("angle_dims", "invariant_dims"):
            dims = getattr(self, name) or ()
            wrong = [d for d in dims if not 0 <= d < space.shape[0]]
            if wrong or len(set(dims)) < len(dims):
                raise ValueError(
                    f"{name} must be entries of the observation, "
                    f"0..{space.shape[0] - 1}, each once, "
                    f"got {list(dims)}"
                )


@contextmanager
def _search_bar(
    callback: BaseCallback, title: str, total: int
) -> Iterator[Callable[[int, float], None]]:
    """What to call after each gradient step; it fills a line below SB3's bar, if that is shown."""
    bars = [c for c in getattr(callback, "callbacks", ()) if isinstance(c, ProgressBarCallback)]
    progress = getattr(bars[0].pbar, "_prog", None) if bars else None  # rich's, of several lines
    if progress is None:
        yield lambda step, loss: None
        return
    task = progress.add_task(title, total=total)
    try:
        yield lambda step, loss: progress.update(
            task, advance=1, description=f"{title}, cost {loss:.2f}"
        )
    finally:
        progress.remove_task(task)
