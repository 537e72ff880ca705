"""What DreamerTPX writes to its logger after each round of updates."""

from __future__ import annotations

import time
from types import TracebackType

import numpy as np
import torch
from stable_baselines3.common.logger import Figure
from torch import Tensor

from totalprop.agents.core import figures
from totalprop.agents.core.algorithm import Algorithm
from totalprop.agents.core.metrics import PICTURE, QUIET, record_gauge, record_progress
from totalprop.agents.dreamer.update import UpdateRecord

GAUGE_EVERY = 10  # updates of a round, from one that gauges its legs to the next
FIGURE_SECONDS = 60.0  # between figures, each of which takes a tenth of a small round
MAX_COORDINATES = 32  # of the latent, whose k is logged; the figure shows all
COUNTED = "skipped_steps"  # summed over a round; all other scalars are averaged


class Round:
    """Averages over a round of updates, kept on the device until the round ends.

    train/gradient_snr is the signal-to-noise ratio |mean|² / Σ variance of the actor's gradient,
    with mean and variance over the updates of the round. It is the gradient of a whole batch, as
    the optimiser sees it.

    Args:
        agent: whose logger takes the averages.
        draw: also record figures.
        skips: leave out updates of which a step was skipped, and count those steps.
    """

    def __init__(self, agent: Algorithm, *, draw: bool = False, skips: bool = False) -> None:
        self.agent, self.draw, self.skips = agent, draw, skips
        self.updates = self.count = 0  # all of them, and those that are averaged
        self.scalars: dict[str, Tensor] = {}
        self.gradient: list[Tensor] = []
        self.square = torch.zeros((), device=agent.device)
        self.k, self.k_actions = torch.zeros((), device=agent.device), 0
        self.gauge: Tensor | None = None

    def __enter__(self) -> Round:
        self.started = time.perf_counter()
        return self

    def add(self, record: UpdateRecord) -> None:
        """Add one update."""
        self.updates += 1
        zero = torch.zeros((), device=self.agent.device)
        if self.skips and record.scalars[COUNTED] > 0:  # its other scalars need not be finite
            self.scalars[COUNTED] = self.scalars.get(COUNTED, zero) + record.scalars[COUNTED]
            return
        self.count += 1
        for name, value in record.scalars.items():
            self.scalars[name] = self.scalars.get(name, zero) + value
        if not self.gradient:
            self.gradient = [torch.zeros_like(g) for g in record.actor_gradient]
        torch._foreach_add_(self.gradient, list(record.actor_gradient))
        norms = torch._foreach_norm(list(record.actor_gradient))
        self.square = self.square + torch.stack(norms).square().sum()
        self.k, self.k_actions = self.k + record.k, record.k_actions
        if record.gauge is not None:
            self.gauge = record.gauge if self.gauge is None else self.gauge + record.gauge

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None or self.updates == 0:
            return
        record = self.agent.logger.record
        averages = self.agent._processes.average(list(self.scalars.values()))
        for name, value in zip(self.scalars, averages, strict=True):
            record(f"train/{name}", float(value if name == COUNTED else value / self.count))
        record("time/updates_per_second", self.updates / (time.perf_counter() - self.started))
        record("train/n_updates", self.agent._n_updates, exclude="tensorboard")
        n = self.count
        if n == 0:
            return
        if n > 1:
            mean_square = sum(float((g / n).square().sum()) for g in self.gradient)
            variance = (float(self.square) / n - mean_square) * n / (n - 1)
            record("train/gradient_snr", (mean_square - variance / n) / max(variance, 1e-30))
        k = self.k / n  # [H, A], [H, D] or [H, A + D]
        record("train/k", float(k.mean()))
        for t, value in enumerate(k.mean(1).tolist(), 1):
            record(f"k/step_{t:02d}", value, exclude=QUIET)
        actions = self.k_actions
        for d, value in enumerate(k.mean(0)[: actions + MAX_COORDINATES].tolist()):
            name = f"action_{d:02d}" if d < actions else f"coordinate_{d - actions:02d}"
            record(f"k/{name}", value, exclude=QUIET)
        if self.draw:
            figure = figures.weights(k.cpu().numpy(), actions=actions)
            record("figures/k", Figure(figure, close=True), PICTURE)
        if self.gauge is not None:
            record_gauge(self.agent.logger, self.gauge, draw=self.draw)


def record_decisions(agent: Algorithm) -> None:
    """Record progress in decisions and in frames, which differ by the action repeat."""
    record = agent.logger.record
    record("time/fps", int(record_progress(agent)))
    record("time/decisions", agent.num_timesteps)
    record("time/frames", agent.num_timesteps * action_repeat(agent))


def record_data(agent: Algorithm, episodes: np.ndarray, to_go: np.ndarray) -> None:
    """Record progress, where a step is an update, and what the data earned.

    Args:
        agent: who learns from the data.
        episodes: undiscounted return of each episode.
        to_go: discounted return from each of their states on, the counterpart of train/return.
    """
    record = agent.logger.record
    record_progress(agent)
    record("data/ep_rew_mean", float(episodes.mean()))
    record("data/ep_rew_max", float(episodes.max()))
    record("data/return", float(to_go.mean()))


def action_repeat(agent: Algorithm) -> int:
    """Frames per decision: the environment's `action_repeat`, or 1 if it has none."""
    env = agent.get_env()
    if env is None or not env.has_attr("action_repeat"):
        return 1
    return int(env.get_attr("action_repeat", indices=0)[0])
