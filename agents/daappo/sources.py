"""Extra actions: where DAAPPO's samples come from, besides the actions that were taken.

A source owns the model that values its actions, the model's optimiser, the transitions it is fitted
to, and its random generators. DAAPPO calls it once per rollout, before any update, with the policy
that collected the rollout. Nauman & Cygan 2022: AA (`RewindSource`, Sec. 2.2), QAA (`QSource`,
Sec. 4 and 5), DAA (`DynamicsSource`, Sec. 4) and simulated states (`StatesSource`, Sec. 5.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Tensor, nn

from totalprop.agents.core.processes import ALONE, Processes
from totalprop.agents.persistence.segments import Segments
from totalprop.world_models import mlp_dynamics
from totalprop.world_models.mlp_dynamics import Activation, MLPDynamics, Target
from totalprop.world_models.q_networks import QNetworks
from totalprop.world_models.transitions import UNKNOWN, TransitionBuffer

QTarget = Literal["return", "advantage"]
ROWS = 4096  # simulated at a time: bounds the memory of a differentiated simulation


class ExtraActions(NamedTuple):
    """K samples for each of R states of a rollout, in the rollout buffer's flat order."""

    actions: Tensor  # [R, K, A] as the policy draws them, not clipped
    old_log_prob: Tensor  # [R, K]
    advantages: Tensor  # [R, K]
    action_gradient: Tensor | None = None  # [R, K, A] of the advantage, for pathwise legs
    observations: Tensor | None = None  # [R, K, S] where they are not the rollout's own
    weights: Tensor | None = None  # [R, K] probability that the episode lasts so long; None: 1

    def leave_one_out(self) -> ExtraActions:
        """Subtract from each advantage the mean of the other K - 1 advantages of its state.

        The gradient stays unbiased, because the other actions are independent of this one.
        """
        k = self.advantages.shape[1]
        centred = self.advantages - self.advantages.mean(1, keepdim=True)
        return self._replace(advantages=centred * (k / (k - 1)))

    def rows(self, rows: Any) -> ExtraActions:
        """The extra actions of the states selected by `rows`, an index into R."""
        return ExtraActions(
            self.actions[rows],
            self.old_log_prob[rows],
            self.advantages[rows],
            None if self.action_gradient is None else self.action_gradient[rows],
            None if self.observations is None else self.observations[rows],
            None if self.weights is None else self.weights[rows],
        )


class Rollout(NamedTuple):
    """The part of a rollout that a source may read, in the rollout buffer's flat order."""

    observations: Tensor  # [R, S] as the policy saw them
    states: Tensor  # [R, S] in the environment's own units, float32 or float64
    values: Tensor  # [R] predicted by the critic
    actions: Tensor  # [R, A] as the policy drew them, not clipped
    returns: Tensor  # [R] λ-returns, in the critic's units
    advantages: Tensor  # [R] λ-advantages, in the critic's units


@dataclass(frozen=True)
class Returns:
    """Discounting of an extra action's rewards: γ, λ and the number of steps H."""

    gamma: float
    lam: float
    horizon: int

    def advantage(
        self,
        rewards: list[Tensor],
        values: list[Tensor],
        continuations: list[Tensor] | None = None,
    ) -> Tensor:
        """TD(λ) advantage: Σ_k (γλ)^k c_0 ... c_{k-1} (r_k + γ c_k V_{k+1} - V_k).

        This is the mean over whether and where the episode terminates.

        Args:
            rewards: r_0 .. r_{n-1}.
            values: V_0 .. V_n; V_0, at the real state, is the baseline.
            continuations: c_0 .. c_{n-1}, probabilities that the episode goes on; None: all are 1.
        """
        total: Tensor = torch.zeros_like(values[0])
        weight: Any = 1.0
        for k, (reward, value) in enumerate(zip(rewards, values[:-1], strict=True)):
            after = values[k + 1] if continuations is None else continuations[k] * values[k + 1]
            total = total + weight * (reward + self.gamma * after - value)
            weight = weight * self.gamma * self.lam
            if continuations is not None:
                weight = weight * continuations[k]
        return total


