"""Figures of the agents: arrays in, a matplotlib Figure out, without pyplot's state; and GIFs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from totalprop.agents.persistence.safe_file import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = (0.05, 0.25, 0.75, 0.95)
MAX_GIF_FRAMES = 125  # a GIF of 500 frames at 240 x 320 would exceed 10 MB


def prediction(particles: np.ndarray, path: np.ndarray, labels: Sequence[str]) -> Figure:
    """Plot predicted particles and the real trajectory, one panel per state dimension.

    Args:
        particles: [H + 1, N, S] predicted states.
        path: [T + 1, S] observed states.
        labels: S names of the dimensions.
    """
    n_states = particles.shape[-1]
    figure = _figure(figsize=(3.2 * min(n_states, 4), 2.6 * -(-n_states // 4)))
    axes = figure.subplots(-(-n_states // 4), min(n_states, 4), squeeze=False).ravel()
    steps = np.arange(len(particles))
    for d in range(n_states):
        low, lower, upper, high = np.quantile(particles[..., d], QUANTILES, axis=1)
        axes[d].fill_between(steps, low, high, alpha=0.2, color="C0", lw=0, label="particles 90 %")
        axes[d].fill_between(steps, lower, upper, alpha=0.4, color="C0", lw=0, label="50 %")
        axes[d].plot(path[:, d], color="C3", lw=1.5, label="real trial")
        axes[d].set(title=labels[d], xlabel="step")
    for axis in axes[n_states:]:
        axis.set_visible(False)
    axes[0].legend(fontsize="small", frameon=False)
    return figure


def weights(k: np.ndarray) -> Figure:
    """Plot a heat map of k [H, S]: 0 (blue) is pure RP, 1 (red) is pure LR."""
    figure = _figure(figsize=(7, 2.4))
    axis = figure.subplots()
    image = axis.imshow(k.T, vmin=0, vmax=1, cmap="coolwarm", aspect="auto", origin="lower")
    ticks = range(0, k.shape[1], -(-k.shape[1] // 16))  # at most 16, which do not overlap
    axis.set(xlabel="step of the simulation", ylabel="state dimension", yticks=ticks)
    figure.colorbar(image, label="k (weight of LR)")
    return figure


def gauges(z: np.ndarray, snr: np.ndarray, snr_rp: np.ndarray, snr_lr: np.ndarray) -> Figure:
    """Plot by step whether RP and LR agree, and the signal-to-noise ratios.

    Args:
        z: [H] root mean square of z, 1 where they agree; nan leaves a gap, here as below.
        snr: [H] ratio of the mixture.
        snr_rp: [H] of the pathwise leg.
        snr_lr: [H] of the LR leg.
    """
    figure = _figure(figsize=(7, 2.6))
    left, right = figure.subplots(1, 2)
    steps = np.arange(1, len(z) + 1)
    left.axhline(1, color="0.6", ls="--", lw=1, label="equal means")
    left.plot(steps, z, color="C3", marker=".")
    left.set(xlabel="step of the simulation", ylabel="z between RP and LR")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    curves = {"RP": (snr_rp, "C0"), "LR": (snr_lr, "C3"), "mixture": (snr, "0.1")}
    for label, (values, color) in curves.items():
        right.plot(steps, values, color=color, marker=".", label=label)
    right.set(xlabel="step of the simulation", ylabel="signal-to-noise ratio")
    right.set_yscale("symlog", linthresh=1.0)
    right.legend(frameon=False)
    return figure


def learning_curve(
    x: np.ndarray,
    values: np.ndarray,
    *,
    xlabel: str,
    ylabel: str,
    threshold: float | None = None,
    title: str = "",
) -> Figure:
    """Plot the evaluations of a run: mean and standard deviation over episodes.

    Args:
        x: [K] trials or steps.
        values: [K, episodes] costs or returns.
        xlabel: what x counts.
        ylabel: what the values are.
        threshold: value that counts as success, or None.
        title: above the axes.
    """
    figure = _figure(figsize=(6, 3.6))
    axis = figure.subplots()
    mean, spread = values.mean(1), values.std(1)
    axis.fill_between(x, mean - spread, mean + spread, alpha=0.25, lw=0, label="± 1 std")
    axis.plot(x, mean, marker="o", ms=4, label=f"mean of {values.shape[1]} rollouts")
    if threshold is not None:
        axis.axhline(threshold, color="0.4", ls="--", lw=1, label="success threshold")
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.set_ylim(bottom=min(0.0, float(values.min())))
    axis.legend(frameon=False)
    return figure


def traces(truth: np.ndarray, model: np.ndarray, context: int) -> Figure:
    """Plot an open-loop prediction of vector observations, one panel per entry.

    Args:
        truth: [T, S] observations.
        model: [T, S] their prediction.
        context: steps in which the model saw the observations.
    """
    n = truth.shape[1]
    columns = min(n, 4)
    rows = -(-n // columns)
    figure = _figure(figsize=(3 * columns, 1.8 * rows))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for d in range(n):
        axes[d].plot(truth[:, d], color="0.3", lw=1.5, label="truth")
        axes[d].plot(model[:, d], color="C3", lw=1.2, label="model")
        axes[d].axvline(context - 0.5, color="0.6", ls=":", lw=1)
        axes[d].set_title(f"observation {d}", fontsize="small")
    for axis in axes[max(n - columns, 0) : n]:  # the lowest panel of each column
        axis.set_xlabel("decision", fontsize="small")
        axis.tick_params(labelbottom=True)
    for axis in axes[n:]:
        axis.set_visible(False)
    axes[0].legend(fontsize="small", frameon=False)
    return figure


def _figure(figsize: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure  # takes 0.4 s, for which `--help` has no use

    return Figure(figsize=figsize, layout="constrained")


def save(figure: Figure, path: Path, *, dpi: int) -> None:
    """Save a figure as PNG, atomically; a link at the path is replaced, not followed."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def save_gif(frames: Sequence[np.ndarray], path: Path, *, fps: float) -> None:
    """Save frames, each [H, W, 3] uint8, as a GIF; long episodes skip frames at equal speed."""
    from PIL import Image

    step = -(-len(frames) // MAX_GIF_FRAMES)
    pictures = [Image.fromarray(frame) for frame in frames[::step]]
    with atomic_write(path) as file:
        pictures[0].save(
            file, format="GIF", save_all=True, append_images=pictures[1:],
            duration=round(1000 * step / fps), loop=0,
        )  # fmt: skip
