"""A trained policy as one module of tensors, which programs without this package can run.

`Deployed` does what `predict(deterministic=True)` does. What stands around the policy is inside it:
normalised observations, images with channels first, actions in the environment's units. It is what
`totalprop export` traces; an agent with a state has a class of its own.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

Example = Tensor | dict[str, Tensor]


class Deployed(nn.Module):
    """Observations [n, *shape] as the environment returns them -> actions [n, *shape] for it.

    Args:
        policy: the trained agent's.
        space: observations of the environment itself, before stable-baselines3's wrappers.
        statistics: the VecNormalize that the policy sees observations through; None without one.

    Attributes:
        state_names: of the tensors of a recurrent policy's state; () for others.
    """

    state_names: tuple[str, ...] = ()

    def __init__(
        self, policy: BasePolicy, space: spaces.Space, statistics: VecNormalize | None = None
    ) -> None:
        super().__init__()
        self.policy, self.space = policy, space
        self.statistics = statistics if statistics is not None and statistics.norm_obs else None

    def initial_state(self, n: int) -> tuple[Tensor, ...]:
        """The state at the start of n episodes; () without one."""
        return ()

    def forward(self, observation: Example) -> Any:
        """Actions at observations, each [n, *shape]; a dictionary has an entry for each."""
        actions = self.policy._predict(self._as_trained(observation), deterministic=True)
        space = self.policy.action_space
        actions = actions.reshape(-1, *(space.shape or ()))
        if not isinstance(space, spaces.Box):
            return actions
        return to_box(actions, space, is_scaled=self.policy.squash_output)

    def example(self, n: int) -> Example:
        """Observations of zeros, or of the nearest number in the space."""
        if isinstance(self.space, spaces.Dict):
            return {name: _zeros(n, part) for name, part in self.space.items()}
        return _zeros(n, self.space)

    def _as_trained(self, observation: Example) -> Any:
        """What stable-baselines3's wrappers make of observations."""
        trained, statistics = self.policy.observation_space, self.statistics
        if isinstance(observation, dict):
            parts = cast(spaces.Dict, trained)
            normalised = statistics.norm_obs_keys or [] if statistics is not None else []
            return {
                name: _channels_first(
                    self._scaled(x, name) if name in normalised else x, parts[name]
                )
                for name, x in observation.items()
            }
        return _channels_first(
            observation if statistics is None else self._scaled(observation), trained
        )

    def _scaled(self, x: Tensor, name: str = "") -> Tensor:
        """As VecNormalize scales an observation, or an entry of a dictionary."""
        assert self.statistics is not None
        known, clip = self.statistics.obs_rms, self.statistics.clip_obs
        rms = known[name] if isinstance(known, dict) else known
        std = np.sqrt(rms.var + self.statistics.epsilon)
        scaled = (x - torch.as_tensor(rms.mean)) / torch.as_tensor(std)
        return scaled.clamp(-clip, clip).float()


def to_box(actions: Tensor, space: spaces.Box, *, is_scaled: bool) -> Tensor:
    """Actions [n, *shape] within the bounds of the space, and in its dtype.

    Args:
        actions: [n, *shape].
        space: of the environment's actions.
        is_scaled: whether -1 and 1 stand for the bounds.
    """
    low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
    if is_scaled:
        actions = low + 0.5 * (actions + 1.0) * (high - low)
    return torch.clamp(actions, low, high).to(low.dtype)


def _channels_first(x: Tensor, space: spaces.Space) -> Tensor:
    return x if x.shape[1:] == space.shape else x.permute(0, 3, 1, 2)


def _zeros(n: int, space: spaces.Space) -> Tensor:
    lowest = getattr(space, "start", 0)  # of choices
    if isinstance(space, spaces.Box):
        lowest = np.clip(0, space.low, space.high)
    shape = (n, *(space.shape or ()))
    return torch.as_tensor(np.broadcast_to(lowest, shape).astype(space.dtype))
