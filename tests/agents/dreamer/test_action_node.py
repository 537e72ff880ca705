"""The estimator at the action: against REINFORCE written by hand, enumeration and plain backprop.

The notation, the tiny float64 policies and the independent rollout are those of `test_imagination`.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from gymnasium import spaces
from torch.distributions import Categorical, Normal
from torch.distributions.transforms import TanhTransform

from tests.agents.dreamer.test_imagination import (
    AGREEING,
    BLOCKED,
    EVERY_SETTING,
    F64,
    SIZES,
    STOCH,
    UNBLOCKED,
    A,
    H,
    N,
    Path,
    SpyEstimator,
    actor_gradient,
    agreeing,
    alike,
    draw,
    estimated,
    explicit_loss,
    flat,
    generator,
    gradients_of_draws,
    make,
    make_responsive,
    objective_terms,
    randn,
    starts,
    t_statistics,
)
from totalprop import estimators
from totalprop.agents.dreamer.categorical_actor import CategoricalActor
from totalprop.agents.dreamer.imagination import (
    ImaginationNoise,
    imagine,
    last_layer_size,
    meter_shape,
)
from totalprop.agents.dreamer.policy import DreamerPolicy
from totalprop.estimators import baselines
from totalprop.estimators.gauge import SHAPE
from totalprop.world_models.latent.distributions import GaussianLatents
from totalprop.world_models.latent.rssm import State

NODES = ("action", "both")
CHOICES = (2, 3)
FORMS = ("gaussian", "categorical")


def make_choosing(sizes=CHOICES, **changes):
    """A policy whose actions are choices, with weights and biases of about 0.5."""
    observation, action = spaces.Box(-1, 1, (3,)), spaces.MultiDiscrete(sizes)
    policy = DreamerPolicy(observation, action, **{**SIZES, **changes}).double()
    with torch.no_grad():
        for i, p in enumerate(policy.parameters()):
            p.copy_(0.5 * randn(*p.shape, seed=100 + i))
    return policy


def draw_choosing(sizes=CHOICES, horizon=H, n=N, seed=3):
    noise = ImaginationNoise.draw(
        horizon, n, sum(sizes), GaussianLatents(STOCH), generator(seed), choices=True
    )
    return ImaginationNoise(*(x.double() for x in noise))


def of_form(form):
    """A policy and noise for it."""
    return (make(), draw()) if form == "gaussian" else (make_choosing(), draw_choosing())


# An independent REINFORCE


def taken(policy, start, noise, *, blocked):
    """Imagine with samples of the actions that carry no gradient.

    Returns:
        The path, whose entropies are what the actions' samples do not move; [H] lists of log π(a)
        and of what they do move, the slopes of the tanh.
    """
    deter, stoch, rssm = start.deter, start.stoch, policy.model.rssm
    log_probs, known, slopes, stochs, deters = [], [], [], [], []
    for action_noise, latent_noise in zip(*noise, strict=True):
        x = torch.cat((stoch, deter), -1)
        raw = policy.actor(x.detach() if blocked else x)
        if isinstance(policy.actor, CategoricalActor):
            parts = [
                Categorical(0.99 * part.softmax(-1) + 0.01 / part.shape[-1])
                for part in raw.split(CHOICES, -1)
            ]
            chosen = [
                (part.probs.log() + z).argmax(-1)
                for part, z in zip(parts, action_noise.split(CHOICES, -1), strict=True)
            ]
            pairs = list(zip(parts, chosen, strict=True))
            log_probs.append(sum(part.log_prob(one) for part, one in pairs))
            known.append(sum(part.entropy() for part in parts))
            slopes.append(torch.zeros_like(known[-1]))
            action = torch.cat([torch.eye(len(p.probs[0]), dtype=F64)[one] for p, one in pairs], -1)
        else:
            std = torch.nn.functional.softplus(raw[:, A:] + math.log(math.expm1(5))) + 1e-4
            gaussian, squash = Normal(5 * torch.tanh(raw[:, :A] / 5), std), TanhTransform()
            u = (gaussian.mean + std * action_noise).detach()
            log_probs.append(gaussian.log_prob(u).sum(-1))
            known.append(gaussian.entropy().sum(-1))
            slopes.append(squash.log_abs_det_jacobian(u, squash(u)).sum(-1))
            action = squash(u)
        deter = rssm.recur(State(deter, stoch), action)
        mean, std = rssm.prior(deter)
        stoch = mean + std * latent_noise
        stochs.append(stoch)
        deters.append(deter)
    features = torch.stack([torch.cat(pair, -1) for pair in zip(stochs, deters, strict=True)])
    return Path(features, [], stochs, deters, known), log_probs, slopes


def reinforce(policy, start, noise, settings, *, leave_one_out):
    """-Σ_h (G_h - b_h) log π(a_h | s_h) and the entropies' own gradient, averaged.

    G_h is all that comes after the action: the terms of state h and later ones, the entropies of
    later actions, and of its own entropy the slope of the tanh where the sample fell.
    """
    path, log_probs, slopes = taken(policy, start, noise, blocked=settings.stop_grad_actor_input)
    terms, known = objective_terms(policy, path, settings)
    _, moved = objective_terms(policy, path._replace(entropies=slopes), settings)
    total = torch.stack(known).sum(0).mean()
    for t, log_prob in enumerate(log_probs):
        to_go = torch.stack(terms[t:] + moved[t:] + known[t + 1 :]).sum(0).detach()
        n = len(to_go)
        baseline = (to_go.sum() - to_go) / (n - 1) if leave_one_out else 0.0
        total = total + ((to_go - baseline) * log_prob).mean()
    return -total / (len(terms) - 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("discount_head", [False, True])
@pytest.mark.parametrize("settings", EVERY_SETTING)
def test_lr_at_the_action_equals_reinforce(settings, discount_head, leave_one_out, form):
    policy, noise = of_form(form)
    if discount_head:
        policy = (make if form == "gaussian" else make_choosing)(discount_head=True)
    baseline = baselines.leave_one_out if leave_one_out else baselines.none
    lr = estimators.make("lr", baseline=baseline)
    expected = actor_gradient(
        reinforce(policy, starts(), noise, settings, leave_one_out=leave_one_out), policy
    )
    assert expected.norm() > 1e-3
    for node in NODES:  # what LR at the latent passes on to the action is dropped there
        loss = imagine(policy, starts(), noise, lr, replace(settings, node=node)).actor_loss
        torch.testing.assert_close(actor_gradient(loss, policy), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_lr_at_the_action_does_not_depend_on_the_stop_gradient(form):
    policy, noise = of_form(form)
    found = [
        actor_gradient(
            imagine(
                policy, starts(), noise, estimators.make("lr"), replace(settings, node="action")
            ).actor_loss,
            policy,
        )
        for settings in (BLOCKED, UNBLOCKED)
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


# RP


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("settings", EVERY_SETTING)
def test_rp_is_the_same_at_every_node(settings, node, form):
    """Value, and gradients of actor, model and critic; for choices it is straight-through."""
    policy, noise = of_form(form)
    losses = [
        imagine(policy, starts(), noise, estimators.make("rp"), s).actor_loss
        for s in (settings, replace(settings, node=node))
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(x, parameters, materialize_grads=True) for x in losses]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_rp_equals_finite_differences_with_common_random_numbers():
    """Central differences of the loss along three directions, of all that the actor learns."""
    policy, noise = make(), draw()
    settings = replace(UNBLOCKED, entropy_scale=0.2, node="action")
    rp, parameters = estimators.make("rp"), list(policy.actor.parameters())
    found = torch.autograd.grad(
        imagine(policy, starts(), noise, rp, settings).actor_loss, parameters
    )

    def loss(step, direction):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=step)
            value = explicit_loss(policy, starts(), noise, settings)
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(d, alpha=step)
        return float(value)

    for seed in (1, 2, 3):
        direction = [randn(*p.shape, seed=seed) for p in parameters]
        expected = (loss(1e-5, direction) - loss(-1e-5, direction)) / 2e-5
        slope = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True))
        assert slope == pytest.approx(expected, rel=1e-6)


# All estimators agree


@pytest.fixture(scope="module")
def reference():
    """The policy, and RP's gradients, unblocked: plain backprop, which finite differences check."""
    policy, settings = make_responsive(), replace(UNBLOCKED, entropy_scale=0.05)
    return policy, settings, gradients_of_draws(policy, estimators.make("rp"), settings)


