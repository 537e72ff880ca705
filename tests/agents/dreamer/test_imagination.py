"""Imagined rollouts and their gradients against independent rollouts, surrogates and the papers.

Everything is tiny and float64. Imagined states are s_1 .. s_H, as in the docstrings; arrays begin
at 0, so row h is state s_{h+1}, and row h of the actions is a_h, chosen in s_h (s_0 is the start).
"""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.distributions import Normal
from torch.distributions.transforms import TanhTransform
from torch.nn.functional import elu, softplus

from tests.estimators.conftest import gram_by_hand
from totalprop import estimators
from totalprop.agents.dreamer import imagination
from totalprop.agents.dreamer.imagination import (
    ImaginationNoise,
    ImaginationSettings,
    critic_loss,
    imagine,
    lambda_returns,
)
from totalprop.agents.dreamer.policy import Actor, DreamerPolicy
from totalprop.estimators import baselines
from totalprop.estimators.declarations import having
from totalprop.estimators.gauge import SHAPE, read
from totalprop.estimators.probes import gram, restrict
from totalprop.world_models.latent.distributions import GaussianLatents
from totalprop.world_models.latent.rssm import State

F64 = torch.float64
H, N, A, STOCH, DETER = 4, 6, 2, 3, 4
SIZES = {"stoch": STOCH, "deter": DETER, "hidden": 5, "width": 5}
# γ = 7/8 is exact in float32: see test_discount_weights_have_the_dtype_of_the_values.
UNBLOCKED = ImaginationSettings(
    gamma=0.875, lam=0.8, stop_grad_actor_input=False, discount_weights=True, entropy_scale=0.0
)
BLOCKED = replace(UNBLOCKED, stop_grad_actor_input=True)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(shape, dtype=F64, generator=generator(seed))


def make(**changes):
    """A policy with weights and biases of about 0.5, and action stds of about 0.7."""
    observation, action = spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (A,))
    policy = DreamerPolicy(observation, action, **{**SIZES, **changes}).double()
    with torch.no_grad():
        for i, p in enumerate(policy.parameters()):
            p.copy_(0.5 * randn(*p.shape, seed=100 + i))
        policy.actor.out.bias[A:] -= 5
    return policy


def starts(n=N):
    return State(randn(n, DETER, seed=1).tanh(), randn(n, STOCH, seed=2))


def draw(horizon=H, n=N, seed=3):
    source = generator(seed)
    sizes = ((horizon, n, A), (horizon, n, STOCH))
    return ImaginationNoise(*(torch.randn(s, dtype=F64, generator=source) for s in sizes))


def flat(gradients):
    return torch.cat([g.reshape(-1) for g in gradients])


def actor_gradient(loss, policy):
    return flat(torch.autograd.grad(loss, list(policy.actor.parameters())))


def estimated(policy, start, noise, estimator, settings, **kwargs):
    """The policy gradient of any estimator, computed as the agent does."""
    return estimators.gradient(
        lambda e, tap: (
            imagine(
                policy, start, noise, e, settings, tap=tap, meter=kwargs.get("meter")
            ).actor_loss
        ),
        list(policy.actor.parameters()),
        estimator,
        samples=len(start.stoch),
        tap_size=imagination.last_layer_size(policy.actor),
        **kwargs,
    )


# An independent imagination


class Path(NamedTuple):
    """An imagined rollout without nodes and credits; lists over the steps."""

    features: Tensor  # [H, N, F]
    priors: list[Normal]
    stochs: list[Tensor]
    deters: list[Tensor]
    entropies: list[Tensor]  # [N] of the action that led there


def explicit_rollout(policy, start, noise, *, blocked, detach_samples=False):
    """Imagine step by step; with detached samples, only paths around the nodes carry a gradient."""
    deter, stoch, rssm = start.deter, start.stoch, policy.model.rssm
    priors, stochs, deters, entropies = [], [], [], []
    for action_noise, latent_noise in zip(*noise, strict=True):
        x = torch.cat((stoch, deter), -1)
        x = x.detach() if blocked else x
        for layer in policy.actor.hidden:
            if isinstance(layer, torch.nn.Linear):
                x = elu(x @ layer.weight.T + layer.bias)
        raw = x @ policy.actor.out.weight.T + policy.actor.out.bias
        std = softplus(raw[:, A:] + math.log(math.exp(5) - 1)) + 1e-4
        gaussian, squash = Normal(5 * torch.tanh(raw[:, :A] / 5), std), TanhTransform()
        u = gaussian.mean + std * action_noise
        slope = squash.log_abs_det_jacobian(u, squash(u))
        entropies.append((gaussian.entropy() + slope).sum(-1))
        deter = rssm.recur(State(deter, stoch), squash(u))
        prior = Normal(*rssm.prior(deter))
        stoch = prior.mean + prior.stddev * latent_noise
        stoch = stoch.detach() if detach_samples else stoch
        priors.append(prior)
        stochs.append(stoch)
        deters.append(deter)
    features = torch.stack([torch.cat(pair, -1) for pair in zip(stochs, deters, strict=True)])
    return Path(features, priors, stochs, deters, entropies)


