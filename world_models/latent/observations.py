"""Observations of several entries: images, vectors and choices in a dictionary.

They are joined as in DreamerV3. Images are stacked by channel and share one stack of convolutions,
vectors and one-hot choices share one perceptron, and the two embeddings are concatenated. The
decoder mirrors this, with a Gaussian for each pixel and number and a categorical distribution for
each choice: log p(o | s) is their sum. Hafner et al. 2023 (DreamerV3); danijar/dreamerv3,
rssm.Encoder and rssm.Decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from totalprop.world_models.latent.networks import (
    ImageDecoder,
    ImageEncoder,
    VectorDecoder,
    VectorEncoder,
    at_least_float32,
    symexp,
)


@dataclass(frozen=True)
class Choices:
    """Entry of M whole numbers, of which number m is one of 0 ... sizes[m] - 1."""

    sizes: tuple[int, ...]


Entry = tuple[int, ...] | Choices  # shape of an image [C, 64, 64] or of a vector [S], or choices
Observation = Tensor | dict[str, Tensor]  # one image or vector, or a dictionary of entries


class Joined(NamedTuple):
    """The entries of a dictionary by kind; None where there are none of a kind."""

    image: Tensor | None  # [..., C, 64, 64], all images stacked by channel
    vector: Tensor | None  # [..., S], all vectors
    choices: Tensor | None  # [..., M], all choices


class Entries:
    """The entries of a dictionary, and where each of them is in `Joined`.

    Entries are joined in the order of their names, as in DreamerV3.

    Args:
        entries: name -> its shape or `Choices`.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        kinds: tuple[dict[str, int], ...] = ({}, {}, {})
        self.images, self.vectors, self.choices = kinds  # name -> channels, numbers, choices
        sizes: list[int] = []
        for name, entry in sorted(entries.items()):
            if isinstance(entry, Choices):
                self.choices[name] = len(entry.sizes)
                sizes += entry.sizes
            else:
                of_kind = self.images if len(entry) == 3 else self.vectors
                of_kind[name] = entry[0]
        self.n_channels, self.n_numbers = sum(self.images.values()), sum(self.vectors.values())
        self.sizes = tuple(sizes)  # of all choices

    def join(self, observations: Mapping[str, Tensor]) -> Joined:
        """Concatenate the entries [..., *shape] of each kind; vectors become float64."""
        return Joined(
            _cat([observations[name] for name in self.images], -3),
            _cat([observations[name].double() for name in self.vectors], -1),
            _cat([observations[name].long() for name in self.choices], -1),
        )

    def split(self, joined: Joined) -> dict[str, Tensor]:
        """The inverse of `join`, up to the dtype."""
        found: dict[str, Tensor] = {}
        kinds = ((self.images, -3), (self.vectors, -1), (self.choices, -1))
        for part, (sizes, axis) in zip(joined, kinds, strict=True):
            if part is not None:
                found |= zip(sizes, part.split(list(sizes.values()), axis), strict=True)
        return found


class Categories(nn.Module):
    """One-hot codes of M choices, and M softmaxes over K = Σ sizes logits.

    Args:
        sizes: number of options of each choice.
    """

    first: Tensor  # [M] position in K of each choice's first option
    options: Tensor  # [M, most options] positions of all, K where there are fewer

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        counts, self.total = torch.tensor(sizes), sum(sizes)
        first = counts.cumsum(0) - counts
        steps = torch.arange(max(sizes))
        options = torch.where(steps < counts[:, None], first[:, None] + steps, self.total)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("options", options, persistent=False)

    def one_hot(self, choices: Tensor) -> Tensor:
        """[..., M] -> [..., K] float32, of which M are 1."""
        zeros = torch.zeros(*choices.shape[:-1], self.total, device=choices.device)
        return zeros.scatter(-1, choices + self.first, 1.0)

    def log_prob(self, logits: Tensor, choices: Tensor) -> Tensor:
        """Log-probability of each choice, [..., K] and [..., M] -> [..., M]."""
        log_probs = self._padded(logits).log_softmax(-1)
        return log_probs.gather(-1, choices.unsqueeze(-1)).squeeze(-1)

    def most_likely(self, logits: Tensor) -> Tensor:
        """[..., K] -> [..., M]."""
        return self._padded(logits).argmax(-1)

    def _padded(self, logits: Tensor) -> Tensor:
        """[..., M, most options] logits, -∞ where a choice has fewer."""
        nothing = torch.full_like(logits[..., :1], -torch.inf)
        return torch.cat((logits, nothing), -1)[..., self.options]


