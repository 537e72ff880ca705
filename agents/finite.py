"""What an environment returns is checked before it reaches a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


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
