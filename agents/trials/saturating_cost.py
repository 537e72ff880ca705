"""The saturating cost of PILCO: 1 - exp(-½ dᵀ W d), whose expectation is known in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from totalprop.world_models import moment_matching
from totalprop.world_models.moment_matching import Gaussian, join, linear, trigonometry

Numbers = Sequence[Any] | np.ndarray | Tensor


class SaturatingCost:
    """c(x) = 1 - exp(-½ (z - t)ᵀ W (z - t)) in [0, 1), z = (x, sin A x, cos A x), of a state x.

    The angles A x are linear combinations of the state's entries, such as
    single ones or, for a rod on a tilted wheel, their sums and differences. Deisenroth & Rasmussen
    2011 and their code (lossSat.m, loss_cp.m, loss_unicycle.m). It is a function of states, so that
    PIPPS takes it as `cost_fn`, too.

    Args:
        target: [S + 2 K] t, in the order x, sines, cosines.
        weights: [S + 2 K, S + 2 K] W, symmetric without negative eigenvalues, or its diagonal; in
            inverse squared units of z. An entry of width w has 1 / w².
        angles: [K, S] A, or none.

    Raises:
        ValueError: sizes do not fit, or W is not symmetric and positive semi-definite.
    """

    def __init__(self, target: Numbers, weights: Numbers, *, angles: Numbers = ()) -> None:
        t, w, a = (_matrix(name, value) for name, value in
                   (("target", target), ("weights", weights), ("angles", angles)))  # fmt: skip
        if t.dim() != 1 or not len(t):
            raise ValueError(f"target must be a vector, of states and angles, got {_shape(t)}")
        size = len(t)
        if w.shape == (size,):
            w = w.diag()
        if w.shape != (size, size):
            raise ValueError(
                f"weights must be {size} numbers, or {size} x {size}, as many as the target has; "
                f"got {_shape(w)}"
            )
        self.n_angles = len(a)
        self.n_states = size - 2 * self.n_angles
        if self.n_angles and a.shape != (self.n_angles, self.n_states):
            raise ValueError(
                "angles must have a row for each angle, with a number for each entry of the state; "
                f"target has {size} numbers, 2 for each of {self.n_angles} angles, which leaves "
                f"rows of {self.n_states}, got {_shape(a)}"
            )
        values, vectors = torch.linalg.eigh((w + w.T) / 2)
        small = 1e-10 * float(values.abs().amax())
        if not torch.allclose(w, w.T, rtol=1e-10, atol=small) or values[0] < -small:
            raise ValueError(
                "weights must be a symmetric matrix without negative eigenvalues, "
                f"got the eigenvalues {[round(float(v), 6) for v in values]}"
                + ("" if torch.equal(w, w.T) else " of an asymmetric one")
            )
        keep = values > small
        if not keep.any():
            raise ValueError("weights must not all be 0: the cost would be 0 everywhere")
        self.target, self.weights = t, w
        self.angles = a if self.n_angles else t.new_zeros(0, self.n_states)
        self.root = (vectors[:, keep] * values[keep].sqrt()).T  # [rank, S + 2 K], W = RᵀR

    def __call__(self, states: Tensor) -> Tensor:
        """Cost [...] of states [..., S]; differentiable."""
        angles = states @ self.angles.to(states).T
        z = torch.cat((states, angles.sin(), angles.cos()), -1)
        error = (z - self.target.to(states)) @ self.root.to(states).T
        return -torch.expm1(-0.5 * error.square().sum(-1))

    def moments(self, x: Gaussian) -> tuple[Tensor, Tensor]:
        """Mean and variance [...] of the cost of an uncertain state [..., S]; differentiable.

        z is not Gaussian where there are angles: the moments are those of a Gaussian that has the
        mean and covariance of z.
        """
        target, root = self.target.to(x.mean), self.root.to(x.mean)
        s, k = self.n_states, self.n_angles
        if k:
            angles = linear(x, self.angles.to(x.mean), x.mean.new_zeros(k))
            x = join(x, range(s), angles)
            at = range(s, s + k)
            x = join(x, at, trigonometry(x.marginal(at)))
            x = x.marginal([*range(s), *range(s + k, s + 3 * k)])
        return moment_matching.saturating_cost(x, target, root)


def _matrix(name: str, value: Numbers) -> Tensor:
    try:
        found = torch.as_tensor(np.asarray(value, np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be numbers, got {value!r}") from error
    if not torch.isfinite(found).all():
        raise ValueError(f"{name} must be finite numbers, got {found.tolist()}")
    return found


def _shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape)) + " numbers"
