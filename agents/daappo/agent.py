"""DAAPPO: PPO whose gradient uses several actions at every visited state.

The collection, the buffer and the value loss are stable-baselines3's. After each rollout a source
(a learned model, a Q-network, the environment rewound) draws extra actions from the same policy at
the same states and values them; the clipped loss runs over real and extra actions. Nauman & Cygan
2022, "On All-Action Policy Gradients". With action_source="none" it is stable-baselines3's PPO.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import totalprop.estimators as estimators
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.validation import (
    Above,
    AtLeast,
    Finite,
    Within,
    check_arguments,
    try_estimator,
)
from totalprop.agents.core.workers import explain_dead_workers
from totalprop.agents.daappo.loss import extra_loss, normalised, truncated_advantages
from totalprop.agents.daappo.policy import TanhMeanPolicy
from totalprop.agents.daappo.recorder import ManyActionRolloutBuffer, RolloutRecorder
from totalprop.agents.daappo.sources import (
    Behaviour,
    DynamicsSource,
    ExtraActions,
    QSource,
    Returns,
    RewindSource,
    Rollout,
    Source,
    StatesSource,
    Units,
    ValueModel,
)
from totalprop.agents.persistence import env_state
from totalprop.agents.persistence.segments import Segments
from totalprop.estimators import Estimator
from totalprop.world_models.mlp_dynamics import Activation, MLPDynamics, Target
from totalprop.world_models.mlp_dynamics import fit as fit_dynamics
from totalprop.world_models.q_networks import QNetworks
from totalprop.world_models.transitions import TransitionBuffer

DIFFERENTIABLE = ("dynamics", "q")  # whose advantage has a gradient in the action
SelfDAAPPO = TypeVar("SelfDAAPPO", bound="DAAPPO")
FIRST_HORIZON = 2  # where a growing horizon starts (the authors' code)


class DAAPPO(Algorithm, PPO):
    """PPO with many actions per state, on Box vectors and Box actions.

    Args:
        policy: "MlpPolicy", "TanhMeanPolicy" (tanh on the mean), or a subclass of them.
        env: environment or id; observations are vectors.
        learning_rate: step size of policy and critic, or a schedule over training progress.
        n_steps: steps of each environment per rollout.
        batch_size: states per minibatch.
        n_epochs: passes over a rollout.
        gamma: discount per decision.
        gae_lambda: λ of generalised advantage estimation.
        clip_range: clipping range of the probability ratio, or a schedule of it.
        clip_range_vf: clipping range of the value's change, in the returns' units, or a schedule of
            it; None for no clipping.
        normalize_advantage: standardise the advantages of each minibatch.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value loss.
        max_grad_norm: global-norm clip of the gradient.
        target_kl: approximate KL divergence at which an update's epochs stop; None for no limit.
        action_source: where extra actions are valued: "dynamics" (DAA: a learned model), "q" (QAA:
            Q-networks), "rewind" (AA: the environment itself), "states" (simulated states), or
            "none" (PPO).
        n_extra_actions: extra actions K per state, besides the real one. The papers' N counts
            differently: it is K for DAA and K + 1 for AA.
        simulation_horizon: steps H that an extra action is followed.
        grow_fraction: fraction of training over which K grows from 1 and H from 2 to their values,
            counted from `dynamics_warmup`.
        estimator: gradient of the extra actions: a name in the registry or an
            `estimators.Estimator`. "lr" is the papers'; others ("tpx", "rp", ...) mix in the
            gradient of the value through the model or Q-network, per state over its K actions.
        real_advantage: advantage of the real action: "gae", or "matched_horizon", over the same H
            steps as the extra ones.
        extra_baseline: baseline of the extra actions' advantages: "critic" (the papers), or
            "leave-one-out", which also subtracts the mean of the state's other extra actions, and
            with it what critic and model get wrong about the state. "states" has one action per
            state and keeps the critic.
        timeout_bootstrap: bootstrap from the value after a time limit, as SB3 does; otherwise the
            limit counts as an end.
        separate_grad_clip: clip the gradient norms of policy and critic separately.
        dynamics_target: what the model predicts of the next state: "delta" (the difference) or
            "next".
        dynamics_normalise: standardise the model's inputs and targets.
        dynamics_width: hidden units of transition, reward and Q-networks.
        dynamics_activation: their activation, "relu" or "leaky_relu".
        dynamics_learning_rate: step size of their Adam.
        dynamics_eps: epsilon of their Adam.
        dynamics_batch_size: transitions per batch of the model's fit.
        dynamics_steps: gradient steps after each rollout; 0: as many as the policy takes (epochs x
            minibatches).
        dynamics_buffer_size: newest transitions that are kept.
        dynamics_warmup: steps before extra actions are used.
        n_q: Q-networks, of which the smallest value counts.
        policy_kwargs: arguments of the policy class, for example {"net_arch": [256, 256]}.
        stats_window_size: episodes that rollout/ep_rew_mean averages over.
        tensorboard_log: folder for TensorBoard events, or None.
        verbose: 1 prints the logged scalars.
        seed: seeds everything random; the same seed gives the same run on the same CPU.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Raises:
        ValueError: a value out of range, with what was expected.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        **PPO.policy_aliases,
        "TanhMeanPolicy": TanhMeanPolicy,
    }
    rollout_buffer: ManyActionRolloutBuffer

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: Annotated[float, Above(0)] | Schedule = 3e-4,
        n_steps: Annotated[int, AtLeast(1)] = 2048,
        batch_size: Annotated[int, AtLeast(1)] = 64,
        n_epochs: Annotated[int, AtLeast(1)] = 10,
        gamma: Annotated[float, Within(0, 1)] = 0.99,
        gae_lambda: Annotated[float, Within(0, 1)] = 0.95,
        clip_range: Annotated[float, Above(0)] | Schedule = 0.2,
        clip_range_vf: Annotated[float, Above(0)] | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: Annotated[float, Finite()] = 0.0,
        vf_coef: Annotated[float, AtLeast(0)] = 0.5,
        max_grad_norm: Annotated[float, Above(0)] = 0.5,
        target_kl: Annotated[float, Above(0)] | None = None,
        *,
        action_source: Literal["none", "dynamics", "q", "rewind", "states"] = "dynamics",
        n_extra_actions: Annotated[int, AtLeast(1)] = 4,
        simulation_horizon: Annotated[int, AtLeast(1)] = 8,
        grow_fraction: Annotated[float, Within(0, 1)] = 0.0,
        estimator: str | Estimator = "lr",
        real_advantage: Literal["gae", "matched_horizon"] = "gae",
        extra_baseline: Literal["critic", "leave-one-out"] = "critic",
        timeout_bootstrap: bool = True,
        separate_grad_clip: bool = False,
        dynamics_target: Target = "delta",
        dynamics_normalise: bool = True,
        dynamics_width: Annotated[int, AtLeast(1)] = 512,
        dynamics_activation: Activation = "relu",
        dynamics_learning_rate: Annotated[float, Above(0)] = 7e-4,
        dynamics_eps: Annotated[float, Above(0)] = 1e-5,
        dynamics_batch_size: Annotated[int, AtLeast(1)] = 256,
        dynamics_steps: Annotated[int, AtLeast(0)] = 0,
        dynamics_buffer_size: Annotated[int, AtLeast(1)] = 50_000,
        dynamics_warmup: Annotated[int, AtLeast(0)] = 0,
        n_q: Annotated[int, AtLeast(1)] = 2,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: Annotated[int, AtLeast(1)] = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy, env,  # type: ignore[arg-type]  # None is what `load` passes
            learning_rate, n_steps, batch_size, n_epochs, gamma, gae_lambda,
            clip_range, clip_range_vf, normalize_advantage, ent_coef, vf_coef, max_grad_norm,
            target_kl=target_kl, policy_kwargs=policy_kwargs, stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log, verbose=verbose, seed=seed, device=device,
            _init_setup_model=False,
        )  # fmt: skip
        self.action_source, self.estimator = action_source, estimator
        self.n_extra_actions, self.simulation_horizon = n_extra_actions, simulation_horizon
        self.grow_fraction, self.real_advantage = grow_fraction, real_advantage
        self.extra_baseline = extra_baseline
        self.timeout_bootstrap, self.separate_grad_clip = timeout_bootstrap, separate_grad_clip
        self.dynamics_target, self.dynamics_normalise = dynamics_target, dynamics_normalise
        self.dynamics_width, self.dynamics_activation = dynamics_width, dynamics_activation
        self.dynamics_learning_rate = dynamics_learning_rate
        self.dynamics_eps, self.dynamics_batch_size = dynamics_eps, dynamics_batch_size
        self.dynamics_steps, self.dynamics_buffer_size = dynamics_steps, dynamics_buffer_size
        self.dynamics_warmup, self.n_q = dynamics_warmup, n_q
        self.source: Source | None = None
        self.value_model: ValueModel | None = None
        self.value_optimizer: torch.optim.Optimizer | None = None
        if _init_setup_model:
            self._setup_model()

    # ----------------------------------------------------------------------------------------
    # set-up
    # ----------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        self._check_arguments()
        is_ppo = self.action_source == "none" and not self.separate_grad_clip
        self.rollout_buffer_class = None if is_ppo else ManyActionRolloutBuffer
        super()._setup_model()
        if self.action_source == "none":
            return
        n_actions = spaces.utils.flatdim(self.action_space)
        self.transitions = TransitionBuffer(self.dynamics_buffer_size, self.state_size, n_actions)
        self._transition_files = Segments("transitions")
        with torch.random.fork_rng():
            torch.manual_seed(self._generator.initial_seed())
            self.value_model = self._new_value_model()
        if self.value_model is not None:
            self.value_optimizer = torch.optim.Adam(
                self.value_model.parameters(), self.dynamics_learning_rate, eps=self.dynamics_eps
            )
        self.source = self._new_source()

    def set_random_seed(self, seed: int | None = None) -> None:
        """Like SB3's, and also seed what extra actions and models draw."""
        super().set_random_seed(seed)
        self._rng = np.random.default_rng(self._generator.initial_seed())

    def _draw_seed(self) -> int:
        # Not from torch: policy and minibatches draw what they would without extra actions.
        return int(np.random.default_rng().integers(2**31))

    @property
    def state_size(self) -> int:
        """Entries of an observation."""
        return spaces.utils.flatdim(self.observation_space)

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        total, callbacks = super()._setup_learn(total_timesteps, callback, *args, **kwargs)
        if self.action_source == "none" and self.timeout_bootstrap:
            return total, callbacks
        transitions = None if self.action_source == "none" else self.transitions
        self._recorder = RolloutRecorder(
            self.source, transitions, timeout_bootstrap=self.timeout_bootstrap
        )
        both = CallbackList([callbacks, self._recorder])
        both.model = self  # not init_callback: the user's callbacks have been through it
        self._recorder.init_callback(self)
        return total, both

    # ----------------------------------------------------------------------------------------
    # the loop
    # ----------------------------------------------------------------------------------------

    def train(self) -> None:
        """Fit the model, draw the extra actions, then PPO's epochs over all of them.

        Raises:
            FloatingPointError: a parameter of policy or critic has become NaN or infinite.
        """
        self._train()
        for name, parameter in self.policy.named_parameters():
            if not torch.isfinite(parameter).all():
                raise FloatingPointError(
                    f"'{name}' is not finite after the update at step {self.num_timesteps}; go on "
                    "from a checkpoint with a smaller learning_rate or max_grad_norm"
                )

    def _train(self) -> None:
        if self.action_source == "none":
            if self.separate_grad_clip:
                self._train_epochs()
            else:
                super().train()
            return
        self.policy.set_training_mode(False)
        buffer = self.rollout_buffer
        buffer.extra = self._extra_actions()
        self.logger.record("train/extra_actions", self.k if buffer.extra is not None else 0)
        self.logger.record("train/simulation_horizon", self.horizon)
        self._train_epochs()

    def _extra_actions(self) -> Any:
        """None while the model is not used yet."""
        buffer = self.rollout_buffer
        assert self.source is not None

        def flat(x: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(buffer.swap_and_flatten(x), device=self.device)

        observations = flat(buffer.observations).float()
        states = torch.as_tensor(self._recorder.flat_states(), device=self.device)
        rollout = Rollout(observations, states, flat(buffer.values)[:, 0])
        behaviour = Behaviour(
            self.policy, Units(self.get_vec_normalize_env(), self.device), self._generator
        )
        actions, targets = flat(buffer.actions).float(), flat(buffer.returns)[:, 0]
        self._fit_value_model(rollout, behaviour, actions, targets)
        if self.num_timesteps < self.dynamics_warmup:
            return None
        returns = Returns(self.gamma, self.gae_lambda, self.horizon)
        if self.real_advantage == "matched_horizon":
            buffer.advantages[:] = truncated_advantages(buffer, self.horizon)
        gradient = self._resolved_estimator().needs_pathwise
        extra = self.source(rollout, behaviour, self.k, returns, gradient=gradient)
        if self._compares_actions():
            extra = extra.against_the_others()
        if isinstance(self.source, RewindSource):
            self.logger.record("time/extra_env_steps", self.source.extra_steps)
        return extra

    @property
    def k(self) -> int:
        """Extra actions per state now."""
        grown = int(self._grown * self.n_extra_actions) + 1
        return min(self.n_extra_actions, max(grown, self._least_actions()))

    @property
    def horizon(self) -> int:
        """Steps that an extra action is followed now."""
        return min(
            self.simulation_horizon, int(self._grown * self.simulation_horizon) + FIRST_HORIZON
        )

    @property
    def _grown(self) -> float:
        """0 until the model is used, 1 from `grow_fraction` of the training after that."""
        if self.grow_fraction == 0:
            return 1.0
        warmup = self.dynamics_warmup / max(self._total_timesteps, 1)
        done = max(1 - self._current_progress_remaining - warmup, 0.0)
        return min(done / self.grow_fraction, 1.0)

    # ----------------------------------------------------------------------------------------
    # environments and files
    # ----------------------------------------------------------------------------------------

    @explain_dead_workers
    def learn(
        self: SelfDAAPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "DAAPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDAAPPO:
        """As in stable-baselines3; steps are those of the environment, extra ones not counted."""
        self._log_interval = log_interval
        return super().learn(
            total_timesteps, callback, 1, tb_log_name, reset_num_timesteps, progress_bar
        )

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kw: Any) -> bool:
        """As in stable-baselines3, but that a callback's stop does not lose the last step."""
        if super().collect_rollouts(env, callback, *args, **kw):
            return True
        self._last_obs = callback.locals["new_obs"]
        self._last_episode_starts = callback.locals["dones"]
        return False

    def set_env(self, env: GymEnv | VecEnv, force_reset: bool = True) -> None:
        """As in stable-baselines3."""
        super().set_env(env, force_reset)
        if self.action_source == "rewind":
            self._check_arguments()
            steps = self.source.extra_steps if isinstance(self.source, RewindSource) else 0
            self.source = self._new_source()
            if isinstance(self.source, RewindSource):
                self.source.extra_steps = steps

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Beside the rest: generators, transitions in segments, extra steps of a rewind."""
        state = super().state_dict(folder)
        if self.action_source != "none":
            segments = self._transition_files.save(
                folder, self.transitions.count, self.transitions.capacity, self.transitions.rows
            )
            state |= {
                "generator": self._generator.get_state(),
                "rng": self._rng.bit_generator.state,
                "transitions": segments,
                "files": [name for *_, name in segments],
            }
        if isinstance(self.source, RewindSource):
            state["extra_steps"] = self.source.extra_steps
        return state

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state, folder)
        if self.action_source != "none":
            self._generator.set_state(state["generator"])
            self._rng.bit_generator.state = state["rng"]
            self._transition_files.load(
                folder, state["transitions"], self.transitions.capacity, self.transitions.put_rows
            )
        if isinstance(self.source, RewindSource):
            self.source.extra_steps = int(state.get("extra_steps", 0))  # older files lack it

    def dump_logs(self, iteration: int = 0) -> None:
        """As in stable-baselines3, but that iterations count on when a training is resumed.

        Args:
            iteration: 0 writes in any case, `learn`'s own calls every `log_interval` iterations.
        """
        done = self.num_timesteps // (self.n_steps * self.n_envs)
        if iteration == 0 or (self._log_interval and done % self._log_interval == 0):
            super().dump_logs(done)

    def _excluded_save_params(self) -> list[str]:
        own = [
            "source", "value_model", "value_optimizer", "transitions", "_transition_files",
            "_generator", "_rng", "_recorder", "_log_interval",
        ]  # fmt: skip
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, tensors = super()._get_torch_save_params()
        if self.value_model is not None:
            names = [*names, "value_model", "value_optimizer"]
        return names, tensors

    # ----------------------------------------------------------------------------------------
    # the epochs
    # ----------------------------------------------------------------------------------------

    def _train_epochs(self) -> None:
        """One round of epochs on the rollout buffer, as `stable_baselines3.PPO.train`."""
        policy, buffer = self.policy, self.rollout_buffer
        policy.set_training_mode(True)
        # The last rollout may overshoot the budget: no negative rate then.
        progress = self._current_progress_remaining = max(self._current_progress_remaining, 0.0)
        self._update_learning_rate(policy.optimizer)
        clip_range = self.clip_range(progress)  # type: ignore[operator]
        clip_range_vf = None
        if self.clip_range_vf is not None:
            clip_range_vf = self.clip_range_vf(progress)  # type: ignore[operator]
        estimator = self._resolved_estimator()
        log: dict[str, list[float]] = defaultdict(list)
        stop = False
        for epoch in range(self.n_epochs):
            log["approx_kl"] = []  # of the last epoch, as stable-baselines3 logs it
            batches: Any = buffer.get(self.batch_size)
            for batch in batches:
                distribution: Any = policy.get_distribution(batch.observations)
                values = policy.predict_values(batch.observations).flatten()
                log_prob = distribution.log_prob(batch.actions)
                advantages, extra = batch.advantages, batch.extra
                if self.normalize_advantage:
                    advantages, extra = normalised(advantages, extra)
                ratio = (log_prob - batch.old_log_prob).exp()
                bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
                terms = -torch.min(advantages * ratio, advantages * bounded)
                total, count = terms.sum(), terms.numel()
                if extra is not None:
                    zeta = self._zeta(distribution, extra)
                    losses = extra_loss(estimator, zeta, extra, clip_range)
                    total, count = total + losses.sum(), count + losses.numel()
                    log["extra_policy_gradient_loss"].append(float(losses.detach().mean()))
                policy_loss = total / count
                predicted = values
                if clip_range_vf is not None:
                    change = (values - batch.old_values).clamp(-clip_range_vf, clip_range_vf)
                    predicted = batch.old_values + change
                value_loss = mse_loss(batch.returns, predicted)
                entropy_loss = -distribution.entropy().mean()
                loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss
                with torch.no_grad():
                    log_ratio = log_prob - batch.old_log_prob
                    kl = float((log_ratio.exp() - 1 - log_ratio).mean())
                log["approx_kl"].append(kl)
                log["clip_fraction"].append(float(((ratio - 1).abs() > clip_range).float().mean()))
                for name, value in (
                    ("policy_gradient_loss", policy_loss), ("value_loss", value_loss),
                    ("entropy_loss", entropy_loss),
                ):  # fmt: skip
                    log[name].append(float(value.detach()))
                log["loss"] = [float(loss.detach())]  # the last, likewise
                stop = self.target_kl is not None and kl > 1.5 * self.target_kl
                if stop:
                    if self.verbose:
                        print(f"Early stopping at step {epoch} due to reaching max kl: {kl:.2f}")
                    break
                policy.optimizer.zero_grad()
                loss.backward()
                for parameters in self._clip_groups():
                    nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                policy.optimizer.step()
            self._n_updates += 1
            if stop:
                break
        for name, entries in log.items():
            self.logger.record(f"train/{name}", np.mean(entries))
        fit = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        self.logger.record("train/explained_variance", fit)
        self.logger.record("train/std", float(policy.log_std.detach().exp().mean()))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)
        if clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", clip_range_vf)

    def _zeta(self, distribution: Any, extra: ExtraActions) -> tuple[Tensor, Tensor]:
        """Mean and deviation [K, B, A] of the policy at the extra samples' states."""
        k = extra.actions.shape[1]
        if extra.observations is None:
            gaussian = distribution.distribution
            mean, std = gaussian.mean, gaussian.stddev
            return mean.expand(k, *mean.shape), std.expand(k, *std.shape)
        observations = extra.observations.transpose(0, 1)  # [K, B, S]
        simulated: Any = self.policy.get_distribution(observations.flatten(0, 1))
        gaussian = simulated.distribution
        shape = observations.shape[:2]
        return gaussian.mean.unflatten(0, shape), gaussian.stddev.unflatten(0, shape)

    def _clip_groups(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradient norms are clipped together."""
        everything = list(self.policy.parameters())
        if not self.separate_grad_clip:
            return [everything]
        policy: Any = self.policy
        parts = [policy.mlp_extractor.value_net, policy.value_net]
        if not policy.share_features_extractor:
            parts.append(policy.vf_features_extractor)
        critic = [parameter for part in parts for parameter in part.parameters()]
        ids = {id(p) for p in critic}
        return [[p for p in everything if id(p) not in ids], critic]

    # ----------------------------------------------------------------------------------------
    # what values the extra actions
    # ----------------------------------------------------------------------------------------

    def _new_value_model(self) -> ValueModel | None:
        """What `action_source` learns, untrained; None for one that learns nothing."""
        n_states = spaces.utils.flatdim(self.observation_space)
        n_actions = spaces.utils.flatdim(self.action_space)
        sizes: dict[str, Any] = {
            "width": self.dynamics_width, "activation": self.dynamics_activation
        }  # fmt: skip
        if self.action_source in ("dynamics", "states"):
            return MLPDynamics(
                n_states, n_actions, target=self.dynamics_target,
                normalise=self.dynamics_normalise, **sizes,
            ).to(self.device)  # fmt: skip
        if self.action_source == "q":
            return QNetworks(n_states, n_actions, n=self.n_q, **sizes).to(self.device)
        return None

    def _new_source(self) -> Source | None:
        """Where the extra actions come from; None if that is an environment not set yet."""
        if isinstance(self.value_model, QNetworks):
            return QSource(self.value_model)
        if isinstance(self.value_model, MLPDynamics):
            is_states = self.action_source == "states"
            return (StatesSource if is_states else DynamicsSource)(self.value_model)
        if self.env is None:  # `load` without an environment: made when one is set
            return None
        return RewindSource(self.env, timeout_bootstrap=self.timeout_bootstrap)

    def _fit_value_model(
        self,
        rollout: Rollout,
        behaviour: Behaviour,
        actions: torch.Tensor,
        returns: torch.Tensor,
    ) -> None:
        """Fit what is learned: a model to all transitions, Q-networks to this rollout's returns.

        Args:
            actions: [R, A] of the rollout, as the policy drew them. returns: [R].
        Raises:
            ValueError: there is no transition to fit a model to.
        """
        if self.value_model is None:
            return
        assert self.value_optimizer is not None
        batches = -(-len(rollout.states) // self.batch_size)
        steps = self.dynamics_steps or self.n_epochs * batches
        if isinstance(self.value_model, QNetworks):
            loss = self.value_model.fit(
                self.value_optimizer, rollout.observations, behaviour.clip(actions), returns,
                steps=steps, batch_size=self.batch_size, rng=self._rng,
            )  # fmt: skip
            self.logger.record("dynamics/q_loss", loss)
        else:
            if not len(self.transitions):
                raise ValueError(
                    "no transition is known: every step is an episode's last, and "
                    "VecNormalize clips "
                    "its state; give VecNormalize a larger clip_obs"
                )
            transition, reward = fit_dynamics(
                self.value_model, self.value_optimizer, self.transitions,
                steps=steps, batch_size=self.dynamics_batch_size, rng=self._rng,
            )  # fmt: skip
            self.logger.record("dynamics/transition_loss", transition)
            self.logger.record("dynamics/reward_loss", reward)

    # ----------------------------------------------------------------------------------------
    # arguments
    # ----------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        """One sentence per wrong value, before any work is done."""
        check_arguments(self)
        self._check_estimator()
        if self._compares_actions() and self.n_extra_actions < 2:
            raise ValueError(
                "extra_baseline 'leave-one-out' compares the actions of a state: "
                "n_extra_actions must "
                f"be at least 2, got {self.n_extra_actions}"
            )
        self._try_estimator()
        if self.action_source != "none" or self.separate_grad_clip:
            self._check_spaces()
        if self.action_source != "none" and self.env is not None:
            self._check_wrappers(self.env)
        if self.action_source == "rewind" and self.env is not None:
            _check_rewindable(self.env)

    def _resolved_estimator(self) -> Estimator:
        """The estimator; a name's has no baseline, which the advantages have already."""
        if isinstance(self.estimator, Estimator):
            return self.estimator
        return estimators.make(self.estimator, baseline=estimators.baselines.none)

    def _compares_actions(self) -> bool:
        """Whether extra actions are set against the others of their state."""
        has_several = self.action_source in ("dynamics", "q", "rewind")
        return self.extra_baseline == "leave-one-out" and has_several

    def _least_actions(self) -> int:
        """Extra actions that are needed: two, if legs are weighed or actions compared."""
        if self._compares_actions():
            return 2
        estimator = estimators.make(self.estimator)
        return 2 if estimator.needs_pathwise and estimator.needs_score else 1

    def _check_estimator(self) -> None:
        estimator = estimators.make(self.estimator)
        if not estimator.needs_pathwise:
            return
        if self.action_source not in DIFFERENTIABLE:
            raise ValueError(
                f"estimator {self.estimator!r} needs the advantage's gradient in the action, which "
                f"action_source={self.action_source!r} has not; use estimator='lr', or "
                f"action_source in {', '.join(DIFFERENTIABLE)}"
            )
        if estimator.probe != "none" or estimator.whole_graph:
            raise ValueError(
                f"estimator {self.estimator!r} weighs in parameter space, over the samples of one "
                "rollout; with many actions per state use 'lr', 'rp', 'tpx' or an ablation of 'tpx'"
            )
        if self.n_extra_actions < self._least_actions():
            raise ValueError(
                f"estimator {self.estimator!r} compares the actions of a state: "
                "n_extra_actions must "
                f"be at least 2, got {self.n_extra_actions}"
            )

    def _try_estimator(self) -> None:
        """With as many actions as a state has when they are fewest."""
        if self.action_source == "none":
            return
        k = self.n_extra_actions
        if self.grow_fraction > 0:
            k = min(k, self._least_actions())
        try:
            try_estimator(self._resolved_estimator(), [k, 1])
        except ValueError as error:
            raise ValueError(
                f"estimator {self.estimator!r} does not work with {k} extra action(s) per state "
                f"({error}); use a name of the registry, or raise n_extra_actions"
            ) from error

    def _check_spaces(self) -> None:
        for name in ("observation_space", "action_space"):
            space = getattr(self, name)
            if not isinstance(space, spaces.Box) or len(space.shape) != 1:
                raise ValueError(
                    f"extra actions and separate_grad_clip need a vector {name} (Box), got "
                    f"{space}; "
                    "use action_source='none' and separate_grad_clip=False"
                )
        if self.use_sde:
            raise ValueError("extra actions need a plain Gaussian policy: use_sde must be False")

    def _check_wrappers(self, env: VecEnv) -> None:
        """Extra actions know of VecNormalize; any other wrapper must change nothing."""
        layers, _ = env_state.layers_of(env)
        if self.action_source != "rewind":
            normalizer = self.get_vec_normalize_env()
            layers = [] if normalizer is None else layers[: layers.index(normalizer)]
        for layer in layers:
            if type(layer) not in env_state.LAYERS:
                known = ", ".join(kind.__name__ for kind in env_state.LAYERS)
                raise ValueError(
                    f"extra actions do not know what {type(layer).__name__} does to "
                    "observations and "
                    f"rewards: only {known} may be around VecNormalize, or around environments to "
                    "rewind; wrap the single environments, or use action_source='none'"
                )


def _check_rewindable(env: VecEnv) -> None:
    if not all(env.has_attr(name) for name in ("snapshot", "restore", "extra_step")):
        raise ValueError(
            "action_source='rewind' needs an environment with snapshot, restore and extra_step; "
            "wrap it: envs.rewind.Rewindable(env), or use action_source='dynamics'"
        )
