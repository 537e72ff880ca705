"""Controllers over one rollout: what its steps share, and their parameter Jacobians for the probes.

A rollout calls its controller once per step. What does not depend on the state is computed once,
and the Jacobians of all steps together, when the first is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from estimators import DenseJacobian
from estimators.probes import covariance

if TYPE_CHECKING:
    from agents.policies import ControllerPolicy, RBFPolicy


class Controller:
    """Any policy, step by step: u_t = π(x_t)."""

    def __init__(self, policy: ControllerPolicy) -> None:
        self.policy = policy
        self.visited: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """Scaled action [N, A] at x [N, S]; gradients flow."""
        self.visited.append(x.detach())
        return self.policy.act(x)

    def jacobian(self, step: int, *, last_layer: bool = False) -> DenseJacobian | RBFJacobian:
        """d action / d parameters at a step, in the form that `estimators.ControlProbe` takes.

        Args:
            step: 0 for the first call. last_layer: of its parameters only (TPX 2023, Sec. 4).
        """
        jacobian = self.policy.parameter_jacobian(self.visited[step])
        return DenseJacobian(jacobian[..., self.policy.last_layer] if last_layer else jacobian)


class RBFController(Controller):
    """An RBF network: each step's basis is kept, and its Jacobian is made of it."""

    policy: RBFPolicy

    def __init__(self, policy: RBFPolicy) -> None:
        super().__init__(policy)
        self.constants = policy.constants()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []  # scaled features, basis, v
        self.jacobians: list[RBFJacobian] = []

    def __call__(self, x: Tensor) -> Tensor:
        z, basis = self.policy.basis(self.policy.features(x), self.constants)
        v = basis @ self.policy.weights.T
        self.visited.append(x.detach())
        self.seen.append((z.detach(), basis.detach(), v.detach()))
        return saturate(v)

    def jacobian(self, step: int, *, last_layer: bool = False) -> DenseJacobian | RBFJacobian:
        if self.policy.n_controls > 1:
            return super().jacobian(step, last_layer=last_layer)
        if len(self.jacobians) <= step:
            self.jacobians = _rbf_jacobians(self.policy, self.seen)
        found = self.jacobians[step]
        return found.dense_last_layer() if last_layer else found


class RBFJacobian(NamedTuple):
    """d action / d parameters of an RBF network with one control, never as an [N, P] array.

    With z = x e^λ, c = centre e^λ (scaled) and the slope s of the saturation, the three blocks are
    s φ_k times 2 w_k e^λ (z - c) for the centres, -2 w_k (z - c)² summed over k for λ, and 1 for
    the weights; sums of squares of differences become matrix products.
    """

    basis: Tensor  # [N, K] φ
    slope: Tensor  # [N] s
    by_scale: Tensor  # [S, N] the block of λ, without s
    norm: Tensor  # [N] squared norm of each sample's gradient, without s²
    moments: Tensor  # [1 + S, N] (1, z)
    factor: Tensor  # [1 + S, K] (1, 2 w e^λ)
    shift: Tensor  # [1 + S, K] (0, 2 w e^λ c)

    def rows(self, rows: slice) -> RBFJacobian:
        """The same for some of the samples."""
        return self._replace(
            basis=self.basis[rows],
            slope=self.slope[rows],
            by_scale=self.by_scale[:, rows],
            norm=self.norm[rows],
            moments=self.moments[:, rows],
        )

    def gram(self, alpha: Tensor) -> Tensor:
        """[M, M] covariances Σ_i <α_ai J_i, α_bi J_i> less the mean's part, from α [M, N, 1]."""
        a = alpha.squeeze(-1) * self.slope  # [M, N]
        sums = (a.unsqueeze(1) * self.moments).flatten(0, 1) @ self.basis
        sums = sums.view(len(a), -1, sums.shape[-1])  # [M, 1 + S, K]
        blocks = torch.addcmul(sums * self.factor, sums[:, :1], self.shift, value=-1)
        total = torch.cat((blocks.flatten(1), a @ self.by_scale.T), 1)  # Σ_i α_i J_i, reordered
        return covariance(a * self.norm, a, total)

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
    """Of H steps, [N, K] arrays one by one (they fit the cache) and all small ones together."""
    z = torch.stack([step[0] for step in steps]).mT  # [H, S, N]
    moments = torch.cat((torch.ones_like(z[:, :1]), z), 1)
    z = moments[:, 1:]
    slope = saturate_slope(torch.stack([step[2] for step in steps])).squeeze(-1)  # [H, N]
    scale = policy.log_inverse_scale.exp().unsqueeze(1)
    c, w = policy.centres.T * scale, 2 * policy.weights  # [S, K], [1, K]
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
