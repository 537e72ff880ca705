"""The policy search with each optimiser against a reference, its guards and its log."""

import math
from dataclasses import replace

import pytest
import torch
from gymnasium import spaces
from torch.nn.utils import parameters_to_vector

from totalprop import estimators
from totalprop.agents.pipps.particles import Noise, ParticleModel, simulate
from totalprop.agents.pipps.search import (
    DIAGNOSE_EVERY,
    BestSoFar,
    SearchSettings,
    optimise_policy,
)
from totalprop.agents.trials.controllers import LinearPolicy, RBFController, RBFPolicy
from totalprop.world_models.gp_dynamics import GPDynamics

F64 = torch.float64
N, H, S = 20, 3, 2


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cost(states, actions):
    return 1 - torch.exp(-0.5 * (states - 0.5).square().sum(-1))


def make(cost=cost):
    dynamics = GPDynamics(S, 1)
    inputs = torch.randn(12, S + 1, dtype=F64, generator=generator(1))
    dynamics.gp.set_data(inputs, 0.8 * torch.randn(12, S, dtype=F64, generator=generator(2)))
    dynamics.gp.log_noise.fill_(math.log(0.2))
    start = torch.zeros(S, dtype=F64)
    model = ParticleModel(dynamics, start, torch.full_like(start, 0.2), cost)
    torch.manual_seed(0)
    return model, LinearPolicy(spaces.Box(-9, 9, (S,)), spaces.Box(-1, 1, (1,)))


def settings(**changes):
    return replace(
        SearchSettings(
            estimator=estimators.make("rp"),
            optimizer="adam",
            learning_rate=0.1,
            gradient_steps=4,
            n_particles=N,
            horizon=H,
            resample=False,
            fixed_noise=False,
            adam_eps=1e-4,
            momentum=0.9,
            dropout=0.0,
            noise_stop=0.0,
            keep_best=False,
        ),
        **changes,
    )


def theta(policy):
    return parameters_to_vector(policy.parameters()).detach().clone()


def flat(gradients):
    return torch.cat([g.reshape(-1) for g in gradients])


def result_at(model, policy, noise, per_sample=False):
    return estimators.gradient(
        lambda estimator, tap: simulate(model, policy, noise, estimator, tap=tap)[0],
        list(policy.parameters()),
        estimators.make("rp"),
        samples=N,
        per_sample=per_sample,
    )


class ExplodesAt:
    """A cost that is NaN on the given simulations (numbered from 0) and the usual one else."""

    def __init__(self, *numbers):
        self.numbers, self.calls = numbers, 0

    def __call__(self, states, actions):
        number, self.calls = self.calls, self.calls + 1
        return cost(states, actions) * (math.nan if number in self.numbers else 1.0)


# Adam


def test_adam_is_torchs():
    model, policy = make()
    optimise_policy(policy, model, settings(), generator(7))
    _, expected = make()
    adam = torch.optim.Adam(expected.parameters(), lr=0.1, eps=1e-4)
    source = generator(7)
    for _ in range(4):
        noise = Noise.draw(H, N, S, source, resample=False)
        found = result_at(model, expected, noise).gradients
        for parameter, g in zip(expected.parameters(), found, strict=True):
            parameter.grad = g
        adam.step()
    torch.testing.assert_close(theta(policy), theta(expected), rtol=1e-12, atol=1e-14)


def test_adam_starts_anew_for_every_search():
    """Its first step is α·g / (|g| + ε) whatever came before."""
    model, policy = make()
    optimise_policy(policy, model, settings(gradient_steps=3), generator(1))
    before = theta(policy)
    noise = Noise.draw(H, N, S, generator(2), resample=False)
    g = flat(result_at(model, policy, noise).gradients)
    optimise_policy(policy, model, settings(gradient_steps=1), generator(2))
    torch.testing.assert_close(theta(policy), before - 0.1 * g / (g.abs() + 1e-4))


# RMSprop of Parmas et al. 2018 (PIPPS)


