"""Actions credited with their own return alone, against one imagination for each action.

The agent finds all of them in one backward pass. Here, for each action a_t, an imagination begins
in s_t, and a copy of the actor that is not differentiated chooses all later actions.
"""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from tests.agents.dreamer.test_action_node import FORMS, NODES, of_form, taken
from tests.agents.dreamer.test_imagination import (
    BLOCKED,
    F64,
    STOCH,
    H,
    N,
    actor_gradient,
    draw,
    estimated,
    explicit_rollout,
    flat,
    make,
    starts,
)
from totalprop import estimators
from totalprop.agents import DreamerTPX
from totalprop.agents.dreamer.imagination import ImaginationNoise, imagine
from totalprop.world_models.latent.rssm import State

OWN = replace(BLOCKED, credit="own", entropy_scale=0.2)


def n_step_terms(policy, features, lam, gamma):
    """Terms of the λ-return G of the action that led to the first state, by the state they are of.

    The textbook's mixture of n-step returns, with N states: G = (1 - λ) Σ_{n<N} λ^{n-1} G^n +
    λ^{N-1} G^N, where G^n = Σ_{i<n} (Π_{j<i} γ_j) r_i + (Π_{j<n} γ_j) V_n.

    Returns:
        [N] list of [samples].
    """
    values = policy.critic(features)[..., 0]
    rewards = policy.model.reward_head(features)[..., 0]
    discount = torch.full_like(values, gamma)
    if policy.model.discount_head is not None:
        discount = torch.sigmoid(policy.model.discount_head(features)[..., 0])
    terms = [torch.zeros_like(values[0]) for _ in values]
    for n in range(len(values)):  # the return whose last state is row n
        share = lam**n * (1 - lam if n < len(values) - 1 else 1)
        for i in range(n):
            terms[i] = terms[i] + share * discount[:i].prod(0) * rewards[i]
        terms[n] = terms[n] + share * discount[:n].prod(0) * values[n]
    return terms


def alone(rollout, policy, start, noise, t):
    """Imagine with `rollout`, and once more from s_t, where only the first action has a gradient.

    Returns:
        The first step and all later ones from s_t, and the weight [N] of action t.
    """
    whole = rollout(policy, start, noise)[0]
    state = start
    weight = torch.ones(N, dtype=F64)
    if t:
        state = State(whole.deters[t - 1].detach(), whole.stochs[t - 1].detach())
        discount = torch.full((t, N), BLOCKED.gamma, dtype=F64)
        if policy.model.discount_head is not None:
            discount = torch.sigmoid(policy.model.discount_head(whole.features[:t])[..., 0])
        weight = discount.prod(0).detach()
    frozen = copy.deepcopy(policy).requires_grad_(False)
    first = rollout(policy, state, ImaginationNoise(*(x[t : t + 1] for x in noise)))
    after = State(first[0].deters[0], first[0].stochs[0])
    features, later = first[0].features, None
    if t + 1 < H:
        later = rollout(frozen, after, ImaginationNoise(*(x[t + 1 :] for x in noise)))
        features = torch.cat((features, later[0].features))
    terms = n_step_terms(policy, features, BLOCKED.lam, BLOCKED.gamma)
    return first, later, terms, weight


def features_before(policy, start, noise, t):
    """[N, F] of s_t, without gradient."""
    if t == 0:
        return start.features
    return taken(policy, start, noise, blocked=True)[0].features[t - 1].detach()


def left_out(returns):
    return (returns.sum() - returns) / (len(returns) - 1)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("discount_head", [False, True])
