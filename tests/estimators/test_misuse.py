"""Wrong use of a node: every registry entry refuses it with a sentence, or says what is missing."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

from totalprop import estimators
from totalprop.estimators import Estimator, ParameterProbe, assign_credit, make
from totalprop.estimators.node import UNCREDITED

F64 = torch.float64
NODEWISE = [name for name in estimators.names() if not make(name).several_passes]
N, D = 6, 3


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gaussian_node(**changed):
    """Arguments of a node [N, D] that all estimators accept, some of them replaced."""
    mean = randn(N, D, seed=1).requires_grad_()
    arguments = {"mean": mean, "std": torch.full_like(mean, 0.5).detach()}
    arguments |= {"noise": randn(N, D, seed=2), "credit": mean.new_zeros(N)}
    arguments["probe"] = ParameterProbe(lambda p, x: (p["b"] + x, 0.5 + p["b"]), B, mean)
    return arguments | changed


B = {"b": torch.zeros(D, dtype=F64)}
MISUSES = {
    "a negative std": ({"std": -torch.ones(N, D, dtype=F64)}, "std must be positive, got a neg"),
    "std as a number": ({"std": 0.5}, r"std must have the node's shape, \[6, 3\], got 0.5"),
    "a float credit": ({"credit": 0.0}, r"credit must be a tensor \[6\], got 0.0; start a rollout"),
    "no credit": ({"credit": None}, r"credit must be a tensor \[6\], got None; start a rollout"),
    "a mean [N]": (
        {name: torch.ones(N, dtype=F64) for name in ("mean", "std", "noise")},
        r"mean must be a tensor \[N, ..., D\] .* got \[6\]; .* needs mean.unsqueeze\(-1\)",
    ),
    "a mean as a number": ({"mean": 1.0}, r"mean must be a tensor .* got 1.0"),
    "whole numbers": (
        {"mean": torch.ones(N, D, dtype=torch.int64)},
        r"of real .* torch.int64; pass mean.float\(",
    ),
    "meter as a number": ({"meter": 0.0}, "meter must be a tensor of zeros .* got 0.0"),
    "gauge as a number": ({"gauge": 0.0}, "gauge must be a tensor of zeros .* got 0.0"),
    "tap as a number": ({"tap": 0.0}, "tap must be a tensor of zeros .* got 0.0"),
    "no noise": ({"noise": None}, r"noise must have the node's shape, \[6, 3\], got None"),
    "credit of another dtype": ({"credit": torch.zeros(N)}, "node's dtype, torch.float64, got"),
    "credit with an axis": ({"credit": torch.zeros(N, 1)}, r"credit must have .* got \[6, 1\]"),
}


@pytest.mark.parametrize("name", NODEWISE)
@pytest.mark.parametrize("misuse", MISUSES)
def test_a_misused_node_is_refused_when_called(name, misuse):
    changed, message = MISUSES[misuse]
    arguments = gaussian_node()
    make(name)(**arguments)
    with pytest.raises(ValueError, match=message) as caught:
        make(name)(**{**arguments, **changed})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NODEWISE)
def test_a_std_of_0_is_for_estimators_without_a_score(name):
    """Of the others the gradient would be NaN; RP's is that of the mean."""
    arguments = gaussian_node(std=torch.zeros(N, D, dtype=F64))
    if make(name).needs_score:
        with pytest.raises(ValueError, match=r"got 0, at which .*std.clamp\(min=1e-6\)"):
            make(name)(**arguments)
        return
    sample, _ = make(name)(**arguments)
    (gradient,) = torch.autograd.grad(sample.sum(), arguments["mean"])
    torch.testing.assert_close(gradient, torch.ones_like(gradient))


@pytest.mark.parametrize("name", NODEWISE)
def test_a_rollout_without_gradients_may_be_deterministic(name):
    arguments = gaussian_node(std=torch.zeros(N, D, dtype=F64))
    with torch.no_grad():
        sample, _ = make(name)(**arguments)
    assert torch.equal(sample, arguments["mean"])
    with torch.no_grad(), pytest.raises(ValueError, match="got a negative entry"):
        make(name)(**{**arguments, "std": arguments["std"] - 1})


CATEGORICAL = [name for name in NODEWISE if not name.startswith("tpg")]


