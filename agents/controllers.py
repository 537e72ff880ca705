"""Controllers over one rollout: what its steps share, and their parameter Jacobians for the probes.

A rollout calls its controller once per step. What does not depend on the state is computed once,
and the Jacobians of all steps together, when the first is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from estimators import DenseJacobian

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
        return DenseJacobian(found.by_weight.unsqueeze(1)) if last_layer else found


class RBFJacobian(NamedTuple):
    """d action / d parameters of an RBF network with one control, never as an [N, P] array.

    With z = x e^λ, c = centre e^λ (scaled) and p_nk = sat'(v) φ_nk, the three blocks are
    2 w_k e^λ p_nk (z - c) for the centres, -Σ_k 2 w_k p_nk (z - c)² for λ, and p_nk for the
    weights; sums of squares of differences become matrix products.
    """

    by_weight: Tensor  # [N, K] p
    by_scale: Tensor  # [S, N] the block of λ
    norm: Tensor  # [N] squared norm of each sample's gradient
    moments: Tensor  # [1 + S, N] (1, z)
    centres: Tensor  # [S, K] c
    slope: Tensor  # [S, K] 2 w e^λ

    def rows(self, rows: slice) -> RBFJacobian:
        """The same for some of the samples."""
        return self._replace(
            by_weight=self.by_weight[rows],
            by_scale=self.by_scale[:, rows],
            norm=self.norm[rows],
            moments=self.moments[:, rows],
        )

    def inner(self) -> Tensor:
        """[N, 1, 1] squared norm of each sample's gradient."""
        return self.norm[:, None, None]

    def project(self, alpha: Tensor) -> Tensor:
        """[M, P] sums Σ_i α_mi J_i, from α [M, N, 1]."""
        a = alpha[..., 0]  # [M, N]
        sums = (a.unsqueeze(1) * self.moments).flatten(0, 1) @ self.by_weight
        sums = sums.view(len(a), -1, sums.shape[-1])  # [M, 1 + S, K]
        by_weight = sums[:, :1]
        by_centre = (sums[:, 1:] - by_weight * self.centres) * self.slope  # [M, S, K]
        by_centre = by_centre.mT.flatten(1)
        return torch.cat((by_centre, a @ self.by_scale.T, by_weight[:, 0]), 1)

    def per_sample(self, alpha: Tensor) -> Tensor:
        """[N, P] products α_i J_i, from α [N, 1]."""
        offset = (self.moments[1:].T.unsqueeze(1) - self.centres.T) * self.slope.T  # [N, K, S]
        by_centre = (self.by_weight.unsqueeze(-1) * offset).flatten(1)
        return alpha * torch.cat((by_centre, self.by_scale.T, self.by_weight), 1)


@torch.no_grad()
def _rbf_jacobians(
    policy: RBFPolicy, steps: list[tuple[Tensor, Tensor, Tensor]]
) -> list[RBFJacobian]:
    """Of H steps, [N, K] arrays one by one (they fit the cache) and all small ones together."""
    z = torch.stack([step[0] for step in steps]).mT  # [H, S, N]
    moments = torch.cat((torch.ones_like(z[:, :1]), z), 1)
    z = moments[:, 1:]
    slope_v = saturate_slope(torch.stack([step[2] for step in steps]))  # [H, N, 1]
    scale = policy.log_inverse_scale.exp().unsqueeze(1)
    c, w = policy.centres.T * scale, 2 * policy.weights  # [S, K], [1, K]
    slope = w * scale
    # Rows for Σ_k 2 w_k p_k (1, 2 c_k, c_k²), and for the terms of z², z and 1 with p².
    linear = w * torch.cat((torch.ones_like(w), 2 * c, c.square()))
    near, far = slope.square(), slope.square() * c
    square = torch.cat((near, -2 * far, 1 + (far * c).sum(0, keepdim=True)))
    by_weight, (h, s, n) = [], z.shape
    u, y = z.new_empty(h, len(linear), n), z.new_empty(h, len(square), n)
    for t in range(h):
        p = steps[t][1] * slope_v[t]
        torch.mm(linear, p.T, out=u[t])
        torch.mm(square, p.square().T, out=y[t])
        by_weight.append(p)
    by_scale = (u[:, 1 : 1 + s] - z * u[:, :1]) * z - u[:, 1 + s :]
    norm = ((y[:, :s] * z + y[:, s:-1]) * z + by_scale.square()).sum(1) + y[:, -1]
    return [
        RBFJacobian(*step, c, slope)
        for step in zip(by_weight, by_scale.unbind(0), norm.unbind(0), moments.unbind(0))
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
