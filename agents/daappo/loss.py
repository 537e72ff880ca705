"""The epochs of DAAPPO: PPO's clipped loss over real and extra actions."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.utils import explained_variance
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from totalprop import estimators
from totalprop.agents.daappo.sources import ExtraActions
from totalprop.agents.daappo.validation import resolve
from totalprop.estimators import Estimator, infer_noise, surrogates

if TYPE_CHECKING:
    from totalprop.agents.daappo.agent import DAAPPO


def needs_action_gradient(agent: DAAPPO) -> bool:
    """Whether the estimator has a pathwise leg."""
    return resolve(agent).weight is not estimators.mixing.likelihood_ratio


def train(agent: DAAPPO) -> None:
    """One round of epochs on the rollout buffer, as `stable_baselines3.PPO.train`."""
    policy, buffer = agent.policy, agent.rollout_buffer
    policy.set_training_mode(True)
    # The last rollout may overshoot the budget: no negative rate then.
    progress = agent._current_progress_remaining = max(agent._current_progress_remaining, 0.0)
    agent._update_learning_rate(policy.optimizer)
    clip_range = agent.clip_range(progress)  # type: ignore[operator]
    clip_range_vf = None
    if agent.clip_range_vf is not None:
        clip_range_vf = agent.clip_range_vf(progress)  # type: ignore[operator]
    estimator = resolve(agent)
    log: dict[str, list[float]] = defaultdict(list)
    stop = False
    for epoch in range(agent.n_epochs):
        log["approx_kl"] = []  # of the last epoch, as stable-baselines3 logs it
        batches: Any = buffer.get(agent.batch_size)
        for batch in batches:
            distribution: Any = policy.get_distribution(batch.observations)
            values = policy.predict_values(batch.observations).flatten()
            log_prob = distribution.log_prob(batch.actions)
            advantages, extra = batch.advantages, batch.extra
            if agent.normalize_advantage:
                advantages, extra = _normalised(advantages, extra)
            ratio = (log_prob - batch.old_log_prob).exp()
            bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
            terms = -torch.min(advantages * ratio, advantages * bounded)
            total, count = terms.sum(), terms.numel()
            if extra is not None:
                zeta = _zeta(agent, distribution, extra)
                losses = _extra_loss(estimator, zeta, extra, clip_range)
                total, count = total + losses.sum(), count + losses.numel()
                log["extra_policy_gradient_loss"].append(float(losses.detach().mean()))
            policy_loss = total / count
            predicted = values
            if clip_range_vf is not None:
                change = (values - batch.old_values).clamp(-clip_range_vf, clip_range_vf)
                predicted = batch.old_values + change
            value_loss = mse_loss(batch.returns, predicted)
            entropy_loss = -distribution.entropy().mean()
            loss = policy_loss + agent.ent_coef * entropy_loss + agent.vf_coef * value_loss
            with torch.no_grad():
                log_ratio = log_prob - batch.old_log_prob
                kl = float((log_ratio.exp() - 1 - log_ratio).mean())
            log["approx_kl"].append(kl)
            log["clip_fraction"].append(float(((ratio - 1).abs() > clip_range).float().mean()))
            for name, value in (
                ("policy_gradient_loss", policy_loss), ("value_loss", value_loss),
                ("entropy_loss", entropy_loss),
            ):  # fmt: skip
                log[name].append(float(value.detach()))
            log["loss"] = [float(loss.detach())]  # the last, likewise
            stop = agent.target_kl is not None and kl > 1.5 * agent.target_kl
            if stop:
                if agent.verbose:
                    print(f"Early stopping at step {epoch} due to reaching max kl: {kl:.2f}")
                break
            policy.optimizer.zero_grad()
            loss.backward()
            for parameters in _clip_groups(agent):
                nn.utils.clip_grad_norm_(parameters, agent.max_grad_norm)
            policy.optimizer.step()
        agent._n_updates += 1
        if stop:
            break
    for name, entries in log.items():
        agent.logger.record(f"train/{name}", np.mean(entries))
    fit = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
    agent.logger.record("train/explained_variance", fit)
    agent.logger.record("train/std", float(policy.log_std.detach().exp().mean()))
    agent.logger.record("train/n_updates", agent._n_updates, exclude="tensorboard")
    agent.logger.record("train/clip_range", clip_range)
    if clip_range_vf is not None:
        agent.logger.record("train/clip_range_vf", clip_range_vf)


def _normalised(
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


def _zeta(agent: DAAPPO, distribution: Any, extra: ExtraActions) -> tuple[Tensor, Tensor]:
    """Mean and deviation [K, B, A] of the policy at the extra samples' states."""
    k = extra.actions.shape[1]
    if extra.observations is None:
        gaussian = distribution.distribution
        mean, std = gaussian.mean, gaussian.stddev
        return mean.expand(k, *mean.shape), std.expand(k, *std.shape)
    observations = extra.observations.transpose(0, 1)  # [K, B, S]
    simulated: Any = agent.policy.get_distribution(observations.flatten(0, 1))
    gaussian = simulated.distribution
    shape = observations.shape[:2]
    return gaussian.mean.unflatten(0, shape), gaussian.stddev.unflatten(0, shape)


def _extra_loss(
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


def _clip_groups(agent: DAAPPO) -> list[list[nn.Parameter]]:
    """Parameters whose gradient norms are clipped together."""
    everything = list(agent.policy.parameters())
    if not agent.separate_grad_clip:
        return [everything]
    policy: Any = agent.policy
    parts = [policy.mlp_extractor.value_net, policy.value_net]
    if not policy.share_features_extractor:
        parts.append(policy.vf_features_extractor)
    critic = [parameter for part in parts for parameter in part.parameters()]
    ids = {id(p) for p in critic}
    return [[p for p in everything if id(p) not in ids], critic]


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
