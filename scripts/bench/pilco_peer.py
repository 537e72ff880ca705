"""PILCO's gradient as nrontsis/PILCO computes it, in PyTorch, with GPyTorch's kernel matrices.

That library is written in TensorFlow. This is its algorithm, one operation for another: moments of
a Gaussian process from [E, E, n, n] arrays of all pairs of outputs (`predict_given_factorizations`
of models/mgpr.py), a controller that is a Gaussian process without a variance, sines of Gaussians
for the saturation (controllers.py) and an exponential cost (rewards.py). What it lacks is built
from its own parts, so that it predicts what ours predicts: the sine and cosine of the angle are two
of its sines, and PILCO's saturation (9 sin v + sin 3v) / 8 is a sum of two. Where it factorises
the kernel matrices anew in every step, here they are factorised once per gradient.

Not used by any agent: it is what `totalprop bench pilco` times, and an independent reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from totalprop.agents.trials.controllers import RBFPolicy
from totalprop.agents.trials.saturating_cost import SaturatingCost
from totalprop.world_models.gp_dynamics import GPDynamics
from totalprop.world_models.moment_matching import Gaussian


class Regression(NamedTuple):
    """E Gaussian processes with the same inputs."""

    inputs: Tensor  # [n, D]
    lengthscale: Tensor  # [E, D]
    variance: Tensor  # [E]
    inverse: Tensor  # [E, n, n] of the kernel matrix with noise; 0 without a variance
    beta: Tensor  # [E, n]


def make_gradient(
    dynamics: GPDynamics,
    policy: RBFPolicy,
    start: Gaussian,
    cost: SaturatingCost,
    *,
    horizon: int,
) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]] | None:
    """A function that computes the predicted cost and its gradient, or None without GPyTorch.

    Args:
        dynamics: a fitted model with one angle or none, all of whose inputs are seen.
        policy: the controller.
        start: Gaussian [S] that predictions start from.
        cost: of a state; its angles are entries of the state.
        horizon: steps H.

    Returns:
        A function of nothing: cost [] and the gradient of every parameter of the policy.
    """
    try:
        import gpytorch
        from gpytorch.utils.cholesky import psd_safe_cholesky
    except ImportError:
        return None
    gp = dynamics.gp
    outputs, inputs = gp.log_lengthscale.shape
    batch = torch.Size([outputs])
    plain = gpytorch.kernels.RBFKernel(ard_num_dims=inputs, batch_shape=batch)
    kernel = gpytorch.kernels.ScaleKernel(plain, batch_shape=batch).double()
    plain.lengthscale = gp.log_lengthscale.exp().unsqueeze(1)
    kernel.outputscale = (2 * gp.log_signal).exp()

    @torch.no_grad()
    def factorise() -> Regression:
        eye = torch.eye(len(gp.inputs), dtype=torch.float64)
        noisy = kernel(gp.inputs).to_dense() + gp.noise.square()[:, None, None] * eye
        factor = psd_safe_cholesky(noisy)
        targets = (gp.targets - gp.offset).T.unsqueeze(-1)
        return Regression(
            inputs=gp.inputs,
            lengthscale=plain.lengthscale.squeeze(1),
            variance=kernel.outputscale,
            inverse=torch.cholesky_solve(eye.expand(outputs, -1, -1), factor),
            beta=torch.cholesky_solve(targets, factor).squeeze(-1),
        )

    parameters = list(policy.parameters())
    states, offset, noise = len(start.mean), gp.offset, gp.noise.square().diag()
    angles = list(dynamics.angle_dims)
    of_cost = [int(row.nonzero()) for row in cost.angles]

    def gradient() -> tuple[Tensor, tuple[Tensor, ...]]:
        model, total = factorise(), start.mean.new_zeros(())
        m, s = start
        for _ in range(horizon):
            m, s = step(model, m, s)
            total = total + saturating(cost, *with_angles(m, s, of_cost))
        return total.detach(), torch.autograd.grad(total, parameters)

    def step(model: Regression, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        m, s = with_angles(m, s, angles)
        seen = [d for d in range(len(m)) if d not in angles]
        m_v, s_v, gain = predict_controller(policy, m[seen], s[seen][:, seen])
        m_u, s_u, gain_u = squash(m_v, s_v)
        m, s = append(m, s, s[:, seen] @ (gain @ gain_u), m_u, s_u)
        seen = [d for d in range(len(m)) if d not in angles]
        m_d, s_d, gain = predict_given_factorizations(m[seen], s[seen][:, seen], model)
        cross = s[:states][:, seen] @ gain
        s = s[:states, :states] + s_d + cross + cross.T + noise
        return m[:states] + m_d + offset, s

    return gradient


def predict_given_factorizations(
    m: Tensor, s: Tensor, model: Regression
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [E], covariance [E, E] and gain [D, E] at a Gaussian input: [D] m and [D, D] s."""
    lengthscale, variance, beta = model.lengthscale, model.variance, model.beta
    e, d = lengthscale.shape
    eye = torch.eye(d, dtype=m.dtype)
    inp = (model.inputs - m).expand(e, -1, -1)
    inverse = (1 / lengthscale).diag_embed()
    scaled = inp @ inverse
    b = inverse @ s @ inverse + eye
    t = torch.linalg.solve(b, scaled.mT).mT
    weighted = (-(scaled * t).sum(-1) / 2).exp() * beta
    c = variance / torch.linalg.det(b).sqrt()
    mean = weighted.sum(-1) * c
    gain = ((t @ inverse).mT @ weighted.unsqueeze(-1)).squeeze(-1) * c.unsqueeze(-1)

    squared = lengthscale.square()
    r = s @ (1 / squared[None] + 1 / squared[:, None]).diag_embed() + eye  # [E, E, D, D]
    left = inp[None] / squared[:, None, None]
    right = -inp[:, None] / squared[None, :, None]
    q = torch.linalg.solve(r, s.expand(e, e, -1, -1)) / 2
    own_left, own_right = ((x @ q * x).sum(-1) for x in (left, right))
    maha = -2 * (left @ q) @ right.mT + own_left.unsqueeze(-1) + own_right.unsqueeze(-2)
    k = variance.log().unsqueeze(-1) - scaled.square().sum(-1) / 2
    pairs = (k[:, None, :, None] + k[None, :, None, :] + maha).exp()  # [E, E, n, n]
    covariance = (beta[:, None, None, :] @ pairs @ beta[None, :, :, None])[..., 0, 0]
    explained = (model.inverse * pairs.diagonal(dim1=0, dim2=1).movedim(-1, 0)).sum((1, 2))
    covariance = (covariance - explained.diag()) / torch.linalg.det(r).sqrt()
    covariance = covariance + variance.diag() - mean.outer(mean)
    return mean, covariance, gain.T


