"""Open-loop predictions of the world model beside the truth, as pictures and videos.

The first steps of stored sequences are filtered, the rest is predicted from the stored actions
alone (Hafner et al. 2020, Fig. 4).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Figure
from torch import Tensor

from totalprop.agents.core import figures
from totalprop.agents.core.metrics import PICTURE
from totalprop.world_models.latent.networks import normalise
from totalprop.world_models.latent.observations import Entries

if TYPE_CHECKING:
    from totalprop.agents.dreamer.agent import DreamerTPX

CONTEXT = 5  # filtered steps, as in danijar/dreamer
ROWS = ("truth", "model", "error")  # of pictures of images
SEED = 0  # of separate generators, so that predictions do not change what the agent learns


def predict_sequences(agent: DreamerTPX, sequences: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Sample stored sequences and predict them open loop.

    They lie within an episode where such are found: no model foresees the next one's start.

    Args:
        agent: its world model predicts, its replay is sampled.
        sequences: number of sequences, B.

    Returns:
        Observations and predictions, [T, B, ...] each. Images are float in [0, 1], channel last;
        vectors are as the environment gives them. Of a dictionary, these are the first image, or
        all vectors, or all choices.

    Raises:
        ValueError: the agent has no replay yet.
    """
    if agent.replay_buffer is None:
        raise ValueError("the agent has no replay to sample from; call learn first")
    drawn = agent.replay_buffer.sample(
        8 * sequences, agent.sequence_length, np.random.default_rng(SEED)
    )
    begins = drawn.is_first[1:].any(0).long()  # a new episode after the first step
    batch = drawn.columns(begins.argsort(stable=True)[:sequences])
    generator = torch.Generator(agent.device).manual_seed(SEED)
    context = min(CONTEXT, agent.sequence_length)
    model = agent.policy.model.open_loop(
        batch.observation, batch.action, batch.is_first, context=context, generator=generator
    )
    seen = batch.observation
    if isinstance(seen, dict):
        assert isinstance(model, dict)
        seen, model = (_shown(x, agent.policy.model.entries) for x in (seen, model))
    assert isinstance(model, Tensor)
    if seen.ndim < 5:
        return seen.cpu().numpy(), model.cpu().numpy()
    truth = normalise(seen)
    pair = [(x + 0.5).clamp(0, 1).movedim(2, -1).cpu().numpy() for x in (truth, model)]
    return pair[0], pair[1]


def _shown(observations: dict[str, Tensor], entries: Entries | None) -> Tensor:
    """What pictures show of a dictionary's entries."""
    assert entries is not None
    for name in entries.images:
        return observations[name]
    return torch.cat([observations[name] for name in entries.vectors or entries.choices], -1)


def video(truth: np.ndarray, model: np.ndarray) -> np.ndarray:
    """Tile images [T, B, H, W, C] to frames [T, 3 H, B W, 3].

    The rows are `ROWS`, with an error of 0 in grey; each sequence is a column.
    """
    error = (model - truth + 1) / 2
    rows = [np.concatenate(list(x.swapaxes(0, 1)), axis=2) for x in (truth, model, error)]
    frames = (np.concatenate(rows, axis=1) * 255).round().astype(np.uint8)
    return frames if frames.shape[-1] == 3 else frames[..., :1].repeat(3, -1)


def film_strip(truth: np.ndarray, model: np.ndarray, every: int) -> np.ndarray:
    """Lay out every few frames of the first sequence from left to right: [3 H, frames W, 3]."""
    return np.concatenate(list(video(truth[:, :1], model[:, :1])[::every]), axis=1)


def captions(steps: int) -> list[str]:
    """What each step of a prediction is."""
    return [f"step {t}: {'seen' if t < CONTEXT else 'predicted'}" for t in range(steps)]


def picture(agent: DreamerTPX, every: int = 5) -> Figure:
    """Predict one sequence and draw it for a logger: images as a film strip, vectors as curves."""
    truth, model = predict_sequences(agent, 1)
    if truth.ndim == 3:
        return Figure(figures.traces(truth[:, 0], model[:, 0], CONTEXT), close=True)
    columns = [text.replace(": ", "\n") for text in captions(len(truth))[::every]]
    return Figure(figures.film(film_strip(truth, model, every), ROWS, columns), close=True)


def write_picture(agent: DreamerTPX, folder: Path) -> list[Path]:
    """Draw `predict_sequences` into open_loop.png (vectors) or open_loop.gif (images).

    Returns:
        The path; nothing for an agent that was loaded without its replay.

    Raises:
        ValueError: the replay holds no sequence yet.
    """
    if agent.replay_buffer is None:
        return []
    truth, model = predict_sequences(agent)
    if truth.ndim == 3:
        path = folder / "open_loop.png"
        figures.save(figures.traces(truth[:, 0], model[:, 0], CONTEXT), path, dpi=120)
    else:
        path = folder / "open_loop.gif"
        frames = figures.captioned(video(truth, model), ROWS, captions(len(truth)))
        figures.save_gif(list(frames), path, fps=10)
    return [path]


class OpenLoopPictures(BaseCallback):
    """Callback that logs open-loop predictions of DreamerTPX's world model.

    Args:
        every: steps between pictures; the first follows the first updates.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self._last = every, -every

    def _on_training_start(self) -> None:
        if self._last > self.num_timesteps:  # a new `learn` counts steps from 0
            self._last = -self.every

    def _on_step(self) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the steps at the last picture, for a checkpoint."""
        return {"last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._last = state["last"]

    def _on_rollout_start(self) -> None:
        model: DreamerTPX = self.model  # type: ignore[assignment]
        if model._n_updates == 0 or self.num_timesteps - self._last < self.every:
            return
        replay = model.replay_buffer
        if replay is None or not replay.has_windows(model.sequence_length):
            return  # the agent was loaded without its replay
        self._last = self.num_timesteps
        self.logger.record("figures/open_loop", picture(model), PICTURE)
