"""SVG: the policy gradient through one learned step, or all of them, along real transitions.

Loop: collect a round -> fit model and reward to the replay -> fit the critic (Alg. 4) -> improve
the policy by the variant's gradient. Heess et al. 2015, "Learning Continuous Control Policies by
Stochastic Value Gradients". The gradients are in gradients.py; what is learned is in policy.py and
networks.py; the transitions are in replay.py.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import totalprop.agents.svg.gradients as gradients
import totalprop.estimators as estimators
from totalprop.agents.core.algorithm import Algorithm, existing, with_suffix
from totalprop.agents.core.metrics import record_gauge, record_progress
from totalprop.agents.core.spaces import UnsupportedSpaceError, check_vectors, describe
from totalprop.agents.core.validation import (
    Above,
    AtLeast,
    Within,
    check_arguments,
    check_finite,
    check_gradients,
    try_estimator,
)
from totalprop.agents.core.workers import explain_dead_workers
from totalprop.agents.svg.gradients import Actor, Nodes, Paths, Transitions
from totalprop.agents.svg.networks import Critic, WorldModel
from totalprop.agents.svg.policy import SVGPolicy, check_sizes
from totalprop.agents.svg.replay import Replay
from totalprop.agents.trials.problem import Problem, rewards_flaw
from totalprop.estimators import Estimator, PolicyGradient
from totalprop.estimators.gauge import SHAPE

Variant = Literal["0", "1", "1-er", "inf", "dpg"]
USES_MODEL, USES_STATE_VALUE, USES_ACTION_VALUE = ("1", "1-er", "inf"), ("1", "1-er"), ("0", "dpg")
MOST_STATES = 1000  # the parameters of the model grow with the square
SelfSVG = TypeVar("SelfSVG", bound="SVG")


class _Objective(NamedTuple):
    """What a gradient step minimises."""

    loss: Callable[[Actor], Tensor]
    samples: int  # of a node
    states: Tensor  # [..., S] that the policy acts in
    shape: tuple[int, ...]  # of k, see `Actor.meter`; () if there is no node


LEAST_STEPS = 6  # of a round of episodes, so that every estimator has the samples it needs
# What can be changed where the policy's gradient is not finite.
REMEDIES = {"policy": "smaller step sizes: learning_rate, value_learning_rate, model_learning_rate"}


class Batch(NamedTuple):
    """Transitions as tensors; states are standardised."""

    states: Tensor  # [N, S]
    actions: Tensor  # [N, A], not clipped
    rewards: Tensor  # [N]
    next_states: Tensor  # [N, S]
    terminated: Tensor  # [N] 1 or 0
    log_probs: Tensor  # [N] under the policy that drew the actions


class SVG(Algorithm):
    """Stochastic value gradients on Box vectors and Box actions.

    Args:
        policy: "MlpPolicy", or a subclass of `SVGPolicy`.
        env: environment or id; observations are vectors.
        learning_rate: step size of the policy, or a schedule over training progress.
        variant: "0" (SVG(0): the action-value's gradient), "1" (SVG(1): one step of the model, then
            the state-value's), "1-er" (the same on replayed transitions), "inf" (SVG(∞): back
            through whole episodes) or "dpg" (deterministic policy gradient, the limit of SVG(0)).
        estimator: gradient at the actions: a name in the registry or an `estimators.Estimator`.
            "rp" is the paper's; "dpg" has no other. For "lr", "tpx" and the others the samples are
            the transitions of a batch, or, for "inf", the episodes of a round.
        nodes: where the estimator forms the gradient: at the "action", or, for variants with a
            model, at "both" action and next state, whose score legs are biased where the model is
            wrong.
        n_extra_actions: actions drawn at every state besides the real one, for "0", "1" and "1-er".
            The model follows them with the noise inferred from the real transition. The estimator's
            samples are then the actions of a state.
        gamma: discount per decision.
        train_freq: steps of each environment between rounds of updates; 0: a round whenever as many
            episodes have finished as there are environments, and 6 steps. "inf" needs 0.
        horizon: steps after which an episode that goes on counts as finished.
        learning_starts: steps before the policy's first update; the rest learns from the start.
        policy_updates: gradient steps of the policy per round: the paper's K for "1-er". For "inf"
            each goes through whole episodes: take few.
        value_updates: gradient steps of the critic per round.
        model_updates: gradient steps of model and reward per round.
        batch_size: transitions per gradient step.
        buffer_size: newest transitions that are kept, of all environments.
        max_weight: at which importance weights are truncated.
        kl_weight: weight of the KL divergence from the policy of the round's start.
        max_grad_norm: V_max, the norm to which the policy's gradient is limited.
        target_interval: updates of the critic between two copies to its target.
        value_learning_rate: step size of the critic.
        model_learning_rate: step size of model and reward.
        adam_eps: epsilon of all three Adams.
        value_hidden: hidden units per layer of the critic, and of the reward network.
        model_hidden: hidden units per layer of each of the model's sub-networks.
        activation: of all networks, policy included.
        reward: whose gradient a step has. "auto" uses `cost_fn` or the environment's own
            differentiable `cost(states)` where there is one, and else learns the reward; "learned"
            always learns it. Critics learn from the rewards, but with `cost_fn`.
        cost_fn: differentiable cost of the next states, [..., S] -> [...] (torch, float64), that
            is to be low in place of high rewards. Evaluations still show the rewards.
        policy_kwargs: arguments of the policy class, for example {"net_arch": [100, 100]}.
        stats_window_size: episodes that rollout/ep_rew_mean averages over.
        tensorboard_log: folder for TensorBoard events, or None.
        verbose: 1 prints the logged scalars.
        seed: seeds everything random; the same seed gives the same run on the same CPU.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.

    Raises:
        ValueError: a value out of range, with what was expected.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": SVGPolicy}
    action_spaces = (spaces.Box,)
    function_arguments: ClassVar[tuple[str, ...]] = ("cost_fn",)
    no_vec_normalize: ClassVar[str] = (
        "SVG replays raw observations, whose scale VecNormalize keeps changing; pass the "
        "environment without VecNormalize (SVG standardises observations and rewards itself)"
    )
    fixed_arguments: ClassVar[tuple[str, ...]] = (
        "policy_kwargs", "variant", "buffer_size", "horizon", "value_hidden", "model_hidden",
        "activation",
    )  # fmt: skip
    policy: SVGPolicy

    def __init__(
        self,
        policy: str | type[SVGPolicy] = "MlpPolicy",
        env: GymEnv | str | None = None,
        learning_rate: Annotated[float, AtLeast(0)] | Schedule = 3e-4,
        variant: Variant = "1-er",
        estimator: str | Estimator = "rp",
        *,
        nodes: Nodes = "action",
        n_extra_actions: Annotated[int, AtLeast(0)] = 0,
        gamma: Annotated[float, Within(0, 1)] = 0.98,
        train_freq: Annotated[int, AtLeast(0)] = 0,
        horizon: Annotated[int, AtLeast(1)] = 1000,
        learning_starts: Annotated[int, AtLeast(0)] = 1000,
        policy_updates: Annotated[int, AtLeast(1)] = 200,
        value_updates: Annotated[int, AtLeast(0)] = 200,
        model_updates: Annotated[int, AtLeast(0)] = 200,
        batch_size: Annotated[int, AtLeast(1)] = 128,
        buffer_size: Annotated[int, AtLeast(1)] = 200_000,
        max_weight: Annotated[float, Above(0)] = 5.0,
        kl_weight: Annotated[float, AtLeast(0)] = 0.0,
        max_grad_norm: Annotated[float, Above(0)] = 10.0,
        target_interval: Annotated[int, AtLeast(1)] = 50,
        value_learning_rate: Annotated[float, Above(0)] = 1e-3,
        model_learning_rate: Annotated[float, Above(0)] = 1e-3,
        adam_eps: Annotated[float, Above(0)] = 1e-8,
        value_hidden: tuple[int, ...] = (200, 100),
        model_hidden: tuple[int, ...] = (20, 20),
        activation: Literal["tanh", "relu", "elu"] = "tanh",
        reward: Literal["auto", "learned"] = "auto",
        cost_fn: Callable[[Tensor], Tensor] | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: Annotated[int, AtLeast(1)] = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if isinstance(policy, str):  # or stable-baselines3 advises another policy before we check
            policy = cast("type[SVGPolicy]", self._get_policy_from_name(policy))
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
        self.variant, self.estimator, self.nodes = variant, estimator, nodes
        self.n_extra_actions, self.gamma = n_extra_actions, gamma
        self.train_freq, self.horizon, self.learning_starts = train_freq, horizon, learning_starts
        self.policy_updates, self.value_updates = policy_updates, value_updates
        self.model_updates, self.batch_size = model_updates, batch_size
        self.buffer_size, self.max_weight, self.kl_weight = buffer_size, max_weight, kl_weight
        self.max_grad_norm, self.target_interval = max_grad_norm, target_interval
        self.value_learning_rate = value_learning_rate
        self.model_learning_rate, self.adam_eps = model_learning_rate, adam_eps
        self.value_hidden, self.model_hidden = value_hidden, model_hidden
        self.activation, self.reward, self.cost_fn = activation, reward, cost_fn
        self.replay_buffer: Replay | None = None
        self._rounds = self._n_value_updates = self._since_round = 0
        self._needs_cost_fn = self._warned_of_rewards = False
        if _init_setup_model:
            self._setup_model()

    # ----------------------------------------------------------------------------------------
    # set-up
    # ----------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        # Lists where they come from a file or the command line.
        for name in ("value_hidden", "model_hidden"):
            check_sizes(name, getattr(self, name))
            setattr(self, name, tuple(getattr(self, name)))
        self._check_arguments()
        self._cost = self._find_cost()
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        states, actions = self._sizes()
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space, self.action_space, self.lr_schedule,
            activation=self.activation, **self.policy_kwargs,
        ).to(self.device)  # fmt: skip
        self.policy_optimizer = self._adam(self.policy.learned.values(), self.lr_schedule(1))
        if self.variant in USES_MODEL:
            self.world_model = WorldModel(
                states, actions, hidden=self.model_hidden, reward_hidden=self.value_hidden,
                activation=self.activation,
            ).to(self.device)  # fmt: skip
            self.model_optimizer = self._adam(
                self.world_model.parameters(), self.model_learning_rate
            )
        if self.variant != "inf":
            self.critic = Critic(
                states, actions if self.variant in USES_ACTION_VALUE else 0,
                hidden=self.value_hidden, activation=self.activation,
            ).to(self.device)  # fmt: skip
            self.critic_optimizer = self._adam(
                self.critic.network.parameters(), self.value_learning_rate
            )
        self._fix_arguments()

    def _adam(self, parameters: Any, rate: float) -> torch.optim.Adam:
        return torch.optim.Adam(list(parameters), rate, eps=self.adam_eps)

    def _sizes(self) -> tuple[int, int]:
        """S and A."""
        assert self.observation_space.shape is not None and self.action_space.shape is not None
        return self.observation_space.shape[0], self.action_space.shape[0]

    def set_random_seed(self, seed: int | None = None) -> None:
        """Like SB3's, and also seed the generators of actions and batches."""
        super().set_random_seed(seed)
        self._rng = np.random.default_rng(self._generator.initial_seed())

    def _find_cost(self) -> Callable[[Tensor], Tensor] | None:
        """The known cost of next states in the environment's units, or None: it is learned."""
        if self.reward == "learned" or (self.variant not in USES_MODEL and self.cost_fn is None):
            return None
        space = self.observation_space
        assert isinstance(space, spaces.Box)
        problem = Problem(
            self.env, space, cost_fn=self.cost_fn, termination="ignore", device=self.device
        )
        return problem.cost

    def _adopt_env(self) -> None:
        """Take the environment's cost."""
        self._cost = self._find_cost()

    def _new_replay(self) -> Replay:
        assert self.env is not None
        space = self.observation_space
        kind = np.float64 if space.dtype == np.float64 else np.float32
        return Replay(
            self.buffer_size, *self._sizes(), kind, n_envs=self.env.num_envs, horizon=self.horizon
        )

    # ----------------------------------------------------------------------------------------
    # the loop
    # ----------------------------------------------------------------------------------------

    @explain_dead_workers
    def learn(
        self: SelfSVG,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "SVG",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfSVG:
        """Collect rounds and learn from each until `total_timesteps` decisions are made.

        A round that `total_timesteps` cuts is completed by the next call of `learn`.

        Args:
            total_timesteps: decisions to make; exact up to the number of environments.
            callback: as in SB3.
            log_interval: rounds between log dumps.
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
        self._cost = self._find_cost()  # attributes may have been set since
        self._check_given_again()
        check_finite(self.num_timesteps, np.array(self._last_obs))
        if self.replay_buffer is None:
            self.replay_buffer = self._new_replay()
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps:
            # The start of the round: at its end, the last updates would have no step size left.
            begun = max(self.num_timesteps - self._since_round, 0)
            self._update_current_progress_remaining(begun, total_timesteps)
            if not self._is_due() and not self._collect(callback, total_timesteps):
                break
            if not self._is_due():  # the next call of `learn` completes the round
                break
            self.train()
            self._rounds += 1
            if log_interval and self._rounds % log_interval == 0:
                self.dump_logs()
        callback.on_training_end()
        return self

    def _is_due(self) -> bool:
        """Whether the round is complete."""
        assert self.env is not None and self.replay_buffer is not None
        if self.train_freq:
            return self._since_round >= self.train_freq * self.env.num_envs
        enough = len(self.replay_buffer.finished) >= self.env.num_envs
        return enough and self._since_round >= LEAST_STEPS

    def _collect(self, callback: BaseCallback, until: int) -> bool:
        """Act until the round is complete; False if a callback stopped it."""
        env, replay = self.env, self.replay_buffer
        assert env is not None and replay is not None
        callback.on_rollout_start()
        while self.num_timesteps < until and not self._is_due():
            observations = np.array(self._last_obs)
            drawn, log_probs = self.policy.draw(observations, self._generator)
            actions = self.policy.to_env(drawn)
            new_obs, rewards, dones, infos = env.step(actions)
            self.num_timesteps += env.num_envs
            check_finite(self.num_timesteps, new_obs, rewards, infos, dones)  # type: ignore[arg-type]
            self._since_round += env.num_envs
            next_observations, terminated = np.array(new_obs), np.array(dones)
            for i in np.flatnonzero(dones):  # already reset: take the true end
                next_observations[i] = infos[i]["terminal_observation"]
                terminated[i] = not infos[i].get("TimeLimit.truncated", False)
            starts = np.asarray(self._last_episode_starts, dtype=bool)
            replay.step(
                observations, drawn, rewards, next_observations, terminated,
                log_probs=log_probs, starts=starts, dones=np.asarray(dones, dtype=bool),
            )  # fmt: skip
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
        callback.on_rollout_end()
        return True

    def dump_logs(self) -> None:
        """Write everything recorded since the last dump, every `log_interval` rounds."""
        self.logger.record("time/fps", record_progress(self))
        self.logger.dump(step=self.num_timesteps)

    # ----------------------------------------------------------------------------------------
    # the updates of a round
    # ----------------------------------------------------------------------------------------

    def train(self) -> None:
        """Fit model and critic to the replay, improve the policy, and begin the next round."""
        assert self.replay_buffer is not None
        self._see(self.replay_buffer.take(self.replay_buffer.recent()))
        rate = self._step_size()
        self._set_step_sizes(rate)
        log: dict[str, list[float]] = defaultdict(list)
        if self.variant in USES_MODEL:
            for _ in range(self.model_updates):
                self._update_model(log)
        if self.variant != "inf":
            for _ in range(self.value_updates):
                self._update_critic(log)
        if self.num_timesteps >= self.learning_starts:
            self._improve_policy(log)
        self.replay_buffer.begin_round()
        self._since_round = 0
        for name, entries in log.items():
            self.logger.record(f"train/{name}", float(np.mean(entries)))
        self.logger.record("train/learning_rate", rate)
        self.logger.record("train/std", float(self.policy.log_std.detach().exp().mean()))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _see(self, rows: dict[str, np.ndarray]) -> None:
        """Take the scales of states, changes and rewards from a round's transitions."""
        self._warn_of_rewards(rows)
        rows = self._priced(rows)
        self.policy.scale.update(rows["states"])
        if self.variant in USES_MODEL:
            changes = rows["next_states"].astype(np.float64) - rows["states"]
            self.world_model.dynamics.see(changes, self.policy.scale)
            self.world_model.reward.see(rows["rewards"])
        if self.variant != "inf":
            self.critic.see(rows["rewards"], self.gamma)

    def _warn_of_rewards(self, rows: dict[str, np.ndarray]) -> None:
        """Say once that the environment's own cost, whose gradient is taken, is not its rewards."""
        if self._cost is None or self.cost_fn is not None or self._warned_of_rewards:
            return
        next_states, rewards, terminated = (
            torch.as_tensor(rows[name], device=self.device)
            for name in ("next_states", "rewards", "terminated")
        )
        goes_on = torch.ones_like(rewards, dtype=torch.bool)
        if self.variant != "inf":  # whose return has costs alone; others learn what an end is worth
            goes_on = ~terminated.bool()
        flaw = rewards_flaw(self._cost, next_states[goes_on].double(), rewards[goes_on].double())
        if flaw is not None:
            self._warned_of_rewards = True
            warnings.warn(
                f"{flaw}; a step's gradient is the cost's. Make them agree, or pass "
                "reward='learned', which takes it from the rewards",
                stacklevel=4,
            )

    def _set_step_sizes(self, rate: float) -> None:
        """Attributes may have been set since the optimisers were made."""
        rates = {"policy": rate, "model": self.model_learning_rate}
        rates["critic"] = self.value_learning_rate
        for name, value in rates.items():
            optimizer = getattr(self, f"{name}_optimizer", None)
            for group in [] if optimizer is None else optimizer.param_groups:
                group.update(lr=value, eps=self.adam_eps)

    def _draw(self, *, recent: bool = False) -> Batch:
        assert self.replay_buffer is not None
        return self._to_batch(self.replay_buffer.draw(self.batch_size, self._rng, recent=recent))

    def _priced(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Transitions whose rewards are minus `cost_fn`, where it takes their place.

        The environment's own cost does not: beyond it, rewards may say what an end is worth.
        """
        if self._cost is None or self.cost_fn is None:
            return rows
        states = torch.as_tensor(rows["next_states"], dtype=torch.float64, device=self.device)
        rewards = -self._cost(states).detach().cpu().numpy()
        return {**rows, "rewards": rewards.astype(rows["rewards"].dtype)}

    def _to_batch(self, rows: dict[str, np.ndarray]) -> Batch:
        rows = self._priced(rows)
        tensors = {name: torch.as_tensor(x, device=self.device) for name, x in rows.items()}
        scale = self.policy.scale
        return Batch(
            scale(tensors["states"]),
            tensors["actions"],
            tensors["rewards"],
            scale(tensors["next_states"]),
            tensors["terminated"].float(),
            tensors["log_probs"],
        )

    def _update_model(self, log: dict[str, list[float]]) -> None:
        batch, model = self._draw(), self.world_model
        applied = batch.actions.clamp(-1, 1)
        loss = model.dynamics.loss(batch.states, applied, batch.next_states)
        log["model_loss"].append(float(loss.detach()))
        if self._cost is None:  # else nothing reads the learned reward
            of_reward = model.reward.loss(batch.states, applied, batch.rewards)
            log["reward_loss"].append(float(of_reward.detach()))
            loss = loss + of_reward
        self.model_optimizer.zero_grad()
        loss.backward()
        self.model_optimizer.step()

    def _update_critic(self, log: dict[str, list[float]]) -> None:
        """One step of fitted policy evaluation. Heess et al. 2015, Alg. 4.

        Differs from the paper for Q: the next action is drawn anew from the current policy, so that
        the target is right for replayed transitions without a weight.
        """
        batch, critic = self._draw(), self.critic
        weights = torch.ones_like(batch.rewards)
        if self.variant in USES_STATE_VALUE:
            weights = self._weights(batch)
            value = critic.of_target(batch.next_states)
            inputs: tuple[Tensor, ...] = (batch.states,)
        else:
            with torch.no_grad():
                mean, std = self.policy.zeta({}, batch.next_states)
                noise = torch.randn(mean.shape, generator=self._generator, device=self.device)
                then = mean if self.variant == "dpg" else mean + std * noise
            value = critic.of_target(batch.next_states, then.clamp(-1, 1))
            inputs = (batch.states, batch.actions.clamp(-1, 1))
        targets = batch.rewards + self.gamma * (1 - batch.terminated) * value
        loss = critic.loss(targets, weights, *inputs)
        log["value_loss"].append(float(loss.detach()))
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        self._n_value_updates += 1
        if self._n_value_updates % self.target_interval == 0:
            critic.copy_to_target()

    @torch.no_grad()
    def _weights(self, batch: Batch) -> Tensor:
        now = self.policy.log_prob(batch.states, batch.actions)
        return gradients.importance_weights(now, batch.log_probs, self.max_weight)

    # ----------------------------------------------------------------------------------------
    # the policy's update
    # ----------------------------------------------------------------------------------------

    def _improve_policy(self, log: dict[str, list[float]]) -> None:
        """Take `policy_updates` gradient steps, on new transitions each."""
        start = {name: p.detach().clone() for name, p in self.policy.learned.items()}
        parameters = self.policy.learned
        for number in range(self.policy_updates):
            objective = self._objective(log)
            found = self._policy_gradient(objective, measure=number == 0)
            gradient = list(found.gradients)
            if self.kl_weight:
                kl = self._kl_from(start, objective.states)
                log["kl"].append(float(kl.detach()))
                of_kl = torch.autograd.grad(self.kl_weight * kl, list(parameters.values()))
                gradient = [a + b for a, b in zip(gradient, of_kl, strict=True)]
            for parameter, part in zip(parameters.values(), gradient, strict=True):
                parameter.grad = part
            norm = nn.utils.clip_grad_norm_(parameters.values(), self.max_grad_norm)
            check_gradients(self.num_timesteps, self._n_updates, {"policy": norm}, REMEDIES)
            log["policy_loss"].append(float(found.loss))
            log["policy_gradient_norm"].append(float(norm))
            self.policy_optimizer.step()
            self._n_updates += 1

    def _policy_gradient(self, objective: _Objective, *, measure: bool) -> PolicyGradient:
        """The estimator's gradient of an objective; if asked to, record k and what the legs are."""
        estimator, parameters = estimators.make(self.estimator), self.policy.learned
        counted = self.policy.last_layer
        size = sum(p.numel() for p in counted.values()) if estimator.probe == "subset" else None
        meter = gauge = None
        if measure and objective.shape:
            meter = torch.zeros(objective.shape, device=self.device, requires_grad=True)
            steps = objective.shape[0]
            gauge = torch.zeros(steps, *SHAPE, device=self.device, requires_grad=True)

        def rollout(estimator: Estimator, tap: Tensor | None) -> Tensor:
            return objective.loss(
                Actor(self.policy.zeta, parameters, estimator, counted, tap, meter, gauge)
            )

        found = estimators.gradient(
            rollout, list(parameters.values()), estimator,
            samples=objective.samples, tap_size=size, meter=meter, gauge=gauge,
        )  # fmt: skip
        if found.k is not None and found.gauge is not None:
            self.logger.record("train/k", float(found.k.mean()))
            record_gauge(self.logger, found.gauge.sum(0, keepdim=True), draw=False)
        return found

    def _objective(self, log: dict[str, list[float]]) -> _Objective:
        """The variant's loss on new data."""
        paths: Paths | None = None
        if self.variant == "inf":
            paths = self._paths()
            alive = paths.is_alive.bool()
            samples, states = alive.shape[1], paths.states[:-1][alive]
            shape: tuple[int, ...] = (len(alive), self._sizes()[1])
        else:
            batch = self._draw(recent=self.variant != "1-er")
            samples, states = len(batch.states), batch.states
            shape = () if self.variant == "dpg" else (1, self._sizes()[1])
            rows = Transitions(batch.states, batch.actions, batch.next_states, batch.terminated)
            drawn = None
            if self.n_extra_actions and self.variant != "dpg":
                drawn = torch.randn(
                    self.n_extra_actions, *batch.actions.shape,
                    generator=self._generator, device=self.device,
                )  # fmt: skip
                samples, shape = 1 + self.n_extra_actions, (1, *batch.actions.shape)
            weights = None
            if self.variant in USES_STATE_VALUE:
                weights = self._weights(batch)
                log["importance_weight"].append(float(weights.mean()))

        def loss(actor: Actor) -> Tensor:
            if paths is not None:
                return gradients.svg_inf(
                    actor, self._predict_next, self._reward_of, paths,
                    gamma=self.gamma, nodes=self.nodes,
                )  # fmt: skip
            if self.variant == "dpg":
                return gradients.dpg(actor, self._action_value, states)
            if self.variant == "0":
                return gradients.svg0(actor, self._action_value, rows, drawn=drawn)
            return gradients.svg1(
                actor, self._predict_next, self._reward_of, self.critic, rows,
                gamma=self.gamma, weights=weights, drawn=drawn, nodes=self.nodes,
            )  # fmt: skip

        return _Objective(loss, samples, states, shape)

    def _paths(self) -> Paths:
        """The round's episodes, padded with their last state."""
        assert self.replay_buffer is not None
        episodes = [self._to_batch(rows) for rows in self.replay_buffer.episodes()]
        lengths = [len(episode.states) for episode in episodes]
        longest = max(lengths)
        states, actions = [], []
        for episode, n in zip(episodes, lengths, strict=True):
            last = episode.next_states[-1:]
            states.append(torch.cat((episode.states, last, last.expand(longest - n, -1))))
            actions.append(nn.functional.pad(episode.actions, (0, 0, 0, longest - n)))
        steps = torch.arange(longest, device=self.device).unsqueeze(1)
        alive = steps < torch.tensor(lengths, device=self.device)
        return Paths(torch.stack(states, 1), torch.stack(actions, 1), alive.float())

    # The environment clips actions, and so do these: beyond the bounds there is no gradient.

    def _predict_next(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.world_model.dynamics(states, actions.clamp(-1, 1))
        return mean, std.detach()

    def _reward_of(self, states: Tensor, actions: Tensor, next_states: Tensor) -> Tensor:
        if self._cost is not None:
            return -self._cost(self.policy.scale.inverse(next_states)).float()
        found: Tensor = self.world_model.reward(states, actions.clamp(-1, 1))
        return found

    def _action_value(self, states: Tensor, actions: Tensor) -> Tensor:
        found: Tensor = self.critic(states, actions.clamp(-1, 1))
        return found

    def _kl_from(self, start: dict[str, Tensor], states: Tensor) -> Tensor:
        """KL divergence of the current policy from that of the round's start, over the states.

        Heess et al. 2015, App. D: E_s KL[π_θ^{k-1} || π_θ], where π_θ is the policy at the start.
        """
        now = Normal(*self.policy.zeta({}, states))
        return kl_divergence(now, Normal(*self.policy.zeta(start, states))).sum(-1).mean()

    # ----------------------------------------------------------------------------------------
    # files
    # ----------------------------------------------------------------------------------------

    def save_replay_buffer(self, path: str | Path | IO[bytes]) -> None:
        """Write the replay to a file, which holds data alone.

        Args:
            path: where to write; ".zip" is appended if it has no suffix.

        Raises:
            ValueError: there is no replay yet.
        """
        if self.replay_buffer is None:
            raise ValueError("there is no replay yet: the first call of learn makes it")
        if isinstance(path, str | Path):
            path = with_suffix(Path(path))
            path.parent.mkdir(parents=True, exist_ok=True)
        self.replay_buffer.save(path)

    def load_replay_buffer(
        self, path: str | Path | IO[bytes], truncate_last_traj: bool = True
    ) -> None:
        """Read a replay that `save_replay_buffer` wrote; the next `learn` begins new episodes.

        Args:
            path: of the file.
            truncate_last_traj: SB3's, which must be True here.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no environment is set, or the file does not fit.
        """
        self._check_replay_call(truncate_last_traj)
        replay = self._new_replay()
        replay.load(existing(Path(path)) if isinstance(path, str | Path) else path)
        self.replay_buffer, self._last_obs = replay, None

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """Add the generators, and the replay in segments."""
        state: dict[str, Any] = {
            **super().state_dict(folder),
            "generator": self._generator.get_state(),
            "rng": self._rng.bit_generator.state,
            "since_round": self._since_round,
        }
        if self.replay_buffer is not None:
            state |= self.replay_buffer.state_dict(folder)
        return state

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state, folder)
        self._generator.set_state(state["generator"])
        self._rng.bit_generator.state = state["rng"]
        self._since_round = int(state["since_round"])
        if "transitions" in state:
            self.replay_buffer = self._new_replay()
            self.replay_buffer.load_state_dict(state, folder)

    def _excluded_save_params(self) -> list[str]:
        own = [
            "replay_buffer", "world_model", "critic", "cost_fn", "_cost", "_generator", "_rng",
            "_since_round",
        ]  # fmt: skip
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names = ["policy", "policy_optimizer"]
        if self.variant in USES_MODEL:
            names += ["world_model", "model_optimizer"]
        if self.variant != "inf":
            names += ["critic", "critic_optimizer"]
        return names, []

    # ----------------------------------------------------------------------------------------
    # arguments
    # ----------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        """One sentence per wrong value, before any work is done."""
        check_arguments(self)
        if "activation" in self.policy_kwargs:
            raise ValueError(
                "activation is that of all networks: pass it to SVG, not in policy_kwargs"
            )
        self._check_spaces()
        self._check_variant()
        self._check_estimator()

    def _check_variant(self) -> None:
        if self.cost_fn is not None and self.reward == "learned":
            raise ValueError(
                "a cost_fn is used as it is, and reward='learned' has it learned: leave one out"
            )
        if self.nodes == "both" and self.variant not in USES_MODEL:
            raise ValueError(
                f"variant {self.variant!r} has no model whose next state could be a node: use "
                "nodes='action', or variant '1-er'"
            )
        if self.variant != "inf":
            return
        if self.train_freq:
            raise ValueError(
                "variant 'inf' learns from whole episodes: train_freq must be 0, got "
                f"{self.train_freq}"
            )
        n_envs = 1 if self.env is None else self.env.num_envs
        if self.buffer_size < 2 * self.horizon * n_envs:
            raise ValueError(
                "buffer_size must hold two episodes of every environment, at least 2 x "
                f"{self.horizon} x {n_envs} for variant 'inf', got {self.buffer_size}"
            )

    def _check_estimator(self) -> None:
        """Try it on a node of as many samples as there will be."""
        estimator = estimators.make(self.estimator)
        if self.variant == "dpg":
            if estimator.needs_score or self.n_extra_actions:
                raise ValueError(
                    "variant 'dpg' has no noise to estimate a gradient from: use estimator='rp' "
                    "and n_extra_actions=0, or variant='0'"
                )
            return
        if self.variant == "inf" and self.n_extra_actions:
            raise ValueError(
                "variant 'inf' follows the real episode: n_extra_actions must be 0, got "
                f"{self.n_extra_actions}"
            )
        in_parameters = estimator.probe != "none" or estimator.several_passes
        if self.nodes == "both" and (self.n_extra_actions or in_parameters):
            raise ValueError(
                "nodes='both' needs n_extra_actions=0 and an estimator without a probe, such as "
                f"'tpx', got {self.n_extra_actions} and {self.estimator!r}; use nodes='action'"
            )
        if self.n_extra_actions and in_parameters:
            raise ValueError(
                f"estimator {self.estimator!r} weighs in parameter space, over the transitions of "
                "a batch: n_extra_actions must be 0, or use an estimator such as 'tpx'"
            )
        samples, what = [self.batch_size], "batch_size"
        if self.buffer_size < samples[0]:
            samples, what = [self.buffer_size], "buffer_size"
        if self.train_freq:
            fewest = self.train_freq * (1 if self.env is None else self.env.num_envs)
            if self.variant == "1-er":  # from the replay of all rounds
                fewest = max(fewest, self.learning_starts)
            if fewest < samples[0]:
                samples, what = [fewest], "steps of the first update, train_freq"
        if self.variant == "inf":
            # Without an environment it is loaded to predict; `learn` checks again.
            samples, what = [100 if self.env is None else self.env.num_envs], "environments"
        elif self.n_extra_actions:
            samples, what = [1 + self.n_extra_actions, self.batch_size], "1 + n_extra_actions"
        try:
            try_estimator(estimator, samples, has_value=self.variant != "inf")
        except ValueError as error:
            raise ValueError(
                f"estimator {self.estimator!r} does not work with {samples[0]} sample(s) ({what}) "
                f"of variant {self.variant!r}: {error}"
            ) from error

    def _check_spaces(self) -> None:
        size = check_vectors("SVG", self.observation_space, self.action_space)
        if self.variant in USES_MODEL and size > MOST_STATES:
            raise UnsupportedSpaceError(
                f"SVG's model has a network for each entry of the state, at most {MOST_STATES}, "
                f"got {describe(self.observation_space)}; use variant '0', or take DreamerTPX, "
                "which learns a latent state"
            )