def objective_terms(policy, path, settings):
    """Terms of Σ_t w_t (R_t + entropy_scale·entropy) by what they are a function of.

    The λ-return without a recursion, as a sum over its horizons: with c_th = Π_{t ≤ j < h} λ γ_j,
    R_t = Σ_{t ≤ h < H} c_th (r_h + γ_h (1 - λ) V_{h+1}) + c_tH V_H.

    Returns:
        [H] lists of the terms of state h [N], and [H - 1] of the entropies of row h.
    """
    values = policy.critic(path.features)[..., 0]
    rewards = policy.model.reward_head(path.features)[..., 0]
    gamma = torch.full_like(values, settings.gamma)
    if policy.model.discount_head is not None:
        gamma = torch.sigmoid(policy.model.discount_head(path.features)[..., 0])
    last = len(values) - 1
    terms = [torch.zeros_like(values[0]) for _ in range(last + 1)]
    entropies = []
    for t in range(last):
        weight = gamma[:t].detach().prod(0) if settings.discount_weights else 1.0
        entropies.append(weight * settings.entropy_scale * path.entropies[t])
        decay = weight
        for h in range(t, last):
            terms[h] = terms[h] + decay * rewards[h]
            bootstrap = gamma[h] * (1 - settings.lam) * values[h + 1]
            terms[h + 1] = terms[h + 1] + decay * bootstrap
            decay = decay * settings.lam * gamma[h]
        terms[last] = terms[last] + decay * values[last]
    return terms, entropies


def explicit_loss(policy, start, noise, settings):
    """Plain backpropagation through the reparameterised loss."""
    path = explicit_rollout(policy, start, noise, blocked=settings.stop_grad_actor_input)
    terms, entropies = objective_terms(policy, path, settings)
    return -torch.stack(terms + entropies).sum(0).mean() / (len(terms) - 1)


def returns_to_go(terms, entropies):
    """[H, N] of what each node can influence: its state's terms and later ones.

    The action of row h is chosen in the state of row h - 1: node t influences it for h > t.
    """
    return [torch.stack(terms[t:] + entropies[t + 1 :]).sum(0).detach() for t in range(len(terms))]


def explicit_surrogate(policy, start, noise, settings, *, leave_one_out):
    """The score-function surrogate of every node plus the paths that bypass the nodes."""
    path = explicit_rollout(
        policy, start, noise, blocked=settings.stop_grad_actor_input, detach_samples=True
    )
    terms, entropies = objective_terms(policy, path, settings)
    total = torch.stack(terms + entropies).sum(0).mean()
    to_go = returns_to_go(terms, entropies)
    for returns, prior, sample in zip(to_go, path.priors, path.stochs, strict=True):
        n = len(returns)
        baseline = [(returns.sum() - r) / (n - 1) for r in returns] if leave_one_out else [0.0] * n
        advantage = returns - torch.tensor(baseline, dtype=F64)
        total = total + (advantage * prior.log_prob(sample).sum(-1)).mean()
    return -total / (len(terms) - 1)


# The actor's distribution


def test_actions_and_entropies_are_of_a_squashed_gaussian():
    """The entropy's mean over the noise is -∫ p log p da; both are sums over a fine grid."""
    actor = Actor(3, 1, width=5).double()
    raw = torch.tensor([[0.7, -4.5], [-6.0, -5.5], [2.0, -3.0]], dtype=F64)
    mean, std = 5 * torch.tanh(raw[:, 0] / 5), 1e-4 + softplus(raw[:, 1] + math.log(math.expm1(5)))
    grid = torch.linspace(-9, 9, 6001, dtype=F64)
    density = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
    action, entropy = actor.act(raw.expand(len(grid), -1, -1), grid[:, None, None].expand(-1, 3, 1))
    u = mean + std * grid[:, None]
    torch.testing.assert_close(action[..., 0], u.tanh())
    assert entropy.shape == (len(grid), 3)
    log_p = Normal(mean, std).log_prob(u) + 2 * u.cosh().log()  # d tanh(u) / du = 1 / cosh²
    torch.testing.assert_close(density @ entropy, -(density @ log_p), rtol=1e-9, atol=1e-9)
    # Every sample: the Gaussian's entropy and the slope where it fell.
    torch.testing.assert_close(entropy, Normal(mean, std).entropy() - 2 * u.cosh().log())


def test_entropy_is_finite_where_actions_saturate():
    actor = Actor(3, 1, width=5)
    raw = torch.tensor([[50.0, 30.0], [-50.0, -60.0]], requires_grad=True)
    for noise in (-40.0, 0.0, 40.0):
        _, entropy = actor.act(raw, torch.full((2, 1), noise))
        (gradient,) = torch.autograd.grad(entropy.sum(), raw)
        assert torch.isfinite(entropy).all() and torch.isfinite(gradient).all()


def test_without_noise_the_action_is_the_squashed_mean():
    actor, raw = Actor(3, A, width=5).double(), randn(N, 2 * A, seed=5)
    expected = (5 * torch.tanh(raw[:, :A] / 5)).tanh()
    torch.testing.assert_close(actor.act(raw, None)[0], expected)


# λ-returns


