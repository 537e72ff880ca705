"""Moment matching: Gaussians through functions, by the exact mean and covariance of the output.

Of a Gaussian input the functions here give the first two moments of the output and its covariance
with the input, all in closed form: linear maps, sines and cosines, PILCO's saturation, sums of
squared-exponential kernels (Gaussian processes and RBF networks) and the saturating cost.
`join` puts them together. Source: Deisenroth & Rasmussen 2011 (PILCO), Sec. 2.2 and 2.3, and the
authors' code.

Leading axes [...] of the Gaussians are batches. Everything is float64 and differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# See `kernel_sum`: where the exponent is larger, its term is below exp(-LARGEST_EXPONENT).
LARGEST_EXPONENT = 600.0


class Gaussian(NamedTuple):
    """A normal distribution."""

    mean: Tensor  # [..., D]
    covariance: Tensor  # [..., D, D]

    def marginal(self, entries: Sequence[int]) -> Gaussian:
        """The distribution of some of the D entries, in this order."""
        covariance = take(take(self.covariance, entries, -1), entries, -2)
        return Gaussian(take(self.mean, entries, -1), covariance)


class Image(NamedTuple):
    """Moments of f(x), x a Gaussian.

    The gain S⁻¹ cov(x, f) exists where the covariance S of x is singular, too: it is E[df/dx]ᵀ.
    """

    mean: Tensor  # [..., E]
    covariance: Tensor  # [..., E, E]
    gain: Tensor  # [..., D, E]


class KernelSum(NamedTuple):
    """E functions f_e(x) = o_e + Σ_i β_ei k_e(x, c_ei), each with its own variance.

    k_e(x, c) = s_e² exp(-½ Σ_d (x_d - c_d)² / l_ed²). A Gaussian process is one, with the variance
    s² - kᵀ RᵀR k of k_i = k(x, c_i); an RBF network is one without a variance.
    """

    centres: Tensor  # [E, n, D]
    beta: Tensor  # [E, n]
    inverse_lengthscale: Tensor  # [E, D] 1 / l
    log_signal: Tensor  # [E] log s
    offset: Tensor  # [E]
    root: Tensor | None = None  # [E, m, n] R, or None for functions without a variance
    precision: Tensor | None = None  # [E, n, n] RᵀR


def join(joint: Gaussian, entries: Sequence[int], image: Image) -> Gaussian:
    """The joint distribution of z and f(y), where y are entries of z.

    cov(z, f) = cov(z, y) gain, which is exact if z is Gaussian.

    Args:
        joint: distribution of z, [..., D].
        entries: which of the D entries y are.
        image: moments of f(y).

    Returns:
        [..., D + E], f last.
    """
    cross = take(joint.covariance, entries, -1) @ image.gain  # [..., D, E]
    upper = torch.cat((joint.covariance, cross), -1)
    lower = torch.cat((cross.mT, image.covariance), -1)
    return Gaussian(torch.cat((joint.mean, image.mean), -1), torch.cat((upper, lower), -2))


def take(x: Tensor, entries: Sequence[int], axis: int) -> Tensor:
    """Some of the entries along an axis; consecutive ones without a copy."""
    first, n = entries[0], len(entries)
    if list(entries) == list(range(first, first + n)):
        return x.narrow(axis, first, n)
    return x.index_select(axis, torch.tensor(list(entries), device=x.device))


def symmetric(matrix: Tensor) -> Tensor:
    """(A + Aᵀ) / 2: round-off must not grow over the steps of a prediction."""
    return (matrix + matrix.mT) / 2


def _cholesky(matrix: Tensor) -> Tensor:
    """Lower factor; NaN where there is none, so that a line search steps back from it."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    return torch.where(info[..., None, None] == 0, factor, torch.nan)


# ------------------------------------------------------------------------------------------------
# functions of a Gaussian
# ------------------------------------------------------------------------------------------------


def linear(x: Gaussian, weights: Tensor, bias: Tensor) -> Image:
    """W x + b: mean W m + b, covariance W S Wᵀ, gain Wᵀ.

    Args:
        x: [..., D].
        weights: [E, D] W.
        bias: [E] b.
    """
    gain = weights.mT.expand(*x.mean.shape[:-1], -1, -1)
    mean = (weights @ x.mean.unsqueeze(-1)).squeeze(-1) + bias
    return Image(mean, symmetric(weights @ x.covariance @ weights.mT), gain)


