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
from totalprop.agents.core.processes import ALONE, Processes
from totalprop.agents.dreamer.actions import Choices
from totalprop.agents.dreamer.cuda_graph import GraphedFunction
from totalprop.agents.dreamer.imagination import (
    ImaginationNoise,
    ImaginationSettings,
    Imagined,
    critic_loss,
    imagine,
    k_of_variables,
    last_layer_size,
    meter_shape,
)
from totalprop.agents.dreamer.policy import DreamerPolicy
from totalprop.agents.dreamer.replay import SequenceBatch
from totalprop.estimators import Estimator, PolicyGradient
from totalprop.estimators.gauge import SHAPE
from totalprop.world_models.latent.model import ModelLossSettings, State


@dataclass(frozen=True)
class UpdateSettings:
    """Settings of a gradient step; `DreamerTPX` explains them."""

    estimator: Estimator
    imagination: ImaginationSettings
    model: ModelLossSettings
    horizon: int
    decoded_share: float
    imagination_starts: int
    learning_rate: float
    model_learning_rate: float
    adam_eps: float
    max_grad_norm: float
    slow_critic_rate: float
    slow_actor_rate: float
    bf16: bool
    compile: bool
    cuda_graph: bool
    processes: Processes = ALONE  # each has a part of the batch, and its part of the numbers above


class UpdateNoise(NamedTuple):
    """All random numbers of one step."""

    posterior: Tensor  # [T, B, D] or, for categoricals, [T, B, G, C]
    starts: Tensor  # [N] indices of the states to imagine from
    imagination: ImaginationNoise
    decoded: Tensor | None = None  # [M] indices of the steps whose images are decoded; None: all


class UpdateRecord(NamedTuple):
    """What a step leaves for the logs, still on the device."""

    scalars: dict[str, Tensor]
    actor_gradient: Sequence[Tensor]  # shaped like the actor's parameters; before clipping
    k: Tensor  # mean weight of the LR leg, see `k_of_variables`
    k_actions: int = 0  # how many columns of k are of actions; they come first
    gauge: Tensor | None = None  # [H, 4, 2] what `estimators.gauge.read` reads, if measured


