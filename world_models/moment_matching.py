"""Moment matching: Gaussians through functions, by the exact mean and covariance of the output.

Of a Gaussian input the functions here give the first two moments of the output and its covariance
with the input, all in closed form: linear maps, sines and cosines, PILCO's saturation, sums of
squared-exponential kernels (Gaussian processes and RBF networks) and the saturating cost.
`join` puts them together. Source: Deisenroth & Rasmussen 2011 (PILCO), Sec. 2.2 and 2.3, and the
authors' code.

Leading axes [...] of the Gaussians are batches. Everything is float64 and differentiable.
"""

from __future__ import annotations

import functools
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
    return x.index_select(axis, _index(tuple(entries), x.device))


@functools.cache
@torch.inference_mode(False)
def _index(entries: tuple[int, ...], device: torch.device) -> Tensor:
    """Entries as a tensor, made once."""
    return torch.tensor(entries, device=device)


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


class Waves(NamedTuple):
    """Functions f(x) = Cᵀ sin(Bᵀ x + φ)."""

    into: Tensor  # [D, K] B
    phase: Tensor  # [K] φ
    out: Tensor | None = None  # [K, E] C, or None for the sines themselves


def trigonometry(x: Gaussian) -> Image:
    """Sines of all entries, then their cosines: cos x = sin(x + π/2) makes one identity of both.

    Args:
        x: [..., D] angles.

    Returns:
        Moments of [..., 2 D].
    """
    return _waves(x, _trigonometry(x.mean.shape[-1], x.mean.dtype, x.mean.device))


def saturate(x: Gaussian) -> Image:
    """(9 sin x + sin 3x) / 8 of every entry, a smooth map onto [-1, 1].

    The sines of (x, 3x), weighted and summed. Deisenroth & Rasmussen 2011, code (gSat.m).

    Args:
        x: [..., D].
    """
    return _waves(x, _saturation(x.mean.shape[-1], x.mean.dtype, x.mean.device))


def _waves(x: Gaussian, waves: Waves) -> Image:
    """Moments of sines of z = Bᵀ x + φ, and from them those of their sums.

    With the mean m and covariance S of z:
    E[sin z_i] = exp(-S_ii/2) sin m_i, gain_ii = exp(-S_ii/2) cos m_i, and with
    e± = exp(-(S_ii + S_jj)/2 ± S_ij), e₀ = exp(-(S_ii + S_jj)/2):
    cov(sin z_i, sin z_j) = ½ [(e₊ - e₀) cos(m_i - m_j) - (e₋ - e₀) cos(m_i + m_j)].
    Deisenroth & Rasmussen 2011, code (gSin.m).
    """
    m = x.mean @ waves.into + waves.phase
    s = waves.into.mT @ x.covariance @ waves.into
    halves = s.diagonal(dim1=-2, dim2=-1) / 2
    decay = (-halves).exp()
    half = -(halves.unsqueeze(-1) + halves.unsqueeze(-2))
    # The exponents of a covariance are not positive: nothing overflows, however wide x is.
    alone, plus, minus = half.exp(), (half + s).exp(), (half - s).exp()
    column, row = m.unsqueeze(-1), m.unsqueeze(-2)
    covariance = (plus - alone) * (column - row).cos() - (minus - alone) * (column + row).cos()
    gain = waves.into * (decay * m.cos()).unsqueeze(-2)
    mean, out = decay * m.sin(), waves.out
    if out is None:
        return Image(mean, symmetric(covariance / 2), gain)
    return Image(mean @ out, symmetric(out.mT @ (covariance / 2) @ out), gain @ out)


@functools.cache
@torch.inference_mode(False)
def _trigonometry(d: int, dtype: torch.dtype, device: torch.device) -> Waves:
    eye = torch.eye(d, dtype=dtype, device=device)
    phase = torch.cat((eye.new_zeros(d), eye.new_full((d,), math.pi / 2)))
    return Waves(torch.cat((eye, eye), 1), phase)


