"""DreamerV1's world model: encoder, RSSM, and the heads that read its states.

    loss = kl_scale max(mean KL(q || p), free nats) - mean log p(o | s) - mean log p(r | s)

Hafner et al. 2020, Eq. 10 and App. A; details as in danijar/dreamer. Knows no agent: what is
imagined in the model, and how its gradient is taken, is agents/imagination.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from totalprop.world_models.latent.networks import (
    IMAGE_SIZE,
    ImageDecoder,
    ImageEncoder,
    VectorDecoder,
    VectorEncoder,
    at_least_float32,
    initialise,
    mlp,
)
from totalprop.world_models.latent.rssm import RSSM, Gaussian, State, kl_divergence


class ModelLoss(NamedTuple):
    """The loss of a batch and its parts, all [] and per time step."""

    total: Tensor
    observation: Tensor  # -log p(o | s)
    reward: Tensor  # -log p(r | s)
    kl: Tensor  # before the free nats
    discount: Tensor  # scaled cross entropy; 0 without a discount head


class ModelLossSettings(NamedTuple):
    """Weights of the loss's parts.

    Attributes:
        kl_scale: weight of the KL term.
        free_nats: below which it has no gradient.
        free_nats_per_step: applied to every step (Hafner's TensorFlow 1 original), or to the mean
            over batch and time (danijar/dreamer).
        gamma: what the discount head predicts where the episode goes on.
        discount_scale: weight of the discount head's cross entropy.
    """

    kl_scale: float = 1.0
    free_nats: float = 3.0
    free_nats_per_step: bool = False
    gamma: float = 0.99
    discount_scale: float = 10.0


class LatentModel(nn.Module):
    """World model over images [C, 64, 64] uint8 or vectors [S].

    Args:
        observation_shape: of one observation. action_size: A.
        stoch, deter, hidden: of the RSSM. width: units of the dense heads (400).
        conv_depth: feature maps of the first convolution (32).
        vector_std: standard deviation of the decoder of vectors.
        discount_head: learn γ·P(not terminal), for tasks that end early.
    """

    def __init__(
        self,
        observation_shape: tuple[int, ...],
        action_size: int,
        *,
        stoch: int,
        deter: int,
        hidden: int,
        width: int,
        conv_depth: int,
        vector_std: float = 1.0,
        discount_head: bool = False,
    ) -> None:
        super().__init__()
        features = stoch + deter
        self.encoder: ImageEncoder | VectorEncoder
        self.decoder: ImageDecoder | VectorDecoder
        if len(observation_shape) == 3:
            channels = observation_shape[0]
            if observation_shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
                raise ValueError(
                    f"images must be [C, {IMAGE_SIZE}, {IMAGE_SIZE}], got "
                    f"{list(observation_shape)}; wrap the environment in "
                    "gymnasium.wrappers.ResizeObservation"
                )
            self.encoder = ImageEncoder(channels, depth=conv_depth)
            self.decoder = ImageDecoder(features, channels, depth=conv_depth)
        else:
            (size,) = observation_shape
            self.encoder = VectorEncoder(size, width=width)
            self.decoder = VectorDecoder(features, size, width=width, std=vector_std)
        self.rssm = RSSM(action_size, self.encoder.outputs, stoch=stoch, deter=deter, hidden=hidden)
        self.reward_head = mlp(features, width, 2, 1)
        self.discount_head = mlp(features, width, 3, 1) if discount_head else None
        initialise(self)

    def reward(self, features: Tensor) -> Tensor:
        """Mean reward of arriving in a state, [..., F] -> [...]."""
        return at_least_float32(self.reward_head(features)).squeeze(-1)

    def discount(self, features: Tensor) -> Tensor | None:
        """γ·P(the episode goes on), [..., F] -> [...]; None without a head."""
        if self.discount_head is None:
            return None
        return at_least_float32(self.discount_head(features)).squeeze(-1).sigmoid()

    def loss(
        self,
        observations: Tensor,
        actions: Tensor,
        rewards: Tensor,
        is_first: Tensor,
        is_terminal: Tensor,
        noise: Tensor,
        settings: ModelLossSettings,
    ) -> tuple[ModelLoss, State]:
        """Loss of a batch of sequences and the posterior states it went through.

        Args:
            observations: [T, B, ...]. actions: [T, B, A] before each observation.
            rewards, is_first, is_terminal: [T, B], of each observation.
            noise: [T, B, stoch] standard normal.
        """
        steps = rewards.numel()
        states, prior, posterior = self.rssm.observe(
            self.encoder(observations), actions, is_first, noise
        )
        features = states.features
        observation = -self.decoder.log_prob(features, observations) / steps
        error = self.reward(features) - rewards
        reward = 0.5 * error.square().mean() + 0.5 * math.log(2 * math.pi)
        kl = kl_divergence(posterior, prior)
        if settings.free_nats_per_step:
            penalty, kl = kl.clamp_min(settings.free_nats).mean(), kl.mean()
        else:
            kl = kl.mean()
            penalty = kl.clamp_min(settings.free_nats)
        total = settings.kl_scale * penalty + observation + reward
        discount = torch.zeros_like(kl)
        if self.discount_head is not None:
            target = settings.gamma * (~is_terminal).to(features.dtype)
            logits = at_least_float32(self.discount_head(features)).squeeze(-1)
            discount = settings.discount_scale * binary_cross_entropy_with_logits(logits, target)
            total = total + discount
        return ModelLoss(total, observation, reward, kl, discount), states

    @torch.no_grad()
    def filter(
        self, state: State, action: Tensor, observation: Tensor, noise: Tensor | None
    ) -> State:
        """One step of the posterior; with noise None its mean.

        Args:
            state: of N sequences. action: [N, A] since then. observation: [N, ...].
            noise: [N, stoch].
        """
        deter = self.rssm.recur(state, action)
        mean, std = self.rssm.posterior(deter, self.encoder(observation))
        return State(deter, mean if noise is None else mean + std * noise)

    @torch.no_grad()
    def open_loop(
        self,
        observations: Tensor,
        actions: Tensor,
        is_first: Tensor,
        *,
        context: int,
        generator: torch.Generator,
    ) -> Tensor:
        """Predicted observations [T, B, ...]: filtered for `context` steps, then only imagined.

        Images are in [-0.5, 0.5]. Args as in `loss`.
        """

        def noise(steps: int) -> Tensor:
            shape = (steps, observations.shape[1], self.rssm.stoch_size)
            return torch.randn(shape, generator=generator, device=generator.device)

        embeds = self.encoder(observations[:context])
        states, _, _ = self.rssm.observe(
            embeds, actions[:context], is_first[:context], noise(context)
        )
        features = [states.features]
        state = State(states.deter[-1], states.stoch[-1])
        for action, z in zip(actions[context:], noise(len(actions) - context)):
            deter = self.rssm.recur(state, action)
            prior = self.rssm.prior(deter)
            state = State(deter, prior.mean + prior.std * z)
            features.append(state.features.unsqueeze(0))
        return self.decoder(torch.cat(features))


__all__ = ["Gaussian", "LatentModel", "ModelLoss", "ModelLossSettings", "State"]
