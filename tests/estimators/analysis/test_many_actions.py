"""Variance of many-action gradients: closed form, decision rules and estimates from data."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from totalprop.estimators.analysis.many_actions import (
    VarianceComponents,
    advise,
    bandit_break_even,
    corollary_1,
    delta_actions,
    delta_states,
    general_condition,
    optimal_actions,
    table,
    theorem_1,
)
from totalprop.estimators.analysis.many_actions_data import direct_variance, estimate_components
from totalprop.estimators.analysis.many_actions_mdp import finite_mdp

F64 = torch.float64


def enumerated(mdp, n_steps, n_actions, *, start, gamma=1.0):
    """V(T, N) by enumeration of every (s_0..s_{T-1}, a_t^{1..N}); the first action drives."""
    transition, upsilon, policy = (x.numpy() for x in mdp)
    n_states, actions = policy.shape[0], range(policy.shape[1])
    first, second = np.zeros(upsilon.shape[-1]), 0.0
    total = 0.0
    for states in itertools.product(range(n_states), repeat=n_steps):
        for flat in itertools.product(actions, repeat=n_steps * n_actions):
            p, g = start[states[0]], np.zeros(upsilon.shape[-1])
            for t, s in enumerate(states):
                taken = flat[t * n_actions : (t + 1) * n_actions]
                for a in taken:
                    p = p * policy[s, a]
                    g = g + gamma**t * upsilon[s, a] / (n_actions * n_steps)
                if t + 1 < n_steps:
                    p = p * transition[s, taken[0], states[t + 1]]
            total, first, second = total + p, first + p * g, second + p * g @ g
    assert total == pytest.approx(1.0)
    return float(second - first @ first)


def sticky_chain(q, rho, u, w, gamma, *, advantage):
    """π(1|s) = q; s' = s w.p. rho, else s' = a; r = u_s + w_s a; Υ = (a - q) B(s, a)."""
    policy = torch.tensor([[1 - q, q]] * 2, dtype=F64)
    eye = torch.eye(2, dtype=F64)
    transition = rho * eye.unsqueeze(1) + (1 - rho) * eye.unsqueeze(0)
    reward = torch.tensor([[u[s] + w[s] * a for a in (0, 1)] for s in (0, 1)], dtype=F64)
    chain = (policy.unsqueeze(-1) * transition).sum(1)
    value = torch.linalg.solve(eye - gamma * chain, (policy * reward).sum(-1))
    quality = reward + gamma * transition @ value
    weight = quality - value.unsqueeze(-1) if advantage else quality
    score = torch.tensor([-q, 1 - q], dtype=F64)
    return (transition, (score * weight).unsqueeze(-1), policy), value, quality


def random_mdp(seed, *, n_states=3, n_actions=2, n_parameters=2):
    g = torch.Generator().manual_seed(seed)
    transition = torch.rand(n_states, n_actions, n_states, dtype=F64, generator=g) ** 3
    policy = torch.rand(n_states, n_actions, dtype=F64, generator=g)
    upsilon = torch.randn(n_states, n_actions, n_parameters, dtype=F64, generator=g)
    transition, policy = (x / x.sum(-1, keepdim=True) for x in (transition, policy))
    return transition, upsilon + 0.7, policy


def stationary(mdp):
    """The stationary distribution of the chain, by iteration."""
    chain = np.einsum("sa,saz->sz", mdp[2].numpy(), mdp[0].numpy())
    return np.linalg.matrix_power(chain, 5000)[0]


STICKY = {"q": 0.3, "rho": 0.5, "u": (0, 1), "w": (1, -0.5), "gamma": 0.9}
NEGATIVE = {"q": 0.45, "rho": 0.0, "u": (0, 0), "w": (1, -0.5), "gamma": 0.0}
FLIP = {"q": 0.3, "rho": 0.0, "u": (2, 3), "w": (0, 0.7), "gamma": 0.5}


# Closed form


def test_sticky_chain_golden_values():
    """By hand, for B = Q: V_s, E_a, α_t = rho^t V_s, α^e_t = rho^{t-1} (1 - rho) kappa."""
    mdp, value, quality = sticky_chain(**STICKY, advantage=False)
    assert value.tolist() == pytest.approx([4.35, 5.35])
    assert quality.flatten().tolist() == pytest.approx([3.915, 5.365, 5.365, 5.315])
    c = finite_mdp(*mdp, n_steps=100)
    assert c.state_variance == pytest.approx(0.02083725)
    assert c.action_variance == pytest.approx(5.362581)
    lag = torch.arange(1, 100)
    torch.testing.assert_close(c.marginal[1:], 0.5 ** lag.double() * 0.02083725)
    torch.testing.assert_close(c.policy[1:], 0.5 ** lag.double() * -0.3340575)
    golden = {(3, 1): 1.707467125, (3, 2): 0.8601005, (5, 1): 0.99994468875}
    golden |= {(5, 2): 0.5046086325, (10, 1): 0.4882143498339843, (100, 4): 0.01238635335}
    for (t, n), v in golden.items():
        assert c.at(n_steps=t).variance(n) == pytest.approx(v, rel=1e-9), (t, n)


def test_sticky_chain_golden_values_with_advantages():
    mdp, _, _ = sticky_chain(**STICKY, advantage=True)
    c = finite_mdp(*mdp, n_steps=100)
    assert c.action_variance == pytest.approx(0.049476)
    assert float(c.policy[1]) == pytest.approx(-0.02646 / 2)
    assert c.policy_dependent == pytest.approx(-0.0023856)
    golden = {(3, 1): 0.021875875, (3, 2): 0.017304875, (5, 1): 0.01268507625}
    golden |= {(5, 2): 0.01097882625, (10, 1): 0.006131465361328123}
    for (t, n), v in golden.items():
        assert c.at(n_steps=t).variance(n) == pytest.approx(v, rel=1e-9), (t, n)


@pytest.mark.parametrize("advantage", [False, True])
@pytest.mark.parametrize("settings", [STICKY, NEGATIVE, FLIP])
def test_golden_chains_equal_enumeration(settings, advantage):
    mdp, _, _ = sticky_chain(**settings, advantage=advantage)
    law = stationary(mdp)
    c = finite_mdp(*mdp, n_steps=3)
    for t, n in [(1, 1), (2, 1), (2, 3), (3, 1), (3, 2)]:
        found = c.at(n_steps=t).variance(n)
        assert found == pytest.approx(enumerated(mdp, t, n, start=law), rel=1e-10), (t, n)


@pytest.mark.parametrize(("n_steps", "n_actions"), [(1, 1), (2, 1), (4, 1), (2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("gamma", [1.0, 0.6])
def test_variance_equals_enumeration(n_steps, n_actions, gamma):
    """Random MDPs, from the stationary law and from another start, with and without γ^t."""
    mdp = random_mdp(n_steps + 10 * n_actions)
    start = torch.tensor([0.7, 0.0, 0.3], dtype=F64)
    for law, given in [(stationary(mdp), None), (start.numpy(), start)]:
        c = finite_mdp(*mdp, n_steps=n_steps, start=given, gamma=gamma)
        expected = enumerated(mdp, n_steps, n_actions, start=law, gamma=gamma)
        assert c.variance(n_actions) == pytest.approx(expected, rel=1e-10)
        assert c.stationary == (given is None)


def test_gamma_weights_are_the_double_sum():
    """V = 1/T² Σ_{i,j<T} γ^{i+j} C_|i-j|(N); γ = 1 is the limit."""
    c = finite_mdp(*random_mdp(0), n_steps=12)
    lags = c.marginal + c.policy / 3
    for gamma in (0.5, 0.9):
        pairs = itertools.product(range(12), repeat=2)
        expected = sum(gamma ** (i + j) * float(lags[abs(i - j)]) for i, j in pairs) / 144
        assert c.at(gamma=gamma).variance(3) == pytest.approx(expected, rel=1e-12)
    assert c.at(gamma=1 - 1e-7).variance(3) == pytest.approx(c.variance(3), rel=1e-5)


def test_start_at_the_stationary_law_changes_nothing():
    mdp = random_mdp(1)
    kept = finite_mdp(*mdp, n_steps=6)
    same = finite_mdp(*mdp, n_steps=6, start=torch.tensor(stationary(mdp)))
    torch.testing.assert_close(same.marginal, kept.marginal)
    torch.testing.assert_close(same.policy, kept.policy)


def test_float32_is_computed_in_float64():
    """Rows that sum to 1 only in float32 are normalised, so no error adds to that of the input."""
    mdp = tuple(x.float() for x in random_mdp(1))
    found, exact = finite_mdp(*mdp, n_steps=200), finite_mdp(*random_mdp(1), n_steps=200)
    assert found.marginal.dtype == F64
    assert found.variance() == pytest.approx(exact.variance(), rel=1e-6)
    assert float(found.marginal[-1]) == pytest.approx(0.0, abs=1e-14)
    stays = torch.eye(3).unsqueeze(1).expand(3, 2, 3)
    with pytest.raises(ValueError, match="3 stationary distributions"):
        finite_mdp(stays, *mdp[1:], n_steps=2)


def test_components_add_up_and_infinitely_many_actions_leave_the_chain():
    c = finite_mdp(*random_mdp(2), n_steps=7)
    weights = [1.0] + [2 * (7 - t) / 7 for t in range(1, 7)]
    m = sum(w * float(a) for w, a in zip(weights, c.marginal))
    p = sum(w * float(a) for w, a in zip(weights, c.policy))
    assert (c.markov_chain, c.policy_dependent) == pytest.approx((m, p))
    assert c.policy_share == pytest.approx(p / (m + p))
    assert c.variance(1) == pytest.approx((m + p) / 7)
    assert c.variance(math.inf) == pytest.approx(m / 7)
    assert c.variance(10**9) == pytest.approx(m / 7)
    # Averaging Υ over the policy gives the same limit.
    transition, upsilon, policy = random_mdp(2)
    averaged = (policy.unsqueeze(-1) * upsilon).sum(1, keepdim=True).expand_as(upsilon)
    exact = finite_mdp(transition, averaged, policy, n_steps=7)
    assert exact.variance(1) == pytest.approx(m / 7)
    assert exact.policy_dependent == pytest.approx(0.0, abs=1e-12)


def test_a_constant_shift_of_upsilon_changes_no_component():
    transition, upsilon, policy = random_mdp(3)
    plain = finite_mdp(transition, upsilon, policy, n_steps=5)
    shifted = finite_mdp(transition, upsilon + 1e4, policy, n_steps=5)
    torch.testing.assert_close(shifted.marginal, plain.marginal)
    torch.testing.assert_close(shifted.policy, plain.policy)


def test_more_actions_can_raise_the_variance():
    """With advantages, in a chain whose action determines the next state, P < 0 at T = 2."""
    mdp, _, _ = sticky_chain(**NEGATIVE, advantage=True)
    c = finite_mdp(*mdp, n_steps=2)
    assert c.state_variance == pytest.approx(0.03411207421875)
    assert c.action_variance == pytest.approx(0.0016396875)
    assert float(c.policy[1]) == pytest.approx(-0.0029862421875)
    assert c.policy_dependent == pytest.approx(-0.0013465546875)
    found = [c.variance(n) for n in (1, 2, 3)]
    assert found == pytest.approx([0.016382759765625, 0.0167193984375, 0.016831611328125])
    assert found == sorted(found)
    law = stationary(mdp)
    assert found == pytest.approx([enumerated(mdp, 2, n, start=law) for n in (1, 2, 3)])
    three = finite_mdp(*mdp, n_steps=3)
    assert three.variance(1) == pytest.approx(0.01059003515625)
    assert three.variance(2) == pytest.approx(0.01098036328125)
    assert delta_actions(c) > 0
    assert advise(c, 0.01).choice == "more states"
    assert optimal_actions(three, 0.0).n_actions == 1


# Decision rules


def test_theorem_1_flips_where_the_variances_do():
    """States are iid under π, yet α^e_1 ≠ 0: the threshold is T = 34.367, not that of bandits."""
    mdp, _, _ = sticky_chain(**FLIP, advantage=False)
    c = finite_mdp(*mdp, n_steps=34, n_lags=70)
    for t, two_actions, twice_as_long in [
        (34, 0.08484539224, 0.08484611325),
        (35, 0.08242498260, 0.08242381080),
    ]:
        at = c.at(n_steps=t)
        assert at.variance(2) == pytest.approx(two_actions, rel=1e-9)
        assert c.at(n_steps=2 * t).variance(1) == pytest.approx(twice_as_long, rel=1e-9)
        assert theorem_1(at).more_actions == (t == 34)
        assert general_condition(at, 1.0).more_actions == (t == 34)
        for tail in (False, True):
            expected = "more actions" if t == 34 else "more states"
            assert advise(at, 1.0, tail=tail).choice == expected
        assert not corollary_1(at, 1.0).more_actions


def gaussian_bandit(theta=0.4, sigma=0.7, *, baseline=False):
    """Reward k·a, a ~ N(theta, sigma²), k from {.5, 2}: exact by quadrature, degree 4 in a."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    action = torch.tensor(theta + sigma * nodes)
    policy = torch.tensor(weights / weights.sum()).expand(2, -1)
    context = torch.tensor([[0.5], [2.0]], dtype=F64)
    law = torch.tensor([0.25, 0.75], dtype=F64)
    weight = context * (action - (theta if baseline else 0.0))
    upsilon = (weight * (action - theta) / sigma**2).unsqueeze(-1)
    return law.expand(2, 5, 2), upsilon, policy


