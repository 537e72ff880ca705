"""The deterministic policy as one module of tensors, whose recurrent state goes in and out."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from totalprop.agents.core.deployment import Deployed, Example, to_box
from totalprop.agents.dreamer.actions import Choices
from totalprop.agents.dreamer.policy import DreamerPolicy
from totalprop.world_models.latent.rssm import State


class RecurrentDeployed(Deployed):
    """Observation, state and whether an episode begins -> action and the next state.

    The state is that of `DreamerPolicy.predict`: deter [n, D], stoch [n, Z] and last_action [n, A],
    scaled to [-1, 1] or one-hot.
    """

    state_names = ("deter", "stoch", "last_action")

    def initial_state(self, n: int) -> tuple[Tensor, ...]:
        state, action = cast(DreamerPolicy, self.policy).initial_state(n)
        return (*state, action)

    def forward(  # type: ignore[override]
        self,
        observation: Example,
        deter: Tensor,
        stoch: Tensor,
        last_action: Tensor,
        is_first: Tensor,
    ) -> tuple[Tensor, ...]:
        """Actions, and the next deter, stoch and last_action; `is_first` [n] resets rows."""
        policy = cast(DreamerPolicy, self.policy)
        seen = policy.to_model.of_tensors(observation)
        scaled, state = policy.step(
            seen, State(deter, stoch), last_action, is_first, deterministic=True
        )
        return (self._to_env(scaled), *state, scaled)

    def _to_env(self, scaled: Tensor) -> Tensor:
        """As `actions.to_env`, which is NumPy's."""
        form = cast(DreamerPolicy, self.policy).actions
        if not isinstance(form, Choices):
            return to_box(scaled.reshape(-1, *form.space.shape), form.space, is_scaled=True)
        start = torch.as_tensor(np.asarray(form.space.start, form.space.dtype))
        numbers = torch.stack([part.argmax(1) for part in scaled.split(form.sizes, 1)], 1)
        return numbers.to(start.dtype).reshape(-1, *start.shape) + start