class Normalization:
    """VecNormalize's statistics, frozen for one iteration; the identity without VecNormalize."""

    def __init__(self, vec_normalize: VecNormalize | None, device: torch.device) -> None:
        self.has_observation = vec_normalize is not None and vec_normalize.norm_obs
        self.has_reward = vec_normalize is not None and vec_normalize.norm_reward
        if vec_normalize is None:
            return
        self.epsilon = vec_normalize.epsilon
        self.clip_observation = vec_normalize.clip_obs
        self.clip_reward = vec_normalize.clip_reward
        if self.has_observation:
            statistics: Any = vec_normalize.obs_rms
            self.mean = torch.tensor(statistics.mean, device=device)  # a copy: it is frozen
            self.std = (
                torch.as_tensor(statistics.var, device=device).float() + self.epsilon
            ).sqrt()
        if self.has_reward:
            self.scale = float((vec_normalize.ret_rms.var + self.epsilon) ** 0.5)

    def observation(self, states: Tensor) -> Tensor:
        """Observations as the policy sees them, float32, from raw states [..., S]."""
        if not self.has_observation:
            return states.float()
        limit = self.clip_observation
        centred = (states - self.mean.to(states.dtype)).float()
        return (centred / self.std).clamp(-limit, limit)

    def reward(self, rewards: Tensor) -> Tensor:
        """Rewards in the critic's units, from raw ones."""
        if not self.has_reward:
            return rewards
        return (rewards / self.scale).clamp(-self.clip_reward, self.clip_reward)


