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
        offset: [S] float64, subtracted from all states; zero until `set_offset`. What varies little
            around a large number keeps its digits in single precision.
        terminates: [] whether a transition has terminated so far; before that, the model's episodes
            have no end.
    """

    offset: Tensor
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
        self.register_buffer("offset", torch.zeros(state_size, dtype=torch.float64))

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Next states [..., S] and rewards [...], from [..., S] and [..., A]."""
        x = self._inputs(states, actions)
        change = self.transition(x) * self.target_std + self.target_mean
        reward = self.reward(x) * self.reward_std + self.reward_mean
        origin = states if self.target == "delta" else self.offset
        return (origin + change).to(states.dtype), reward.squeeze(-1)

    def _inputs(self, states: Tensor, actions: Tensor) -> Tensor:
        centred = self._centred(states)
        return torch.cat(((centred - self.state_mean) / self.state_std, actions), -1)

    def _centred(self, states: Tensor) -> Tensor:
        """Differences from the offset, in the networks' precision."""
        return (states - self.offset).to(self.state_mean.dtype)

    @torch.no_grad()
    def set_offset(self, state: np.ndarray) -> None:
        """Learn states as differences from this one [S]; before the first fit."""
        self.offset.copy_(torch.as_tensor(state))

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
        errors = (predicted - next_states).to(self.target_std.dtype)
        transition = (errors / self.target_std).square().mean()
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
        n, offset = len(buffer), self.offset.cpu().numpy().astype(buffer.states.dtype)
        states = buffer.states[:n]
        origin = states if self.target == "delta" else offset
        targets, rewards = buffer.next_states[:n] - origin, buffer.rewards[:n, None]
        data = {"state": states - offset, "target": targets, "reward": rewards}
        for name, values in data.items():
            mean, std = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
            # What is constant has no scale; for a constant change, it is that of the states.
            scale = self.state_std.cpu().numpy() if name == "target" else 1.0
            std = np.where(std > 1e-6 * np.abs(mean) + 1e-8, std, scale)
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
        Means over the last tenth of the steps, by name: transition_loss, reward_loss and, once a
        transition has terminated, termination_loss.
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
