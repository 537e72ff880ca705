"""What agents that learn from trials have in common: the loop, the data, the model and its files.

Loop: one episode on the real system -> fit the model to all data -> search a policy in the model ->
next episode. How the search predicts what a policy does, and how it follows the gradient, is the
agent's; the model is in world_models/gp_dynamics.py, cost and start are in problem.py.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
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

from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.memory import keep_freed_memory
from totalprop.agents.core.metrics import record_progress
from totalprop.agents.core.spaces import check_vectors
from totalprop.agents.core.validation import Above, AtLeast, Within, check_arguments, check_finite
from totalprop.agents.core.workers import explain_dead_workers
from totalprop.agents.trials import metrics
from totalprop.agents.trials.controllers import ControllerPolicy, LinearPolicy, RBFPolicy
from totalprop.agents.trials.problem import Problem, pairs_flaw, rewards_flaw
from totalprop.world_models.gp import ROUNDING, GaussianProcess, Kernel
from totalprop.world_models.gp_dynamics import GPDynamics

OnStep = Callable[[int, float], None]  # (number of the gradient step, cost)
SpeedIntegration = Literal["off", "auto", "on"]
SelfTrials = TypeVar("SelfTrials", bound="TrialAlgorithm")


class TrialAlgorithm(Algorithm):
    """Base of the agents that search a policy in a Gaussian-process model after each trial.

    An agent adds `_search`; the arguments are described where the agents have them.

    Attributes:
        kernel: of the dynamics' Gaussian processes; moments are known of "rbf" alone.
        unknown_end: what predictions do where episodes terminate and the agent was not told, and
            the remedy; the second half of a sentence.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "RBFPolicy": RBFPolicy,
        "LinearPolicy": LinearPolicy,
    }
    action_spaces = (spaces.Box,)
    fixed_arguments: ClassVar[tuple[str, ...]] = (
        "policy_kwargs", "angle_dims", "invariant_dims", "speed_integration", "integrated_dims",
        "time_step",
    )  # fmt: skip
    function_arguments: ClassVar[tuple[str, ...]] = ("cost_fn", "termination")
    no_vec_normalize: ClassVar[str] = (
        "the model is fitted to raw observations, whose scale VecNormalize keeps changing; "
        "pass the environment without VecNormalize (the GP scales its inputs itself)"
    )
    unknown_end: ClassVar[str]
    kernel: Kernel = "rbf"
    policy: ControllerPolicy

    def __init__(
        self,
        policy: str | type[ControllerPolicy],
        env: GymEnv | str | None,
        learning_rate: Annotated[float, AtLeast(0)] | Schedule,
        *,
        horizon: Annotated[int, AtLeast(1)],
        gradient_steps: Annotated[int, AtLeast(1)],
        random_trials: Annotated[int, AtLeast(1)],
        random_scale: Annotated[float, Within(0, 1)],
        cost_fn: Callable[[Tensor], Tensor] | None,
        termination: Callable[[Tensor], Tensor] | Literal["ignore"] | None,
        angle_dims: tuple[int, ...],
        invariant_dims: tuple[int, ...] | None,
        speed_integration: SpeedIntegration,
        integrated_dims: tuple[tuple[int, int], ...] | None,
        time_step: Annotated[float, Above(0)] | None,
        start_means: Sequence[Sequence[float]] | None,
        gp_evaluations: Annotated[int, AtLeast(1)],
        max_points: Annotated[int, AtLeast(0)],
        policy_kwargs: dict[str, Any] | None,
        stats_window_size: Annotated[int, AtLeast(1)],
        tensorboard_log: str | None,
        verbose: int,
        seed: int | None,
        device: torch.device | str,
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
        self.horizon, self.gradient_steps = horizon, gradient_steps
        self.random_trials, self.random_scale = random_trials, random_scale
        self.cost_fn, self.termination = cost_fn, termination
        for name, dims in (("angle_dims", angle_dims), ("invariant_dims", invariant_dims or ())):
            if not isinstance(dims, Iterable):
                raise ValueError(
                    f"{name} must be entries of the observation, e.g. (1,), got {dims!r}"
                )
        self.angle_dims = tuple(angle_dims)
        self.invariant_dims = None if invariant_dims is None else tuple(invariant_dims)
        self.speed_integration, self.integrated_dims = speed_integration, integrated_dims
        self.time_step, self.start_means = time_step, start_means
        self.gp_evaluations, self.max_points = gp_evaluations, max_points
        self._n_trials = 0
        self._search_due = False  # a trial has ended, and no search has followed yet
        # Of a trial that the end of `learn` interrupts, where the environment has no time limit.
        self._trial_steps, self._trial_returns = 0, np.zeros(0)
        self._needs_cost_fn = self._needs_termination = False
        self._warned_of_end = self._warned_of_cut = self._warned_of_rewards = False
        self._start_observations: list[np.ndarray] = []
        self._predicted: np.ndarray | None = None  # [H + 1, N, S] for the next trial

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
        if self.speed_integration != "off":
            self._complete_integration()
        elif self.integrated_dims or self.time_step is not None:  # an error would refuse old files
            warnings.warn(
                "integrated_dims and time_step have no effect, since speed integration is off: "
                "pass speed_integration='on', or leave them out",
                stacklevel=4,
            )
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
            integrated_dims=() if self.speed_integration == "off" else self.integrated_dims or (),
            time_step=self.time_step or 1.0,
            kernel=self.kernel,
            rounding=ROUNDING[kind],
        )
        self.world_model = model.to(self.device)
        self._fix_arguments()

    def _complete_integration(self) -> None:
        """What speed integration needs to know: given, or of the environment; or none if "auto".

        Raises:
            ValueError: neither says which entries are positions, or how long a step takes.
        """
        is_given = bool(self.integrated_dims)
        if self.integrated_dims is None:
            self.integrated_dims = self._problem.integrated_dims
        if self.time_step is None:
            self.time_step = self._problem.time_step
        if not self.integrated_dims or self.time_step is None:
            if self.speed_integration == "auto" and not is_given:
                self.integrated_dims = ()
                return
            raise ValueError(
                "speed integration needs the positions with their velocities and the time of a "
                "step, which this environment does not declare; pass integrated_dims=((position, "
                "velocity), ...), entries of the observation, and time_step=..., or choose "
                "speed_integration='auto' with neither"
            )
        self.integrated_dims = tuple((int(q), int(v)) for q, v in self.integrated_dims)

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
        self: SelfTrials,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfTrials:
        """Run trials until `total_timesteps` real steps are done; a policy search follows each.

        Random trials count. With 30-step episodes, 450 steps are the papers' 15 searches, the last
        one on all data. Simulated steps neither count nor trigger callbacks. A trial in an
        environment without a time limit (gymnasium's TimeLimit) is truncated after `horizon` steps.

        Args:
            total_timesteps: real environment steps; exact up to the number of environments.
            callback: as in stable-baselines3.
            log_interval: trials between log dumps.
            tb_log_name: as in stable-baselines3; by default the agent's name.
            reset_num_timesteps: as in stable-baselines3.
            progress_bar: as in stable-baselines3, with a line below for each policy search, which
                is where the time goes.

        Raises:
            ValueError: an observation or reward is not finite.
            RuntimeError: an environment's process died.
        """
        tb_log_name = tb_log_name or type(self).__name__
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
            is_random = self._n_trials < self.random_trials
            if self._search_due or not (is_random or self.policy.is_placed):
                # A callback stopped an earlier `learn` at the end of a trial.
                self._improve_policy(callback)
            if not self._collect_trial(callback, total_timesteps):
                break
            if self._search_due:
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
        found += self._remarks()
        for text in found:
            warnings.warn(text, stacklevel=4)

    def _remarks(self) -> list[str]:
        """What else the agent has to say at the start."""
        return []

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
        begins = bool(np.asarray(self._last_episode_starts).all())
        if begins or len(self._trial_returns) != self.env.num_envs:  # older files have none
            self._trial_steps, self._trial_returns = 0, np.zeros(self.env.num_envs)
        while (
            not finished.all()
            and self.num_timesteps < total_timesteps
            and self._trial_steps < limit
        ):
            observations = np.array(self._last_obs)
            if is_random:
                actions = np.stack([self._random_action() for _ in finished])
            else:
                actions, _ = self.predict(observations)
            new_obs, rewards, dones, infos = self.env.step(actions)
            self.num_timesteps += self.env.num_envs
            self._trial_steps += 1
            self._trial_returns += np.where(finished, 0, rewards)
            next_observations = np.array(new_obs)
            for i in np.flatnonzero(dones):  # already reset: take the true end
                next_observations[i] = infos[i]["terminal_observation"]
            check_finite(self.num_timesteps, next_observations, rewards)
            starts = np.asarray(self._last_episode_starts, dtype=bool)
            self._start_observations.extend(observations[starts])
            transitions.append((observations, actions, next_observations, rewards, dones))
            if not finished[0]:
                path.append(next_observations)
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones
            finished |= dones
            self._warn_of_end(dones, infos)
            if finished.all():  # before a callback that may save the agent
                self._end_trial(transitions)
            callback.update_locals(locals())
            if not callback.on_step():
                if not finished.all():
                    self._store(transitions)
                return False
            self._update_info_buffer(infos, dones)
        if not finished.all():
            self._end_trial(transitions)
        if finished.all() or self._trial_steps >= limit:
            self.logger.record("rollout/ep_rew", float(self._trial_returns.mean()))
        if finished.all():
            self._trial_steps = 0
        elif self._trial_steps >= limit:
            self._truncate(finished)
        if self._predicted is not None and from_start and self.tensorboard_log is not None:
            seen = np.stack(path)[:, 0]
            metrics.record_prediction(self.logger, self._problem, self._predicted, seen)
        callback.on_rollout_end()
        return True

    def _end_trial(self, transitions: Sequence[tuple[np.ndarray, ...]]) -> None:
        self._store(transitions)
        self._n_trials += 1
        self._search_due = self._n_trials >= self.random_trials

    def _random_action(self) -> np.ndarray:
        action: np.ndarray = self.action_space.sample()
        if self.random_scale == 1:
            return action
        assert isinstance(self.action_space, spaces.Box)
        middle = (self.action_space.low + self.action_space.high) / 2
        return (middle + self.random_scale * (action - middle)).astype(action.dtype)

    def _truncate(self, finished: np.ndarray) -> None:
        """Begin new episodes; the running ones of this trial count as truncated."""
        assert self.env is not None
        if not self._warned_of_cut:
            self._warned_of_cut = True
            warnings.warn(
                f"the environment declares no time limit: a trial is truncated after "
                f"horizon={self.horizon} steps; gymnasium.wrappers.TimeLimit sets another one",
                stacklevel=4,
            )
        for sum_of_rewards in self._trial_returns[~finished]:
            episode = {"r": float(sum_of_rewards), "l": self._trial_steps, "t": 0.0}
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
                f"an episode terminated at step {self.num_timesteps}, but {self.unknown_end}",
                stacklevel=4,
            )

    def _store(self, transitions: Sequence[tuple[np.ndarray, ...]]) -> None:
        """Add a trial to the data of the model, which is first tested on it."""
        x, u, x_next, reward, done = map(np.concatenate, zip(*transitions, strict=True))
        states, controls, next_states, rewards = (
            torch.as_tensor(part, dtype=torch.float64, device=self.device)
            for part in (x, self.policy.scale_action(u), x_next, reward)
        )
        self._warn_of_costs(next_states, rewards, torch.as_tensor(done, device=self.device))
        model = self.world_model
        if model.is_fitted:
            metrics.record_model_fit(self.logger, model, states, controls, next_states)
        model.add(states, controls, next_states, rewards, keep=self.max_points)

    def _warn_of_costs(self, next_states: Tensor, rewards: Tensor, done: Tensor) -> None:
        """Say once that the environment's own cost, which is minimised, is not its rewards."""
        cost = self._problem.cost
        if cost is None or self.cost_fn is not None or self._warned_of_rewards:
            return
        flaw = rewards_flaw(cost, next_states[~done], rewards[~done])
        if flaw is not None:
            self._warned_of_rewards = True
            warnings.warn(
                f"{flaw}; the policy is optimised for the cost. Make them agree, or take `cost` "
                "out of the environment: it is then learned from the rewards",
                stacklevel=5,
            )

    def dump_logs(self) -> None:
        """Write everything recorded since the last dump; called once per `log_interval` trials."""
        self.logger.record("time/fps", record_progress(self))
        self.logger.record("time/trials", self._n_trials)
        self.logger.dump(step=self.num_timesteps)

    # ----------------------------------------------------------------------------------------
    # the policy search
    # ----------------------------------------------------------------------------------------

    def _improve_policy(self, callback: BaseCallback) -> None:
        """Fit the model and search the policy, the two phases of a trial that take time."""
        self._problem = self._find_problem()  # attributes may have been set since
        likelihoods = self.world_model.fit(max_evaluations=self.gp_evaluations)
        self._check_given_again()
        if not self.policy.is_placed:
            self._problem.place(self.policy, self.world_model, means=self.start_means)
        title = f"trial {self._n_trials}: policy search on {self.world_model.n_points} points"
        with _search_bar(callback, title, self.gradient_steps) as show:

            def on_step(step: int, cost: float) -> None:
                self.phase = f"{title}, {step + 1} of {self.gradient_steps}, cost {cost:.2f}"
                show(step, cost)

            self._n_updates += self._search(on_step)
            self.phase = ""
        self._search_due = False
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        metrics.record_gp(self.logger, self.world_model, likelihoods)

    @abstractmethod
    def _search(self, on_step: OnStep) -> int:
        """Improve the policy in the model, set `_predicted` and log what happened.

        Args:
            on_step: called after each gradient step.

        Returns:
            Gradients that were evaluated.
        """

    def _start(self) -> tuple[Tensor, Tensor]:
        """Mean [S], or means [M, S], and standard deviation [S] that predictions start from."""
        model = self.world_model
        # Of an integrated position: what its velocity's noise makes of it in a step.
        noise = model.complete(model.noise.new_zeros(model.n_states), model.noise)
        return self._problem.start_distribution(
            self._start_observations, noise, means=self.start_means
        )

    # ----------------------------------------------------------------------------------------
    # files
    # ----------------------------------------------------------------------------------------

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """In addition: the generator of the agent's own and the prediction for the next trial."""
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
        if "angle_dims" in self.policy_kwargs:
            raise ValueError(
                f"angle_dims is for model and policy: pass it to {type(self).__name__}, not in "
                "policy_kwargs"
            )
        self._check_spaces()
        flaw = pairs_flaw(self.integrated_dims or (), self.observation_space.shape[0])  # type: ignore[index]
        if flaw is not None:
            raise ValueError(f"integrated_dims must be {flaw}, got {self.integrated_dims!r}")
        self._check_start_means()

    def _check_start_means(self) -> None:
        if self.start_means is None:
            return
        n = self.observation_space.shape[0]  # type: ignore[index]
        try:
            means = np.asarray(self.start_means, np.float64)
        except (TypeError, ValueError):
            means = np.zeros(0)
        if means.ndim != 2 or means.shape[1] != n or not len(means) or not np.isfinite(means).all():
            raise ValueError(
                f"start_means must be one or more observations of {n} numbers each, "
                f"got {self.start_means!r}"
            )
        self.start_means = tuple(map(tuple, means.tolist()))

    def _check_spaces(self) -> None:
        size = check_vectors(type(self).__name__, self.observation_space, self.action_space)
        for name in ("angle_dims", "invariant_dims"):
            dims = getattr(self, name) or ()
            wrong = [d for d in dims if not 0 <= d < size]
            if wrong or len(set(dims)) < len(dims):
                raise ValueError(
                    f"{name} must be entries of the observation, 0..{size - 1}, each once, got "
                    f"{list(dims)}"
                )


@contextmanager
def _search_bar(callback: BaseCallback, title: str, total: int) -> Iterator[OnStep]:
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
