"""More actions than the one that was taken: where DAAPPO's extra samples come from.

Every source is asked once per rollout, with the policy that gathered it and before any update, and
answers with `ExtraActions`. Nauman & Cygan 2022 (DAA, QAA, AA), Sec. 4; the simulated states are
those of its dynamics-states baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Tensor

from totalprop.world_models.mlp_dynamics import MLPDynamics
from totalprop.world_models.q_networks import QNetworks

ROWS = 4096  # simulated at a time: bounds the memory of a differentiated simulation


class ExtraActions(NamedTuple):
    """K samples for each of R states of a rollout, in the rollout buffer's flat order."""

    actions: Tensor  # [R, K, A] as the policy draws them, not clipped
    old_log_prob: Tensor  # [R, K]
    advantages: Tensor  # [R, K]
    action_gradient: Tensor | None = None  # [R, K, A] of the advantage, for pathwise legs
    observations: Tensor | None = None  # [R, K, S] where they are not the rollout's own

    def against_the_others(self) -> ExtraActions:
        """Advantages minus the mean of the state's other K - 1: unbiased, as a_j, j ≠ i, is."""
        k = self.advantages.shape[1]
        centred = self.advantages - self.advantages.mean(1, keepdim=True)
        return self._replace(advantages=centred * (k / (k - 1)))

    def rows(self, rows: Any) -> ExtraActions:
        """The same for some of the states."""
        return ExtraActions(
            self.actions[rows],
            self.old_log_prob[rows],
            self.advantages[rows],
            None if self.action_gradient is None else self.action_gradient[rows],
            None if self.observations is None else self.observations[rows],
        )


class Rollout(NamedTuple):
    """What a source may look at, in the rollout buffer's flat order."""

    observations: Tensor  # [R, S] as the policy saw them
    states: Tensor  # [R, S] in the environment's own units
    values: Tensor  # [R] of the critic


@dataclass(frozen=True)
class Returns:
    """How rewards become an advantage."""

    gamma: float
    lam: float
    horizon: int

    def advantage(self, rewards: list[Tensor], values: list[Tensor]) -> Tensor:
        """TD(λ) over the steps given: Σ_k (γλ)^k (r_k + γ V_{k+1} - V_k), one more value.

        The values include V at the real state, the baseline.
        """
        total, weight = torch.zeros_like(values[0]), 1.0
        for reward, value, after in zip(rewards, values[:-1], values[1:], strict=True):
            total = total + weight * (reward + self.gamma * after - value)
            weight *= self.gamma * self.lam
        return total


class Units:
    """VecNormalize's units, frozen for one iteration; without it everything stays as it is."""

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
            self.mean = torch.as_tensor(statistics.mean, device=device).float()
            self.std = (
                torch.as_tensor(statistics.var, device=device).float() + self.epsilon
            ).sqrt()
        if self.has_reward:
            self.scale = float((vec_normalize.ret_rms.var + self.epsilon) ** 0.5)

    def observation(self, states: Tensor) -> Tensor:
        """What the policy is shown of raw states."""
        if not self.has_observation:
            return states
        limit = self.clip_observation
        return ((states - self.mean) / self.std).clamp(-limit, limit)

    def reward(self, rewards: Tensor) -> Tensor:
        """Raw rewards in the critic's units."""
        if not self.has_reward:
            return rewards
        return (rewards / self.scale).clamp(-self.clip_reward, self.clip_reward)


