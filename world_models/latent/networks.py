"""Networks of DreamerV1: multi-layer perceptron, and the encoders and decoders of observations.

Architecture and initialisation follow danijar/dreamer (Hafner et al. 2020, App. A): Glorot-uniform
weights, zero biases. Images are [..., C, 64, 64] in the loader's uint8; nothing here knows time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from totalprop.world_models.latent.linear import Linear, fast_linear

IMAGE_SIZE = 64  # what four VALID convolutions of kernel 4 and stride 2 bring to 2 x 2
CPU_CHUNK = 125  # images whose activations stay in a cache; measured with totalprop bench dreamer


def initialise(module: nn.Module) -> None:
    """Keras's defaults, which the reference relies on: Glorot-uniform, orthogonal, zeros."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.GRUCell):
            nn.init.xavier_uniform_(part.weight_ih)
            nn.init.orthogonal_(part.weight_hh)
            nn.init.zeros_(part.bias_ih)
            nn.init.zeros_(part.bias_hh)


def mlp(inputs: int, width: int, layers: int, outputs: int) -> nn.Sequential:
    """`layers` hidden layers of `width` with ELU, then a linear one."""
    parts: list[nn.Module] = []
    for i in range(layers):
        parts += [Linear(width if i else inputs, width), nn.ELU()]
    return nn.Sequential(*parts, Linear(width if layers else inputs, outputs))


class ImageEncoder(nn.Module):
    """Four convolutions, kernel 4, stride 2, ReLU: [..., C, 64, 64] uint8 -> [..., 32 depth].

    Args:
        channels: of the image. depth: feature maps of the first layer, doubled by each (32).
    """

    def __init__(self, channels: int, *, depth: int) -> None:
        super().__init__()
        sizes = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size=4, stride=2) for a, b in pairwise(sizes)
        )
        self.outputs = 2 * 2 * 8 * depth

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(0, -4)
        embeds = [self._encode(flat[rows]) for rows in _chunks(flat)]
        return torch.cat(embeds).unflatten(0, images.shape[:-3])

    def _encode(self, images: Tensor) -> Tensor:
        x = _for_convolution(normalise(images))
        for layer in self.layers:
            x = layer(x).relu()
        return x.flatten(1)


class ImageDecoder(nn.Module):
    """Dense, then four transposed convolutions of stride 2: features -> [..., C, 64, 64].

    The output is the mean of a Gaussian of unit variance over pixels in [-0.5, 0.5].
    """

    def __init__(self, features: int, channels: int, *, depth: int) -> None:
        super().__init__()
        self.dense = Linear(features, 32 * depth)
        self.first = nn.ConvTranspose2d(32 * depth, 4 * depth, kernel_size=5, stride=2)
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(4 * depth, 2 * depth, kernel_size=5, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * depth, depth, kernel_size=6, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(depth, channels, kernel_size=6, stride=2),
        )

    def forward(self, features: Tensor) -> Tensor:
        flat = features.flatten(0, -2)
        images = [self._decode(flat[rows]) for rows in _chunks(flat)]
        return torch.cat(images).unflatten(0, features.shape[:-1])

    def _decode(self, features: Tensor) -> Tensor:
        # On a 1 x 1 input a transposed convolution is a matrix product, and much faster as one.
        weight, bias = self.first.weight, self.first.bias
        x = fast_linear(self.dense(features), weight.flatten(1).T, None)
        x = x.unflatten(1, weight.shape[1:])
        assert bias is not None
        x = _for_convolution((x + bias.view(-1, 1, 1)).relu())
        images: Tensor = self.layers(x)
        return images

    def log_prob(self, features: Tensor, images: Tensor) -> Tensor:
        """Σ over all pixels of log N(image; mean, 1), summed over the batch: a scalar."""
        features, images = features.flatten(0, -2), images.flatten(0, -4)
        total = features.new_zeros(())
        for rows in _chunks(features):
            error = at_least_float32(self._decode(features[rows])) - normalise(images[rows])
            total = total - 0.5 * error.square().sum()
        return total - 0.5 * math.log(2 * math.pi) * images.numel()


class VectorEncoder(nn.Module):
    """Perceptron: [..., S] -> [..., width]."""

    def __init__(self, size: int, *, width: int, layers: int = 2) -> None:
        super().__init__()
        self.net = mlp(size, width, layers, width)
        self.outputs = width

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(symlog(observations.float())).relu()


class VectorDecoder(nn.Module):
    """Perceptron to the mean of a Gaussian over symlog(observation).

    Args:
        std: of that Gaussian. State entries vary by about 1 and few of them must compete with the
            free nats, where thousands of pixels need no help: 1 is for images.
    """

    def __init__(
        self, features: int, size: int, *, width: int, layers: int = 2, std: float = 1.0
    ) -> None:
        super().__init__()
        self.net = mlp(features, width, layers, size)
        self.std = std

    def forward(self, features: Tensor) -> Tensor:
        return symexp(self.net(features))

    def log_prob(self, features: Tensor, observations: Tensor) -> Tensor:
        """Σ over entries of log N(symlog(observation); mean, std), summed over the batch."""
        error = (at_least_float32(self.net(features)) - symlog(observations.float())) / self.std
        constant = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -0.5 * error.square().sum() - constant * error.numel()


def normalise(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float [-0.5, 0.5]."""
    return images.float() / 255 - 0.5


def at_least_float32(x: Tensor) -> Tensor:
    """Distributions and losses stay float32 where autocast runs the layers in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|): leaves small numbers, tames velocities. Hafner et al. 2023, Eq. 9."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """Inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


def _for_convolution(x: Tensor) -> Tensor:
    """Channels last on a CPU, where oneDNN then takes half the time; as it is on a GPU."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def _chunks(batch: Tensor) -> Iterator[slice]:
    """Row slices. Convolutions of small batches keep their activations in a CPU's cache."""
    n = len(batch)
    size = CPU_CHUNK if batch.device.type == "cpu" else n
    return (slice(i, i + size) for i in range(0, n, max(size, 1)))
