"""The chaotic RNN of Parmas et al. 2023 (TPX), Sec. 5, a test bench for gradient estimators.

Several chains x_{t+1} = sigmoid(β_i W x_t) + N(0, 0.001²) run in parallel from x_0 = [0.35, 0.55],
each with its own β_i. The loss is L = 1/2 Σ_i |x_H^[i]|². Below β ≈ 2.5 a chain is stable and
backpropagation (RP) is accurate; above it the chain is chaotic, and RP's variance grows
exponentially with H (Wang 1991). This module draws the noise and computes the gradients. The study,
its files and its figures are in `chaos.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from totalprop.estimators import Estimator, assign_credit, gradient

W = ((-5.0, 5.0), (-25.0, 25.0))
START = (0.35, 0.55)
STD = 0.001
TOGETHER = 8  # repeats evaluated in one graph, if the weight rule allows it; they fit into L2


def draw_noise(
    betas: Sequence[float], *, repeats: int, samples: int, horizon: int, seed: int
) -> Tensor:
    """Draw [R, H, N, D] standard normal noise from a seed and the grid point.

    The noise is the same for all estimators, and independent between grid points.
    """
    noise = torch.empty(repeats, horizon, samples, 2 * len(betas), dtype=torch.float64)
    point = [round(1e6 * beta) for beta in betas]
    for r, one in enumerate(noise):
        state = np.random.SeedSequence([seed, r, *point]).generate_state(1, np.uint64)
        one.normal_(generator=torch.Generator().manual_seed(int(state[0] >> np.uint64(1))))
    return noise


def gradients(estimator: Estimator, betas: Sequence[float], noise: Tensor) -> Tensor:
    """Compute dL/dβ for each repeat, from its own N samples.

    Rules without a probe work coordinate by coordinate, so several repeats can share one graph
    ([N, R, D]) without being mixed. With a probe, repeats are evaluated one at a time ([N, D]).

    Args:
        estimator: any estimator. If it needs a probe over all parameters, every β counts; if over a
            subset, only β_1 counts.
        betas: β of each chain, length C.
        noise: [R, H, N, 2 C], see `draw_noise`.
    Returns:
        [R, C] gradients.
    """
    if estimator.probe != "none":
        return torch.cat([_gradients(estimator, betas, one.unsqueeze(2)) for one in noise])
    parts = [
        _gradients(estimator, betas, part.permute(1, 2, 0, 3)) for part in noise.split(TOGETHER)
    ]
    return torch.cat(parts)


def _gradients(estimator: Estimator, betas: Sequence[float], noise: Tensor) -> Tensor:
    """[R, C] gradients from noise [H, N, R, D], in one graph."""
    n, repeats = noise.shape[1:3]
    probed = estimator.probe != "none"
    noise = noise.squeeze(2) if probed else noise.contiguous()  # [H, N, D] or [H, N, R, D]
    theta = noise.new_tensor(betas).repeat(repeats, 1).requires_grad_()  # [R, C]
    weight = torch.block_diag(*[noise.new_tensor(W)] * len(betas)).T
    chain = torch.eye(len(betas), dtype=noise.dtype).repeat_interleave(2, 0)  # [D, C]
    counted = chain[:, :1] if estimator.probe == "subset" else chain
    std = torch.full_like(noise[0], STD)

    def rollout(estimator: Estimator, tap: Tensor | None) -> Tensor:
        beta = (theta @ chain.T).squeeze(0) if probed else theta @ chain.T  # [D] or [R, D]
        x = noise.new_tensor(START * len(betas)).expand(noise.shape[1:])
        credit = noise.new_zeros(noise.shape[1:-1])
        for noise_t in noise:
            drive = x @ weight
            mean = torch.sigmoid(beta * drive)
            probe = None
            if probed:
                probe = partial(_probe, (mean * (1 - mean) * drive).detach(), counted)
            x, credit = estimator(mean, std, noise_t, credit, probe=probe, tap=tap)
        return assign_credit(0.5 * x.square().sum(-1), credit).mean(0).sum()

    return gradient(rollout, [theta], estimator, samples=n).gradients[0].detach()


def _probe(slope: Tensor, counted: Tensor, cotangent: tuple[Tensor, ...]) -> Tensor:
    """[N, C] per-sample gradients w.r.t. the counted β at one node, whose std is constant.

    Args:
        slope: [N, D] derivative of each coordinate's mean w.r.t. the β of its chain.
        counted: [D, C] 1 where the coordinate belongs to the chain of that β.
        cotangent: of (mean, std), each [N, D].
    """
    return (cotangent[0] * slope) @ counted
