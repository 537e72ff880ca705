"""The recurrent state-space model (RSSM), with a deterministic and a Gaussian latent state.

    h_t = GRU(h_{t-1}, [z_{t-1}, a_{t-1}]),   prior p(z_t | h_t),   posterior q(z_t | h_t, o_t)

Hafner et al. 2019 (PlaNet), Sec. 3; sizes as in Hafner et al. 2020 (DreamerV1), danijar/dreamer.
Notation: deter = h and stoch = z; the features of a state are [stoch, deter].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, softplus

from totalprop.world_models.latent.linear import Linear, fast_linear
from totalprop.world_models.latent.networks import at_least_float32


class State(NamedTuple):
    """A latent state."""

    deter: Tensor  # [..., deter] h
    stoch: Tensor  # [..., stoch] z

    @property
    def features(self) -> Tensor:
        """[..., stoch + deter], the input of every head."""
        return torch.cat((self.stoch, self.deter), -1)

    def detach(self) -> State:
        """The same state, detached from the graph."""
        return State(self.deter.detach(), self.stoch.detach())


class Gaussian(NamedTuple):
    """A diagonal Gaussian."""

    mean: Tensor  # [..., D]
    std: Tensor  # [..., D]


class RSSM(nn.Module):
    """Transition model (prior) and representation model (posterior).

    Args:
        action_size: A.
        embed_size: E, size of the encoder's output.
        stoch: size of z (30 in DreamerV1).
        deter: size of h (200 in DreamerV1).
        hidden: units of the dense layers between them (200 in DreamerV1).
        min_std: added to the softplus of both standard deviations.
    """

    def __init__(
        self,
        action_size: int,
        embed_size: int,
        *,
        stoch: int,
        deter: int,
        hidden: int,
        min_std: float = 0.1,
    ) -> None:
        super().__init__()
        self.stoch_size, self.deter_size, self.min_std = stoch, deter, min_std
        self.input_layer = Linear(stoch + action_size, hidden)
        self.cell = nn.GRUCell(hidden, deter)
        self.prior_hidden = Linear(deter, hidden)
        self.prior_out = Linear(hidden, 2 * stoch)
        self.posterior_hidden = Linear(deter + embed_size, hidden)
        self.posterior_out = Linear(hidden, 2 * stoch)

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
        x = elu(self.input_layer(torch.cat((state.stoch, action), -1)))
        cell, h = self.cell, state.deter
        if h.device.type != "cpu":
            return cell(x, h)
        # The same as nn.GRUCell, which would not use oneDNN.
        reset_x, update_x, new_x = fast_linear(x, cell.weight_ih, cell.bias_ih).chunk(3, -1)
        reset_h, update_h, new_h = fast_linear(h, cell.weight_hh, cell.bias_hh).chunk(3, -1)
        reset, update = (reset_x + reset_h).sigmoid(), (update_x + update_h).sigmoid()
        candidate = torch.addcmul(new_x, reset, new_h).tanh()
        return candidate + update * (h - candidate)

    def prior(self, deter: Tensor) -> Gaussian:
        """p(z_t | h_t), from h_t [..., deter]."""
        return self._gaussian(self.prior_out(elu(self.prior_hidden(deter))))

    def posterior(self, deter: Tensor, embed: Tensor) -> Gaussian:
        """q(z_t | h_t, o_t), from h_t [..., deter] and the embedding of o_t [..., E]."""
        x = torch.cat((deter, embed), -1)
        return self._gaussian(self.posterior_out(elu(self.posterior_hidden(x))))

    def observe(
        self, embeds: Tensor, actions: Tensor, is_first: Tensor, noise: Tensor
    ) -> tuple[State, Gaussian, Gaussian]:
        """Filter sequences with reparameterised samples of the posterior.

        Args:
            embeds: [T, B, E] embeddings of the observations.
            actions: [T, B, A], each the action taken before the observation.
            is_first: [T, B] bool; the state and action before such a step count as zero.
            noise: [T, B, stoch] standard normal.
        Returns:
            Posterior states [T, B, ...], priors and posteriors [T, B, stoch].
        """
        # The embedding's part of the posterior is not recurrent: one product for all steps.
        weight = self.posterior_hidden.weight
        from_embed = fast_linear(
            embeds, weight[:, self.deter_size :].contiguous(), self.posterior_hidden.bias
        )
        from_deter = weight[:, : self.deter_size].T
        keep = (~is_first).to(embeds.dtype).unsqueeze(-1)
        state = self.initial(embeds.shape[1])
        columns: tuple[list[Tensor], ...] = ([], [], [], [])
        for t, inputs in enumerate(from_embed.unbind(0)):
            state = State(state.deter * keep[t], state.stoch * keep[t])
            deter = self.recur(state, actions[t] * keep[t])
            hidden = elu(torch.addmm(inputs, deter, from_deter))
            mean, std = self._gaussian(self.posterior_out(hidden))
            state = State(deter, mean + std * noise[t])
            for column, value in zip(columns, (*state, mean, std), strict=True):
                column.append(value)
        deter, stoch, mean, std = (torch.stack(column) for column in columns)
        return State(deter, stoch), self.prior(deter), Gaussian(mean, std)

    def _gaussian(self, out: Tensor) -> Gaussian:
        mean, raw = at_least_float32(out).chunk(2, -1)
        return Gaussian(mean, softplus(raw) + self.min_std)


def kl_divergence(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) of diagonal Gaussians, [..., D] -> [...]."""
    ratio = (p.std / q.std).square()
    distance = ((p.mean - q.mean) / q.std).square()
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)
