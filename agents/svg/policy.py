"""SVG's policy: a Gaussian around a perceptron's mean, as a stable-baselines3 policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch.func import functional_call

from totalprop.agents.core.policies import BoundedPolicy
from totalprop.agents.core.validation import Finite, check_values, is_whole
from totalprop.world_models.mlp_dynamics import network
from totalprop.world_models.stochastic_dynamics import ACTIVATIONS, StateScale

FIRST_GAIN = 0.1  # of the mean's last layer


class SVGPolicy(BoundedPolicy):
    """a = tanh μ(s) + σ η, in units in which the bounds of the action space are -1 and 1.

    Actions beyond the bounds are drawn and stored as they are, so that their noise can be inferred,
    and clipped for the environment. The paper does not state the form of the mean; the tanh keeps
    it within the bounds, where it has a gradient.

    Args:
        observation_space: Box [S].
        action_space: Box [A], bounded.
        lr_schedule: not used; stable-baselines3 passes it to every policy.
        net_arch: hidden units per layer of the mean.
        activation: "tanh", "relu" or "elu".
        log_std_init: log σ at first.
        learn_std: learn σ; otherwise it stays, as in the paper, where it is a searched number.
    """

    file_name: ClassVar[str] = "totalprop.SVGPolicy"

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule | None = None,
        *,
        net_arch: Sequence[int] = (100, 100),
        activation: str = "tanh",
        log_std_init: Annotated[float, Finite()] = -1.0,
        learn_std: bool = False,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True)
        check_values(SVGPolicy, log_std_init=log_std_init, learn_std=learn_std)
        check_sizes("net_arch", net_arch)
        self.net_arch, self.log_std_init, self.learn_std = net_arch, log_std_init, learn_std
        self.activation = activation
        states, actions = observation_space.shape[0], action_space.shape[0]
        self.mean = network([states, *net_arch, actions], ACTIVATIONS[activation])
        with torch.no_grad():  # at first all states have nearly the same action
            last = self.mean[-1]
            assert isinstance(last, nn.Linear)
            last.weight.mul_(FIRST_GAIN)
        log_std = torch.full((actions,), float(log_std_init))
        self.log_std = nn.Parameter(log_std, requires_grad=learn_std)
        self.scale = StateScale(states)

    @property
    def learned(self) -> dict[str, Tensor]:
        """Name -> parameter, of all that are learned."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def last_layer(self) -> dict[str, Tensor]:
        """Those of the mean's last layer, at which `tps` looks."""
        last = f"mean.{len(self.mean) - 1}."
        return {name: p for name, p in self.named_parameters() if name.startswith(last)}

    def zeta(self, parameters: Mapping[str, Tensor], states: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std [..., A] of the action at standardised states [..., S].

        Args:
            parameters: those that replace the policy's own, by name.
            states: standardised by `scale`.
        """
        of_mean = {
            name.removeprefix("mean."): p
            for name, p in parameters.items()
            if name.startswith("mean.")
        }
        mean = torch.tanh(functional_call(self.mean, of_mean, states))
        log_std = parameters.get("log_std", self.log_std)
        return mean, log_std.exp().expand_as(mean)

    def log_prob(self, states: Tensor, actions: Tensor) -> Tensor:
        """Log-density [N] of actions [N, A], not clipped, at standardised states [N, S]."""
        mean, std = self.zeta({}, states)
        return torch.distributions.Normal(mean, std).log_prob(actions).sum(-1)

    @torch.no_grad()
    def draw(
        self, observations: np.ndarray, generator: torch.Generator, *, deterministic: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Actions [n, A], not clipped, and their log-densities [n].

        Args:
            observations: [n, S].
            generator: draws the noise.
            deterministic: the mean instead.
        """
        states = self.scale(torch.as_tensor(observations, device=self.device))
        mean, std = self.zeta({}, states)
        noise = torch.randn(mean.shape, generator=generator, device=self.device)
        actions = mean if deterministic else mean + std * noise
        return actions.cpu().numpy(), self.log_prob(states, actions).cpu().numpy()

    def to_env(self, actions: np.ndarray) -> np.ndarray:
        """Actions of the environment's space from drawn ones [n, A]."""
        return self.unscale_action(np.clip(actions, -1.0, 1.0))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        assert isinstance(observation, Tensor)
        mean, std = self.zeta({}, self.scale(observation))
        action = mean if deterministic else mean + std * torch.randn_like(mean)
        return action.clamp(-1, 1)

    def forward(self, observation: Tensor) -> Tensor:
        """Mean of the actions [N, A] at observations [N, S], in [-1, 1]."""
        return self.zeta({}, self.scale(observation))[0]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "net_arch": self.net_arch,
            "activation": self.activation,
            "log_std_init": self.log_std_init,
            "learn_std": self.learn_std,
        }


def check_sizes(name: str, sizes: Any) -> None:
    """Raise ValueError if these are not hidden units per layer."""
    is_list = isinstance(sizes, list | tuple) and len(sizes) > 0
    if not is_list or not all(is_whole(size) and size > 0 for size in sizes):
        raise ValueError(f"{name} must be hidden units per layer, such as [100, 100], got {sizes}")
