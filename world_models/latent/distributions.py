"""Distributions of the RSSM's stochastic state z: Gaussians (DreamerV1) or categoricals (V2, V3).

A `Distribution` is a named tuple of its parameters. `GaussianLatents` and `CategoricalLatents` make
one from the output of a network, and draw the noise that its samples are a function of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from totalprop.world_models.latent.networks import at_least_float32

LatentKind = Literal["gaussian", "categorical"]
UNIFORM = 0.01  # share of the uniform distribution in a categorical


class Distribution(Protocol):
    """A distribution of z, which is [..., Z]."""

    @property
    def zeta(self) -> tuple[Tensor, Tensor | None]:
        """Its parameters as an `Estimator` takes them: (mean, std), or (logits, None)."""
        ...

    @property
    def mean(self) -> Tensor:
        """[..., Z] the mean."""
        ...

    @property
    def mode(self) -> Tensor:
        """[..., Z] the most likely z, with which a policy acts that draws no random number."""
        ...

    def sample(self, noise: Tensor) -> Tensor:
        """[..., Z] a differentiable sample."""
        ...

    def kl(self, other: Any) -> Tensor:
        """KL(self || other) in nats, summed over the variables: [...]."""
        ...

    def detach(self) -> Any:
        """The same distribution, detached from the graph."""
        ...


class Gaussian(NamedTuple):
    """A diagonal Gaussian."""

    mean: Tensor  # [..., D]
    std: Tensor  # [..., D]

    @property
    def zeta(self) -> tuple[Tensor, Tensor]:
        """(mean, std)."""
        return self.mean, self.std

    @property
    def mode(self) -> Tensor:
        """[..., D] the mean."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std·noise, from standard normal noise [..., D]."""
        return self.mean + self.std * noise

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other), [..., D] -> [...]."""
        ratio = (self.std / other.std).square()
        distance = ((self.mean - other.mean) / other.std).square()
        return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)

    def detach(self) -> Gaussian:
        """The same distribution, detached from the graph."""
        return Gaussian(self.mean.detach(), self.std.detach())


class Categorical(NamedTuple):
    """G independent categorical variables of C classes; z holds them as one-hot vectors, flat."""

    logits: Tensor  # [..., G, C] log-probabilities

    @property
    def zeta(self) -> tuple[Tensor, None]:
        """(logits, None)."""
        return self.logits, None

    @property
    def mean(self) -> Tensor:
        """[..., G C] the probabilities."""
        return self.logits.exp().flatten(-2)

    @property
    def mode(self) -> Tensor:
        """[..., G C] the most likely class of each variable, one-hot."""
        return self._one_hot(self.logits)

    def sample(self, noise: Tensor) -> Tensor:
        """[..., G C] one-hot argmax of logits + Gumbel noise [..., G, C], straight-through.

        Its gradient is that of the probabilities (Bengio et al. 2013; Hafner et al. 2021, Alg. 1).
        """
        probabilities = self.mean
        return self._one_hot(self.logits + noise) + (probabilities - probabilities.detach())

    def kl(self, other: Categorical) -> Tensor:
        """KL(self || other), summed over the variables: [..., G, C] -> [...]."""
        return (self.logits.exp() * (self.logits - other.logits)).sum((-2, -1))

    def detach(self) -> Categorical:
        """The same distribution, detached from the graph."""
        return Categorical(self.logits.detach())

    def _one_hot(self, scores: Tensor) -> Tensor:
        classes = scores.shape[-1]
        return one_hot(scores.argmax(-1), classes).to(self.logits.dtype).flatten(-2)


@dataclass(frozen=True)
class GaussianLatents:
    """z of D Gaussian coordinates.

    Attributes:
        stoch: D.
        min_std: added to the softplus of the standard deviations.
    """

    stoch: int
    min_std: float = 0.1
    kind: ClassVar[LatentKind] = "gaussian"

    @property
    def size(self) -> int:
        """Z, the size of z."""
        return self.stoch

    @property
    def outputs(self) -> int:
        """Outputs of the network that the distribution is made from."""
        return 2 * self.stoch

    def __call__(self, out: Tensor) -> Gaussian:
        """The distribution, from the network's output [..., 2 D]."""
        mean, raw = at_least_float32(out).chunk(2, -1)
        return Gaussian(mean, softplus(raw) + self.min_std)

    def noise(
        self, *batch: int, generator: torch.Generator | None, device: torch.device | None = None
    ) -> Tensor:
        """[*batch, D] standard normal; the device is the generator's unless it is given."""
        device = generator.device if device is None and generator is not None else device
        return torch.randn((*batch, self.stoch), generator=generator, device=device)


@dataclass(frozen=True)
class CategoricalLatents:
    """z of G categorical variables, see `log_probabilities`.

    Attributes:
        stoch: G.
        classes: C.
    """

    stoch: int
    classes: int
    kind: ClassVar[LatentKind] = "categorical"

    @property
    def size(self) -> int:
        """Z, the size of z."""
        return self.stoch * self.classes

    @property
    def outputs(self) -> int:
        """Outputs of the network that the distribution is made from."""
        return self.size

    def __call__(self, out: Tensor) -> Categorical:
        """The distribution, from the network's output [..., G C]."""
        raw = at_least_float32(out).unflatten(-1, (self.stoch, self.classes))
        return Categorical(log_probabilities(raw))

    def noise(
        self, *batch: int, generator: torch.Generator | None, device: torch.device | None = None
    ) -> Tensor:
        """[*batch, G, C] Gumbel noise; the device is the generator's unless it is given."""
        device = generator.device if device is None and generator is not None else device
        return gumbel((*batch, self.stoch, self.classes), generator, device)


Latents = GaussianLatents | CategoricalLatents


def log_probabilities(raw: Tensor) -> Tensor:
    """log(0.99 softmax(raw) + 0.01 / C), [..., C]: 1 % is the uniform distribution.

    No probability then vanishes, and scores and KL divergences stay bounded. Hafner et al. 2023
    (DreamerV3), Sec. "World model learning".
    """
    return ((1 - UNIFORM) * raw.softmax(-1) + UNIFORM / raw.shape[-1]).log()


def gumbel(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device | None
) -> Tensor:
    """Gumbel noise: the argmax of log-probabilities plus it is a sample."""
    return -torch.empty(tuple(shape), device=device).exponential_(generator=generator).log()


def stack(tuples: Sequence[Any]) -> Any:
    """Stack named tuples of tensors, one for each step, along a new first axis."""
    return type(tuples[0])(*(torch.stack(column) for column in zip(*tuples, strict=True)))
