"""Spaces in words, and what to do with an environment whose spaces an agent cannot work with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first

FLATTEN = "wrap the environment in gymnasium.wrappers.FlattenObservation"


class UnsupportedSpaceError(ValueError, AssertionError):
    """The agent cannot work with a space; stable-baselines3 raises AssertionError."""


def describe(space: spaces.Space) -> str:
    """Say what a space holds, as in "a vector of 3 numbers" or "one of 2 choices (Discrete)"."""
    match space:
        case spaces.Box() if is_picture(space):
            return f"an image of shape {list(space.shape)} ({space.dtype})"
        case spaces.Box(shape=(size,)):
            kind = "number" if space.dtype.kind == "f" else "whole number"
            unbounded = "" if np.isfinite([space.low, space.high]).all() else ", not all bounded"
            return f"a vector of {size} {kind}{'s' * (size != 1)} (Box{unbounded})"
        case spaces.Box():
            return f"an array of shape {list(space.shape)} (Box, {space.dtype})"
        case spaces.Discrete():
            return f"one of {space.n} choices (Discrete)"
        case spaces.MultiDiscrete():
            return f"{space.nvec.size} choices of {space.nvec.tolist()} (MultiDiscrete)"
        case spaces.MultiBinary():
            return f"switches of shape {list(space.shape)} (MultiBinary)"
        case spaces.Dict():
            parts = [f"'{name}', {describe(part)}" for name, part in space.items()]
            return f"a dictionary of {'; '.join(parts)}"
        case spaces.Tuple():
            return f"a tuple of {'; '.join(describe(part) for part in space.spaces)}"
    return str(space)


def is_picture(space: spaces.Space) -> bool:
    """Whether a space holds images rather than numbers: uint8 of two or three dimensions."""
    return isinstance(space, spaces.Box) and len(space.shape) in (2, 3) and space.dtype == np.uint8


def to_vector(space: spaces.Space, *, otherwise: str) -> str:
    """The remedy for an agent that needs a vector where observations are something else.

    Args:
        space: the observation space.
        otherwise: what to do where there are nothing but images.
    """
    if is_picture(space):
        return otherwise
    if isinstance(space, spaces.Dict) and any(is_picture(part) for part in space.values()):
        vectors = [name for name, part in space.items() if not is_picture(part)]
        if not vectors:
            return otherwise
        kept = f"gymnasium.wrappers.FilterObservation(env, {vectors})"
        return f"leave the images out: gymnasium.wrappers.FlattenObservation({kept})"
    return FLATTEN


def not_nested(space: spaces.Space) -> str:
    """The remedy for a dictionary or tuple in which stable-baselines3 takes no further ones."""
    leaves = list(_leaves(space))
    if not any(is_picture(leaf) for _, leaf in leaves):
        return FLATTEN
    # Flattening would lose the images' shapes, so the inner entries are lifted.
    names = [".".join(map(str, path)) for path, _ in leaves]
    gets = ["".join(f"[{key!r}]" for key in path) for path, _ in leaves]
    seen = ", ".join(f"{name!r}: seen{get}" for name, get in zip(names, gets, strict=True))
    parts = ", ".join(
        f"{name!r}: env.observation_space{get}" for name, get in zip(names, gets, strict=True)
    )
    return (
        "lift the inner entries: gymnasium.wrappers.TransformObservation(env, lambda seen: "
        f"{{{seen}}}, gymnasium.spaces.Dict({{{parts}}}))"
    )


def refuse_mixed_images(space: spaces.Space) -> None:
    """Raise UnsupportedSpaceError if images of a dictionary differ in where their channels are.

    stable-baselines3 puts the channels first of all images or of none.
    """
    if not isinstance(space, spaces.Dict):
        return
    images = [
        (name, part)
        for name, part in space.items()
        if isinstance(part, spaces.Box) and is_image_space(part)
    ]
    first = [(name, part.shape) for name, part in images if is_image_space_channels_first(part)]
    if not first or len(first) == len(images):
        return
    seen = ", ".join(f"{name!r}: seen[{name!r}].transpose(1, 2, 0)" for name, _ in first)
    parts = ", ".join(
        f"{name!r}: gymnasium.spaces.Box(0, 255, {(*shape[1:], shape[0])}, 'uint8')"
        for name, shape in first
    )
    raise UnsupportedSpaceError(
        f"images of a dictionary must all have their channels last, got {describe(space)}; move "
        "them: gymnasium.wrappers.TransformObservation(env, lambda seen: {**seen, "
        f"{seen}}}, gymnasium.spaces.Dict({{**env.observation_space, {parts}}}))"
    )


def _leaves(
    space: spaces.Space, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], spaces.Space]]:
    """The spaces inside of dictionaries and tuples, each with the keys that lead to it."""
    if isinstance(space, spaces.Dict):
        for name, part in space.items():
            yield from _leaves(part, (*path, name))
    elif isinstance(space, spaces.Tuple):
        for i, part in enumerate(space.spaces):
            yield from _leaves(part, (*path, i))
    else:
        yield path, space


def to_actions(space: spaces.Space, taken: tuple[type[spaces.Space], ...]) -> str:
    """The remedy for an agent that cannot work with a space of actions.

    Args:
        space: the action space.
        taken: kinds that the agent takes.
    """
    if isinstance(space, spaces.MultiBinary) and spaces.MultiDiscrete in taken:
        twos = f"numpy.full({space.shape}, 2)"
        return (
            "make each switch a choice of 2: gymnasium.wrappers.TransformAction(env, lambda "
            f"action: action.astype('{space.dtype}'), gymnasium.spaces.MultiDiscrete({twos}))"
        )
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return "DreamerTPX takes them, and DAAPPO with action_source='none'"
    if isinstance(space, spaces.MultiBinary):
        return "DAAPPO takes them with action_source='none'"
    return "give the environment one vector of numbers or of choices as its action"


def check_vectors(agent: str, observations: spaces.Space, actions: spaces.Space) -> int:
    """The entries of an observation, where an agent needs a vector, and one as action.

    Raises:
        UnsupportedSpaceError: one of them is none, or there is nothing to choose.
    """
    if not isinstance(observations, spaces.Box) or len(observations.shape) != 1:
        remedy = to_vector(observations, otherwise="take DreamerTPX, which learns from images")
        raise UnsupportedSpaceError(
            f"{agent} models a vector of real numbers, got {describe(observations)} as "
            f"observation; {remedy}"
        )
    assert isinstance(actions, spaces.Box)
    if len(actions.shape) != 1 or not (actions.low < actions.high).all():
        raise UnsupportedSpaceError(
            f"{agent} needs a vector of real numbers as action, each with some room between its "
            f"bounds, got {describe(actions)} from {actions.low.tolist()} to "
            f"{actions.high.tolist()}"
        )
    return observations.shape[0]


def refuse_whole_numbers(actions: spaces.Space) -> None:
    """Raise UnsupportedSpaceError if actions are a Box of whole numbers.

    The agents' actions are real, and so are the gradients that go through them.
    """
    if isinstance(actions, spaces.Box) and actions.dtype.kind != "f":
        raise UnsupportedSpaceError(
            f"actions must be real numbers, got {describe(actions)}; let the environment round "
            "them: gymnasium.wrappers.TransformAction(env, lambda action: action.round()"
            f".astype('{actions.dtype}'), gymnasium.spaces.Box(env.action_space.low.astype("
            "'float32'), env.action_space.high.astype('float32')))"
        )
