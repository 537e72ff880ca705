"""PIPPS: policy search in a Gaussian-process model, with a plug-in policy gradient.

Loop: one episode on the real system -> fit the model to all data -> optimise the policy on
simulated particles -> next episode. Parmas, Rasmussen, Peters & Doya 2018 (PIPPS); Parmas, Seno &
Aoki 2023 (TPX), App. B. The simulation is in particles.py, the optimiser in policy_search.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor
from tqdm import tqdm

from totalprop import estimators
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.memory import keep_freed_memory
from totalprop.agents.core.validation import check_finite
from totalprop.agents.core.workers import explain_dead_workers
from totalprop.agents.pipps import metrics as trial_log
from totalprop.agents.pipps import problem as task
from totalprop.agents.pipps.particles import Noise, ParticleModel, simulate
from totalprop.agents.pipps.search import OptimizerName, SearchSettings, optimise_policy
from totalprop.agents.pipps.validation import NO_VEC_NORMALIZE, check_arguments, resolve, variant
from totalprop.agents.trials.controllers import (
    ControllerPolicy,
    LinearPolicy,
    RBFPolicy,
    trig_features,
)
from totalprop.estimators import Estimator
from totalprop.world_models.gp import GaussianProcess

SelfPIPPS = TypeVar("SelfPIPPS", bound="PIPPS")


class PIPPS(Algorithm):
    """Particle model-based policy search on any environment with Box observations and actions.

    Args:
        policy: "RBFPolicy" (both papers, cart-pole) or "LinearPolicy" (unicycle), or a class.
        env: environment or id. Where it has a differentiable `cost(states)` and an
            `initial_distribution` (mean, std), simulations use them.
        learning_rate: step size of the policy optimiser, or a schedule of the training's progress.
        estimator: a name of the registry ("rp", "lr", "tp", "tps", "tpx", "tpg", ...), "gr"
            (Gaussian resampling), "rp-fs" or "gr-fs" (fixed noise and a quasi-Newton optimiser), or
            an `estimators.Estimator`.
        leg: how the likelihood ratio is formed, "score" or "biw" (batch importance weighting).
        cross_fit: choose k for each half of the particles from the other half. An
            `estimators.Estimator` brings both itself.
        n_particles: simulated particles N.
        horizon: simulated steps H; the papers use the length of the real episode.
        gradient_steps: policy updates after each trial.
        optimizer: "adam" (2023), "rmsprop2018" (2018, Sec. 3.3) or "quasi-newton" (L-BFGS, which
            needs fixed noise and is implied by "rp-fs" and "gr-fs"). "rmsprop2018" divides by the
            gradient's variance, which it underestimates with "gr", whose particles depend on each
            other.
        adam_eps: Adam's epsilon.
        momentum: of "rmsprop2018", in [0, 1).
        random_trials: first episodes with uniformly random actions.
        cost_fn: differentiable cost of the next states, [..., S] -> [...] (torch, float64). Without
            it the environment's own `cost` is used; if it has none, a GP is fitted to the rewards.
        angle_dims: observation entries that are angles: model and policy see sine and cosine.
        model_uncertainty: particles spread by the GP's own uncertainty; off: "TP - σ_f" of 2018.
        noise_multiplier: factor on the learned noise variance in simulation; 100: "TP + σ_n".
        gp_evaluations: likelihood evaluations per output and fit.
        max_points: newest real steps that the model is made of; 0 for all, as in the papers. It
            bounds the memory and time of many trials: a fit takes time in the number's cube.
        policy_kwargs: of the policy class, for example {"n_centres": 50}.
        stats_window_size: episodes that rollout/ep_rew_mean averages over.
        tensorboard_log: folder for TensorBoard events, or None.
        verbose: 1 prints the logged scalars.
        seed: of everything random; the same seed gives the same run on the same CPU.
        device: "cpu", "cuda", or "auto" for a GPU if there is one. All is float64.

    Raises:
        ValueError: a value out of range, with what was expected. Spaces other than Box raise
            stable-baselines3's AssertionError.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "RBFPolicy": RBFPolicy,
        "LinearPolicy": LinearPolicy,
    }
    policy: ControllerPolicy

    def __init__(
        self,
        policy: str | type[ControllerPolicy] = "RBFPolicy",
        env: GymEnv | str | None = None,
        learning_rate: float | Schedule = 0.03,
        estimator: str | Estimator = "tpx",
        *,
        leg: Literal["score", "biw"] = "score",
        cross_fit: bool = False,
        n_particles: int = 300,
        horizon: int = 30,
        gradient_steps: int = 250,
        optimizer: OptimizerName = "adam",
        adam_eps: float = 1e-4,
        momentum: float = 0.9,
        random_trials: int = 1,
        cost_fn: Callable[[Tensor], Tensor] | None = None,
        angle_dims: tuple[int, ...] = (),
        model_uncertainty: bool = True,
        noise_multiplier: float = 1.0,
        gp_evaluations: int = 200,
        max_points: int = 0,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
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
            supported_action_spaces=(spaces.Box,),
        )
        self.estimator = estimator
        self.leg, self.cross_fit = leg, cross_fit
        self.n_particles, self.horizon = n_particles, horizon
        self.gradient_steps, self.optimizer = gradient_steps, optimizer
        self.adam_eps, self.momentum = adam_eps, momentum
        self.random_trials = random_trials
        self.cost_fn = cost_fn
        if not isinstance(angle_dims, Iterable):
            raise ValueError(
                f"angle_dims must be entries of the observation, e.g. (1,), got {angle_dims!r}"
            )
        self.angle_dims = tuple(angle_dims)
        self.model_uncertainty, self.noise_multiplier = model_uncertainty, noise_multiplier
        self.gp_evaluations, self.max_points = gp_evaluations, max_points
        self._n_trials = 0
        self._needs_cost_fn = False
        self._start_observations: list[np.ndarray] = []
        self._predicted: np.ndarray | None = None  # [H + 1, N, S] for the next trial
        if _init_setup_model:
            self._setup_model()

    # ----------------------------------------------------------------------------------------
    # set-up
    # ----------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        self.angle_dims = tuple(self.angle_dims)  # a list where it comes from a file
        check_arguments(self)
        self._needs_cost_fn |= self.cost_fn is not None  # or it was given to `load`
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        kwargs = {"angle_dims": self.angle_dims, **self.policy_kwargs}
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **kwargs
        ).to(self.device)
        states, controls = self.observation_space.shape[0], self.action_space.shape[0]  # type: ignore[index]
        inputs = states + len(self.angle_dims) + controls
        self.dynamics = GaussianProcess(inputs, states).to(self.device)
        self.reward_model = GaussianProcess(inputs, 1).to(self.device)

    def set_random_seed(self, seed: int | None = None) -> None:
        """As in stable-baselines3; the simulations' noise, too."""
        super().set_random_seed(seed)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def _settings(self) -> SearchSettings:
        resample, fixed_noise = variant(self)
        return SearchSettings(
            estimator=resolve(self),
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

        The random trials count. With 30-step episodes, 450 steps are the papers' 15 searches, the
        last one on all data. Simulated steps neither count nor trigger callbacks.

        Args:
            total_timesteps: real environment steps; exact up to the number of environments.
            callback, tb_log_name, reset_num_timesteps: as in stable-baselines3.
            log_interval: trials between log dumps.
            progress_bar: a bar for each policy search, which is where the time goes.
        Raises:
            ValueError: an observation or reward is not finite.
            RuntimeError: an environment's process died.
        """
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar=False
        )
        if self.device.type == "cpu":
            keep_freed_memory()
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps:
            # Before the trial: at its end the last search would have no progress left, and no step.
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            if self._n_trials >= self.random_trials and not self.policy.is_placed:
                self._improve_policy(progress_bar)  # a callback's stop came before the first search
            if not self._collect_trial(callback, total_timesteps):
                break
            if self._n_trials >= self.random_trials:
                self._improve_policy(progress_bar)
            if log_interval and self._n_trials % log_interval == 0:
                self.dump_logs()
        callback.on_training_end()
        return self

    def _collect_trial(self, callback: BaseCallback, total_timesteps: int) -> bool:
        """One episode of every environment; False if a callback stopped the training."""
        assert self.env is not None and self._last_obs is not None
        callback.on_rollout_start()
        is_random = self._n_trials < self.random_trials
        finished = np.zeros(self.env.num_envs, dtype=bool)
        check_finite(self.num_timesteps, np.array(self._last_obs), np.zeros(1))
        path, transitions = [np.array(self._last_obs)], []
        from_start = bool(np.asarray(self._last_episode_starts)[0])
        while not finished.all() and self.num_timesteps < total_timesteps:
            observations = np.array(self._last_obs)
            if is_random:
                actions = np.stack([self.action_space.sample() for _ in finished])
            else:
                actions, _ = self.predict(observations)
            new_observations, rewards, dones, infos = self.env.step(actions)
            self.num_timesteps += self.env.num_envs
            next_observations = np.array(new_observations)
            for i in np.flatnonzero(dones):  # the vector environment has reset: take the true end
                next_observations[i] = infos[i]["terminal_observation"]
            check_finite(self.num_timesteps, next_observations, rewards)
            starts = np.asarray(self._last_episode_starts, dtype=bool)
            self._start_observations.extend(observations[starts])
            transitions.append((observations, actions, next_observations, rewards))
            if not finished[0]:
                path.append(next_observations)
            self._last_obs = new_observations  # type: ignore[assignment]
            self._last_episode_starts = dones
            finished |= dones
            callback.update_locals(locals())
            if not callback.on_step():
                self._n_trials += int(finished.all())
                self._store(transitions)
                return False
            self._update_info_buffer(infos, dones)
        self._n_trials += 1
        self._store(transitions)
        if self._predicted is not None and from_start:
            trial_log.record_prediction(self, np.stack(path)[:, 0])
        callback.on_rollout_end()
        return True

    def _store(self, transitions: Sequence[tuple[np.ndarray, ...]]) -> None:
        """Append a trial to the data of the dynamics and the reward model."""
        flat = [np.concatenate(parts) for parts in zip(*transitions, strict=True)]
        scaled = self.policy.scale_action(flat[1])
        x, u, x_next, reward = (
            torch.as_tensor(a, dtype=torch.float64, device=self.device)
            for a in (flat[0], scaled, flat[2], flat[3])
        )
        before = torch.cat((trig_features(x, self.angle_dims), u), -1)
        after = torch.cat((trig_features(x_next, self.angle_dims), u), -1)
        if self.dynamics.is_fitted:
            trial_log.record_model_fit(self, before, x_next - x)
        self.dynamics.add_data(before, x_next - x, keep=self.max_points)
        self.reward_model.add_data(after, reward.unsqueeze(-1), keep=self.max_points)

    def _improve_policy(self, show_progress: bool) -> None:
        """Fit the model and search the policy; the two phases of a trial that take time."""
        likelihoods = self.dynamics.fit(max_evaluations=self.gp_evaluations)
        model = task.particle_model(self)
        if not self.policy.is_placed:
            task.place_policy(self, model)
        settings = self._settings()
        with tqdm(
            total=settings.gradient_steps,
            desc=f"trial {self._n_trials}: policy search on {len(self.dynamics.inputs)} points",
            disable=not show_progress,
            leave=False,
        ) as bar:

            def on_step(step: int, loss: float) -> None:
                bar.update()
                bar.set_postfix(cost=f"{loss:.2f}", refresh=False)

            log = optimise_policy(self.policy, model, settings, self._generator, on_step)
        self._n_updates += len(log.losses)
        self._remember_prediction(model)
        trial_log.record_search(self, log, likelihoods)

    def _remember_prediction(self, model: ParticleModel) -> None:
        """Simulate the new policy once more, to be compared with the next trial."""
        size = self.horizon, self.n_particles, len(model.start_mean)
        noise = Noise.draw(*size, self._generator, resample=False)
        with torch.no_grad():
            _, _, states = simulate(model, self.policy, noise, estimators.make("rp"))
        self._predicted = states.cpu().numpy()

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """As in stable-baselines3; raises ValueError for VecNormalize."""
        if isinstance(env, VecEnv) and unwrap_vec_normalize(env) is not None:
            raise ValueError(NO_VEC_NORMALIZE)
        super().set_env(env, force_reset)

    def dump_logs(self) -> None:
        """Write everything recorded since the last dump; called once per `log_interval` trials."""
        trial_log.record_progress(self)
        self.logger.dump(step=self.num_timesteps)

    # ----------------------------------------------------------------------------------------
    # saving
    # ----------------------------------------------------------------------------------------

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Beside the rest: the generator, and the prediction of the next trial."""
        own = {"generator": self._generator.get_state(), "predicted": self._predicted}
        return {**super().state_dict(folder), **own}

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state, folder)
        self._generator.set_state(state["generator"])
        self._predicted = state["predicted"]

    def _excluded_save_params(self) -> list[str]:
        own = ["dynamics", "reward_model", "cost_fn", "_generator", "_predicted"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "dynamics", "reward_model"], []