@pytest.mark.parametrize("name", AGREEING)
@pytest.mark.parametrize("node", NODES)
def test_estimators_agree_in_mean(node, name, reference):
    """20 draws of 1500 samples, H = 3, seed 7: each parameter's mean paired difference to RP.

    Within 4 SE; see the test of the same name at the latent.
    """
    policy, settings, rp = reference
    key, estimator = agreeing(name)
    found = gradients_of_draws(policy, estimator, replace(settings, node=node))
    if key == "rp-cut":  # biased, as it says
        assert t_statistics(found - rp).abs().max() > 8
        return
    assert t_statistics(found - rp).abs().max() <= 4
    # The test can tell 0.9 of the gradient from all of it.
    assert t_statistics(found - 0.9 * rp).abs().max() > (3 if key == "lr" else 8)


def test_the_entropy_belongs_to_the_action_that_it_is_of():
    """The entropy alone, at LR: 20 draws of 1500 samples agree with RP within 4 SE.

    Without the slope of the tanh in the return-to-go, the mean would be that of the Gaussian's
    entropy, more than 8 SE away.
    """
    policy = make_responsive()
    with torch.no_grad():
        for head in (policy.model.reward_head, policy.critic):
            for p in head.parameters():
                p.zero_()
    settings = replace(UNBLOCKED, entropy_scale=1.0)
    rp = gradients_of_draws(policy, estimators.make("rp"), settings)
    found = gradients_of_draws(policy, estimators.make("lr"), replace(settings, node="action"))
    assert t_statistics(found - rp).abs().max() <= 4
    path, _, _ = taken(policy, alike(1500), next(iter_noise()), blocked=False)
    gaussian = -torch.stack(objective_terms(policy, path, settings)[1]).sum(0).mean() / 2
    without = actor_gradient(gaussian, policy)
    assert t_statistics(without - rp).abs().max() > 8


