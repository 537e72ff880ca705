"""DAAPPO: PPO whose gradient uses several actions at every visited state.

Rollouts, the rollout buffer and the value loss are stable-baselines3's. After each rollout a source
(a learned model, Q-networks, or the environment rewound; see sources.py) draws extra actions from
the same policy at the same states and values them. The clipped loss (see loss.py) averages over
real and extra actions. Nauman & Cygan 2022, "On All-Action Policy Gradients". With
action_source="none" this is stable-baselines3's PPO, except that schedules see the progress at the
start of a rollout.
"""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.policies import (
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

import totalprop.estimators as estimators
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.file_contents import not_finite
from totalprop.agents.core.spaces import UnsupportedSpaceError, describe, to_vector
from totalprop.agents.core.validation import (
    Above,
    AtLeast,
    Finite,
    Within,
    check_arguments,
    try_estimator,
)
from totalprop.agents.core.workers import explain_dead_workers
from totalprop.agents.daappo.loss import (
    ValueClipping,
    approximate_kl,
    policy_loss,
    truncated_advantages,
    value_loss,
)
from totalprop.agents.daappo.policy import TanhMeanPolicy
from totalprop.agents.daappo.recorder import ManyActionRolloutBuffer, RolloutRecorder
from totalprop.agents.daappo.sources import (
    SOURCES,
    Behaviour,
    ExtraActions,
    Normalization,
    QTarget,
    Returns,
    Rollout,
    Source,
    SourceSettings,
)
from totalprop.agents.persistence import env_state
from totalprop.estimators import Estimator
from totalprop.world_models.mlp_dynamics import Activation, Target

DIFFERENTIABLE = tuple(name for name, cls in SOURCES.items() if cls and cls.is_differentiable)
SelfDAAPPO = TypeVar("SelfDAAPPO", bound="DAAPPO")
FIRST_HORIZON = 2  # where a growing horizon starts (the authors' code)


class DAAPPO(Algorithm, PPO):
    """PPO with many actions per state, on Box vectors and Box actions.

    Args:
        policy: "MlpPolicy", "TanhMeanPolicy" (tanh on the mean), or a subclass of them.
        env: environment or id; observations are vectors.
        learning_rate: step size of policy and critic, or a schedule over training progress, which
            is that at the start of the rollout.
        n_steps: steps of each environment per rollout.
        batch_size: states per minibatch.
        n_epochs: passes over a rollout.
        gamma: discount per decision.
        gae_lambda: λ of generalised advantage estimation.
        clip_range: clipping range of the probability ratio, or a schedule of it.
        clip_range_vf: clipping range of the value's change, in the returns' units, or a schedule of
            it; None for no clipping.
        value_clipping: which error counts where `clip_range_vf` is set: "clipped", that of the
            clipped value, as in SB3, or "max", the larger of those of the clipped and the new
            value, as in CleanRL and the papers.
        normalize_advantage: standardise the advantages of each minibatch.
        ent_coef: weight of the entropy bonus.
        vf_coef: weight of the value loss.
        max_grad_norm: global-norm clip of the gradient.
        target_kl: approximate KL divergence at which an update's epochs stop; None for no limit.
        use_sde: explore by noise that depends on the state (gSDE); with action_source="none" only.
        sde_sample_freq: steps between draws of that noise; -1: once per rollout.
        rollout_buffer_class: SB3's or your own, with action_source="none" only. Files do not hold
            it: pass it to `load` again.
        rollout_buffer_kwargs: its further arguments.
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
            steps as the extra ones of "dynamics" and "rewind".
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
        q_learning_rate: step size of the Q-networks' Adam; None for `dynamics_learning_rate`.
        q_target: what the Q-networks are fitted to: "return", the λ-returns of the rollout, from
            whose value the critic's is subtracted, or "advantage", the λ-advantages themselves
            (Nauman & Cygan 2022, Sec. 5).
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
        group: processes that learn this agent together (torch.distributed), on Box vectors and Box
            actions. Each passes environments of its own, equally many; batch_size and steps count
            those of all. The source's model is fitted to all transitions, in each process. None:
            this one alone.

    Raises:
        ValueError: a value out of range, with what was expected.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        **PPO.policy_aliases,
        "TanhMeanPolicy": TanhMeanPolicy,
    }
    takes_starts = False
    fixed_arguments: ClassVar[tuple[str, ...]] = (
        "policy_kwargs", "n_steps", "use_sde", "rollout_buffer_class", "rollout_buffer_kwargs",
        "action_source", "separate_grad_clip", "value_clipping", "dynamics_target",
        "dynamics_normalise", "dynamics_width", "dynamics_activation", "dynamics_buffer_size",
        "n_q", "q_target",
    )  # fmt: skip
    rollout_buffer: ManyActionRolloutBuffer

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: Annotated[float, AtLeast(0)] | Schedule = 3e-4,
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
        *,
        target_kl: Annotated[float, Above(0)] | None = None,
        use_sde: bool = False,
        sde_sample_freq: Annotated[int, AtLeast(-1)] = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        action_source: Literal["none", "dynamics", "q", "rewind", "states"] = "dynamics",
        n_extra_actions: Annotated[int, AtLeast(1)] = 4,
        simulation_horizon: Annotated[int, AtLeast(1)] = 8,
        grow_fraction: Annotated[float, Within(0, 1)] = 0.0,
        estimator: str | Estimator = "lr",
        real_advantage: Literal["gae", "matched_horizon"] = "gae",
        extra_baseline: Literal["critic", "leave-one-out"] = "critic",
        timeout_bootstrap: bool = True,
        separate_grad_clip: bool = False,
        value_clipping: ValueClipping = "clipped",
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
        q_learning_rate: Annotated[float, Above(0)] | None = None,
        q_target: QTarget = "return",
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: Annotated[int, AtLeast(1)] = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        group: dist.ProcessGroup | None = None,
        _init_setup_model: bool = True,
    ) -> None:
        if isinstance(policy, str):  # or stable-baselines3 advises another policy before we check
            policy = cast("type[ActorCriticPolicy]", self._get_policy_from_name(policy))
        with warnings.catch_warnings():
            if group is not None:  # of the batch of all processes beside the rollout of one
                warnings.filterwarnings("ignore", "You have specified a mini-batch size")
            super().__init__(
                policy, env,  # type: ignore[arg-type]  # None is what `load` passes
                learning_rate, n_steps, batch_size, n_epochs, gamma, gae_lambda,
                clip_range, clip_range_vf, normalize_advantage, ent_coef, vf_coef, max_grad_norm,
                use_sde, sde_sample_freq, rollout_buffer_class, rollout_buffer_kwargs,
                target_kl=target_kl, policy_kwargs=policy_kwargs,
                stats_window_size=stats_window_size, tensorboard_log=tensorboard_log,
                verbose=verbose, seed=seed, device=device, _init_setup_model=False,
            )  # fmt: skip
        self.group = group
        self.action_source, self.estimator = action_source, estimator
        self.n_extra_actions, self.simulation_horizon = n_extra_actions, simulation_horizon
        self.grow_fraction, self.real_advantage = grow_fraction, real_advantage
        self.extra_baseline = extra_baseline
        self.timeout_bootstrap, self.separate_grad_clip = timeout_bootstrap, separate_grad_clip
        self.value_clipping = value_clipping
        self.dynamics_target, self.dynamics_normalise = dynamics_target, dynamics_normalise
        self.dynamics_width, self.dynamics_activation = dynamics_width, dynamics_activation
        self.dynamics_learning_rate = dynamics_learning_rate
        self.dynamics_eps, self.dynamics_batch_size = dynamics_eps, dynamics_batch_size
        self.dynamics_steps, self.dynamics_buffer_size = dynamics_steps, dynamics_buffer_size
        self.dynamics_warmup, self.n_q = dynamics_warmup, n_q
        self.q_learning_rate, self.q_target = q_learning_rate, q_target
        self.source: Source | None = None
        if _init_setup_model:
            self._setup_model()

    # ----------------------------------------------------------------------------------------
    # set-up
    # ----------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        self._check_arguments()
        if not self._is_ppo:
            self.rollout_buffer_class = ManyActionRolloutBuffer
        super()._setup_model()
        self.source = self._new_source()
        self._join()
        self._fix_arguments()

    def _join(self) -> None:
        super()._join()
        if self.source is not None and self._processes.size > 1:
            # All processes fit the model to the same batches, and draw actions of their own.
            self.source.set_common_seed(self._processes.objects(self._generator.initial_seed())[0])

    def _new_source(self) -> Source | None:
        source_class = SOURCES[self.action_source]
        if source_class is None:
            return None
        return source_class(self._source_settings(), self._processes)

    def _source_settings(self) -> SourceSettings:
        return SourceSettings(
            state_size=spaces.utils.flatdim(self.observation_space),
            action_size=spaces.utils.flatdim(self.action_space),
            state_dtype=np.float64 if self.observation_space.dtype == np.float64 else np.float32,
            device=self.device,
            seed=self._generator.initial_seed(),
            timeout_bootstrap=self.timeout_bootstrap,
            target=self.dynamics_target,
            normalise=self.dynamics_normalise,
            width=self.dynamics_width,
            activation=self.dynamics_activation,
            n_q=self.n_q,
            q_target=self.q_target,
            q_learning_rate=self.q_learning_rate or self.dynamics_learning_rate,
            learning_rate=self.dynamics_learning_rate,
            eps=self.dynamics_eps,
            batch_size=self.dynamics_batch_size,
            q_batch_size=self.batch_size,
            buffer_size=self.dynamics_buffer_size,
        )

    @property
    def _is_ppo(self) -> bool:
        """Whether stable-baselines3's own update will do."""
        is_usual = not self.separate_grad_clip and self.value_clipping == "clipped"
        return SOURCES[self.action_source] is None and is_usual and self._processes.size == 1

    @property
    def value_model(self) -> nn.Module | None:
        """The source's model, "value_model" in files; None if it learns nothing."""
        return None if self.source is None else self.source.model

    @property
    def value_optimizer(self) -> torch.optim.Optimizer | None:
        """The optimiser of `value_model`, "value_optimizer" in files."""
        return None if self.source is None else self.source.optimizer

    def set_random_seed(self, seed: int | None = None) -> None:
        """Like SB3's, and also seed the source, whose generators have the seed of `_generator`.

        They are its own, so that policy and minibatches draw the same numbers as without extra
        actions.
        """
        super().set_random_seed(seed)
        if self.source is not None:  # it is None in set-up, where it is seeded when made
            self.source.set_random_seed(self._generator.initial_seed())

    def _draw_seed(self) -> int:
        # Not from torch's global generator, for the same reason.
        return int(np.random.default_rng().integers(2**31))

    # ----------------------------------------------------------------------------------------
    # learn: collect a rollout, train on it, repeat
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
        """Like SB3's; the extra steps of a rewound environment do not count as timesteps."""
        self._log_interval = log_interval
        return super().learn(
            total_timesteps, callback, 1, tb_log_name, reset_num_timesteps, progress_bar
        )

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        total, callbacks = super()._setup_learn(total_timesteps, callback, *args, **kwargs)
        # Like all arguments, these may have been set since; stable-baselines3 keeps copies.
        self.rollout_buffer.gamma, self.rollout_buffer.gae_lambda = self.gamma, self.gae_lambda
        self.clip_range = FloatSchedule(self.clip_range)
        if self.clip_range_vf is not None:
            self.clip_range_vf = FloatSchedule(self.clip_range_vf)
        self._recorder = RolloutRecorder(self.source, timeout_bootstrap=self.timeout_bootstrap)
        both = CallbackList([callbacks, self._recorder])
        both.model = self  # not init_callback, which the user's callbacks have been through
        self._recorder.init_callback(self)
        return total, both

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """Progress at the start of the rollout, as in CleanRL; SB3's is that at its end.

        A schedule's first value is then that of the first update, and a schedule that falls to 0
        leaves the last update its step size.
        """
        start = num_timesteps - self._rollout_steps
        super()._update_current_progress_remaining(start, total_timesteps)

    def collect_rollouts(self, env: VecEnv, callback: BaseCallback, *args: Any, **kw: Any) -> bool:
        """Like SB3's, except that the last step is kept when a callback stops the rollout.

        The steps of other processes count once the rollout is over.
        """
        if super().collect_rollouts(env, callback, *args, **kw):
            self.num_timesteps += self._rollout_steps - self.n_steps * self.n_envs
            return True
        self._last_obs = callback.locals["new_obs"]
        self._last_episode_starts = callback.locals["dones"]
        return False

    def dump_logs(self, iteration: int = 0) -> None:
        """Like SB3's, except that a resumed run continues the count of iterations.

        Args:
            iteration: 0 always writes; other numbers, which `learn` passes, write every
                `log_interval` iterations.
        """
        done = self.num_timesteps // self._rollout_steps
        if iteration == 0 or (self._log_interval and done % self._log_interval == 0):
            own = self.ep_info_buffer, self.ep_success_buffer
            # stable-baselines3 reads them from here.
            self.ep_info_buffer, self.ep_success_buffer = map(deque, self.recent_episodes())
            super().dump_logs(done)
            self.ep_info_buffer, self.ep_success_buffer = own

    @property
    def _rollout_steps(self) -> int:
        """Steps of a rollout, over all environments of all processes."""
        return self.n_steps * self.n_envs * self._processes.size

    # ----------------------------------------------------------------------------------------
    # train: fit the source, draw extra actions, update the policy
    # ----------------------------------------------------------------------------------------

    def train(self) -> None:
        """Fit the source's model, draw the extra actions, then run PPO's epochs over all actions.

        Raises:
            FloatingPointError: a parameter, or what an optimiser keeps of one, is no longer finite.
        """
        policy = ["policy", "policy.optimizer"], "learning_rate or max_grad_norm"
        try:
            if self._is_ppo:
                super().train()
            else:
                self._draw_extra_actions()
                self._train_epochs()
        except ValueError:  # PyTorch's, of a distribution's parameters
            self._check_parts(*policy)
            raise
        self._check_parts(*policy)

    def _check_parts(self, names: list[str], remedy: str) -> None:
        """What `load` would refuse ends the run, because no later checkpoint could be loaded."""
        for name in names:
            if entry := not_finite(recursive_getattr(self, name).state_dict()):
                raise FloatingPointError(
                    f"'{entry}' of {name} is not finite after the update at step "
                    f"{self.num_timesteps}; resume from a checkpoint with a smaller {remedy}"
                )

    def _draw_extra_actions(self) -> None:
        """Fit the source, and fill the rollout buffer's `extra` once the warm-up is over."""
        source, buffer = self.source, self.rollout_buffer
        if source is None:
            return
        self.policy.set_training_mode(False)
        rollout = self._rollout()
        source.settings = self._source_settings()  # the user or a callback may have changed some
        normalization = Normalization(self.get_vec_normalize_env(), self.device)
        behaviour = Behaviour(self.policy, normalization, source.generator)
        source.share_transitions()
        of_all = Rollout(*map(self._processes.gathered, rollout))
        minibatches = -(-len(of_all.states) // self.batch_size)
        steps = self.dynamics_steps or self.n_epochs * minibatches
        for name, loss in source.fit(of_all, behaviour, steps=steps).items():
            self.logger.record(f"dynamics/{name}", loss)
        if source.model is not None:
            self._processes.send(source.model)  # a GPU's sums depend on the order of its threads
            remedy = "dynamics_learning_rate, or with VecNormalize"
            self._check_parts(["value_model", "value_optimizer"], remedy)
        buffer.extra = None
        if self.num_timesteps >= self.dynamics_warmup:
            if self.real_advantage == "matched_horizon":
                buffer.advantages[:] = truncated_advantages(buffer, self.horizon)
            returns = Returns(self.gamma, self.gae_lambda, self.horizon)
            gradient = self._resolved_estimator().needs_pathwise
            extra = source(rollout, behaviour, self.k, returns, gradient=gradient)
            buffer.extra = extra.leave_one_out() if self._compares_actions() else extra
            if source.extra_steps is not None:
                steps = sum(self._processes.objects(source.extra_steps))
                self.logger.record("time/extra_env_steps", steps)
        self.logger.record("train/extra_actions", self.k if buffer.extra is not None else 0)
        if source.follows_horizon:
            self.logger.record("train/simulation_horizon", self.horizon)

    def _rollout(self) -> Rollout:
        """The rollout that was just collected, as sources read it."""
        buffer = self.rollout_buffer

        def flat(x: np.ndarray) -> Tensor:
            return torch.as_tensor(buffer.swap_and_flatten(x), device=self.device)

        return Rollout(
            observations=flat(buffer.observations).float(),
            states=torch.as_tensor(self._recorder.flat_states(), device=self.device),
            values=flat(buffer.values)[:, 0],
            actions=flat(buffer.actions).float(),
            returns=flat(buffer.returns)[:, 0],
            advantages=flat(buffer.advantages)[:, 0],
        )

    @property
    def k(self) -> int:
        """The current number of extra actions per state."""
        grown = int(self._grown * self.n_extra_actions) + 1
        return min(self.n_extra_actions, max(grown, self._least_actions()))

    @property
    def horizon(self) -> int:
        """The current number of steps that an extra action is followed."""
        return min(
            self.simulation_horizon, int(self._grown * self.simulation_horizon) + FIRST_HORIZON
        )

    @property
    def _grown(self) -> float:
        """Rises from 0 at the end of the warm-up to 1 after `grow_fraction` of all steps."""
        if self.grow_fraction == 0:
            return 1.0
        done = max(self.num_timesteps - self.dynamics_warmup, 0) / max(self._total_timesteps, 1)
        return min(done / self.grow_fraction, 1.0)

    def _train_epochs(self) -> None:
        """PPO's epochs on the rollout buffer, like `stable_baselines3.PPO.train`."""
        policy, buffer, processes = self.policy, self.rollout_buffer, self._processes
        policy.set_training_mode(True)
        progress = self._current_progress_remaining
        self._update_learning_rate(policy.optimizer)
        clip_range = self.clip_range(progress)  # type: ignore[operator]
        clip_range_vf = None
        if self.clip_range_vf is not None:
            clip_range_vf = self.clip_range_vf(progress)  # type: ignore[operator]
        estimator = self._resolved_estimator()
        batch_size = processes.share(batch_size=self.batch_size)
        log: dict[str, list[float]] = defaultdict(list)
        stop = False
        for epoch in range(self.n_epochs):
            log["approx_kl"] = []  # SB3 logs that of the last epoch
            batches: Any = buffer.get(batch_size)
            for batch in batches:
                distribution: Any = policy.get_distribution(batch.observations)
                values = policy.predict_values(batch.observations).flatten()
                log_prob = distribution.log_prob(batch.actions)
                zeta = None if batch.extra is None else self._zeta(distribution, batch.extra)
                of_policy = policy_loss(
                    batch, log_prob, zeta, estimator,
                    clip_range=clip_range, normalize_advantage=self.normalize_advantage,
                    processes=processes,
                )  # fmt: skip
                of_values = value_loss(values, batch, clip_range_vf, self.value_clipping)
                of_entropy = -distribution.entropy().mean()
                loss = of_policy.total + self.ent_coef * of_entropy + self.vf_coef * of_values
                kl = float(processes.average_one(approximate_kl(log_prob, batch.old_log_prob)))
                log["approx_kl"].append(kl)
                log["clip_fraction"].append(of_policy.clip_fraction)
                log["policy_gradient_loss"].append(float(of_policy.total.detach()))
                log["value_loss"].append(float(of_values.detach()))
                log["entropy_loss"].append(float(of_entropy.detach()))
                if of_policy.extra is not None:
                    log["extra_policy_gradient_loss"].append(float(of_policy.extra))
                log["loss"] = [float(loss.detach())]  # SB3 logs the last
                stop = self.target_kl is not None and kl > 1.5 * self.target_kl
                if stop:
                    if self.verbose:
                        print(f"Early stopping at step {epoch} due to reaching max kl: {kl:.2f}")
                    break
                policy.optimizer.zero_grad()
                loss.backward()
                processes.average_gradients(policy.parameters())
                for parameters in self._clip_groups():
                    nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
                policy.optimizer.step()
            self._n_updates += 1
            if stop:
                break
        averages = [np.mean(entries) for entries in log.values()]
        for name, value in zip(log, np.mean(processes.objects(averages), 0), strict=True):
            self.logger.record(f"train/{name}", value)
        own = buffer.values.flatten(), buffer.returns.flatten()
        fit = explained_variance(*np.concatenate(processes.objects(own), axis=1))
        self.logger.record("train/explained_variance", fit)
        self.logger.record("train/std", float(policy.log_std.detach().exp().mean()))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/clip_range", clip_range)
        if clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", clip_range_vf)

    def _zeta(self, distribution: Any, extra: ExtraActions) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [K, B, A] of the policy at the extra actions' states.

        Args:
            distribution: the policy's at the B real states.
            extra: the extra actions.
        """
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
        """Groups of parameters; the gradient norm of each group is clipped by itself."""
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
    # environments and files
    # ----------------------------------------------------------------------------------------

    def _completed(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return parameters if self.source is None else self.source.complete(parameters)

    def _adopt_env(self) -> None:
        """Refuse an environment that cannot be rewound if the source rewinds it."""
        if self.source is not None and self.source.needs_snapshots:
            self._check_arguments()

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """The base's state, and the source's."""
        state = super().state_dict(folder)
        if self.source is not None:
            state |= self.source.state_dict(folder)
        return state

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state, folder)
        if self.source is not None:
            self.source.load_state_dict(state, folder)

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "source",
            "_generator",
            "_recorder",
            "_log_interval",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, tensors = super()._get_torch_save_params()
        if self.value_model is not None:
            names = [*names, "value_model", "value_optimizer"]
        return names, tensors

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
                f"n_extra_actions must be at least 2, got {self.n_extra_actions}"
            )
        self._try_estimator()
        self._processes.share(batch_size=self.batch_size)
        source = SOURCES[self.action_source]
        is_matched = source is not None and source.follows_horizon
        if self.real_advantage == "matched_horizon" and not is_matched:
            raise ValueError(
                "real_advantage='matched_horizon' is the horizon of extra actions that are "
                f"followed for simulation_horizon steps, which action_source={self.action_source!r}"
                " does not do: use real_advantage='gae'"
            )
        if not self._is_ppo:
            self._check_spaces()
        elif isinstance(self.observation_space, spaces.Dict) and not issubclass(
            self.policy_class, MultiInputActorCriticPolicy
        ):
            raise UnsupportedSpaceError(
                f"{self.policy_class.__name__} takes one array as observation, got "
                f"{describe(self.observation_space)}; pass policy='MultiInputPolicy'"
            )
        if source is not None and self.env is not None:
            self._check_wrappers(self.env)
            if source.needs_snapshots:
                _check_rewindable(self.env)

    def _resolved_estimator(self) -> Estimator:
        """The estimator; one made from a name has no baseline, because the advantages have one."""
        if isinstance(self.estimator, Estimator):
            return self.estimator
        return estimators.make(self.estimator, baseline=estimators.baselines.none)

    def _compares_actions(self) -> bool:
        """Whether an extra action's baseline includes the other actions at its state."""
        source = SOURCES[self.action_source]
        is_possible = source is not None and source.draws_per_state
        return self.extra_baseline == "leave-one-out" and is_possible

    def _least_actions(self) -> int:
        """The fewest extra actions per state: two if legs are mixed or actions compared, or one."""
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
        if estimator.probe != "none" or estimator.several_passes:
            raise ValueError(
                f"estimator {self.estimator!r} weighs in parameter space, over the samples of one "
                "rollout; with many actions per state use 'lr', 'rp', 'tpx' or an ablation of 'tpx'"
            )
        if self.n_extra_actions < self._least_actions():
            raise ValueError(
                f"estimator {self.estimator!r} compares the actions of a state: "
                f"n_extra_actions must be at least 2, got {self.n_extra_actions}"
            )

    def _try_estimator(self) -> None:
        """Try the estimator with the fewest extra actions that a state will have."""
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
        found = {  # what asks for more than PPO -> what to do instead
            f"action_source={self.action_source!r}": "use action_source='none'",
            "separate_grad_clip": "leave separate_grad_clip out",
            "value_clipping='max'": "leave value_clipping out",
            "several processes": "train in one process",
        }
        asks = (
            SOURCES[self.action_source] is not None, self.separate_grad_clip,
            self.value_clipping != "clipped", self._processes.size > 1,
        )  # fmt: skip
        wanted = [pair for pair, is_so in zip(found.items(), asks, strict=True) if is_so]
        what = " and ".join(name for name, _ in wanted)
        alone = " and ".join(remedy for _, remedy in wanted)
        need = "need" if len(wanted) > 1 or what == "several processes" else "needs"
        seen, actions = self.observation_space, self.action_space
        if not isinstance(seen, spaces.Box) or len(seen.shape) != 1:
            # stable-baselines3's CNN takes colour images of at least 36 x 36.
            shape = seen.shape or ()
            is_seen = len(shape) == 3 and min(shape[1:]) >= 36
            policy = "CnnPolicy" if is_seen else "MlpPolicy"
            images = f"{alone}, and policy='{policy}'"
            raise UnsupportedSpaceError(
                f"{what} {need} one vector as observation, got {describe(seen)}; "
                f"{to_vector(seen, otherwise=images)}"
            )
        if not isinstance(actions, spaces.Box) or len(actions.shape) != 1:
            raise UnsupportedSpaceError(
                f"{what} {need} one vector as action, got {describe(actions)}; {alone}"
            )
        if self.use_sde:
            raise ValueError(f"{what} {need} a plain Gaussian policy: pass use_sde=False")
        if self.rollout_buffer_class not in (None, ManyActionRolloutBuffer):
            raise ValueError(
                f"{what} {need} a rollout buffer of its own, got "
                f"rollout_buffer_class={self.rollout_buffer_class.__name__}; leave it None, or "
                f"{alone}"
            )

    def _check_wrappers(self, env: VecEnv) -> None:
        """Refuse wrappers whose effect a source would miss; sources undo VecNormalize only."""
        layers, _ = env_state.layers_of(env)
        source = SOURCES[self.action_source]
        if source is not None and not source.needs_snapshots:
            normalizer = self.get_vec_normalize_env()
            layers = [] if normalizer is None else layers[: layers.index(normalizer)]
        for layer in layers:
            if type(layer) not in env_state.LAYERS:
                known = ", ".join(kind.__name__ for kind in env_state.LAYERS)
                raise ValueError(
                    f"extra actions do not know what {type(layer).__name__} does to observations "
                    f"and rewards: only {known} may be around VecNormalize, or around environments "
                    "to rewind; wrap the single environments, or use action_source='none'"
                )


def _check_rewindable(env: VecEnv) -> None:
    if not all(env.has_attr(name) for name in ("snapshot", "restore", "extra_step")):
        raise ValueError(
            "action_source='rewind' needs an environment with snapshot, restore and extra_step; "
            "wrap it: totalprop.envs.rewind.Rewindable(env), or use action_source='dynamics'"
        )
