"""The recurrent state-space model (RSSM), with a deterministic and a stochastic latent state.

    h_t = GRU(h_{t-1}, [z_{t-1}, a_{t-1}]),   prior p(z_t | h_t),   posterior q(z_t | h_t, o_t)

Hafner et al. 2019 (PlaNet), Sec. 3; sizes as in Hafner et al. 2020 (DreamerV1), danijar/dreamer.
z is Gaussian, or categorical as in Hafner et al. 2021 (DreamerV2); see `distributions`.
Notation: deter = h and stoch = z; the features of a state are [stoch, deter].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from totalprop.world_models.latent.distributions import (
    CategoricalLatents,
    Distribution,
    GaussianLatents,
    LatentKind,
    Latents,
    stack,
)
from totalprop.world_models.latent.linear import Linear, fast_linear
from totalprop.world_models.latent.networks import LayerNorm


class State(NamedTuple):
    """A latent state."""

    deter: Tensor  # [..., deter] h
    stoch: Tensor  # [..., Z] z; Z = stoch, or stoch·classes

    @property
    def features(self) -> Tensor:
        """[..., Z + deter], the input of every head."""
        return torch.cat((self.stoch, self.deter), -1)

    def detach(self) -> State:
        """The same state, detached from the graph."""
        return State(self.deter.detach(), self.stoch.detach())


class GRUCell(nn.GRUCell):
    """`nn.GRUCell`, with the same parameters, but with oneDNN on the CPU."""

    def forward(self, x: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
        """h_t [N, deter] from the input [N, hidden] and h_{t-1} [N, deter]."""
        if h.device.type != "cpu":
            return super().forward(x, h)
        reset_x, update_x, new_x = fast_linear(x, self.weight_ih, self.bias_ih).chunk(3, -1)
        reset_h, update_h, new_h = fast_linear(h, self.weight_hh, self.bias_hh).chunk(3, -1)
        reset, update = (reset_x + reset_h).sigmoid(), (update_x + update_h).sigmoid()
        candidate = torch.addcmul(new_x, reset, new_h).tanh()
        return candidate + update * (h - candidate)


class NormGRUCell(nn.Module):
    """GRU of DreamerV2 and V3: layer norm over all gates, and an update gate biased by -1.

    The bias keeps the state at first, since the gate starts near sigmoid(-1) = 0.27. Hafner et al.
    2021 (DreamerV2), danijar/dreamerv2, nets.GRUCell.
    """

    def __init__(self, inputs: int, deter: int) -> None:
        super().__init__()
        self.gates = Linear(inputs + deter, 3 * deter, bias=False)
        self.norm = LayerNorm(3 * deter)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """h_t [N, deter] from the input [N, hidden] and h_{t-1} [N, deter]."""
        gates = self.norm(self.gates(torch.cat((x, h), -1)))
        reset, candidate, update = gates.chunk(3, -1)
        candidate = (reset.sigmoid() * candidate).tanh()
        return h + (update - 1).sigmoid() * (candidate - h)


class RSSM(nn.Module):
    """Transition model (prior) and representation model (posterior).

    Args:
        action_size: A.
        embed_size: E, size of the encoder's output.
        stoch: number of the variables of z (30 in DreamerV1, 32 in V2 and V3).
        deter: size of h (200 in DreamerV1).
        hidden: units of the dense layers between them (200 in DreamerV1).
        latent: "gaussian", or "categorical", which makes z one-hot vectors.
        classes: of each categorical variable (32 in DreamerV2 and V3).
        min_std: added to the softplus of the standard deviations of Gaussians.
        layer_norm: dense layers are Linear, LayerNorm, SiLU instead of Linear, ELU, and the GRU is
            `NormGRUCell`, as in DreamerV2 and V3.
    """

    def __init__(
        self,
        action_size: int,
        embed_size: int,
        *,
        stoch: int,
        deter: int,
        hidden: int,
        latent: LatentKind = "gaussian",
        classes: int = 32,
        min_std: float = 0.1,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.latents: Latents = (
            GaussianLatents(stoch, min_std)
            if latent == "gaussian"
            else CategoricalLatents(stoch, classes)
        )
        self.stoch_size, self.deter_size = self.latents.size, deter
        self.input_layer = Linear(self.stoch_size + action_size, hidden)
        self.cell = NormGRUCell(hidden, deter) if layer_norm else GRUCell(hidden, deter)
        self.prior_hidden = Linear(deter, hidden)
        self.prior_out = Linear(hidden, self.latents.outputs)
        self.posterior_hidden = Linear(deter + embed_size, hidden)
        self.posterior_out = Linear(hidden, self.latents.outputs)
        self.input_activation, self.prior_activation, self.posterior_activation = (
            nn.Sequential(LayerNorm(hidden), nn.SiLU()) if layer_norm else nn.ELU()
            for _ in range(3)
        )

    @property
    def feature_size(self) -> int:
        """Size of `State.features`."""
        return self.stoch_size + self.deter_size

    def initial(self, n: int) -> State:
        """The initial state of n sequences, which is zero."""
        weight = self.prior_out.weight
        return State(weight.new_zeros(n, self.deter_size), weight.new_zeros(n, self.stoch_size))

    def recur(self, state: State, action: Tensor) -> Tensor:
        """h_t [N, deter] from the previous state and action."""
        x = self.input_activation(self.input_layer(torch.cat((state.stoch, action), -1)))
        deter: Tensor = self.cell(x, state.deter)
        return deter

    def prior(self, deter: Tensor) -> Distribution:
        """p(z_t | h_t), from h_t [..., deter]."""
        return self.latents(self.prior_out(self.prior_activation(self.prior_hidden(deter))))

    def posterior(self, deter: Tensor, embed: Tensor) -> Distribution:
        """q(z_t | h_t, o_t), from h_t [..., deter] and the embedding of o_t [..., E]."""
        x = torch.cat((deter, embed), -1)
        hidden = self.posterior_activation(self.posterior_hidden(x))
        return self.latents(self.posterior_out(hidden))

    def observe(
        self, embeds: Tensor, actions: Tensor, is_first: Tensor, noise: Tensor
    ) -> tuple[State, Distribution, Distribution]:
        """Filter sequences with differentiable samples of the posterior.

        Args:
            embeds: [T, B, E] embeddings of the observations.
            actions: [T, B, A], each the action taken before the observation.
            is_first: [T, B] bool; the state and action before such a step count as zero.
            noise: [T, B, ...] of the posteriors' samples, from `latents.noise`.
        Returns:
            Posterior states, priors and posteriors, each [T, B, ...].
        """
        # The embedding's part of the posterior is not recurrent: one product for all steps.
        weight = self.posterior_hidden.weight
        from_embed = fast_linear(
            embeds, weight[:, self.deter_size :].contiguous(), self.posterior_hidden.bias
        )
        from_deter = weight[:, : self.deter_size].T
        keep = (~is_first).to(embeds.dtype).unsqueeze(-1)
        state = self.initial(embeds.shape[1])
        states, posteriors = [], []
        for t, inputs in enumerate(from_embed.unbind(0)):
            state = State(state.deter * keep[t], state.stoch * keep[t])
            deter = self.recur(state, actions[t] * keep[t])
            hidden = self.posterior_activation(torch.addmm(inputs, deter, from_deter))
            posterior = self.latents(self.posterior_out(hidden))
            state = State(deter, posterior.sample(noise[t]))
            states.append(state)
            posteriors.append(posterior)
        filtered: State = stack(states)
        return filtered, self.prior(filtered.deter), stack(posteriors)