def test_gaussian_bandit_golden_values():
    c = finite_mdp(*gaussian_bandit(), n_steps=4)
    squared = 0.25 * 0.25 + 0.75 * 4
    variance = squared - (0.125 + 1.5) ** 2
    assert c.state_variance == pytest.approx(variance)
    assert c.action_variance == pytest.approx(squared * (2 + 0.4**2 / 0.7**2))
    assert c.marginal[1:].abs().max() < 1e-14
    assert c.policy[1:].abs().max() < 1e-14
    assert c.at(n_steps=1).variance(1) == pytest.approx(7.546875)
    assert c.variance(3) == pytest.approx(0.69921875)
    assert c.state_variance / c.action_variance == pytest.approx(0.0592105, rel=1e-5)
    found = [bandit_break_even(c, n) for n in (1, 2, 3)]
    assert found == pytest.approx([0.8941176, 0.4245811, 0.2695035], rel=1e-6)
    with_baseline = finite_mdp(*gaussian_bandit(baseline=True), n_steps=4)
    assert with_baseline.action_variance == pytest.approx(2 * squared)


@pytest.mark.parametrize("n_actions", [1, 2, 3])
def test_corollary_1_is_lemma_2_in_a_bandit(n_actions):
    c = finite_mdp(*gaussian_bandit(), n_steps=5)
    edge = bandit_break_even(c, n_actions)
    assert advise(c, edge, n_actions).delta_actions == pytest.approx(
        advise(c, edge, n_actions).delta_states
    )
    for delta, more_actions in [(0.99 * edge, True), (1.01 * edge, False)]:
        assert corollary_1(c, delta, n_actions).more_actions == more_actions
        assert general_condition(c, delta, n_actions).more_actions == more_actions
        choice = "more actions" if more_actions else "more states"
        assert advise(c, delta, n_actions).choice == choice


