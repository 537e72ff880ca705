"""Checks shared by all agents: constructor arguments, what environments return, gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor

from totalprop.estimators import ControlProbe, DenseJacobian, Estimator, assign_credit


def check_common(agent: BaseAlgorithm) -> None:
    """What stable-baselines3's constructor does not check; ValueError with one sentence."""
    name = type(agent).__name__
    if getattr(agent, "observation_space", None) is None:
        raise ValueError(
            f"{name} needs an environment to learn in: pass env=... (an id or instance)"
        )
    window = agent._stats_window_size
    if not is_whole(window, 1):
        raise ValueError(f"stats_window_size must be at least 1, a whole number, got {window!r}")


def is_whole(value: Any, least: int) -> bool:
    """Whether it is a whole number, numpy's too, of at least that."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_within(value: Any, low: float, high: float = math.inf) -> bool:
    """Whether it is a number, numpy's too, in [low, high], and finite."""
    return isinstance(value, Real) and low <= float(value) <= high and math.isfinite(float(value))


def is_above(value: Any, low: float) -> bool:
    """Whether it is a finite number above that."""
    return is_within(value, low) and float(value) > low


def try_estimator(estimator: Estimator, samples: Sequence[int], *, has_value: bool = False) -> None:
    """One node of so many samples, forward and backward, in place of a failure after the data.

    Args:
        samples: the node's shape without its last axis. has_value: a critic's estimate is there.
    Raises:
        ValueError: the estimator's parts do not work together, or not with so few samples.
    """
    if estimator.whole_graph:
        return
    mean = torch.zeros(*samples, 2, dtype=torch.float64, requires_grad=True)
    noise = torch.linspace(-1, 1, mean.numel(), dtype=torch.float64).view_as(mean)
    probe = None
    if len(samples) == 1:
        one = torch.ones(*mean.shape, 1, dtype=torch.float64)
        probe = ControlProbe([one, one], lambda: DenseJacobian(one[:, :1]))
    credit = mean.new_zeros(samples)
    value = noise[..., 0] if has_value else None
    x, credit = estimator(mean, torch.ones_like(mean), noise, credit, probe=probe, value=value)
    assign_credit(x.square().sum(-1), credit).sum().backward()


def check_finite(
    step: int, observations: np.ndarray, rewards: np.ndarray, infos: Sequence[dict[str, Any]] = ()
) -> None:
    """Raise ValueError if what an environment returned is not finite, terminal observations too."""
    ends = [info["terminal_observation"] for info in infos if "terminal_observation" in info]
    seen = [("observation", x) for x in (observations, *ends)]
    for name, values in (*seen, ("reward", rewards)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(
                f"the environment returned a non-finite {name} at step {step}: "
                f"{values.tolist()}; fix the environment (or end its episode before that)"
            )


def check_gradients(step: int, update: int, norms: Mapping[str, Tensor]) -> None:
    """Raise FloatingPointError if the norm of a part's gradient is not finite."""
    for name, norm in norms.items():
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the {name}'s gradient was not finite at step {step}, update {update}; the step "
                "was not taken. Go on from a checkpoint with nonfinite='skip', a shorter horizon "
                "or estimator 'tpx'"
            )