def test_rmsprop2018_first_two_steps_by_hand():
    """m ← γ m + g / √(ḡ² + V / N), θ ← θ - α m, the particles' statistics written out."""
    model, policy = make()
    _, expected = make()
    source, m = generator(3), torch.zeros(3, dtype=F64)
    for _ in range(2):
        noise = Noise.draw(H, N, S, source, resample=False)
        # Gradients of single particles' costs; their mean is the gradient.
        single = N * result_at(model, expected, noise, per_sample=True).per_sample
        g = single.mean(0)
        variance_of_the_mean = ((single - g) ** 2).sum(0) / (N - 1) / N
        m = 0.9 * m + g / (g**2 + variance_of_the_mean).sqrt()
        with torch.no_grad():
            start = theta(expected)
            torch.nn.utils.vector_to_parameters(start - 0.1 * m, expected.parameters())
    changes = {"optimizer": "rmsprop2018", "gradient_steps": 2}
    optimise_policy(policy, model, settings(**changes), generator(3))
    torch.testing.assert_close(theta(policy), theta(expected), rtol=1e-9, atol=1e-12)


# Quasi-Newton


@pytest.mark.parametrize("resample", [False, True])
def test_quasi_newton_minimises_the_deterministic_objective(resample):
    model, policy = make()
    noise = Noise.draw(H, N, S, generator(4), resample=resample)

    def loss():
        with torch.no_grad():
            return float(simulate(model, policy, noise, estimators.make("rp"))[0])

    before = loss()
    changes = {"optimizer": "quasi-newton", "fixed_noise": True, "resample": resample}
    log = optimise_policy(policy, model, settings(**changes, gradient_steps=25), generator(4))
    assert log.losses[0] == pytest.approx(before, rel=1e-12)  # same noise as ours
    assert loss() < before - 0.05
    assert loss() == pytest.approx(min(log.losses), rel=1e-9)  # it keeps the best point
    assert len(log.losses) <= 25 + 20  # scipy may finish its last line search


def test_quasi_newton_keeps_the_best_point_of_all():
    """Three evaluations end in the middle of a line search, whose start SciPy returns."""
    seed = 8  # one for which the start is not the best
    model, policy = make()
    noise = Noise.draw(H, N, S, generator(seed), resample=False)
    changes = {"optimizer": "quasi-newton", "fixed_noise": True, "gradient_steps": 3}
    log = optimise_policy(policy, model, settings(**changes), generator(seed))
    with torch.no_grad():
        loss = float(simulate(model, policy, noise, estimators.make("rp"))[0])
    assert loss == pytest.approx(min(log.losses), rel=1e-9)


def test_no_noise_is_reported_of_particles_that_depend_on_each_other():
    for resample in (False, True):
        model, policy = make()
        changes = {"resample": resample, "gradient_steps": 2}
        log = optimise_policy(policy, model, settings(**changes), generator())
        assert len(log.signal_to_noise) == (0 if resample else 1) and len(log.k) == 1


def test_fixed_noise_is_the_same_in_every_step():
    """With a step size of almost nothing, the loss repeats."""
    for fixed in (True, False):
        model, policy = make()
        changes = {"learning_rate": 1e-12, "fixed_noise": fixed, "gradient_steps": 3}
        log = optimise_policy(policy, model, settings(**changes), generator(5))
        spread = max(log.losses) - min(log.losses)
        assert (spread < 1e-9) == fixed


# The best policy


def test_the_best_is_the_middle_of_the_cheapest_ten():
    best, costs = BestSoFar(), [5.0] * 9 + [3.0] * 5 + [1.0, 9.0, 1.0, 1.0, 1.0] + [2.0] * 11
    for i, cost in enumerate(costs):
        best.see(cost, torch.tensor([float(i)]))
        assert (len(best.parameters) == 1) == (i >= 9)
    means = [sum(costs[i : i + 10]) / 10 for i in range(len(costs) - 9)]
    assert best.cost == min(means) and best.parameters == means.index(min(means)) + 5


def test_a_search_that_steps_off_a_cliff_keeps_the_policy_that_it_had():
    """At a step size of 0.1 the cost falls; then the optimiser is made to throw it away."""
    ends = {}
    for keep in (False, True):
        model, policy = make()

        def push(number, loss, policy=policy):
            if number >= 60:
                with torch.no_grad():
                    for parameter in policy.parameters():
                        parameter.add_(3.0)

        options = settings(gradient_steps=80, keep_best=keep)
        log = optimise_policy(policy, model, options, generator(), push)
        noise = Noise.draw(H, 500, model.start_mean.shape[-1], generator(9), resample=False)
        with torch.no_grad():
            ends[keep] = float(simulate(model, policy, noise, estimators.make("rp"))[0])
    before = sum(log.losses[40:60]) / 20
    assert ends[True] < before + 0.1 * abs(before) < ends[False]


# Cooling


