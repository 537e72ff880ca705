"""Networks of DreamerV1: multi-layer perceptron, and the encoders and decoders of observations.

Architecture and initialisation follow danijar/dreamer (Hafner et al. 2020, App. A): Glorot-uniform
weights, zero biases. Images are [..., C, 64, 64] in the loader's uint8; nothing here knows time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

IMAGE_SIZE = 64  # what four VALID convolutions of kernel 4 and stride 2 bring to 2 x 2
CPU_CHUNK = 50  # images whose activations stay in the cache; see `_chunks`


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
        parts += [nn.Linear(width if i else inputs, width), nn.ELU()]
    return nn.Sequential(*parts, nn.Linear(width if layers else inputs, outputs))


class ImageEncoder(nn.Module):
    """Four convolutions, kernel 4, stride 2, ReLU: [..., C, 64, 64] uint8 -> [..., 32 depth].

    Args:
        channels: of the image. depth: feature maps of the first layer, doubled by each (32).
    """

    def __init__(self, channels: int, *, depth: int = 32) -> None:
        super().__init__()
        sizes = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size=4, stride=2)
            for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.outputs = 2 * 2 * 8 * depth

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(0, -4)
        embeds = [self._encode(flat[rows]) for rows in _chunks(flat)]
        return torch.cat(embeds).unflatten(0, images.shape[:-3])

    def _encode(self, images: Tensor) -> Tensor:
        x = normalise(images)
        for layer in self.layers:
            x = layer(x).relu()
        return x.flatten(1)


class ImageDecoder(nn.Module):
    """Dense to 32 depth, then four transposed convolutions 5, 5, 6, 6: features -> [..., C, 64, 64].

    The output is the mean of a Gaussian of unit variance over pixels in [-0.5, 0.5].
    """

    def __init__(self, features: int, channels: int, *, depth: int = 32) -> None:
        super().__init__()
        self.dense = nn.Linear(features, 32 * depth)
        sizes, kernels = [32 * depth, 4 * depth, 2 * depth, depth, channels], [5, 5, 6, 6]
        self.layers = nn.ModuleList(
            nn.ConvTranspose2d(a, b, kernel_size=k, stride=2)
            for a, b, k in zip(sizes[:-1], sizes[1:], kernels, strict=True)
        )

    def forward(self, features: Tensor) -> Tensor:
        flat = features.flatten(0, -2)
        images = [self._decode(flat[rows]) for rows in _chunks(flat)]
        return torch.cat(images).unflatten(0, features.shape[:-1])

    def _decode(self, features: Tensor) -> Tensor:
        first, *rest = self.layers
        x = self.dense(features)
        # On a 1 x 1 input a transposed convolution is a matrix product, and much faster as one.
        x = (x @ first.weight.flatten(1)).unflatten(1, first.weight.shape[1:])
        x = (x + first.bias.view(-1, 1, 1)).relu()
        for i, layer in enumerate(rest, 1):
            x = layer(x)
            if i < len(rest):
                x = x.relu()
        return x

    def log_prob(self, features: Tensor, images: Tensor) -> Tensor:
        """Σ over all pixels of log N(image; mean, 1), summed over the batch: a scalar."""
        features, images = features.flatten(0, -2), images.flatten(0, -4)
        total = features.new_zeros(())
        for rows in _chunks(features):
            error = self._decode(features[rows]) - normalise(images[rows])
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
        error = (self.net(features) - symlog(observations.float())) / self.std
        constant = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return -0.5 * error.square().sum() - constant * error.numel()


def normalise(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float [-0.5, 0.5]."""
    return images.float() / 255 - 0.5


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|): leaves small numbers, tames velocities. Hafner et al. 2023, Eq. 9."""
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """Inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


def _chunks(batch: Tensor) -> Iterator[slice]:
    """Row slices. Convolutions of small batches keep their activations in a CPU's cache."""
    n = len(batch)
    size = CPU_CHUNK if batch.device.type == "cpu" else n
    return (slice(i, i + size) for i in range(0, n, max(size, 1)))
