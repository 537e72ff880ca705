"""The policy of Nauman & Cygan's code: a Gaussian whose mean lies in (-1, 1)."""

from __future__ import annotations

from typing import ClassVar

from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn


class TanhMeanPolicy(ActorCriticPolicy):
    """stable-baselines3's MlpPolicy with a tanh on the mean of the actions."""

    file_name: ClassVar[str] = "totalprop.TanhMeanPolicy"
    former_file_names: ClassVar[tuple[str, ...]] = ("agents.daa_policy.TanhMeanPolicy",)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Sequential(self.action_net, nn.Tanh())
