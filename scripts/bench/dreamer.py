"""Time DreamerV1 updates (model, actor, critic) against sheeprl, and the estimators' overhead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from totalprop.agents import DreamerTPX
from totalprop.agents.core.memory import keep_freed_memory
from totalprop.agents.dreamer.cuda_graph import EAGER_CALLS
from totalprop.agents.dreamer.presets import PRESETS
from totalprop.agents.dreamer.replay import SequenceBatch
from totalprop.scripts.bench import sheeprl_peer
from totalprop.scripts.bench.timing import interleaved_medians

ACTIONS = 6
# Multiply-accumulates of a forward pass: of one frame through encoder and decoder, and of one
# imagined step through RSSM, actor, reward and critic (default sizes, 6 actions). A backward pass
# counts twice.
FRAME_MACS, STEP_MACS = 38.9e6, 1.56e6
MIXED = ("tpx", "tpx-guarded")  # estimators whose overhead is measured


def bench_dreamer(
    repeats: int,
    *,
    batch: int = 50,
    length: int = 50,
    horizons: tuple[int, ...] = (15, 60),
    device: str = "cpu",
    modes: Sequence[str] = (),
    peer: bool = True,
) -> dict[str, float]:
    """Measure the seconds per update, and ratios to other tasks in the same run.

    Args:
        repeats: rounds, of which the median is taken.
        batch: B, the number of sequences.
        length: T, the steps per sequence, each a 64x64 image.
        horizons: H, numbers of imagined steps; sheeprl is timed at the first of them.
        device: "cpu" or "cuda".
        modes: names in `MODES` of scripts/commands.py. Each is timed at the first horizon with
            `rp`, and with sheeprl if it supports the mode.
        peer: whether to time sheeprl; skipped unless `make bench-peer` has installed it.
    Returns:
        One column of the table.
    """
    data = synthetic_batch(batch, length, device)
    if device == "cpu":
        keep_freed_memory()  # as DreamerTPX does

    def update(name: str, horizon: int, *modes: str) -> Callable[[], object]:
        return make_update(name, horizon, data, modes, device=device)

    tasks: dict[str, Callable[[], object]] = {}
    for horizon in horizons:
        tasks |= {f"{name} H={horizon}": update(name, horizon) for name in ("rp", *MIXED)}
    first = horizons[0]
    tasks |= {f"rp H={first}, {mode}": update("rp", first, mode) for mode in modes}
    if peer:
        try:
            peer_sizes: dict[str, Any] = {
                "batch": batch, "length": length, "horizon": first, "actions": ACTIONS,
            }  # fmt: skip
            tasks["sheeprl"] = sheeprl_peer.start_update(**peer_sizes, device=device)
            if device == "cpu":
                tasks["sheeprl, our allocator"] = sheeprl_peer.start_update(
                    **peer_sizes, keep_memory=True
                )
            if "compile" in modes:
                tasks["sheeprl, compile"] = sheeprl_peer.start_update(
                    **peer_sizes, device=device, compile=True
                )
        except ImportError as error:
            print(error)
    warm_up = EAGER_CALLS + 1 if "cuda_graph" in modes else 1  # the graph is captured by then
    seconds = interleaved_medians(tasks, repeats, device=device, warm_up=warm_up)
    row = {f"seconds (rp, H={h})": seconds[f"rp H={h}"] for h in horizons}
    row |= {
        f"{name} / rp at H={h}": seconds[f"{name} H={h}"] / seconds[f"rp H={h}"]
        for name in MIXED
        for h in horizons
    }
    ours = [f"rp H={first}, {mode}" for mode in modes]
    for name in (*ours, "sheeprl", "sheeprl, our allocator", "sheeprl, compile"):
        if name in seconds:
            row[f"seconds ({name})"] = seconds[name]
            row[f"{name} / rp H={first}"] = seconds[name] / seconds[f"rp H={first}"]
    frames = batch * length
    work = 2 * 3 * frames * (FRAME_MACS + first * STEP_MACS)
    row["TFLOP/s"] = work / seconds[f"rp H={first}"] / 1e12
    return row


def make_update(
    name: str, horizon: int, data: SequenceBatch, modes: Sequence[str] = (), *, device: str
) -> Callable[[], object]:
    """Make a function that runs one update of DreamerV1, always on the same batch.

    Args:
        name: of the estimator.
        horizon: H.
        data: the batch.
        modes: arguments of DreamerTPX to switch on.
        device: "cpu" or "cuda".
    """
    chosen = {"estimator": name, "horizon": horizon, "seed": 0, "device": device}
    arguments: dict[str, Any] = {**PRESETS["dreamer2020"], **chosen, **dict.fromkeys(modes, True)}
    agent = DreamerTPX("DreamerPolicy", _Pictures(), **arguments)
    generator = torch.Generator(device).manual_seed(0)
    return lambda: agent._update(data, generator)


class _Pictures(gym.Env):
    """Has the spaces of a task, and is never stepped."""

    observation_space = spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (ACTIONS,), np.float32)


def synthetic_batch(batch: int, length: int, device: str) -> SequenceBatch:
    """Noise of the shapes of a batch of images, with 6 actions; no episode ends."""
    torch.manual_seed(0)
    lead = (length, batch)
    data = (
        torch.randint(0, 256, (*lead, 3, 64, 64), dtype=torch.uint8),
        torch.rand(*lead, ACTIONS) * 2 - 1,
        torch.rand(*lead),
        torch.zeros(lead, dtype=torch.bool),
        torch.zeros(lead, dtype=torch.bool),
    )
    return SequenceBatch(*(x.to(device) for x in data))
