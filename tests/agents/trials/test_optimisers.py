"""The optimisers on costs whose steps are known in closed form, and what they skip."""

import itertools
import math

import pytest
import scipy.optimize
import torch

from totalprop.agents.trials.optimisers import Cooling, Evaluation, adam, quasi_newton, rmsprop2018

F64 = torch.float64


def parameters():
    """Two parameters of different shapes, three numbers."""
    return [
        torch.tensor([[1.0, -2.0]], dtype=F64, requires_grad=True),
        torch.tensor([0.5], dtype=F64, requires_grad=True),
    ]


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


class Quadratic:
    """Σ w_i θ_i² / 2 with w = (1, 10, 3); NaN at the evaluations of these numbers, from 0."""

    weights = torch.tensor([1.0, 10.0, 3.0], dtype=F64)

    def __init__(self, parameters, nan_at=()):
        self.parameters, self.nan_at, self.losses = parameters, nan_at, []

    def __call__(self):
        theta = flat(self.parameters)
        factor = math.nan if len(self.losses) in self.nan_at else 1.0
        loss = factor * 0.5 * (self.weights * theta.square()).sum()
        self.losses.append(float(loss))
        return Evaluation(loss, factor * self.weights * theta, torch.ones_like(theta))


RUN = {
    "adam": lambda p, f, n: adam(p, f, steps=n, learning_rate=0.1, eps=1e-4),
    "rmsprop2018": lambda p, f, n: rmsprop2018(p, f, steps=n, learning_rate=0.01, momentum=0.9),
    "quasi_newton": lambda p, f, n: quasi_newton(p, f, evaluations=n),
}


def test_adam_is_torchs():
    ours, theirs = parameters(), parameters()
    assert adam(ours, Quadratic(ours), steps=5, learning_rate=0.1, eps=1e-4) == 0
    reference = torch.optim.Adam(theirs, lr=0.1, eps=1e-4)
    for _ in range(5):
        reference.zero_grad()
        (0.5 * Quadratic.weights * torch.cat([p.reshape(-1) for p in theirs]) ** 2).sum().backward()
        reference.step()
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-12, atol=0)


# Cooling


def cooled(signal, significance=2.0, steps=3000, p=100, seed=0):
    """Step at which each phase of a search with gradients signal(step) e_1 + N(0, I) ended."""
    cooling, source, ends = Cooling(significance, steps), torch.Generator().manual_seed(seed), []
    for step in range(steps):
        gradient = torch.randn(p, dtype=F64, generator=source)
        gradient[0] += signal(step)
        phase = cooling.phase
        cooling.add(gradient)
        if cooling.phase > phase or cooling.is_over:
            ends.append(step)
        if cooling.is_over:
            break
    return ends


def test_each_phase_begins_with_cosines_of_its_own():
    """Gradients that alternate have cosines of -1: noise, as soon as there are 10 of them."""
    cooling, phases = Cooling(2.0, 3000, window=10), [0]
    while not cooling.is_over:
        cooling.add(torch.tensor([(-1.0) ** len(phases)], dtype=F64))
        phases.append(cooling.phase)
    # Eleven gradients make ten cosines; the direction of the last one is the next phase's first.
    assert phases == [0] * 11 + [1] * 10 + [2] * 11


def test_noise_is_a_mean_within_so_many_standard_errors():
    """Cosines of 0.1 ± 0.2: s = 0.202, and two errors of the mean of 50 are 0.0571."""
    for shift, is_noise in ((0.0, False), (-0.05, True)):
        cooling = Cooling(2.0, 3000, window=50)
        cooling._cosines.extend(0.1 + shift + 0.2 * (-1) ** i for i in range(50))
        assert cooling._is_noise() is is_noise


