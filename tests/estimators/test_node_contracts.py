"""Contracts of the node: explosions, scale, credit, meter, tap, errors."""

import pytest
import torch
from torch.func import vmap

from totalprop import estimators
from totalprop.estimators import Estimator, ParameterProbe, assign_credit, infer_noise
from totalprop.estimators.baselines import critic, leave_one_out, none
from totalprop.estimators.declarations import declared
from totalprop.estimators.legs import biw, score

F64 = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def fixed(value):
    """A weight rule with constant k."""

    def weight(rp, legs, probe):
        return [torch.full_like(rp[0][:1], value)]

    return weight


def single_node(estimator, *, n=16, d=3, seed=20, loss_scale=1.0, dtype=F64, explode=None, **extra):
    """Gradient w.r.t. (mean, std) and k of one node; `explode` [N, d] multiplies dL/dsample."""
    mean = randn(n, d, seed=seed).to(dtype).requires_grad_()
    std = (0.5 + randn(n, d, seed=seed + 1).square()).to(dtype).requires_grad_()
    meter = torch.zeros(1, d, dtype=dtype, requires_grad=True)
    noise = randn(n, d, seed=seed + 2).to(dtype)
    sample, credit = estimator(mean, std, noise, mean.new_zeros(n), meter=meter, **extra)
    if explode is not None and sample.requires_grad:
        sample.register_hook(lambda g: g * explode.to(dtype))
    cost = torch.sin(4 * sample).sum(-1) + torch.tanh(sample.prod(-1))
    loss = loss_scale * assign_credit(cost, credit).mean()
    return torch.autograd.grad(loss, [mean, std, meter])


def probe_of(n, d, dtype=F64, seed=30):
    """All parameters affect every sample: mean = W f_i, std = exp(V f_i)."""
    features = randn(n, 4, seed=seed).to(dtype)
    parameters = {"w": torch.ones(d, 4, dtype=dtype), "v": torch.zeros(d, 4, dtype=dtype)}

    def zeta(p, f):
        return p["w"] @ f, (p["v"] @ f).exp()

    return ParameterProbe(zeta, parameters, features)


COMPOSITES = (
    "tp", "tps", "tpx", "tpx-unclipped", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar", "tpg",
    "tp-guarded", "tpx-guarded", "tpg-guarded",
)  # fmt: skip
JOINT = ("tpg", "tpg-guarded")  # one k per variable, all chosen together
SEVERAL_LEGS = [
    name for name in COMPOSITES if declared(estimators.make(name).weight, "several_legs")
]


def make_with_probe(name, n=16, d=3, dtype=F64, **changes):
    estimator = estimators.make(name, **changes)
    return estimator, {"probe": probe_of(n, d, dtype)} if estimator.probe != "none" else {}


def test_uncredited_term_is_shrunk_by_one_minus_k():
    """As `assign_credit` documents: a credited cost gets the mixture, an uncredited one only RP."""
    mean = randn(5, 2, seed=40).requires_grad_()
    std, noise = torch.full_like(mean, 0.7), randn(5, 2, seed=41)

    def gradient(k, credited, uncredited):
        estimator = Estimator(fixed(k), baseline=none)
        sample, credit = estimator(mean, std, noise, mean.new_zeros(5))
        cost = assign_credit(sample.square().sum(-1), credit).mean()
        loss = credited * cost + uncredited * sample.sin().sum(-1).mean()
        return torch.autograd.grad(loss, mean)[0]

    cosine = torch.cos(mean + std * noise).detach() / 5
    torch.testing.assert_close(gradient(0.0, 0.0, 1.0), cosine)
    torch.testing.assert_close(gradient(0.3, 0.0, 1.0), 0.7 * cosine)
    both = gradient(0.3, 1.0, 1.0)
    torch.testing.assert_close(both, gradient(0.3, 1.0, 0.0) + 0.7 * cosine)
    torch.testing.assert_close(gradient(1.0, 0.0, 1.0), torch.zeros_like(mean))


