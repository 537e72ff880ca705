"""Action noise that is held for a while, so that exploration gets somewhere.

White noise averages out: a pendulum that is pushed left and right at random hardly leaves the
bottom. Held for a random number of decisions with a heavy tail, the same noise has all time scales.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

LONGEST = 64  # decisions


class HeldNoise:
    """Noise that each environment keeps until its time is over or an episode begins.

    It is held for d decisions with probability ∝ d^-exponent, d <= LONGEST (a truncated zeta
    distribution, as the random actions of Dabney et al. 2021, Sec. 3.1, whose exponent is 2).
    """

    def __init__(self) -> None:
        self._left: np.ndarray | None = None  # [n] decisions, the next one included
        self._noise: Tensor | None = None  # [n, A]

    def __call__(
        self, fresh: Tensor, starts: np.ndarray, exponent: float, rng: np.random.Generator
    ) -> Tensor:
        """The noise of this decision.

        Args:
            fresh: [n, A] noise that was drawn for it, which is taken where none is held.
            starts: [n] bool, where an episode begins.
            exponent: of the durations; 0 holds nothing.
            rng: of the durations.

        Returns:
            [n, A].
        """
        if not exponent:
            return fresh
        weights = np.arange(1, LONGEST + 1) ** -float(exponent)
        left = rng.choice(LONGEST, size=len(starts), p=weights / weights.sum()) + 1
        if self._left is not None and self._noise is not None:
            is_over = (self._left == 0) | starts
            left = np.where(is_over, left, self._left)
            renewed = torch.as_tensor(is_over, device=fresh.device).unsqueeze(-1)
            fresh = torch.where(renewed, fresh, self._noise)
        self._left, self._noise = left - 1, fresh
        return fresh

    def state_dict(self) -> dict[str, Any]:
        """What is held, for a checkpoint."""
        left = None if self._left is None else torch.as_tensor(self._left)
        return {"left": left, "noise": self._noise}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore what `state_dict` returned."""
        if state["noise"] is not None:
            self._left, self._noise = state["left"].cpu().numpy(), state["noise"].to(device)