def iter_noise():
    source = generator(9)
    while True:
        sizes = ((3, 1500, A), (3, 1500, STOCH))
        yield ImaginationNoise(*(torch.randn(s, dtype=F64, generator=source) for s in sizes))


# Choices


def exact_gradient(policy, start, latent_noise, settings, sizes):
    """The gradient of the expectation over all actions, given the noise of the latents."""
    horizon, n, _ = latent_noise.shape
    rssm = policy.model.rssm
    options = [
        torch.cat([torch.eye(k, dtype=F64)[i] for k, i in zip(sizes, picked, strict=True)])
        for picked in itertools.product(*map(range, sizes))
    ]
    total = 0.0
    for actions in itertools.product(options, repeat=horizon):
        deter, stoch = start
        log_p, entropies, stochs, deters = 0.0, [], [], []
        for action, z in zip(actions, latent_noise, strict=True):
            raw = policy.actor(torch.cat((stoch, deter), -1))
            p = torch.cat(
                [0.99 * x.softmax(-1) + 0.01 / x.shape[-1] for x in raw.split(sizes, -1)], -1
            )
            log_p = log_p + (p.log() * action).sum(-1)
            entropies.append(-(p * p.log()).sum(-1))
            deter = rssm.recur(State(deter, stoch), action.expand(n, -1))
            mean, std = rssm.prior(deter)
            stoch = mean + std * z
            stochs.append(stoch)
            deters.append(deter)
        features = torch.stack([torch.cat(pair, -1) for pair in zip(stochs, deters, strict=True)])
        terms, bonus = objective_terms(policy, Path(features, [], [], [], entropies), settings)
        total = total + (log_p.exp() * torch.stack(terms + bonus).sum(0)).mean()
    return actor_gradient(-total / (horizon - 1), policy)


