"""Minari datasets: how one is found and opened, which spaces it is of, and its episodes as arrays.

Opening a dataset executes nothing that it names. Minari's own `recover_environment` imports the
module that the dataset gives as its environment's, and so does Minari where a dataset lacks its
spaces; such a dataset is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from totalprop.agents.core.spaces import describe, is_picture
from totalprop.agents.persistence.safe_file import in_one_line

if TYPE_CHECKING:
    from minari import MinariDataset

INSTALL = "pip install 'totalprop[minari]'"
# What Minari raises for datasets that are damaged, foreign or of a later version.
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError)


class Episode(NamedTuple):
    """An episode of T decisions.

    Attributes:
        observations: [T + 1, *observation_shape], or a dictionary of such entries.
        actions: [T, *action_shape], in the environment's units; number t leads from observation t
            to t + 1.
        rewards: [T] received with observations 1 to T.
        terminated: whether the last observation is terminal. Otherwise the episode was truncated,
            or the data end there.
    """

    observations: Any
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool


class SpacesOnly(gym.Env):
    """Stands in for an environment of which nothing but its spaces is known, or wanted.

    It makes an agent that learns from data: DreamerTPX("DreamerPolicy", SpacesOnly(dataset)).

    Args:
        of: what has the spaces: a Minari dataset, or an environment.
    """

    def __init__(self, of: MinariDataset | gym.Env) -> None:
        self.observation_space, self.action_space = of.observation_space, of.action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> NoReturn:
        """Raise RuntimeError, as `step` does: there is no environment."""
        raise RuntimeError(
            "there is no environment to act in, only its spaces: learn with learn_offline, or set "
            "an environment with set_env"
        )

    def step(self, action: Any) -> NoReturn:
        """Raise RuntimeError: there is no environment."""
        self.reset()


def open_dataset(source: str | Path | MinariDataset) -> MinariDataset:
    """Open a Minari dataset.

    Args:
        source: a dataset that is open; a folder that holds one; or an id, such as
            "mujoco/hopper/medium-v0". That is looked for in Minari's folder (MINARI_DATASETS_PATH,
            by default ~/.minari/datasets), and downloaded to it if it is not there.

    Raises:
        ValueError: Minari is not installed, there is no such dataset, or it cannot be read.
    """
    try:
        import minari
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.storage.datasets_root_dir import get_dataset_path
    except ImportError:
        raise ValueError(f"datasets need Minari: {INSTALL}") from None
    if isinstance(source, minari.MinariDataset):
        return source
    name = str(source)
    path = Path(source).expanduser()
    if not path.is_dir():
        try:
            parse_dataset_id(name)
        except (ValueError, TypeError):  # TypeError where no version is given
            raise ValueError(
                f"'{name}' is neither a folder nor the id of a Minari dataset, which is "
                "NAMESPACE/NAME-vVERSION; `minari list local` and `minari list remote` list ids"
            ) from None
        path = get_dataset_path(name)
        if not path.is_dir():
            try:
                minari.download_dataset(name)
            except Exception as error:  # of the network, in classes of several libraries
                raise ValueError(
                    f"the dataset '{name}' is not in {get_dataset_path()} (MINARI_DATASETS_PATH), "
                    f"and cannot be downloaded: {in_one_line(error, 300)}"
                ) from error
    return _read(path)


def _read(path: Path) -> MinariDataset:
    from minari import MinariDataset
    from minari.dataset.minari_storage import METADATA_FILE_NAME

    folder = next((f for f in (path / "data", path) if (f / METADATA_FILE_NAME).is_file()), None)
    if folder is None:
        raise ValueError(f"{path} holds no Minari dataset: it has no data/{METADATA_FILE_NAME}")
    try:
        metadata = json.loads((folder / METADATA_FILE_NAME).read_text(encoding="utf-8"))
        for name in ("observation_space", "action_space"):
            if not metadata.get(name):
                raise ValueError(f"it lacks its {name}, and its environment is not made to find it")
        return MinariDataset(folder)
    except (*_UNREADABLE, NotImplementedError, ImportError) as error:
        raise ValueError(f"cannot read the dataset {path}: {in_one_line(error, 300)}") from error


def episodes(dataset: MinariDataset) -> Iterator[Episode]:
    """The episodes of a dataset, in its order, each checked.

    Raises:
        ValueError: an array of an episode has a wrong length or shape, holds a NaN or infinity, or
            the episode goes on after its end. The message has the episode's number.
    """
    for number in dataset.episode_indices:
        where = f"episode {number} of the dataset '{dataset.id}'"
        try:
            (found,) = dataset.iterate_episodes([number])
        except _UNREADABLE as error:
            raise ValueError(f"cannot read {where}: {in_one_line(error, 300)}") from error
        steps = len(found.rewards)
        if not steps:
            raise ValueError(f"{where} has no steps; leave it out with filter_episodes")
        _check(f"observations of {where}", found.observations, dataset.observation_space, steps + 1)
        _check(f"actions of {where}", found.actions, dataset.action_space, steps)
        for name in ("rewards", "terminations", "truncations"):
            _check_array(f"{name} of {where}", getattr(found, name), (steps,))
        over = np.asarray(found.terminations, bool) | np.asarray(found.truncations, bool)
        if over[:-1].any():
            raise ValueError(
                f"{where} goes on after its end: step {np.flatnonzero(over)[0]} of {steps} "
                "terminates or truncates it; store what follows as another episode"
            )
        yield Episode(
            found.observations, found.actions, found.rewards, bool(found.terminations[-1])
        )


def check_spaces(dataset: MinariDataset, of: Any, whose: str) -> None:
    """Raise ValueError if a dataset is not of the spaces of an agent or environment.

    Bounds of observations, their precision, and the place of an image's channels do not count.

    Args:
        dataset: the dataset.
        of: what has `observation_space` and `action_space`.
        whose: its name, for the message.
    """
    pairs = {
        "observations": (dataset.observation_space, of.observation_space, False),
        "actions": (dataset.action_space, of.action_space, True),
    }
    for name, (own, other, bounds_count) in pairs.items():
        if _fit(own, other, bounds_count=bounds_count):
            continue
        one, two = describe(own), describe(other)
        if one == two:  # they differ in bounds or options
            one, two = str(own), str(other)
        raise ValueError(
            f"the {name} of the dataset '{dataset.id}' are {one}, those of {whose} are {two}: take "
            "the environment that the data were collected in"
        )


def _fit(own: spaces.Space, other: spaces.Space, *, bounds_count: bool) -> bool:
    if isinstance(own, spaces.Dict) and isinstance(other, spaces.Dict):
        return own.keys() == other.keys() and all(
            _fit(own[name], other[name], bounds_count=bounds_count) for name in own
        )
    if not (isinstance(own, spaces.Box) and isinstance(other, spaces.Box)):
        return own == other
    shapes = [own.shape]
    if is_picture(own) and len(own.shape) == 3:  # stable-baselines3 puts the channels first
        shapes.append((own.shape[2], *own.shape[:2]))
    is_same = other.shape in shapes and own.dtype.kind == other.dtype.kind
    if bounds_count and is_same:
        is_same = np.allclose(own.low, other.low) and np.allclose(own.high, other.high)
    return is_same


def _check(name: str, values: Any, space: spaces.Space, length: int) -> None:
    """Raise ValueError if stored values are not so many of a space; entries are checked by name."""
    if isinstance(space, spaces.Dict):
        for key, part in space.items():
            if key not in values:
                raise ValueError(f"the {name} lack the entry '{key}'")
            _check(f"{name} ('{key}')", values[key], part, length)
        return
    _check_array(name, values, (length, *(space.shape or ())))


def _check_array(name: str, values: Any, shape: tuple[int, ...]) -> None:
    array = np.asarray(values)
    if array.shape != shape:
        raise ValueError(f"the {name} are an array of {list(array.shape)}, expected {list(shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.argwhere(~np.isfinite(array))[0][0])
        raise ValueError(f"the {name} hold a NaN or infinity, first in number {bad}")
