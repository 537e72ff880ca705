"""Deterministic controllers of PIPPS as stable-baselines3 policies: RBF network and linear.

Everything inside is float64 and in [-1, 1]; stable-baselines3's `predict` rescales to the action
space and keeps its dtype.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from agents.controllers import Controller, RBFController, saturate, saturate_slope


def trig_features(x: Tensor, angle_dims: tuple[int, ...]) -> Tensor:
    """Replace angles by their sine and cosine, appended: [..., S] -> [..., S + len(angle_dims)]."""
    if not angle_dims:
        return x
    angles = x[..., list(angle_dims)]
    others = [d for d in range(x.shape[-1]) if d not in angle_dims]
    return torch.cat((x[..., others], angles.sin(), angles.cos()), -1)


class ControllerPolicy(BasePolicy):
    """Base for the two controllers: what stable-baselines3 asks of a policy.

    Args:
        observation_space: Box [S]. action_space: Box [A], bounded.
        angle_dims: observation entries that are angles and enter as sine and cosine.
    """

    is_placed: Tensor

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        *,
        angle_dims: tuple[int, ...] = (),
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True)
        self.register_buffer("is_placed", torch.tensor(False))
        self.angle_dims = tuple(angle_dims)
        self.n_features = observation_space.shape[0] + len(self.angle_dims)
        self.n_controls = action_space.shape[0]

    def act(self, x: Tensor) -> Tensor:
        """Scaled action in [-1, 1] [N, A] at observations [N, S] (float64); gradients flow."""
        return saturate(self.preactivation(self.features(x)))

    def features(self, x: Tensor) -> Tensor:
        """What the controller sees of x [N, S]: [N, n_features]."""
        return trig_features(x, self.angle_dims)

    def controller(self) -> Controller:
        """`act` for the steps of one rollout."""
        return Controller(self)

    @abstractmethod
    def preactivation(self, features: Tensor) -> Tensor:
        """[N, A] before the saturation, from features [N, n_features]."""

    def place(self, mean: Tensor, std: Tensor) -> None:
        """Put a new controller where the features are: their mean and std, [n_features] each."""
        self.is_placed.fill_(True)

    @abstractmethod
    def parameter_jacobian(self, x: Tensor) -> Tensor:
        """d action / d parameters, [N, A, P], in the order of `parameters()`; x: [N, S]."""

    @property
    @abstractmethod
    def last_layer(self) -> slice:
        """Which of the P parameters the last layer holds."""

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> Tensor:
        assert isinstance(observation, Tensor)
        return self.act(observation.double()).float()

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """As in stable-baselines3, but never a rounding error beyond the bounds."""
        space = self.action_space
        assert isinstance(space, spaces.Box)
        return np.clip(super().unscale_action(scaled_action), space.low, space.high)

    def forward(self, observation: Tensor) -> Tensor:
        """Same as `act`, for observations of any dtype."""
        return self.act(observation.double())

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "angle_dims": self.angle_dims,
        }


class RBFPolicy(ControllerPolicy):
    """Radial basis function network, v = Σ_k w_k exp(-Σ_d ((x_d - c_kd) e^{λ_d})²).

    One shared lengthscale vector, no bias; 254 parameters for the cart-pole with raw inputs (Parmas
    et al. 2023, App. B: "about 250"). Every control has its own weights.

    Args:
        n_centres: basis functions (the papers: 50).
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        *,
        angle_dims: tuple[int, ...] = (),
        n_centres: int = 50,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, angle_dims=angle_dims)
        if n_centres < 1:
            raise ValueError(f"n_centres must be at least 1, got {n_centres}")
        self.n_centres = n_centres
        dtype, bound = torch.float64, n_centres**-0.5
        self.centres = nn.Parameter(torch.randn(n_centres, self.n_features, dtype=dtype))
        self.log_inverse_scale = nn.Parameter(torch.zeros(self.n_features, dtype=dtype))
        weights = torch.empty(self.n_controls, n_centres, dtype=dtype).uniform_(-bound, bound)
        self.weights = nn.Parameter(weights)

    def place(self, mean: Tensor, std: Tensor) -> None:
        """Centres, N(0, 1) so far, become N(mean, std²); inverse scales 1 / std."""
        super().place(mean, std)
        with torch.no_grad():
            self.centres.mul_(std).add_(mean)
            self.log_inverse_scale.copy_(-std.log())

    def controller(self) -> Controller:
        return RBFController(self)

    def preactivation(self, features: Tensor) -> Tensor:
        return self.basis(features, self.constants())[1] @ self.weights.T

    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """e^λ [S], and of the scaled centres 2 cᵀ [S, n_centres] and -|c|² [n_centres]."""
        scale = self.log_inverse_scale.exp()
        c = self.centres * scale
        return scale, 2 * c.T, -c.square().sum(-1)

    @staticmethod
    def basis(features: Tensor, constants: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Scaled features [N, S] and basis functions [N, n_centres], given `constants()`."""
        scale, twice_centres, bias = constants
        z = features * scale
        exponent = torch.addmm(bias, z, twice_centres)  # [N, n_centres]
        return z, (exponent - z.square().sum(-1, keepdim=True)).exp()

    @torch.no_grad()
    def parameter_jacobian(self, x: Tensor) -> Tensor:
        features = self.features(x)
        basis = self.basis(features, self.constants())[1]  # [N, K]
        n, a, k = len(x), self.n_controls, self.n_centres
        by_weight = basis.unsqueeze(1) * saturate_slope(basis @ self.weights.T).unsqueeze(-1)
        slope = (2 * by_weight * self.weights).unsqueeze(-1)  # [N, A, K, 1]
        scale = self.log_inverse_scale.exp()
        offset = ((features.unsqueeze(1) - self.centres) * scale).unsqueeze(1)  # [N, 1, K, S]
        by_offset = slope * offset  # [N, A, K, S]
        by_centre = (by_offset * scale).flatten(2)
        by_scale = -(by_offset * offset).sum(2)
        if a > 1:  # control b does not depend on the weights of control a
            blocks = x.new_zeros(n, a, a, k)
            blocks.diagonal(dim1=1, dim2=2).copy_(by_weight.movedim(1, -1))
            by_weight = blocks.flatten(2)
        return torch.cat((by_centre, by_scale, by_weight), -1)

    @property
    def last_layer(self) -> slice:
        return slice(-self.weights.numel(), None)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "n_centres": self.n_centres}


class LinearPolicy(ControllerPolicy):
    """v = W x + b, W ~ 0.01·N(0, 1), b = 0. Parmas et al. 2018, Sec. 4.2 (unicycle)."""

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        *,
        angle_dims: tuple[int, ...] = (),
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, angle_dims=angle_dims)
        shape, dtype = (self.n_controls, self.n_features), torch.float64
        self.weights = nn.Parameter(0.01 * torch.randn(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.n_controls, dtype=dtype))

    def preactivation(self, features: Tensor) -> Tensor:
        return torch.addmm(self.bias, features, self.weights.T)

    @torch.no_grad()
    def parameter_jacobian(self, x: Tensor) -> Tensor:
        features = self.features(x)
        slope = saturate_slope(self.preactivation(features))  # [N, A]
        eye = torch.eye(self.n_controls, dtype=x.dtype, device=x.device)
        by_weight = torch.einsum("na,ns,ab->nabs", slope, features, eye).flatten(2)
        return torch.cat((by_weight, slope.unsqueeze(-1) * eye), -1)

    @property
    def last_layer(self) -> slice:
        return slice(None)
