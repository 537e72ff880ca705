"""What an environment returns is checked before it reaches a model, and gradients after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
