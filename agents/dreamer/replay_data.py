"""The episodes of a Minari dataset as entries of DreamerTPX's replay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from totalprop.agents.core.datasets import episodes
from totalprop.agents.dreamer.actions import ActionForm
from totalprop.agents.dreamer.observations import Arrays, ObservationForm
from totalprop.agents.dreamer.replay import SequenceReplay

if TYPE_CHECKING:
    from minari import MinariDataset

BLOCK = 128  # observations converted at once: resizing takes several times their memory
ROUNDING = 1e-6  # by which a scaled action may be beyond its bounds, which are float32


def fill(
    replay: SequenceReplay, dataset: MinariDataset, to_model: ObservationForm, actions: ActionForm
) -> int:
    """Append every episode of a dataset to a replay.

    Args:
        replay: of observations and actions in the forms of the following.
        dataset: of the spaces that these are of.
        to_model: converts its observations.
        actions: converts its actions; those beyond the bounds of a Box are clipped.

    Returns:
        The number of actions that were clipped.

    Raises:
        ValueError: an episode holds what none gives, or the replay is too small.
    """
    n_clipped = 0
    for episode in episodes(dataset):
        scaled = actions.from_env(episode.actions)
        n_clipped += int((np.abs(scaled) > 1 + ROUNDING).any(1).sum())
        seen = _converted(episode.observations, to_model, len(scaled) + 1)
        replay.append(seen, scaled.clip(-1, 1), episode.rewards, terminated=episode.terminated)
    return n_clipped


def _converted(observations: Any, to_model: ObservationForm, n: int) -> Arrays:
    """Observations [n, ...] in the form of the model, which is made block by block."""

    def block(start: int) -> Any:
        rows = slice(start, start + BLOCK)
        if isinstance(observations, dict):
            return to_model({name: part[rows] for name, part in observations.items()})
        return to_model(observations[rows])

    blocks = [block(start) for start in range(0, n, BLOCK)]
    if isinstance(blocks[0], dict):
        return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
    return np.concatenate(blocks)