@pytest.mark.parametrize("n_actions", [1, 2, 5])
@pytest.mark.parametrize("delta", [0.25, 1.0, 2.0])
def test_lemma_2_is_a_difference_of_variances(delta, n_actions):
    """Exact with the tail; Eq. 9 as printed without it; the two sides of Eq. 30 agree with it."""
    n, t = n_actions, 8
    mdp, _, _ = sticky_chain(**{**STICKY, "rho": 0.8}, advantage=True)
    c = finite_mdp(*mdp, n_steps=t, n_lags=40)
    exact = c.at(n_steps=t * (1 + delta)).variance(n) - c.variance(n)
    assert delta_states(c, delta, n, tail=True) == pytest.approx(exact, rel=1e-12)
    assert delta_actions(c, n) == pytest.approx(c.variance(n + 1) - c.variance(n), rel=1e-12)
    lag = torch.arange(1, t, dtype=F64)
    alpha, alpha_e = c.marginal[1:t], c.policy[1:t]
    shrink = (t - lag) / t - lag / (t + delta * t)
    v_1 = c.state_variance + c.action_variance / n
    printed = -delta / (t + delta * t) * (v_1 + 2 * float(shrink @ (alpha + alpha_e / n)))
    assert delta_states(c, delta, n) == pytest.approx(printed, rel=1e-12)
    assert abs(exact - printed) > 0.01 * abs(exact)  # the tail is not negligible here
    factor = (1 + delta - delta * n - delta**2 * n) * t - (1 - 2 * delta * n - delta**2 * n) * lag
    factor = factor / ((delta * t + delta**2 * t) * (n**2 + n))
    left = (1 - delta * n) / (delta * (n**2 + n)) * c.action_variance + 2 * float(factor @ alpha_e)
    right = c.state_variance + 2 * float(shrink @ alpha)
    assert tuple(general_condition(c, delta, n)) == pytest.approx((left, right), rel=1e-9)
    gap = delta_states(c, delta, n) - delta_actions(c, n)
    assert (left - right) * delta / (t * (1 + delta)) == pytest.approx(gap)
    tailed = general_condition(c, delta, n, tail=True)
    gap = delta_states(c, delta, n, tail=True) - delta_actions(c, n)
    assert (tailed.left - tailed.right) * delta / (t * (1 + delta)) == pytest.approx(gap)


