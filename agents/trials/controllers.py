"""Deterministic controllers as stable-baselines3 policies: RBF network and linear.

Inside, actions are float64 in [-1, 1]; stable-baselines3's `predict` rescales them to the action
space and its dtype. A rollout calls its `Controller` once per step. What does not depend on the
state is computed once, and the parameter Jacobians of all steps together when a probe asks for the
first.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from totalprop.agents.core.policies import BoundedPolicy
from totalprop.agents.core.validation import AtLeast, check_values
from totalprop.estimators import DenseJacobian
from totalprop.estimators.probes import Gram, gram_of_products
from totalprop.world_models import moment_matching
from totalprop.world_models.gp_dynamics import trig_features
from totalprop.world_models.moment_matching import Gaussian, Image, KernelSteps, KernelSum


class ControllerPolicy(BoundedPolicy):
    """Base of the controllers, with the interface that stable-baselines3 asks of a policy.

    Args:
        observation_space: Box [S].
        action_space: Box [A], bounded.
        lr_schedule: not used; stable-baselines3 passes it to every policy.
        angle_dims: entries of the observation that are angles, seen as sine and cosine.
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

    @property
    def n_basis(self) -> int:
        """Basis functions that a dropout may leave out of a rollout; 0 where there are none."""
        return 0

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

    def match(self, features: Gaussian) -> Image:
        """Moments of `preactivation` at uncertain features [..., n_features]; gradients flow.

        PILCO needs it; a controller without it can be searched with particles.
        """
        raise NotImplementedError

    def matcher(self, *, keep: bool) -> Matcher:
        """`match` for the steps of one prediction; `keep` where derivatives are wanted.

        A subclass of RBFPolicy that has another `match` overrides this, too.
        """
        return Matcher(self)

    def place(self, mean: Tensor, std: Tensor) -> None:
        """Move a new controller to where its features will be.

        Args:
            mean: [n_features] of the features.
            std: [n_features] of the features.
        """
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

    def forward(self, observation: Tensor) -> Tensor:
        """`act` for observations of any dtype."""
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
        observation_space: Box [S].
        action_space: Box [A], bounded.
        lr_schedule: not used; stable-baselines3 passes it to every policy.
        angle_dims: entries of the observation that are angles, seen as sine and cosine.
        n_centres: basis functions (the papers: 50).
    """

    file_name: ClassVar[str] = "totalprop.RBFPolicy"
    former_file_names: ClassVar[tuple[str, ...]] = ("agents.policies.RBFPolicy",)

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        *,
        angle_dims: tuple[int, ...] = (),
        n_centres: Annotated[int, AtLeast(1)] = 50,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, angle_dims=angle_dims)
        check_values(RBFPolicy, n_centres=n_centres)
        self.n_centres = n_centres
        dtype, bound = torch.float64, n_centres**-0.5
        self.centres = nn.Parameter(torch.randn(n_centres, self.n_features, dtype=dtype))
        self.log_inverse_scale = nn.Parameter(torch.zeros(self.n_features, dtype=dtype))
        weights = torch.empty(self.n_controls, n_centres, dtype=dtype).uniform_(-bound, bound)
        self.weights = nn.Parameter(weights)

    @property
    def n_basis(self) -> int:
        return self.n_centres

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

    def match(self, features: Gaussian) -> Image:
        """As of a Gaussian process's mean: the exponent has no ½, so that l = e^{-λ} / √2."""
        return moment_matching.kernel_sum(features, self.kernel_sum())

    def matcher(self, *, keep: bool) -> Matcher:
        return RBFMatcher(self, keep=keep)

    def kernel_sum(self) -> KernelSum:
        """What `match` is the image of; gradients flow to the parameters."""
        n, dtype = self.n_controls, self.centres.dtype
        zeros = torch.zeros(n, dtype=dtype, device=self.centres.device)
        return KernelSum(
            centres=self.centres.expand(n, -1, -1),
            beta=self.weights,
            inverse_lengthscale=(math.sqrt(2) * self.log_inverse_scale.exp()).expand(n, -1),
            log_signal=zeros,
            offset=zeros,
        )

    def origin(self) -> Tensor:
        """[S] the middle of the centres, detached; |z - c|² is expanded about it.

        Expanded about 0, an offset of the features would cost its square in digits.
        """
        return self.centres.detach().mean(0)

    def constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Origin and e^λ [S], and of the scaled centres 2 cᵀ [S, n_centres], -|c|² [n_centres]."""
        origin, scale = self.origin(), self.log_inverse_scale.exp()
        c = (self.centres - origin) * scale
        return origin, scale, 2 * c.T, -c.square().sum(-1)

    @staticmethod
    def basis(
        features: Tensor, constants: tuple[Tensor, Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Scaled features [N, S] about the origin and basis functions [N, n_centres]."""
        origin, scale, twice_centres, bias = constants
        z = (features - origin) * scale
        exponent = torch.addmm(bias, z, twice_centres)  # [N, n_centres]
        return z, (exponent - z.square().sum(-1, keepdim=True)).exp()

    @torch.no_grad()
    def parameter_jacobian(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """As in the base; `kept` as in `Controller.__call__`."""
        features = self.features(x)
        basis = self.basis(features, self.constants())[1]  # [N, K]
        basis = basis if kept is None else basis * kept
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
    """v = W x + b, W ~ 0.01·N(0, 1), b = 0. Parmas et al. 2018, Sec. 4.2 (unicycle).

    Args:
        observation_space: Box [S].
        action_space: Box [A], bounded.
        lr_schedule: not used; stable-baselines3 passes it to every policy.
        angle_dims: entries of the observation that are angles, seen as sine and cosine.
    """

    file_name: ClassVar[str] = "totalprop.LinearPolicy"
    former_file_names: ClassVar[tuple[str, ...]] = ("agents.policies.LinearPolicy",)

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

    def match(self, features: Gaussian) -> Image:
        return moment_matching.linear(features, self.weights, self.bias)

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


class Controller:
    """A policy in one rollout, step by step: u_t = π(x_t)."""

    def __init__(self, policy: ControllerPolicy) -> None:
        self.policy = policy
        self.visited: list[Tensor] = []

    def __call__(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Scaled action [N, A]; gradients flow.

        Args:
            x: [N, S].
            kept: [N, n_basis] factors of the basis functions under a dropout; None without one.
        """
        assert kept is None, "of a controller with basis functions alone"
        self.visited.append(x.detach())
        return self.policy.act(x)

    def jacobian(self, step: int, *, last_layer: bool = False) -> DenseJacobian | RBFJacobian:
        """d action / d parameters at a step, in the form that `estimators.ControlProbe` takes.

        Args:
            step: 0 for the first call.
            last_layer: only for the parameters of the last layer (Parmas et al. 2023, Sec. 4).
        """
        jacobian = self.policy.parameter_jacobian(self.visited[step])
        return DenseJacobian(jacobian[..., self.policy.last_layer] if last_layer else jacobian)


class RBFController(Controller):
    """An RBF network in one rollout; Jacobians are built from the stored basis of each step."""

    policy: RBFPolicy

    def __init__(self, policy: RBFPolicy) -> None:
        super().__init__(policy)
        self.constants = policy.constants()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []  # scaled features, basis, v
        self.kept: list[Tensor | None] = []
        self.jacobians: list[RBFJacobian] = []

    def __call__(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        z, basis = self.policy.basis(self.policy.features(x), self.constants)
        basis = basis if kept is None else basis * kept
        v = basis @ self.policy.weights.T
        self.visited.append(x.detach())
        self.kept.append(kept)
        self.seen.append((z.detach(), basis.detach(), v.detach()))
        return saturate(v)

    def jacobian(self, step: int, *, last_layer: bool = False) -> DenseJacobian | RBFJacobian:
        if self.policy.n_controls > 1:
            dense = self.policy.parameter_jacobian(self.visited[step], self.kept[step])
            return DenseJacobian(dense[..., self.policy.last_layer] if last_layer else dense)
        if len(self.jacobians) <= step:
            is_even = len({len(basis) for _, basis, _ in self.seen}) == 1
            groups = [self.seen] if is_even else [[step] for step in self.seen]
            self.jacobians = [j for group in groups for j in _rbf_jacobians(self.policy, group)]
        found = self.jacobians[step]
        return found.dense_last_layer() if last_layer else found


class Matcher:
    """A policy's `match` in one prediction: step by step, and then for all steps together."""

    def __init__(self, policy: ControllerPolicy) -> None:
        self.policy = policy

    def __call__(self, features: Gaussian) -> Image:
        """Moments at [n_features], without gradients."""
        return self.policy.match(features)

    def together(self, features: Gaussian) -> Image:
        """Moments at the features [H, n_features] of all calls; gradients flow."""
        return self.policy.match(features)


class RBFMatcher(Matcher):
    """An RBF network in one prediction; derivatives by the features come from what was summed."""

    policy: RBFPolicy

    def __init__(self, policy: RBFPolicy, *, keep: bool) -> None:
        super().__init__(policy)
        self.steps = KernelSteps(policy.kernel_sum(), keep=keep)

    def __call__(self, features: Gaussian) -> Image:
        return self.steps(features)

    def together(self, features: Gaussian) -> Image:
        to_features = self.steps.together(features)
        to_parameters = self.policy.match(Gaussian(*(part.detach() for part in features)))
        return Image(*(x + (y - y.detach()) for x, y in zip(to_features, to_parameters)))


class RBFJacobian(NamedTuple):
    """d action / d parameters of an RBF network with one control, without an [N, P] array.

    With z = x e^λ, c = centre e^λ (both about the policy's origin) and the slope s of the
    saturation, the three blocks are s φ_k
    times 2 w_k e^λ (z - c) for the centres, -2 w_k (z - c)² summed over k for λ, and 1 for the
    weights. Expanding the squared differences turns their sums into matrix products.
    """

    basis: Tensor  # [N, K] φ
    slope: Tensor  # [N] s
    by_scale: Tensor  # [S, N] the block of λ, without s
    norm: Tensor  # [N] squared norm of each sample's gradient, divided by s²
    moments: Tensor  # [1 + S, N] (1, z)
    factor: Tensor  # [1 + S, K] (1, 2 w e^λ)
    shift: Tensor  # [1 + S, K] (0, 2 w e^λ c)

    def rows(self, rows: slice) -> RBFJacobian:
        """The Jacobian of some of the samples."""
        return self._replace(
            basis=self.basis[rows],
            slope=self.slope[rows],
            by_scale=self.by_scale[:, rows],
            norm=self.norm[rows],
            moments=self.moments[:, rows],
        )

    def gram(self, alpha: Tensor) -> Gram:
        """Of the products α_ai J_i, from α [M, N, 1]."""
        a = alpha.squeeze(-1) * self.slope  # [M, N]
        sums = (a.unsqueeze(1) * self.moments).flatten(0, 1) @ self.basis
        sums = sums.view(len(a), -1, sums.shape[-1])  # [M, 1 + S, K]
        blocks = torch.addcmul(sums * self.factor, sums[:, :1], self.shift, value=-1)
        total = torch.cat((blocks.flatten(1), a @ self.by_scale.T), 1)  # Σ_i α_i J_i, reordered
        return gram_of_products(a * self.norm, a, total)

    def per_sample(self, alpha: Tensor) -> Tensor:
        """[N, P] products α_i J_i, from α [N, 1]."""
        z = self.moments.T.unsqueeze(-1)  # [N, 1 + S, 1]
        blocks = self.basis.unsqueeze(1) * (z * self.factor - self.shift)  # [N, 1 + S, K]
        by_centre = blocks[:, 1:].mT.flatten(1)
        jacobian = torch.cat((by_centre, self.by_scale.T, blocks[:, 0]), 1)
        return alpha * self.slope.unsqueeze(1) * jacobian

    def dense_last_layer(self) -> DenseJacobian:
        """d action / d weights."""
        return DenseJacobian((self.basis * self.slope.unsqueeze(1)).unsqueeze(1))


@torch.no_grad()
def _rbf_jacobians(
    policy: RBFPolicy, steps: list[tuple[Tensor, Tensor, Tensor]]
) -> list[RBFJacobian]:
    """Jacobians of H steps: [N, K] arrays one by one, which fit the cache, small ones together."""
    z = torch.stack([step[0] for step in steps]).mT  # [H, S, N]
    moments = torch.cat((torch.ones_like(z[:, :1]), z), 1)
    z = moments[:, 1:]
    slope = saturate_slope(torch.stack([step[2] for step in steps])).squeeze(-1)  # [H, N]
    scale = policy.log_inverse_scale.exp().unsqueeze(1)
    c, w = (policy.centres - policy.origin()).T * scale, 2 * policy.weights  # [S, K], [1, K]
    one, by_offset = torch.ones_like(w), w * scale
    factor = torch.cat((one, by_offset))
    shift = torch.cat((torch.zeros_like(w), by_offset * c))
    # Rows for Σ_k 2 w_k φ_k (1, 2 c_k, c_k²), and for the terms of z², z and 1 with φ².
    linear = w * torch.cat((one, 2 * c, c.square()))
    near, far = by_offset.square(), by_offset.square() * c
    square = torch.cat((near, -2 * far, 1 + (far * c).sum(0, keepdim=True)))
    h, s, n = z.shape
    u, y = z.new_empty(h, len(linear), n), z.new_empty(h, len(square), n)
    squared_basis = torch.empty_like(steps[0][1])
    for (_, basis, _), u_t, y_t in zip(steps, u.unbind(0), y.unbind(0)):
        torch.mm(linear, basis.T, out=u_t)
        torch.mm(square, torch.mul(basis, basis, out=squared_basis).T, out=y_t)
    by_scale = (u[:, 1 : 1 + s] - z * u[:, :1]) * z - u[:, 1 + s :]
    norm = ((y[:, :s] * z + y[:, s:-1]) * z + by_scale.square()).sum(1) + y[:, -1]
    parts = zip(steps, slope.unbind(), by_scale.unbind(), norm.unbind(), moments.unbind())
    return [
        RBFJacobian(step[1], slope_t, by_scale_t, norm_t, moments_t, factor, shift)
        for step, slope_t, by_scale_t, norm_t, moments_t in parts
    ]


def saturate(v: Tensor) -> Tensor:
    """(9 sin v + sin 3v) / 8, a smooth map onto [-1, 1]. Parmas et al. 2018, Sec. 4.2.

    Written as s (3 - s²) / 2 with s = sin v: one sine instead of two.
    """
    s = v.sin()
    return s * (1.5 - 0.5 * s * s)


def saturate_slope(v: Tensor) -> Tensor:
    """Derivative of `saturate`: 3/2 cos³ v."""
    return 1.5 * v.cos().pow(3)
