"""Behaviour learning in a latent model: imagined rollouts, λ-returns, actor and critic loss.

    h_t = GRU(h_{t-1}, [z_{t-1}, a_{t-1}]),  a_{t-1} ~ π(s_{t-1}),  z_t ~ p(z_t | h_t)

z_t is the stochastic node whose gradient the estimator computes; the path through h bypasses it.
a_{t-1} can be one as well, or instead (`ImaginationSettings.node`).
Hafner et al. 2020 (DreamerV1), Sec. 3; Parmas et al. 2023 (TPX), Sec. 6 and App. C.1. Everything
here is a pure function, independent of stable-baselines3 and of environments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, jvp, vmap

from totalprop.agents.dreamer.categorical_actor import ActionNode, CategoricalActor
from totalprop.agents.dreamer.policy import Actor, DreamerPolicy
from totalprop.estimators import ControlProbe, Estimator, assign_credit, make
from totalprop.estimators.probes import Gram, gram_of_products
from totalprop.world_models.latent.distributions import Latents, gumbel
from totalprop.world_models.latent.model import State

NodeKind = Literal["latent", "action", "both"]
Credit = Literal["all", "own"]
REPARAMETERISED = make("rp")


@dataclass(frozen=True)
class ImaginationSettings:
    """Settings of the actor's loss.

    Attributes:
        gamma: discount γ of the λ-return.
        lam: λ of the λ-return.
        stop_grad_actor_input: block the gradient from an action to the state it was chosen in
            (DreamerV1). This biases RP and also LR, whose path through h it cuts, so that the two
            have different means. RP differentiates as if actions never reacted to the state. In an
            unstable system the effect of such actions grows with every step, in the mean and not
            only in the noise (results/dreamer/README.md, "The long horizon").
        discount_weights: weight the return of step t by γᵗ (danijar/dreamer) instead of equally
            (Parmas et al. 2023, Eq. 17). With a discount head, RP ignores how actions change the
            weights; LR does not.
        entropy_scale: weight of the policy's entropy in the loss; 0 in DreamerV1.
        learned_discount: take γ from the discount head, if there is one.
        scale_returns: divide the returns by max(1, the policy's `return_range`).
        node: where the estimator mixes its legs. "latent" is z_t (Parmas et al. 2023). "action" is
            the sample that makes a_{t-1}: the Gaussian before the tanh, or each categorical choice;
            z_t is then reparameterised. "both" is one after the other. With LR at the action no
            path bypasses the nodes, so it is unbiased whether or not the state is blocked.
        credit: which λ-returns an action is credited with. "all": its own and those of all later
            states, the gradient of their sum (DreamerV1). "own": only that from the state that it
            is chosen in, G_t = (1 - λ) V_{t+1} + λ R_{t+1}, weighted by the discount (DreamerV2
            and V3, whose actor is LR at the action with the critic as its baseline). Needs λ > 0.
    """

    gamma: float
    lam: float
    stop_grad_actor_input: bool
    discount_weights: bool
    entropy_scale: float
    learned_discount: bool = True
    scale_returns: bool = False
    node: NodeKind = "latent"
    credit: Credit = "all"


class ImaginationNoise(NamedTuple):
    """All random numbers of one imagined rollout."""

    action: Tensor  # [H, N, A]
    latent: Tensor  # [H, N, D] or, for categoricals, [H, N, G, C]

    @staticmethod
    def draw(
        horizon: int,
        n: int,
        actions: int,
        latents: Latents,
        generator: torch.Generator,
        *,
        choices: bool = False,
    ) -> ImaginationNoise:
        """Draw noise: normal for the actions, Gumbel if they are choices; and the latents'."""
        shape = (horizon, n, actions)
        if choices:
            action = gumbel(shape, generator, generator.device)
        else:
            action = torch.randn(shape, generator=generator, device=generator.device)
        return ImaginationNoise(action, latents.noise(horizon, n, generator=generator))


class Imagined(NamedTuple):
    """An imagined rollout; everything except the loss is detached."""

    actor_loss: Tensor  # []
    features: Tensor  # [H, N, F] of the imagined states
    returns: Tensor  # [H - 1, N] λ-returns
    targets: Tensor  # [H - 1, N] the values that bootstrap them
    weights: Tensor  # [H - 1, N] of the steps, in both losses
    entropy: Tensor  # [] of the actions, in nats per step


def imagine(
    policy: DreamerPolicy,
    start: State,
    noise: ImaginationNoise,
    estimator: Estimator,
    settings: ImaginationSettings,
    *,
    tap: Tensor | None = None,
    meter: Tensor | None = None,
    gauge: Tensor | None = None,
) -> Imagined:
    """Imagine from N states; backpropagating the actor's loss gives the estimator's gradient.

    loss = -mean w_t (R_t + entropy_scale·H(a_{t-1})), t = 1 .. H - 1, with
    R_t = r_t + γ ((1 - λ) V_{t+1} + λ R_{t+1}) and R_H = V_H.

    With `credit="own"` the loss has only G_0 = (1 - λ) V_1 + λ R_1, in which the G_t of action a_t
    is found with the factor Π_{1..t} γ_i λ. What reaches the actor's parameters at step t is
    multiplied by λ^-t, which leaves w_t = Π_{1..t} γ_i.

    Args:
        policy: world model, actor and critic.
        start: states [N, ...], without gradient.
        noise: all random numbers; its length is the horizon H.
        estimator: of the gradient at the nodes.
        settings: of the loss.
        tap: [N, P'] zeros for per-sample gradients of the actor's last layer, or None.
        meter: tensor of `meter_shape` whose gradient is k, or None.
        gauge: [H, 4, 2] tensor whose gradient measures the legs, at all nodes of a step together,
            see `estimators.gauge`, or None.
    """
    rssm, actor = policy.model.rssm, policy.actor
    at_action, at_latent = settings.node != "latent", settings.node != "action"
    own = settings.credit == "own"
    # The action's distribution then is needed twice, see `Estimator.carry`.
    is_split = at_action and estimator.carry == "pathwise" and not settings.stop_grad_actor_input
    frozen = {name: p.detach() for name, p in actor.named_parameters()} if is_split else {}
    latent_estimator = estimator if at_latent else REPARAMETERISED
    # At the latent too, the tap would count the action twice.
    needs_probe = at_latent and (estimator.probe != "none" or (tap is not None and not at_action))
    needs_value = at_latent and estimator.needs_value
    meters = [None] * len(noise.latent) if meter is None else meter.unbind(0)
    gauges = [None] * len(noise.latent) if gauge is None else gauge.unbind(0)
    credit = start.stoch.new_zeros(len(start.stoch))
    state, seen_states, features, credits, entropies = start, [], [], [], []
    for t, (action_noise, latent_noise, step_meter, step_gauge) in enumerate(
        zip(noise.action, noise.latent, meters, gauges)
    ):
        seen, step_tap, factor = state.features, tap, settings.lam**-t if own else 1.0
        carried = None
        if is_split:
            carried = functional_call(actor, frozen, (seen,))
        if settings.stop_grad_actor_input or is_split:
            seen = seen.detach()
        seen_states.append(seen.detach())
        hidden = actor.hidden(_with_gradient_times(seen, 1 / factor))
        raw = _with_gradient_times(actor.output(hidden), factor)
        if tap is not None:
            step_tap = _with_gradient_times(tap, factor)
        if at_action:
            size = action_noise.shape[-1]
            node = _action_node(
                policy, estimator, state, hidden, raw, carried, tap=step_tap,
                meter=None if step_meter is None else step_meter[:size], gauge=step_gauge,
            )  # fmt: skip
            action, entropy, credit = actor.act_at(node, raw, action_noise, credit)
            if step_meter is not None:  # the latent's part, which may be empty
                step_meter = step_meter[size:].view(latent_noise.shape[1:]) if at_latent else None
        else:
            action, entropy = actor.act(raw, action_noise)
            entropy = assign_credit(entropy, credit)  # to the previous node
        entropies.append(entropy)
        deter = rssm.recur(state, action)
        prior = rssm.prior(deter)
        probe = value = critic = None
        if needs_probe:
            probe = _last_layer_probe(policy, state, hidden, raw, action_noise)
        if needs_value:
            with torch.no_grad():
                value = policy.value(State(deter, prior.mean).features)
        if latent_estimator.needs_critic:
            critic = _critic_of_latents(policy, deter)
        stoch, credit = latent_estimator(
            *prior.zeta, latent_noise, credit,
            probe=probe, value=value, critic=critic, tap=None if at_action else step_tap,
            meter=step_meter, gauge=step_gauge if at_latent else None,
        )  # fmt: skip
        state = State(deter, stoch.flatten(1))  # [N, G, C] -> [N, G C]
        features.append(state.features)
        credits.append(credit)
    entropy = torch.stack(entropies)
    if own:  # it reaches neither another action nor the factor, and all steps are one batch
        _, entropy = actor.act(actor(torch.stack(seen_states)), noise.action)
    return _losses(policy, torch.stack(features), torch.stack(credits), entropy, settings)


def _with_gradient_times(x: Tensor, factor: float) -> Tensor:
    """The same numbers, whose gradient is multiplied by a factor on its way to x."""
    if factor == 1:
        return x
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * factor)
    return x


