"""SVG's gradients against the closed form of a linear-quadratic problem (see lqr.py).

Monte Carlo tests allow 4 standard errors of the mean over episodes, or over samples.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import totalprop.estimators as estimators
from tests.agents.svg import lqr
from totalprop.agents.svg.gradients import (
    Actor,
    Paths,
    Transitions,
    dpg,
    importance_weights,
    scale_gradient,
    svg0,
    svg1,
    svg_inf,
)

EPISODES, STEPS = 2000, 200  # γ^200 = 3.5e-5
OFF = functools.partial(lqr.model, offset=0.37)


def half() -> estimators.Estimator:
    """k = 1/2 whatever the samples are, so that the mixture has no bias."""
    return estimators.Estimator(lambda rp, legs, probe: [torch.full_like(rp[0][:1], 0.5)])


@pytest.fixture(scope="module")
def paths() -> Paths:
    return lqr.episodes(EPISODES, STEPS, seed=0)


def per_episode(loss: Tensor, parameters: dict[str, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of dV/dθ and dV/dσ, [2] each, from the gradient of each episode."""
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    each = -rows * torch.stack(gradients)
    return each.mean(1), each.std(1) / math.sqrt(each.shape[1])


def of_variant(variant: str, paths: Paths, actor: Actor, model, **how) -> tuple[Tensor, int]:
    """Loss of a variant on the episodes, and what it averages over."""
    if variant == "inf":
        return svg_inf(actor, model, lqr.reward, paths, gamma=lqr.GAMMA, **how), EPISODES
    rows, discounts = lqr.transitions(paths)
    if variant == "0":
        return svg0(actor, lqr.action_value, rows, weights=discounts), EPISODES * STEPS
    loss = svg1(
        actor, model, lqr.reward, lqr.value, rows, gamma=lqr.GAMMA, weights=discounts, **how
    )
    return loss, EPISODES * STEPS


def found(variant: str, name: str, paths: Paths, model=lqr.model, **how) -> tuple[Tensor, Tensor]:
    parameters = lqr.parameters(EPISODES)
    actor = Actor(lqr.policy, parameters, estimators.make(name))
    loss, rows = of_variant(variant, paths, actor, model, **how)
    return per_episode(loss, parameters, rows)


def test_closed_form_has_the_golden_numbers():
    found = lqr.P, lqr.K, lqr.VALUE, *lqr.GRADIENT
    golden = 1.5744680851, 2.0496808511, -4.7105319149, -3.3998528746, -5.6872340426
    assert found == pytest.approx(golden, abs=1e-10)


@pytest.mark.parametrize("name", ["rp", "lr", "tpx"])
@pytest.mark.parametrize("variant", ["0", "1", "inf"])
def test_gradient_matches_the_closed_form(variant, name, paths):
    mean, error = found(variant, name, paths)
    assert (error < (0.06 if name == "rp" else 0.4)).all(), error
    assert ((mean - torch.tensor(lqr.GRADIENT)).abs() < 4 * error).all(), (mean, error)


@pytest.mark.parametrize("name", ["rp", "lr", "tpx"])
@pytest.mark.parametrize("variant", ["1", "inf"])
def test_inferred_noise_corrects_a_model_that_is_off_by_a_constant(variant, name, paths):
    exact, _ = found(variant, name, paths)
    mean, _ = found(variant, name, paths, OFF)
    torch.testing.assert_close(mean, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["rp", "tpx"])
def test_noise_drawn_from_that_model_gives_a_wrong_gradient(name, paths):
    # s' is off by 0.37, hence r_a + γ V_s' B by -2 γ p B 0.37, which θ's gradient multiplies by s.
    wrong = lqr.GRADIENT[0] - 2 * lqr.GAMMA * lqr.P * lqr.B * 0.37 * lqr.SUM
    assert wrong == pytest.approx(-5.07, abs=0.01)
    rows, discounts = lqr.transitions(paths)
    mean, std = OFF(rows.states, rows.actions)
    draw = torch.Generator().manual_seed(1)
    drawn = mean + std * torch.randn(mean.shape, dtype=lqr.F64, generator=draw)
    parameters = lqr.parameters(EPISODES)
    actor = Actor(lqr.policy, parameters, estimators.make(name))
    loss = svg1(
        actor, OFF, lqr.reward, lqr.value, rows._replace(next_states=drawn),
        gamma=lqr.GAMMA, weights=discounts,
    )  # fmt: skip
    mean, error = per_episode(loss, parameters, EPISODES * STEPS)
    assert error[0] < 0.3
    assert abs(mean[0] - wrong) < 4 * error[0]
    assert abs(mean[0] - lqr.GRADIENT[0]) > 4 * error[0]