def test_pure_noise_ends_every_phase_as_soon_as_it_can_be_tested():
    """51 gradients make 50 cosines; c < 2 s / √50 holds in 98 % of the first tests."""
    ends = [cooled(lambda step: 0.0, seed=seed) for seed in range(20)]
    assert all(len(each) == 3 for each in ends)
    assert sorted(each[0] for each in ends)[15] == 50
    assert max(each[2] for each in ends) < 250


def test_a_signal_as_strong_as_the_noise_ends_no_phase_before_its_time():
    """|signal|² = tr of the noise: the cosines are 1/2 on average, 5 of their deviations."""
    assert cooled(lambda step: 10.0, steps=600) == [199, 399, 599]


def test_a_phase_ends_where_the_signal_does():
    ends = cooled(lambda step: 10.0 * (step < 300))
    assert 300 < ends[0] <= 350 and ends[2] < 600


def test_without_significance_phases_are_thirds():
    assert cooled(lambda step: 0.0, significance=0.0, steps=99) == [32, 65, 98]


def test_steps_that_jump_across_a_minimum_are_noise():
    assert cooled(lambda step: 10.0 * (-1) ** step)[0] == 50


def test_gradients_that_are_not_finite_count_as_steps_alone():
    cooling = Cooling(2.0, 30)
    for _ in range(10):
        cooling.add(torch.full((3,), math.nan, dtype=F64))
    assert cooling.phase == 1 and not cooling.is_over


def test_adam_halves_its_steps_from_phase_to_phase_and_ends_with_the_last():
    """A constant gradient: Adam's steps are as long as the step size; 3 phases of 4 steps."""
    theta, path = torch.zeros(1, dtype=F64, requires_grad=True), []
    evaluation = Evaluation(torch.zeros(()), torch.ones(1, dtype=F64))

    def evaluate():
        path.append(float(theta.detach()))
        return evaluation

    cooling = Cooling(0.0, 12)
    adam([theta], evaluate, steps=100, learning_rate=0.8, eps=1e-12, cooling=cooling)
    path.append(float(theta.detach()))
    lengths = [before - after for before, after in itertools.pairwise(path)]
    assert lengths == pytest.approx([0.8] * 4 + [0.4] * 4 + [0.2] * 4, rel=1e-6)


def test_rmsprop2018_steps_in_numbers():
    """Particles (1, 3) / 2 and (2, -2) / 2: ḡ = 2, V = 1; ḡ = 0, V = 4; m = (2 / √5, 0)."""
    found = [torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)]
    gradient, variance = torch.tensor([2.0, 0.0], dtype=F64), torch.tensor([1.0, 4.0], dtype=F64)

    def run(steps):
        evaluation = Evaluation(torch.zeros(()), gradient, variance)
        rmsprop2018(found, lambda: evaluation, steps=steps, learning_rate=0.1, momentum=0.9)

    run(1)
    expected = torch.tensor([1 - 0.1 * 2 / 5**0.5, 1.0], dtype=F64)
    torch.testing.assert_close(flat(found), expected)
    run(2)  # the momentum starts at 0 again
    expected[0] -= (1 + 1.9) * 0.1 * 2 / 5**0.5
    torch.testing.assert_close(flat(found), expected)