def meter_shape(noise: ImaginationNoise, node: NodeKind) -> tuple[int, ...]:
    """The shape of k: [H, A] at actions, [H, D] at latents, [H, A + D] at both.

    At categorical latents it is [H, G, C], and [H, A + G C] at both.
    """
    horizon, _, *latent = noise.latent.shape
    if node == "latent":
        return horizon, *latent
    actions = noise.action.shape[-1]
    return horizon, actions + (math.prod(latent) if node == "both" else 0)


def k_of_variables(k: Tensor, noise: ImaginationNoise, node: NodeKind) -> Tensor:
    """Average k over the classes of categorical latents, for the logs: [H, G] or [H, A + G]."""
    latent = noise.latent.shape[2:]
    if node == "action" or len(latent) == 1:
        return k
    actions, k = noise.action.shape[-1] if node == "both" else 0, k.flatten(1)
    return torch.cat((k[:, :actions], k[:, actions:].unflatten(1, latent).mean(-1)), 1)


def _critic_of_latents(policy: DreamerPolicy, deter: Tensor) -> Callable[[Tensor], Tensor]:
    """V of the state that a sample [N, D] of the latents makes: what `legs.lax` asks for."""
    deter = deter.detach()

    def critic(stoch: Tensor) -> Tensor:
        return policy.target_value(State(deter, stoch).features)

    return critic


