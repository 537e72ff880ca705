"""Gaussian-process model of an environment: its dynamics and, where no cost is known, its reward.

The model encodes states and controls, holds the data and fits both processes. How a simulation
moves through it (by particles, by moment matching) is up to the agent.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from totalprop.world_models.gp import ROUNDING, GaussianProcess, Kernel, outlier
from totalprop.world_models.moment_matching import Gaussian, join, take, trigonometry


class Prediction(NamedTuple):
    """Marginal distribution of what is predicted of the next state, without noise."""

    mean: Tensor  # [N, E]
    variance: Tensor  # [N, E]
    mean_jacobian: Tensor  # [N, E, A] d mean / d control, detached
    variance_jacobian: Tensor  # [N, E, A] d variance / d control, detached


class GPDynamics(nn.Module):
    """x' - x ~ GP(φ(x), u) and r ~ GP(φ(x'), u), where φ replaces angles by sine and cosine.

    Entries that no change depends on are left out of φ(x), but not of φ(x'). Positions
    whose velocity is an entry, too, need no process of their own: see `complete`.

    The reward belongs to the state that a step arrives in. Controls are scaled to [-1, 1]. The
    prior mean of the reward is the mean of those seen: an offset of the rewards changes nothing.

    Args:
        n_states: entries S of a state.
        n_controls: entries A of a control.
        angle_dims: entries of the state that are angles.
        invariant_dims: entries of the state that no change depends on, such as a yaw.
        integrated_dims: pairs (position, velocity) of entries; the positions are not predicted.
        time_step: duration T of a step, in the unit of a position over that of its velocity.
        kernel: of the dynamics, see `GaussianProcess`.
        rounding: of the observed states, relative, see `GaussianProcess`.

    Attributes:
        predicted_dims: the E entries of the state that are predicted, all but positions.
        gp: the dynamics, from encoded states and controls to differences of the E entries.
        reward_gp: the reward, from encoded next states and controls.
    """

    _by_state: Tensor
    _by_predicted: Tensor

    def __init__(
        self,
        n_states: int,
        n_controls: int,
        *,
        angle_dims: tuple[int, ...] = (),
        invariant_dims: tuple[int, ...] = (),
        integrated_dims: Sequence[tuple[int, int]] = (),
        time_step: float = 1.0,
        kernel: Kernel = "rbf",
        rounding: float = ROUNDING[np.float32],
    ) -> None:
        super().__init__()
        self.n_states, self.n_controls = n_states, n_controls
        self.angle_dims = tuple(angle_dims)
        n_inputs = n_states + len(self.angle_dims) + n_controls
        others = [d for d in range(n_states) if d not in self.angle_dims]
        entries = [*others, *self.angle_dims, *self.angle_dims]  # which a feature is of
        seen = [i for i, d in enumerate(entries) if d not in invariant_dims]
        self.seen = [*seen, *range(len(entries), n_inputs)] if invariant_dims else None
        n_seen = n_inputs if self.seen is None else len(self.seen)
        positions = {position for position, _ in integrated_dims}
        self.predicted_dims = [d for d in range(n_states) if d not in positions]
        n_predicted = len(self.predicted_dims)
        self.gp = GaussianProcess(n_seen, n_predicted, kernel=kernel, rounding=rounding)
        self.reward_gp = GaussianProcess(n_inputs, 1, prior_mean="data", rounding=rounding)
        self._warned: set[str] = set()
        by_state = torch.zeros(n_states, n_states, dtype=torch.float64)
        by_predicted = torch.eye(n_states, dtype=torch.float64)
        for position, velocity in integrated_dims:
            by_state[position, position] = 1.0
            by_state[velocity, position] = by_predicted[velocity, position] = time_step / 2
        self.register_buffer("_by_state", by_state, persistent=False)  # see `complete`
        self.register_buffer("_by_predicted", by_predicted[self.predicted_dims], persistent=False)

    @property
    def noise(self) -> Tensor:
        """[E] deviation of the noise of an observed difference of predicted entries."""
        return self.gp.noise

    @property
    def is_fitted(self) -> bool:
        """Whether the hyper-parameters of the dynamics have been chosen."""
        return self.gp.is_fitted

    @property
    def n_points(self) -> int:
        """Real steps that the model holds."""
        return len(self.gp.inputs)

    @property
    def features(self) -> Tensor:
        """[n, S + len(angle_dims)] features of the states that the model has data of."""
        # Where the dynamics do not see all of them: of the states that the steps arrived in.
        gp = self.gp if self.seen is None else self.reward_gp
        return gp.inputs[:, : -self.n_controls]

    def encode(self, states: Tensor, controls: Tensor) -> Tensor:
        """Features of states, then controls: inputs of the reward, and all that dynamics may see.

        Args:
            states: [..., S]; gradients flow.
            controls: [..., A]; gradients flow.

        Returns:
            [..., S + len(angle_dims) + A].
        """
        return torch.cat((trig_features(states, self.angle_dims), controls), -1)

    def dynamics_inputs(self, states: Tensor, controls: Tensor) -> Tensor:
        """Inputs of the dynamics: `encode` without what no change depends on."""
        inputs = self.encode(states, controls)
        return inputs if self.seen is None else inputs[..., self.seen]

    def add(
        self,
        states: Tensor,
        controls: Tensor,
        next_states: Tensor,
        rewards: Tensor,
        *,
        keep: int = 0,
    ) -> None:
        """Append real steps to both processes; hyper-parameters change at the next fit.

        Args:
            states: [n, S] float64.
            controls: [n, A] float64.
            next_states: [n, S] float64.
            rewards: [n] float64.
            keep: number of newest steps to keep; 0 for all.

        Raises:
            ValueError: a value is not finite; nothing is appended then.
        """
        if not torch.isfinite(rewards).all():
            raise ValueError("rewards hold a NaN or infinity; check the environment's reward")
        changes = (next_states - states)[:, self.predicted_dims]
        self.gp.add_data(self.dynamics_inputs(states, controls), changes, keep=keep)
        arrival = self.encode(next_states, controls)
        self.reward_gp.add_data(arrival, rewards.unsqueeze(-1), keep=keep)

    def fit(self, *, max_evaluations: int = 200) -> Tensor:
        """Choose the hyper-parameters of the dynamics, see `GaussianProcess.fit`.

        Warns of an observation or a difference of observations that ruins the fit.

        Returns:
            [E] negative log marginal likelihood per data point.
        """
        others = [d for d in range(self.n_states) if d not in self.angle_dims]
        for column, d in enumerate(others):
            self._warn_of_outlier(f"observation {d}", self.features[:, column])
        for e, d in enumerate(self.predicted_dims):
            self._warn_of_outlier(f"the change of observation {d} in a step", self.gp.targets[:, e])
        return self.gp.fit(max_evaluations=max_evaluations)

    def fit_reward(self, *, max_evaluations: int = 200) -> Tensor:
        """Choose the hyper-parameters of the reward; only agents without a cost need it.

        Warns of a reward that ruins the fit.

        Returns:
            [1] negative log marginal likelihood per data point.
        """
        self._warn_of_outlier("the reward", self.reward_gp.targets[:, 0])
        return self.reward_gp.fit(max_evaluations=max_evaluations)

    def _warn_of_outlier(self, name: str, column: Tensor) -> None:
        """Say once for each column that one of its values is out of all proportion."""
        found = None if name in self._warned else outlier(column)
        if found is not None:
            self._warned.add(name)
            value, low, high = found
            warnings.warn(
                f"{name} was {value:g} once, while its other values lie between {low:g} and "
                f"{high:g}; such an outlier ruins the fit of a Gaussian process: clip it in the "
                "environment, or end the episode before it",
                stacklevel=3,
            )

    def predict(self, states: Tensor, controls: Tensor) -> Prediction:
        """What is predicted of the next states after one step.

        Args:
            states: [N, S] float64; gradients flow.
            controls: [N, A] float64; gradients flow.
        """
        delta = self.gp.posterior(self.dynamics_inputs(states, controls))
        by_control = slice(-self.n_controls, None)
        return Prediction(
            take(states, self.predicted_dims, -1) + delta.mean,
            delta.variance,
            delta.mean_jacobian[..., by_control],
            delta.variance_jacobian[..., by_control],
        )

    def complete(self, states: Tensor, predicted: Tensor) -> Tensor:
        """The next state from what is predicted of it; linear in both arguments.

        q' = q + T/2 (q̇ + q̇'), which is q + T q̇ + T/2 Δq̇: constant acceleration during a step.
        Amadio et al. 2022 (MC-PILCO), speed-integration model, and code (Model_learning.py).

        Args:
            states: [..., S]; gradients flow.
            predicted: [..., E] the predicted entries of the next state; gradients flow.

        Returns:
            [..., S]; `predicted` itself where there are no positions to integrate.
        """
        if len(self.predicted_dims) == self.n_states:
            return predicted
        return states @ self._by_state + predicted @ self._by_predicted

    def reward(self, next_states: Tensor, controls: Tensor) -> Tensor:
        """Mean reward of arriving in next states [..., S] with controls [..., A]: [...]."""
        inputs = self.encode(next_states, controls)
        mean = self.reward_gp.posterior(inputs.flatten(0, -2)).mean
        return mean.reshape(inputs.shape[:-1])


def trig_features(x: Tensor, angle_dims: tuple[int, ...]) -> Tensor:
    """Drop the angles and append their sines, then their cosines.

    Args:
        x: [..., S]; gradients flow.
        angle_dims: entries of x that are angles.

    Returns:
        [..., S + len(angle_dims)].
    """
    if not angle_dims:
        return x
    angles = x[..., list(angle_dims)]
    others = [d for d in range(x.shape[-1]) if d not in angle_dims]
    return torch.cat((x[..., others], angles.sin(), angles.cos()), -1)


def join_trig_features(
    joint: Gaussian, states: int, angle_dims: tuple[int, ...]
) -> tuple[Gaussian, list[int]]:
    """`trig_features` of an uncertain state, joined to it.

    Args:
        joint: [..., D] of which the first entries are the state.
        states: entries S of the state.
        angle_dims: entries of the state that are angles.

    Returns:
        [..., D + 2 len(angle_dims)], and which of its entries the features are.
    """
    size = joint.mean.shape[-1]
    if angle_dims:
        joint = join(joint, angle_dims, trigonometry(joint.marginal(angle_dims)))
    others = [d for d in range(states) if d not in angle_dims]
    return joint, [*others, *range(size, joint.mean.shape[-1])]
