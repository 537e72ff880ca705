"""Heads that predict a number from features: a Gaussian's mean, or a two-hot distribution.

The rewards of one task may be 1 and those of another 1000, and returns are larger still. A squared
error then needs another step size for every task, and a rare large target moves the whole network.
A two-hot head instead classifies the number into bins, whose gradient does not depend on the size
of the number (Hafner et al. 2023, DreamerV3).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from totalprop.world_models.latent.networks import at_least_float32, mlp, symexp

N_BINS = 255
LARGEST = 20.0  # symlog of the outermost bins, ± 4.9e8

HeadKind = Literal["gaussian", "two-hot"]


class ScalarHead(nn.Sequential):
    """A perceptron that predicts a number.

    - "gaussian": the mean of a Gaussian of unit variance, as in DreamerV1.
    - "two-hot": logits over 255 bins, symexp(-20 ... 20), whose expectation is the prediction. The
      last layer starts at zero, so that the first predictions are exactly 0.

    Args:
        inputs: size F of the features.
        width: units of each hidden layer.
        layers: number of hidden layers.
        kind: "gaussian" or "two-hot".
        layer_norm: as in `mlp`.
    """

    bins: Tensor

    def __init__(
        self,
        inputs: int,
        width: int,
        layers: int,
        *,
        kind: HeadKind = "gaussian",
        layer_norm: bool = False,
    ) -> None:
        outputs = 1 if kind == "gaussian" else N_BINS
        super().__init__(*mlp(inputs, width, layers, outputs, layer_norm=layer_norm))
        self.kind = kind
        if kind == "two-hot":
            self.register_buffer("bins", symexp_bins(), persistent=False)

    def zero_last_layer(self) -> None:
        """Start a two-hot head at predictions of 0; call it after the initialisation."""
        if self.kind == "two-hot":
            last = self[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """The distribution's parameters, [..., F] -> [..., 1 or 255], at least float32."""
        return at_least_float32(super().forward(features))

    def mean(self, out: Tensor) -> Tensor:
        """The predicted number, from `forward`'s output [..., 1 or 255] -> [...]."""
        if self.kind == "gaussian":
            return out.squeeze(-1)
        mean: Tensor = _Mean.apply(out, self.bins)
        return mean

    def loss(self, out: Tensor, *targets: Tensor) -> Tensor:
        """Negative log-likelihood, up to the constant of the Gaussian, ½ log 2π.

        Args:
            out: [..., 1 or 255] output of `forward`.
            *targets: [...] each, no gradient flows; their losses are added.

        Returns:
            [...] losses.
        """
        if self.kind == "gaussian":
            errors = [out.squeeze(-1) - target for target in targets]
            return torch.stack([0.5 * error.square() for error in errors]).sum(0)
        beside = [bins_beside(target, self.bins) for target in targets]
        index, weight = (torch.cat(parts, -1) for parts in zip(*beside))
        losses: Tensor = _CrossEntropy.apply(out, index, weight)
        return losses


def symexp_bins(n: int = N_BINS, largest: float = LARGEST) -> Tensor:
    """[n] bins symexp(linspace(-largest, largest)), exactly symmetric about 0 (n is odd)."""
    positive = symexp(torch.linspace(0, largest, n // 2 + 1, dtype=torch.float64)[1:]).float()
    return torch.cat((-positive.flip(0), torch.zeros(1), positive))


def bins_beside(x: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Two-hot encoding: the bins beside each number, weighted so that the mean is the number.

    Hafner et al. 2023, Eq. 10. Numbers outside the bins count as the outermost.

    Args:
        x: [...] numbers, through which no gradient flows.
        bins: [K] ascending.

    Returns:
        The indices of the bins below and above, and their probabilities, [..., 2] each.
    """
    x = x.detach().clamp(bins[0], bins[-1])
    above = torch.searchsorted(bins, x.contiguous(), right=True).clamp(1, len(bins) - 1)
    low, high = bins[above - 1], bins[above]
    weight = (x - low) / (high - low)
    return torch.stack((above - 1, above), -1), torch.stack((1 - weight, weight), -1)


def two_hot_mean(probabilities: Tensor, bins: Tensor) -> Tensor:
    """Σ p_i b_i, [..., K] -> [...], summed in pairs of opposite bins.

    Symmetric probabilities then give exactly 0, where the outermost bins, ± 4.9e8, would otherwise
    leave round-off far larger than most rewards.
    """
    half = len(bins) // 2
    difference = probabilities[..., half + 1 :] - probabilities[..., :half].flip(-1)
    with torch.autocast(bins.device.type, enabled=False):  # would round both to bfloat16
        return difference @ bins[half + 1 :]


# Imagination evaluates two heads in thousands of states, where tensors of 255 columns are a third
# of an update's time. The two functions below write as few of them as they can.


class _Mean(torch.autograd.Function):
    """`two_hot_mean` of softmax(logits)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, bins: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        mean = two_hot_mean(probabilities, bins)
        ctx.save_for_backward(probabilities, mean, bins)
        return mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        probabilities, mean, bins = ctx.saved_tensors
        return (bins - mean.unsqueeze(-1)).mul_(probabilities).mul_(g.unsqueeze(-1)), None


class _CrossEntropy(torch.autograd.Function):
    """-Σ_j weight_j log softmax(logits)[index_j], from [..., K] and [..., J] -> [...]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        log_probabilities = logits.log_softmax(-1)
        ctx.save_for_backward(log_probabilities, index, weight)
        return -(log_probabilities.gather(-1, index) * weight).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        log_probabilities, index, weight = ctx.saved_tensors
        g = g.unsqueeze(-1)
        gradient = log_probabilities.exp().mul_(g * weight.sum(-1, keepdim=True))
        return gradient.scatter_add_(-1, index, -g * weight), None, None