def test_lambda_returns_by_hand():
    """H = 3: R_2 = 2 + 0.5 · 30 = 17 and R_1 = 1 + 0.5 (0.2 · 20 + 0.8 · 17) = 9.8."""
    rewards = torch.tensor([[1.0], [2.0], [math.nan]], dtype=F64)  # r_3 is not used,
    values = torch.tensor([[math.nan], [20.0], [30.0]], dtype=F64)  # nor V_1
    found = lambda_returns(rewards, values, 0.5, 0.8)
    torch.testing.assert_close(found, torch.tensor([[9.8], [17.0]], dtype=F64))
    # γ_1 = 0.5, γ_2 = 0.25: R_2 = 2 + 0.25 · 30 = 9.5, R_1 = 1 + 0.5 (4 + 0.8 · 9.5) = 6.8.
    gamma = torch.tensor([[0.5], [0.25], [math.nan]], dtype=F64)
    found = lambda_returns(rewards, values, gamma, 0.8)
    torch.testing.assert_close(found, torch.tensor([[6.8], [9.5]], dtype=F64))


@pytest.mark.parametrize("horizon", [2, 3, 7])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_lambda_returns_equal_a_recursion_over_single_numbers(horizon, lam):
    rewards, values = randn(horizon, N, seed=1), randn(horizon, N, seed=2)
    gamma = torch.sigmoid(randn(horizon, N, seed=3))

    def recursion(t, i, gamma):
        if t == horizon - 1:
            return float(values[t, i])
        bootstrap = (1 - lam) * float(values[t + 1, i]) + lam * recursion(t + 1, i, gamma)
        return float(rewards[t, i]) + float(gamma[t, i]) * bootstrap

    for g, used in ((gamma, gamma), (0.9, torch.full_like(gamma, 0.9))):
        expected = [[recursion(t, i, used) for i in range(N)] for t in range(horizon - 1)]
        found = lambda_returns(rewards, values, g, lam)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=F64))


def test_lambda_returns_limits():
    """λ = 0 gives one step and the bootstrap, λ = 1 discounted rewards and the last value."""
    rewards, values = randn(H, N, seed=1), randn(H, N, seed=2)
    torch.testing.assert_close(
        lambda_returns(rewards, values, 0.9, 0.0), rewards[:-1] + 0.9 * values[1:]
    )
    found = lambda_returns(rewards, values, 0.9, 1.0)
    for t in range(H - 1):
        discounted = sum(0.9 ** (h - t) * rewards[h] for h in range(t, H - 1))
        torch.testing.assert_close(found[t], discounted + 0.9 ** (H - 1 - t) * values[-1])


def test_lambda_returns_pass_gradients_to_rewards_values_and_gamma():
    inputs = [randn(3, 2, seed=i).requires_grad_() for i in (1, 2)]
    inputs.append(torch.rand(3, 2, dtype=F64, generator=generator(3)).requires_grad_())
    assert torch.autograd.gradcheck(lambda r, v, g: lambda_returns(r, v, g, 0.7), inputs)


def test_a_lambda_return_needs_two_states():
    with pytest.raises(ValueError, match="at least 2 imagined states, got 1"):
        lambda_returns(torch.zeros(1, N), torch.zeros(1, N), 0.9, 0.9)
    with pytest.raises(ValueError, match="at least 2 imagined states, got 1"):
        imagine(make(), starts(), draw(1), estimators.make("rp"), BLOCKED)


# Parmas et al. 2023, Eq. 16 and 17


def paper_weights(horizon, gamma, lam):
    """w_r^t, w_V^t for t = 0 .. H' - 1 and w_V^H' of Parmas et al. 2023, Eq. 17."""
    x = lam * gamma
    w_r = [(1 - x ** (t + 1)) / (horizon * (1 - x)) for t in range(horizon)]
    w_v = [(1 - x**t) / (horizon * (1 - x)) * (1 - lam) * gamma for t in range(horizon)]
    return w_r, w_v, (1 - x**horizon) / (horizon * (1 - x)) * gamma


def dreamer_weights(horizon, gamma, lam):
    """Weights [H] of r_t and V_t in mean_t R_t, t = 1 .. H, from the paper's.

    The paper's states are x_0 .. x_H' with H' returns V^λ_0 .. V^λ_{H'-1}, the bootstrap in x_H'.
    Ours are s_1 .. s_H with H - 1 returns R_1 .. R_{H-1}, the bootstrap in s_H. So H' = H - 1,
    the paper's t is our t - 1, w_r of s_H is 0, and w_V of s_1 is w_V^0 = 0.
    """
    w_r, w_v, w_last = paper_weights(horizon - 1, gamma, lam)
    return torch.tensor([*w_r, 0.0], dtype=F64), torch.tensor([*w_v, w_last], dtype=F64)


@pytest.mark.parametrize("horizon", [2, 3, 6])
def test_weights_of_rewards_and_values_are_those_of_the_paper(horizon):
    rewards = randn(horizon, N, seed=1).requires_grad_()
    values = randn(horizon, N, seed=2).requires_grad_()
    objective = lambda_returns(rewards, values, 0.9, 0.8).mean(0).sum()
    found = torch.autograd.grad(objective, [rewards, values])
    for gradient, weights in zip(found, dreamer_weights(horizon, 0.9, 0.8), strict=True):
        torch.testing.assert_close(gradient, weights[:, None].expand(-1, N))


class SpyEstimator:
    """Reparameterised samples, with a leaf of zeros in the credit of each node."""

    probe = "none"
    needs_value = needs_critic = False

    def __init__(self):
        self.leaves, self.calls = [], []

    def __call__(self, mean, std, noise, credit, **kwargs):
        self.leaves.append(torch.zeros_like(credit, requires_grad=True))
        self.calls.append({"mean": mean, "std": std, "credit": credit, **kwargs})
        return mean + std * noise, credit + self.leaves[-1]