@pytest.mark.parametrize("name", CATEGORICAL)
def test_gaussian_noise_for_a_categorical_is_refused(name):
    """400 entries, seeds 0 to 49: always refused where normal, never where Gumbel."""
    logits = torch.zeros(100, 4, dtype=F64)
    probe = ParameterProbe(lambda p, x: (p["b"] + x,), {"b": torch.zeros(4, dtype=F64)}, logits)
    for seed in range(50):
        torch.manual_seed(seed)
        gumbel = -torch.empty_like(logits).exponential_().log()
        make(name)(logits, None, gumbel, logits.new_zeros(100), probe=probe)
        noise = torch.randn_like(logits)
        with pytest.raises(ValueError, match=r"categorical node needs Gumbel noise.*exponential_"):
            make(name)(logits, None, noise, logits.new_zeros(100), probe=probe)


def test_chosen_noise_of_a_categorical_is_no_misuse():
    logits = torch.zeros(400, 4)
    forced = nn.functional.one_hot(torch.arange(400) % 4, 4) * 1e3
    sample, _ = make("lr")(logits, None, forced, torch.zeros(400))
    assert torch.equal(sample.argmax(-1), torch.arange(400) % 4)
    make("lr")(logits, None, torch.zeros(400, 4), torch.zeros(400))


@pytest.mark.parametrize("name", [name for name in NODEWISE if name != "rp-cut"])
def test_a_leg_that_cannot_work_on_the_node_is_refused_before_the_backward(name):
    if not make(name).needs_score:
        return
    shape = (N, 2, D)
    probe = ParameterProbe(lambda p, x: (p["b"] + x,), B, torch.zeros(N, D, dtype=F64))
    ones = torch.ones(shape, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match=r"'\w+' needs a Gaussian node of shape \[N, D\]"):
        make(name, legs="biw")(ones, ones, ones, ones[..., 0].detach() * 0, probe=probe)
    logits = torch.ones(N, D, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match=r"of shape \[N, D\], got a categorical one"):
        make(name, legs="biw")(logits, None, logits, logits[:, 0].detach() * 0, probe=probe)


@pytest.mark.parametrize("leg", ["score", "biw"])
@pytest.mark.parametrize("name", [name for name in NODEWISE if name != "rp-cut"])
def test_cross_fit_needs_halves_of_two(name, leg):
    """With one sample a half has no variance, k is 0, and an exploded RP would pass."""
    if not make(name).needs_score:
        return
    estimator = make(name, cross_fit=True, legs=leg)
    for n in (2, 3):
        few = {k: v[:n] for k, v in gaussian_node().items() if isinstance(v, torch.Tensor)}
        with pytest.raises(ValueError, match=f"cross_fit .* needs N >= 4, got {n}"):
            estimator(**few)


@pytest.mark.parametrize("n", [4, 5, 7])
@pytest.mark.parametrize("leg", ["score", "biw"])
@pytest.mark.parametrize("name", [name for name in NODEWISE if name != "rp-cut"])
def test_small_halves_let_no_exploded_rp_through(name, leg, n):
    if not (make(name).needs_score and make(name).needs_pathwise):
        return
    node = gaussian_node(mean=randn(n, D, seed=1).requires_grad_(), noise=randn(n, D, seed=2))
    node |= {"std": torch.full((n, D), 0.5, dtype=F64), "credit": torch.zeros(n, dtype=F64)}
    node["probe"] = ParameterProbe(lambda p, x: (p["b"] + x, 0.5 + p["b"]), B, node["mean"])
    sample, credit = make(name, cross_fit=True, legs=leg)(**node)
    sample.register_hook(lambda g: g * 1e200)
    loss = assign_credit(sample.sin().sum(-1), credit).mean()
    (g,) = torch.autograd.grad(loss, node["mean"])
    assert g.abs().max() < 1e3


@pytest.mark.parametrize(
    ("cost", "credit"), [(1.0, torch.zeros(3)), (torch.ones(3), 0.0), (torch.ones(3), None)]
)
def test_credit_is_assigned_to_tensors(cost, credit):
    with pytest.raises(TypeError, match="cost and credit must be tensors, one number per sample"):
        assign_credit(cost, credit)


