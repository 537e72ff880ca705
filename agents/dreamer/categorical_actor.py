"""The actor for Discrete and MultiDiscrete actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from totalprop.estimators import assign_credit
from totalprop.world_models.latent.distributions import gumbel, log_probabilities
from totalprop.world_models.latent.networks import at_least_float32, initialise, mlp

# (columns of zeta, mean or logits, std or None, noise, credit) -> sample, credit
ActionNode = Callable[[slice, Tensor, "Tensor | None", Tensor, Tensor], tuple[Tensor, Tensor]]


class ActorNetwork(nn.Module):
    """The layers of every actor; the last one is apart, since probes cover it alone.

    Args:
        features: width F of the state's features.
        outputs: K, size of the output.
        width: units of each hidden layer.
        layers: number of hidden layers.
        layer_norm: as in `mlp`.
    """

    def __init__(
        self, features: int, outputs: int, *, width: int, layers: int, layer_norm: bool
    ) -> None:
        super().__init__()
        *hidden, out = mlp(features, width, layers, outputs, layer_norm=layer_norm)
        self.hidden = nn.Sequential(*hidden)
        assert isinstance(out, nn.Linear)
        self.out = out
        initialise(self)

    def forward(self, features: Tensor) -> Tensor:
        """[..., K] raw outputs for `act`."""
        return self.output(self.hidden(features))

    def output(self, hidden: Tensor) -> Tensor:
        """The last layer, [..., width] -> [..., K]."""
        return at_least_float32(self.out(hidden))


class CategoricalActor(ActorNetwork):
    """A categorical policy for each choice, see `log_probabilities`.

    Actions are one-hot vectors, one after another.

    Args:
        features: width F of the state's features.
        sizes: number of options of each choice; they sum to A.
        width: units of each hidden layer.
        layers: number of hidden layers.
        layer_norm: as in `mlp`.
    """

    def __init__(
        self,
        features: int,
        sizes: Sequence[int],
        *,
        width: int,
        layers: int = 4,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(features, sum(sizes), width=width, layers=layers, layer_norm=layer_norm)
        self.sizes = list(sizes)

    def noise(self, n: int, *, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """[n, A] Gumbel noise for `act`."""
        return gumbel((n, sum(self.sizes)), generator, device)

    def zeta(self, raw: Tensor) -> tuple[Tensor]:
        """The parameters of the action's distributions: log-probabilities [..., A]."""
        return (torch.cat([log_probabilities(x) for x in raw.split(self.sizes, -1)], -1),)

    def act(self, raw: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """Action [..., A], one-hot, and the exact entropy [...] in nats; without noise, the mode.

        The action's gradient is straight-through, that of the probabilities, and biased (Bengio et
        al. 2013).
        """
        (log_p,) = self.zeta(raw)
        chosen = log_p if noise is None else log_p + noise
        one_hot = [
            (part.argmax(-1, keepdim=True) == torch.arange(n, device=raw.device)).to(raw.dtype)
            for n, part in zip(self.sizes, chosen.split(self.sizes, -1), strict=True)
        ]
        p = log_p.exp()
        return torch.cat(one_hot, -1) + (p - p.detach()), -(p * log_p).sum(-1)

    def act_at(
        self, node: ActionNode, raw: Tensor, noise: Tensor, credit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Like `act`, but each choice is a node.

        Args:
            node: draws a choice, see `ActionNode`.
            raw: [N, A] the network's outputs.
            noise: [N, A].
            credit: [N] of the node before.

        Returns:
            Action [N, A], its entropy [N], credited, and the credit [N] for all that follows.
        """
        (log_p,) = self.zeta(raw)
        # The entropy is exact: no node of this step has any influence on it.
        entropy = assign_credit(-(log_p.exp() * log_p).sum(-1), credit)
        samples, start = [], 0
        for n in self.sizes:
            own = slice(start, start + n)
            sample, credit = node(own, log_p[:, own], None, noise[:, own], credit)
            samples.append(sample)
            start += n
        return torch.cat(samples, -1), entropy, credit