@pytest.mark.parametrize("node", ["latent", *NODES])
def test_rp_differentiates_each_return_in_its_own_action(node, discount_head, blocked):
    """Later actions react to what it changes, unless their states are blocked."""
    policy, start, noise = make(discount_head=discount_head), starts(), draw()

    def rollout(*args):
        return (explicit_rollout(*args, blocked=blocked),)

    total = 0.0
    for t in range(H):
        (first,), _, terms, weight = alone(rollout, policy, start, noise, t)
        bonus = OWN.entropy_scale * first.entropies[0]
        total = total + (weight * (torch.stack(terms).sum(0) + bonus)).mean()
    settings = replace(OWN, node=node, stop_grad_actor_input=blocked)
    found = imagine(policy, start, noise, estimators.make("rp"), settings)
    expected = actor_gradient(-total / H, policy)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(
        actor_gradient(found.actor_loss, policy), expected, rtol=1e-7, atol=1e-10
    )


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("discount_head", [False, True])
def test_lr_at_the_latent_scores_each_return_for_its_own_action(
    discount_head, leave_one_out, blocked
):
    """The score functions of all latents after the action, and the path through h around them."""
    policy, start, noise = make(discount_head=discount_head), starts(), draw()

    def rollout(*args):
        return (explicit_rollout(*args, blocked=blocked, detach_samples=True),)

    total = 0.0
    for t in range(H):
        (first,), later, terms, weight = alone(rollout, policy, start, noise, t)
        own = torch.stack(terms).sum(0) + OWN.entropy_scale * first.entropies[0]
        total = total + (weight * own).mean()
        priors, samples = list(first.priors), list(first.stochs)
        if later is not None:
            priors, samples = priors + later[0].priors, samples + later[0].stochs
        for i, (prior, sample) in enumerate(zip(priors, samples, strict=True)):
            to_go = weight * torch.stack(terms[i:]).sum(0).detach()
            baseline = left_out(to_go) if leave_one_out else 0.0
            total = total + ((to_go - baseline) * prior.log_prob(sample).sum(-1)).mean()
    lr = estimators.make("lr", baseline="leave-one-out" if leave_one_out else "none")
    settings = replace(OWN, stop_grad_actor_input=blocked)
    loss = imagine(policy, start, noise, lr, settings).actor_loss
    expected = actor_gradient(-total / H, policy)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(actor_gradient(loss, policy), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_lr_at_the_action_is_the_reinforce_of_dreamer_v3(leave_one_out, form):
    """-mean w_t ((G_t - b_t) log π(a_t | s_t) + η H(a_t)), Hafner et al. 2023, Eq. 11."""
    policy, noise = of_form(form)
    start, total = starts(), 0.0

    def rollout(*args):
        return taken(*args, blocked=True)

    for t in range(H):
        first, _, terms, weight = alone(rollout, policy, start, noise, t)
        _, (log_prob,), _ = first
        own = weight * torch.stack(terms).sum(0).detach()
        baseline = left_out(own) if leave_one_out else 0.0
        raw = policy.actor(features_before(policy, start, noise, t))
        _, entropy = policy.actor.act(raw, noise.action[t])
        total = total + ((own - baseline) * log_prob + OWN.entropy_scale * weight * entropy).mean()
    lr = estimators.make("lr", baseline="leave-one-out" if leave_one_out else "none")
    expected = actor_gradient(-total / H, policy)
    assert expected.norm() > 1e-3
    for node, blocked in itertools.product(NODES, (False, True)):
        settings = replace(OWN, node=node, stop_grad_actor_input=blocked)
        loss = imagine(policy, start, noise, lr, settings).actor_loss
        torch.testing.assert_close(actor_gradient(loss, policy), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("name", ["rp", "lr", "tpx"])
@pytest.mark.parametrize("blocked", [False, True])
def test_samples_gradients_are_credited_alike(blocked, name, node, form):
    policy, noise = of_form(form)
    settings = replace(OWN, node=node, entropy_scale=0.0, stop_grad_actor_input=blocked)
    found = estimated(policy, starts(), noise, estimators.make(name), settings, per_sample=True)
    expected = flat(found.gradients[-2:])
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found.per_sample.sum(0), expected, rtol=1e-9, atol=1e-12)


def test_k_is_that_of_the_whole_return():
    """All that follows the last node is V_H, whose factor, in either objective, k does not have."""
    policy, start, noise = make(), starts(), draw()
    own, every = (
        estimated(
            policy, start, noise, estimators.make("tpx"),
            replace(OWN, credit=credit, entropy_scale=0.0),
            meter=torch.zeros(H, STOCH, dtype=F64, requires_grad=True),
        ).k
        for credit in ("own", "all")
    )  # fmt: skip
    torch.testing.assert_close(own[-1], every[-1])
    assert (own[:-1] != every[:-1]).any()


@pytest.mark.parametrize(
    ("wrong", "missing"),
    [
        ({"discount_weights": False}, "discount_weights=True"),
        ({"lam": 0.0}, "lam above 0.0072 at horizon 15"),
        ({"lam": 0.3, "horizon": 60}, "lam above 0.31 at horizon 60"),
        (
            {"lam": 0.0, "discount_weights": False},
            "discount_weights=True and lam above 0.0072 at horizon 15",
        ),
    ],
)
def test_own_credit_says_what_it_needs(wrong, missing):
    with pytest.raises(ValueError, match=f"credit='own' needs {missing}, or choose credit='all'"):
        DreamerTPX("DreamerPolicy", "Pendulum-v1", credit="own", **wrong)