class DictEncoder(nn.Module):
    """Embeds the entries of a dictionary, `Joined` [..., *shape] -> [..., E].

    Args:
        entries: what is joined.
        width: units of the perceptron, see `VectorEncoder`.
        conv_depth: feature maps of the first convolution, see `ImageEncoder`.
        layer_norm: as in `mlp`.
    """

    def __init__(
        self, entries: Entries, *, width: int, conv_depth: int, layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.categories = Categories(entries.sizes) if entries.sizes else None
        numbers = entries.n_numbers + sum(entries.sizes)
        self.vector = (
            VectorEncoder(numbers, width=width, layer_norm=layer_norm) if numbers else None
        )
        self.image = (
            ImageEncoder(entries.n_channels, depth=conv_depth, layer_norm=layer_norm)
            if entries.n_channels
            else None
        )
        self.outputs = sum(part.outputs for part in (self.vector, self.image) if part is not None)

    def forward(self, observations: Joined) -> Tensor:
        image, vector, choices = observations
        embeds = []
        if self.vector is not None:
            one_hot = None
            if self.categories is not None:
                assert choices is not None
                one_hot = self.categories.one_hot(choices)
            embeds.append(self.vector(vector, one_hot))
        if self.image is not None:
            assert image is not None
            embeds.append(self.image(image))
        return embeds[0] if len(embeds) == 1 else torch.cat(embeds, -1)


class DictDecoder(nn.Module):
    """Predicts the entries of a dictionary from features [..., F].

    Args:
        features: F.
        entries: what is predicted.
        width: units of the perceptron, see `VectorDecoder`.
        conv_depth: as in `ImageDecoder`.
        std: standard deviation of the Gaussian of vectors.
        learn_std: as in `VectorDecoder`.
        image_std: standard deviation of the Gaussian of images.
        layer_norm: as in `mlp`.
    """

    def __init__(
        self,
        features: int,
        entries: Entries,
        *,
        width: int,
        conv_depth: int,
        std: float = 1.0,
        image_std: float = 1.0,
        learn_std: bool = False,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.n_numbers = entries.n_numbers
        self.categories = Categories(entries.sizes) if entries.sizes else None
        numbers = entries.n_numbers + sum(entries.sizes)
        self.vector = (
            VectorDecoder(
                features,
                numbers,
                width=width,
                std=std,
                learn_std=learn_std and entries.n_numbers > 0,
                numbers=entries.n_numbers,
                layer_norm=layer_norm,
            )
            if numbers
            else None
        )
        self.image = (
            ImageDecoder(
                features,
                entries.n_channels,
                depth=conv_depth,
                std=image_std,
                layer_norm=layer_norm,
            )
            if entries.n_channels
            else None
        )

    def forward(self, features: Tensor) -> Joined:
        """Means of images and vectors, and the most likely choices."""
        image = None if self.image is None else self.image(features)
        vector = choices = None
        if self.vector is not None:
            numbers, logits = self._heads(self.vector, features)
            vector = symexp(numbers) if self.n_numbers else None
            choices = None if self.categories is None else self.categories.most_likely(logits)
        return Joined(image, vector, choices)

    def log_prob(
        self, features: Tensor, observations: Joined, decoded: Tensor | None = None
    ) -> Tensor:
        """[] log p(o | s), summed over all entries and the batch.

        Args:
            features: [..., F].
            observations: [..., *shape] of each kind; vectors less their offset.
            decoded: [M] the images to decode, see `ImageDecoder.log_prob`.
        """
        image, vector, choices = observations
        terms = []
        if self.vector is not None:
            numbers, logits = self._heads(self.vector, features)
            if vector is not None:
                terms.append(self.vector.log_prob_of(numbers, vector))
            if self.categories is not None:
                assert choices is not None
                terms.append(self.categories.log_prob(logits, choices).sum())
        if self.image is not None:
            assert image is not None
            terms.append(self.image.log_prob(features, image, decoded))
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum()

    def _heads(self, vector: VectorDecoder, features: Tensor) -> tuple[Tensor, Tensor]:
        """Means over symlog(vector) [..., S], and logits of the choices [..., K]."""
        out = at_least_float32(vector.net(features))
        return out[..., : self.n_numbers], out[..., self.n_numbers :]


def _cat(parts: list[Tensor], axis: int) -> Tensor | None:
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