def test_a_search_ends_where_its_gradient_is_noise():
    """Three parameters are soon at their best; each phase takes 51 gradients at least."""
    model, policy = make()
    log = optimise_policy(
        policy, model, settings(noise_stop=2.0, gradient_steps=900, n_particles=10), generator()
    )
    assert 3 * 51 <= len(log.losses) < 300
    assert sum(log.losses[-20:]) < sum(log.losses[:20]) - 2


def test_a_search_with_dropout_leaves_out_less_and_less():
    """Basis functions kept per third: 1/2, 3/4, all."""
    model, _ = make()
    policy = RBFPolicy(spaces.Box(-9, 9, (S,)), spaces.Box(-1, 1, (1,)), n_centres=40)
    kept = []

    class Watched(RBFController):
        def __call__(self, x, factors=None):
            kept.append(1.0 if factors is None else float((factors > 0).double().mean()))
            return super().__call__(x, factors)

    policy.controller = lambda: Watched(policy)
    optimise_policy(policy, model, settings(dropout=0.5, gradient_steps=6), generator())
    thirds = torch.tensor(kept, dtype=F64).view(3, -1).mean(1)
    assert len(kept) == 6 * H and thirds[2] == 1
    # 2 steps of 3 x 20 x 40 Bernoulli draws each
    torch.testing.assert_close(thirds[:2], torch.tensor([0.5, 0.75], dtype=F64), atol=0.03, rtol=0)


# Guards


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop2018"])
def test_non_finite_gradients_are_skipped_and_counted(optimizer):
    policies = []
    for numbers in ((), (2, 3)):
        model, policy = make(ExplodesAt(*numbers))
        steps = 4 if numbers else 2
        log = optimise_policy(
            policy, model, settings(optimizer=optimizer, gradient_steps=steps), generator(6)
        )
        assert log.skipped == len(numbers) and len(log.losses) == steps
        policies.append(theta(policy))
    # Steps 2 and 3 did nothing: the policy is the one after two good steps.
    torch.testing.assert_close(*policies, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop2018", "quasi-newton"])
def test_not_one_finite_gradient_is_an_error_and_leaves_the_policy(optimizer):
    model, policy = make(ExplodesAt(*range(100)))
    before = theta(policy)
    changes = {"optimizer": optimizer, "fixed_noise": optimizer == "quasi-newton"}
    with pytest.raises(FloatingPointError, match="policy gradients was finite"):
        optimise_policy(policy, model, settings(**changes), generator())
    assert torch.equal(theta(policy), before)


def test_quasi_newton_ends_finite_when_a_line_search_explodes():
    model, policy = make(ExplodesAt(3, 4))
    changes = {"optimizer": "quasi-newton", "fixed_noise": True, "gradient_steps": 15}
    log = optimise_policy(policy, model, settings(**changes), generator())
    assert torch.isfinite(theta(policy)).all()
    assert log.skipped == 2


# The log


def test_log_holds_one_entry_per_step_and_measurements_every_25():
    model, policy = make()
    steps = DIAGNOSE_EVERY + 2
    seen = []
    changes = {"estimator": estimators.make("tpx"), "gradient_steps": steps}
    log = optimise_policy(
        policy,
        model,
        settings(**changes),
        generator(),
        lambda step, loss: seen.append((step, loss)),
    )
    assert len(log.losses) == len(log.gradient_norms) == steps
    assert seen == list(enumerate(log.losses))
    assert len(log.k) == len(log.signal_to_noise) == 2
    assert log.k[0].shape == (H, S) and ((log.k[0] >= 0) & (log.k[0] <= 1)).all()


def test_signal_to_noise_is_that_of_the_mean_over_particles():
    model, policy = make()
    noise = Noise.draw(H, N, S, generator(8), resample=False)
    single = N * result_at(model, policy, noise, per_sample=True).per_sample
    expected = single.mean(0).square().sum() / (single.var(0).sum() / N)
    log = optimise_policy(policy, model, settings(gradient_steps=1), generator(8))
    assert log.signal_to_noise == [pytest.approx(float(expected), rel=1e-9)]


@pytest.mark.parametrize("name", ["rp", "tpx"])
def test_measuring_does_not_change_the_search(name, monkeypatch):
    """Steps with a meter and a tap must give the same parameters as steps without."""
    from totalprop.agents.pipps import search as policy_search

    found = []
    for every in (1, 1000):
        monkeypatch.setattr(policy_search, "DIAGNOSE_EVERY", every)
        model, policy = make()
        optimise_policy(policy, model, settings(estimator=estimators.make(name)), generator(9))
        found.append(theta(policy))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