def test_theorem_1_is_the_general_condition_at_one():
    """Σ α_t t/T is moved to the other side, so the difference of the sides is compared."""
    for seed in range(5):
        c = finite_mdp(*random_mdp(seed), n_steps=6, n_lags=9)
        one, general = theorem_1(c), general_condition(c, 1.0)
        moved = sum(t / 6 * float(c.marginal[t]) for t in range(6))
        assert one.right == pytest.approx(c.markov_chain)
        assert one.left == pytest.approx(general.left + moved)
        assert one.left - one.right == pytest.approx(general.left - general.right)


def test_both_ways_can_be_worse():
    """Alternating states cancel exactly at even T: neither choice lowers V(2, 1)."""
    c = VarianceComponents(
        torch.tensor([1.0, -1.0, 1.0], dtype=F64), torch.tensor([0.1, -0.2, 0.0], dtype=F64), 2, 1
    )
    advice = advise(c, 0.5, tail=True)
    assert advice.delta_actions > 0
    assert advice.delta_states > 0
    assert advice.choice == "neither"


@pytest.mark.parametrize("delta", [0.003, 0.02, 0.1, 0.3, 0.7, 1.0, 3.0])
def test_optimal_actions_of_a_bandit(delta):
    """√(E_a (1-δ) / (V_s δ)), rounded to the better integer, where the greedy rule stops too."""
    c = finite_mdp(*gaussian_bandit(), n_steps=1000)
    v_s, e_a = c.state_variance, c.action_variance

    def cost(n):
        return (v_s + e_a / n) * (1 + delta * (n - 1))

    peak = max(1, math.floor(math.sqrt(max(0.0, e_a * (1 - delta) / (v_s * delta)))))
    best = min((peak, peak + 1), key=cost)
    found = optimal_actions(c, delta, max_actions=100)
    assert found.n_actions == best
    assert found.n_steps == pytest.approx(1000 / (1 + delta * (best - 1)))
    assert found.variance == pytest.approx(cost(best) / 1000)

    def advised(n):
        return advise(c, delta / (1 + delta * (n - 1)), n).choice

    assert advised(best) == "more states"
    assert best == 1 or advised(best - 1) == "more actions"


