"""A deterministic model of vector dynamics: next state, reward and termination of an action.

Two perceptrons, s' = s + F(s, a) (or F(s, a)) and r = R(s, a), fitted to stored transitions by mean
squared error. Nauman & Cygan 2022 (DAA), Sec. 4 and 5. Delta targets and standardised inputs follow
MBRL-Lib (Pineda et al. 2021). Differs from the paper: once a transition has terminated, a third
perceptron predicts the probability that an action ends the episode, by cross-entropy.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from totalprop.world_models.transitions import UNKNOWN, TransitionBuffer

Target = Literal["next", "delta"]
Activation = Literal["relu", "leaky_relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU}


class MLPDynamics(nn.Module):
    """(s, a) -> (s', r), differentiable in both.

    Args:
        state_size: S, the length of a state.
        action_size: A, the length of an action.
        width: hidden units per layer of each network.
        layers: hidden layers of each network.
        target: what the transition network predicts, the next state or the change of state.
        normalise: standardise states, targets and rewards by the data's statistics (`set_scale`).
        activation: "relu" or "leaky_relu".

    Attributes:
        terminates: [] whether a transition has terminated so far; before that, the model's episodes
            have no end.
    """

    terminates: Tensor
    state_mean: Tensor
    state_std: Tensor
    target_mean: Tensor
    target_std: Tensor
    reward_mean: Tensor
    reward_std: Tensor

    def __init__(
        self,
        state_size: int,
        action_size: int,
        *,
        width: int,
        layers: int = 2,
        target: Target = "delta",
        normalise: bool = True,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.target, self.normalise = target, normalise
        for name, size in (("state", state_size), ("target", state_size), ("reward", 1)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        sizes = [state_size + action_size] + [width] * layers
        self.transition = network([*sizes, state_size], ACTIVATIONS[activation])
        self.reward = network([*sizes, 1], ACTIVATIONS[activation])
        self.termination = network([*sizes, 1], ACTIVATIONS[activation])
        self.register_buffer("terminates", torch.tensor(False))

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Next states [..., S] and rewards [...], from [..., S] and [..., A]."""
        x = self._inputs(states, actions)
        change = self.transition(x) * self.target_std + self.target_mean
        reward = self.reward(x) * self.reward_std + self.reward_mean
        return (states + change if self.target == "delta" else change), reward.squeeze(-1)

    def _inputs(self, states: Tensor, actions: Tensor) -> Tensor:
        return torch.cat(((states - self.state_mean) / self.state_std, actions), -1)

    def continuation(self, states: Tensor, actions: Tensor) -> Tensor:
        """Probability [...] that the episode goes on after actions [..., A] at [..., S]."""
        logits = self.termination(self._inputs(states, actions)).squeeze(-1)
        return torch.sigmoid(-logits)

    def losses(
        self, states: Tensor, actions: Tensor, rewards: Tensor, next_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean squared errors of transition and reward, standardised by the data's deviations.

        Args:
            states: [..., S].
            actions: [..., A].
            rewards: [...].
            next_states: [..., S].
        """
        predicted, reward = self(states, actions)
        transition = ((predicted - next_states) / self.target_std).square().mean()
        return transition, ((reward - rewards) / self.reward_std).square().mean()

    def termination_loss(self, states: Tensor, actions: Tensor, terminated: Tensor) -> Tensor:
        """Mean cross-entropy [] of the terminations [...] that are known."""
        logits = self.termination(self._inputs(states, actions)).squeeze(-1)
        known = terminated != UNKNOWN
        errors = binary_cross_entropy_with_logits(
            logits, terminated.to(logits.dtype), reduction="none"
        )
        return torch.where(known, errors, 0.0).sum() / known.sum().clamp(min=1)

    @torch.no_grad()
    def see_terminations(self, buffer: TransitionBuffer) -> None:
        """Begin to predict them with the first one; at first, all are as likely as in the data."""
        terminated = buffer.terminated[: len(buffer)]
        if self.terminates or not (terminated == 1).any():
            return
        self.terminates.fill_(True)
        n, known = int((terminated == 1).sum()), int((terminated != UNKNOWN).sum())
        last = self.termination[-1]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.fill_(np.log((n + 0.5) / (known - n + 0.5)))

    @torch.no_grad()
    def set_scale(self, buffer: TransitionBuffer) -> None:
        """Set means and standard deviations to the data's; no effect with normalise=False."""
        if not self.normalise:
            return
        n = len(buffer)
        targets = buffer.next_states[:n]
        if self.target == "delta":
            targets = targets - buffer.states[:n]
        data = {"state": buffer.states[:n], "target": targets, "reward": buffer.rewards[:n, None]}
        for name, values in data.items():
            mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
            std = np.where(std > 1e-6 * np.abs(mean) + 1e-8, std, 1.0)  # constant entries
            getattr(self, f"{name}_mean").copy_(torch.as_tensor(mean))
            getattr(self, f"{name}_std").copy_(torch.as_tensor(std))


def fit(
    model: MLPDynamics,
    optimizer: torch.optim.Optimizer,
    buffer: TransitionBuffer,
    *,
    steps: int,
    batch_size: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Minimise the sum of all losses on batches drawn uniformly from the buffer.

    Args:
        model: what is fitted; its scales are set to the data's first.
        optimizer: of the model's parameters.
        buffer: holds at least one transition.
        steps: gradient steps.
        batch_size: transitions per step.
        rng: draws the batches.

    Returns:
        "transition_loss", "reward_loss" and, once a transition has terminated, "termination_loss":
        their means over the last tenth of the steps.
    """
    model.set_scale(buffer)
    model.see_terminations(buffer)
    terminates = bool(model.terminates)
    device = next(model.parameters()).device
    late: list[dict[str, float]] = []
    for step in range(steps):
        batch = [torch.as_tensor(x, device=device) for x in buffer.sample(batch_size, rng)]
        states, actions, rewards, next_states, terminated = batch
        transition, reward = model.losses(states, actions, rewards, next_states)
        losses = {"transition_loss": transition, "reward_loss": reward}
        total = transition + reward
        if terminates:
            termination = model.termination_loss(states, actions, terminated)
            losses["termination_loss"], total = termination, total + termination
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if step >= 0.9 * steps - 1:
            late.append({name: float(loss.detach()) for name, loss in losses.items()})
    return {name: float(np.mean([losses[name] for losses in late])) for name in late[-1]}


def network(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """A perceptron with orthogonal weights of gain 1 and zero biases, as in the authors' code."""
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        linear = nn.Linear(a, b)
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
        parts += [linear, activation()]
    return nn.Sequential(*parts[:-1])
