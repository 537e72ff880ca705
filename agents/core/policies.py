"""What the policies of SVG, PIPPS and PILCO share."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy


class BoundedPolicy(BasePolicy):
    """A policy of scaled actions, in [-1, 1], whose actions lie in the environment's space."""

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """Like SB3's, in the dtype of the space, and clipped so that rounding stays within it."""
        space = self.action_space
        assert isinstance(space, spaces.Box)
        unscaled = np.clip(super().unscale_action(scaled_action), space.low, space.high)
        return unscaled.astype(space.dtype)
