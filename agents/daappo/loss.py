"""The loss of DAAPPO's epochs as pure functions: the clipped loss over real and extra actions."""

from __future__ import annotations

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from totalprop.agents.daappo.sources import ExtraActions
from totalprop.estimators import Estimator, infer_noise, surrogates


def normalised(
    advantages: Tensor, extra: ExtraActions | None
) -> tuple[Tensor, ExtraActions | None]:
    """Zero mean and unit deviation over the whole block of real and extra actions."""
    block = advantages if extra is None else torch.cat((advantages, extra.advantages.flatten()))
    if len(block) < 2:
        return advantages, extra
    mean, scale = block.mean(), block.std() + 1e-8
    if extra is not None:
        slope = extra.action_gradient
        extra = extra._replace(
            advantages=(extra.advantages - mean) / scale,
            action_gradient=None if slope is None else slope / scale,
        )
    return (advantages - mean) / scale, extra


def extra_loss(
    estimator: Estimator, zeta: tuple[Tensor, Tensor], extra: ExtraActions, clip_range: float
) -> Tensor:
    """[K, B] clipped losses whose gradient in zeta is the estimator's, over the K actions."""
    mean, std = zeta
    actions, advantage = extra.actions.transpose(0, 1), extra.advantages.T
    log_prob = torch.distributions.Normal(mean.detach(), std.detach()).log_prob(actions).sum(-1)
    surrogate = surrogates.clipped(advantage, log_prob, extra.old_log_prob.T, clip_range)
    noise = infer_noise(mean, std, actions)
    sample, credit = estimator(mean, std, noise, torch.zeros_like(advantage))
    losses = surrogate.loss + advantage * surrogate.weight * credit
    if extra.action_gradient is not None:
        slope = surrogate.weight.unsqueeze(-1) * extra.action_gradient.transpose(0, 1)
        losses = losses + (slope * (sample - sample.detach())).sum(-1)
    return losses


def truncated_advantages(buffer: RolloutBuffer, horizon: int) -> np.ndarray:
    """GAE cut off after `horizon` steps, [T, n_envs]: A_t - (γλ)^H A_{t+H} within an episode."""
    advantages, starts = buffer.advantages, buffer.episode_starts
    cut = advantages.copy()
    steps = len(advantages)
    if horizon < steps:
        begun = np.cumsum(starts, 0)  # equal: no new episode between
        same = begun[horizon:] == begun[:-horizon]
        decay = (buffer.gamma * buffer.gae_lambda) ** horizon
        cut[:-horizon] -= decay * same * advantages[horizon:]
    return cut