def sine(x: Gaussian) -> Image:
    """Sin of every entry.

    E[sin x_i] = exp(-S_ii/2) sin m_i, gain_ii = exp(-S_ii/2) cos m_i, and with
    e± = exp(-(S_ii + S_jj)/2 ± S_ij), e₀ = exp(-(S_ii + S_jj)/2):
    cov(sin x_i, sin x_j) = ½ [(e₊ - e₀) cos(m_i - m_j) - (e₋ - e₀) cos(m_i + m_j)].
    Deisenroth & Rasmussen 2011, code (gSin.m).

    Args:
        x: [..., D].
    """
    m, s = x
    variance = s.diagonal(dim1=-2, dim2=-1)
    decay = (-variance / 2).exp()
    half = -(variance.unsqueeze(-1) + variance.unsqueeze(-2)) / 2
    # The exponents of a covariance are not positive: nothing overflows, however wide x is.
    alone, plus, minus = half.exp(), (half + s).exp(), (half - s).exp()
    difference = m.unsqueeze(-1) - m.unsqueeze(-2)
    total = m.unsqueeze(-1) + m.unsqueeze(-2)
    covariance = ((plus - alone) * difference.cos() - (minus - alone) * total.cos()) / 2
    return Image(decay * m.sin(), covariance, (decay * m.cos()).diag_embed())


def trigonometry(x: Gaussian) -> Image:
    """Sines of all entries, then their cosines: cos x = sin(x + π/2) makes one identity of both.

    Args:
        x: [..., D] angles.

    Returns:
        Moments of [..., 2 D].
    """
    d = x.mean.shape[-1]
    shifted = torch.cat((x.mean, x.mean + math.pi / 2), -1)
    found = sine(Gaussian(shifted, x.covariance.repeat(*[1] * (x.mean.dim() - 1), 2, 2)))
    return found._replace(gain=found.gain[..., :d, :] + found.gain[..., d:, :])


def saturate(x: Gaussian) -> Image:
    """(9 sin x + sin 3x) / 8 of every entry, a smooth map onto [-1, 1].

    The sines of (x, 3x), weighted and summed. Deisenroth & Rasmussen 2011, code (gSat.m).

    Args:
        x: [..., D].
    """
    m, s = x
    d, batch = m.shape[-1], m.shape[:-1]
    amplitude, frequency = m.new_tensor([9 / 8, 1 / 8]), m.new_tensor([1.0, 3.0])
    times = frequency.repeat_interleave(d)
    weight = amplitude.repeat_interleave(d)
    wide = s.repeat(*[1] * len(batch), 2, 2) * times.outer(times)
    sines = sine(Gaussian(torch.cat((m, 3 * m), -1), wide))
    mean = (weight * sines.mean).view(*batch, 2, d).sum(-2)
    covariance = (weight.outer(weight) * sines.covariance).view(*batch, 2, d, 2, d).sum((-4, -2))
    slope = weight * times * sines.gain.diagonal(dim1=-2, dim2=-1)
    return Image(mean, covariance, slope.view(*batch, 2, d).sum(-2).diag_embed())