@functools.cache
@torch.inference_mode(False)
def _saturation(d: int, dtype: torch.dtype, device: torch.device) -> Waves:
    eye = torch.eye(d, dtype=dtype, device=device)
    both = torch.cat((eye, 3 * eye), 1)
    return Waves(both, eye.new_zeros(2 * d), torch.cat((9 * eye, eye)) / 8)


def kernel_sum(x: Gaussian, function: KernelSum, scales: Scales | None = None) -> Image:
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
        scales: `scales_of(function)`, where it is there already.
    """
    return _kernel_sum(x, function, scales)[0]


class Scales(NamedTuple):
    """What `kernel_sum` needs of a function's lengthscales, for E outputs and P pairs of them.

    D is diagonal, with D² = L⁻¹ of an output or L_a⁻¹ + L_b⁻¹ of a pair.
    """

    both: Tensor  # [2 P] a, then b of every pair (a, b); the pairs (a, a) come first
    which_u: Tensor  # [E + 2 P] all outputs, then `both`
    which_matrix: Tensor  # [E + 2 P] all outputs, then all pairs twice
    place: Tensor  # [E E] pair of every entry of a matrix
    ends: Tensor  # [E + P, P] 1 for a and for b, -1 for the pair itself
    eye: Tensor  # [D, D]
    outer: Tensor  # [E + P, D, D] D_i D_j
    ratio: Tensor  # [E + P, D, D] D_j / D_i


def scales_of(function: KernelSum) -> Scales:
    """The part of `kernel_sum` that does not depend on its input; gradients flow."""
    inverse = function.inverse_lengthscale
    e, d = inverse.shape
    rows, columns = torch.triu_indices(e, e, 1).tolist()
    a, b = [*range(e), *rows], [*range(e), *columns]
    pair = {ab: p for p, ab in enumerate(zip(a, b))}
    place = [pair[min(i, j), max(i, j)] for i in range(e) for j in range(e)]
    both = torch.tensor(a + b, device=inverse.device)
    of_pairs = inverse.square().index_select(0, both).view(2, -1, d).sum(0).sqrt()
    diagonal, p = torch.cat((inverse, of_pairs)), len(a)
    ends = torch.zeros(e + p, p, dtype=inverse.dtype)
    for i in range(p):
        ends[a[i], i] += 1
        ends[b[i], i] += 1
        ends[e + i, i] = -1
    which_matrix = [*range(e + p), *range(e, e + p)]
    return Scales(
        both=both,
        which_u=torch.tensor([*range(e), *a, *b], device=inverse.device),
        which_matrix=torch.tensor(which_matrix, device=inverse.device),
        place=torch.tensor(place, device=inverse.device),
        ends=ends.to(inverse.device),
        eye=torch.eye(d, dtype=inverse.dtype, device=inverse.device),
        outer=diagonal.unsqueeze(2) * diagonal.unsqueeze(1),
        ratio=diagonal.unsqueeze(1) / diagonal.unsqueeze(2),
    )


class Terms(NamedTuple):
    """What the derivatives of `kernel_sum` are made of, for E outputs, P pairs and n centres."""

    image: Image | None
    u: Tensor  # [..., E, n, D] L⁻¹ ν
    r: Tensor  # [..., E, n, D] (S + L)⁻¹ ν
    w: Tensor  # [..., E, n] β q
    q: Tensor  # [..., E, n]
    narrow: Tensor  # [..., E + P, D, D] (I + D S D)⁻¹
    pairs: Tensor  # [..., P] Σ_ij w_i w_j (exp(δ_ij) - 1)
    of_b: Tensor  # [..., P, 1 + D, n] Σ_j (exp(δ_ij) - 1) w_j (1, u_j)
    of_a: Tensor  # [..., P, n] Σ_i w_i (exp(δ_ij) - 1)
    known: Tensor | None  # [..., E, 1 + D, n] Σ_j A_ij (exp(δ_ij) - 1) q_j (1, u_j), with A = RᵀR
    is_known: Tensor | None  # [..., E] 1 where the variance is positive, else 0


def _kernel_sum(
    x: Gaussian, function: KernelSum, scales: Scales | None = None, *, keep: bool = False
) -> tuple[Image, Terms | None]:
    """`kernel_sum`, and with `keep` the terms of its derivatives."""
    scales = scales_of(function) if scales is None else scales
    both, eye = scales.both, scales.eye
    inverse, log_signal = function.inverse_lengthscale, function.log_signal
    e, p = len(inverse), len(both) // 2
    a, b = both[:p], both[p:]

    # Of each output, then of each pair: (I + D S D)⁻¹ and half its log-determinant; and
    # D⁻¹ (I + D S D)⁻¹ D S, which is G = (S⁻¹ + L⁻¹)⁻¹ or T = (S⁻¹ + L_a⁻¹ + L_b⁻¹)⁻¹.
    covariance = x.covariance.unsqueeze(-3)
    factor, info = torch.linalg.cholesky_ex(torch.addcmul(eye, covariance, scales.outer))
    narrow = torch.cholesky_inverse(factor)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)  # [..., E + P]
    # NaN where there is none, so that a line search steps back from it.
    log_det = log_det.masked_fill(info != 0, torch.nan)
    harmonic = (narrow * scales.ratio) @ covariance

    nu = (function.centres - x.mean[..., None, None, :]) * inverse.unsqueeze(1)  # [..., E, n, D]
    near = nu @ narrow[..., :e, :, :]
    log_q = (2 * log_signal - log_det[..., :e]).unsqueeze(-1) - (nu * near).sum(-1) / 2
    q = log_q.exp()  # [..., E, n]
    w = function.beta * q
    mean = w.sum(-1)
    gain = (w.unsqueeze(-2) @ near).squeeze(-2) * inverse  # [..., E, D]

    # δ = u_aᵀ T u_b + a term of each + a constant, with u = L⁻¹ν.
    u = nu * inverse.unsqueeze(1)
    us = u.index_select(-3, scales.which_u)  # [..., E + 2 P, n, D]: of all outputs, as and bs
    moved = us @ harmonic.index_select(-3, scales.which_matrix)
    square = (moved * us).sum(-1)  # uᵀ G u, then u_aᵀ T u_a and u_bᵀ T u_b
    terms = (square[..., e:, :] - square.index_select(-2, both)) / 2
    constant = log_det @ scales.ends  # [..., P]
    by_a = (terms[..., :p, :] + constant.unsqueeze(-1)).unsqueeze(-1)
    by_b, ones = terms[..., p:, :].unsqueeze(-1), torch.ones_like(by_a)
    u_b = us[..., e + p :, :, :]
    left = torch.cat((moved[..., e : e + p, :, :], by_a, ones), -1)
    right = torch.cat((u_b, ones, by_b), -1)
    exponent = left @ right.mT  # [..., P, n, n]
    if exponent.requires_grad:
        excess = exponent.clamp(max=LARGEST_EXPONENT).expm1()
    else:
        excess = exponent.clamp_(max=LARGEST_EXPONENT).expm1_()

    # Sums as rows times matrices, which is the faster order.
    w_a, w_b = w.index_select(-2, a), w.index_select(-2, b)
    of_a = (w_a.unsqueeze(-2) @ excess).squeeze(-2)
    pairs = (of_a * w_b).sum(-1)
    matrix = pairs.index_select(-1, scales.place).unflatten(-1, (e, e))
    known = is_known = None
    if function.root is not None and function.precision is not None:
        weights = q.unsqueeze(-2)
        explained = (weights @ function.root.mT).square().sum((-2, -1))
        weights = torch.cat((weights, weights * u.mT), -2) if keep else weights
        known = weights @ (function.precision * excess[..., :e, :, :])
        explained = explained + (q * known[..., 0, :]).sum(-1)
        rest = ((2 * log_signal).exp() - explained).clamp_min(0.0)
        is_known = (rest > 0).to(rest)
        matrix = matrix + rest.diag_embed()
    image = Image(mean + function.offset, matrix, gain.mT)
    if not keep:
        return image, None
    rows = w_b.unsqueeze(-2)
    of_b = torch.cat((rows, rows * u_b.mT), -2) @ excess.mT
    r = near * inverse.unsqueeze(1)
    return image, Terms(image, u, r, w, q, narrow, pairs, of_b, of_a, known, is_known)


class KernelSteps:
    """`kernel_sum` of one function, step by step; then its derivatives, for all steps together.

    What does not depend on the input is made once, and the derivatives need nothing of the size
    n x n any more: sums over one of the points are kept, sums over both are taken from them.

    Args:
        function: the E functions.
        keep: remember every call for `together`.
    """

    def __init__(self, function: KernelSum, *, keep: bool) -> None:
        self.function, self.scales, self.keep = function, scales_of(function), keep
        self.terms: list[Terms] = []

    @torch.no_grad()
    def __call__(self, x: Gaussian) -> Image:
        """`kernel_sum` at [D], without gradients."""
        image, terms = _kernel_sum(x, self.function, self.scales, keep=self.keep)
        if terms is not None:
            self.terms.append(terms)
        return image

    def together(self, x: Gaussian) -> Image:
        """The images of all calls, with their derivatives; gradients flow to x alone.

        Args:
            x: [H, D] the inputs of the H calls.
        """
        image = Image(*map(torch.stack, zip(*(terms.image for terms in self.terms))))
        with torch.no_grad():
            jacobian = kernel_sum_jacobian(_stack(self.terms), self.function, self.scales)
        # Zero, but for its derivative.
        moved = torch.cat((x.mean, x.covariance.flatten(-2)), -1)
        change = (jacobian @ (moved - moved.detach()).unsqueeze(-1)).squeeze(-1)
        e, d = image.mean.shape[-1], x.mean.shape[-1]
        mean, covariance, gain = change.split((e, e * e, d * e), -1)
        return Image(
            image.mean + mean,
            image.covariance + covariance.unflatten(-1, (e, e)),
            image.gain + gain.unflatten(-1, (d, e)),
        )


def _stack(terms: Sequence[Terms]) -> Terms:
    """The terms of several inputs as those of a batch, without the images."""
    parts = list(zip(*terms))[1:]
    stacked = (None if part[0] is None else torch.stack(part) for part in parts)
    return Terms(None, *stacked)  # type: ignore[arg-type]


def kernel_sum_jacobian(terms: Terms, function: KernelSum, scales: Scales) -> Tensor:
    """Derivatives of `kernel_sum` by mean m and covariance S of its input.

    From ∂E[f]/∂m = E[∂f/∂x] and ∂E[f]/∂S = ½ E[∂²f/∂x²] (Price's theorem):
    with r_i = (S + L)⁻¹ ν_i and H = (S + L)⁻¹,
        ∂q_i/∂m = q_i r_i,  ∂q_i/∂S = ½ q_i (r_i r_iᵀ - H),
        ∂Q_ij/∂m = Q_ij ρ_ij,  ∂Q_ij/∂S = ½ Q_ij (ρ_ij ρ_ijᵀ - H_ab),
        ρ_ij = Kᵀ (u_ai + u_bj),  K = D⁻¹ (I + D S D)⁻¹ D,  H_ab = D (I + D S D)⁻¹ D,
    and the gain is ∂mean/∂m.

    Args:
        terms: of the inputs.
        function: the E functions.
        scales: `scales_of(function)`.

    Returns:
        [..., E + E E + D E, D + D D]: rows are the entries of mean, covariance and gain, columns
        those of m and S.
    """
    e, p = len(function.inverse_lengthscale), len(scales.both) // 2
    a, b = scales.both[:p], scales.both[p:]
    _, u, r, w, q, narrow, pairs, of_b, of_a, known, is_known = terms
    d = u.shape[-1]
    wide, k = narrow * scales.outer, (narrow * scales.ratio)[..., e:, :, :]
    h, h_ab = wide[..., :e, :, :], wide[..., e:, :, :]

    w_r = w.unsqueeze(-1) * r
    sums, gain = w.sum(-1), w_r.sum(-2)  # [..., E], [..., E, D]
    of_mean = (w_r.mT @ r - sums[..., None, None] * h) / 2
    cubes = torch.stack([(w_r * r[..., i : i + 1]).mT @ r for i in range(d)], -3)
    mixed = h.unsqueeze(-1) * gain[..., None, None, :]
    of_gain = (cubes - gain[..., None, None] * h.unsqueeze(-3) - mixed - mixed.mT) / 2

    # Sums of the weights Q_ij β_i β_j over j, over i and over both, and with u_i and u_j.
    w_a, w_b, u_a, u_b = (x.index_select(x.dim() + axis, at) for x, axis, at in
                          ((w, -2, a), (w, -2, b), (u, -3, a), (u, -3, b)))  # fmt: skip
    m_a, m_b = sums.index_select(-1, a), sums.index_select(-1, b)
    w_u = (w.unsqueeze(-1) * u).sum(-2)
    rows = w_a * (of_b[..., 0, :] + m_b.unsqueeze(-1))
    columns = w_b * (of_a + m_a.unsqueeze(-1))
    total = pairs + m_a * m_b
    cross = (w_a.unsqueeze(-1) * u_a).mT @ of_b[..., 1:, :].mT
    cross = cross + w_u.index_select(-2, a).unsqueeze(-1) * w_u.index_select(-2, b).unsqueeze(-2)
    if known is not None and is_known is not None and function.precision is not None:
        # Less the same sums of Q_ij A_ij, on the diagonal.
        q_u = torch.cat((q.unsqueeze(-1), q.unsqueeze(-1) * u), -1)
        inner = known.mT + torch.einsum("eij,...ejk->...eik", function.precision, q_u)
        inner = inner * is_known[..., None, None]
        explained = q * inner[..., 0]
        rows, columns, total = rows.clone(), columns.clone(), total.clone()
        rows[..., :e, :] -= explained
        columns[..., :e, :] -= explained
        total[..., :e] -= explained.sum(-1)
        cross[..., :e, :, :] -= q_u[..., 1:].mT @ inner[..., 1:]
    first = ((rows.unsqueeze(-2) @ u_a) + (columns.unsqueeze(-2) @ u_b)) @ k  # [..., P, 1, D]
    second = u_a.mT @ (rows.unsqueeze(-1) * u_a) + u_b.mT @ (columns.unsqueeze(-1) * u_b)
    second = k.mT @ (second + cross + cross.mT) @ k - total[..., None, None] * h_ab
    # Less the derivatives of mean_a mean_b.
    by_a, by_b = m_b.unsqueeze(-1), m_a.unsqueeze(-1)
    first = first.squeeze(-2) - by_a * gain.index_select(-2, a) - by_b * gain.index_select(-2, b)
    by_a, by_b = by_a.unsqueeze(-1), by_b.unsqueeze(-1)
    second = second / 2 - by_a * of_mean.index_select(-3, a) - by_b * of_mean.index_select(-3, b)

    of_pairs = torch.cat((first, second.flatten(-2)), -1).index_select(-2, scales.place)
    by_mean = torch.cat((gain, of_mean.flatten(-2)), -1)
    by_gain = torch.cat((2 * of_mean, of_gain.flatten(-2)), -1).transpose(-3, -2).flatten(-3, -2)
    return torch.cat((by_mean, of_pairs, by_gain), -2)


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