def test_a_fixed_k_mixes_the_legs_linearly():
    rp, lr = (single_node(estimators.make(name))[:2] for name in ("rp", "lr"))
    mixed = single_node(Estimator(fixed(0.25)))
    for one, g_rp, g_lr in zip(mixed[:2], rp, lr, strict=True):
        torch.testing.assert_close(one, 0.25 * g_lr + 0.75 * g_rp)
    torch.testing.assert_close(mixed[2], torch.full((1, 3), 0.25, dtype=F64))


@pytest.mark.parametrize("factor", [1e200, torch.inf, torch.nan])
@pytest.mark.parametrize("name", SEVERAL_LEGS)
def test_several_legs_share_what_an_exploded_rp_leaves(name, factor):
    """Where RP explodes, only the mixture of score and batch importance weighting is left."""
    n, d, both = 16, 3, (score, biw)
    explode = torch.ones(n, d, dtype=F64)
    if torch.isfinite(torch.tensor(factor)):
        explode[:] = factor
    else:
        explode[3] = factor
    estimator, probe = make_with_probe(name, legs=both)
    g_mean, g_std, k = single_node(estimator, explode=explode, **probe)
    assert torch.equal(k, torch.ones_like(k))
    first, second = (single_node(estimators.make("lr", legs=(leg,)))[0] for leg in both)
    share = ((g_mean - second) / (first - second)).median(0).values
    torch.testing.assert_close(g_mean, second + share * (first - second))
    assert torch.isfinite(share).all() and torch.isfinite(g_std).all()
    assert ((share >= 0) & (share <= 1)).all() or name == "tpx-unclipped"
    if name == "tpx-ivw":
        expected = second.var(0) / (first.var(0) + second.var(0))
        torch.testing.assert_close(share, expected)


PER_COORDINATE = ("tpx", "tpx-unclipped", "tpx-ivw", "tpx-guarded", *JOINT)


