"""Batched exact Gaussian processes: one per output, shared inputs, float64.

The posterior (with its Jacobian) and the fit of the hyper-parameters. What the outputs mean (state
differences, rewards) is defined in gp_dynamics.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from totalprop.world_models.moment_matching import KernelSum

# Curb on the hyper-parameters: no lengthscale above 100 standard deviations of the input, no
# signal-to-noise ratio above 1000. The power makes the penalty a soft wall. Source: hypCurb.m in
# Deisenroth's PILCO code.
LENGTHSCALE_CURB, SNR_CURB, CURB_POWER = math.log(100.0), math.log(1000.0), 30
# Points along similar trajectories are redundant: some of them, the support, carry the information
# of all. Given the support, the prior variance of every other point is below
# SUPPORT_TOLERANCE σ_n² / n. From SUPPORT_POINTS points on, the posterior is computed from the
# support alone. Let ε be the tolerance, d(x) the prior variance at x given the support, and v(x)
# the posterior variance. Whichever points are the support, the variance then changes by at most
# 2 √(ε d v) + ε d and the mean by at most |β| σ_n √(ε d). At the data d < ε σ_n² / n, so the
# variance changes by less than 2 ε / √n of the predictive variance σ_f² + σ_n²
# (tests/world_models/test_gp.py). The choice of the support depends on the order of the data and
# on round-off: where the model knows little, two CPUs may differ by as much as the bound.
SUPPORT_TOLERANCE, SUPPORT_POINTS = 1e-3, 150
# With little noise the posterior variance is far below the signal's, and s² - k*ᵀK⁻¹k* loses its
# digits to the round-off of K⁻¹. Above this signal-to-noise ratio a root R of K⁻¹ = RᵀR keeps them
# (the error is below 1e-4 of the predictive variance at a ratio of 3000), at twice the cost.
ROOT_SNR = 100.0
# A value this many times further from the median than the other values range ruins a fit. (One of
# 60 points on [-3, 3]: at 50 times the test error is that without it, at 170 it is 6 times that.)
OUTLIER = 100.0
# Relative rounding of values of these types, with a margin; constants wobble by it.
ROUNDING = {dtype: 8 * float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64)}
LARGEST_LOG = 300.0  # of a hyper-parameter: the square of its exponential is finite, and not zero
# In deviations. In one random episode of the cart-pole the differences of the cart's position reach
# 4; a zero prior mean is no worse than theirs up to 70, and doubles the noise at 700.
LARGE_OFFSET = 10.0
Kernel = Literal["rbf", "rbf+linear"]
NO_DATA = "the GP has no data; call set_data (and fit) first"
JITTERS = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)  # relative to the signal variance, tried in this order


class Posterior(NamedTuple):
    """Marginal posterior of the latent functions at N points, observation noise not included."""

    mean: Tensor  # [N, E]
    variance: Tensor  # [N, E]
    mean_jacobian: Tensor  # [N, E, D] d mean / d input, detached
    variance_jacobian: Tensor  # [N, E, D] d variance / d input, detached


class Plane(NamedTuple):
    """What the linear part of the kernel "rbf+linear" adds to the posterior."""

    variance: Tensor  # [E, D, 1] a² of the prior slopes
    slopes: Tensor  # [E, n, D] a² (X - centre)
    mean: Tensor  # [E, D, 1] slope of the posterior mean, Σ_i β_i a² (X_i - centre)


class GaussianProcess(nn.Module):
    """E independent Gaussian processes over the same D inputs.

    k(x, x') = s² exp(-½ Σ_d (x_d - x'_d)² / l_d²), Gaussian noise of deviation σ_n.
    Source: Rasmussen & Williams 2006, Ch. 2 and 5; Parmas et al. 2018, Sec. 2.4.1 (whose kernel is
    written without the ½).

    The kernel "rbf+linear" adds Σ_d a_d² (x_d - m_d) (x'_d - m_d), m the mean of the data: a plane,
    whose slopes have the prior deviations a, so that far from the data the mean goes on along it.
    Amadio et al. 2022 (MC-PILCO) add a polynomial of degree 1 or 2.

    Its buffers are float64. A state dict with any number of data points loads.

    Args:
        n_inputs: inputs D.
        n_outputs: outputs E.
        prior_mean: "data" is the targets' mean, which makes the model indifferent to their offset.
            "zero" is the model of PILCO; an output whose targets' mean is more than LARGE_OFFSET
            deviations takes that mean all the same, as the signal, and with it the curb on the
            noise, would otherwise grow with the offset.
        kernel: "rbf" or "rbf+linear".
        rounding: relative; an input whose deviation is less than this times its mean is constant.
            The default is for inputs that were float32.

    Attributes:
        inputs: [n, D] data.
        targets: [n, E] data.
        log_lengthscale: [E, D] log l.
        log_signal: [E] log s, of a deviation, not a variance.
        log_noise: [E] log σ_n, of a deviation, not a variance.
        log_slope: [E, D] log a, with "rbf+linear" alone.
        jitter: relative to the signal variance, what the last factorisation needed on its diagonal;
            0 if the data and noise are well-behaved.
    """

    GROWING_BUFFERS = ("inputs", "targets")
    inputs: Tensor
    targets: Tensor
    log_lengthscale: Tensor
    log_signal: Tensor
    log_noise: Tensor
    log_slope: Tensor
    has_fit: Tensor

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        *,
        prior_mean: Literal["zero", "data"] = "zero",
        kernel: Kernel = "rbf",
        rounding: float = ROUNDING[np.float32],
    ) -> None:
        super().__init__()
        d, e, dtype = n_inputs, n_outputs, torch.float64
        self.prior_mean, self.rounding = prior_mean, rounding
        self.register_buffer("inputs", torch.zeros(0, d, dtype=dtype))
        self.register_buffer("targets", torch.zeros(0, e, dtype=dtype))
        self.register_buffer("log_lengthscale", torch.zeros(e, d, dtype=dtype))
        self.register_buffer("log_signal", torch.zeros(e, dtype=dtype))
        self.register_buffer("log_noise", torch.full((e,), math.log(0.1), dtype=dtype))
        if kernel == "rbf+linear":
            self.register_buffer("log_slope", torch.zeros(e, d, dtype=dtype))
        self.register_buffer("has_fit", torch.tensor(False))
        self._made_of: list[tuple[Tensor, int]] = []  # buffers and their versions
        self._factors: tuple[Any, ...] | None = None
        self._kernel_sum: KernelSum | None = None
        self._prior = torch.zeros(e, dtype=dtype)  # the offset that the factors were made with
        self.jitter = 0.0

    @property
    def slope_variance(self) -> Tensor | None:
        """[E, D] a², or None of the kernel "rbf"."""
        log_slope = self._buffers.get("log_slope")
        return None if log_slope is None else (2 * log_slope).exp()

    @property
    def noise(self) -> Tensor:
        """[E] deviation of the observation noise, in the targets' units."""
        return self.log_noise.exp()

    @property
    def is_fitted(self) -> bool:
        """Whether hyper-parameters have been chosen."""
        return bool(self.has_fit)

    @property
    def offset(self) -> Tensor:
        """[E] prior mean, see `prior_mean` above."""
        mean = self.targets.mean(0)
        if self.prior_mean == "data":
            return mean
        is_large = mean.abs() > LARGE_OFFSET * self.targets.std(0, correction=0)
        return torch.where(is_large, mean, torch.zeros_like(mean))

    def add_data(self, inputs: Tensor, targets: Tensor, *, keep: int = 0) -> None:
        """Append data; the posterior uses them at once, the hyper-parameters at the next `fit`.

        Args:
            inputs: [n, D].
            targets: [n, E].
            keep: number of newest points to keep; 0 for all.

        Raises:
            ValueError: a value is not finite, or a shape is another one.
        """
        self._check_data(inputs, targets)
        inputs, targets = torch.cat((self.inputs, inputs)), torch.cat((self.targets, targets))
        self.set_data(inputs[-keep:], targets[-keep:])

    def set_data(self, inputs: Tensor, targets: Tensor) -> None:
        """Replace the data.

        Args:
            inputs: [n, D].
            targets: [n, E].

        Raises:
            ValueError: a value is not finite, or a shape is another one.
        """
        self._check_data(inputs, targets)
        self.inputs = inputs.detach().to(self.inputs)
        self.targets = targets.detach().to(self.targets)

    def _check_data(self, inputs: Tensor, targets: Tensor) -> None:
        d, e = self.inputs.shape[1], self.targets.shape[1]
        n = len(inputs) if inputs.ndim else 0
        if inputs.shape != (n, d) or targets.shape != (n, e):
            raise ValueError(
                f"GP data are inputs [n, {d}] and targets [n, {e}], got {list(inputs.shape)} and "
                f"{list(targets.shape)}; targets [n] of one output need unsqueeze(-1)"
            )
        if not (torch.isfinite(inputs).all() and torch.isfinite(targets).all()):
            raise ValueError("GP data hold a NaN or infinity; check the environment's observations")

    def fit(self, *, max_evaluations: int = 200) -> Tensor:
        """Choose the hyper-parameters by L-BFGS on the penalised marginal likelihood, per output.

        The first call starts from l = std(inputs), s = std(targets), σ_n = s / 10, and a = s / l.
        Later calls start from the previous optimum (PILCO's train.m).

        Args:
            max_evaluations: likelihood evaluations per output.

        Returns:
            [E] negative log marginal likelihood per data point at the optimum (without penalty).

        Raises:
            RuntimeError: there is no data yet.
        """
        if not len(self.inputs):
            raise RuntimeError(NO_DATA)
        input_std = positive_std(self.inputs, self.rounding)
        if not self.is_fitted:
            target_std = positive_std(self.targets, ROUNDING[np.float64])
            self.log_lengthscale.copy_(input_std.log().expand_as(self.log_lengthscale))
            self.log_signal.copy_(target_std.log())
            self.log_noise.copy_((target_std / 10).log())
            if self.slope_variance is not None:
                self.log_slope.copy_(self.log_signal.unsqueeze(1) - self.log_lengthscale)
            self.has_fit.fill_(True)
        losses = []
        # SciPy calls NumPy's BLAS between our evaluations. On few cores its threads and PyTorch's
        # wait for each other, milliseconds each time; one thread is several times faster.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for e in range(self.targets.shape[1]):
                loss = _fit_output(self, e, input_std.log(), max_evaluations)
                losses.append(loss / len(self.inputs))
        finally:
            torch.set_num_threads(threads)
        return torch.tensor(losses, dtype=torch.float64)

    def posterior(self, x: Tensor) -> Posterior:
        """Posterior mean and variance at x, differentiable (once) in x.

        Args:
            x: [N, D] float64; gradients flow.

        Raises:
            RuntimeError: there is no data yet, or a kernel matrix cannot be factorised.
        """
        self._renew()
        if self._factors is None:
            with torch.inference_mode(False):
                self._factors = _factorise(self)
        mean, *others = _PosteriorMoments.apply(x, *self._factors)
        return Posterior(mean + self._prior, *others)

    def kernel_sum(self) -> KernelSum:
        """The posterior in the form that `moment_matching.kernel_sum` takes.

        From SUPPORT_POINTS points on, its centres are the support alone.

        Raises:
            RuntimeError: there is no data yet, or a kernel matrix cannot be factorised.
            ValueError: the kernel is not "rbf", whose moments alone are known.
        """
        if self.slope_variance is not None:
            raise ValueError("moment matching needs kernel='rbf', got 'rbf+linear'; take particles")
        self._renew()
        if self._kernel_sum is None:
            with torch.inference_mode(False):
                self._kernel_sum = self._made_kernel_sum()
        return self._kernel_sum

    def _made_kernel_sum(self) -> KernelSum:
        _, supports = _supports(self, as_root=True)
        root = _padded([support.precision for support in supports])
        return KernelSum(
            centres=_padded([self.inputs[support.points] for support in supports]),
            beta=_padded([support.beta for support in supports]).squeeze(-1),
            inverse_lengthscale=(-self.log_lengthscale).exp(),
            log_signal=self.log_signal.clone(),
            offset=self._prior,
            root=root,
            precision=root.mT @ root,
        )

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Check that a state dict whose shapes fit has a meaning, too.

        Raises:
            ValueError: a fit has no data, or a hyper-parameter is out of range.
        """
        if state["has_fit"] and not len(state["inputs"]):
            raise ValueError("it has hyper-parameters of a fit and no data")
        for name in [name for name in state if name.startswith("log_")]:
            largest = state[name].abs().amax()
            if largest > LARGEST_LOG:
                raise ValueError(
                    f"its '{name}' reaches {largest:.3g} in size, at most {LARGEST_LOG:g} can be "
                    "computed with"
                )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("inputs", "targets"):  # data of any length load
            if prefix + name in state_dict:
                # On the model's device: the file's tensors are on the CPU.
                found = getattr(self, name).new_empty(state_dict[prefix + name].shape)
                setattr(self, name, found)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _renew(self) -> None:
        """Forget what was computed from other data or hyper-parameters than today's."""
        buffers = [(b, 0 if b.is_inference() else b._version) for b in self.buffers()]
        same = len(buffers) == len(self._made_of) and all(
            b is made_of and version == then
            for (b, version), (made_of, then) in zip(buffers, self._made_of)
        )
        if not same:
            self._made_of, self._factors, self._kernel_sum = buffers, None, None


class _PosteriorMoments(torch.autograd.Function):
    """Mean, variance and their Jacobians in one pass: the backward is two small products.

    With k* = K(x, X), both the variance s² - k*ᵀK⁻¹k* and its gradient -2 wᵀ dk*/dx need only
    w = K⁻¹k*: one [N, n] x [n, n] product per output, and none in the backward. Where the variance
    would be lost to round-off it is computed as s² - |Rk*|², with w = RᵀRk*.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        centre: Tensor,  # [D, 1] mean of the data; large offsets would cost digits
        inverse_lengthscale: Tensor,  # [E, D, 1]
        features: Tensor,  # [E, n, D + 2] (X/l, 1, log s² - ½|X/l|²)
        weighted: Tensor,  # [E, D + 1, n] β (X/l, 1)
        plain: Tensor,  # [E, D + 1, n] (X/l, 1)
        precision: Tensor,  # [E, n, n] (K + σ_n² I)⁻¹, or its counterpart on the support
        is_root: bool,  # `precision` is R, with RᵀR the above
        signal_variance: Tensor,  # [E, 1]
        plane: Plane | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Points last: the products with few rows are then twice as fast as with few columns.
        d, e = x.shape[1], len(features)
        offset = x.T - centre  # [D, N]
        scaled = offset * inverse_lengthscale  # [E, D, N]
        half_norm = scaled.square().sum(1, keepdim=True).mul_(-0.5)
        right = torch.cat((scaled, half_norm, torch.ones_like(half_norm)), 1)
        k = torch.bmm(features, right).exp_()  # [E, n, N]
        mean_sums = torch.bmm(weighted, k)  # [E, D + 1, N]
        whitened = torch.bmm(precision, k if plane is None else k + plane.slopes @ offset)
        w = torch.bmm(precision.mT, whitened) if is_root else whitened
        pull = None if plane is None else plane.slopes.mT @ w  # [E, D, N] of w, before k enters it
        variance_sums = torch.bmm(plain, w.mul_(k))  # of k* K⁻¹k*, elementwise
        mean, explained = mean_sums[:, d:], variance_sums[:, d:]  # [E, 1, N]
        mean_jacobian = mean_sums[:, :d] - scaled * mean
        variance_jacobian = (scaled * explained - variance_sums[:, :d]) * 2
        if is_root:
            explained = whitened.square().sum(1, keepdim=True)
        jacobian = torch.stack((mean_jacobian, variance_jacobian))  # [2, E, D, N]
        jacobian *= inverse_lengthscale
        prior = signal_variance
        if plane is not None and pull is not None:
            mean = mean + (plane.mean * offset).sum(1, keepdim=True)
            prior = prior + (plane.variance * offset.square()).sum(1)
            if not is_root:
                explained = explained + (pull * offset).sum(1, keepdim=True)
            jacobian[0] += plane.mean
            jacobian[1] += 2 * (plane.variance * offset - pull)
        variance = (prior - explained.squeeze(1)).clamp_min_(0.0)
        ctx.save_for_backward(jacobian)
        parts = jacobian.permute(0, 3, 1, 2)  # [2, N, E, D]
        outputs = mean.reshape(e, -1).T, variance.T, parts[0], parts[1]
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (jacobian,) = ctx.saved_tensors
        cotangent = torch.stack((grads[0].T, grads[1].T)).unsqueeze(2)  # [2, E, 1, N]
        return ((cotangent * jacobian).sum((0, 1)).T, *(None,) * 9)


def positive_std(x: Tensor, rounding: float) -> Tensor:
    """[D] deviation of each column; 1 where it is constant up to its relative rounding."""
    std = x.std(0, correction=0)
    return torch.where(std > rounding * x.mean(0).abs(), std, torch.ones_like(std))


def outlier(column: Tensor) -> tuple[float, float, float] | None:
    """The value of a column [n] that ruins a fit, and between which values 95 % lie; or None.

    A column that hardly ever changes has no outliers: its few values are all that is known of it.
    """
    if len(column) < 3:
        return None
    distance = (column - column.median()).abs()
    order = distance.argsort()
    others = column[order[: -max(1, len(column) // 20)]]
    low, high = float(others.min()), float(others.max())
    is_far = float(distance[order[-1]]) > OUTLIER * (high - low) > 0
    return (float(column[order[-1]]), low, high) if is_far else None


def _log_kernel(scaled: Tensor, log_signal: Tensor) -> Tensor:
    """[n, n] log k from inputs already divided by the lengthscales, exactly symmetric."""
    norm = scaled.square().sum(-1)
    inner = scaled @ scaled.T
    square_distance = (norm[:, None] + norm - inner - inner.T).clamp_min_(0.0)
    return 2 * log_signal - 0.5 * square_distance


def _cholesky(k: Tensor, noise_variance: Tensor, signal_variance: Tensor) -> tuple[Tensor, float]:
    """Lower factor of K + σ_n² I, and the smallest relative jitter with which it exists."""
    for jitter in JITTERS:
        a = k.clone()
        a.diagonal().add_(noise_variance + jitter * signal_variance)
        factor, info = torch.linalg.cholesky_ex(a)
        if info == 0:
            return factor, jitter
    raise RuntimeError(
        f"kernel matrix of {len(k)} points is not positive definite even with a relative jitter of "
        f"{JITTERS[-1]:g}; the data hold (near) duplicates with no noise: add observation noise"
    )


def _supports(gp: GaussianProcess, *, as_root: bool) -> tuple[Tensor, list[Support]]:
    """Inputs [E, n, D] about their mean in lengthscales, and the support of each output."""
    if len(gp.inputs) == 0:
        raise RuntimeError(NO_DATA)
    scaled = (gp.inputs - gp.inputs.mean(0)) * (-gp.log_lengthscale).exp().unsqueeze(1)
    supports = []
    gp.jitter, gp._prior = 0.0, gp.offset
    targets = gp.targets - gp._prior
    for e in range(gp.targets.shape[1]):
        k = _log_kernel(scaled[e], gp.log_signal[e]).exp()
        if gp.slope_variance is not None:
            offset = gp.inputs - gp.inputs.mean(0)
            k = k + (offset * gp.slope_variance[e]) @ offset.T
        noise_variance = (2 * gp.log_noise[e]).exp()
        factor, jitter = _cholesky(k, noise_variance, (2 * gp.log_signal[e]).exp())
        gp.jitter = max(gp.jitter, jitter)
        beta = torch.cholesky_solve(targets[:, e, None], factor)
        supports.append(_support(k, noise_variance, factor, beta, as_root=as_root))
    return scaled, supports


def _factorise(gp: GaussianProcess) -> tuple[Any, ...]:
    """The arguments of `_PosteriorMoments` that do not depend on x."""
    is_root = bool((gp.log_signal - gp.log_noise).amax() > math.log(ROOT_SNR))
    scaled, supports = _supports(gp, as_root=is_root)
    inverse_lengthscale = (-gp.log_lengthscale).exp().unsqueeze(1)  # [E, 1, D]
    centre = gp.inputs.mean(0)
    # The supports of the outputs differ in size; rows of zeros contribute nothing.
    scaled = _padded([points[s.points] for points, s in zip(scaled, supports)])
    is_point = _padded([torch.ones_like(s.beta) for s in supports])
    plain = torch.cat((scaled, is_point), -1)  # [E, n, D + 1]
    bias = 2 * gp.log_signal[:, None, None] - 0.5 * scaled.square().sum(-1, keepdim=True)
    beta = _padded([s.beta for s in supports])
    variance, plane = gp.slope_variance, None
    if variance is not None:
        offset = gp.inputs - centre
        slopes = _padded([offset[s.points] * a for s, a in zip(supports, variance)])
        plane = Plane(variance.unsqueeze(2), slopes, (slopes * beta).sum(1).unsqueeze(2))
    return (
        centre.unsqueeze(1),
        inverse_lengthscale.mT,
        torch.cat((scaled, torch.ones_like(is_point), bias), -1),
        (plain * beta).mT.contiguous(),
        plain.mT.contiguous(),
        _padded([s.precision for s in supports]),
        is_root,
        (2 * gp.log_signal).exp().unsqueeze(1),
        plane,
    )


class Support(NamedTuple):
    """The data points that the posterior of one output is computed from."""

    points: Tensor | slice  # [r]
    precision: Tensor  # [r, r] A, with kᵀ A k the explained variance at x, k = K(X_r, x)
    beta: Tensor  # [r, 1] the mean at x is kᵀ β


def _support(
    k: Tensor, noise_variance: Tensor, factor: Tensor, beta: Tensor, *, as_root: bool
) -> Support:
    """The support of a kernel matrix k [n, n].

    The points are the pivots of a Cholesky factorisation K ≈ V Vᵀ, and K(X, x) ≈ W K(X_r, x) with
    W = K_nr K_rr⁻¹. The error at x and X_j is at most the geometric mean of their variances given
    the support, of which that of X_j is below the tolerance. Then A = Wᵀ (K + σ_n² I)⁻¹ W, and
    β_r = Wᵀ β.

    Args:
        k: [n, n] kernel matrix K.
        noise_variance: [] σ_n².
        factor: [n, n] lower Cholesky factor of K + σ_n² I.
        beta: [n, 1] (K + σ_n² I)⁻¹ y.
        as_root: return R in place of A = RᵀR.
    """
    n = len(k)
    if n < SUPPORT_POINTS:
        eye = torch.eye(n, dtype=k.dtype, device=k.device)
        root = torch.linalg.solve_triangular(factor, eye, upper=False)
        return Support(slice(None), root if as_root else root.T @ root, beta)
    round_off = n * torch.finfo(k.dtype).eps * k.diagonal().amax()
    tolerance = float((SUPPORT_TOLERANCE * noise_variance / n).clamp_min(round_off))
    from scipy.linalg.lapack import dpstrf  # here: a help text needs no SciPy

    pivoted, order, rank, _ = dpstrf(k.cpu().numpy(), tol=tolerance, lower=1)
    lower = torch.from_numpy(pivoted[:, :rank]).tril()
    w = torch.linalg.solve_triangular(lower[:rank], lower, upper=False, left=False).to(k)
    points = torch.from_numpy(order - 1).long().to(k.device)
    w = torch.empty_like(w).index_copy_(0, points, w)
    root = torch.linalg.qr(torch.linalg.solve_triangular(factor, w, upper=False), mode="r")[1]
    return Support(points[:rank], root if as_root else root.T @ root, w.T @ beta)


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Stack tensors of different sizes, [E, r, ...] with r the largest, padded with zeros."""
    sizes = [max(size) for size in zip(*(part.shape for part in parts))]
    whole = parts[0].new_zeros(len(parts), *sizes)
    for row, part in zip(whole, parts):
        row[tuple(map(slice, part.shape))] = part
    return whole


def negative_log_likelihood(
    theta: Tensor, inputs: Tensor, target: Tensor, log_input_std: Tensor | None = None
) -> tuple[float, Tensor]:
    """Penalised negative log marginal likelihood of one output, and its gradient.

    ½ yᵀβ + Σ log L_ii + ½ n log 2π, plus PILCO's curbs
    Σ_d ((log l_d - log std x_d) / log 100)³⁰ + ((log s - log σ_n) / log 1000)³⁰ (hypCurb.m).

    Args:
        theta: [D + 2] (log l, log s, log σ_n), or [2 D + 2] with log a, of the plane, behind.
        inputs: [n, D].
        target: [n].
        log_input_std: [D] log std x_d; None leaves the curbs out.

    Returns:
        The value, and its gradient, of theta's shape: ½ tr((K⁻¹ - ββᵀ) dK/dθ) with
        Σ_ij W_ij (x_i - x_j)² written as products of W with the inputs.
    """
    d = inputs.shape[1]
    scaled = (inputs - inputs.mean(0)) * (-theta[:d]).exp()
    noise_variance = (2 * theta[d + 1]).exp()
    k = _log_kernel(scaled, theta[d]).exp()
    planes = (inputs - inputs.mean(0)) * theta[d + 2 :].exp() if len(theta) > d + 2 else None
    whole = k if planes is None else k + planes @ planes.T
    factor, _ = _cholesky(whole, noise_variance, (2 * theta[d]).exp())
    beta = torch.cholesky_solve(target[:, None], factor)
    value = 0.5 * (target @ beta).squeeze() + factor.diagonal().log().sum()
    value += 0.5 * len(target) * math.log(2 * math.pi)
    residual = torch.cholesky_inverse(factor) - beta @ beta.T
    w = residual * k
    row_sums = w.sum(1)
    gradient = torch.empty_like(theta)
    gradient[:d] = row_sums @ scaled.square() - (scaled * (w @ scaled)).sum(0)
    gradient[d] = row_sums.sum()
    gradient[d + 1] = noise_variance * residual.diagonal().sum()
    if planes is not None:
        gradient[d + 2 :] = (planes * (residual @ planes)).sum(0)
    if log_input_std is not None:
        ratio = (theta[:d] - log_input_std) / LENGTHSCALE_CURB
        snr = (theta[d] - theta[d + 1]) / SNR_CURB
        value += ratio.pow(CURB_POWER).sum() + snr.pow(CURB_POWER)
        gradient[:d] += CURB_POWER * ratio.pow(CURB_POWER - 1) / LENGTHSCALE_CURB
        snr_slope = CURB_POWER * snr.pow(CURB_POWER - 1) / SNR_CURB
        gradient[d] += snr_slope
        gradient[d + 1] -= snr_slope
    return float(value), gradient


def _fit_output(gp: GaussianProcess, e: int, log_input_std: Tensor, max_evaluations: int) -> float:
    target = gp.targets[:, e] - gp.offset[e]
    target_std = float(target.std(correction=0))
    constant = float(gp.targets[0, e].abs())
    is_constant = target_std <= 1e-12 * constant
    if is_constant:  # the likelihood is unbounded: nothing is fitted, the offset says it all
        scale = constant if constant > 0 else 0.1
        gp.log_signal[e], gp.log_noise[e] = math.log(scale / 200), math.log(scale / 1000)
        if gp.slope_variance is not None:
            gp.log_slope[e] = math.log(scale / 1000) - log_input_std
    d, has_plane = gp.inputs.shape[1], gp.slope_variance is not None
    parts = [gp.log_lengthscale[e], gp.log_signal[e : e + 1], gp.log_noise[e : e + 1]]
    start = torch.cat([*parts, gp.log_slope[e]] if has_plane else parts)

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        try:
            value, gradient = negative_log_likelihood(
                torch.from_numpy(theta).to(start), gp.inputs, target, log_input_std
            )
        except RuntimeError:  # a line search may try impossible values: a wall
            return 1e25, np.zeros_like(theta)
        return value, gradient.cpu().numpy()

    theta = start
    if not is_constant:
        from scipy.optimize import minimize

        least = math.log(1e-6 * target_std)
        bounds = [(None, None)] * d + [(least, None)] * 2
        if has_plane:  # a slope that explains nothing is as good as 0
            bounds += [(least - float(log_std), None) for log_std in log_input_std]
        result = minimize(
            objective,
            start.cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxfun": max_evaluations},
        )
        theta = torch.from_numpy(result.x).to(start)
    gp.log_lengthscale[e], gp.log_signal[e], gp.log_noise[e] = theta[:d], theta[d], theta[d + 1]
    if has_plane:
        gp.log_slope[e] = theta[d + 2 :]
    return negative_log_likelihood(theta, gp.inputs, target)[0]