@pytest.mark.parametrize("baseline", ["none", "leave-one-out", "critic"])
def test_lr_of_choices_has_the_mean_of_the_enumerated_gradient(baseline):
    """20 draws of 1500 samples, H = 2, 36 sequences of actions, seed 7: within 4 SE.

    Noise of the latents, and starts, are the same in all draws. Actions move the states far, and
    the latents' noise little, so that the test can tell 0.9 of the gradient from all of it.
    """
    policy, n = make_choosing(), 1500
    with torch.no_grad():
        policy.model.rssm.input_layer.weight[:, STOCH:].mul_(6)
        policy.model.rssm.prior_out.weight[STOCH:].mul_(0.1)
        policy.model.rssm.prior_out.bias[STOCH:] = -3
    settings = replace(UNBLOCKED, entropy_scale=0.1, node="action")
    start, latent = alike(n), randn(2, n, STOCH, seed=6)
    expected = exact_gradient(policy, start, latent, settings, CHOICES)
    lr, source = estimators.make("lr", baseline=baseline), generator(7)
    found = []
    for _ in range(20):
        drawn = ImaginationNoise.draw(
            2, n, sum(CHOICES), GaussianLatents(STOCH), source, choices=True
        )
        noise = ImaginationNoise(drawn.action.double(), latent)
        found.append(flat(estimated(policy, start, noise, lr, settings).gradients))
    difference = torch.stack(found) - expected
    assert t_statistics(difference).abs().max() <= 4
    assert t_statistics(difference + 0.1 * expected).abs().max() > (3 if baseline == "none" else 4)


@pytest.mark.parametrize(("node", "name"), [("action", "rp"), ("action", "tpx"), ("latent", "lr")])
def test_straight_through_choices_are_biased(node, name):
    """20 draws of 1500 samples, H = 2, seed 7: more than 10 SE from the enumerated gradient.

    `tpx` weighs by variance, which does not see the bias of its pathwise leg, and at the latent
    even LR differentiates the action straight-through.
    """
    policy, n = make_choosing(), 1500
    settings = replace(UNBLOCKED, node=node)
    start, latent = alike(n), randn(2, n, STOCH, seed=6)
    expected = exact_gradient(policy, start, latent, settings, CHOICES)
    estimator, source, found = estimators.make(name), generator(7), []
    for _ in range(20):
        drawn = ImaginationNoise.draw(
            2, n, sum(CHOICES), GaussianLatents(STOCH), source, choices=True
        )
        noise = ImaginationNoise(drawn.action.double(), latent)
        found.append(flat(estimated(policy, start, noise, estimator, settings).gradients))
    assert t_statistics(torch.stack(found) - expected).abs().max() > 10


def test_choices_have_a_uniform_share_and_an_exact_entropy():
    actor, raw = CategoricalActor(3, CHOICES, width=5).double(), randn(N, 5, seed=4) * 3
    (log_p,) = actor.zeta(raw)
    _, entropy = actor.act(raw, None)
    expected = 0.0
    for k, found, part in zip(
        CHOICES, log_p.split(CHOICES, -1), raw.split(CHOICES, -1), strict=True
    ):
        p = 0.99 * part.exp() / part.exp().sum(-1, keepdim=True) + 0.01 / k
        torch.testing.assert_close(found.exp(), p)
        expected = expected + Categorical(p).entropy()
    torch.testing.assert_close(entropy, expected)
    (log_p,) = actor.zeta(torch.tensor([[1e4, -1e4, -1e4, 0.0, 1e4]], dtype=F64))
    assert (log_p >= math.log(0.01 / 3) - 1e-9).all()