def _critic_of_actions(policy: DreamerPolicy, state: State) -> Callable[[Tensor], Tensor]:
    """V at the prior's mean of the next state, of a sample [N, A] before the tanh."""
    state = state.detach()

    def critic(u: Tensor) -> Tensor:
        deter = policy.model.rssm.recur(state, u.tanh())
        return policy.target_value(State(deter, policy.model.rssm.prior(deter).mean).features)

    return critic


def _action_node(
    policy: DreamerPolicy,
    estimator: Estimator,
    state: State,
    hidden: Tensor,
    raw: Tensor,
    carried: Tensor | None,
    *,
    tap: Tensor | None,
    meter: Tensor | None,
    gauge: Tensor | None,
) -> ActionNode:
    """The estimator at the action, for `Actor.act_at`.

    `carried` is `raw` as a function of the state alone, or None if `raw` is one of both.
    """
    value = None
    if estimator.needs_value:
        # V(s) includes r(s), which the action has no influence on.
        with torch.no_grad():
            value = policy.value(state.features) - policy.model.reward(state.features)
    critic = _critic_of_actions(policy, state) if estimator.needs_critic else None

    def node(
        own: slice, mean: Tensor, std: Tensor | None, noise: Tensor, credit: Tensor
    ) -> tuple[Tensor, Tensor]:
        probe = None
        if estimator.probe != "none" or tap is not None:
            probe = _action_probe(policy.actor, hidden, raw, own)
        part = None if meter is None else meter[own]
        of_state = None
        if carried is not None:
            of_state = tuple(member[:, own] for member in policy.actor.zeta(carried))
        return estimator(
            mean, std, noise, credit,
            probe=probe, value=value, critic=critic, tap=tap, meter=part, gauge=gauge,
            carried=of_state,
        )  # fmt: skip

    return node


def _losses(
    policy: DreamerPolicy,
    features: Tensor,
    credits: Tensor,
    entropies: Tensor,
    settings: ImaginationSettings,
) -> Imagined:
    values = policy.target_value(features)  # [H, N]
    rewards = policy.model.reward(features)
    gamma = policy.model.discount(features) if settings.learned_discount else None
    if gamma is None:
        gamma = torch.full_like(values, settings.gamma)
    returns = lambda_returns(
        assign_credit(rewards, credits), assign_credit(values, credits), gamma, settings.lam
    )
    weights = torch.ones_like(returns)
    if settings.discount_weights:
        # Detached as in danijar/dreamer, so no gradient flows through a learned discount.
        weights = torch.cat((torch.ones_like(values[:1]), gamma[:-2].detach())).cumprod(0)
    if settings.credit == "own":
        # Of H actions, each with a return of its own, where "all" has the H - 1 returns R_t.
        last = (weights[-1:] * gamma[-2:-1]).detach()
        bonus = torch.cat((weights, last)) * entropies
        value = assign_credit(values[0], credits[0])
        first = (1 - settings.lam) * value + settings.lam * returns[0]
        objective = first.mean() / len(values)
    else:
        bonus = weights * entropies[:-1]
        objective = (weights * returns).mean()
    if settings.scale_returns:
        objective = objective / policy.return_range.clamp_min(1.0)
    return Imagined(
        -objective - settings.entropy_scale * bonus.mean(),
        features.detach(),
        returns.detach(),
        values[:-1].detach(),
        weights,
        entropies.detach().mean(),
    )


