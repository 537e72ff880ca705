"""The saturating cost in its known values, and its moments against Monte Carlo."""

import numpy as np
import pytest
import torch

from tests.world_models.test_moment_matching import assert_means, gaussian, sample
from totalprop.agents.trials.saturating_cost import SaturatingCost
from totalprop.envs.cartpole import CartPoleSwingUpEnv
from totalprop.envs.unicycle import UnicycleEnv
from totalprop.world_models.moment_matching import Gaussian, join, linear, trigonometry

F64 = torch.float64


def unicycle():
    return SaturatingCost(**UnicycleEnv().saturating_cost)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({7: 0.3, 9: 0.2}, 0.04374478),
        ({5: 0.5, 6: -0.2, 7: 0.1, 8: 0.4, 9: -0.1}, 0.1024805),
        ({7: 1.5}, 0.9803243),
        ({}, 0.0),
    ],
)
def test_the_unicycles_cost_with_sums_and_differences_of_angles(changes, expected):
    state = torch.zeros(10, dtype=F64)
    for entry, value in changes.items():
        state[entry] = value
    assert float(unicycle()(state)) == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize(
    "options", [{"cost": "angle"}, {"cost": "tip"}, {"cost": "tip", "mirrored_tip": True},
                {"cost": "tip", "tip_width": 0.5, "pole_length": 0.6}],
)  # fmt: skip
def test_the_cart_poles_quadratic_form_is_its_cost(options):
    env = CartPoleSwingUpEnv(**options)
    states = 2 * torch.randn(3, 50, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = SaturatingCost(**env.saturating_cost)(states)
    torch.testing.assert_close(found, env.cost(states), rtol=1e-12, atol=1e-14)


def test_the_unicycles_quadratic_form_is_its_cost():
    states = 2 * torch.randn(3, 50, 10, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = UnicycleEnv().cost(states)
    torch.testing.assert_close(unicycle()(states), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("width", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("name", ["tip", "unicycle"])
def test_moments_are_those_of_a_gaussian_with_the_sines_moments(name, width):
    env = CartPoleSwingUpEnv(cost="tip")
    cost = unicycle() if name == "unicycle" else SaturatingCost(**env.saturating_cost)
    x = gaussian(cost.n_states, width, seed=4, mean=0.5)
    zeros = torch.zeros(cost.n_angles, dtype=F64)
    z = join(x, range(cost.n_states), linear(x, cost.angles, zeros))
    entries = range(cost.n_states, cost.n_states + cost.n_angles)
    z = join(z, entries, trigonometry(z.marginal(entries)))
    keep = [d for d in range(z.mean.shape[0]) if d not in entries]
    error = sample(z.marginal(keep)) - cost.target
    values = 1 - torch.exp(-0.5 * ((error @ cost.weights) * error).sum(-1))
    mean, variance = cost.moments(x)
    assert_means(values, mean, "mean")
    assert_means((values - mean).square(), variance, "variance")


def test_of_a_narrow_state_the_mean_is_the_costs_own():
    cost = unicycle()
    x = gaussian(10, 0.02, mean=0.3)
    values = cost(sample(x))
    mean, variance = cost.moments(x)
    assert float(mean) == pytest.approx(float(values.mean()), rel=1e-3)
    assert float(variance) == pytest.approx(float(values.var()), rel=0.05)
    exact = Gaussian(x.mean, torch.zeros(10, 10, dtype=F64))
    torch.testing.assert_close(cost.moments(exact)[0], cost(x.mean))


def test_a_diagonal_is_a_matrix():
    x = gaussian(3)
    short, long = (
        SaturatingCost([1, 2, 3], [4, 0, 1]),
        SaturatingCost([1, 2, 3], np.diag([4, 0, 1])),
    )
    torch.testing.assert_close(short.moments(x), long.moments(x))
    assert short.root.shape == (2, 3)  # of rank 2
    torch.testing.assert_close(short.root.T @ short.root, short.weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 1.0, "weights": [1.0]}, "target must be a vector"),
        ({"target": [1.0, 2.0], "weights": [1.0]}, "weights must be 2 numbers, or 2 x 2"),
        ({"target": ["a"], "weights": [1.0]}, r"target must be numbers, got \['a'\]"),
        ({"target": [np.nan], "weights": [1.0]}, "target must be finite"),
        ({"target": [0.0], "weights": [-1.0]}, "without negative eigenvalues"),
        ({"target": [0.0, 0.0], "weights": [[1.0, 0.5], [0.0, 1.0]]}, "of an asymmetric one"),
        ({"target": [0.0], "weights": [0.0]}, "must not all be 0"),
        (
            {"target": [0.0] * 4, "weights": [1.0] * 4, "angles": [[1.0]]},
            "2 for each of 1 angles, which leaves rows of 2, got 1 x 1 numbers",
        ),
    ],
)
def test_what_is_no_saturating_cost_is_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        SaturatingCost(**arguments)
    assert "\n" not in str(error.value)