@pytest.mark.parametrize("factor", [1e200, torch.inf, torch.nan])
@pytest.mark.parametrize("name", COMPOSITES)
def test_a_half_whose_rp_explodes_does_without_it_under_cross_fit(name, factor):
    """One sample of the first half explodes, which the second half's k would let through."""
    n, d = 16, 3
    explode = torch.ones(n, d, dtype=F64)
    explode[3] = factor
    estimator, probe = make_with_probe(name, cross_fit=True)
    g_mean, g_std, _ = single_node(estimator, explode=explode, **probe)
    expected, *_ = single_node(estimators.make("lr", cross_fit=True))
    torch.testing.assert_close(g_mean[: n // 2], expected[: n // 2])
    assert torch.isfinite(g_mean).all() and torch.isfinite(g_std).all()


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(F64, 1e200), (torch.float32, 1e25), (F64, torch.inf), (F64, torch.nan)],
)
@pytest.mark.parametrize("name", COMPOSITES)
def test_k_is_one_and_the_gradient_is_lr_where_rp_explodes(name, dtype, factor):
    """RP of coordinate 0 explodes for all samples, or is not finite for one of them."""
    n, d = 16, 3
    explode = torch.ones(n, d, dtype=F64)
    if torch.isfinite(torch.tensor(factor)):
        explode[:, 0] = factor
    else:
        explode[3, 0] = factor
    estimator, probe = make_with_probe(name, dtype=dtype)
    *g, k = single_node(estimator, dtype=dtype, explode=explode, **probe)
    *g_lr, _ = single_node(estimators.make("lr"), dtype=dtype)
    assert torch.isfinite(k).all()
    assert k[0, 0] == 1
    for one, lr in zip(g, g_lr, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one[:, 0], lr[:, 0], rtol=1e-6, atol=0)
    if name in PER_COORDINATE:
        *_, calm = single_node(estimator, dtype=dtype, **probe)
        assert ((calm > 0) & (calm < 1)).any(), "the calm problem must need a composite"
        if name in JOINT:
            assert (k[0, 1:] < 1).any()
        else:
            torch.testing.assert_close(k[0, 1:], calm[0, 1:])


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize(("dtype", "factor"), [(F64, 1e200), (torch.float32, 1e25)])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_exploded_rp_with_a_large_mean_does_not_leak(name, dtype, factor, spread):
    """N = 512, RP = factor·(1 + spread·normal): k must be exactly 1, or RP dominates LR."""
    n, d = 512, 2
    mean = randn(n, d, seed=50).to(dtype).requires_grad_()
    std = torch.ones_like(mean).detach().requires_grad_()
    estimator, probe = make_with_probe(name, n=n, d=d, dtype=dtype)
    signal = (factor * (1 + spread * randn(n, d, seed=51))).to(dtype)

    def gradient(estimator, **extra):
        noise = randn(n, d, seed=52).to(dtype)
        sample, credit = estimator(mean, std, noise, mean.new_zeros(n), **extra)
        if sample.requires_grad:
            sample.register_hook(lambda g: signal)
        loss = assign_credit(sample.square().sum(-1), credit).mean()
        return torch.autograd.grad(loss, [mean, std])

    found, lr = gradient(estimator, **probe), gradient(estimators.make("lr"))
    torch.testing.assert_close(found, lr, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
@pytest.mark.parametrize("name", COMPOSITES)
def test_k_is_independent_of_the_loss_scale(name, scale):
    estimator, probe = make_with_probe(name)
    *g, k = single_node(estimator, **probe)
    *scaled, k_scaled = single_node(estimator, loss_scale=scale, **probe)
    assert ((k > 0) & (k < 1)).any()
    torch.testing.assert_close(k_scaled, k, rtol=1e-9, atol=1e-12)
    for one, other in zip(g, scaled, strict=True):
        torch.testing.assert_close(other / scale, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_k_is_independent_of_the_loss_scale_where_rp_is_zero(name, scale):
    """The cost has zero derivative in the sample (a step, a dead unit): RP is 0, and so is V_RP."""
    n, d = 16, 3
    estimator, probe = make_with_probe(name)
    _, _, k = single_node(
        estimator, loss_scale=scale, explode=torch.zeros(n, d, dtype=F64), **probe
    )
    torch.testing.assert_close(k, torch.zeros_like(k))


@pytest.mark.parametrize("name", ["rp", "lr", *COMPOSITES])
@pytest.mark.parametrize("cross_fit", [False, True])
def test_meter_gives_k_and_leaves_the_gradient_alone(name, cross_fit):
    estimator, probe = make_with_probe(name, cross_fit=cross_fit)
    *metered, k = single_node(estimator, **probe)

    class Unmetered:
        def __call__(self, *arguments, meter, **extra):
            sample, credit = estimator(*arguments, **extra)
            return sample, credit + 0.0 * meter.sum()

    *plain, _ = single_node(Unmetered(), **probe)
    assert all(torch.equal(a, b) for a, b in zip(metered, plain, strict=True))
    if name != "tpx-unclipped":
        assert ((k >= 0) & (k <= 1)).all()
    if not cross_fit:  # the gradient is the mixture of the two legs with this k
        rp, lr = (single_node(estimators.make(one))[:2] for one in ("rp", "lr"))
        for g, g_rp, g_lr in zip(metered, rp, lr, strict=True):
            torch.testing.assert_close(g, k * g_lr + (1 - k) * g_rp)


@pytest.mark.parametrize("name", ["rp", "lr", *COMPOSITES])
def test_nothing_is_drawn_or_recorded_in_the_backward(name):
    estimator, probe = make_with_probe(name)
    mean, std = randn(16, 3, seed=60).requires_grad_(), torch.full((16, 3), 0.5, dtype=F64)
    noise = randn(16, 3, seed=61)
    sample, credit = estimator(mean, std, noise, mean.new_zeros(16), **probe)
    loss = assign_credit(sample.sin().sum(-1), credit).mean()
    before = torch.get_rng_state()
    first = torch.autograd.grad(loss, mean, retain_graph=True)[0]
    second = torch.autograd.grad(loss, mean, retain_graph=True)[0]
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_tap_is_the_per_sample_gradient_for_rp():
    n = 6
    parameters = {"w": randn(3, 4, seed=70).requires_grad_()}
    features, noise = randn(n, 4, seed=71), randn(n, 3, seed=72)

    def zeta(p, f):
        mean = p["w"] @ f
        return mean, 0.3 + mean.square()

    def loss(estimator, rows, tap):
        mean, std = vmap(zeta, (None, 0))(parameters, features[rows])
        probe = ParameterProbe(zeta, parameters, features[rows])
        credit = mean.new_zeros(len(mean))
        sample, credit = estimator(mean, std, noise[rows], credit, probe=probe, tap=tap)
        return assign_credit(sample.sin().prod(-1), credit).sum() / n

    tap = torch.zeros(n, 12, dtype=F64, requires_grad=True)
    whole = loss(estimators.make("rp"), slice(0, n), tap)
    g, per_sample = torch.autograd.grad(whole, [parameters["w"], tap])
    torch.testing.assert_close(per_sample.sum(0), g.flatten())
    for i in range(n):
        one = loss(estimators.make("rp"), slice(i, i + 1), None)
        expected = torch.autograd.grad(one, parameters["w"])[0].flatten()
        torch.testing.assert_close(per_sample[i], expected)


def test_extra_axes_are_independent_problems():
    """A node [N, R, D] equals R nodes [N, D], since statistics are taken over axis 0 only."""
    n, r, d = 8, 3, 2
    mean = randn(n, r, d, seed=80).requires_grad_()
    std, noise = 0.2 + randn(n, r, d, seed=81).square(), randn(n, r, d, seed=82)

    def gradient(name, mean, std, noise):
        sample, credit = estimators.make(name)(mean, std, noise, mean.new_zeros(mean.shape[:-1]))
        loss = assign_credit(sample.sin().prod(-1), credit).mean(0).sum()
        return torch.autograd.grad(loss, mean)[0]

    for name in ("rp", "lr", "tpx", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar"):
        whole = gradient(name, mean, std, noise)
        for j in range(r):
            one = gradient(name, mean[:, j], std[:, j], noise[:, j])
            torch.testing.assert_close(one, gradient(name, mean, std, noise)[:, j])
            assert whole[:, j].abs().max() > 1e-4


def test_infer_noise_returns_the_data_and_differentiates_as_usual():
    mean = randn(5, 2, seed=90).requires_grad_()
    std = (0.1 + randn(5, 2, seed=91).square()).requires_grad_()
    data = randn(5, 2, seed=92)
    noise = infer_noise(mean, std, data)
    assert not noise.requires_grad
    sample, credit = estimators.make("lr")(mean, std, noise, mean.new_zeros(5))
    torch.testing.assert_close(sample, data)
    returns = randn(5, seed=93)
    g = torch.autograd.grad(assign_credit(returns, credit).mean(), [mean, std])
    advantage = (returns - leave_one_out(returns, None)) / 5
    log_prob = torch.distributions.Normal(mean, std).log_prob(data).sum(-1)
    expected = torch.autograd.grad((advantage * log_prob).sum(), [mean, std])
    torch.testing.assert_close(g, expected)


def test_assign_credit_changes_no_value():
    cost = randn(4, 3, seed=94)
    assert torch.equal(assign_credit(cost, torch.zeros(3, dtype=F64)), cost)


def test_without_gradient_the_node_is_a_sampler():
    mean, noise = randn(4, 2, seed=95), randn(4, 2, seed=96)
    std = torch.full_like(mean, 0.5)
    with torch.no_grad():
        sample, credit = estimators.make("tpx")(mean, std, noise, mean.new_zeros(4))
    assert not sample.requires_grad
    torch.testing.assert_close(sample, mean + std * noise)
    assert torch.equal(credit, mean.new_zeros(4))


# Errors.


def test_wrong_credit_shape_says_what_was_expected():
    mean, std = torch.zeros(4, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"credit.*\[4\].*\[4, 1\]"):
        estimators.make("rp")(mean, std, mean, torch.zeros(4, 1))


def test_tap_without_probe_is_refused():
    mean, std = torch.zeros(4, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="probe"):
        estimators.make("rp")(mean, std, mean, torch.zeros(4), tap=torch.zeros(4, 2))


@pytest.mark.parametrize("name", ["tp", "tps", "tpg", "tp-guarded", "tpg-guarded"])
def test_a_rule_without_its_probe_is_refused_where_the_node_is_called(name):
    mean = torch.zeros(4, 3, requires_grad=True)
    estimator = estimators.make(name)
    with pytest.raises(ValueError, match=r"needs probe=.*'tpx', which needs none") as caught:
        estimators.Rollout(name).sample(mean, torch.ones(4, 3))
    assert "\n" not in str(caught.value)
    assert f"probe='{estimator.probe}'" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"value": (16, 1)}, r"value must have the credit's shape, \[16\], got \[16, 1\]"),
        ({"std": (3,)}, r"std must have the node's shape, \[16, 3\], got \[3\]"),
        ({"noise": (16, 1)}, r"noise must have the node's shape, \[16, 3\], got \[16, 1\]"),
        ({"credit": (16, 1)}, r"credit must have .* \[16\], got \[16, 1\]"),
    ],
)
def test_shapes_that_would_broadcast_to_another_gradient_are_refused(wrong, message):
    shapes = {"mean": (16, 3), "std": (16, 3), "noise": (16, 3), "credit": (16,), "value": (16,)}
    tensors = {name: torch.ones(wrong.get(name, shape)) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        estimators.make("tpx", baseline=critic)(**tensors)


def test_a_cost_with_an_axis_of_its_own_is_refused():
    """A cost [N, 1] would broadcast to [N, N]: the same loss, but no score gradient."""
    with pytest.raises(ValueError, match=r"cost of shape \[16, 1\] .* credit of shape \[16\]"):
        assign_credit(torch.ones(16, 1), torch.zeros(16))
    assert assign_credit(torch.ones(5, 16), torch.zeros(16)).shape == (5, 16)


@pytest.mark.parametrize("name", ["lr", "tpx"])
def test_second_derivatives_are_refused_where_they_would_be_wrong(name):
    """Differentiating a score leg does not estimate a second derivative; lr would give 0 here."""

    def gradient(name):
        mean = torch.tensor(0.5, dtype=F64, requires_grad=True)
        x, credit = estimators.make(name)(
            mean.expand(50, 2), torch.full((50, 2), 0.3, dtype=F64), randn(50, 2, seed=1),
            torch.zeros(50, dtype=F64),
        )  # fmt: skip
        loss = assign_credit(x.pow(4).sum(-1), credit).mean()
        return x, mean, torch.autograd.grad(loss, mean, create_graph=True)[0]

    _, mean, g = gradient(name)
    with pytest.raises(RuntimeError, match="second derivatives pass through"):
        torch.autograd.grad(g, mean)
    x, mean, g = gradient("rp")
    expected = 12 * x.square().sum(-1).mean()
    torch.testing.assert_close(torch.autograd.grad(g, mean)[0], expected.detach())


def test_a_number_for_std_and_another_dtype_for_credit_are_named():
    mean, noise = torch.zeros(5, 2), torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"std must have the node's shape, \[5, 2\], got 0.1"):
        estimators.make("tpx")(mean, 0.1, noise, torch.zeros(5))
    with pytest.raises(ValueError, match=r"dtype, torch.float32, got torch.float64"):
        estimators.make("tpx")(mean, torch.ones(5, 2), noise, torch.zeros(5, dtype=F64))