def critic_loss(policy: DreamerPolicy, imagined: Imagined) -> tuple[Tensor, Tensor]:
    """Return the critic's loss and the values [H - 1, N], detached.

    The loss is mean w_t ℓ(V_t, R_t), R_t fixed, where ℓ is the head's: ½ (V_t - R_t)² or the
    two-hot cross-entropy. With a slow critic, ℓ(V_t, V_t^slow) is added (Hafner et al. 2023).
    """
    critic, features = policy.critic, imagined.features[:-1]
    out = critic(features)
    targets = [imagined.returns]
    if policy.slow_critic is not None:
        targets.append(imagined.targets)
    loss = (imagined.weights * critic.loss(out, *targets)).mean()
    return loss, critic.mean(out.detach())


def lambda_returns(rewards: Tensor, values: Tensor, gamma: Tensor | float, lam: float) -> Tensor:
    """R_t = r_t + γ_t ((1 - λ) V_{t+1} + λ R_{t+1}) with R_H = V_H. Hafner et al. 2020, Eq. 6.

    Rewards belong to the state they are predicted from, and V(s_t) includes r(s_t).

    Args:
        rewards: [H, N]; gradients flow.
        values: [H, N]; gradients flow.
        gamma: a number, or [H, N] from a discount head.
        lam: λ in [0, 1].

    Returns:
        [H - 1, N] λ-returns.
    """
    if len(rewards) < 2:
        raise ValueError(f"a λ-return needs at least 2 imagined states, got {len(rewards)}")
    if not isinstance(gamma, Tensor):
        gamma = torch.full_like(values, gamma)
    inputs = rewards[:-1] + gamma[:-1] * (1 - lam) * values[1:]
    returns, last = [], values[-1]
    for t in reversed(range(len(inputs))):
        last = inputs[t] + gamma[t] * lam * last
        returns.append(last)
    return torch.stack(returns[::-1])


@torch.no_grad()
def _last_layer_probe(
    policy: DreamerPolicy, state: State, hidden: Tensor, raw: Tensor, action_noise: Tensor
) -> ControlProbe:
    """Jacobian of zeta with respect to the actor's last layer (Parmas et al. 2023, Sec. 4).

    The layer acts through this step's action alone. Its 2A outputs are differentiated in forward
    mode, with one Jacobian-vector product each.
    """
    rssm, raw = policy.model.rssm, raw.detach()
    state = state.detach()

    def zeta(raw: Tensor) -> tuple[Tensor, ...]:
        action, _ = policy.actor.act(raw, action_noise)
        members = rssm.prior(rssm.recur(state, action)).zeta
        return tuple(member for member in members if member is not None)

    return _probe(zeta, hidden, raw)


@torch.no_grad()
def _action_probe(
    actor: Actor | CategoricalActor, hidden: Tensor, raw: Tensor, own: slice
) -> ControlProbe:
    """Jacobian of some columns of the action's zeta with respect to the actor's last layer."""

    def zeta(raw: Tensor) -> tuple[Tensor, ...]:
        return tuple(member[:, own] for member in actor.zeta(raw))

    return _probe(zeta, hidden, raw.detach())


def _probe(
    zeta: Callable[[Tensor], tuple[Tensor, ...]], hidden: Tensor, raw: Tensor
) -> ControlProbe:
    """The probe of a zeta that is a function of the last layer's output."""

    def column(tangent: Tensor) -> tuple[Tensor, ...]:
        derivatives: tuple[Tensor, ...] = jvp(zeta, (raw,), (tangent.expand_as(raw),))[1]
        return derivatives

    columns = vmap(column)(torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device))
    layer = LayerJacobian(hidden.detach().to(raw.dtype))
    return ControlProbe([c.movedim(0, -1) for c in columns], lambda: layer)


class LayerJacobian(NamedTuple):
    """d output / d (weight [F, K], bias [F]) of a linear layer, an outer product, not stored."""

    inputs: Tensor  # [N, K]

    def rows(self, rows: slice) -> LayerJacobian:
        """The Jacobian of some of the samples."""
        return LayerJacobian(self.inputs[rows])

    def gram(self, alpha: Tensor) -> Gram:
        """Of the products α_ai J_i, from α [M, N, F]. J Jᵀ is (|x|² + 1) times the identity."""
        norm = self.inputs.square().sum(1, keepdim=True) + 1
        total = torch.cat(((alpha.mT @ self.inputs).flatten(1), alpha.sum(1)), 1)
        return gram_of_products(alpha * norm, alpha, total)

    def per_sample(self, alpha: Tensor) -> Tensor:
        """[N, F K + F] products α_i J_i, from α [N, F]."""
        weight = alpha.unsqueeze(-1) * self.inputs.unsqueeze(1)
        return torch.cat((weight.flatten(1), alpha), 1)


def last_layer_size(actor: Actor | CategoricalActor) -> int:
    """Number of parameters of the actor's last layer, the ones that probes cover."""
    return sum(p.numel() for p in actor.out.parameters())
