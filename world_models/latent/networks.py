"""Networks of DreamerV1: multi-layer perceptron, and encoders and decoders of observations.

Architecture and initialisation (Glorot-uniform weights, zero biases) follow danijar/dreamer and
Hafner et al. 2020, App. A. Images are [..., C, 64, 64] uint8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from totalprop.world_models.latent.convolution import FewChannelsConvTranspose2d, PatchConv2d
from totalprop.world_models.latent.linear import Linear, fast_linear

IMAGE_SIZE = 64  # four VALID convolutions with kernel 4 and stride 2 reduce it to 2 x 2
CPU_CHUNK = 125  # images whose activations fit into the cache; tuned with totalprop bench dreamer


def initialise(module: nn.Module) -> None:
    """Initialise as Keras does, like the reference: Glorot-uniform, orthogonal (GRU), zeros."""
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


def mlp(
    inputs: int, width: int, layers: int, outputs: int, *, layer_norm: bool = False
) -> nn.Sequential:
    """Make a perceptron with `layers` hidden layers and a linear output layer.

    Args:
        inputs: size of the input.
        width: units of each hidden layer.
        layers: number of hidden layers.
        outputs: size of the output.
        layer_norm: hidden layers are Linear, LayerNorm, SiLU (as in DreamerV3) instead of Linear,
            ELU (DreamerV1).
    """
    parts: list[nn.Module] = []
    for i in range(layers):
        parts.append(Linear(width if i else inputs, width))
        parts += [LayerNorm(width), nn.SiLU()] if layer_norm else [nn.ELU()]
    return nn.Sequential(*parts, Linear(width if layers else inputs, outputs))


class LayerNorm(nn.LayerNorm):
    """Layer norm with the epsilon of DreamerV2 and V3, in float32 where layers run in bfloat16."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=1e-3)


