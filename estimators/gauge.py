"""Gauges: whether the legs of a node agree, and how much of each is noise.

A gauge is a tensor [4, 2] of zeros that a node takes as `gauge=`. The gradient w.r.t. it holds, for
each field of `Reading`, a sum and how many numbers it is the sum of. The gauges of several nodes or
batches may therefore be added before they are read.

Let d_i be the LR leg less the pathwise leg of sample i at one coordinate of zeta, with mean d̄ and
sample variance V over the N samples. The difference of the two means in its standard errors is

    z = d̄ / (V / N)^½.

If both legs have the same mean, (N - 3) / (N - 1) z² has mean 1 for normal d, and 1 + 2 γ² / N to
first order if d has skewness γ: of a cost x² of one coordinate, z is 1.1 to 1.5 from 20 to 100
samples, and at most 1.1 from 1000 (means from 0 to 3, std 1). If the means differ, N (E d)² / V is
added to it. Of all coordinates together the root of the mean square is given, since that is 1, too,
however they depend on each other; the expected largest |z| is unknown.

The signal-to-noise ratio of a cotangent g_i (all coordinates of zeta) is that of its sum over the
batch, which is what the optimiser receives:

    |E Σ_i g_i|² / tr Var(Σ_i g_i),  estimated by  N |ḡ|² / tr V - 1.

This is N times `diagnostics.signal_to_noise`, up to a factor of 1 + O(1 / N) that is left out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from totalprop.estimators.baselines import Baseline
from totalprop.estimators.legs import Leg, pathwise
from totalprop.estimators.probes import Zeta

SHAPE = (4, 2)  # fields of a reading; sum and count
LEAST = 4  # samples; with fewer, z² has no mean


class Reading(NamedTuple):
    """What gauges tell, each [...]; nan where nothing could be measured.

    The legs are those that the node received: the pathwise signal has passed through the mixtures
    of all later nodes.
    """

    z: Tensor  # root mean square of z over the coordinates
    snr: Tensor  # signal-to-noise ratio of the mixture that the node passed on
    snr_rp: Tensor  # of the pathwise leg
    snr_lr: Tensor  # of the LR leg


def read(gauge: Tensor) -> Reading:
    """Turn the gradient of a gauge, or a sum of several, into numbers.

    Args:
        gauge: [..., 4, 2].
    """
    square, *ratios = (gauge[..., 0] / gauge[..., 1]).unbind(-1)
    return Reading(square.sqrt(), *ratios)


def without_mixture(gauge: Tensor) -> Tensor:
    """Gauges [..., 4, 2] that tell nothing of the mixture."""
    z, mixture, legs = gauge.split((1, 1, 2), -2)
    return torch.cat((z, torch.zeros_like(mixture), legs), -2)


def measure(
    zeta: Zeta,
    noise: Tensor,
    g_sample: Tensor | None,
    returns: Tensor | None,
    value: Tensor | None,
    mixed: Zeta,
    legs: Sequence[Leg],
    baseline: Baseline,
) -> Tensor:
    """Measure a node in its backward pass.

    A coordinate without noise or that is not finite is not counted. With several score legs, LR is
    their mean, as in `mixing.likelihood_ratio`.

    Args:
        zeta: (mean, std) or (logits,), each [N, ..., D].
        noise: [N, ..., D].
        g_sample: [N, ..., D] dL/dsample, or None if there is no path.
        returns: [N, ...] dL/dcredit', or None if no cost was credited.
        value: as for the baseline.
        mixed: the cotangent of zeta that the node passes on.
        legs: the score legs.
        baseline: of the score legs.
    Returns:
        [4, 2] sum and count of (N - 3) / (N - 1) z² and of the three ratios.
    """
    n, dtype = len(noise), torch.promote_types(mixed[0].dtype, torch.float32)
    if n < LEAST:
        return mixed[0].new_zeros(SHAPE, dtype=dtype)
    zeta, mixed = (tuple(x.to(dtype) for x in pair) for pair in (zeta, mixed))
    noise = noise.to(dtype)
    rp = None if g_sample is None else pathwise(zeta, noise, g_sample)
    lr = None if returns is None else _mean_leg(zeta, noise, returns, value, legs, baseline)
    difference, zero = None, mixed
    if rp is None or lr is None:
        zero = tuple(torch.zeros_like(g) for g in mixed)
    else:
        difference = tuple(b - a for a, b in zip(rp, lr, strict=True))
    rows = [zero if row is None else row for row in (difference, mixed, rp, lr)]
    x = torch.cat([g.flatten(1) for row in rows for g in row], 1)  # [N, 4 C]
    # Divide by the largest entry: squares cannot overflow. What is not finite becomes nan.
    largest = torch.maximum(x.amax(0), -x.amin(0)).view(4, -1)
    x = x.div_(largest.amax(1, keepdim=True).expand_as(largest).flatten())
    mean = x.mean(0)
    # In place, and without torch.var, which takes many times as long.
    variance = x.sub_(mean).square_().sum(0).view(4, -1) / (n - 1)
    square = mean.square().view(4, -1) * n
    z_square = square[0] / variance[0] * ((n - 3) / (n - 1))
    ratio = square[1:].sum(1) / variance[1:].sum(1) - 1
    values = torch.cat((z_square, ratio))
    found = torch.stack((values.nan_to_num(0.0, 0.0, 0.0), values.isfinite().to(dtype)), 1)
    return torch.cat((found[:-3].sum(0, keepdim=True), found[-3:]))


def _mean_leg(
    zeta: Zeta,
    noise: Tensor,
    returns: Tensor,
    value: Tensor | None,
    legs: Sequence[Leg],
    baseline: Baseline,
) -> Zeta:
    """Mean of the score legs."""
    found = [leg(zeta, noise, returns, value, baseline) for leg in legs]
    if len(found) == 1:
        return found[0]
    return tuple(torch.stack(members).mean(0) for members in zip(*found, strict=True))
