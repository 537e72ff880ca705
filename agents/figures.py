"""Matplotlib figures of PIPPS. Pure functions: arrays in, a Figure out, no global pyplot state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

QUANTILES = (0.05, 0.25, 0.75, 0.95)


def prediction(particles: np.ndarray, path: np.ndarray, labels: Sequence[str] = ()) -> Figure:
    """Predicted particles against the real trajectory, one panel per state dimension.

    Args:
        particles: [H + 1, N, S]. path: [T + 1, S] observed. labels: S names.
    """
    n_states = particles.shape[-1]
    names = list(labels) or [f"observation {d}" for d in range(n_states)]
    figure = Figure(figsize=(3.2 * min(n_states, 4), 2.6 * -(-n_states // 4)), layout="constrained")
    axes = figure.subplots(-(-n_states // 4), min(n_states, 4), squeeze=False).ravel()
    steps = np.arange(len(particles))
    for d in range(n_states):
        low, lower, upper, high = np.quantile(particles[..., d], QUANTILES, axis=1)
        axes[d].fill_between(steps, low, high, alpha=0.2, color="C0", lw=0, label="particles 90 %")
        axes[d].fill_between(steps, lower, upper, alpha=0.4, color="C0", lw=0, label="50 %")
        axes[d].plot(path[:, d], color="C3", lw=1.5, label="real trial")
        axes[d].set(title=names[d], xlabel="step")
    for axis in axes[n_states:]:
        axis.set_visible(False)
    axes[0].legend(fontsize="small", frameon=False)
    return figure


def weights(k: np.ndarray) -> Figure:
    """Heat map of k [H, S]: 0 (blue) is all reparameterisation, 1 (red) all likelihood ratio."""
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(k.T, vmin=0, vmax=1, cmap="coolwarm", aspect="auto", origin="lower")
    axis.set(xlabel="step of the simulation", ylabel="state dimension", yticks=range(k.shape[1]))
    figure.colorbar(image, label="k (weight of LR)")
    return figure


def learning_curve(costs: np.ndarray, threshold: float | None = None, title: str = "") -> Figure:
    """Cost of the policy after each trial, mean and spread over evaluation rollouts.

    Args:
        costs: [trials, rollouts] cost of an episode (minus its return).
        threshold: cost that counts as success, or None.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    trials, mean = np.arange(1, len(costs) + 1), costs.mean(1)
    spread = costs.std(1)
    axis.fill_between(trials, mean - spread, mean + spread, alpha=0.25, lw=0, label="± 1 std")
    axis.plot(trials, mean, marker="o", ms=4, label=f"mean of {costs.shape[1]} rollouts")
    if threshold is not None:
        axis.axhline(threshold, color="0.4", ls="--", lw=1, label="success threshold")
    axis.set(xlabel="trial (real episodes seen)", ylabel="cost of an episode", title=title)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    return figure
