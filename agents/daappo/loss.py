"""The loss of DAAPPO as pure functions: PPO's clipped loss over real and extra actions."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor
from torch.nn.functional import mse_loss

from totalprop.agents.core.processes import ALONE, Processes
from totalprop.agents.daappo.recorder import ManyActionSamples
from totalprop.agents.daappo.sources import ExtraActions
from totalprop.estimators import Estimator, infer_noise, surrogates

ValueClipping = Literal["clipped", "max"]


class PolicyLoss(NamedTuple):
    """PPO's loss of the policy, and what is logged of it."""

    total: Tensor  # [] mean over real and extra actions
    extra: Tensor | None  # [] detached mean over the extra actions
    clip_fraction: float  # of the real actions


def policy_loss(
    batch: ManyActionSamples,
    log_prob: Tensor,
    zeta: tuple[Tensor, Tensor] | None,
    estimator: Estimator,
    *,
    clip_range: float,
    normalize_advantage: bool,
    processes: Processes = ALONE,
) -> PolicyLoss:
    """Clipped loss, averaged over the B real and the K·B extra actions of a minibatch.

    An extra action counts by its weight.

    Args:
        batch: B states with their real and extra actions.
        log_prob: [B] of the real actions under the current policy; gradients flow.
        zeta: mean and std, [K, B, A] each, of the current policy at the extra actions' states;
            gradients flow. None if there are no extra actions.
        estimator: of the extra actions' gradient.
        clip_range: ε of the probability ratio.
        normalize_advantage: standardise the advantages of real and extra actions together.
        processes: that have a part of the minibatch each; the average of their losses is the loss
            of all.
    """
    advantages, extra = batch.advantages, batch.extra
    if normalize_advantage:
        advantages, extra = normalised(advantages, extra, processes)
    ratio = (log_prob - batch.old_log_prob).exp()
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    terms = -torch.min(advantages * ratio, advantages * bounded)
    total, extra_mean = terms.sum(), None
    count: Any = terms.numel()
    if extra is not None:
        assert zeta is not None
        losses = extra_loss(estimator, zeta, extra, clip_range)
        n: Any = losses.numel()
        extra_mean = losses.detach().mean()
        if extra.weights is not None:
            losses, n = losses * extra.weights.T, processes.average_one(extra.weights.sum())
            extra_mean = losses.detach().sum() / n
        total, count = total + losses.sum(), count + n
    clip_fraction = float(((ratio - 1).abs() > clip_range).float().mean())
    return PolicyLoss(total / count, extra_mean, clip_fraction)


def value_loss(
    values: Tensor,
    batch: ManyActionSamples,
    clip_range_vf: float | None,
    clipping: ValueClipping = "clipped",
) -> Tensor:
    """Mean squared error of the critic's values [B].

    Args:
        values: [B] of the critic; gradients flow.
        batch: old values and returns.
        clip_range_vf: distance from the old values within which values are kept; None: no limit.
        clipping: "clipped": the error of the clipped value, which has no gradient outside the
            range, not even where the value has moved away from the return. "max": the larger of
            the errors of both values, whose gradient vanishes only where the value has passed the
            range towards the return.
    """
    if clip_range_vf is None:
        return mse_loss(batch.returns, values)
    change = (values - batch.old_values).clamp(-clip_range_vf, clip_range_vf)
    clipped = batch.old_values + change
    if clipping == "clipped":
        return mse_loss(batch.returns, clipped)
    errors = [(predicted - batch.returns).square() for predicted in (values, clipped)]
    return torch.max(*errors).mean()


@torch.no_grad()
def approximate_kl(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """KL divergence of old and current policy: mean of (r - 1) - log r, r = π / π_old.

    As in stable-baselines3; see http://joschu.net/blog/kl-approx.html.
    """
    log_ratio = log_prob - old_log_prob
    return (log_ratio.exp() - 1 - log_ratio).mean()


def normalised(
    advantages: Tensor, extra: ExtraActions | None, processes: Processes = ALONE
) -> tuple[Tensor, ExtraActions | None]:
    """Advantages standardised over real and extra actions of all processes together.

    The extra actions' slopes are divided by the same standard deviation.
    """
    block = advantages if extra is None else torch.cat((advantages, extra.advantages.flatten()))
    block = processes.gathered(block)
    if len(block) < 2:
        return advantages, extra
    mean, scale = block.mean(), block.std() + 1e-8
    if extra is not None and extra.weights is not None:
        weights = torch.cat((torch.ones_like(advantages), extra.weights.flatten()))
        weights = processes.gathered(weights)
        mean = (weights * block).sum() / weights.sum()
        variance = (weights * (block - mean).square()).sum() / (weights.sum() - 1)
        scale = variance.sqrt() + 1e-8
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
    """Clipped losses [K, B] of the extra actions; their gradient in zeta is the estimator's.

    The estimator's sample axis is the K actions of a state.

    Args:
        estimator: without a baseline, which the advantages have already.
        zeta: mean and std of the policy, [K, B, A] each; gradients flow.
        extra: the extra actions of B states.
        clip_range: ε of the probability ratio.
    """
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
    """GAE truncated after `horizon` steps, [T, n_envs]: A_t - (γλ)^H A_{t+H} within an episode."""
    advantages, starts = buffer.advantages, buffer.episode_starts
    cut = advantages.copy()
    steps = len(advantages)
    if horizon < steps:
        begun = np.cumsum(starts, 0)  # equal: no new episode between
        same = begun[horizon:] == begun[:-horizon]
        decay = (buffer.gamma * buffer.gae_lambda) ** horizon
        cut[:-horizon] -= decay * same * advantages[horizon:]
    return cut
