"""What agents that simulate trials ask of an environment's cost, and say where it falls short."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def cost_problem(cost: Any, states: int, device: torch.device) -> str | None:
    """Why a cost is not a differentiable function of the states alone, or None if it is."""
    x = torch.zeros(2, 3, states, dtype=torch.float64, device=device, requires_grad=True)
    try:
        found: Any = cost(x)
    except Exception as error:  # whatever a user's function may raise
        return (
            f"it takes states [..., {states}] and gives a cost each, but with states "
            f"[2, 3, {states}] it raised {type(error).__name__}: {error}"
        )
    shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != [2, 3]:
        return (
            f"it must give one cost per state, of states [2, 3, {states}] a tensor [2, 3], "
            f"got {shape}"
        )
    if not found.requires_grad:
        return "it must be differentiable: a cost of torch operations on the states it is given"
    return None


def warn_unused(name: str, why: str) -> None:
    """Say that an attribute of the environment is learned from data instead."""
    warnings.warn(
        f"the environment's own `{name}` is not used, because {why}; it is learned from the data",
        stacklevel=3,
    )
