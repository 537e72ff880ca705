"""DreamerTPX: DreamerV1 with an interchangeable policy-gradient estimator.

The agent acts and stores the steps, fits the world model to stored sequences, imagines from every
state of the batch to improve actor and critic, and acts again. Hafner et al. 2020 (DreamerV1);
Parmas, Seno & Aoki 2023 (TPX), Sec. 6. This module holds the agent and its loop. One gradient step
is in `update`, the imagined rollouts are in `imagination`, the networks in `policy` and
`world_models.latent.model`.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ProgressBarCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import get_latest_run_id
from torch import Tensor

import totalprop.estimators as estimators
from totalprop.agents.core.algorithm import Algorithm, existing, with_suffix
from totalprop.agents.core.datasets import check_spaces, open_dataset
from totalprop.agents.core.memory import keep_freed_memory
from totalprop.agents.core.validation import (
    Above,
    AtLeast,
    Within,
    ZeroOrAtLeast,
    check_arguments,
    check_finite,
    check_gradients,
    try_estimator,
)
from totalprop.agents.core.workers import explain_dead_workers
from totalprop.agents.dreamer.exploration import HeldNoise
from totalprop.agents.dreamer.imagination import ImaginationSettings, NodeKind
from totalprop.agents.dreamer.metrics import (
    FIGURE_SECONDS,
    GAUGE_EVERY,
    Round,
    record_data,
    record_decisions,
)
from totalprop.agents.dreamer.observations import (
    Arrays,
    ObservationForm,
    count,
    first,
    to_tensors,
)
from totalprop.agents.dreamer.policy import DreamerPolicy, RecurrentState
from totalprop.agents.dreamer.pretrained import load_world_model
from totalprop.agents.dreamer.replay import SequenceReplay
from totalprop.agents.dreamer.replay_data import fill
from totalprop.agents.dreamer.update import DreamerUpdate, UpdateSettings
from totalprop.estimators import Estimator
from totalprop.estimators.declarations import has
from totalprop.world_models.latent.model import ModelLossSettings, State

if TYPE_CHECKING:
    from minari import MinariDataset

# What is optimised, and what can be changed where its gradient is not finite.
REMEDIES = {
    "model": "nonfinite='skip', or a smaller model_learning_rate",
    "actor": "nonfinite='skip', a shorter horizon, or estimator 'tpx' if it is another",
    "critic": "nonfinite='skip', or a smaller learning_rate",
}


class Auto(NamedTuple):
    """What "auto" stands for, by what is observed."""

    vectors: float  # alone
    choices: float  # and vectors
    images: float  # and anything else


AUTO = {
    "model_learning_rate": Auto(3e-3, 3e-3, 1e-3),
    "representation_scale": Auto(1.0, 0.1, 0.1),
    "free_nats": Auto(0.0, 1.0, 1.0),
}
SelfDreamerTPX = TypeVar("SelfDreamerTPX", bound="DreamerTPX")


class DreamerTPX(Algorithm):
    """Latent world model with imagined policy gradients.

    Steps are decisions: `total_timesteps`, `learning_starts` and `train_freq` count calls of
    `env.step`, whatever the environment's action repeat; logs show frames too.

    Args:
        policy: "DreamerPolicy", or a subclass of it.
        env: environment or id; observations are images (uint8, resized to 64x64), vectors, choices
            (Discrete, MultiDiscrete, MultiBinary), or a Dict of these, actions a bounded Box,
            Discrete or MultiDiscrete.
        learning_rate: step size of actor and critic, or a schedule over training progress.
        estimator: name in the registry ("rp", "lr", "tps", "tpx", "tpg", ...), an
            `estimators.Estimator`, or "auto": "tpx" for a Box, and for choices "lr" with the critic
            as its baseline, since their pathwise gradient is biased and calm, which misleads every
            rule that weighs by variance. Rules that weigh in parameter space use the actor's last
            layer.
        node: where the estimator mixes its legs: at the "latent" state that an action leads to
            (Parmas et al. 2023), at the "action", where "lr" is REINFORCE, at "both", or "auto":
            the latent for a Box, the action for choices. Choices elsewhere than at the action are
            differentiated straight-through, which is biased under every estimator.
        credit: which λ-returns an action is credited with: "all", its own and those of all later
            imagined states (DreamerV1), or its "own" alone (DreamerV2 and V3, whose actor is
            estimator="lr", node="action", credit="own", baseline="critic").
        baseline: baseline of the LR leg: "leave-one-out" over the batch (or the estimator's own),
            "mean" of the batch, which shrinks the leg by 1/N (Parmas et al. 2023, Sec. 3), or
            "critic", the value at the prior's mean (their Sec. 7) or, at the action, of the state
            that it is chosen in.
        leg: how the likelihood ratio is formed: "score"; "first-order" with what is linear in the
            noise left to RP (a second backward pass); "lax" with the critic at the sample as
            control variate (Grathwohl et al. 2018); or "mvd", the measure-valued derivative of the
            critic, which trusts it for all that follows (Mohamed et al. 2020). The last two are for
            Gaussians. At the action, the critic is that of the expected next state.
        horizon: imagined states H of each trajectory.
        stop_grad_actor_input: block the gradient into the state that an action was chosen in
            (DreamerV1). Biased, and RP's bias can explode with the horizon: above 15, try False.
        gamma: discount per decision.
        lam: λ of the λ-returns.
        discount_weights: weight imagined step t by γᵗ in the actor's and the critic's loss.
        entropy_scale: weight of the policy's entropy in the actor's loss; 0 in DreamerV1. It keeps
            actions off their bounds, where the tanh passes no gradient, and choices from being
            made before all of them were tried. "auto" is for scaled returns: 0.002 for a Box,
            0.003 for choices.
        scale_returns: divide the returns in the actor's loss by max(1, S), where S averages their
            range from the 5th to the 95th percentile, so that one entropy_scale suits all tasks
            (DreamerV3). False in DreamerV1.
        slow_critic_rate: rate at which a slow copy follows the critic at each update. The copy
            bootstraps the returns and regularises the critic (0.02 in DreamerV3). 0 keeps none, as
            in DreamerV1.
        slow_actor_rate: rate at which a slow copy follows the actor at each update. The copy acts,
            in the environment and in `predict`, while imagination improves the actor itself. It
            averages out how the actor changes from update to update. 0 keeps none, as in DreamerV1.
        model_learning_rate: step size of the world model, or "auto", which with images is a third
            of what it is without.
        adam_eps: Adam's epsilon.
        max_grad_norm: global-norm clip of each of the three optimizers.
        batch_size: sequences per batch.
        sequence_length: entries L of each sequence; an episode of T steps has T + 1. Sequences
            may hold the end of an episode and the beginning of the next.
        imagination_starts: states of a batch that imagination starts from; 0 for all of them.
            None is terminal.
        buffer_size: entries the replay holds, at least L per environment.
        storage: where the replay lies: "ram", "disk" (memory-mapped) or "device" (the GPU).
        learning_starts: uniformly random steps before learning begins.
        train_freq: steps between rounds of updates.
        gradient_steps: updates per round, unless `replay_ratio` is set.
        replay_ratio: replayed entries per decision (DreamerV3's, also called train ratio), which
            makes replay_ratio / (batch_size · sequence_length) updates per decision; 0 leaves
            their number to gradient_steps. Of the random steps before learning, as many count as
            one round has.
        exploration_noise: standard deviation of the noise added to actions in [-1, 1] while
            collecting; where actions are choices, the probability of a uniformly random one.
        hold_exponent: while collecting, hold the policy's noise for d decisions with probability
            ∝ d^-hold_exponent, so that exploration has all time scales (Dabney et al. 2021). So are
            the random actions before, which are then at the bounds of a Box (Seyde et al. 2021).
            0 draws noise anew for each decision.
        kl_scale: weight of the KL term of the model's loss.
        representation_scale: weight of that term's gradient in the posterior, relative to that in
            the prior: 1 is the plain KL divergence of DreamerV1, less is KL balancing (0.2 in
            DreamerV3), "auto" is 1 where all observations are vectors, and else 0.1.
        free_nats: KL below which the term has no gradient, or "auto": 0 where all observations are
            vectors, whose information may be less than a nat per step, and with images or choices
            1 (DreamerV3), without which a model may take long to notice that they tell anything.
        free_nats_per_step: apply the free nats to every step rather than to the mean.
        decoded_share: share of a batch's images, drawn anew for each update, that the model must
            reconstruct. Less than 1 leaves the loss's mean as it is, and most of the decoder's work
            undone: neighbouring images say much the same.
        discount_head: predict where episodes end, from the first episode that terminates on (until
            then γ is constant). False imagines that the task goes on, as if nothing had ended.
        discount_scale: weight of the discount head's loss.
        pretrained_world_model: run folder or saved DreamerTPX whose world model this one starts
            from, with a fresh actor and critic (Parmas et al. 2023, App. C.3). The model keeps
            learning.
        nonfinite: what to do when a gradient is not finite: "stop" with an error, or "skip" the
            step and count it (train/skipped_steps).
        bf16: run the networks in bfloat16 (losses stay float32).
        compile: compile one step of imagination and of the filter with torch.compile.
        cuda_graph: on a GPU, launch an update as one CUDA graph.
        policy_kwargs: sizes of the networks, for example {"deter": 200, "width": 400}.
        stats_window_size: episodes that rollout/ep_rew_mean averages over.
        tensorboard_log: folder for TensorBoard events, or None.
        verbose: 1 prints the logged scalars.
        seed: seeds everything random; the same seed gives the same run on the same CPU.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        group: processes that learn this agent together (torch.distributed). Each passes
            environments of its own, equally many, and holds its part of the replay; batch_size,
            imagination_starts, buffer_size and steps count those of all. None: this one alone.

    Raises:
        ValueError: a value out of range, with what was expected.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"DreamerPolicy": DreamerPolicy}
    action_spaces = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete)
    no_vec_normalize: ClassVar[str] = (
        "DreamerTPX learns to reconstruct raw observations, whose scale VecNormalize keeps "
        "changing; pass the environment without VecNormalize"
    )
    fixed_arguments: ClassVar[tuple[str, ...]] = (
        "policy_kwargs", "discount_head", "slow_critic_rate", "slow_actor_rate", "buffer_size",
        "storage", "pretrained_world_model",
    )  # fmt: skip
    policy: DreamerPolicy

    def __init__(
        self,
        policy: str | type[DreamerPolicy] = "DreamerPolicy",
        env: GymEnv | str | None = None,
        learning_rate: Annotated[float, AtLeast(0)] | Schedule = 8e-5,
        estimator: str | Estimator = "tpx",
        *,
        node: Literal["auto", "latent", "action", "both"] = "auto",
        credit: Literal["all", "own"] = "all",
        baseline: Literal["leave-one-out", "mean", "critic"] = "leave-one-out",
        leg: Literal["score", "first-order", "lax", "mvd"] = "score",
        horizon: Annotated[int, AtLeast(2)] = 15,
        stop_grad_actor_input: bool = True,
        gamma: Annotated[float, Within(0, 1)] = 0.99,
        lam: Annotated[float, Within(0, 1)] = 0.95,
        discount_weights: bool = True,
        entropy_scale: Annotated[float, AtLeast(0)] | Literal["auto"] = 0.0,
        scale_returns: bool = False,
        slow_critic_rate: Annotated[float, Within(0, 1)] = 0.0,
        slow_actor_rate: Annotated[float, Within(0, 1)] = 0.0,
        model_learning_rate: Annotated[float, Above(0)] | Literal["auto"] = 6e-4,
        adam_eps: Annotated[float, Above(0)] = 1e-7,
        max_grad_norm: Annotated[float, Above(0)] = 100.0,
        batch_size: Annotated[int, AtLeast(1)] = 50,
        sequence_length: Annotated[int, AtLeast(2)] = 50,
        imagination_starts: Annotated[int, ZeroOrAtLeast(3)] = 0,
        buffer_size: Annotated[int, AtLeast(2)] = 1_000_000,
        storage: Literal["ram", "disk", "device"] = "ram",
        learning_starts: Annotated[int, AtLeast(1)] = 2500,
        train_freq: Annotated[int, AtLeast(1)] = 500,
        gradient_steps: Annotated[int, AtLeast(1)] = 100,
        replay_ratio: Annotated[float, Within(0, 1_000_000)] = 0.0,  # more would not end
        exploration_noise: Annotated[float, AtLeast(0)] = 0.3,
        hold_exponent: Annotated[float, AtLeast(0)] = 0.0,
        kl_scale: Annotated[float, AtLeast(0)] = 1.0,
        representation_scale: Annotated[float, AtLeast(0)] | Literal["auto"] = 1.0,
        free_nats: Annotated[float, AtLeast(0)] | Literal["auto"] = 3.0,
        free_nats_per_step: bool = False,
        decoded_share: Annotated[float, Within(0, 1, open_below=True)] = 1.0,
        discount_head: bool = True,
        discount_scale: Annotated[float, Above(0)] = 10.0,
        pretrained_world_model: str | None = None,
        nonfinite: Literal["stop", "skip"] = "stop",
        bf16: bool = False,
        compile: bool = False,
        cuda_graph: bool = False,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: Annotated[int, AtLeast(1)] = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        group: dist.ProcessGroup | None = None,
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
        self.group = group
        self.estimator, self.node, self.baseline = estimator, node, baseline
        self.credit, self.leg = credit, leg
        self.horizon, self.stop_grad_actor_input = horizon, stop_grad_actor_input
        self.gamma, self.lam, self.discount_weights = gamma, lam, discount_weights
        self.entropy_scale, self.scale_returns = entropy_scale, scale_returns
        self.slow_critic_rate, self.slow_actor_rate = slow_critic_rate, slow_actor_rate
        self.representation_scale = representation_scale
        self.model_learning_rate, self.adam_eps = model_learning_rate, adam_eps
        self.max_grad_norm = max_grad_norm
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.imagination_starts = imagination_starts
        self.buffer_size, self.storage = buffer_size, storage
        self.learning_starts, self.train_freq = learning_starts, train_freq
        self.gradient_steps, self.replay_ratio = gradient_steps, replay_ratio
        self.exploration_noise, self.hold_exponent = exploration_noise, hold_exponent
        self.kl_scale, self.discount_scale = kl_scale, discount_scale
        self.free_nats, self.free_nats_per_step = free_nats, free_nats_per_step
        self.decoded_share = decoded_share
        self.discount_head, self.pretrained_world_model = discount_head, pretrained_world_model
        self.nonfinite = nonfinite
        self.bf16, self.compile, self.cuda_graph = bf16, compile, cuda_graph
        self.replay_buffer: SequenceReplay | None = None
        # Filter state and previous action of the running episodes.
        self._memory: tuple[State, Tensor] | None = None
        self._held_random, self._held_noise = HeldNoise(), HeldNoise()
        # Rounds of updates, and steps since the last. Files hold both, so that a loaded agent keeps
        # the rhythm of updates and logs.
        self._rounds = self._since_round = 0
        self._owed = 0.0  # entries that the replay ratio asks for and that were not replayed yet
        self._figures_due = 0.0  # time.monotonic() of the next figures for TensorBoard
        self._has_offset = False  # whether the world model's offset is settled
        self._has_terminated = False  # whether a stored episode ever did
        if _init_setup_model:
            self._setup_model()
            if pretrained_world_model is not None:  # not in _setup_model, which `load` calls too
                load_world_model(self.policy.model, pretrained_world_model)

    # ----------------------------------------------------------------------------------------
    # set-up
    # ----------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        self._check_arguments()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        kwargs = {
            "discount_head": self.discount_head,
            "slow_critic": self.slow_critic_rate > 0,
            "slow_actor": self.slow_actor_rate > 0,
            **self.policy_kwargs,
        }
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule, **kwargs
        ).to(self.device)
        self._update = DreamerUpdate(self.policy, self._update_settings())
        self._join()
        self._fix_arguments()

    def set_random_seed(self, seed: int | None = None) -> None:
        """Like SB3's, and also seed the noise of acting and learning."""
        super().set_random_seed(seed)
        self._rng = np.random.default_rng(self._generator.initial_seed())

    def _setup_learn(
        self, total_timesteps: int, callback: MaybeCallback = None,
        reset_num_timesteps: bool = True, *args: Any, **kwargs: Any,
    ) -> tuple[int, BaseCallback]:  # fmt: skip
        is_reset = reset_num_timesteps or self._last_obs is None
        if reset_num_timesteps:
            self._rounds = 0
        total, callback = super()._setup_learn(
            total_timesteps, callback, reset_num_timesteps, *args, **kwargs
        )
        assert self.env is not None and self._last_obs is not None
        if self.replay_buffer is None:  # not in the constructor, or `load` would allocate it
            self.replay_buffer = self._new_replay()
            if self.verbose:
                print(self.replay_buffer.describe())
                if resized := self.policy.to_model.describe():
                    print(resized)
            if self.device.type == "cpu":
                keep_freed_memory()
        check_finite(self.num_timesteps, self._last_obs)
        self._settle_offset(self.policy.to_model(self._last_obs))
        if is_reset or self._memory is None:
            self.replay_buffer.start(self.policy.to_model(self._last_obs))
            self._memory = self.policy.initial_state(self.env.num_envs)
            self._held_random, self._held_noise = HeldNoise(), HeldNoise()
        return total, callback

    def _setup_offline(
        self, total_timesteps: int, callback: MaybeCallback, reset_num_timesteps: bool,
        tb_log_name: str, progress_bar: bool,
    ) -> tuple[int, BaseCallback]:  # fmt: skip
        """Like `_setup_learn`, but the environment is left alone, which SB3 would reset."""
        replay = self.replay_buffer
        if replay is None:
            raise ValueError(
                "there is no experience to learn from: call load_dataset or load_replay_buffer "
                "first"
            )
        if not replay.has_windows(self.sequence_length):
            raise ValueError(
                f"{replay} holds less than a sequence of each environment, {self.n_envs} x "
                f"{self.sequence_length} entries: take a smaller sequence_length, or more data"
            )
        total_timesteps = self._check_call(total_timesteps)
        if reset_num_timesteps:
            self.num_timesteps = self._rounds = 0
            self.ep_info_buffer = self.ep_success_buffer = None
            if self.tensorboard_log is not None and not self._custom_logger:
                # SB3 begins a new folder of events only where it resets; else it takes the newest.
                number = 1 + get_latest_run_id(self.tensorboard_log, tb_log_name)
                Path(self.tensorboard_log, f"{tb_log_name}_{number}").mkdir(parents=True)
        self._last_obs = np.empty(0)  # or SB3 would reset
        try:
            total, callback = super()._setup_learn(
                total_timesteps, callback, False, tb_log_name, progress_bar
            )
        finally:
            self._last_obs = self._memory = None
        if progress_bar:  # the last of a list; it would advance by the number of environments
            assert isinstance(callback, CallbackList)
            callback.callbacks[-1] = _UpdatesBar()
            callback.callbacks[-1].init_callback(self)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._settle_offset(replay.oldest())
        return total, callback

    def _settle_offset(self, observations: Arrays) -> None:
        """Learn vectors as differences from the first of these, unless something was learned."""
        if not self._has_offset and not self._n_updates and self.pretrained_world_model is None:
            self.policy.model.set_offset(first(to_tensors(observations, self.device)))
            self._processes.send(self.policy.model)
        self._has_offset = True

    def _new_replay(self, parts: int | None = None) -> SequenceReplay:
        """An empty replay for the environments that are set, one of so many parts of the whole."""
        assert self.env is not None
        return SequenceReplay(
            self.buffer_size // (parts or self._processes.size),
            self.policy.to_model.shapes,
            self.policy.to_model.dtypes,
            self.policy.n_actions,
            self.env.num_envs,
            options=self.policy.to_model.options,
            device=self.device,
            storage=self.storage,
            folder=tempfile.gettempdir(),
        )

    # ----------------------------------------------------------------------------------------
    # the loop
    # ----------------------------------------------------------------------------------------

    @explain_dead_workers
    def learn(
        self: SelfDreamerTPX,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "DreamerTPX",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDreamerTPX:
        """Collect steps and learn until `total_timesteps` decisions are made.

        A round of updates follows every `train_freq` steps, even if they are spread over several
        calls of `learn`. It is skipped while an environment has not `sequence_length` entries: an
        agent loaded without its replay first acts until there are, with its policy if
        reset_num_timesteps is False, so that the random decisions count as made.

        Args:
            total_timesteps: decisions to make; exact up to the number of environments. Imagined
                steps do not count and do not trigger callbacks.
            callback: as in SB3.
            log_interval: rounds of updates between log dumps.
            tb_log_name: as in SB3.
            reset_num_timesteps: as in SB3.
            progress_bar: as in SB3.

        Raises:
            ValueError: an observation or reward is not finite.
            RuntimeError: an environment's process died.
        """
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        callback.on_training_start(locals(), globals())
        before = self.num_timesteps, self._n_updates
        while self.num_timesteps < total_timesteps:
            due = self.num_timesteps + self.train_freq - self._since_round
            due = max(due, self.learning_starts)
            # The start of the round: at its end, the last updates would have no step size left.
            begun = max(self.num_timesteps - self._since_round, 0)
            self._update_current_progress_remaining(begun, total_timesteps)
            if not self._collect(callback, min(due, total_timesteps)):
                break
            if self.num_timesteps < due:  # the next call of `learn` completes the round
                break
            made, self._since_round = self._since_round, 0
            assert self.replay_buffer is not None
            has_windows = self.replay_buffer.has_windows(self.sequence_length)
            if not self._processes.any(not has_windows) and (updates := self._updates_due(made)):
                self._round(updates, log_interval)
        callback.on_training_end()
        steps = self.num_timesteps - before[0]
        if self.verbose and steps and self._n_updates == before[1]:
            due = max(
                self.num_timesteps + self.train_freq - self._since_round, self.learning_starts
            )
            asked = f", and replay_ratio={self.replay_ratio:g} asks for one"
            print(
                f"no update was made in these {steps:,} steps: the next is due after step {due:,} "
                f"(learning_starts={self.learning_starts:,}, train_freq={self.train_freq:,}), once "
                f"every environment has stored {self.sequence_length} entries"
                f"{asked if self.replay_ratio else ''}"
            )
        return self

    def learn_offline(
        self: SelfDreamerTPX,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "DreamerTPX",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDreamerTPX:
        """Learn from the replay alone, which `load_dataset` or `load_replay_buffer` has filled.

        A step is a gradient update here: it counts in `num_timesteps`, on which logs, evaluations
        and checkpoints go by, and is a step for callbacks. Updates are those of `learn`, in rounds
        of `gradient_steps`. The environment is neither stepped nor reset, and the next `learn`
        begins new episodes. What is about acting has no effect: `learning_starts`, `train_freq`,
        `replay_ratio`, `exploration_noise` and `hold_exponent`.

        Logged are, besides what `learn` logs, the mean and the largest return of the stored
        episodes (data/ep_rew_mean, data/ep_rew_max), and their mean discounted return-to-go
        (data/return), of which train/return is the imagined counterpart.

        Args:
            total_timesteps: updates to make.
            callback: as in SB3.
            log_interval: rounds of updates between log dumps.
            tb_log_name: as in SB3.
            reset_num_timesteps: as in SB3.
            progress_bar: as in SB3.

        Raises:
            ValueError: the replay is empty, or holds no sequence.
        """
        total_timesteps, callback = self._setup_offline(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        assert self.replay_buffer is not None
        data = self.replay_buffer.returns(self.gamma)
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps:
            callback.on_rollout_start()
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            made = self.num_timesteps % self.gradient_steps  # of a round that was cut
            updates = min(self.gradient_steps - made, total_timesteps - self.num_timesteps)
            if not self._round(updates, log_interval, callback, data):
                break
            callback.on_rollout_end()
        callback.on_training_end()
        return self

    def _round(
        self, updates: int, log_interval: int, callback: BaseCallback | None = None,
        data: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> bool:  # fmt: skip
        """Make a round of updates and write the logs.

        Args:
            updates: their number.
            log_interval: rounds between log dumps.
            callback: of `learn_offline`, to which each update is a step.
            data: what the data earned that all is learned from, as `SequenceReplay.returns` says.

        Returns:
            False if the callback stopped it.
        """
        goes_on = self.train(updates, callback)
        self._rounds += 1
        if log_interval and self._rounds % log_interval == 0:
            self.dump_logs() if data is None else self._dump_offline(*data)
        return goes_on

    def _collect(self, callback: BaseCallback, until: int) -> bool:
        """Act until `until` steps are made; False if a callback stopped the rollout."""
        env, replay, to_model = self.env, self.replay_buffer, self.policy.to_model
        assert env is not None and replay is not None
        n_envs = env.num_envs * self._processes.size
        callback.on_rollout_start()
        seen = to_model(self._last_obs)
        while self.num_timesteps < until:
            drawn = self._act(seen)
            actions = self.policy.to_env(drawn)
            new_obs, rewards, dones, infos = env.step(actions)
            self.num_timesteps += n_envs
            check_finite(self.num_timesteps, new_obs, rewards, infos, dones)  # type: ignore[arg-type]
            self._since_round += n_envs
            seen = to_model(new_obs)
            ends = list(infos)  # callbacks see the environment's own
            for i in np.flatnonzero(dones):
                end = to_model.one(infos[i]["terminal_observation"])
                ends[i] = {**infos[i], "terminal_observation": end}
            replay.step(drawn, seen, rewards, dones, ends)
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
        callback.on_rollout_end()
        return True

    def _act(self, observations: Arrays) -> np.ndarray:
        """Actions [n, A]: random for `learning_starts` steps, then of the noisy policy."""
        assert self._memory is not None
        is_random = self.num_timesteps < self.learning_starts
        state, previous = self._memory
        is_first = np.asarray(self._last_episode_starts)
        held = self._held_random if is_random else self._held_noise

        def hold(noise: Tensor) -> Tensor:
            return held(noise, is_first, self.hold_exponent, self._rng)

        if is_random:  # without the filter, whose state remains zero, as where sequences begin
            form = self.policy.actions
            draw = form.extreme if self.hold_exponent else form.random
            random = draw(count(observations), self._rng)
            action = hold(torch.as_tensor(random, device=self.device))
            self._memory = state, action
            return action.cpu().numpy()
        starts = torch.as_tensor(is_first, device=self.device)
        seen = to_tensors(observations, self.device)
        action, state = self.policy.step(
            seen, state, previous, starts.bool(), deterministic=False,
            generator=self._generator, hold=hold,
        )  # fmt: skip
        action = self.policy.actions.explore(action, self.exploration_noise, self._generator)
        self._memory = state, action
        return action.cpu().numpy()

    def _updates_due(self, steps: int) -> int:
        """Updates of the round that ends now, after so many steps."""
        if not self.replay_ratio:
            return self.gradient_steps
        # The first round ends with the warm-up, of which it counts what any other round has.
        steps = min(steps, self.train_freq + self.n_envs * self._processes.size - 1)
        owed = self._owed + steps * self.replay_ratio
        updates, self._owed = divmod(owed, self.batch_size * self.sequence_length)
        return int(updates)

    def train(self, gradient_steps: int, callback: BaseCallback | None = None) -> bool:
        """Update world model, actor and critic `gradient_steps` times.

        Args:
            gradient_steps: number of updates.
            callback: if given, each update is a step: it is counted, and the callback called.

        Returns:
            False if the callback stopped it.
        """
        assert self.replay_buffer is not None
        goes_on = True
        self.policy.set_training_mode(True)
        self._notice_terminations(self.replay_buffer)
        self._update.configure(self._update_settings())
        rate = self._step_size()
        self._update.set_learning_rate(rate)
        self.logger.record("train/learning_rate", rate)
        draw = self.tensorboard_log is not None and time.monotonic() >= self._figures_due
        if draw:
            self._figures_due = time.monotonic() + FIGURE_SECONDS
        batch_size = self._processes.share(batch_size=self.batch_size)
        with Round(self, draw=draw, skips=self.nonfinite == "skip") as log:
            for step in range(gradient_steps):
                batch = self.replay_buffer.sample(batch_size, self.sequence_length, self._rng)
                measure = step % GAUGE_EVERY == 0
                record = self._update(batch, self._generator, measure=measure)
                if self.nonfinite == "stop":
                    norms = {n: record.scalars[f"{n}_gradient_norm"] for n in REMEDIES}
                    check_gradients(self.num_timesteps, self._n_updates, norms, REMEDIES)
                self._n_updates += 1
                log.add(record)
                if callback is not None:
                    self.num_timesteps += 1
                    callback.update_locals(locals())
                    goes_on = callback.on_step()
                    if not goes_on:
                        break
        self.policy.set_training_mode(False)
        return goes_on

    def _notice_terminations(self, replay: SequenceReplay) -> None:
        """The first episode that terminates switches the discount head on, or is a warning."""
        if self._has_terminated or not self._processes.any(replay.has_terminal()):
            return
        self._has_terminated = True
        if not self.discount_head:
            warnings.warn(
                "the environment terminates episodes, but with discount_head=False DreamerTPX "
                "imagines that they go on, and does not learn to avoid (or to reach) their end: "
                "pass discount_head=True, unless the rewards alone say what to do",
                stacklevel=3,
            )

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: RecurrentState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, RecurrentState | None]:
        """Return actions and the recurrent state for the next call; see `DreamerPolicy.predict`."""
        self.check_observation(observation)
        return self.policy.predict(observation, state, episode_start, deterministic)

    def dump_logs(self) -> None:
        """Write everything recorded since the last dump, every `log_interval` rounds."""
        record_decisions(self)
        self.logger.dump(step=self.num_timesteps)

    def _dump_offline(self, episodes: np.ndarray, to_go: np.ndarray) -> None:
        """`dump_logs` of learning from data alone, with what they earned."""
        record_data(self, episodes, to_go)
        self.logger.dump(step=self.num_timesteps)

    # ----------------------------------------------------------------------------------------
    # environments and files
    # ----------------------------------------------------------------------------------------

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Like SB3's; raises ValueError for VecNormalize."""
        super().set_env(env, force_reset)
        if force_reset:
            self._memory = None

    def save_replay_buffer(self, path: str | Path) -> None:
        """Write the replay to a file.

        Args:
            path: where to write; ".npz" is appended if it has no suffix.

        Raises:
            ValueError: there is no replay yet.
            TypeError: it is no path.
        """
        if self.replay_buffer is None:
            raise ValueError("there is no replay yet: the first call of learn makes it")
        self.replay_buffer.save(with_suffix(_path(path), ".npz"))

    def load_replay_buffer(self, path: str | Path, truncate_last_traj: bool = True) -> None:
        """Read a replay that `save_replay_buffer` wrote; the next `learn` begins new episodes.

        Args:
            path: of the file.
            truncate_last_traj: SB3's, which must be True here.

        Raises:
            ValueError: no environment is set, or the file does not fit.
        """
        self._check_replay_call(truncate_last_traj)
        path = existing(_path(path), ".npz")
        if self.replay_buffer is not None:  # refuse a bad file before the old replay is lost
            self.replay_buffer.check(path)
        # A GPU may not hold two replays, so free the old one first.
        self._last_obs = self._memory = self.replay_buffer = None
        self.replay_buffer = self._new_replay()
        self.replay_buffer.load(path)

    def load_dataset(self, dataset: str | Path | MinariDataset) -> None:
        """Fill the replay with the episodes of a Minari dataset, in place of what it held.

        Each step of the dataset is taken for one decision: data of an environment with an action
        repeat were recorded outside of it. Actions are scaled by the bounds of the action space,
        and clipped to them, with a warning. Images are resized as while acting.

        Args:
            dataset: a Minari dataset, its id ("mujoco/hopper/medium-v0"), which is downloaded where
                it is not found, or the folder that holds it.

        Raises:
            ValueError: the dataset cannot be read, is of other spaces than the agent, is larger
                than the replay, or holds what no episode gives. No environment is set, or several
                processes learn this agent.
        """
        if self.env is None:
            raise ValueError("set an environment first: load(path, env=...) or set_env(env)")
        if self._processes.size > 1:
            raise ValueError(
                f"a dataset is learned from in one process, and the group has "
                f"{self._processes.size}: leave out `group`"
            )
        data = open_dataset(dataset)
        check_spaces(data, self, "the agent")
        entries = data.total_steps + data.total_episodes
        if entries > (room := self.buffer_size // self.n_envs * self.n_envs):
            needed = -(-entries // self.n_envs) * self.n_envs
            raise ValueError(
                f"the dataset '{data.id}' has {data.total_steps:,} steps in "
                f"{data.total_episodes:,} episodes, which are {entries:,} entries, and the replay "
                f"has room for {room:,}: pass buffer_size={needed}, or part of the dataset "
                "(minari.split_dataset)"
            )
        # As in `load_replay_buffer`, the old one is freed first.
        self._last_obs = self._memory = self.replay_buffer = None
        replay = self._new_replay()
        if self.verbose:
            print(replay.describe())
        n_clipped = fill(replay, data, ObservationForm(data.observation_space), self.policy.actions)
        if n_clipped:
            warnings.warn(
                f"{n_clipped:,} of the dataset's {data.total_steps:,} actions lie outside of the "
                "action space and were clipped to its bounds, as most environments do",
                stacklevel=2,
            )
        self.replay_buffer = replay

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Add the generators, the filter's state, and the replay in segments."""
        memory = None if self._memory is None else [*self._memory[0], self._memory[1]]
        state: dict[str, Any] = {
            **super().state_dict(folder),
            "generator": self._generator.get_state(),
            "rng": self._rng.bit_generator.state,
            "memory": memory,
            "held": [x.state_dict() for x in (self._held_random, self._held_noise)],
            "replay": None,
        }
        if self.replay_buffer is not None:
            state |= self.replay_buffer.state_dict(folder)
        if self.group is not None:  # for who reads it alone, such as `totalprop diagnose`
            state["replay_parts"] = self._processes.size
        return state

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state, folder)
        self._generator.set_state(state["generator"])
        self._rng.bit_generator.state = state["rng"]
        if state["memory"] is not None:
            deter, stoch, action = (tensor.to(self.device) for tensor in state["memory"])
            self._memory = State(deter, stoch), action
        if "held" in state:  # older files have none
            for held, kept in zip((self._held_random, self._held_noise), state["held"]):
                held.load_state_dict(kept, self.device)
        if state["replay"] is not None:
            self.replay_buffer = self._new_replay(state.get("replay_parts"))
            self.replay_buffer.load_state_dict(state, folder)

    def cut_episodes(self) -> None:
        """Begin new episodes at the next `learn`; the running ones count as truncated."""
        super().cut_episodes()
        self._memory = None

    def _excluded_save_params(self) -> list[str]:
        own = [
            "replay_buffer", "_update", "_generator", "_rng", "_memory", "_figures_due",
            "_held_random", "_held_noise",
        ]  # fmt: skip
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *(f"_update.{name}_optimizer" for name in REMEDIES)], []

    # ----------------------------------------------------------------------------------------
    # arguments
    # ----------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        """One sentence per wrong value, before any work is done."""
        check_arguments(self)
        for name, own in (
            ("discount_head", "discount_head"),
            ("slow_critic", "slow_critic_rate"),
            ("slow_actor", "slow_actor_rate"),
        ):
            if name in self.policy_kwargs:
                raise ValueError(f"pass {own} to DreamerTPX, not {name} in policy_kwargs")
        self._check_estimator()
        self._check_credit()
        self._check_spaces()
        self._processes.share(batch_size=self.batch_size)
        if self.cuda_graph and self._processes.size > 1:
            raise ValueError(
                "a CUDA graph records one process alone, and the group has "
                f"{self._processes.size}: pass cuda_graph=False"
            )

    def _check_estimator(self) -> None:
        is_object = isinstance(self.estimator, estimators.Estimator)
        if is_object and (self.baseline != "leave-one-out" or self.leg != "score"):
            raise ValueError(
                "an Estimator brings its own baseline and legs: pass baseline and legs to "
                "estimators.make(...), not to DreamerTPX"
            )
        starts = self.batch_size * self.sequence_length
        if self.imagination_starts > 0:
            starts = min(self.imagination_starts, starts)
        has_choices, node = self._has_choices(), self._resolved_node()
        is_one_hot = self.policy_kwargs.get("latent") == "categorical"
        kinds = [has_choices] * (node != "latent") + [is_one_hot] * (node != "action")
        estimator = self._resolved_estimator()
        for is_categorical in kinds:
            try_estimator(
                estimator,
                [starts],
                has_value=True,
                has_critic=True,
                is_categorical=is_categorical,
            )
        if self.stop_grad_actor_input and has(estimator.weight, "compares_means"):
            warnings.warn(
                "the estimator takes a difference between the means of RP and LR for a bias of RP, "
                "and with stop_grad_actor_input=True they differ by design, so that it follows LR: "
                "pass stop_grad_actor_input=False",
                stacklevel=4,
            )

    def _check_credit(self) -> None:
        """Own returns are found inside that of the first state, see `imagine`."""
        # It holds the credit of step t times λᵗ, which float32 must be able to divide by.
        smallest = 1e-30 ** (1 / (self.horizon - 1))
        needed = {
            "discount_weights=True": self.discount_weights,
            f"lam above {smallest:.2g} at horizon {self.horizon}": self.lam > smallest,
        }
        missing = [condition for condition, is_met in needed.items() if not is_met]
        if self.credit == "own" and missing:
            raise ValueError(f"credit='own' needs {' and '.join(missing)}, or choose credit='all'")

    def _has_choices(self) -> bool:
        return not isinstance(self.action_space, spaces.Box)

    def _resolved_entropy_scale(self) -> float:
        if self.entropy_scale == "auto":
            return 3e-3 if self._has_choices() else 2e-3
        return self.entropy_scale

    def _resolved_node(self) -> NodeKind:
        if self.node == "auto":
            return "action" if self._has_choices() else "latent"
        return self.node

    def _resolved_estimator(self) -> estimators.Estimator:
        """The estimator, with the agent's baseline and leg where these are not the default."""
        name: str | Estimator = self.estimator
        changes: dict[str, Any] = {}
        if name == "auto":
            name = "tpx"
            if self._has_choices() and self._resolved_node() == "action":
                name, changes["baseline"] = "lr", "critic"
        if self.baseline != "leave-one-out":
            changes["baseline"] = self.baseline
        if self.leg != "score":
            changes["legs"] = self.leg
        return estimators.make(name, **changes)

    def _resolved(self, name: str) -> float:
        """The value of an argument that may be "auto"."""
        value: float | Literal["auto"] = getattr(self, name)
        if value != "auto":
            return value
        seen = self.policy.to_model
        auto = AUTO[name]
        return auto.images if seen.has_images else auto.choices if seen.options else auto.vectors

    def _check_spaces(self) -> None:
        ObservationForm(self.observation_space)  # raises for a space that is not supported
        length = self.sequence_length
        n_envs = 0 if self.env is None else self.env.num_envs * self._processes.size
        if n_envs and self.buffer_size // n_envs < length:
            raise ValueError(
                f"buffer_size must hold a sequence of every environment, at least "
                f"{length} x {n_envs}, got {self.buffer_size}"
            )
        if self._has_choices() and self.exploration_noise > 1:
            raise ValueError(
                "exploration_noise is a probability where actions are choices, at most 1, got "
                f"{self.exploration_noise}"
            )

    def _update_settings(self) -> UpdateSettings:
        """The agent's arguments, as they are now, as the settings of a gradient step."""
        processes = self._processes
        return UpdateSettings(
            estimator=replace(self._resolved_estimator(), group=self.group),
            imagination=ImaginationSettings(
                gamma=self.gamma,
                lam=self.lam,
                stop_grad_actor_input=self.stop_grad_actor_input,
                discount_weights=self.discount_weights,
                entropy_scale=self._resolved_entropy_scale(),
                scale_returns=self.scale_returns,
                node=self._resolved_node(),
                credit=self.credit,
                learned_discount=self._has_terminated,
            ),
            model=ModelLossSettings(
                kl_scale=self.kl_scale,
                representation_scale=self._resolved("representation_scale"),
                free_nats=self._resolved("free_nats"),
                free_nats_per_step=self.free_nats_per_step,
                gamma=self.gamma,
                discount_scale=self.discount_scale,
                learned_discount=self._has_terminated,
                average=processes.average_one if processes.size > 1 else None,
            ),
            horizon=self.horizon,
            decoded_share=self.decoded_share,
            imagination_starts=processes.share(imagination_starts=self.imagination_starts),
            learning_rate=self.lr_schedule(1.0),
            model_learning_rate=self._resolved("model_learning_rate"),
            adam_eps=self.adam_eps,
            max_grad_norm=self.max_grad_norm,
            slow_critic_rate=self.slow_critic_rate,
            slow_actor_rate=self.slow_actor_rate,
            bf16=self.bf16,
            compile=self.compile,
            cuda_graph=self.cuda_graph and self.device.type == "cuda",  # or a model could not move
            processes=processes,
        )  # fmt: skip


class _UpdatesBar(ProgressBarCallback):
    """Advances by one at each step."""

    def _on_step(self) -> bool:
        self.pbar.update(1)
        return True


def _path(path: str | Path) -> Path:
    """Raise TypeError for an open file: a replay is written and read in pieces, by its path."""
    if not isinstance(path, str | Path):
        raise TypeError(f"the path of a replay must be a str or Path, got {type(path).__name__}")
    return Path(path)