def test_credit_of_each_node_is_minus_the_dreamer_return():
    """R_t = w_V^H V_H + Σ_{h ≥ t} (w_r^h r_h + w_V^h V_h): Parmas et al. 2023, App. C.1."""
    policy, spy = make(), SpyEstimator()
    settings = replace(UNBLOCKED, discount_weights=False)
    start, noise = starts(), draw()
    loss = imagine(policy, start, noise, spy, settings).actor_loss
    found = torch.autograd.grad(loss, spy.leaves)
    features = explicit_rollout(policy, start, noise, blocked=False).features
    rewards = policy.model.reward_head(features)[..., 0]
    values = policy.critic(features)[..., 0]
    w_r, w_v = dreamer_weights(H, settings.gamma, settings.lam)
    each = w_r[:, None] * rewards + w_v[:, None] * values
    for t in range(H):
        torch.testing.assert_close(found[t], -each[t:].sum(0).detach() / N)


@pytest.mark.parametrize("discount_head", [False, True])
@pytest.mark.parametrize("discount_weights", [False, True])
def test_credit_of_each_node_is_its_return_to_go(discount_weights, discount_head):
    """Also with discount weights, a learned discount and entropies."""
    policy, spy = make(discount_head=discount_head), SpyEstimator()
    settings = replace(UNBLOCKED, discount_weights=discount_weights, entropy_scale=0.3)
    start, noise = starts(), draw()
    found = torch.autograd.grad(imagine(policy, start, noise, spy, settings).actor_loss, spy.leaves)
    path = explicit_rollout(policy, start, noise, blocked=False)
    expected = returns_to_go(*objective_terms(policy, path, settings))
    for t in range(H):
        torch.testing.assert_close(found[t], -expected[t] / (N * (H - 1)), rtol=1e-7, atol=1e-10)


# The gradient: RP, LR


EVERY_SETTING = [
    pytest.param(replace(UNBLOCKED, stop_grad_actor_input=b, discount_weights=w, entropy_scale=e))
    for b, w, e in [(False, True, 0.0), (True, True, 0.0), (False, False, 0.2), (True, True, 0.2)]
]


@pytest.mark.parametrize("discount_head", [False, True])
@pytest.mark.parametrize("settings", EVERY_SETTING)
def test_rp_equals_plain_backprop(settings, discount_head):
    """Value, and gradients of actor, model and critic."""
    policy, start, noise = make(discount_head=discount_head), starts(), draw()
    found = imagine(policy, start, noise, estimators.make("rp"), settings).actor_loss
    expected = explicit_loss(policy, start, noise, settings)
    torch.testing.assert_close(found, expected)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)
    assert actor_gradient(explicit_loss(policy, start, noise, settings), policy).norm() > 1e-3


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("discount_head", [False, True])
@pytest.mark.parametrize("settings", EVERY_SETTING)
def test_lr_equals_score_function_with_bypass(settings, discount_head, leave_one_out):
    policy, start, noise = make(discount_head=discount_head), starts(), draw()
    baseline = baselines.leave_one_out if leave_one_out else baselines.none
    lr = estimators.make("lr", baseline=baseline)
    loss = imagine(policy, start, noise, lr, settings).actor_loss
    surrogate = explicit_surrogate(policy, start, noise, settings, leave_one_out=leave_one_out)
    found, expected = (actor_gradient(x, policy) for x in (loss, surrogate))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    assert expected.norm() > 1e-3


def test_stop_grad_flag_changes_the_estimand():
    """The flag detaches the actor's input and does nothing else; it affects both legs."""
    policy, start, noise = make(), starts(), draw()
    for name in ("rp", "lr"):
        losses = [
            imagine(policy, start, noise, estimators.make(name), s).actor_loss
            for s in (BLOCKED, UNBLOCKED)
        ]
        torch.testing.assert_close(*losses)
        blocked, unblocked = (actor_gradient(loss, policy) for loss in losses)
        assert (blocked - unblocked).norm() > 0.01 * unblocked.norm()


def test_every_estimator_has_the_same_loss():
    policy, start, noise = make(), starts(), draw(2)
    expected = explicit_loss(policy, start, noise, BLOCKED).detach()
    for name in estimators.names():
        found = estimated(policy, start, noise, estimators.make(name), BLOCKED)
        torch.testing.assert_close(found.loss, expected)


def test_discount_weights_have_the_dtype_of_the_values():
    policy, start, noise = make(), starts(), draw()
    settings = replace(UNBLOCKED, gamma=0.9)
    found = imagine(policy, start, noise, estimators.make("rp"), settings).actor_loss
    expected = explicit_loss(policy, start, noise, settings)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# All estimators agree


DRAWS, N_EACH, HORIZON = 20, 1500, 3
WIDTH = 7