def test_a_mean_cost_is_refused_rather_than_multiplied():
    with pytest.raises(ValueError, match=r"cost of shape \[\] cannot take a credit of shape \[6\]"):
        assign_credit(torch.tensor(1.0), torch.zeros(6))
    with pytest.raises(ValueError, match=r"cost of shape \[5\] cannot take"):
        assign_credit(torch.ones(5), torch.zeros(6))


# Uncredited costs.


def backward(estimator, *, credited):
    node = gaussian_node()
    sample, credit = estimator(**node)
    cost = sample.sin().sum(-1)
    if credited:
        cost = assign_credit(cost, credit)
    return torch.autograd.grad(cost.mean(), node["mean"])[0]


@pytest.mark.parametrize("name", NODEWISE)
def test_a_node_whose_credit_is_not_used_warns(name):
    estimator = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(estimator, credited=True)
    if not estimator.needs_score:
        return
    with pytest.warns(UserWarning, match="score leg is 0: credit every cost") as caught:
        g = backward(estimator, credited=False)
    assert [str(w.message) for w in caught] == [UNCREDITED]
    if name == "lr":
        assert torch.equal(g, torch.zeros_like(g))


def test_the_warning_is_given_once():
    """One line of the source, so Python's default filter shows it once in a process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            backward(make("tpx"), credited=False)
    assert len(caught) == 1


def test_costs_of_a_model_that_cannot_be_differentiated_do_not_warn():
    node = gaussian_node()
    sample, credit = make("lr")(**node)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = assign_credit(sample.detach().sin().sum(-1), credit).mean()
        (g,) = torch.autograd.grad(loss, node["mean"])
    torch.testing.assert_close(g, backward(make("lr"), credited=True))


# Probes from modules.


def test_a_probe_takes_a_module():
    torch.manual_seed(0)

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 2 * D)

        def forward(self, x):
            mean, raw = self.head(self.body(x).tanh()).chunk(2, -1)
            return mean, raw.exp()

    policy, x = Policy().double(), randn(N, 4, seed=3)
    named = dict(policy.named_parameters())
    cotangent = randn(N, D, seed=4), randn(N, D, seed=5)
    expected = ParameterProbe(lambda p, s: functional_call(policy, p, (s,)), named, x)(cotangent)
    torch.testing.assert_close(ParameterProbe(policy, policy, x)(cotangent), expected)
    torch.testing.assert_close(ParameterProbe(policy, named, x)(cotangent), expected)
    head = {name: p for name, p in named.items() if name.startswith("head")}
    size = sum(p.numel() for p in head.values())
    torch.testing.assert_close(ParameterProbe(policy, head, x)(cotangent), expected[:, -size:])
    for i in range(N):  # and it is the gradient
        scalar = sum((c[i] * z).sum() for c, z in zip(cotangent, policy(x[i]), strict=True))
        g = torch.autograd.grad(scalar, list(policy.parameters()))
        torch.testing.assert_close(torch.cat([one.flatten() for one in g]), expected[i])
    with pytest.raises(TypeError, match=r"mapping of names to tensors.*named_parameters"):
        ParameterProbe(policy, policy.parameters(), x)


# Half precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NODEWISE)
def test_a_large_offset_of_the_cost_leaves_a_half_precision_gradient_alone(name, dtype):
    """A chain of two nodes, N = 400, offset 1000: within 4 % of float64 with no offset.

    In half precision the returns themselves would keep 3 digits at most.
    """
    mean = 0.5 * randn(400, D, seed=6)
    noise = randn(2, 400, D, seed=7)

    def gradient(dtype, offset):
        leaf = mean.to(dtype).requires_grad_()
        std = torch.full_like(leaf, 0.5).detach()
        credit = leaf.new_zeros(400)
        b = {"b": torch.zeros(D, dtype=dtype)}
        x = leaf
        for t in range(2):
            probe = ParameterProbe(lambda p, x: (p["b"] + x, 0.5 + p["b"]), b, x)
            x, credit = make(name)(x, std, noise[t].to(dtype), credit, probe=probe)
        at_least = torch.promote_types(dtype, torch.float32)
        assert credit.dtype == at_least
        cost = x.to(at_least).sin().sum(-1) + offset
        return torch.autograd.grad(assign_credit(cost, credit).mean(), leaf)[0]

    expected, found = gradient(F64, 0.0), gradient(dtype, 1000.0)
    assert found.dtype == dtype
    error = (found.double().sum(0) - expected.sum(0)).norm() / expected.sum(0).norm()
    assert error < 0.04


# torch.func.


def loss_of(name, theta, noise, probe=True):
    """A chain of two nodes whose mean is theta + x, written with theta as an argument."""
    x, credit = noise.new_zeros(noise.shape[1:]), noise.new_zeros(noise.shape[1])
    for noise_t in noise:
        extra = {}
        if make(name).probe != "none":
            extra["probe"] = ParameterProbe(lambda p, x: (p["t"] + x, 0.3 + 0 * x), {"t": theta}, x)
        std = torch.full_like(x, 0.3)
        x, credit = make(name)((theta + x).expand_as(x), std, noise_t, credit, **extra)
    return assign_credit(x.sin().sum(-1), credit).mean()


@pytest.mark.parametrize("name", NODEWISE)
def test_torch_func_differentiates_a_node_as_autograd_does(name):
    theta = randn(D, seed=8)
    noise = randn(2, N, D, seed=9)
    leaf = theta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(name, leaf, noise), leaf)
    torch.testing.assert_close(grad(lambda t: loss_of(name, t, noise))(theta), expected)
    torch.testing.assert_close(jacrev(lambda t: loss_of(name, t, noise))(theta), expected)


@pytest.mark.parametrize("name", NODEWISE)
def test_vmap_over_rollouts_equals_a_loop(name):
    thetas, noises = randn(4, D, seed=10), randn(4, 2, N, D, seed=11)
    one = grad(lambda t, noise: loss_of(name, t, noise))
    expected = torch.stack([one(*pair) for pair in zip(thetas, noises, strict=True)])
    torch.testing.assert_close(vmap(one)(thetas, noises), expected)


@pytest.mark.parametrize("leg", ["lax", "mvd"])
@pytest.mark.parametrize("critic", [lambda x: x.sin().sum(-1), lambda x: x.new_ones(len(x))])
def test_legs_of_a_critic_work_under_torch_func(leg, critic):
    estimator, noise = make("tpx", legs=leg), randn(4, N, D, seed=16)
    std = torch.ones(N, D, dtype=F64)

    def loss(t, noise):
        x, credit = estimator(t.expand(N, D), std, noise, noise.new_zeros(N), critic=critic)
        return assign_credit(x.cos().sum(-1), credit).mean()

    leaves = randn(4, D, seed=17).requires_grad_()
    total = sum(loss(*pair) for pair in zip(leaves, noise, strict=True))
    (expected,) = torch.autograd.grad(total, leaves)
    torch.testing.assert_close(vmap(grad(loss))(leaves.detach(), noise), expected)


@pytest.mark.parametrize("name", NODEWISE)
def test_second_derivatives_by_torch_func_are_refused_except_for_rp(name):
    theta, noise = randn(D, seed=12), randn(2, N, D, seed=13)
    twice = grad(lambda t: grad(lambda t: loss_of(name, t, noise))(t).sum())
    if make(name).needs_score:
        with pytest.raises(RuntimeError, match="second derivatives pass through"):
            twice(theta)
    else:
        x = (2 * theta + 0.3 * noise.sum(0)).detach()
        torch.testing.assert_close(twice(theta), -4 * x.sin().mean(0))


def test_a_rule_of_ones_own_is_called_with_the_nodes_shapes():
    """Under vmap a rule sees one rollout at a time, as without."""
    seen = []

    def rule(rp, legs, probe):
        seen.append(rp[0].shape)
        return [torch.full_like(rp[0][:1], 0.5)]

    own = Estimator(rule)
    noise = randn(4, 2, N, D, seed=14)

    def loss(t, noise):
        x, credit = own((t + noise[0]), torch.ones_like(noise[0]), noise[1], noise.new_zeros(N))
        return assign_credit(x.sin().sum(-1), credit).mean()

    vmap(grad(loss))(randn(4, D, seed=15), noise)
    assert set(seen) == {torch.Size([N, D])}


def test_a_rule_that_weighs_each_sample_alone_cannot_be_cross_fitted():
    with pytest.raises(ValueError, match=r"k for each sample .* set cross_fit=False"):
        make("rp-cut", cross_fit=True)