class ChannelNorm(LayerNorm):
    """Layer norm over the channels of images [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _activation(channels: int, layer_norm: bool) -> nn.Module:
    return nn.Sequential(ChannelNorm(channels), nn.SiLU()) if layer_norm else nn.ReLU()


class ImageEncoder(nn.Module):
    """Four convolutions, kernel 4, stride 2, ReLU: [..., C, 64, 64] uint8 -> [..., 32 depth].

    Args:
        channels: C.
        depth: feature maps of the first layer (32 in DreamerV1); every further layer doubles them.
        layer_norm: follow each convolution by layer norm over channels and SiLU instead of ReLU.
    """

    def __init__(self, channels: int, *, depth: int, layer_norm: bool = False) -> None:
        super().__init__()
        sizes = [channels, depth, 2 * depth, 4 * depth, 8 * depth]
        kinds = [nn.Conv2d, nn.Conv2d, nn.Conv2d, PatchConv2d]
        self.layers = nn.ModuleList(
            kind(a, b, kernel_size=4, stride=2) for kind, (a, b) in zip(kinds, pairwise(sizes))
        )
        self.activations = nn.ModuleList(_activation(size, layer_norm) for size in sizes[1:])
        self.outputs = 2 * 2 * 8 * depth

    def forward(self, images: Tensor) -> Tensor:
        flat = images.reshape(-1, *images.shape[-3:])
        embeds = [self._encode(flat[rows]) for rows in _chunks(flat)]
        return torch.cat(embeds).view(*images.shape[:-3], self.outputs)

    def _encode(self, images: Tensor) -> Tensor:
        x = _for_convolution(normalise(images))
        for layer, activation in zip(self.layers, self.activations, strict=True):
            x = activation(layer(x))
        return x.flatten(1)


class ImageDecoder(nn.Module):
    """A dense layer and four transposed convolutions, stride 2: [..., F] -> [..., C, 64, 64].

    The output is the mean of a Gaussian over pixels in [-0.5, 0.5].

    Args:
        features: F.
        channels: C.
        depth: as in `ImageEncoder`.
        std: standard deviation of the Gaussian of a pixel; 1 in DreamerV1.
        layer_norm: as in `ImageEncoder`.
    """

    def __init__(
        self,
        features: int,
        channels: int,
        *,
        depth: int,
        std: float = 1.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.std = std
        self.dense = Linear(features, 32 * depth)
        self.first = nn.ConvTranspose2d(32 * depth, 4 * depth, kernel_size=5, stride=2)
        self.activation = _activation(4 * depth, layer_norm)
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(4 * depth, 2 * depth, kernel_size=5, stride=2),
            _activation(2 * depth, layer_norm),
            nn.ConvTranspose2d(2 * depth, depth, kernel_size=6, stride=2),
            _activation(depth, layer_norm),
            FewChannelsConvTranspose2d(depth, channels, kernel_size=6),
        )

    def forward(self, features: Tensor) -> Tensor:
        flat = features.reshape(-1, features.shape[-1])
        images = torch.cat([self._decode(flat[rows]) for rows in _chunks(flat)])
        return images.view(*features.shape[:-1], *images.shape[1:])

    def _decode(self, features: Tensor) -> Tensor:
        # On a 1 x 1 input a transposed convolution is a matrix product, which is much faster.
        weight, bias = self.first.weight, self.first.bias
        x = fast_linear(self.dense(features), weight.flatten(1).T, None)
        x = x.unflatten(1, weight.shape[1:])
        assert bias is not None
        x = _for_convolution(self.activation(x + bias.view(-1, 1, 1)))
        images: Tensor = self.layers(x)
        return images

    def log_prob(self, features: Tensor, images: Tensor, decoded: Tensor | None = None) -> Tensor:
        """[] log N(image; mean, std), summed over pixels and batch.

        Args:
            features: [..., F].
            images: [..., C, 64, 64] uint8.
            decoded: [M] indices into the flattened batch, of the images to decode; the others count
                as these do on average. None decodes all.
        """
        features, images = features.flatten(0, -2), images.flatten(0, -4)
        n = len(images)
        if decoded is not None:
            features, images = features[decoded], images[decoded]
        total = features.new_zeros(())
        for rows in _chunks(features):
            error = at_least_float32(self._decode(features[rows])) - normalise(images[rows])
            total = total - 0.5 * error.square().sum()
        constant = math.log(self.std) + 0.5 * math.log(2 * math.pi)
        return (total / self.std**2 - constant * images.numel()) * (n / len(images))


class VectorEncoder(nn.Module):
    """Perceptron on symlog(observation), [..., S] -> [..., width].

    A one-hot code may follow the observation, or stand for it; `size` counts both.
    """

    def __init__(self, size: int, *, width: int, layers: int = 2, layer_norm: bool = False) -> None:
        super().__init__()
        self.net = mlp(size, width, layers, width, layer_norm=layer_norm)
        self.outputs = width

    def forward(self, observations: Tensor | None, one_hot: Tensor | None = None) -> Tensor:
        parts = [] if observations is None else [symlog(observations.float())]
        parts += [] if one_hot is None else [one_hot]
        return self.net(parts[0] if len(parts) == 1 else torch.cat(parts, -1)).relu()


# Of learned standard deviations: an entry that never varies would outweigh all others.
LEAST_STD = 0.03


class VectorDecoder(nn.Module):
    """Perceptron that predicts the mean of a Gaussian over symlog(observation).

    Args:
        features: F, size of the input.
        size: S, size of the observation.
        width: units of the hidden layers.
        layers: number of hidden layers.
        std: standard deviation of the Gaussian. Few entries, which vary by about 1, need less than
            1 to outweigh the free nats.
        learn_std: learn the standard deviation of each entry, from `std` on and above LEAST_STD.
            It ends near the error of the entry's prediction, so that no entry that cannot be
            predicted costs the others their precision (Rybkin et al. 2021, sigma-VAE).
        numbers: how many outputs, the first ones, are means; the caller knows what the others are.
            None for all of them.
        layer_norm: as in `mlp`.
    """

    def __init__(
        self,
        features: int,
        size: int,
        *,
        width: int,
        layers: int = 2,
        std: float = 1.0,
        learn_std: bool = False,
        numbers: int | None = None,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.net = mlp(features, width, layers, size, layer_norm=layer_norm)
        self.fixed_std, self.log_excess = std, None
        if learn_std:
            entries = size if numbers is None else numbers
            start = math.log(max(std - LEAST_STD, LEAST_STD))
            self.log_excess = nn.Parameter(torch.full((entries,), start))

    @property
    def std(self) -> Tensor | float:
        """The standard deviation, of each entry [S] if it is learned."""
        return self.fixed_std if self.log_excess is None else LEAST_STD + self.log_excess.exp()

    def forward(self, features: Tensor) -> Tensor:
        return symexp(self.net(features))

    def log_prob(self, features: Tensor, observations: Tensor) -> Tensor:
        """[] log N(symlog(observation); mean, std), summed over entries and batch.

        Args:
            features: [..., F].
            observations: [..., S].
        """
        return self.log_prob_of(at_least_float32(self.net(features)), observations)

    def log_prob_of(self, mean: Tensor, observations: Tensor) -> Tensor:
        """The same, from the predicted mean [..., S] of symlog(observation)."""
        std = self.std
        error = (mean - symlog(observations.float())) / std
        log_std = std.log().mean() if isinstance(std, Tensor) else math.log(std)
        constant = log_std + 0.5 * math.log(2 * math.pi)
        return -0.5 * error.square().sum() - constant * error.numel()


def normalise(images: Tensor) -> Tensor:
    """Scale pixels from uint8 in [0, 255] to float32 in [-0.5, 0.5]."""
    return images.float() / 255 - 0.5


def at_least_float32(x: Tensor) -> Tensor:
    """Cast to float32 at least, for distributions and losses when layers run in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|), which compresses large values such as velocities.

    Hafner et al. 2023 (DreamerV3), Eq. 9.
    """
    return x.sign() * x.abs().log1p()


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return x.sign() * x.abs().expm1()


def _for_convolution(x: Tensor) -> Tensor:
    """Convert to channels last on the CPU, which halves the time of oneDNN's convolutions."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def _chunks(batch: Tensor) -> Iterator[slice]:
    """Slices of rows; on a CPU, small batches keep the convolutions' activations in the cache."""
    if torch.compiler.is_exporting():  # of a symbolic size
        return iter([slice(None)])
    n = len(batch)
    size = CPU_CHUNK if batch.device.type == "cpu" else n
    return (slice(i, i + size) for i in range(0, max(n, 1), max(size, 1)))