def make_responsive(**changes):
    """A policy whose actions follow the state closely, so that the path z -> action counts.

    Small noise everywhere, and below all samples start alike: LR's noise is then that of the nodes,
    and 20 draws can tell a bias of a few per cent.
    """
    policy = make(hidden=WIDTH, width=WIDTH, **changes)
    rssm, out = policy.model.rssm, policy.actor.out
    linear = [layer for layer in policy.actor.hidden if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for i, layer in enumerate(linear):
            layer.weight.copy_(torch.eye(WIDTH) + 0.1 * randn(WIDTH, WIDTH, seed=300 + i))
            layer.bias.zero_()
        out.weight.copy_(randn(2 * A, WIDTH, seed=400))
        out.weight[A:] *= 0.1
        out.bias.zero_()
        out.bias[A:] = -4.95
        rssm.input_layer.weight.mul_(2)
        rssm.cell.weight_ih.mul_(2)
        rssm.prior_out.weight[STOCH:] *= 0.3
        rssm.prior_out.bias[STOCH:] = -1
    return policy


def alike(n):
    return State(*(x.expand(n, -1) for x in starts(1)))


def draws():
    source = generator(7)
    sizes = ((HORIZON, N_EACH, A), (HORIZON, N_EACH, STOCH))
    for _ in range(DRAWS):
        yield ImaginationNoise(*(torch.randn(s, dtype=F64, generator=source) for s in sizes))


def gradients_of_draws(policy, estimator, settings, start=None):
    """[DRAWS, P] gradients."""
    start = start or alike(N_EACH)
    return torch.stack(
        [flat(estimated(policy, start, z, estimator, settings).gradients) for z in draws()]
    )


def t_statistics(difference):
    """[P] mean over standard error of paired differences [DRAWS, P]; 0 for mere round-off."""
    error = difference.std(0) / math.sqrt(len(difference))
    return torch.where(error > 1e-13, difference.mean(0) / error, 0.0)


@pytest.fixture(scope="module")
def references():
    """The policy, and RP's gradients without and with the stop-gradient."""
    policy, rp = make_responsive(), estimators.make("rp")
    settings = [replace(s, entropy_scale=0.05) for s in (UNBLOCKED, BLOCKED)]
    return policy, {s: gradients_of_draws(policy, rp, s) for s in settings}


AGREEING = [
    *estimators.names(), "lr, critic", "tpx, critic", "tpx, cross-fit", "lr, lax", "tpx, lax",
]  # fmt: skip


def agreeing(name):
    """The estimator that an entry of AGREEING names."""
    key, *options = name.split(", ")
    changes = {"baseline": "critic"} if "critic" in options else {}
    if "lax" in options:
        changes["legs"] = "lax"
    return key, estimators.make(key, cross_fit="cross-fit" in options, **changes)


@pytest.mark.parametrize("name", AGREEING)
def test_estimators_agree_in_mean(name, references):
    """20 draws of 1500 samples, H = 3, seed 7: each parameter's mean paired difference to RP.

    Within 4 SE. No cross-fitting: at 1500 samples the bias of a k that is chosen from the samples
    it weighs is below the standard error.
    """
    policy, by_settings = references
    settings, rp = next(iter(by_settings.items()))
    key, estimator = agreeing(name)
    found = gradients_of_draws(policy, estimator, settings)
    if key == "rp-cut":  # biased, as it says
        assert t_statistics(found - rp).abs().max() > 8
        return
    assert t_statistics(found - rp).abs().max() <= 4
    # The test can tell 0.9 of the gradient from all of it. (ddcg counts different starts as jumps.)
    least = {"lr": 3, "ddcg": 3, "lr-first-order": 5}.get(key, 8)
    assert t_statistics(found - 0.9 * rp).abs().max() > least


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("node", ["latent", "action"])
def test_legs_with_a_critic_are_given_the_value_of_what_the_sample_leads_to(node, slow):
    """V(h, z) at the latent; at the action, V at the prior's mean of the next state."""
    policy, noise, critics = make(slow_critic=slow), draw(), []
    rssm = policy.model.rssm

    def parts(features):
        stoch, deter = features.split((STOCH, DETER), -1)
        return State(deter, stoch)

    @having("needs_critic")
    def spy(critic):
        critics.append(critic)
        return estimators.legs.score

    estimator = estimators.make("lr", legs=spy)
    settings = replace(UNBLOCKED, node=node)
    features = imagine(policy, starts(), noise, estimator, settings).features
    assert len(critics) == H
    before = torch.cat((starts().features.unsqueeze(0), features[:-1]))
    u = randn(N, A, seed=8)
    for state, after, critic in zip(before, features, critics, strict=True):
        deter = parts(after).deter if node == "latent" else rssm.recur(parts(state), u.tanh())
        stoch = randn(N, STOCH, seed=9) if node == "latent" else rssm.prior(deter).mean
        critic_of = policy.slow_critic if slow else policy.critic
        expected = critic_of(torch.cat((stoch, deter), -1)).squeeze(-1)
        found = critic(stoch if node == "latent" else u)
        torch.testing.assert_close(found, expected)


def test_with_the_stop_gradient_the_means_differ(references):
    """DreamerV1's stop-gradient cuts z -> action out of RP, not out of LR; it biases both.

    LR still takes what flows through z by the score, but not what flows through h, which bypasses
    the nodes. As above, but more than 5 SE somewhere.
    """
    policy, by_settings = references
    (_, rp), (blocked, rp_blocked) = by_settings.items()
    for name in ("lr", "tpx"):
        found = gradients_of_draws(policy, estimators.make(name), blocked)
        assert t_statistics(found - rp_blocked).abs().max() > 5
        assert t_statistics(found - rp).abs().max() > 5
    assert t_statistics(rp_blocked - rp).abs().max() > 5


@pytest.mark.parametrize("discount_weights", [False, True])
def test_detached_weights_of_a_learned_discount_change_the_estimand(discount_weights):
    """LR sees how a state moves the weights of later steps, RP does not: they are detached.

    20 draws of 1500 samples, seed 7: without the weights within 4 SE, with them beyond.
    """
    policy, start = make(discount_head=True), starts(N_EACH)
    settings = replace(UNBLOCKED, discount_weights=discount_weights)
    rp, lr = (
        gradients_of_draws(policy, estimators.make(name), settings, start) for name in ("rp", "lr")
    )
    assert (t_statistics(lr - rp).abs().max() > 4) == discount_weights


# The probe of the actor's last layer


def per_sample_gradients(policy, state, action_noise, cotangent):
    """[N, P'] of Σ cotangent·(mean, std) w.r.t. the last layer, by autograd, one at a time."""
    out, rssm, rows = policy.actor.out, policy.model.rssm, []
    for i in range(len(action_noise)):
        one = State(*(x[i : i + 1].detach() for x in state))
        raw = out(policy.actor.hidden(one.features).detach())
        std = softplus(raw[:, A:] + math.log(math.exp(5) - 1)) + 1e-4
        action = torch.tanh(5 * torch.tanh(raw[:, :A] / 5) + std * action_noise[i])
        mean, std = rssm.prior(rssm.recur(one, action))
        total = (cotangent[0][i] * mean).sum() + (cotangent[1][i] * std).sum()
        rows.append(flat(torch.autograd.grad(total, [out.weight, out.bias])))
    return torch.stack(rows)


def states_before(start, path):
    """The state in which each row's action was chosen."""
    return [start, *(State(h, z) for h, z in zip(path.deters, path.stochs, strict=True))]


@pytest.mark.parametrize("settings", [BLOCKED, UNBLOCKED])
def test_probe_equals_per_sample_autograd(settings):
    """At every step: calls and Gram matrices, for cotangents of the mean, the std and both."""
    policy, start, noise, spy = make(), starts(), draw(), SpyEstimator()
    spy.probe = "subset"
    imagine(policy, start, noise, spy, settings)
    path = explicit_rollout(policy, start, noise, blocked=True)
    mean, std = randn(N, STOCH, seed=8), randn(N, STOCH, seed=9)
    cotangents = [(mean, 0 * std), (0 * mean, std), (mean + 1, std - mean)]
    stacked = tuple(torch.stack(member) for member in zip(*cotangents, strict=True))
    for t, state in enumerate(states_before(start, path)[:-1]):
        probe = spy.calls[t]["probe"]
        expected = [per_sample_gradients(policy, state, noise.action[t], c) for c in cotangents]
        assert expected[0].shape == (N, imagination.last_layer_size(policy.actor))
        for cotangent, rows in zip(cotangents, expected, strict=True):
            assert rows.norm() > 1e-4
            torch.testing.assert_close(probe(cotangent), rows, rtol=1e-7, atol=1e-12)
        for rows in (slice(None), slice(1, 4)):
            part = torch.stack(expected)[:, rows]
            found = gram(restrict(probe, rows, N), tuple(c[:, rows] for c in stacked))
            torch.testing.assert_close(found, gram_by_hand(part), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("min_work", [2**62, 0])
def test_probe_in_float32(min_work, monkeypatch):
    """Whether PyTorch or oneDNN computes the matrix products."""
    monkeypatch.setattr("totalprop.world_models.latent.linear.MIN_WORK", min_work)
    policy, start, noise = make(), starts(), draw(2)
    expected = estimated(policy, start, noise, estimators.make("tps"), UNBLOCKED).gradients
    policy, start = policy.float(), State(*(x.float() for x in start))
    noise = ImaginationNoise(*(x.float() for x in noise))
    found = estimated(policy, start, noise, estimators.make("tps"), UNBLOCKED).gradients
    torch.testing.assert_close(flat(found).double(), flat(expected), rtol=1e-3, atol=1e-5)


def test_tap_collects_what_reaches_the_last_layer_through_the_nodes():
    """For RP: each (mean, std)'s cotangents, backpropagated through the step's own action alone."""
    policy, start, noise = make(), starts(), draw()
    result = estimated(policy, start, noise, estimators.make("rp"), UNBLOCKED, per_sample=True)
    path = explicit_rollout(policy, start, noise, blocked=False)
    loss = -torch.stack(objective_terms(policy, path, UNBLOCKED)[0]).sum(0).mean() / (H - 1)
    expected = 0.0
    for t, state in enumerate(states_before(start, path)[:-1]):
        prior = path.priors[t]
        cotangent = torch.autograd.grad(loss, [prior.mean, prior.stddev], retain_graph=True)
        expected += per_sample_gradients(policy, state, noise.action[t], cotangent)
    torch.testing.assert_close(result.per_sample, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("name", "expected"), [("rp", 0.0), ("lr", 1.0), ("tpx", None)])
def test_meter_measures_k_of_every_node(name, expected):
    policy, start, noise = make(), starts(), draw()
    meter = torch.zeros(H, STOCH, dtype=F64, requires_grad=True)
    k = estimated(policy, start, noise, estimators.make(name), UNBLOCKED, meter=meter).k
    if expected is not None:
        torch.testing.assert_close(k, torch.full_like(k, expected))
    else:
        assert (k >= 0).all() and (k <= 1).all() and len(k.unique()) > STOCH


def test_gauge_measures_every_node():
    """RP's ratio at each node, from autograd's cotangents of an imagination without nodes."""
    policy, start, noise = make(), starts(), draw()
    gauge = torch.zeros(H, *SHAPE, dtype=F64, requires_grad=True)
    loss = imagine(policy, start, noise, estimators.make("rp"), UNBLOCKED, gauge=gauge).actor_loss
    found = read(torch.autograd.grad(loss, gauge)[0])
    path = explicit_rollout(policy, start, noise, blocked=False)
    loss = -torch.stack(objective_terms(policy, path, UNBLOCKED)[0]).sum(0).mean() / (H - 1)
    for t, prior in enumerate(path.priors):
        g = torch.cat(
            torch.autograd.grad(loss, [prior.mean, prior.stddev], retain_graph=True), 1
        ).numpy()
        expected = N * (g.mean(0) ** 2).sum() / g.var(0, ddof=1).sum() - 1
        for ratio in (found.snr_rp[t], found.snr[t]):
            assert float(ratio) == pytest.approx(expected, rel=1e-6)
    assert len(found.snr_rp.unique()) == H
    assert found.z.isfinite().all() and found.snr_lr.isfinite().all()


# What the estimator is given


def test_critic_baseline_is_given_the_critic_at_the_prior_s_mean(monkeypatch):
    values = []

    def spy(returns, value):
        values.append(value)
        return torch.zeros_like(returns)

    monkeypatch.setattr(baselines, "critic", spy)
    policy, start, noise = make(), starts(), draw()
    estimator = estimators.make("lr", baseline=spy)

    def collect(noise):
        values.clear()
        actor_gradient(imagine(policy, start, noise, estimator, UNBLOCKED).actor_loss, policy)
        return values[::-1]  # the last node's backward runs first

    found = collect(noise)
    path = explicit_rollout(policy, start, noise, blocked=False)
    assert len(found) == H
    for value, prior, deter in zip(found, path.priors, path.deters, strict=True):
        expected = policy.critic(torch.cat((prior.mean, deter), -1))[..., 0]
        torch.testing.assert_close(value, expected.detach())
        assert not value.requires_grad
    # Never a function of the node's own noise.
    for t in range(H):
        latent = noise.latent.clone()
        latent[t] += 1.0
        changed = collect(noise._replace(latent=latent))
        assert all(torch.equal(a, b) for a, b in zip(found[: t + 1], changed[: t + 1], strict=True))
        assert all((a != b).all() for a, b in zip(found[t + 1 :], changed[t + 1 :], strict=True))


def test_estimators_are_given_their_node_and_nothing_they_did_not_ask_for():
    policy, start, noise, spy = make(), starts(), draw(), SpyEstimator()
    imagine(policy, start, noise, spy, UNBLOCKED)
    path = explicit_rollout(policy, start, noise, blocked=False)
    assert len(spy.calls) == H
    for call, prior in zip(spy.calls, path.priors, strict=True):
        torch.testing.assert_close(call["mean"], prior.mean)
        torch.testing.assert_close(call["std"], prior.stddev)
        assert all(call[x] is None for x in ("probe", "value", "critic", "meter", "tap"))


def test_samples_are_independent():
    policy, start, noise = make(), starts(), draw()
    rp = estimators.make("rp")
    found = imagine(policy, start, noise, rp, BLOCKED)
    other = ImaginationNoise(*(x.clone() for x in noise))
    for x in other:
        x[:, 2] += 1.0
    changed = imagine(policy, start, other, rp, BLOCKED)
    differs = ((found.returns - changed.returns).abs() > 1e-6).any(0)
    assert differs.tolist() == [i == 2 for i in range(N)]


def test_noise_is_all_that_is_random():
    first, second, other = (
        ImaginationNoise.draw(H, N, A, GaussianLatents(STOCH), generator(seed))
        for seed in (1, 1, 2)
    )
    assert first.action.shape == (H, N, A) and first.latent.shape == (H, N, STOCH)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all((a != b).all() for a, b in zip(first, other, strict=True))
    policy, before = make(), torch.get_rng_state()
    imagine(policy, starts(), draw(), estimators.make("tpg"), BLOCKED)
    assert torch.equal(before, torch.get_rng_state())


# The critic's loss and what is left for it and the logs


@pytest.mark.parametrize("discount_head", [False, True])
@pytest.mark.parametrize("settings", EVERY_SETTING)
@pytest.mark.parametrize("name", ["rp", "tpx"])
def test_critic_loss_equals_a_loss_of_its_own(name, settings, discount_head):
    """Mean w_t ½ (V_t - R_t)² on features without gradient, with R_t fixed."""
    policy, start, noise = make(discount_head=discount_head), starts(), draw()
    imagined = imagine(policy, start, noise, estimators.make(name), settings)
    with torch.no_grad():
        features = explicit_rollout(policy, start, noise, blocked=True).features
        rewards = policy.model.reward_head(features)[..., 0]
        values = policy.critic(features)[..., 0]
        gamma = torch.full_like(values, settings.gamma)
        if discount_head:
            gamma = torch.sigmoid(policy.model.discount_head(features)[..., 0])
        targets, last = [], values[-1]
        for t in reversed(range(H - 1)):
            last = rewards[t] + gamma[t] * (0.2 * values[t + 1] + 0.8 * last)
            targets.insert(0, last)
        targets, weights = torch.stack(targets), torch.ones(H - 1, N, dtype=F64)
        for t in range(1, H - 1):
            weights[t] = gamma[:t].prod(0) if settings.discount_weights else 1.0
    error = policy.critic(features[:-1])[..., 0] - targets
    expected = (weights * 0.5 * error.square()).mean()
    found, found_values = critic_loss(policy, imagined)
    torch.testing.assert_close(found, expected)
    parameters = list(policy.critic.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters, retain_graph=True),
        torch.autograd.grad(expected, parameters),
    )
    others = [*policy.actor.parameters(), *policy.model.parameters()]
    gradients = torch.autograd.grad(found, others, allow_unused=True)
    assert all(g is None for g in gradients)  # its graph is the critic's alone
    torch.testing.assert_close(found_values, values[:-1])
    for name, value in (("features", features), ("returns", targets), ("weights", weights)):
        torch.testing.assert_close(getattr(imagined, name), value)
    kept = [x for name, x in imagined._asdict().items() if name != "actor_loss"]
    assert not any(x.requires_grad for x in [*kept, found_values])


@pytest.mark.parametrize("settings", [BLOCKED, UNBLOCKED])
def test_logged_entropy_is_the_mean_over_steps_and_samples(settings):
    policy, start, noise = make(), starts(), draw()
    path = explicit_rollout(policy, start, noise, blocked=False)
    found = imagine(policy, start, noise, estimators.make("rp"), settings)
    torch.testing.assert_close(found.entropy, torch.stack(path.entropies).detach().mean())


# Compiled


@pytest.mark.parametrize(
    ("name", "baseline"),
    [
        ("tpx", "leave_one_out"),
        pytest.param("tpx", "critic", marks=pytest.mark.slow),
        pytest.param("tps", "leave_one_out", marks=pytest.mark.slow),
        pytest.param("tpg", "leave_one_out", marks=pytest.mark.slow),
    ],
)
def test_compiled_imagination_equals_eager(name, baseline):
    """One graph of the whole rollout, forward and backward; equal in float64 up to round-off."""
    policy, start, noise = make(), starts(), draw(2)
    estimator = estimators.make(name, baseline=getattr(baselines, baseline))
    meter = torch.zeros(2, STOCH, dtype=F64, requires_grad=True)
    settings = replace(UNBLOCKED, entropy_scale=0.1)

    def imagined(noise, meter):
        return imagine(policy, start, noise, estimator, settings, meter=meter)

    def outcome(function):
        loss, *rest = function(noise, meter)
        gradients = torch.autograd.grad(loss, [*policy.actor.parameters(), meter])
        return [loss.detach(), *rest, *gradients]

    torch._dynamo.reset()
    found = outcome(torch.compile(imagined, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, outcome(imagined), rtol=1e-9, atol=1e-12)


# Remedies of DreamerV2 and V3


def test_returns_are_bootstrapped_with_the_slow_critic_and_it_regularises_the_critic():
    """Against a policy whose critic is the slow one: the same returns; the loss has two terms."""
    policy, start, noise = make(slow_critic=True), starts(), draw()
    twin = make()
    twin.critic.load_state_dict(policy.slow_critic.state_dict())
    found, expected = (
        imagine(p, start, noise, estimators.make("rp"), UNBLOCKED) for p in (policy, twin)
    )
    torch.testing.assert_close(found.returns, expected.returns)
    features = found.features[:-1]
    value = policy.critic(features)[..., 0]
    slow = policy.slow_critic(features)[..., 0].detach()
    errors = (value - found.returns).square() + (value - slow).square()
    loss, values = critic_loss(policy, found)
    torch.testing.assert_close(loss, (found.weights * 0.5 * errors).mean())
    torch.testing.assert_close(values, value.detach())
    assert not any(p.requires_grad for p in policy.slow_critic.parameters())  # it only follows


# With an entropy bonus, the k of tpx depends on the returns' scale.
@pytest.mark.parametrize(("name", "entropy_scale"), [("rp", 0.05), ("lr", 0.05), ("tpx", 0.0)])
def test_scaled_returns_scale_the_gradient_and_not_the_entropys(name, entropy_scale):
    """By max(1, S): nothing below a range of 1, a quarter at a range of 4."""
    policy, start, noise = make(), starts(), draw()
    settings = replace(UNBLOCKED, entropy_scale=entropy_scale)
    only_entropy = replace(settings, scale_returns=True)

    def gradient(settings, size):
        policy.return_range.fill_(size)
        loss = imagine(policy, start, noise, estimators.make(name), settings).actor_loss
        return flat(torch.autograd.grad(loss, list(policy.actor.parameters())))

    plain, bonus = gradient(settings, 4.0), gradient(only_entropy, 1e12)
    torch.testing.assert_close(gradient(only_entropy, 0.5), plain)
    torch.testing.assert_close(gradient(only_entropy, 4.0), (plain - bonus) / 4 + bonus)


def test_a_two_hot_critic_is_trained_by_its_cross_entropy():
    policy, start, noise = make(critic_head="two-hot"), starts(), draw()
    imagined = imagine(policy, start, noise, estimators.make("rp"), UNBLOCKED)
    loss, values = critic_loss(policy, imagined)
    out = policy.critic(imagined.features[:-1])
    expected = policy.critic.loss(out, imagined.returns)
    torch.testing.assert_close(loss, (imagined.weights * expected).mean())
    torch.testing.assert_close(values, policy.value(imagined.features[:-1]))
