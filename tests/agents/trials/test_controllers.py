"""The controllers against autograd, with their sizes and their stable-baselines3 interface."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.func import functional_call, jacrev, vmap

from tests.estimators.conftest import gram_by_hand
from totalprop.agents.trials.controllers import (
    LinearPolicy,
    RBFPolicy,
    saturate,
    saturate_slope,
)

F64 = torch.float64
CARTPOLE = spaces.Box(-np.inf, np.inf, (4,), np.float32)


def actions(n, low=-1.0, high=1.0, dtype=np.float32):
    return spaces.Box(low, high, (n,), dtype)


def make(policy_class, controls=1, angle_dims=(), seed=0, **kwargs):
    """A controller with every parameter moved off its start."""
    torch.manual_seed(seed)
    policy = policy_class(CARTPOLE, actions(controls), angle_dims=angle_dims, **kwargs)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return policy


def states(n=7, seed=1):
    return torch.randn(n, 4, dtype=F64, generator=torch.Generator().manual_seed(seed))


def autograd_jacobian(policy, x):
    """[N, A, P] by torch.func, parameters flattened in the order of `parameters()`."""
    parameters = {name: p.detach() for name, p in policy.named_parameters()}

    def one(parameters, x):
        return functional_call(policy, parameters, (x[None],))[0]

    by_name = vmap(jacrev(one), in_dims=(None, 0))(parameters, x)
    return torch.cat([j.flatten(2) for j in by_name.values()], -1)


def count(policy):
    return sum(p.numel() for p in policy.parameters())


@pytest.mark.parametrize(("angle_dims", "expected"), [((), 254), ((1,), 305)])
def test_rbf_parameter_count_on_the_cartpole(angle_dims, expected):
    """50 (S + 1) + S: Parmas et al. 2023, App. B, "about 250 parameters"."""
    assert count(RBFPolicy(CARTPOLE, actions(1), angle_dims=angle_dims)) == expected


@pytest.mark.parametrize(("angle_dims", "expected"), [((), 2 * 4 + 2), ((1,), 2 * 5 + 2)])
def test_linear_parameter_count(angle_dims, expected):
    assert count(LinearPolicy(CARTPOLE, actions(2), angle_dims=angle_dims)) == expected


def test_linear_parameter_count_on_the_unicycle():
    space = spaces.Box(-np.inf, np.inf, (10,), np.float32)
    assert count(LinearPolicy(space, actions(2))) == 22


def test_saturation_is_the_papers_and_its_slope_is_its_derivative():
    v = torch.linspace(-7, 7, 2001, dtype=F64, requires_grad=True)
    u = saturate(v)
    assert u.abs().max() <= 1 + 1e-15
    # sin 3v = 3 sin v - 4 sin³ v, so (9 sin v + sin 3v) / 8 = (3 sin v - sin³ v) / 2
    torch.testing.assert_close(u, (3 * v.sin() - v.sin() ** 3) / 2, atol=1e-14, rtol=0)
    assert float(saturate(torch.tensor(math.pi / 2, dtype=F64))) == pytest.approx(1.0)
    (slope,) = torch.autograd.grad(u.sum(), v)
    torch.testing.assert_close(saturate_slope(v.detach()), slope, atol=1e-13, rtol=0)


@pytest.mark.parametrize("policy_class", [RBFPolicy, LinearPolicy])
def test_actions_stay_in_the_unit_box(policy_class):
    policy = make(policy_class, controls=2)
    with torch.no_grad():
        policy.weights.mul_(100)
    u = policy.act(10 * states(500))
    assert u.shape == (500, 2) and u.dtype == F64
    assert 0.5 < u.abs().max() <= 1 + 1e-12


def test_rbf_equals_its_formula():
    policy, x = make(RBFPolicy, n_centres=5), states()
    scaled = (x[:, None] - policy.centres) * policy.log_inverse_scale.exp()
    v = (torch.exp(-(scaled**2).sum(-1)) * policy.weights[0]).sum(-1, keepdim=True)
    torch.testing.assert_close(policy.act(x), saturate(v))


@pytest.mark.parametrize("offset", [2.0**14, 2.0**24, 2.0**30])
@pytest.mark.parametrize("controls", [1, 2])
def test_rbf_gives_the_same_numbers_at_any_offset_of_the_observations(controls, offset):
    """All values are multiples of 2⁻²⁰, so that the shifted ones are exact."""

    def numbers(offset):
        policy = make(RBFPolicy, controls, n_centres=6)
        with torch.no_grad():  # observations that spread over 0.1
            policy.centres.copy_((policy.centres * 1e5).round() * 2.0**-20 + offset)
            policy.log_inverse_scale.add_(math.log(10))
        x = ((states() * 1e5).round() * 2.0**-20 + offset).requires_grad_()
        action = policy.act(x)
        gradients = torch.autograd.grad(action.sum(), [x, *policy.parameters()])
        controller = policy.controller()
        torch.testing.assert_close(controller(x.detach()), action)
        jacobian, alpha = controller.jacobian(0), torch.ones(1, len(x), controls, dtype=F64)
        parts = action, *gradients, jacobian.per_sample(alpha[0]), *jacobian.gram(alpha)
        return [part.detach() for part in parts]

    for found, expected in zip(numbers(offset), numbers(0.0), strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_linear_equals_its_formula():
    policy, x = make(LinearPolicy, controls=2), states()
    torch.testing.assert_close(policy.act(x), saturate(x @ policy.weights.T + policy.bias))


@pytest.mark.parametrize("angle_dims", [(), (1,), (1, 3)])
@pytest.mark.parametrize("controls", [1, 2, 3])
@pytest.mark.parametrize("policy_class", [RBFPolicy, LinearPolicy])
def test_parameter_jacobian_equals_autograd(policy_class, controls, angle_dims):
    kwargs = {"n_centres": 6} if policy_class is RBFPolicy else {}
    policy, x = make(policy_class, controls, angle_dims, **kwargs), states()
    found = policy.parameter_jacobian(x)
    assert found.shape == (len(x), controls, count(policy)) and not found.requires_grad
    torch.testing.assert_close(found, autograd_jacobian(policy, x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("controls", [1, 2])
def test_last_layer_of_the_rbf_policy_is_its_weights(controls):
    policy = make(RBFPolicy, controls, n_centres=6)
    flat = torch.nn.utils.parameters_to_vector(policy.parameters())
    assert torch.equal(flat[policy.last_layer], policy.weights.flatten())


def test_last_layer_of_the_linear_policy_is_everything():
    policy = make(LinearPolicy)
    flat = torch.nn.utils.parameters_to_vector(policy.parameters())
    assert torch.equal(flat[policy.last_layer], flat)


def test_initialise_places_the_centres():
    """5000 centres, seed 0: mean and std of every coordinate within 4 standard errors."""
    torch.manual_seed(0)
    policy = RBFPolicy(CARTPOLE, actions(1), n_centres=5000)
    mean = torch.tensor([0.0, 3.0, -1.0, 2.0], dtype=F64)
    std = torch.tensor([1.0, 0.1, 2.0, 0.5], dtype=F64)
    policy.place(mean, std)
    error = (policy.centres.mean(0) - mean) / (std / 5000**0.5)
    assert error.abs().max() < 4
    spread_error = (policy.centres.std(0) / std - 1) * (2 * 5000) ** 0.5
    assert spread_error.abs().max() < 4
    torch.testing.assert_close(policy.log_inverse_scale.exp(), 1 / std)


def test_initial_rbf_weights_are_those_of_a_linear_layer():
    torch.manual_seed(0)
    weights = RBFPolicy(CARTPOLE, actions(40)).weights
    bound = 50**-0.5
    assert weights.abs().max() <= bound and weights.abs().max() > 0.98 * bound


def test_n_centres_must_be_positive():
    with pytest.raises(ValueError, match="n_centres must be at least 1, a whole number, got 0"):
        RBFPolicy(CARTPOLE, actions(1), n_centres=0)


# stable-baselines3's interface


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("policy_class", [RBFPolicy, LinearPolicy])
def test_predict_rescales_to_asymmetric_bounds(policy_class, dtype):
    torch.manual_seed(0)
    space = spaces.Box(np.array([-2.0, 0.0], dtype), np.array([6.0, 1.0], dtype), dtype=dtype)
    policy = policy_class(CARTPOLE, space)
    x = states(200)
    with torch.no_grad():
        policy.weights.mul_(200)
    action, state = policy.predict(x.numpy().astype(np.float32))
    assert action.shape == (200, 2) and action.dtype == dtype and state is None
    scaled = policy.act(x.float().double()).detach().numpy()
    expected = np.array([2.0, 0.5]) + np.array([4.0, 0.5]) * scaled
    np.testing.assert_allclose(action, expected, atol=2e-6)
    assert (action >= space.low).all() and (action <= space.high).all()


def test_predict_of_one_observation_has_the_action_shape():
    policy = make(RBFPolicy, controls=2)
    x = states(3).numpy()
    single, _ = policy.predict(x[0])
    batch, _ = policy.predict(x, deterministic=True)
    assert single.shape == (2,) and batch.shape == (3, 2)
    np.testing.assert_array_equal(single, batch[0])


@pytest.mark.parametrize("policy_class", [RBFPolicy, LinearPolicy])
def test_policy_saves_and_loads_alone(policy_class, tmp_path):
    kwargs = {"n_centres": 6} if policy_class is RBFPolicy else {}
    policy = make(policy_class, controls=2, angle_dims=(1,), **kwargs)
    policy.save(tmp_path / "policy.pth")
    loaded = policy_class.load(tmp_path / "policy.pth")
    assert torch.equal(loaded(states()), policy(states()))


# The Jacobian that the probe uses


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("last_layer", [False, True])
@pytest.mark.parametrize("controls", [1, 2])
@pytest.mark.parametrize("policy_class", [RBFPolicy, LinearPolicy])
def test_a_controllers_jacobian_acts_as_the_dense_one(policy_class, controls, last_layer, offset):
    """Everything shifted by 30 units: sums of squares as products must not lose the digits."""
    kwargs = {"n_centres": 6} if policy_class is RBFPolicy else {}
    policy, x = make(policy_class, controls, (1,) if offset == 0 else (), **kwargs), states()
    if policy_class is RBFPolicy:
        with torch.no_grad():
            policy.centres.add_(offset)
    x = x + offset
    dense = policy.parameter_jacobian(x)  # [N, A, P]
    if last_layer:
        dense = dense[..., policy.last_layer]
    controller = policy.controller()
    for visited in (x.flip(0), x):
        torch.testing.assert_close(controller(visited), policy.act(visited))
    found = controller.jacobian(1, last_layer=last_layer)
    alpha = torch.randn(3, len(x), controls, dtype=F64, generator=torch.Generator().manual_seed(2))
    for rows in (slice(None), slice(2, 5)):
        j, d, a = found.rows(rows), dense[rows], alpha[:, rows]
        close = {"rtol": 1e-8, "atol": 1e-10}
        b = torch.einsum("mnf,nfp->mnp", a, d)
        torch.testing.assert_close(j.gram(a)[:2], gram_by_hand(b)[:2], **close)
        torch.testing.assert_close(j.per_sample(a[0]), torch.einsum("nf,nfp->np", a[0], d), **close)