@pytest.mark.parametrize("variant", ["1", "inf"])
def test_nodes_at_next_states_have_the_same_mean(variant, paths):
    mean, error = found(variant, "tpx", paths, nodes="both")
    assert (error < 0.3).all(), error
    assert ((mean - torch.tensor(lqr.GRADIENT)).abs() < 4 * error).all(), (mean, error)
    rp, _ = found(variant, "rp", paths)
    both, _ = found(variant, "rp", paths, nodes="both")
    torch.testing.assert_close(both, rp)


def test_score_legs_at_next_states_are_biased_where_the_model_is_off(paths):
    # They take the noise inferred, of mean -0.37 / σ_x, for standard normal; hence the default.
    right, error = found("1", half(), paths, nodes="both")
    assert ((right - torch.tensor(lqr.GRADIENT)).abs() < 4 * error).all()
    wrong, error = found("1", half(), paths, OFF, nodes="both")
    assert abs(wrong[0] - lqr.GRADIENT[0]) > 4 * error[0]


def test_inf_equals_the_recursion_of_algorithm_1():
    steps = 7
    paths = lqr.episodes(1, steps, seed=3)
    s, a = paths.states[..., 0, 0], paths.actions[..., 0, 0]
    eta = (a - lqr.THETA * s[:-1]) / lqr.SIGMA
    v_s = v_theta = v_sigma = torch.tensor(0.0, dtype=lqr.F64)
    for t in reversed(range(steps)):
        r_a, r_s = -2 * lqr.D * a[t], -2 * lqr.C * s[t]
        v_theta = r_a * s[t] + lqr.GAMMA * (v_s * lqr.B * s[t] + v_theta)
        v_sigma = r_a * eta[t] + lqr.GAMMA * (v_s * lqr.B * eta[t] + v_sigma)
        v_s = r_s + r_a * lqr.THETA + lqr.GAMMA * v_s * (lqr.A + lqr.B * lqr.THETA)
    parameters = lqr.parameters(1)
    actor = Actor(lqr.policy, parameters, estimators.make("rp"))
    svg_inf(actor, lqr.model, lqr.reward, paths, gamma=lqr.GAMMA).backward()
    assert float(parameters["theta"].grad) == pytest.approx(-float(v_theta), rel=1e-12)
    assert float(parameters["sigma"].grad) == pytest.approx(-float(v_sigma), rel=1e-12)


@pytest.mark.parametrize("nodes", ["action", "both"])
@pytest.mark.parametrize("carry", ["mixture", "pathwise"])
@pytest.mark.parametrize("name", ["rp", "lr", "half"])
def test_padding_changes_nothing(name, carry, nodes):
    lengths, longest = (3, 5, 4, 5), 5
    # Without a baseline, and with a k that does not depend on the other episodes.
    rule = half() if name == "half" else estimators.make(name)
    rule = estimators.make(rule, baseline="none", carry=carry)
    full = lqr.episodes(len(lengths), longest, seed=4)
    alive = torch.tensor([[t < n for n in lengths] for t in range(longest)], dtype=lqr.F64)
    states, actions = full.states.clone(), full.actions.clone()
    for i, n in enumerate(lengths):
        states[n + 1 :, i], actions[n:, i] = 7.0, -3.0
    parameters = lqr.parameters(len(lengths))
    actor = Actor(lqr.policy, parameters, rule)
    how = {"gamma": lqr.GAMMA, "nodes": nodes}
    svg_inf(actor, lqr.model, lqr.reward, Paths(states, actions, alive), **how).backward()
    for i, n in enumerate(lengths):
        own = lqr.parameters(1)
        mine = slice(i, i + 1)
        one = Paths(full.states[: n + 1, mine], full.actions[:n, mine], alive[:n, mine])
        svg_inf(Actor(lqr.policy, own, rule), lqr.model, lqr.reward, one, **how).backward()
        for key, parameter in own.items():
            expected = parameter.grad[0] / len(lengths)
            torch.testing.assert_close(parameters[key].grad[i], expected)


@pytest.mark.parametrize("sigma", [1e-2, 1e-4])
def test_svg0_tends_to_dpg(sigma):
    rows, _ = lqr.transitions(lqr.episodes(50, 20, seed=5))
    n = len(rows.states)
    draw = torch.Generator().manual_seed(6)
    eta = torch.randn(rows.states.shape, dtype=lqr.F64, generator=draw)
    rows = rows._replace(actions=lqr.THETA * rows.states + sigma * eta)
    gradients = []
    for which in (svg0, dpg):
        parameters = lqr.parameters(n)
        with torch.no_grad():
            parameters["sigma"].fill_(sigma)
        actor = Actor(lqr.policy, parameters, estimators.make("rp"))
        data = rows if which is svg0 else rows.states
        loss = which(actor, lqr.action_value, data)
        gradients.append(n * torch.autograd.grad(loss, parameters["theta"])[0])
    # The integrands differ by the curvature, Q_aa = -2 (d + γ p B²), times σ η s.
    curvature = -2 * (lqr.D + lqr.GAMMA * lqr.P * lqr.B**2)
    expected = -curvature * sigma * (eta * rows.states).squeeze(-1)
    torch.testing.assert_close(gradients[0] - gradients[1], expected, atol=1e-12, rtol=1e-6)
    by_hand = -lqr.gradient_at(1.0)[0] * rows.states.squeeze(-1).square()
    torch.testing.assert_close(gradients[1], by_hand)