def predict_controller(policy: RBFPolicy, m: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The network as Gaussian processes of variance 1 whose uncertainty is then taken away."""
    n, k = policy.n_controls, policy.n_centres
    one = m.new_ones(n)
    network = Regression(
        inputs=policy.centres,
        lengthscale=((-policy.log_inverse_scale).exp() / math.sqrt(2)).expand(n, -1),
        variance=one,
        inverse=m.new_zeros(n, k, k),
        beta=policy.weights,
    )
    mean, covariance, gain = predict_given_factorizations(m, s, network)
    return mean, covariance - one.diag(), gain


def squash_sin(m: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance and gain of the sines of a Gaussian."""
    variance = s.diag()
    lq = -(variance[:, None] + variance[None, :]) / 2
    q = lq.exp()
    covariance = ((lq + s).exp() - q) * (m[:, None] - m[None, :]).cos()
    covariance = covariance - ((lq - s).exp() - q) * (m[:, None] + m[None, :]).cos()
    decay = (-variance / 2).exp()
    return decay * m.sin(), covariance / 2, (decay * m.cos()).diag()


def squash(m: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of (9 sin v + sin 3v) / 8."""
    eye = torch.eye(len(m), dtype=m.dtype)
    return _of_sines(m, s, torch.cat((eye, 3 * eye), 1), torch.cat((9 * eye, eye)) / 8)


def with_angles(m: Tensor, s: Tensor, angles: list[int]) -> tuple[Tensor, Tensor]:
    """Append the sines, then the cosines of these entries."""
    if not angles:
        return m, s
    eye = torch.eye(len(angles), dtype=m.dtype)
    shift = torch.cat((m.new_zeros(len(angles)), m.new_full((len(angles),), math.pi / 2)))
    twice = torch.cat((eye, eye), 1)
    m_t, s_t, gain = _of_sines(m[angles], s[angles][:, angles], twice, shift=shift)
    return append(m, s, s[:, angles] @ gain, m_t, s_t)


def append(
    m: Tensor, s: Tensor, cross: Tensor, m_new: Tensor, s_new: Tensor
) -> tuple[Tensor, Tensor]:
    """The joint Gaussian of what there was and what is new."""
    s = torch.cat((torch.cat((s, cross), 1), torch.cat((cross.T, s_new), 1)))
    return torch.cat((m, m_new)), s


def saturating(cost: SaturatingCost, m: Tensor, s: Tensor) -> Tensor:
    """Expectation of 1 - exp(-½ (z - t)ᵀ W (z - t)) of a Gaussian z."""
    error = m - cost.target
    r = torch.eye(len(m), dtype=m.dtype) + s @ cost.weights
    weights = torch.linalg.solve(r.T, cost.weights.T).T  # W (I + S W)⁻¹
    return 1 - (-(error @ weights @ error) / 2).exp() / torch.linalg.det(r).sqrt()


def _of_sines(
    m: Tensor, s: Tensor, into: Tensor, out: Tensor | None = None, *, shift: Tensor | float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of outᵀ sin(intoᵀ x + shift)."""
    mean, covariance, gain = squash_sin(m @ into + shift, into.T @ s @ into)
    gain = into @ gain
    if out is None:
        return mean, covariance, gain
    return mean @ out, out.T @ covariance @ out, gain @ out