def kernel_sum(x: Gaussian, function: KernelSum) -> Image:
    """Prediction of E Gaussian processes (or RBF networks) at an uncertain input, without noise.

    With L = diag(l²), ν_i = c_i - m and q_i = E[k(x, c_i)]:
        q_i = s² |I + S L⁻¹|^-½ exp(-½ ν_iᵀ (S + L)⁻¹ ν_i),  mean = Σ_i β_i q_i + o,
        gain = Σ_i β_i q_i (S + L)⁻¹ ν_i,
        Q_ij = E[k_a(x, c_ai) k_b(x, c_bj)],  covariance_ab = β_aᵀ Q β_b - mean_a mean_b,
        and s² - tr(RᵀR Q_aa) more on the diagonal.
    Deisenroth & Rasmussen 2011, Sec. 2.2, and code (gp0.m, gp2.m).

    Written as Q_ij = q_i q_j exp(δ_ij), where every δ_ij vanishes with S, the covariance is
    Σ_ij β_i q_i β_j q_j (exp(δ_ij) - 1): a narrow input costs it no digits, though the βs are
    large and of both signs. As k ≤ s², Q_ij ≤ s_a² q_j, so q_i / s_a² ≤ exp(-δ_ij): where δ_ij is
    large the term is nothing, and the exponent can be cut off.

    Args:
        x: [..., D].
        function: the E functions; pairs of them, and of their centres, are computed together.
    """
    inverse, log_signal = function.inverse_lengthscale, function.log_signal
    e, d = inverse.shape
    # Pairs (a, b), the diagonal first.
    upper = torch.triu_indices(e, e, 1, device=inverse.device)
    a, b = (torch.cat((torch.arange(e, device=inverse.device), part)) for part in upper)

    # Of each output, then of each pair: (I + D S D)⁻¹ and half its log-determinant, where D is
    # diagonal with D² = L⁻¹ or L_a⁻¹ + L_b⁻¹; and D⁻¹ (I + D S D)⁻¹ D S D D⁻¹, which is
    # G = (S⁻¹ + L⁻¹)⁻¹ or T = (S⁻¹ + L_a⁻¹ + L_b⁻¹)⁻¹.
    square = inverse.square()
    both = (square.index_select(0, a) + square.index_select(0, b)).sqrt()
    diagonal = torch.cat((inverse, both))
    scale = diagonal.unsqueeze(2) * diagonal.unsqueeze(1)  # [E + P, D, D]
    wide = x.covariance.unsqueeze(-3) * scale
    factor = _cholesky(torch.eye(d, dtype=inverse.dtype, device=inverse.device) + wide)
    narrow = torch.cholesky_inverse(factor)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)  # [..., E + P, 1]
    harmonic = symmetric((narrow @ wide) / scale)

    nu = (function.centres - x.mean[..., None, None, :]) * inverse.unsqueeze(1)  # [..., E, n, D]
    near = nu @ narrow[..., :e, :, :]
    log_q = 2 * log_signal.unsqueeze(-1) - log_det[..., :e, :] - (nu * near).sum(-1) / 2
    q = log_q.exp()  # [..., E, n]
    w = function.beta * q
    mean = w.sum(-1)
    gain = (w.unsqueeze(-2) @ near).squeeze(-2) * inverse  # [..., E, D]

    # δ = u_aᵀ T u_b + a term of each + a constant, with u = L⁻¹ν.
    u = nu * inverse.unsqueeze(1)
    own = (u @ harmonic[..., :e, :, :]).mul(u).sum(-1)  # uᵀ G u
    t = harmonic[..., e:, :, :]
    u_a, u_b = u.index_select(-3, a), u.index_select(-3, b)
    left = u_a @ t  # [..., P, n, D]
    constant = log_det.index_select(-2, a) + log_det.index_select(-2, b) - log_det[..., e:, :]
    by_a = ((left * u_a).sum(-1) - own.index_select(-2, a)) / 2 + constant
    by_b = ((u_b @ t).mul(u_b).sum(-1) - own.index_select(-2, b)) / 2
    ones = torch.ones_like(by_a)
    left = torch.cat((left, torch.stack((by_a, ones), -1)), -1)
    right = torch.cat((u_b, torch.stack((ones, by_b), -1)), -1)
    excess = (left @ right.mT).clamp(max=LARGEST_EXPONENT).expm1()  # [..., P, n, n]
    column = excess @ w.index_select(-2, b).unsqueeze(-1)
    pairs = (w.index_select(-2, a) * column.squeeze(-1)).sum(-1)
    place = torch.empty(e, e, dtype=torch.long, device=inverse.device)
    place[a, b] = place[b, a] = torch.arange(len(a), device=inverse.device)
    covariance = pairs.index_select(-1, place.view(-1)).unflatten(-1, (e, e))
    if function.root is not None and function.precision is not None:
        known = (function.root @ q.unsqueeze(-1)).square().sum((-2, -1))
        spread = (function.precision * excess[..., :e, :, :]) @ q.unsqueeze(-1)
        explained = known + (q * spread.squeeze(-1)).sum(-1)
        rest = ((2 * log_signal).exp() - explained).clamp_min(0.0)
        covariance = covariance + rest.diag_embed()
    return Image(mean + function.offset, covariance, gain.mT)


# ------------------------------------------------------------------------------------------------
# cost
# ------------------------------------------------------------------------------------------------


def saturating_cost(x: Gaussian, target: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of c = 1 - exp(-½ (x - t)ᵀ W (x - t)), with W = RᵀR.

    E[(1 - c)^p] = |I + p R S Rᵀ|^-½ exp(-p/2 (m - t)ᵀ Rᵀ (I + p R S Rᵀ)⁻¹ R (m - t)), p = 1, 2.
    Deisenroth & Rasmussen 2011, code (lossSat.m).

    Args:
        x: [..., D]; batches of steps are computed together.
        target: [D] t.
        root: [K, D] R.

    Returns:
        [...] mean and [...] variance.
    """
    error = (x.mean - target) @ root.mT  # [..., K]
    spread = root @ x.covariance @ root.mT
    eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
    log_moments = []
    for power in (1, 2):
        factor = _cholesky(eye + power * spread)
        white = torch.linalg.solve_triangular(factor, error.unsqueeze(-1), upper=False)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_moments.append(-log_det - power / 2 * white.square().sum((-2, -1)))
    first, second = log_moments
    mean = -torch.expm1(first)
    return mean, (second.exp() - (2 * first).exp()).clamp_min(0.0)