def test_choices_are_drawn_with_their_probabilities():
    """200,000 draws, seed 0: each frequency within 4 SE of its probability."""
    actor, n = CategoricalActor(3, CHOICES, width=5).double(), 200_000
    raw = torch.tensor([[0.5, -1.0, 1.0, 0.0, -2.0]], dtype=F64)
    noise = actor.noise(n, generator=generator(0), device=torch.device("cpu"))
    action, _ = actor.act(raw.expand(n, -1), noise)
    assert set(action.unique().tolist()) == {0.0, 1.0}
    p = actor.zeta(raw)[0].exp()[0]
    error = (p * (1 - p) / n).sqrt()
    assert ((action.mean(0) - p) / error).abs().max() <= 4
    mode, _ = actor.act(raw, None)
    assert mode.tolist() == [[1.0, 0.0, 1.0, 0.0, 0.0]]


def test_the_gradient_of_a_choice_is_straight_through():
    actor = CategoricalActor(3, CHOICES, width=5).double()
    raw, weight = randn(N, 5, seed=4).requires_grad_(), randn(N, 5, seed=5)
    action, _ = actor.act(raw, draw_choosing().action[0])
    (found,) = torch.autograd.grad((weight * action).sum(), raw)
    (expected,) = torch.autograd.grad((weight * actor.zeta(raw)[0].exp()).sum(), raw)
    torch.testing.assert_close(found, expected)


# Probe, meter, value


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("name", ["rp", "lr", "tp", "tps", "tpx", "ivw"])
def test_the_tap_collects_the_whole_gradient_of_the_last_layer(name, node, form):
    """That layer acts through the actions alone: the samples' gradients sum to it."""
    policy, noise = of_form(form)
    settings = replace(UNBLOCKED, node=node)
    found = estimated(policy, starts(), noise, estimators.make(name), settings, per_sample=True)
    assert found.per_sample.shape == (N, last_layer_size(policy.actor))
    expected = flat(found.gradients[-2:])
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found.per_sample.sum(0), expected, rtol=1e-9, atol=1e-12)


def test_the_latents_probe_sees_choices_straight_through():
    """Of RP at the latent: (mean, std)'s cotangents through the step's own action alone."""
    policy, noise = make_choosing(), draw_choosing()
    spy = SpyEstimator()
    spy.probe = "subset"
    imagine(policy, starts(), noise, spy, UNBLOCKED)
    cotangent = randn(N, STOCH, seed=8), randn(N, STOCH, seed=9)
    rssm, actor = policy.model.rssm, policy.actor
    for i in range(N):
        one = State(*(x[i : i + 1] for x in starts()))
        action, _ = actor.act(actor(one.features), noise.action[0, i : i + 1])
        mean, std = rssm.prior(rssm.recur(one, action))
        total = (cotangent[0][i] * mean).sum() + (cotangent[1][i] * std).sum()
        expected = flat(torch.autograd.grad(total, list(actor.out.parameters())))
        torch.testing.assert_close(
            spy.calls[0]["probe"](cotangent)[i], expected, rtol=1e-7, atol=1e-12
        )


@pytest.mark.parametrize("form", FORMS)
def test_meter_measures_k_of_every_node(form):
    """Actions come first; LR has k = 1 and RP 0 everywhere, `tpx` its own at each coordinate."""
    policy, noise = of_form(form)
    size = noise.action.shape[-1]
    for node, columns in (("action", size), ("both", size + STOCH)):
        settings, found = replace(UNBLOCKED, node=node), {}
        assert meter_shape(noise, node) == (H, columns)
        for name in ("rp", "lr", "tpx"):
            meter = torch.zeros(H, columns, dtype=F64, requires_grad=True)
            estimator = estimators.make(name)
            found[name] = estimated(policy, starts(), noise, estimator, settings, meter=meter).k
        assert (found["rp"] == 0).all() and (found["lr"] == 1).all()
        assert ((found["tpx"] >= 0) & (found["tpx"] <= 1)).all()
        assert len(found["tpx"].unique()) > columns


