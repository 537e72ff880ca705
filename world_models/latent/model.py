"""DreamerV1's world model: encoder, RSSM, decoder, and heads for reward and discount.

    loss = kl_scale max(mean KL(q || p), free nats) - mean log p(o | s) - mean log p(r | s)

Hafner et al. 2020, Eq. 10 and App. A; details follow danijar/dreamer. Imagination in this model,
and its gradient, are in agents/dreamer/imagination.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from totalprop.world_models.latent.distributions import Distribution, LatentKind
from totalprop.world_models.latent.heads import HeadKind, ScalarHead
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
from totalprop.world_models.latent.observations import (
    DictDecoder,
    DictEncoder,
    Entries,
    Entry,
    Joined,
    Observation,
)
from totalprop.world_models.latent.rssm import RSSM, State


class ModelLoss(NamedTuple):
    """The loss of a batch and its terms, all [] and averaged over sequences and time steps."""

    total: Tensor
    observation: Tensor  # -log p(o | s)
    reward: Tensor  # -log p(r | s)
    kl: Tensor  # before free nats are applied
    discount: Tensor  # cross entropy times its scale; 0 without a discount head


class ModelLossSettings(NamedTuple):
    """Weights of the terms of the loss.

    Attributes:
        kl_scale: weight of the KL term.
        representation_scale: weight of the KL term's gradient with respect to the posterior,
            relative to that with respect to the prior; 1 is the plain KL divergence.
        free_nats: the KL divergence, in nats, below which it is not penalised.
        free_nats_per_step: True applies the free nats to every step (Hafner's TensorFlow 1
            original), False to the mean over batch and time (danijar/dreamer).
        gamma: target of the discount head while the episode continues.
        discount_scale: weight of the discount head's cross entropy.
        learned_discount: train the discount head, if there is one.
        average: the mean over processes that each have a part of the batch, of a number []. The
            free nats are compared with the mean of all. None: the batch is whole.
    """

    kl_scale: float
    representation_scale: float
    free_nats: float
    free_nats_per_step: bool
    gamma: float
    discount_scale: float
    learned_discount: bool = True
    average: Callable[[Tensor], Tensor] | None = None


class LatentModel(nn.Module):
    """World model for observations that are images [C, 64, 64] uint8, vectors [S], or several.

    Args:
        observation_shape: shape of one observation. For dictionaries, name -> shape of an image or
            vector, or `Choices`.
        action_size: A.
        stoch: number of the variables of the RSSM's stochastic state z.
        deter: size of the RSSM's deterministic state h.
        hidden: units of the RSSM's dense layers.
        width: units of the dense networks (400 in DreamerV1).
        conv_depth: feature maps of the first convolution (32 in DreamerV1).
        vector_std: standard deviation of the vector decoder.
        learn_vector_std: learn that of each entry, see `VectorDecoder`.
        image_std: standard deviation of the image decoder.
        discount_head: whether to learn γ·P(not terminal), for tasks that may end early.
        latent: kind of the variables of z, see `RSSM`.
        classes: of each categorical variable.
        reward_head: kind of the reward head, see `ScalarHead`.
        layer_norm: layer norm and SiLU in every network, see `mlp`, `ImageEncoder` and `RSSM`.

    Vectors are learned as differences from `offset`, which is zero until `set_offset`: symlog and
    float32 lose the digits of numbers that vary little around a large one.

    Raises:
        ValueError: images are not 64x64.
    """

    OPTIONAL_BUFFERS = ("offset",)  # older files lack it: zero
    offset: Tensor | None  # [S] float64; None for images and choices

    def __init__(
        self,
        observation_shape: tuple[int, ...] | Mapping[str, Entry],
        action_size: int,
        *,
        stoch: int,
        deter: int,
        hidden: int,
        width: int,
        conv_depth: int,
        vector_std: float = 1.0,
        image_std: float = 1.0,
        learn_vector_std: bool = False,
        discount_head: bool = False,
        latent: LatentKind = "gaussian",
        classes: int = 32,
        reward_head: HeadKind = "gaussian",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        features = (stoch if latent == "gaussian" else stoch * classes) + deter
        self.encoder: ImageEncoder | VectorEncoder | DictEncoder
        self.decoder: ImageDecoder | VectorDecoder | DictDecoder
        self.entries: Entries | None = None
        if isinstance(observation_shape, Mapping):
            for entry in observation_shape.values():
                _check_image(entry)
            self.entries = Entries(observation_shape)
            size = self.entries.n_numbers
            offset = torch.zeros(size, dtype=torch.float64) if size else None
            self.register_buffer("offset", offset)
            shared: dict[str, Any] = {
                "width": width, "conv_depth": conv_depth, "layer_norm": layer_norm
            }  # fmt: skip
            self.encoder = DictEncoder(self.entries, **shared)
            self.decoder = DictDecoder(
                features,
                self.entries,
                std=vector_std,
                image_std=image_std,
                learn_std=learn_vector_std,
                **shared,
            )
        elif len(observation_shape) == 3:
            _check_image(observation_shape)
            channels = observation_shape[0]
            self.register_buffer("offset", None)
            self.encoder = ImageEncoder(channels, depth=conv_depth, layer_norm=layer_norm)
            self.decoder = ImageDecoder(
                features, channels, depth=conv_depth, std=image_std, layer_norm=layer_norm
            )
        else:
            (size,) = observation_shape
            self.register_buffer("offset", torch.zeros(size, dtype=torch.float64))
            self.encoder = VectorEncoder(size, width=width, layer_norm=layer_norm)
            self.decoder = VectorDecoder(
                features, size, width=width, std=vector_std, learn_std=learn_vector_std,
                layer_norm=layer_norm,
            )  # fmt: skip
        self.rssm = RSSM(
            action_size, self.encoder.outputs, stoch=stoch, deter=deter, hidden=hidden,
            latent=latent, classes=classes, layer_norm=layer_norm,
        )  # fmt: skip
        self.reward_head = ScalarHead(features, width, 2, kind=reward_head, layer_norm=layer_norm)
        self.discount_head = (
            mlp(features, width, 3, 1, layer_norm=layer_norm) if discount_head else None
        )
        initialise(self)
        self.reward_head.zero_last_layer()
        if self.discount_head is not None:  # untrained, it says that the episode continues
            *_, (_, bias) = self.discount_head.named_parameters()
            nn.init.constant_(bias, math.log(99))  # sigmoid: 0.99

    def set_offset(self, observation: Observation) -> None:
        """Let vectors be learned as differences from this one [S], before the first update."""
        if self.offset is not None:
            if self.entries is not None:
                assert isinstance(observation, dict)
                observation = {name: observation[name] for name in self.entries.vectors}
                observation = torch.cat([part.double() for part in observation.values()])
            assert isinstance(observation, Tensor)
            self.offset.copy_(observation)

    def embed(self, observations: Observation) -> Tensor:
        """What the posterior sees of observations, [..., *shape] -> [..., E]."""
        return self.encoder(self._centred(observations))

    def _centred(self, observations: Observation) -> Any:
        """Vectors as float32 differences from the offset; images as they are.

        A dictionary's entries are joined.
        """
        if self.entries is not None:
            assert isinstance(observations, dict)
            joined = self.entries.join(observations)
            if joined.vector is None or self.offset is None:
                return joined
            return joined._replace(vector=(joined.vector - self.offset).float())
        assert isinstance(observations, Tensor)
        if self.offset is None:
            return observations
        return (observations.double() - self.offset).float()  # flags cannot be subtracted from

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.offset is not None:
            state_dict.setdefault(f"{prefix}offset", torch.zeros_like(self.offset))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def reward(self, features: Tensor) -> Tensor:
        """Mean reward for arriving in a state, [..., F] -> [...]."""
        return self.reward_head.mean(self.reward_head(features))

    def discount(self, features: Tensor) -> Tensor | None:
        """γ·P(the episode continues), [..., F] -> [...]; None without a discount head."""
        if self.discount_head is None:
            return None
        return at_least_float32(self.discount_head(features)).squeeze(-1).sigmoid()

    def loss(
        self,
        observations: Observation,
        actions: Tensor,
        rewards: Tensor,
        is_first: Tensor,
        is_terminal: Tensor,
        noise: Tensor,
        settings: ModelLossSettings,
        decoded: Tensor | None = None,
    ) -> tuple[ModelLoss, State]:
        """Compute the loss of a batch of sequences, and their posterior states.

        Args:
            observations: [T, B, ...], or a dictionary of such entries.
            actions: [T, B, A], each the action taken before the observation.
            rewards: [T, B], each the reward received with the observation.
            is_first: [T, B] bool, whether the observation is the first of an episode.
            is_terminal: [T, B] bool, whether the episode terminates with the observation.
            noise: [T, B, ...] of the posteriors, from `rssm.latents.noise`.
            settings: weights of the terms.
            decoded: [M] indices into the T·B steps, of those whose images are decoded; the others
                count as these do on average. None: all. Vectors and choices always are.
        Returns:
            The loss, and the posterior states [T, B, ...].
        """
        steps = rewards.numel()
        seen = self._centred(observations)
        states, prior, posterior = self.rssm.observe(self.encoder(seen), actions, is_first, noise)
        features = states.features
        observation = -self._log_prob(features, seen, decoded) / steps
        reward = self.reward_head.loss(self.reward_head(features), rewards).mean()
        if self.reward_head.kind == "gaussian":
            reward = reward + 0.5 * math.log(2 * math.pi)
        penalty, kl = _kl_penalty(posterior, prior, settings)
        total = settings.kl_scale * penalty + observation + reward
        discount = torch.zeros_like(kl)
        if self.discount_head is not None and settings.learned_discount:
            target = settings.gamma * (~is_terminal).to(features.dtype)
            logits = at_least_float32(self.discount_head(features)).squeeze(-1)
            discount = settings.discount_scale * binary_cross_entropy_with_logits(logits, target)
            total = total + discount
        return ModelLoss(total, observation, reward, kl, discount), states

    def _log_prob(self, features: Tensor, seen: Any, decoded: Tensor | None) -> Tensor:
        """[] log p(o | s), summed over the batch."""
        if isinstance(self.decoder, VectorDecoder):
            return self.decoder.log_prob(features, seen)
        return self.decoder.log_prob(features, seen, decoded)

    @torch.no_grad()
    def filter(
        self, state: State, action: Tensor, observation: Observation, noise: Tensor | None
    ) -> State:
        """Update the posterior state by one step.

        Args:
            state: [N, ...] previous posterior state.
            action: [N, A] action taken in it.
            observation: [N, ...] observation that followed, or a dictionary of such entries.
            noise: [N, ...] of the posterior's sample; None takes its mode.
        Returns:
            [N, ...] the new posterior state.
        """
        deter = self.rssm.recur(state, action)
        posterior = self.rssm.posterior(deter, self.embed(observation))
        return State(deter, posterior.mode if noise is None else posterior.sample(noise))

    @torch.no_grad()
    def open_loop(
        self,
        observations: Observation,
        actions: Tensor,
        is_first: Tensor,
        *,
        context: int,
        generator: torch.Generator,
    ) -> Observation:
        """Predict observations open loop, after filtering the first `context` steps.

        Where an episode begins among the predicted steps, the prediction begins anew too, with a
        sample of the first state.

        Args:
            observations: [T, B, ...], or a dictionary of such entries, of which only the first
                `context` steps are used.
            actions: [T, B, A], each the action taken before the observation.
            is_first: [T, B] bool, whether the observation is the first of an episode.
            context: number of steps to filter.
            generator: generator of the noise, on the model's device.
        Returns:
            [T, B, ...] reconstructions of the first `context` steps, then predictions. Images are
            in [-0.5, 0.5], choices the most likely ones.
        """

        def noise(steps: int) -> Tensor:
            return self.rssm.latents.noise(steps, actions.shape[1], generator=generator)

        if isinstance(observations, dict):
            seen: Observation = {name: part[:context] for name, part in observations.items()}
        else:
            seen = observations[:context]
        embeds = self.embed(seen)
        states, _, _ = self.rssm.observe(
            embeds, actions[:context], is_first[:context], noise(context)
        )
        features = [states.features]
        state = State(states.deter[-1], states.stoch[-1])
        keep = (~is_first).to(actions.dtype).unsqueeze(-1)
        for t, z in enumerate(noise(len(actions) - context), context):
            state = State(state.deter * keep[t], state.stoch * keep[t])
            deter = self.rssm.recur(state, actions[t] * keep[t])
            state = State(deter, self.rssm.prior(deter).sample(z))
            features.append(state.features.unsqueeze(0))
        decoded = self.decoder(torch.cat(features))
        if isinstance(decoded, Joined):
            assert self.entries is not None
            if decoded.vector is not None and self.offset is not None:
                decoded = decoded._replace(vector=decoded.vector + self.offset)
            return self.entries.split(decoded)
        return decoded if self.offset is None else decoded + self.offset


def _check_image(entry: Entry) -> None:
    """Raise ValueError for an image whose size the convolutions do not fit."""
    if isinstance(entry, tuple) and len(entry) == 3 and entry[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"images must be [C, {IMAGE_SIZE}, {IMAGE_SIZE}], got {list(entry)}; wrap the "
            "environment in gymnasium.wrappers.ResizeObservation"
        )


def _kl_penalty(
    posterior: Distribution, prior: Distribution, settings: ModelLossSettings
) -> tuple[Tensor, Tensor]:
    """The KL term with its free nats, and the mean KL divergence, both []."""

    def penalty(kl: Tensor) -> Tensor:
        if settings.free_nats_per_step:
            return kl.clamp_min(settings.free_nats).mean()
        mean = kl.mean()
        if settings.average is not None:  # whose value counts, and its own gradient
            mean = mean + (settings.average(mean.detach()) - mean.detach())
        return mean.clamp_min(settings.free_nats)

    kl, scale = posterior.kl(prior), settings.representation_scale
    if scale == 1:
        return penalty(kl), kl.mean()
    # KL balancing (Hafner et al. 2021, Alg. 2): one term moves the prior, the other the posterior.
    dynamics = penalty(posterior.detach().kl(prior))
    representation = penalty(posterior.kl(prior.detach()))
    return dynamics + scale * representation, kl.mean()


__all__ = ["LatentModel", "ModelLoss", "ModelLossSettings", "State"]
