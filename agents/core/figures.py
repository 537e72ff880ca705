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


def weights(k: np.ndarray, *, actions: int = 0) -> Figure:
    """Plot a heat map of k [H, S], 0 for pure RP and 1 for pure LR, and its mean over S by step.

    Args:
        k: [H, S] entries of the actions first, then those of the state.
        actions: how many of the S entries belong to actions.
    """
    from matplotlib.colors import PowerNorm

    n_steps, n = k.shape
    figure = _figure(figsize=(7, 4))
    mean, axis = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.2))
    steps = np.arange(1, n_steps + 1)
    mean.plot(steps, k.mean(1), color="0.1", marker=".")
    mean.set(ylabel="mean of k", title="k, the weight of LR: 0 is pure RP, 1 is pure LR")
    mean.grid(alpha=0.25)
    # Small weights matter and are frequent: the square root tells 0.01 from 0.1.
    image = axis.imshow(
        k.T, norm=PowerNorm(0.5, 0, 1), cmap="viridis", aspect="auto", origin="lower",
        extent=(0.5, n_steps + 0.5, -0.5, n - 0.5),
    )  # fmt: skip
    ticks = range(0, n, -(-n // 8))  # at most 8, which do not overlap
    names = [f"action {i}" if i < actions else str(i - actions) for i in ticks]
    axis.set_yticks(ticks, names, fontsize="small")
    if 0 < actions < n:
        axis.axhline(actions - 0.5, color="w", lw=1.5)
    ylabel = "entry of the action" if actions == n else "entry of the state"
    axis.set(xlabel="step of the simulation", ylabel=ylabel)
    figure.colorbar(image, ax=axis, label="k", ticks=(0, 0.01, 0.1, 0.25, 0.5, 1))
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
    from matplotlib.ticker import MaxNLocator

    figure = _figure(figsize=(6, 3.6))
    axis = figure.subplots()
    mean, spread = values.mean(1), values.std(1)
    if len(x) > 1:
        axis.fill_between(x, mean - spread, mean + spread, alpha=0.25, lw=0, label="± 1 std")
    else:
        axis.errorbar(x, mean, spread, color="C0", capsize=4, label="± 1 std")
    axis.plot(x, mean, marker="o", ms=4, color="C0", label=f"mean of {values.shape[1]} rollouts")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
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
    figure = _figure(figsize=(max(3 * columns, 5), 1.8 * rows + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for d in range(n):
        axes[d].plot(truth[:, d], color="0.3", lw=1.5, label="truth")
        axes[d].plot(model[:, d], color="C3", lw=1.2, label="model")
        axes[d].axvline(
            context - 0.5, color="0.6", ls=":", lw=1.5, label="from here on it sees actions alone"
        )
        axes[d].set_title(f"observation {d}", fontsize="small")
    for axis in axes[max(n - columns, 0) : n]:  # the lowest panel of each column
        axis.set_xlabel("decision", fontsize="small")
        axis.tick_params(labelbottom=True)
    for axis in axes[n:]:
        axis.set_visible(False)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=3, fontsize="small", frameon=False)
    return figure


def film(strip: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Figure:
    """Plot a table of images with the names of its rows and columns.

    Args:
        strip: [R H, F W, 3] R rows of F images.
        rows: R names.
        columns: F names.
    """
    height, width = strip.shape[0] / len(rows), strip.shape[1] / len(columns)
    figure = _figure(figsize=(1.1 * len(columns) + 0.9, 1.1 * len(rows) * height / width + 0.6))
    axis = figure.subplots()
    axis.imshow(strip)
    axis.set_xticks((np.arange(len(columns)) + 0.5) * width, columns, fontsize="small")
    axis.set_yticks((np.arange(len(rows)) + 0.5) * height, rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def captioned(frames: np.ndarray, rows: Sequence[str], captions: Sequence[str]) -> np.ndarray:
    """Write the names of rows to the left of a film's frames, and a caption above each frame.

    Args:
        frames: [T, H, W, 3] uint8, whose rows are equally high.
        rows: their names.
        captions: T texts.
    Returns:
        [T, H + above, left + W, 3] uint8.
    """
    from PIL import Image, ImageDraw, ImageFont

    font, left, above = ImageFont.load_default(size=12), 44, 18
    _, height, width, _ = frames.shape
    drawn = []
    for frame, caption in zip(frames, captions):
        page = Image.new("RGB", (left + width, above + height), "white")
        page.paste(Image.fromarray(frame), (left, above))
        pen = ImageDraw.Draw(page)
        pen.text((left, above // 2), caption, fill="black", font=font, anchor="lm")
        for i, name in enumerate(rows):
            middle = above + (i + 0.5) * height / len(rows)
            pen.text((4, middle), name, fill="black", font=font, anchor="lm")
        drawn.append(np.asarray(page))
    return np.stack(drawn)


def _figure(figsize: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure  # takes 0.4 s, for which `--help` has no use

    return Figure(figsize=figsize, layout="constrained")


def save(figure: Figure, path: Path, *, dpi: int) -> None:
    """Save a figure as the PNG or SVG of its name, atomically; a link there is replaced.

    The same figure is the same file, so that a report made again changes no committed picture.
    """
    from matplotlib import rc_context

    kind = path.suffix[1:]
    metadata = {"Date": None} if kind == "svg" else None
    with atomic_write(path) as file, rc_context({"svg.hashsalt": "totalprop"}):
        figure.savefig(file, format=kind, dpi=dpi, metadata=metadata)


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