def test_both_meters_are_those_of_their_nodes():
    """In the last step nothing comes between a node and the loss: k at the latent is the same."""
    policy, noise, found = make(), draw(), {}
    for node in ("latent", "both"):
        shape = meter_shape(noise, node)
        meter = torch.zeros(shape, dtype=F64, requires_grad=True)
        settings = replace(UNBLOCKED, node=node)
        found[node] = estimated(
            policy, starts(), noise, estimators.make("tpx"), settings, meter=meter
        ).k
    torch.testing.assert_close(found["both"][-1, A:], found["latent"][-1])


@pytest.mark.parametrize("form", FORMS)
def test_the_gauge_of_a_step_is_the_sum_of_its_nodes(form):
    """For `rp`, whose legs at one node do not depend on the estimator at another."""
    policy, noise = of_form(form)
    found = {}
    for node in ("action", "latent", "both"):
        gauge = torch.zeros(H, *SHAPE, dtype=F64, requires_grad=True)
        settings = replace(UNBLOCKED, node=node)
        loss = imagine(policy, starts(), noise, estimators.make("rp"), settings, gauge=gauge)
        (found[node],) = torch.autograd.grad(loss.actor_loss, gauge)
    torch.testing.assert_close(found["both"], found["action"] + found["latent"])
    assert (found["latent"][:, 0, 1] == 2 * STOCH).all() and (found["action"][:, :, 1] > 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_critic_baseline_is_given_the_value_after_the_reward_of_the_state(form):
    """V(s) - r(s) of the state that each action is chosen in, once for every choice."""
    policy, noise = of_form(form)
    values = []

    def spy(returns, value):
        values.append(value)
        return torch.zeros_like(returns)

    settings = replace(UNBLOCKED, node="action")
    loss = imagine(policy, starts(), noise, estimators.make("lr", baseline=spy), settings)
    loss.actor_loss.backward()
    seen = torch.cat((starts().features.unsqueeze(0), loss.features[:-1]))
    expected = (policy.critic(seen) - policy.model.reward_head(seen))[..., 0].detach()
    nodes = 1 if form == "gaussian" else len(CHOICES)
    assert len(values) == H * nodes
    for i, value in enumerate(values):  # backpropagation visits the last first
        torch.testing.assert_close(value, expected[H - 1 - i // nodes])


def test_every_estimator_has_the_same_loss_at_every_node():
    policy, noise = make(), draw(2)
    expected = explicit_loss(policy, starts(), noise, BLOCKED).detach()
    for name in estimators.names():
        for node in NODES:
            settings = replace(BLOCKED, node=node)
            found = estimated(policy, starts(), noise, estimators.make(name), settings)
            torch.testing.assert_close(found.loss, expected)


# carry


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("name", ["rp", "lr"])
def test_a_pathwise_carry_changes_neither_rp_nor_lr(name, node, form):
    """RP passes it on anyway, and LR drops all that it receives."""
    policy, noise = of_form(form)
    settings = replace(UNBLOCKED, node=node)
    found = [
        actor_gradient(
            imagine(
                policy, starts(), noise, estimators.make(name, carry=carry), settings
            ).actor_loss,
            policy,
        )
        for carry in ("mixture", "pathwise")
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_with_a_pathwise_carry_earlier_states_receive_rp():
    """A rule of fixed k: θ gets the mixture of each step, whose RP leg is that of RP alone."""
    policy, noise = make(), draw()
    settings = replace(UNBLOCKED, node="action")

    def half(rp, legs, probe):
        return [torch.full_like(rp[0][:1], 0.5)]

    def gradient(estimator):
        loss = imagine(policy, starts(), noise, estimator, settings).actor_loss
        return actor_gradient(loss, policy)

    mixed = gradient(estimators.Estimator(half, baseline=baselines.none, carry="pathwise"))
    rp = gradient(estimators.make("rp"))
    lr = gradient(estimators.make("lr", baseline=baselines.none))
    torch.testing.assert_close(mixed, 0.5 * rp + 0.5 * lr, rtol=1e-9, atol=1e-12)
    carried = gradient(estimators.Estimator(half, baseline=baselines.none))
    assert (carried - mixed).norm() > 1e-3 * mixed.norm()