class DreamerUpdate:
    """The three optimisers and the step they take together."""

    def __init__(self, policy: DreamerPolicy, settings: UpdateSettings) -> None:
        self.policy, self.settings = policy, settings
        if settings.compile:
            self._compile()
        self.model_optimizer = self._adam(policy.model, settings.model_learning_rate)
        self.actor_optimizer = self._adam(policy.actor, settings.learning_rate)
        self.critic_optimizer = self._adam(policy.critic, settings.learning_rate)

    def configure(self, settings: UpdateSettings) -> None:
        """Take the next steps with these settings.

        The step sizes of actor and critic are set by `set_learning_rate`.
        """
        before = self.settings
        if settings == before:
            return
        self.settings = settings
        if settings.compile != before.compile:
            self._compile() if settings.compile else self._run_eagerly()
        for optimizer in (self.model_optimizer, self.actor_optimizer, self.critic_optimizer):
            for group in optimizer.param_groups:
                group["eps"] = settings.adam_eps
                if optimizer is self.model_optimizer:
                    group["lr"] = settings.model_learning_rate
            self._fit_to_graph(optimizer)

    def _compile(self) -> None:
        """Compile single steps: the unrolled sequence would compile for minutes."""
        rssm = self.policy.model.rssm
        for name in ("recur", "prior"):
            setattr(rssm, name, torch.compile(getattr(rssm, name)))
        self.policy.actor.hidden.compile()

    def _run_eagerly(self) -> None:
        """Undo `_compile`."""
        rssm = self.policy.model.rssm
        for name in ("recur", "prior"):
            delattr(rssm, name)  # the compiled function, which hides the method
        self.policy.actor.hidden._compiled_call_impl = None

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

    def __call__(
        self, batch: SequenceBatch, generator: torch.Generator, *, measure: bool = False
    ) -> UpdateRecord:
        """Draw the random numbers and take one step on a batch.

        Args:
            batch: sequences.
            generator: of the random numbers.
            measure: also gauge the legs, which takes some 5 % of a small update. A CUDA graph
                always does, since it is one recording.
        """
        measure = measure or self.settings.cuda_graph
        return self._step(batch, self._draw(batch, generator), measure)

    def _draw(self, batch: SequenceBatch, generator: torch.Generator) -> UpdateNoise:
        settings, policy = self.settings, self.policy
        latents = policy.model.rssm.latents
        posterior = latents.noise(*batch.reward.shape, generator=generator)
        starts = draw_starts(batch.is_terminal, settings.imagination_starts, generator)
        imagination = ImaginationNoise.draw(
            settings.horizon, len(starts), policy.n_actions, latents, generator,
            choices=isinstance(policy.actions, Choices),
        )  # fmt: skip
        decoded = None
        if settings.decoded_share < 1 and policy.to_model.has_images:
            decoded = draw_share(batch.is_terminal.numel(), settings.decoded_share, generator)
        return UpdateNoise(posterior, starts, imagination, decoded)

    def _take_step(
        self, batch: SequenceBatch, noise: UpdateNoise, measure: bool = False
    ) -> UpdateRecord:
        """Take a step without drawing random numbers or waiting for results, for a CUDA graph."""
        settings, policy, processes = self.settings, self.policy, self.settings.processes
        model_parameters = self._model_parameters()
        with self._precision():
            loss, states = policy.model.loss(
                batch.observation, batch.action, batch.reward, batch.is_first, batch.is_terminal,
                noise.posterior, settings.model, noise.decoded,
            )  # fmt: skip
        model_gradient = processes.average(torch.autograd.grad(loss.total, model_parameters))
        start = State(*(x.detach().flatten(0, 1)[noise.starts] for x in states))
        actor_gradient, imagined = self.actor_gradient(start, noise.imagination, measure=measure)
        with self._precision():
            value_loss, values = critic_loss(policy, imagined)
        critic_parameters = list(policy.critic.parameters())
        critic_gradient = processes.average(torch.autograd.grad(value_loss, critic_parameters))
        norms = {
            "model": self._apply(self.model_optimizer, model_parameters, model_gradient),
            "actor": self._apply(
                self.actor_optimizer, list(policy.actor.parameters()), actor_gradient.gradients
            ),
            "critic": self._apply(self.critic_optimizer, critic_parameters, critic_gradient),
        }
        policy.follow(settings.slow_critic_rate, settings.slow_actor_rate)
        if settings.imagination.scale_returns:
            policy.follow_returns(processes.gathered(imagined.returns))
        scalars = {
            "model_loss": loss.total, "observation_loss": loss.observation,
            "reward_loss": loss.reward, "kl": loss.kl, "discount_loss": loss.discount,
            "actor_loss": imagined.actor_loss, "critic_loss": value_loss,
            "return": imagined.returns.mean(), "value": values.mean(),
            "entropy": imagined.entropy,
            **{f"{name}_gradient_norm": norm for name, norm in norms.items()},
            "skipped_steps": (~torch.stack(list(norms.values())).isfinite()).float().sum(),
        }  # fmt: skip
        if settings.imagination.scale_returns:
            scalars["return_range"] = policy.return_range.clone()
        k, node = actor_gradient.k, settings.imagination.node
        assert k is not None
        return UpdateRecord(
            {name: value.detach() for name, value in scalars.items()}, actor_gradient.gradients,
            k_of_variables(k, noise.imagination, node),
            k_actions=0 if node == "latent" else policy.n_actions,
            gauge=actor_gradient.gauge,
        )  # fmt: skip

    def _model_parameters(self) -> list[nn.Parameter]:
        """The world model's parameters that the loss depends on; Adam skips all others."""
        model = self.policy.model
        parameters = list(model.parameters())
        if model.discount_head is not None and not self.settings.model.learned_discount:
            unused = {id(parameter) for parameter in model.discount_head.parameters()}
            parameters = [p for p in parameters if id(p) not in unused]
        return parameters

    def actor_gradient(
        self, start: State, noise: ImaginationNoise, *, measure: bool = False
    ) -> tuple[PolicyGradient, Imagined]:
        """The estimator's policy gradient, from rollouts imagined from N states."""
        settings, policy = self.settings, self.policy
        n = noise.latent.shape[1]
        shape = meter_shape(noise, settings.imagination.node)
        meter = noise.latent.new_zeros(shape, requires_grad=True)
        gauge = None
        if measure:
            gauge = noise.latent.new_zeros(len(noise.latent), *SHAPE, requires_grad=True)
        imagined: list[Imagined] = []

        def rollout(estimator: Estimator, tap: Tensor | None) -> Tensor:
            with self._precision():
                found = imagine(
                    policy, start, noise, estimator, settings.imagination,
                    tap=tap, meter=meter, gauge=gauge,
                )  # fmt: skip
            imagined.append(found)
            return found.actor_loss

        with _frozen(policy.model, policy.critic):
            gradient = estimators.gradient(
                rollout,
                list(policy.actor.parameters()),
                settings.estimator,
                samples=n,
                tap_size=last_layer_size(policy.actor),
                meter=meter,
                gauge=gauge,
            )
        gradients = tuple(settings.processes.average(gradient.gradients))
        return gradient._replace(gradients=gradients), imagined[-1]

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


def draw_starts(is_terminal: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """Draw the states that imagination starts from, in random order.

    After a terminal state there is nothing to decide, so none is drawn. (danijar/dreamer, whose
    windows end where episodes end, leaves out the last state of each if it learns the discount.)
    How many are drawn does not depend on how many are terminal, as a CUDA graph needs it: if too
    few are left, some are drawn twice.

    Args:
        is_terminal: [T, B] bool, not all True.
        wanted: number of states; 0, or more than there are, for T B.
        generator: of the order, on the device of `is_terminal`.

    Returns:
        [N] indices into the T B states.
    """
    flat = is_terminal.flatten()
    n = min(wanted, len(flat)) if wanted else len(flat)
    # The terminal states, with numbers from 1, come last.
    key = torch.rand(len(flat), generator=generator, device=flat.device) + flat
    order = key.argsort(stable=True)
    return order[torch.arange(n, device=flat.device) % (~flat).sum()]


def draw_share(n: int, share: float, generator: torch.Generator) -> Tensor:
    """[M] different indices below n, in random order; M is the share of n, at least 1."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    return order[: max(1, round(share * n))]


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
