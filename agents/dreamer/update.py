"""One gradient step of DreamerTPX: world model, actor and critic on a batch of sequences.

As in danijar/dreamer, all three losses use the world model as it was before the step. The actor's
loss is differentiated through model and critic with their weights frozen, which saves the weights'
gradients, a third of the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import totalprop.estimators as estimators
from totalprop.agents.dreamer.cuda_graph import GraphedFunction
from totalprop.agents.dreamer.imagination import (
    ImaginationNoise,
    ImaginationSettings,
    Imagined,
    critic_loss,
    imagine,
    last_layer_size,
)
from totalprop.agents.dreamer.policy import DreamerPolicy
from totalprop.agents.dreamer.replay import SequenceBatch
from totalprop.estimators import Estimator, PolicyGradient
from totalprop.world_models.latent.model import ModelLossSettings, State


@dataclass(frozen=True)
class UpdateSettings:
    """Settings of a gradient step; `DreamerTPX` explains them."""

    estimator: Estimator
    imagination: ImaginationSettings
    model: ModelLossSettings
    horizon: int
    imagination_starts: int
    learning_rate: float
    model_learning_rate: float
    adam_eps: float
    max_grad_norm: float
    bf16: bool
    compile: bool
    cuda_graph: bool


class UpdateNoise(NamedTuple):
    """All random numbers of one step."""

    posterior: Tensor  # [T, B, stoch]
    starts: Tensor | None  # [N] indices of the states to imagine from; None for all
    imagination: ImaginationNoise


class UpdateRecord(NamedTuple):
    """What a step leaves for the logs, still on the device."""

    scalars: dict[str, Tensor]
    actor_gradient: Sequence[Tensor]  # shaped like the actor's parameters; before clipping
    k: Tensor  # [H, D] mean weight of the LR leg


class DreamerUpdate:
    """The three optimisers and the step they take together."""

    def __init__(self, policy: DreamerPolicy, settings: UpdateSettings) -> None:
        self.policy, self.settings = policy, settings
        if settings.compile:  # single steps: the unrolled sequence would compile for minutes
            rssm = policy.model.rssm
            for name in ("recur", "prior"):
                setattr(rssm, name, torch.compile(getattr(rssm, name)))
            policy.actor.hidden.compile()
        self.model_optimizer = self._adam(policy.model, settings.model_learning_rate)
        self.actor_optimizer = self._adam(policy.actor, settings.learning_rate)
        self.critic_optimizer = self._adam(policy.critic, settings.learning_rate)

    def _adam(self, module: nn.Module, rate: float) -> torch.optim.Adam:
        parameters, eps = module.parameters(), self.settings.adam_eps
        optimizer = torch.optim.Adam(parameters, rate, eps=eps, fused=True)
        self._fit_to_graph(optimizer)
        optimizer.register_load_state_dict_post_hook(self._fit_to_graph)
        return optimizer

    def _fit_to_graph(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepare an optimiser for a CUDA graph, which fixes numbers when it is recorded.

        The learning rate becomes a tensor, so that it can change. The graph is discarded, since a
        recorded one would keep using the optimiser's old state after another is loaded.
        """
        graph, device = self.settings.cuda_graph, self.policy.device
        self._step = GraphedFunction(self._take_step) if graph else self._take_step
        for group in optimizer.param_groups:
            rate = float(group["lr"])
            group["lr"] = torch.tensor(rate, device=device) if graph else rate
            group["capturable"] = graph

    def set_learning_rate(self, rate: float) -> None:
        """Set the step size of actor and critic."""
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def __call__(self, batch: SequenceBatch, generator: torch.Generator) -> UpdateRecord:
        """Draw the random numbers and take one step on a batch."""
        return self._step(batch, self._draw(batch, generator))

    def _draw(self, batch: SequenceBatch, generator: torch.Generator) -> UpdateNoise:
        settings, policy = self.settings, self.policy
        (length, sequences), latents = batch.reward.shape, policy.model.rssm.stoch_size
        shape, device = (length, sequences, latents), generator.device
        posterior = torch.randn(shape, generator=generator, device=device)
        n, starts = self.possible_starts(length) * sequences, None
        if 0 < settings.imagination_starts < n:
            rows = torch.randperm(n, generator=generator, device=device)
            starts, n = rows[: settings.imagination_starts], settings.imagination_starts
        imagination = ImaginationNoise.draw(
            settings.horizon, n, policy.n_actions, latents, generator
        )
        return UpdateNoise(posterior, starts, imagination)

    def possible_starts(self, length: int) -> int:
        """Number of states of a sequence that imagination may start from.

        With a discount head all but the last, as in danijar/dreamer (dreamer.py, "last step could
        be terminal"), otherwise all. A terminal entry is always the last of its window, and after
        it there is nothing to decide.
        """
        return length - (self.policy.model.discount_head is not None)

    def _take_step(self, batch: SequenceBatch, noise: UpdateNoise) -> UpdateRecord:
        """Take a step without drawing random numbers or waiting for results, for a CUDA graph."""
        settings, policy = self.settings, self.policy
        model_parameters = list(policy.model.parameters())
        with self._precision():
            loss, states = policy.model.loss(
                batch.observation, batch.action, batch.reward, batch.is_first, batch.is_terminal,
                noise.posterior, settings.model,
            )  # fmt: skip
        model_gradient = torch.autograd.grad(loss.total, model_parameters)
        possible = self.possible_starts(len(batch.reward))
        start = State(*(x[:possible].detach().flatten(0, 1) for x in states))
        if noise.starts is not None:
            start = State(*(x[noise.starts] for x in start))
        actor_gradient, imagined = self.actor_gradient(start, noise.imagination)
        with self._precision():
            value_loss, values = critic_loss(policy, imagined)
        critic_parameters = list(policy.critic.parameters())
        critic_gradient = torch.autograd.grad(value_loss, critic_parameters)
        norms = {
            "model": self._apply(self.model_optimizer, model_parameters, model_gradient),
            "actor": self._apply(
                self.actor_optimizer, list(policy.actor.parameters()), actor_gradient.gradients
            ),
            "critic": self._apply(self.critic_optimizer, critic_parameters, critic_gradient),
        }
        scalars = {
            "model_loss": loss.total, "observation_loss": loss.observation,
            "reward_loss": loss.reward, "kl": loss.kl, "discount_loss": loss.discount,
            "actor_loss": imagined.actor_loss, "critic_loss": value_loss,
            "return": imagined.returns.mean(), "value": values.mean(),
            "entropy": imagined.entropy,
            **{f"{name}_gradient_norm": norm for name, norm in norms.items()},
            "skipped_steps": (~torch.stack(list(norms.values())).isfinite()).float().sum(),
        }  # fmt: skip
        k = actor_gradient.k
        assert k is not None
        return UpdateRecord(
            {name: value.detach() for name, value in scalars.items()}, actor_gradient.gradients, k
        )

    def actor_gradient(
        self, start: State, noise: ImaginationNoise
    ) -> tuple[PolicyGradient, Imagined]:
        """The estimator's policy gradient, from rollouts imagined from N states."""
        settings, policy = self.settings, self.policy
        horizon, n, latents = noise.latent.shape
        meter = noise.latent.new_zeros(horizon, latents, requires_grad=True)
        imagined: list[Imagined] = []

        def rollout(estimator: Estimator, tap: Tensor | None) -> Tensor:
            with self._precision():
                imagined.append(
                    imagine(
                        policy, start, noise, estimator, settings.imagination, tap=tap, meter=meter
                    )
                )
            return imagined[-1].actor_loss

        with _frozen(policy.model, policy.critic):
            gradient = estimators.gradient(
                rollout,
                list(policy.actor.parameters()),
                settings.estimator,
                samples=n,
                tap_size=last_layer_size(policy.actor),
                meter=meter,
            )
        return gradient, imagined[-1]

    def _apply(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter],
        gradients: Sequence[Tensor],
    ) -> Tensor:  # fmt: skip
        """Clip and take the step, unless the gradient is not finite; return its norm."""
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = (self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter, gradient in zip(parameters, gradients):
            # Fused Adam pairs buffers by memory order, so a channels-last gradient (which
            # convolutions may return) would silently permute entries.
            parameter.grad = (gradient * scale).contiguous()
        # torch.amp's flag for a fused optimiser to skip the step, decided without a sync.
        optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def _precision(self) -> Any:
        if not self.settings.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.policy.device.type, torch.bfloat16)


@contextlib.contextmanager
def _frozen(*modules: nn.Module) -> Iterator[None]:
    """Do without the gradients of these modules' parameters."""
    for module in modules:
        module.requires_grad_(False)
    try:
        yield
    finally:
        for module in modules:
            module.requires_grad_(True)
