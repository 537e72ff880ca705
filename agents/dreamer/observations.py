"""What the world model sees, and the replay stores, of an environment's observations.

Images become [C, 64, 64], other arrays vectors, and Discrete, MultiDiscrete and MultiBinary entries
whole numbers from 0 on, which the world model encodes as one-hot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space_channels_first, maybe_transpose
from torch import Tensor

from totalprop.agents.core.spaces import FLATTEN, UnsupportedSpaceError, describe
from totalprop.agents.dreamer.resize import area_resize, area_resize_tensors
from totalprop.world_models.latent.networks import IMAGE_SIZE
from totalprop.world_models.latent.observations import Choices, Entry, Observation

ALONE = "observation"  # name of the entry, where observations are choices and no dictionary
Arrays = np.ndarray | dict[str, np.ndarray]


class ObservationForm:
    """Converts observations of a space to the form in which the world model sees them.

    Args:
        space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these.

    Attributes:
        entries: shape of an image or vector; otherwise name -> such a shape, or `Choices`.

    Raises:
        UnsupportedSpaceError: a Box may be an image, but not of uint8 in [0, 255].
    """

    def __init__(self, space: spaces.Space) -> None:
        self.space = space
        self._parts = (
            {name: _Part(space[name], name) for name in sorted(space)}
            if isinstance(space, spaces.Dict)
            else {ALONE: _Part(space)}
        )
        entries = {name: part.entry for name, part in self._parts.items()}
        self.is_plain = isinstance(space, spaces.Box)  # one array, and no dictionary
        self.entries: Any = entries[ALONE] if self.is_plain else entries

    @property
    def shapes(self) -> Any:
        """Shape of one stored observation, or name -> shape of each entry."""
        found = {name: part.shape for name, part in self._parts.items()}
        return found[ALONE] if self.is_plain else found

    @property
    def dtypes(self) -> Any:
        """Dtype of a stored observation, or name -> dtype of each entry."""
        found = {name: part.dtype for name, part in self._parts.items()}
        return found[ALONE] if self.is_plain else found

    @property
    def options(self) -> dict[str, tuple[int, ...]]:
        """Name -> number of options of each choice, for entries that are choices."""
        return {
            name: part.entry.sizes
            for name, part in self._parts.items()
            if isinstance(part.entry, Choices)
        }

    @property
    def has_images(self) -> bool:
        """Whether anything observed is an image."""
        return any(part.image for part in self._parts.values())

    def describe(self) -> str:
        """A sentence on the images that are resized; "" if none is."""
        resized = [
            f"{part.image[1]}x{part.image[2]}" + ("" if self.is_plain else f" ({name!r})")
            for name, part in self._parts.items()
            if part.is_resized
        ]
        if not resized:
            return ""
        return (
            f"images of {', '.join(resized)} are resized to {IMAGE_SIZE}x{IMAGE_SIZE} by averaging "
            "areas, without keeping their aspect ratio"
        )

    def __call__(self, observations: Any) -> Arrays:
        """Convert a batch [n, ...] as a VecEnv returns it.

        Raises:
            ValueError: an entry is missing, or a choice is none of its options.
        """
        found = {}
        for name, part in self._parts.items():
            if isinstance(self.space, spaces.Dict):
                if not isinstance(observations, Mapping) or name not in observations:
                    kind = type(observations).__name__
                    if isinstance(observations, Mapping):
                        kind = f"a dictionary of {', '.join(map(repr, observations)) or 'nothing'}"
                    raise ValueError(
                        f"the observation must be a dictionary of "
                        f"{', '.join(map(repr, self._parts))}, got {kind}"
                    )
                found[name] = part(np.asarray(observations[name]))
            else:
                found[name] = part(np.asarray(observations))
        return found[ALONE] if self.is_plain else found

    def one(self, observation: Any) -> Arrays:
        """Convert one observation, as `info["terminal_observation"]` holds it."""
        if isinstance(observation, Mapping):
            batch: Any = {name: np.asarray(part)[None] for name, part in observation.items()}
        else:
            batch = np.asarray(observation)[None]
        return first(self(batch))

    def of_tensors(self, observations: Any) -> Observation:
        """Convert a batch of tensors by tensor operations alone; choices are not checked."""
        if self.is_plain:
            return self._parts[ALONE].of_tensor(observations)
        if not isinstance(self.space, spaces.Dict):
            observations = {ALONE: observations}
        return {name: part.of_tensor(observations[name]) for name, part in self._parts.items()}

    def batch(self, observation: Any) -> tuple[Arrays, bool]:
        """Convert what `predict` is given: one observation or a batch, images in either order.

        Returns:
            The converted batch, and whether a batch was given.

        Raises:
            ValueError: the shape is wrong, or entries are of different batch sizes.
        """
        if not isinstance(self.space, spaces.Dict):
            array, is_batch = _batched(observation, self.space, None)
            return self(array), is_batch
        if not isinstance(observation, Mapping) or not set(self._parts) <= set(observation):
            return self(observation), False  # raises
        pairs = {name: _batched(observation[name], self.space[name], name) for name in self._parts}
        sizes = {
            name: len(array) if is_batch else "one" for name, (array, is_batch) in pairs.items()
        }
        if len(set(sizes.values())) > 1:
            raise ValueError(
                "the entries of an observation must be batches of one size, got "
                f"{', '.join(f'{name!r}: {size}' for name, size in sizes.items())}"
            )
        arrays = {name: array for name, (array, _) in pairs.items()}
        return self(arrays), "one" not in sizes.values()


def first(observations: Any) -> Any:
    """The first of a batch."""
    if isinstance(observations, dict):
        return {name: part[0] for name, part in observations.items()}
    return observations[0]


def count(observations: Arrays) -> int:
    """Number of observations in a batch."""
    parts = list(observations.values()) if isinstance(observations, dict) else [observations]
    return len(parts[0])


def to_tensors(observations: Arrays, device: torch.device) -> Observation:
    """The same as tensors on a device."""

    def convert(array: np.ndarray) -> Tensor:
        # Where channels came last in memory, convolutions would round differently; and torch
        # accepts no negative strides, as of a flipped image.
        return torch.as_tensor(np.ascontiguousarray(array), device=device)

    if isinstance(observations, dict):
        return {name: convert(array) for name, array in observations.items()}
    return convert(observations)


class _Part:
    """One entry: its form, and how batches [n, *space.shape] are brought into it."""

    def __init__(self, space: spaces.Space, name: str | None = None) -> None:
        self.name = name
        self.image: tuple[int, ...] = ()  # channels, height and width before it is resized
        self.entry: Entry
        if isinstance(space, spaces.Box):
            self.entry = self.shape = self._box(space, name)
            self.dtype = space.dtype
            return
        if isinstance(space, spaces.Discrete):
            sizes, lowest = np.array([space.n]), np.array([space.start])
        elif isinstance(space, spaces.MultiDiscrete):
            sizes, lowest = space.nvec.flatten(), np.ravel(space.start)
        elif isinstance(space, spaces.MultiBinary):
            sizes, lowest = np.full(int(np.prod(space.shape)), 2), np.array([0])
        else:
            raise UnsupportedSpaceError(
                f"DreamerTPX needs numbers as observations, got {describe(space)}; {FLATTEN}"
            )
        self.lowest, self.sizes = lowest, sizes
        self.entry = Choices(tuple(sizes.tolist()))
        self.shape = (len(sizes),)
        self.dtype = np.dtype(np.uint8 if sizes.max() <= 256 else np.int32)

    def _box(self, space: spaces.Box, name: str | None) -> tuple[int, ...]:
        is_picture = len(space.shape) > 2 or (len(space.shape) == 2 and space.dtype == np.uint8)
        if not is_picture:
            return (int(np.prod(space.shape)),)
        if not _is_image(space):
            raise UnsupportedSpaceError(
                "images must be uint8 in [0, 255] of shape [height, width] or [height, width, "
                f"channels], got {describe(space)}{'' if name is None else f' in {name!r}'}; if it "
                f"is a vector, {_flatten(name)}"
            )
        shape = space.shape
        if len(shape) == 2:
            self.image = (1, *shape)
        else:  # stable-baselines3 has put channels first, but in a policy made by hand
            is_first = is_image_space_channels_first(space)
            self.image = shape if is_first else (shape[2], *shape[:2])
        return (self.image[0], IMAGE_SIZE, IMAGE_SIZE)

    @property
    def is_resized(self) -> bool:
        return self.image[1:] not in ((), (IMAGE_SIZE, IMAGE_SIZE))

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        if self.image:
            if batch.shape[1:] != self.image and batch.ndim == 4:
                batch = batch.transpose(0, 3, 1, 2)
            images = batch.reshape(-1, *self.image)
            return area_resize(images, IMAGE_SIZE) if self.is_resized else images
        batch = batch.reshape(-1, *self.shape)
        if isinstance(self.entry, tuple):
            return batch
        choices = batch - self.lowest
        if ((choices < 0) | (choices >= self.sizes)).any():
            row, column = np.argwhere((choices < 0) | (choices >= self.sizes))[0]
            low = int(np.broadcast_to(self.lowest, self.sizes.shape)[column])
            raise ValueError(
                f"the observation{_of(self.name)} must be one of {low} to "
                f"{low + int(self.sizes[column]) - 1}, got {batch[row, column]}; correct the "
                "environment, or its observation space"
            )
        return choices.astype(self.dtype)

    def of_tensor(self, batch: Tensor) -> Tensor:
        """The same as a call, of tensors; choices keep their dtype and are not checked."""
        if self.image:
            if batch.shape[1:] != self.image and batch.ndim == 4:
                batch = batch.permute(0, 3, 1, 2)
            images = batch.reshape(-1, *self.image)
            return area_resize_tensors(images, IMAGE_SIZE) if self.is_resized else images
        batch = batch.reshape(-1, *self.shape)
        return batch if isinstance(self.entry, tuple) else batch - torch.as_tensor(self.lowest)


def _is_image(space: spaces.Box) -> bool:
    return (
        len(space.shape) in (2, 3)
        and space.dtype == np.uint8
        and bool((space.low == 0).all() and (space.high == 255).all())
    )


def _flatten(name: str | None) -> str:
    """The wrapper that makes a vector of the observation, or of one entry of a dictionary."""
    if name is None:
        return FLATTEN
    return (
        "wrap the environment in gymnasium.wrappers.TransformObservation(env, lambda seen: {**seen,"
        f" {name!r}: seen[{name!r}].ravel()}}, gymnasium.spaces.Dict({{**env.observation_space, "
        f"{name!r}: gymnasium.spaces.flatten_space(env.observation_space[{name!r}])}}))"
    )


def _batched(observation: Any, space: spaces.Space, name: str | None) -> tuple[np.ndarray, bool]:
    """A batch [n, *space.shape], and whether it was one."""
    array, shape = maybe_transpose(np.asarray(observation), space), space.shape or ()
    if array.shape == shape:
        return array[None], False
    if array.ndim and array.shape[1:] == shape:
        return array, True
    many = ", ".join(["n", *map(str, shape)])
    raise ValueError(  # begins as stable-baselines3's, which its users search for
        f"Unexpected observation shape {array.shape}{_of(name)}, expected {shape}, or ({many}) of "
        "n environments"
    )


def _of(name: str | None) -> str:
    """The entry, for messages; "" if observations are no dictionary."""
    return "" if name is None else f" of entry {name!r}"