def test_optimal_actions_with_covariances_is_a_search():
    c = finite_mdp(*sticky_chain(**STICKY, advantage=False)[0], n_steps=60)
    found = optimal_actions(c, 0.5)
    tried = {n: c.at(n_steps=60 / (1 + 0.5 * (n - 1))).variance(n) for n in range(1, 65)}
    assert found.n_actions == min(tried, key=tried.get) > 1
    assert found.variance == min(tried.values())
    assert optimal_actions(c, 0.5, max_actions=2).n_actions == 2
    assert 1 <= optimal_actions(c.at(n_steps=2), 0.1).n_steps < 1.5
    assert optimal_actions(c.at(n_steps=1), 0.5).n_actions == 1  # no states left to trade


def test_table_rows():
    """Finger in Nauman & Cygan 2022, Table 1: the totals add the covariance rows as printed."""
    c = finite_mdp(*random_mdp(5), n_steps=9)
    rows = list(table(c).values())
    assert rows[0] == pytest.approx(c.state_variance / 2)  # P = 2 parameters
    assert rows[1] == pytest.approx(c.action_variance / 2)
    assert rows[4] == pytest.approx(c.markov_chain / 2) == pytest.approx(rows[0] + rows[2])
    assert rows[5] == pytest.approx(c.policy_dependent / 2) == pytest.approx(rows[1] + rows[3])
    literal = list(table(c, covariance_factor=1.0).values())
    lags = sum((9 - t) / 9 * float(c.policy[t]) for t in range(1, 9))
    assert literal[3] == pytest.approx(lags / 2)
    assert literal[5] == pytest.approx((c.action_variance + lags) / 2)
    assert literal[:2] == rows[:2]
    with_gamma = list(table(c.at(gamma=0.8)).values())
    assert with_gamma[0] == pytest.approx(rows[0] * sum(0.8 ** (2 * i) for i in range(9)) / 9)
    assert sum(with_gamma[4:]) == pytest.approx(9 * c.at(gamma=0.8).variance(1) / 2)
    assert list(table(c)) == [
        "Var_s[E_a ∇J]",
        "E_s Var_a[∇J]",
        "Σ (T-t)/T Cov[E_a ∇J_0, E_a ∇J_t]",
        "Σ (T-t)/T E_s Cov[∇J_0, ∇J_t]",
        "Markov chain variance",
        "Policy-dependent variance",
    ]


# From data


