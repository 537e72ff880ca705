"""DAAPPO: PPO whose gradient uses several actions at every visited state.

The collection, the buffer and the value loss are stable-baselines3's. After each rollout a source
(a learned model, a Q-network, the environment rewound) draws extra actions from the same policy at
the same states and values them; the clipped loss runs over real and extra actions. Nauman & Cygan
2022, "On All-Action Policy Gradients". With action_source="none" it is stable-baselines3's PPO.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv

from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.workers import explain_dead_workers
from totalprop.agents.daappo import loss as daa_update
from totalprop.agents.daappo import sources
from totalprop.agents.daappo.policy import TanhMeanPolicy
from totalprop.agents.daappo.recorder import ManyActionRolloutBuffer, RolloutRecorder
from totalprop.agents.daappo.sources import Behaviour, Returns, RewindSource, Rollout, Source, Units
from totalprop.agents.daappo.validation import check_arguments, compares_actions, least_actions
from totalprop.agents.persistence.segments import RingFiles
from totalprop.estimators import Estimator
from totalprop.world_models.mlp_dynamics import Activation, Target
from totalprop.world_models.transitions import TransitionBuffer

SelfDAAPPO = TypeVar("SelfDAAPPO", bound="DAAPPO")
FIRST_HORIZON = 2  # where a growing horizon starts (the authors' code)


class DAAPPO(Algorithm, PPO):
    """PPO with many actions per state, on Box vectors and Box actions.

    Arguments not listed here are those of stable-baselines3's PPO.

    Args:
        policy: "MlpPolicy", "TanhMeanPolicy" (tanh on the mean), or a subclass of them.
        env: environment or id; observations are vectors.
        learning_rate: of the policy and critic, or a schedule of the training's progress.
        action_source: "dynamics" (DAA), "q" (QAA), "rewind" (AA, the environment itself),
            "states" (simulated states), or "none" (PPO).
        n_extra_actions: K, beside the real one; the papers' N counts differently (for DAA it is K,
            for AA K + 1).
        simulation_horizon: steps H that an extra action is followed.
        grow_fraction: part of the training over which K grows from 1 and H from 2 to their values,
            from `dynamics_warmup` on.
        estimator: of the extra actions' gradient. "lr" is the papers'; others ("tpx", "rp", ...)
            mix in the value gradient through the model or Q-network, per state over its K actions.
        real_advantage: of the real action: "gae", or "matched_horizon", the same H steps as the
            extra ones.
        extra_baseline: of the extra actions' advantages: "critic" (the papers), or "leave-one-out",
            which also takes the mean of the state's other extra actions away, and with it what
            critic and model get wrong about the state ("states" has one action per state: critic).
        timeout_bootstrap: value what follows a time limit, as stable-baselines3 does; otherwise it
            is an end.
        separate_grad_clip: clip the gradient norms of policy and critic apart.
        dynamics_target: "delta" or "next". dynamics_normalise: fit in units of the data.
        dynamics_width, dynamics_activation: of transition, reward and Q-networks.
        dynamics_learning_rate, dynamics_eps: of their Adam. dynamics_batch_size: its batches.
        dynamics_steps: gradient steps after each rollout; 0: epochs x minibatches, as the policy.
        dynamics_buffer_size: transitions kept. dynamics_warmup: steps before the model is used.
        n_q: Q-networks, of which the least counts.

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
        learning_rate: float | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        target_kl: float | None = None,
        *,
        action_source: Literal["none", "dynamics", "q", "rewind", "states"] = "dynamics",
        n_extra_actions: int = 4,
        simulation_horizon: int = 8,
        grow_fraction: float = 0.0,
        estimator: str | Estimator = "lr",
        real_advantage: Literal["gae", "matched_horizon"] = "gae",
        extra_baseline: Literal["critic", "leave-one-out"] = "critic",
        timeout_bootstrap: bool = True,
        separate_grad_clip: bool = False,
        dynamics_target: Target = "delta",
        dynamics_normalise: bool = True,
        dynamics_width: int = 512,
        dynamics_activation: Activation = "relu",
        dynamics_learning_rate: float = 7e-4,
        dynamics_eps: float = 1e-5,
        dynamics_batch_size: int = 256,
        dynamics_steps: int = 0,
        dynamics_buffer_size: int = 50_000,
        dynamics_warmup: int = 0,
        n_q: int = 2,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
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
        self.value_model: sources.ValueModel | None = None
        self.value_optimizer: torch.optim.Optimizer | None = None
        if _init_setup_model:
            self._setup_model()

    # ----------------------------------------------------------------------------------------
    # set-up
    # ----------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        check_arguments(self)
        is_ppo = self.action_source == "none" and not self.separate_grad_clip
        self.rollout_buffer_class = None if is_ppo else ManyActionRolloutBuffer
        super()._setup_model()
        if self.action_source == "none":
            return
        n_actions = spaces.utils.flatdim(self.action_space)
        self.transitions = TransitionBuffer(self.dynamics_buffer_size, self.state_size, n_actions)
        self._transition_files = RingFiles("transitions")
        with torch.random.fork_rng():
            torch.manual_seed(self._generator.initial_seed())
            self.value_model = sources.new_value_model(self)
        if self.value_model is not None:
            self.value_optimizer = torch.optim.Adam(
                self.value_model.parameters(), self.dynamics_learning_rate, eps=self.dynamics_eps
            )
        self.source = sources.new_source(self)

    def set_random_seed(self, seed: int | None = None) -> None:
        """As in stable-baselines3; what extra actions and models draw, too."""
        super().set_random_seed(seed)
        # Own generators: policy and minibatches draw what they would without extra actions.
        seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self._generator = torch.Generator(self.device).manual_seed(seed)
        self._rng = np.random.default_rng(seed)

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
        self._recorder = RolloutRecorder()
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
                daa_update.train(self)
            else:
                super().train()
            return
        self.policy.set_training_mode(False)
        buffer = self.rollout_buffer
        buffer.extra = self._extra_actions()
        self.logger.record("train/extra_actions", self.k if buffer.extra is not None else 0)
        self.logger.record("train/simulation_horizon", self.horizon)
        daa_update.train(self)

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
        sources.fit(self, rollout, behaviour, actions, targets)
        if self.num_timesteps < self.dynamics_warmup:
            return None
        returns = Returns(self.gamma, self.gae_lambda, self.horizon)
        if self.real_advantage == "matched_horizon":
            buffer.advantages[:] = daa_update.truncated_advantages(buffer, self.horizon)
        gradient = daa_update.needs_action_gradient(self)
        extra = self.source(rollout, behaviour, self.k, returns, gradient=gradient)
        if compares_actions(self):
            extra = extra.against_the_others()
        if isinstance(self.source, RewindSource):
            self.logger.record("time/extra_env_steps", self.source.extra_steps)
        return extra

    @property
    def k(self) -> int:
        """Extra actions per state now."""
        grown = int(self._grown * self.n_extra_actions) + 1
        return min(self.n_extra_actions, max(grown, least_actions(self)))

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
            check_arguments(self)
            steps = self.source.extra_steps if isinstance(self.source, RewindSource) else 0
            self.source = sources.new_source(self)
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