class Behaviour:
    """The policy that gathered the rollout: a Gaussian, its critic and the action bounds."""

    def __init__(self, policy: ActorCriticPolicy, units: Units, generator: torch.Generator) -> None:
        self.policy, self.units, self.generator = policy, units, generator
        space: Any = policy.action_space
        self.low = torch.as_tensor(space.low, device=policy.device).float()
        self.high = torch.as_tensor(space.high, device=policy.device).float()

    def draw(self, observations: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Actions [R, (k,) A] and their log-probabilities; reparameterised."""
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
        """[...] of the critic."""
        return self.policy.predict_values(observations).squeeze(-1)

    def clip(self, actions: Tensor) -> Tensor:
        """As the environment receives them."""
        return actions.clamp(self.low, self.high)


class Source(Protocol):
    """Draws `k` actions per state and values them."""

    needs_snapshots: bool

    def __call__(
        self, rollout: Rollout, behaviour: Behaviour, k: int, returns: Returns, *, gradient: bool
    ) -> ExtraActions:
        """With gradient=True, the advantage's gradient in the action too."""


class DynamicsSource:
    """DAA: each action is followed for H steps through a learned model."""

    needs_snapshots = False

    def __init__(self, model: MLPDynamics) -> None:
        self.model = model

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
        rewards, values = [], [start]
        for step in range(returns.horizon):
            states, reward = self.model(states, behaviour.clip(actions))
            observations = behaviour.units.observation(states)
            rewards.append(behaviour.units.reward(reward))
            values.append(behaviour.value(observations))
            if step + 1 < returns.horizon:
                actions, _ = behaviour.draw(observations)
        return returns.advantage(rewards, values)


class StatesSource:
    """Simulated states: one model rollout from each state, whose later pairs are the samples."""

    needs_snapshots = False

    def __init__(self, model: MLPDynamics) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(
        self, rollout: Rollout, behaviour: Behaviour, k: int, returns: Returns, *, gradient: bool
    ) -> ExtraActions:
        """See `Source`; the pairs are those of steps 1 .. k of a rollout of k + 2 steps."""
        state, observation = rollout.states, rollout.observations
        rewards, values = [], [rollout.values]
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(k + 2):
            action, log_prob = behaviour.draw(observation)
            steps.append((observation, action, log_prob))
            state, reward = self.model(state, behaviour.clip(action))
            observation = behaviour.units.observation(state)
            rewards.append(behaviour.units.reward(reward))
            values.append(behaviour.value(observation))
        advantages = [returns.advantage(rewards[i:], values[i:]) for i in range(1, k + 1)]
        observations, actions, log_probs = (
            torch.stack(x, 1) for x in zip(*steps[1 : k + 1], strict=True)
        )
        return ExtraActions(
            actions, log_probs, torch.stack(advantages, 1), observations=observations
        )


class RewindSource:
    """AA: the environment itself, put back to each state; the truth, at its price in steps.

    The environments provide `snapshot()`, `restore(snapshot)` and `extra_step(action)`.
    """

    needs_snapshots = True

    def __init__(self, env: VecEnv, *, timeout_bootstrap: bool) -> None:
        self.env, self.timeout_bootstrap = env, timeout_bootstrap
        self.snapshots: list[list[Any]] = []  # of each environment, before each step and at the end
        self.extra_steps = 0

    @torch.no_grad()
    def __call__(
        self, rollout: Rollout, behaviour: Behaviour, k: int, returns: Returns, *, gradient: bool
    ) -> ExtraActions:
        """See `Source`; the environments are left where the rollout left them."""
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
            observation = behaviour.units.observation(state)
            value = behaviour.value(observation)[0]
            if terminated or (truncated and not self.timeout_bootstrap):
                value = torch.zeros_like(value)
            rewards.append(behaviour.units.reward(torch.as_tensor(reward).to(value)))
            values.append(value)
            if terminated or truncated:
                break
            action = behaviour.draw(observation)[0][0]
        return returns.advantage(rewards, values)

    def _call(self, method: str, index: int, argument: Any) -> Any:
        return self.env.env_method(method, argument, indices=index)[0]


class QSource:
    """QAA: a Q-network values each action at the state itself."""

    needs_snapshots = False

    def __init__(self, q: QNetworks) -> None:
        self.q = q

    def __call__(
        self, rollout: Rollout, behaviour: Behaviour, k: int, returns: Returns, *, gradient: bool
    ) -> ExtraActions:
        """See `Source`."""
        with torch.no_grad():
            actions, log_prob = behaviour.draw(rollout.observations, k)
        observations = rollout.observations.unsqueeze(1).expand(-1, k, -1)
        with torch.set_grad_enabled(gradient):
            free = actions.clone().requires_grad_(gradient)
            advantages = self.q(observations, behaviour.clip(free)) - rollout.values.unsqueeze(1)
        slope = torch.autograd.grad(advantages.sum(), free)[0] if gradient else None
        return ExtraActions(actions, log_prob, advantages.detach(), slope)


ValueModel = MLPDynamics | QNetworks