def test_quasi_newton_finds_the_minimum_of_a_quadratic():
    found = parameters()
    quasi_newton(found, Quadratic(found), evaluations=50)
    torch.testing.assert_close(flat(found), torch.zeros(3, dtype=F64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("evaluations", range(1, 8))
def test_quasi_newton_ends_at_the_best_point_that_it_evaluated(evaluations):
    """However few evaluations: SciPy returns the start of a line search that it did not finish."""
    found = parameters()
    cost = Quadratic(found)
    quasi_newton(found, cost, evaluations=evaluations)
    best = min(cost.losses)
    assert float(cost().loss) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("name", ["adam", "rmsprop2018"])
def test_steps_without_a_finite_gradient_change_nothing_and_are_counted(name):
    with_nan, without = parameters(), parameters()
    assert RUN[name](with_nan, Quadratic(with_nan, nan_at=(0, 2)), 4) == 2
    assert RUN[name](without, Quadratic(without), 2) == 0
    assert torch.equal(flat(with_nan), flat(without))


@pytest.mark.parametrize("number", range(5))
def test_quasi_newton_ends_at_a_finite_cost(number):
    """Wherever one of its first evaluations was not; the next line search may give up there."""
    found = parameters()
    cost = Quadratic(found, nan_at=(number,))
    assert quasi_newton(found, cost, evaluations=50) == 1
    best = min([loss for loss in cost.losses if math.isfinite(loss)], default=math.inf)
    assert float(cost().loss) <= best and torch.isfinite(flat(found)).all()


@pytest.mark.parametrize("name", RUN)
def test_without_any_finite_gradient_the_parameters_stay(name):
    found = parameters()
    cost = Quadratic(found, nan_at=range(1000))
    assert RUN[name](found, cost, 3) == len(cost.losses) > 0
    assert torch.equal(flat(found), flat(parameters()))


class Plateau(Quadratic):
    """1 - exp(-|θ|²/2): far from 0 it is flat, and L-BFGS's steps grow without a reach."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.seen = []

    def __call__(self):
        theta = flat(self.parameters)
        self.seen.append(theta)
        value = (-0.5 * theta.square().sum()).exp()
        self.losses.append(float(1 - value))
        return Evaluation(1 - value, theta * value)


def test_quasi_newton_goes_no_further_than_its_reach_and_then_starts_anew():
    start = torch.tensor([1.5, 1.5, 1.5], dtype=F64)
    found = [start.clone().requires_grad_()]
    cost = Plateau(found)
    quasi_newton(found, cost, evaluations=60, reach=0.5)
    seen = torch.stack(cost.seen)
    assert ((seen[1:5] - start).abs() <= 0.5 + 1e-12).all()
    assert float(flat(found).norm()) < 1e-2  # in rounds, as 0 is 1.5 away
    assert len(cost.losses) <= 60 + 25


def test_quasi_newton_with_a_reach_stops_where_nothing_is_gained():
    found = parameters()
    cost = Quadratic(found)
    quasi_newton(found, cost, evaluations=500, reach=5.0)
    torch.testing.assert_close(flat(found), torch.zeros(3, dtype=F64), atol=1e-4, rtol=0)
    assert len(cost.losses) < 100


def rounds(monkeypatch, costs, evaluations):
    """The budgets of the rounds of a quasi-Newton search whose evaluations have these costs."""
    budgets, costs = [], iter(costs)
    parameters = [torch.zeros(1, dtype=F64, requires_grad=True)]

    def minimize(function, start, *, options, **kwargs):
        budgets.append(options["maxfun"])
        for _ in range(next(costs)):
            function(start + 0.1)

    def evaluate():
        return Evaluation(torch.tensor(next(costs), dtype=F64), torch.ones(1, dtype=F64))

    monkeypatch.setattr(scipy.optimize, "minimize", minimize)
    quasi_newton(parameters, evaluate, evaluations=evaluations, reach=1.0)
    return budgets


def test_all_rounds_of_a_quasi_newton_search_share_its_evaluations(monkeypatch):
    costs = [4, 9.0, 8.0, 7.0, 6.0, 4, 5.0, 4.0, 3.0, 2.0, 2, 1.0, 0.5]  # of each round, after a 4
    assert rounds(monkeypatch, costs, evaluations=10) == [10, 6, 2]


def test_a_quasi_newton_search_goes_on_while_it_gains_a_millionth(monkeypatch):
    gains = [1, 100.0, 1, 99.0, 1, 98.0, 1, 97.0, 1, 96.0]
    assert rounds(monkeypatch, gains, evaluations=5) == [5, 4, 3, 2, 1]
    assert rounds(monkeypatch, [1, 100.0, 1, 100.0 - 1e-6], evaluations=5) == [5, 4]
