"""The policy gradients of SVG as pure functions: SVG(0), SVG(1), SVG(∞) and DPG.

All are losses on real transitions. The noise of policy and model is not drawn but inferred from the
transition and filled in, so that actions and next states keep their real values while gradients
flow through policy and model (Heess et al. 2015, App. B, Eq. 14). Each action is a node of an
estimator, whose pathwise leg is the paper's gradient. The other legs and rules (`lr`, `tpx`, `tpg`,
...) are this project's, and so are several actions per state.

The networks are arguments: a policy, a model, a reward and a critic, each any differentiable
function. The agent that learns them is in agent.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from totalprop.estimators import (
    Estimator,
    ParameterProbe,
    assign_credit,
    infer_noise,
    own_and_carried,
)

Policy = Callable[[Mapping[str, Tensor], Tensor], tuple[Tensor, Tensor]]
Model = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Reward = Callable[[Tensor, Tensor, Tensor], Tensor]
ActionValue = Callable[[Tensor, Tensor], Tensor]
StateValue = Callable[[Tensor], Tensor]
Nodes = Literal["action", "both"]


class Transitions(NamedTuple):
    """Real transitions, in no particular order."""

    states: Tensor  # [N, S]
    actions: Tensor  # [N, A] as the policy drew them, not clipped
    next_states: Tensor  # [N, S]; at the end of an episode its last state
    terminated: Tensor  # [N] 1 where the episode terminated, else 0


class Paths(NamedTuple):
    """N real episodes, padded to the length T of the longest with any finite numbers."""

    states: Tensor  # [T + 1, N, S]
    actions: Tensor  # [T, N, A] as the policy drew them, not clipped
    is_alive: Tensor  # [T, N] 1 for steps of the episode, 0 for padding


@dataclass(frozen=True)
class Actor:
    """A policy at whose actions an estimator forms the gradient.

    Attributes:
        policy: (parameters, states [..., S]) -> mean and std, [..., A] each.
        parameters: name -> tensor; the tensors that the loss is differentiated with respect to.
        estimator: forms the gradient at every node.
        counted: the parameters at which rules with probe="subset" look, such as `tps`; None for
            all.
        tap: [N, P] zeros, P being the counted parameters; its gradient collects that of each
            sample, see `estimators.gradient`.
        meter: [T, ..., A] zeros, whose gradient is k at the actions of each step (T is 1 except in
            `svg_inf`), or None. With drawn actions it is [1, N, A].
        gauge: [T, 4, 2] zeros, whose gradient measures the legs there, see `estimators.gauge`, or
            None. Importance weights are no part of them.
    """

    policy: Policy
    parameters: Mapping[str, Tensor]
    estimator: Estimator
    counted: Mapping[str, Tensor] | None = None
    tap: Tensor | None = None
    meter: Tensor | None = None
    gauge: Tensor | None = None

    def act_again(
        self,
        states: Tensor,
        actions: Tensor,
        credit: Tensor,
        weights: Tensor,
        value: Tensor | None = None,
        *,
        step: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Draw given actions again: the values stay, and gradients flow.

        Args:
            states: [N, ..., S].
            actions: [N, ..., A].
            credit: [N, ...] of the node before.
            weights: [N, ...] of the samples in the gradient. They multiply what leaves the node,
                not the returns: a baseline times a weight that depends on the action would bias the
                score legs.
            value: [N, ...] for `baselines.critic`.
            step: of the meter and the gauge.
        Returns:
            The actions [N, ..., A], and the credit for everything downstream.
        """
        own, carried = own_and_carried(self.policy, self.parameters, states)
        factor = weights.unsqueeze(-1)
        mean, std = (scale_gradient(x, factor) for x in own)
        return self.estimator(
            mean, std, infer_noise(mean, std, actions), credit,
            probe=self._probe(states, factor), value=value, tap=self.tap,
            meter=None if self.meter is None else self.meter[step],
            gauge=None if self.gauge is None else self.gauge[step],
            carried=tuple(scale_gradient(x, factor) for x in carried),
        )  # fmt: skip

    def _probe(self, states: Tensor, factor: Tensor) -> Callable[..., Tensor] | None:
        """The per-sample gradients of the parameters, weighted like the node's own."""
        if self.estimator.probe == "none" and self.tap is None:
            return None
        counted: Mapping[str, Tensor] = self.parameters
        if self.estimator.probe == "subset" and self.counted is not None:
            counted = self.counted

        def of_counted(parameters: Mapping[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
            return self.policy({**self.parameters, **parameters}, state)

        probe = ParameterProbe(of_counted, counted, states)
        return lambda cotangent: probe(tuple(c * factor for c in cotangent))


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x, with its gradient multiplied by a factor that broadcasts to x."""
    return x.detach() + factor * (x - x.detach())


def importance_weights(log_prob: Tensor, behaviour: Tensor, maximum: float) -> Tensor:
    """w = min(p(a | s; θ) / p(a | s; θ_k), maximum), detached.

    Heess et al. 2015, Alg. 4; truncated as in App. D.

    Args:
        log_prob: [N] log p of the actions under the current policy.
        behaviour: [N] the same under the policy that drew them.
        maximum: at which weights are truncated.
    """
    return (log_prob - behaviour).detach().exp().clamp(max=maximum)


def svg0(
    actor: Actor,
    critic: ActionValue,
    transitions: Transitions,
    *,
    weights: Tensor | None = None,
    drawn: Tensor | None = None,
) -> Tensor:
    """SVG(0): minus the mean of Q(s, a) at the real actions drawn again, v_θ = Q_a π_θ|η.

    Heess et al. 2015, Alg. 3.

    Args:
        actor: policy and estimator; samples are the transitions.
        critic: Q, (states [..., S], actions [..., A]) -> [...].
        transitions: N of them.
        weights: [N] of the transitions; None for 1. They enter the gradient only.
        drawn: [K, N, A] standard normal noise of K more actions at every state, or None. The
            samples are then the 1 + K actions of a state, and a baseline compares these.
    Returns:
        [] the loss.
    """
    states, actions, weights = _with_drawn(actor, transitions, weights, drawn)
    value = None
    if actor.estimator.needs_value:
        value = critic(states, actor.policy(actor.parameters, states)[0]).detach()
    credit = torch.zeros_like(weights)
    actions, credit = actor.act_again(states, actions, credit, weights, value)
    return -assign_credit(critic(states, actions), credit).mean()


def dpg(actor: Actor, critic: ActionValue, states: Tensor) -> Tensor:
    """Minus the mean of Q(s, μ(s)): the limit of SVG(0) for σ -> 0. Silver et al. 2014.

    Args:
        actor: policy; there is no node, and std has no gradient.
        critic: Q, (states [N, S], actions [N, A]) -> [N].
        states: [N, S].
    """
    mean, _ = actor.policy(actor.parameters, states)
    return -critic(states, mean).mean()


def svg1(
    actor: Actor,
    model: Model,
    reward: Reward,
    critic: StateValue,
    transitions: Transitions,
    *,
    gamma: float,
    weights: Tensor | None = None,
    drawn: Tensor | None = None,
    nodes: Nodes = "action",
) -> Tensor:
    """SVG(1): minus the mean of r + γ V(s'), one step of the model, v_θ = (r_a + γ V_s' f_a) π_θ.

    Heess et al. 2015, Alg. 2 and Eq. 12. Further actions at a state are followed by the model with
    the noise inferred from the real action, so that a model whose mean is off by a constant is
    corrected for these, too.

    Args:
        actor: policy and estimator.
        model: (states, actions) -> mean and std [..., S] of the next state.
        reward: (states, actions, next states) -> [...].
        critic: V, states [..., S] -> [...].
        transitions: N of them.
        gamma: discount per decision.
        weights: [N] of the transitions, see `svg0`.
        drawn: [K, N, A], see `svg0`.
        nodes: where the estimator forms the gradient: at the "action", or at "both" action and next
            state. The score legs of a next state take the inferred noise for standard normal, which
            it is not where the model is wrong: they are then biased.
    Returns:
        [] the loss.
    Raises:
        ValueError: nodes="both" with drawn actions, which share the noise of the next state, or
            with an estimator that needs probes.
    """
    _check_nodes(actor, nodes, drawn)
    states, actions, weights = _with_drawn(actor, transitions, weights, drawn)
    real_states, real_actions, real_next, terminated = transitions
    value = critic(states).detach() if actor.estimator.needs_value else None
    credit = torch.zeros_like(weights)
    actions, credit = actor.act_again(states, actions, credit, weights, value)
    noise = infer_noise(*model(real_states, real_actions), real_next)
    mean, std = model(states, actions)
    noise = noise.expand_as(mean)
    next_states, credit = _next_states(actor, nodes, mean, std, noise, credit)
    returns = reward(states, actions, next_states)
    returns = returns + gamma * (1 - terminated) * critic(next_states)
    return -assign_credit(returns, credit).mean()


def svg_inf(
    actor: Actor,
    model: Model,
    reward: Reward,
    paths: Paths,
    *,
    gamma: float,
    nodes: Nodes = "action",
) -> Tensor:
    """SVG(∞): minus the mean over episodes of Σ_t γ^t r_t, backpropagated through the episode.

    Heess et al. 2015, Alg. 1 and Eq. 11-12, as one backward pass.

    Args:
        actor: policy and estimator; samples are the episodes.
        model: (states [N, S], actions [N, A]) -> mean and std [N, S] of the next state.
        reward: (states, actions, next states) -> [N].
        paths: N episodes.
        gamma: discount per decision.
        nodes: see `svg1`.
    Returns:
        [] the loss.
    Raises:
        ValueError: nodes="both" with an estimator that needs probes.
    """
    _check_nodes(actor, nodes, None)
    state, credit = paths.states[0], torch.zeros_like(paths.is_alive[0])
    total = torch.zeros_like(credit)
    for t, alive in enumerate(paths.is_alive):
        action, credit = actor.act_again(state, paths.actions[t], credit, alive, step=t)
        mean, std = model(state, action)
        noise = infer_noise(mean, std, paths.states[t + 1])
        # What follows the end of an episode has noise of its own, and must not reach it.
        mean, std = (scale_gradient(x, alive.unsqueeze(-1)) for x in (mean, std))
        next_state, credit = _next_states(actor, nodes, mean, std, noise, credit)
        total = total + gamma**t * alive * assign_credit(reward(state, action, next_state), credit)
        state = next_state
    return -total.mean()


def _next_states(
    actor: Actor, nodes: Nodes, mean: Tensor, std: Tensor, noise: Tensor, credit: Tensor
) -> tuple[Tensor, Tensor]:
    """Real next states drawn again from the model, and the credit for what follows."""
    if nodes == "action":
        return mean + std * noise, credit
    sample, credit = actor.estimator(mean, std, noise, credit)
    return sample, credit


def _check_nodes(actor: Actor, nodes: Nodes, drawn: Tensor | None) -> None:
    if nodes == "action":
        return
    if drawn is not None:
        raise ValueError(
            "the drawn actions of a state share the noise of its next state, whose score legs "
            "would be biased; use nodes='action', or no drawn actions"
        )
    if actor.estimator.probe != "none" or actor.estimator.several_passes:
        raise ValueError(
            "an estimator that weighs in parameter space has no probe at next states; use "
            "nodes='action', or an estimator such as 'tpx'"
        )


def _with_drawn(
    actor: Actor, transitions: Transitions, weights: Tensor | None, drawn: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """States, actions and weights, [N, ...] each, or [1 + K, N, ...] with the drawn actions."""
    states, actions = transitions.states, transitions.actions
    if weights is None:
        weights = torch.ones_like(transitions.terminated)
    if drawn is None:
        return states, actions, weights
    with torch.no_grad():
        mean, std = actor.policy(actor.parameters, states)
        actions = torch.cat((actions.unsqueeze(0), mean + std * drawn))
    # Drawn from the current policy, so their weight is 1.
    weights = torch.cat((weights.unsqueeze(0), torch.ones_like(drawn[..., 0])))
    return states.expand(len(actions), *states.shape), actions, weights