class Behaviour:
    """The policy that collected the rollout: a Gaussian, its critic and the action bounds.

    Args:
        policy: networks and action space.
        normalization: between the environment's units and those of policy and critic.
        generator: of the noise in `draw`.
    """

    def __init__(
        self,
        policy: ActorCriticPolicy,
        normalization: Normalization,
        generator: torch.Generator,
    ) -> None:
        self.policy, self.normalization, self.generator = policy, normalization, generator
        space: Any = policy.action_space
        self.low = torch.as_tensor(space.low, device=policy.device).float()
        self.high = torch.as_tensor(space.high, device=policy.device).float()

    def draw(self, observations: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Reparameterised actions [R, A] and log-probabilities [R]; [R, k, ...] if k is given."""
        distribution: Any = self.policy.get_distribution(observations).distribution
        mean, std = distribution.mean, distribution.stddev
        if k is not None:
            mean, std = (x.unsqueeze(1).expand(-1, k, -1) for x in (mean, std))
        noise = torch.randn(
            mean.shape, generator=self.generator, device=self.generator.device, dtype=mean.dtype
        )
        actions = mean + std * noise
        log_prob = torch.distributions.Normal(mean, std).log_prob(actions).sum(-1)
        return actions, log_prob

    def value(self, observations: Tensor) -> Tensor:
        """Values [...] predicted by the critic at observations [..., S]."""
        return self.policy.predict_values(observations).squeeze(-1)

    def clip(self, actions: Tensor) -> Tensor:
        """Actions as the environment receives them, within its bounds."""
        return actions.clamp(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What sources are made from. The names are those of DAAPPO, without `dynamics_`.

    DAAPPO renews a source's settings before each use. What its networks and its buffer are made
    from has an effect at the start only; the other settings are the current ones.

    Attributes:
        state_size: S, the length of an observation.
        action_size: A, the length of an action.
        state_dtype: of stored states; float64 if that is what the environment returns.
        device: where models and actions live.
        seed: of the model's initial weights and both generators.
        timeout_bootstrap: bootstrap from the value after a time limit.
        target: what a dynamics model predicts, the next state or the change.
        normalise: whether a dynamics model standardises its data.
        width: hidden units of each network.
        activation: of each network.
        n_q: number of Q-networks.
        q_target: what the Q-networks are fitted to.
        q_learning_rate: of the Q-networks' Adam.
        learning_rate: of a dynamics model's Adam.
        eps: of the model's Adam.
        batch_size: transitions per batch of a dynamics model's fit.
        q_batch_size: states per batch of the Q-networks' fit.
        buffer_size: number of transitions kept.
    """

    state_size: int
    action_size: int
    state_dtype: np.dtype | type
    device: torch.device
    seed: int
    timeout_bootstrap: bool
    target: Target
    normalise: bool
    width: int
    activation: Activation
    n_q: int
    q_target: QTarget
    q_learning_rate: float
    learning_rate: float
    eps: float
    batch_size: int
    q_batch_size: int
    buffer_size: int


class Source:
    """Draws extra actions at the states of a rollout and values them.

    Attributes:
        is_differentiable: whether its advantages have a gradient in the action.
        draws_per_state: whether its K actions are at the same state, so that they can be compared.
        needs_snapshots: whether it needs environments with snapshot, restore and extra_step.
        follows_horizon: whether it follows each action for `simulation_horizon` steps.
        model: what it learns; None for a source that learns nothing.
        optimizer: the model's Adam, or None.
        generator: draws the actions.
        rng: draws the batches of the fit.
        extra_steps: environment steps taken for extra actions; None for a source that takes none.
    """

    is_differentiable: ClassVar[bool] = False
    draws_per_state: ClassVar[bool] = True
    needs_snapshots: ClassVar[bool] = False
    follows_horizon: ClassVar[bool] = False
    model: nn.Module | None = None
    optimizer: torch.optim.Optimizer | None = None
    extra_steps: int | None = None

    def __init__(self, settings: SourceSettings, processes: Processes = ALONE) -> None:
        self.settings, self.processes = settings, processes
        self.set_random_seed(settings.seed)
        with torch.random.fork_rng():  # or the policy would draw other numbers than PPO's does
            torch.manual_seed(settings.seed)
            model = self._new_model()
        if model is not None:
            self.model = model.to(settings.device)
            self.optimizer = torch.optim.Adam(
                self._parameter_groups(self.model), self._learning_rate(), eps=settings.eps
            )

    def set_random_seed(self, seed: int) -> None:
        """Seed both generators."""
        self.generator = torch.Generator(self.settings.device).manual_seed(seed)
        self.set_common_seed(seed)

    def set_common_seed(self, seed: int) -> None:
        """Seed the generator that draws the same in all processes."""
        self.rng = np.random.default_rng(seed)

    def _new_model(self) -> nn.Module | None:
        return None

    def _parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        return [{"params": list(model.parameters())}]

    def complete(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Parameters from a file, with what files of older versions lack."""
        return parameters

    def _learning_rate(self) -> float:
        return self.settings.learning_rate

    def _set_step_sizes(self) -> None:
        """Give the optimiser the current step size and epsilon."""
        for group in [] if self.optimizer is None else self.optimizer.param_groups:
            group.update(lr=self._learning_rate(), eps=self.settings.eps)

    def start_rollout(self, env: VecEnv) -> None:
        """Called before the first step of each rollout."""

    def record_step(
        self,
        states: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        next_states: np.ndarray,
        terminated: np.ndarray,
    ) -> None:
        """Called after each step of the environments, with the transitions known from it.

        Args:
            states: [n, S].
            actions: [n, A] as the environments received them.
            rewards: [n].
            next_states: [n, S], at the end of an episode its last state.
            terminated: [n] whether the episode terminated, rather than reach a time limit.
        """

    def share_transitions(self) -> None:
        """Called after each rollout, before the fit."""

    def fit(self, rollout: Rollout, behaviour: Behaviour, *, steps: int) -> dict[str, float]:
        """Fit the model, after each rollout.

        Args:
            rollout: the newest one.
            behaviour: the policy that collected it.
            steps: of gradient descent.
        Returns:
            Losses by name; none for a source without a model.
        """
        return {}

    def __call__(
        self, rollout: Rollout, behaviour: Behaviour, k: int, returns: Returns, *, gradient: bool
    ) -> ExtraActions:
        """Draw and value `k` extra actions for each state of the rollout.

        Args:
            rollout: its states and what the critic predicted there.
            behaviour: the policy that collected it.
            k: extra actions K per state.
            returns: how rewards become advantages.
            gradient: compute the advantages' gradient in the action, too.
        """
        raise NotImplementedError

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """The generators, and the names of files in `folder`.

        Model and optimiser are not in it: they are saved with the agent's parameters.
        """
        return {
            "generator": self.generator.get_state(),
            "rng": self.rng.bit_generator.state,
            "files": [],
        }

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned."""
        self.generator.set_state(state["generator"])
        self.rng.bit_generator.state = state["rng"]


class ModelSource(Source):
    """A source that simulates in a learned dynamics model.

    Attributes:
        transitions: those observed so far, in the environment's own units.
    """

    model: MLPDynamics
    optimizer: torch.optim.Optimizer

    def __init__(self, settings: SourceSettings, processes: Processes = ALONE) -> None:
        super().__init__(settings, processes)
        self._recorded: list[tuple[np.ndarray, ...]] = []  # of this process's part of a rollout
        self.transitions = TransitionBuffer(
            settings.buffer_size, settings.state_size, settings.action_size, settings.state_dtype
        )
        self._segments = Segments("transitions")

    def record_step(self, *step: np.ndarray) -> None:
        """See `Source`."""
        if self.processes.size == 1:
            self.transitions.add(*step)
        else:
            self._recorded.append(step)

    def share_transitions(self) -> None:
        """Store what all processes recorded of a rollout, as one process with all environments."""
        for steps in zip(*self.processes.objects(self._recorded), strict=True):
            self.transitions.add(*map(np.concatenate, zip(*steps, strict=True)))
        self._recorded = []

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """In addition: the transitions, in segments, files of their own."""
        buffer = self.transitions
        segments = self._segments.save(folder, buffer.count, buffer.capacity, buffer.rows)
        own = {"transitions": segments, "files": [name for *_, name in segments]}
        return {**super().state_dict(folder), **own}

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state, folder)
        buffer = self.transitions

        def put(first: int, rows: dict[str, np.ndarray]) -> None:
            # Older files do not say which transitions terminated, and hold states as float32.
            unknown = np.full(len(rows.get("rewards", ())), UNKNOWN, np.int8)
            states = {
                name: rows[name].astype(buffer.states.dtype)
                for name in ("states", "next_states")
                if getattr(rows.get(name), "dtype", None) == np.float32
            }
            buffer.put_rows(first, {"terminated": unknown, **rows, **states})

        self._segments.load(folder, state["transitions"], buffer.capacity, put)

    def _new_model(self) -> MLPDynamics:
        settings = self.settings
        return MLPDynamics(
            settings.state_size, settings.action_size,
            target=settings.target, normalise=settings.normalise,
            width=settings.width, activation=settings.activation,
        )  # fmt: skip

    def _parameter_groups(self, model: MLPDynamics) -> list[dict[str, Any]]:
        # Termination has a group of its own, so that older states, of one group, can be completed.
        last = list(model.termination.parameters())
        ids = {id(parameter) for parameter in last}
        return [{"params": [p for p in model.parameters() if id(p) not in ids]}, {"params": last}]

    def complete(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """See `Source`; older models have no termination, and get this one's."""
        model, optimizer = (parameters.get(f"value_{x}") for x in ("model", "optimizer"))
        if isinstance(model, dict) and not any(str(key).startswith("terminat") for key in model):
            own = self.model.state_dict().items()
            added = {key: value for key, value in own if key.startswith("terminat")}
            added["offset"] = torch.zeros_like(self.model.offset)
            parameters = {**parameters, "value_model": {**added, **model}}
        groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
        if isinstance(optimizer, dict) and isinstance(groups, list) and len(groups) == 1:
            groups = [*groups, self.optimizer.state_dict()["param_groups"][1]]
            parameters = {**parameters, "value_optimizer": {**optimizer, "param_groups": groups}}
        return parameters

    def _continuation(self, states: Tensor, actions: Tensor) -> list[Tensor]:
        """Probability that the episode goes on; none before a transition has terminated."""
        return [self.model.continuation(states, actions)] if self.model.terminates else []

    def fit(self, rollout: Rollout, behaviour: Behaviour, *, steps: int) -> dict[str, float]:
        """See `Source.fit`; the data are all transitions kept, not only this rollout's."""
        if not len(self.transitions):
            raise ValueError(
                "no transition is known: every step is the last of its episode, and VecNormalize "
                "clips its state; give VecNormalize a larger clip_obs"
            )
        self._set_step_sizes()
        if not self.optimizer.state and self.settings.state_dtype == np.float64:
            self.model.set_offset(self.transitions.states[0])
        return mlp_dynamics.fit(
            self.model, self.optimizer, self.transitions,
            steps=steps, batch_size=self.settings.batch_size, rng=self.rng,
        )  # fmt: skip


class DynamicsSource(ModelSource):
    """DAA: each action is followed for H steps through a learned model."""

    is_differentiable = follows_horizon = True

    def __call__(
        self, rollout: Rollout, behaviour: Behaviour, k: int, returns: Returns, *, gradient: bool
    ) -> ExtraActions:
        """See `Source`."""
        with torch.no_grad():
            actions, log_prob = behaviour.draw(rollout.observations, k)
        states = rollout.states.repeat_interleave(k, 0)
        start = rollout.values.repeat_interleave(k)
        flat = actions.flatten(0, 1)
        advantages, gradients = [], []
        for i in range(0, len(flat), ROWS):
            rows = slice(i, i + ROWS)
            with torch.set_grad_enabled(gradient):
                first = flat[rows].clone().requires_grad_(gradient)
                advantage = self._advantage(states[rows], first, start[rows], behaviour, returns)
            if gradient:
                gradients.append(torch.autograd.grad(advantage.sum(), first)[0])
            advantages.append(advantage.detach())
        shape = actions.shape
        return ExtraActions(
            actions,
            log_prob,
            torch.cat(advantages).view(shape[:2]),
            torch.cat(gradients).view(shape) if gradient else None,
        )

    def _advantage(
        self, states: Tensor, actions: Tensor, start: Tensor, behaviour: Behaviour, returns: Returns
    ) -> Tensor:
        rewards, values, continuations = [], [start], []
        for step in range(returns.horizon):
            bounded = behaviour.clip(actions)
            continuations += self._continuation(states, bounded)
            states, reward = self.model(states, bounded)
            observations = behaviour.normalization.observation(states)
            rewards.append(behaviour.normalization.reward(reward))
            values.append(behaviour.value(observations))
            if step + 1 < returns.horizon:
                actions, _ = behaviour.draw(observations)
        return returns.advantage(rewards, values, continuations or None)


class StatesSource(ModelSource):
    """Simulated states: one rollout of the model from each state; its later steps are the samples.

    The K actions of a state are then at K different simulated states. One that the episode may not
    last to has the probability that it does as its weight.
    """

    draws_per_state = False

    @torch.no_grad()
    def __call__(
        self, rollout: Rollout, behaviour: Behaviour, k: int, returns: Returns, *, gradient: bool
    ) -> ExtraActions:
        """See `Source`; the samples are steps 1 .. k of a rollout of k + 2 steps."""
        state, observation = rollout.states, rollout.observations
        rewards, values = [], [rollout.values]
        continuations: list[Tensor] = []
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(k + 2):
            action, log_prob = behaviour.draw(observation)
            steps.append((observation, action, log_prob))
            bounded = behaviour.clip(action)
            continuations += self._continuation(state, bounded)
            state, reward = self.model(state, bounded)
            observation = behaviour.normalization.observation(state)
            rewards.append(behaviour.normalization.reward(reward))
            values.append(behaviour.value(observation))
        advantages = [
            returns.advantage(rewards[i:], values[i:], continuations[i:] or None)
            for i in range(1, k + 1)
        ]
        weights = torch.stack(continuations, 1).cumprod(1)[:, :k] if continuations else None
        observations, actions, log_probs = (
            torch.stack(x, 1) for x in zip(*steps[1 : k + 1], strict=True)
        )
        return ExtraActions(
            actions,
            log_probs,
            torch.stack(advantages, 1),
            observations=observations,
            weights=weights,
        )


class RewindSource(Source):
    """AA: the environment itself, restored to each state of the rollout.

    Its advantages contain true rewards; the price is K·H further environment steps per state. The
    environments provide `snapshot()`, `restore(snapshot)` and `extra_step(action)`.
    """

    needs_snapshots = follows_horizon = True
    extra_steps: int

    def __init__(self, settings: SourceSettings, processes: Processes = ALONE) -> None:
        super().__init__(settings, processes)
        self.extra_steps = 0
        self.snapshots: list[list[Any]] = []  # per environment: before each step and at the end

    def start_rollout(self, env: VecEnv) -> None:
        """See `Source`; `env` is the one that is rewound."""
        self.env = env
        self.snapshots = [[snapshot] for snapshot in env.env_method("snapshot")]

    def record_step(self, *transitions: np.ndarray) -> None:
        """See `Source`."""
        for kept, now in zip(self.snapshots, self.env.env_method("snapshot"), strict=True):
            kept.append(now)

    @torch.no_grad()
    def __call__(
        self, rollout: Rollout, behaviour: Behaviour, k: int, returns: Returns, *, gradient: bool
    ) -> ExtraActions:
        """See `Source`; afterwards the environments are where the rollout left them."""
        actions, log_prob = behaviour.draw(rollout.observations, k)
        advantages = torch.empty_like(log_prob)
        row = 0
        for index, snapshots in enumerate(self.snapshots):
            try:
                for snapshot in snapshots[:-1]:
                    for j in range(k):
                        self._call("restore", index, snapshot)
                        advantages[row, j] = self._follow(
                            index, actions[row, j], rollout.values[row], behaviour, returns
                        )
                    row += 1
            finally:
                self._call("restore", index, snapshots[-1])
        return ExtraActions(actions, log_prob, advantages)

    def _follow(
        self, index: int, action: Tensor, start: Tensor, behaviour: Behaviour, returns: Returns
    ) -> Tensor:
        rewards, values = [], [start]
        space: Any = self.env.action_space
        for _ in range(returns.horizon):
            clipped = np.clip(action.cpu().numpy(), space.low, space.high).astype(space.dtype)
            state, reward, terminated, truncated, _ = self._call("extra_step", index, clipped)
            self.extra_steps += 1
            state = torch.as_tensor(state, device=start.device).unsqueeze(0)
            observation = behaviour.normalization.observation(state)
            value = behaviour.value(observation)[0]
            if terminated or (truncated and not self.settings.timeout_bootstrap):
                value = torch.zeros_like(value)
            rewards.append(behaviour.normalization.reward(torch.as_tensor(reward).to(value)))
            values.append(value)
            if terminated or truncated:
                break
            action = behaviour.draw(observation)[0][0]
        return returns.advantage(rewards, values)

    def _call(self, method: str, index: int, argument: Any) -> Any:
        return self.env.env_method(method, argument, indices=index)[0]

    def state_dict(self, folder: Path) -> dict[str, Any]:
        """See `Source`; and the extra steps taken so far."""
        return {**super().state_dict(folder), "extra_steps": self.extra_steps}

    def load_state_dict(self, state: dict[str, Any], folder: Path) -> None:
        """See `Source`."""
        super().load_state_dict(state, folder)
        self.extra_steps = int(state.get("extra_steps", 0))  # older files lack it


class QSource(Source):
    """QAA: Q-networks value each action at the state itself."""

    is_differentiable = True
    model: QNetworks
    optimizer: torch.optim.Optimizer

    def _new_model(self) -> QNetworks:
        settings = self.settings
        return QNetworks(
            settings.state_size, settings.action_size,
            n=settings.n_q, width=settings.width, activation=settings.activation,
        )  # fmt: skip

    def _learning_rate(self) -> float:
        return self.settings.q_learning_rate

    def fit(self, rollout: Rollout, behaviour: Behaviour, *, steps: int) -> dict[str, float]:
        """See `Source.fit`; the targets are the λ-returns or λ-advantages of this rollout."""
        self._set_step_sizes()
        targets = rollout.returns if self.settings.q_target == "return" else rollout.advantages
        loss = self.model.fit(
            self.optimizer, rollout.observations, behaviour.clip(rollout.actions), targets,
            steps=steps, batch_size=self.settings.q_batch_size, rng=self.rng,
        )  # fmt: skip
        return {"q_loss": loss}

    def __call__(
        self, rollout: Rollout, behaviour: Behaviour, k: int, returns: Returns, *, gradient: bool
    ) -> ExtraActions:
        """See `Source`."""
        with torch.no_grad():
            actions, log_prob = behaviour.draw(rollout.observations, k)
        observations = rollout.observations.unsqueeze(1).expand(-1, k, -1)
        with torch.set_grad_enabled(gradient):
            free = actions.clone().requires_grad_(gradient)
            advantages = self.model(observations, behaviour.clip(free))
            if self.settings.q_target == "return":
                advantages = advantages - rollout.values.unsqueeze(1)
        slope = torch.autograd.grad(advantages.sum(), free)[0] if gradient else None
        return ExtraActions(actions, log_prob, advantages.detach(), slope)


# The choices of DAAPPO's `action_source`; "none" is PPO.
SOURCES: dict[str, type[Source] | None] = {
    "none": None,
    "dynamics": DynamicsSource,
    "q": QSource,
    "rewind": RewindSource,
    "states": StatesSource,
}