def simulate(mdp, n, n_steps, generator, *, start=None, k=0, noise=0.0):
    """[n, T, 2, (K,) P] of n trajectories; action 0 drives; Gaussian noise on every Q sample."""
    transition, upsilon, policy = mdp
    law = torch.tensor(stationary(mdp)) if start is None else start
    state = torch.multinomial(law, n, replacement=True, generator=generator)
    steps = []
    for _ in range(n_steps):
        pair = torch.multinomial(policy[state], 2, replacement=True, generator=generator)  # [n, 2]
        steps.append(upsilon[state.unsqueeze(1), pair])
        state = torch.multinomial(transition[state, pair[:, 0]], 1, generator=generator).squeeze(1)
    found = torch.stack(steps, 1)
    if k == 0:
        return found
    found = found.unsqueeze(3).repeat(1, 1, 1, k, 1)
    return found + noise * torch.randn(found.shape, dtype=F64, generator=generator)


def flat(components):
    """Every component of a record in one vector."""
    c = components
    sums = [c.markov_chain, c.policy_dependent, c.q_noise]
    return torch.cat([c.marginal, c.policy, torch.tensor(sums, dtype=F64)])


SMALL = random_mdp(8)


@pytest.mark.parametrize(
    ("start", "k"), [(None, 0), (None, 3), ([0.9, 0.1, 0.0], 0), ([0.9, 0.1, 0.0], 2)]
)
def test_estimates_are_unbiased(start, k):
    """n = 4 trajectories, T = 4, 1500 repeats, seed 0: every component within 4 SE of its value.

    Noise of variance 1 on every Q sample, 2 parameters: q_noise = 2, and E_a stays free of it.
    """
    gamma = 1.0 if start is None else 0.7
    start = None if start is None else torch.tensor(start, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    noise = 1.0 if k else 0.0
    data = simulate(SMALL, 4 * 1500, 4, generator, start=start, k=k, noise=noise)
    repeats = [
        flat(
            estimate_components(
                part, gamma=gamma, stationary=start is None, n_bootstrap=0
            ).components
        )
        for part in data.split(4)
    ]
    found = torch.stack(repeats)
    exact = finite_mdp(*SMALL, n_steps=4, start=start, gamma=gamma)
    expected = flat(replace(exact, q_noise=2.0 if k else math.nan))
    standard_error = found.std(0) / len(found) ** 0.5
    z = ((found.mean(0) - expected) / standard_error)[: None if k else -1]
    assert z.abs().max() <= 4, z
    # Dividing by n, or noise in E_a, would cause errors far above 4 SE.
    lags = len(exact.marginal)
    assert 4 * standard_error[0] < exact.state_variance / 4
    assert 4 * standard_error[lags] < exact.action_variance / 4
    assert bool(found[:, -1].isnan().all()) == (k == 0)


@pytest.mark.parametrize("k", [0, 2])
def test_direct_variance_agrees_with_the_components(k):
    """n = 20000, T = 4, seed 1, 4 SE: V(T, 1) and V(T, 2) themselves, Q noise included."""
    generator = torch.Generator().manual_seed(1)
    data = simulate(SMALL, 20000, 4, generator, k=k, noise=1.0)
    for gamma in (1.0, 0.8):
        exact = replace(finite_mdp(*SMALL, n_steps=4, gamma=gamma), q_noise=2.0)
        exact = exact.sampled_q(2) if k else exact
        for n in (1, 2):
            parts = [direct_variance(part, n_actions=n, gamma=gamma) for part in data.split(100)]
            parts = torch.tensor(parts, dtype=F64)
            z = (parts.mean() - exact.variance(n)) / (parts.std() / len(parts) ** 0.5)
            assert abs(float(z)) <= 4
            assert parts.std() / len(parts) ** 0.5 < 0.02 * exact.variance(n)


def test_one_large_sample_agrees_with_the_closed_form():
    """n = 20000, T = 5, 100 resamplings, seed 2: all lags and sums within 3 bootstrap SE."""
    data = simulate(SMALL, 20000, 5, torch.Generator().manual_seed(2), k=2, noise=0.5)
    found = estimate_components(data, n_bootstrap=100, generator=torch.Generator().manual_seed(3))
    exact = replace(finite_mdp(*SMALL, n_steps=5), q_noise=2 * 0.5**2)
    assert exact.sampled_q(4).action_variance == pytest.approx(exact.action_variance + 0.5 / 4)
    assert exact.sampled_q(4).q_noise == 0  # counted once
    c = found.components
    assert ((c.marginal - exact.marginal) / found.marginal.std(0)).abs().max() <= 3
    assert ((c.policy - exact.policy) / found.policy.std(0)).abs().max() <= 3
    for statistic in (
        lambda c: c.markov_chain,
        lambda c: c.policy_dependent,
        lambda c: c.policy_share,
        lambda c: c.q_noise,
        lambda c: c.sampled_q(1).variance(2),
        lambda c: c.at(n_steps=3, gamma=0.5).variance(1),
    ):
        standard_error = float(found.resampled(statistic).std())
        assert standard_error > 0
        assert abs(statistic(c) - statistic(exact)) <= 3 * standard_error
        assert standard_error < 0.2 * abs(statistic(exact))


def test_extra_action_must_not_drive():
    """Swapping the two actions removes the covariance of the driving action: order matters."""
    data = simulate(SMALL, 20000, 3, torch.Generator().manual_seed(4))
    right = estimate_components(data, n_bootstrap=0).components
    wrong = estimate_components(data.flip(2), n_bootstrap=0).components
    torch.testing.assert_close(wrong.policy[1:], -right.policy[1:])
    assert abs(float(right.policy[1])) > 0.05


def test_bootstrap_intervals_cover():
    """n = 60, T = 2, 300 repeats, B = 200, seed 5: nominal 95 % intervals cover in 85 to 99 %."""
    exact = finite_mdp(*SMALL, n_steps=2)
    generator = torch.Generator().manual_seed(5)
    expected = torch.cat([exact.marginal, exact.policy])
    ends = torch.tensor([0.025, 0.975], dtype=F64)
    hits = []
    for repeat in range(300):
        data = simulate(SMALL, 60, 2, generator)
        found = estimate_components(data, n_bootstrap=200, generator=generator)
        lags = torch.cat([found.marginal, found.policy], 1)
        low, high = lags.quantile(ends, dim=0)
        if repeat == 0:
            assert found.interval(lambda c: float(c.policy[1])) == pytest.approx(
                (float(low[3]), float(high[3]))
            )
            wide, narrow = (found.interval(lambda c: c.variance(2), level=p) for p in (0.95, 0.5))
            assert wide.low < narrow.low < narrow.high < wide.high
        hits.append((low <= expected) & (expected <= high))
    coverage = torch.stack(hits).double().mean(0)
    assert coverage.min() >= 0.85, coverage
    assert coverage.max() <= 0.99, coverage


def test_same_seed_same_bits():
    data = simulate(SMALL, 30, 3, torch.Generator().manual_seed(6), k=2, noise=0.5)

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return estimate_components(data, n_bootstrap=50, generator=generator)

    one, two, other = run(0), run(0), run(1)
    assert torch.equal(one.marginal, two.marginal)
    assert torch.equal(one.policy, two.policy)
    assert torch.equal(one.q_noise, two.q_noise)
    assert not torch.equal(one.marginal, other.marginal)
    assert torch.equal(flat(one.components), flat(other.components))


def test_blocks_change_nothing(monkeypatch):
    data = simulate(SMALL, 30, 3, torch.Generator().manual_seed(7), k=2, noise=0.5)

    def run():
        return estimate_components(data, n_bootstrap=20, generator=torch.Generator().manual_seed(0))

    whole = run()
    monkeypatch.setattr("totalprop.estimators.analysis.many_actions_data.BLOCK", 50)
    parts = run()
    torch.testing.assert_close(flat(parts.components), flat(whole.components))
    torch.testing.assert_close(parts.marginal, whole.marginal)
    torch.testing.assert_close(parts.policy, whole.policy)
    torch.testing.assert_close(parts.q_noise, whole.q_noise)


def test_traces_add_over_many_parameters():
    """P = 40000: no array may be [P, P], which would take 12.8 GB in float64."""
    data = torch.randn(4, 3, 2, 40000, generator=torch.Generator().manual_seed(8)) + 100
    found = estimate_components(data, n_bootstrap=3).components
    assert found.n_parameters == 40000
    assert found.marginal.dtype == F64
    halves = [estimate_components(x, n_bootstrap=0).components for x in data.split(20000, -1)]
    torch.testing.assert_close(found.marginal, halves[0].marginal + halves[1].marginal)
    torch.testing.assert_close(found.policy, halves[0].policy + halves[1].policy)


# Errors


@pytest.mark.parametrize("shape", [(5, 3, 2), (5, 3, 1, 4), (5, 0, 2, 4), (5, 3, 3, 2, 4)])
def test_wrong_gradients(shape):
    with pytest.raises(
        ValueError, match=r"gradients are \[5, .*expected \[trajectories, T, 2, P\]"
    ):
        estimate_components(torch.zeros(shape))
    with pytest.raises(ValueError, match="put the action that drives"):
        direct_variance(torch.zeros(shape), n_actions=1)


def test_too_little_data():
    with pytest.raises(ValueError, match="at least 2 trajectories, got 1"):
        estimate_components(torch.zeros(1, 3, 2, 4))
    with pytest.raises(ValueError, match="n_actions is 3, expected 1 or 2"):
        direct_variance(torch.zeros(5, 3, 2, 4), n_actions=3)
    found = estimate_components(torch.zeros(5, 3, 2, 4), n_bootstrap=0)
    with pytest.raises(ValueError, match="at least two resamplings, got 0: estimate with"):
        found.interval(lambda c: c.policy_share)


def test_wrong_mdp():
    transition, upsilon, policy = SMALL
    for bad, message in [
        ((transition[:, :1], upsilon, policy), r"transition is \[3, 1, 3\], expected \[3, 2, 3\]"),
        ((transition, upsilon[..., 0], policy), r"upsilon is \[3, 2\], expected \[3, 2, -1\]"),
        ((transition, upsilon, policy[0]), r"policy is \[2\], expected"),
        (
            (transition, upsilon, 2 * policy),
            "rows of policy must sum to 1, one is off by 1: normalise",
        ),
        ((transition / 2, upsilon, policy), "rows of transition must sum to 1, one is off by 0.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            finite_mdp(*bad, n_steps=2)
    with pytest.raises(ValueError, match=r"start is \[2\], expected \[3\]"):
        finite_mdp(*SMALL, n_steps=2, start=torch.tensor([0.5, 0.5]))
    stays = torch.eye(3, dtype=F64).unsqueeze(1).expand(3, 2, 3)
    with pytest.raises(ValueError, match="3 stationary distributions, expected one: pass start"):
        finite_mdp(stays, upsilon, policy, n_steps=2)
    law = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    assert finite_mdp(stays, upsilon, policy, n_steps=2, start=law).variance() > 0


def test_lengths_that_are_not_known_or_do_not_compare():
    c = finite_mdp(*SMALL, n_steps=4, n_lags=6)
    with pytest.raises(ValueError, match="n_steps is 7, expected 1 to 6, the number of known lags"):
        c.at(n_steps=7)
    with pytest.raises(ValueError, match="expected 1 to 6, the number of known lags"):
        delta_states(c, 1.0, tail=True)
    with pytest.raises(ValueError, match="delta is 0, expected > 0"):
        delta_states(c, 0)
    with pytest.raises(ValueError, match="delta is -1 and max_actions 64"):
        optimal_actions(c, -1)
    with pytest.raises(ValueError, match=r"marginal and policy are \[6\] and \[5\]"):
        replace(c, policy=c.policy[:5])
    law = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    elsewhere = finite_mdp(*SMALL, n_steps=4, start=law)
    with pytest.raises(ValueError, match=r"valid at T = 4, gamma = 1.0 only, got 3"):
        elsewhere.at(n_steps=3)
    for record in (elsewhere, c.at(gamma=0.9)):
        for rule in (
            lambda r: delta_states(r, 1.0),
            lambda r: general_condition(r, 1.0),
            lambda r: optimal_actions(r, 1.0),
            theorem_1,
        ):
            with pytest.raises(ValueError, match="variances at different T cannot be compared"):
                rule(record)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_more_trajectories_are_compared_for_any_start(gamma):
    """n trajectories have variance V / n; longer ones have another mean, and are refused."""
    start = torch.tensor([0.7, 0.0, 0.3], dtype=F64)
    c = finite_mdp(*random_mdp(2), n_steps=5, start=start, gamma=gamma)
    found = advise(c, 0.5, 2, states="trajectories")
    assert found.delta_states == pytest.approx(c.variance(2) / 1.5 - c.variance(2), rel=1e-12)
    assert found.delta_actions == pytest.approx(c.variance(3) - c.variance(2), rel=1e-12)
    best = optimal_actions(c, 0.1, states="trajectories", max_actions=30)
    cost = {n: c.variance(n) * (1 + 0.1 * (n - 1)) for n in range(1, 31)}
    assert best.n_actions == min(cost, key=cost.get)
    assert best.variance == pytest.approx(min(cost.values()), rel=1e-12)
    with pytest.raises(ValueError, match="stationary"):
        advise(c, 0.5)
    with pytest.raises(ValueError, match="delta is 0"):
        advise(c, 0, states="trajectories")