def test_importance_weights_by_hand():
    behaviour = torch.distributions.Normal(0.0, 2.0)
    policy = torch.distributions.Normal(1.0, 0.5)
    actions = torch.tensor([1.0, 0.0, -1.0])
    weights = importance_weights(policy.log_prob(actions), behaviour.log_prob(actions), 4.0)
    # The ratio at 1 is 4 exp(1 / 8) = 4.53, truncated; at 0: 4 exp(-2); at -1: 4 exp(-8 + 1 / 8).
    expected = torch.tensor([4.0, 4 * math.exp(-2), 4 * math.exp(-8 + 1 / 8)])
    torch.testing.assert_close(weights, expected)
    log_prob = torch.zeros(1, requires_grad=True)
    assert not importance_weights(log_prob, torch.zeros(1), 5.0).requires_grad


def at_one_state(n: int, seed: int, mean: float, std: float) -> tuple[Transitions, Tensor]:
    """n transitions from s = 0.8 by actions of N(mean, std²), and the actions' log-densities."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, n, 1, dtype=lqr.F64, generator=draw)
    states = torch.full((n, 1), 0.8, dtype=lqr.F64)
    actions = mean + std * noise[0]
    next_states = lqr.A * states + lqr.B * actions + lqr.SIGMA_X * noise[1]
    log_prob = torch.distributions.Normal(mean, std).log_prob(actions).squeeze(-1)
    return Transitions(states, actions, next_states, torch.zeros(n, dtype=lqr.F64)), log_prob


def of_one_state(variant: str, rows: Transitions, actor: Actor, **how) -> Tensor:
    if variant == "0":
        return svg0(actor, lqr.action_value, rows, **how)
    return svg1(actor, OFF, lqr.reward, lqr.value, rows, gamma=lqr.GAMMA, **how)


@pytest.mark.parametrize("name", ["rp", "lr", "tpx"])
@pytest.mark.parametrize("variant", ["0", "1"])
def test_replayed_actions_of_another_policy_with_importance_weights(variant, name):
    n = 40_000
    rows, behaviour = at_one_state(n, seed=7, mean=-0.3, std=0.4)
    now = torch.distributions.Normal(lqr.THETA * 0.8, lqr.SIGMA)
    log_prob = now.log_prob(rows.actions).squeeze(-1)
    weights = importance_weights(log_prob, behaviour, math.inf)

    def estimate(weights: Tensor | None) -> tuple[Tensor, Tensor]:
        parameters = lqr.parameters(n)
        actor = Actor(lqr.policy, parameters, estimators.make(name))
        return per_episode(of_one_state(variant, rows, actor, weights=weights), parameters, n)

    expected = torch.tensor(lqr.gradient_at(0.8))
    mean, error = estimate(weights)
    assert (error < 0.02).all(), error
    assert ((mean - expected).abs() < 4 * error).all(), (mean, expected, error)
    mean, error = estimate(None)
    assert ((mean - expected).abs() > 8 * error).any()


@pytest.mark.parametrize("name", ["rp", "lr", "half"])
@pytest.mark.parametrize("variant", ["0", "1"])
def test_several_actions_per_state_have_the_same_mean(variant, name):
    n, k = 10_000, 3
    rows, _ = at_one_state(n, seed=8, mean=lqr.THETA * 0.8, std=lqr.SIGMA)
    draw = torch.Generator().manual_seed(9)
    drawn = torch.randn(k, n, 1, dtype=lqr.F64, generator=draw)
    errors = []
    for noise in (drawn, None):
        parameters = lqr.parameters(n)
        # tpx's k of a few actions depends on them, which biases: here it is one half.
        rule = half() if name == "half" else estimators.make(name)
        actor = Actor(lqr.policy, parameters, rule)
        loss = of_one_state(variant, rows, actor, drawn=noise)
        mean, error = per_episode(loss, parameters, n)
        expected = torch.tensor(lqr.gradient_at(0.8))
        assert ((mean - expected).abs() < 4 * error).all(), (mean, expected, error)
        errors.append(error)
    assert (errors[0] < 0.9 * errors[1]).all()  # they share the noise of the next state


@pytest.mark.parametrize("name", ["tp", "tpg", "ivw", "lr-first-order", "safe"])
@pytest.mark.parametrize("variant", ["0", "1"])
def test_rules_in_parameter_space_and_over_the_whole_graph(variant, name):
    repeats, n = 40, 250
    estimates = []
    for repeat in range(repeats):
        rows, _ = at_one_state(n, 100 + repeat, lqr.THETA * 0.8, lqr.SIGMA)
        parameters = {
            "theta": torch.tensor([lqr.THETA], dtype=lqr.F64, requires_grad=True),
            "sigma": torch.tensor([lqr.SIGMA], dtype=lqr.F64, requires_grad=True),
        }

        def rollout(rule, tap, rows=rows, parameters=parameters):
            return of_one_state(variant, rows, Actor(lqr.policy, parameters, rule, tap=tap))

        found = estimators.gradient(
            rollout, list(parameters.values()), estimators.make(name), samples=n
        )
        estimates.append(-torch.cat(found.gradients))
    each = torch.stack(estimates)
    error = each.std(0) / math.sqrt(repeats)
    assert (error < 0.05).all()
    assert ((each.mean(0) - torch.tensor(lqr.gradient_at(0.8))).abs() < 4 * error).all()


@pytest.mark.parametrize("variant", ["0", "1", "inf"])
def test_values_are_those_of_the_real_data(variant):
    """For networks, too: what is drawn again equals the data, and so do losses."""
    torch.manual_seed(0)
    n, steps, s, a = 3, 4, 3, 2
    nets = [nn.Linear(i, o).double() for i, o in ((s, 2 * a), (s + a, s), (s + a, 1), (s, 1))]
    pi, f, q, v = nets
    seen: list[Tensor] = []

    def policy(parameters, states):
        mean, raw = functional_call(pi, dict(parameters), states).chunk(2, -1)
        return mean, raw.exp()

    def model(states, actions):
        seen.append(actions)
        mean = torch.tanh(f(torch.cat((states, actions), -1)))
        return mean, 0.1 + mean.square()

    def reward(states, actions, next_states):
        seen.append(next_states)
        return q(torch.cat((states, actions), -1)).squeeze(-1) + next_states.sin().sum(-1)

    states = torch.randn(steps + 1, n, s, dtype=lqr.F64)
    actions = torch.randn(steps, n, a, dtype=lqr.F64)
    actor = Actor(policy, dict(pi.named_parameters()), estimators.make("tpx"))
    rewards = reward(states[:-1], actions, states[1:])
    discounts = 0.9 ** torch.arange(steps, dtype=lqr.F64).unsqueeze(-1)
    seen.clear()
    ends = torch.tensor([0.0, 1.0, 0.0], dtype=lqr.F64)
    rows = Transitions(states[0], actions[0], states[1], ends)
    if variant == "0":
        expected = q(torch.cat((states[0], actions[0]), -1)).mean()
        loss = svg0(actor, lambda x, y: q(torch.cat((x, y), -1)).squeeze(-1), rows)
    elif variant == "1":
        expected = (rewards[0] + 0.9 * (1 - ends) * v(states[1]).squeeze(-1)).mean()
        loss = svg1(actor, model, reward, lambda x: v(x).squeeze(-1), rows, gamma=0.9)
        torch.testing.assert_close(seen[-1], states[1])
    else:
        alive = torch.ones(steps, n, dtype=lqr.F64)
        expected = (discounts * rewards).sum(0).mean()
        loss = svg_inf(actor, model, reward, Paths(states, actions, alive), gamma=0.9)
        torch.testing.assert_close(torch.stack(seen[1::2]), states[1:])
        torch.testing.assert_close(torch.stack(seen[0::2]), actions)
    torch.testing.assert_close(loss, -expected)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in pi.parameters())


def test_wrong_combinations_are_refused():
    rows, _ = at_one_state(8, 0, 0.0, 1.0)
    drawn = torch.zeros(1, 8, 1, dtype=lqr.F64)
    actor = Actor(lqr.policy, lqr.parameters(8), estimators.make("tpx"))
    with pytest.raises(ValueError, match="share the noise of its next state"):
        of_one_state("1", rows, actor, nodes="both", drawn=drawn)
    for name in ("tpg", "safe"):
        actor = Actor(lqr.policy, lqr.parameters(8), estimators.make(name))
        with pytest.raises(ValueError, match="has no probe at next states"):
            of_one_state("1", rows, actor, nodes="both")


def test_scaled_gradient():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    y = scale_gradient(x, torch.tensor([0.0, 0.5]))
    assert y.tolist() == [2.0, 3.0]
    y.square().sum().backward()
    assert x.grad.tolist() == [0.0, 3.0]
