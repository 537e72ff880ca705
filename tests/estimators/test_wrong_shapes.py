"""Parts and arguments of the wrong shape are refused, and memory and dtypes are in order."""

import gc
import math
import warnings
import weakref

import pytest
import torch

from totalprop import estimators
from totalprop.estimators import Estimator, ParameterProbe, Rollout, check, gradient, legs, make
from totalprop.estimators.analysis.diagnostics import median_interval
from totalprop.estimators.mixing import cut
from totalprop.estimators.node import PATHLESS

F64 = torch.float64
N, D = 20, 2


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def square_of(estimator, theta, *, n=N, cost=lambda x: x.square().sum(-1), **extra):
    """Mean cost of one node N(theta, 1) [n, D]."""
    mean = theta.expand(n, D)
    r = Rollout(estimator)
    x = r.sample(mean, torch.ones_like(mean), noise=randn(n, D, seed=3), **extra)
    return r.cost(cost(x)).mean()


@pytest.fixture
def theta():
    return torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)


@pytest.mark.parametrize("leg", ["lax", "mvd"])
@pytest.mark.parametrize("name", ["lr", "tpx"])
def test_a_critic_with_an_axis_more_is_refused(name, leg, theta):
    loss = square_of(make(name, legs=leg), theta, critic=lambda x: x.sum(-1, keepdim=True))
    with pytest.raises(ValueError, match=r"one number per sample, \[20\], got \[20, 1\].*squeeze"):
        loss.backward()


def test_a_baseline_with_an_axis_more_is_refused(theta):
    estimator = Estimator(make("lr").weight, baseline=lambda returns, value: returns.unsqueeze(-1))
    with pytest.raises(ValueError, match=r"baseline of shape \[20, 1\] cannot be subtracted"):
        square_of(estimator, theta).backward()


@pytest.mark.parametrize(
    ("k", "shown"),
    [
        (torch.full((N, 1, 1), 0.5), r"\['\[20, 1, 1\]'"),
        (torch.full((N, D, D), 0.5), r"\['\[20, 2, 2\]'"),
        (0.5, "'0.5'"),
    ],
)
def test_a_rule_that_returns_no_weight_of_the_node_is_refused(k, shown, theta):
    def half(rp, score, probe):
        return [k]

    with pytest.raises(ValueError, match=r"'half' must return a list with one k for each leg"):
        square_of(Estimator(half), theta).backward()


def test_a_rule_that_returns_a_tensor_is_refused(theta):
    def half(rp, score, probe):
        return torch.full_like(rp[0], 0.5)

    with pytest.raises(ValueError, match=r"'half' must return a list .* got \[20, 2\]"):
        square_of(Estimator(half), theta).backward()


def test_a_weight_of_another_dtype_is_cast():
    theta = torch.zeros(D, requires_grad=True)
    estimator = Estimator(lambda rp, score, probe: [torch.full((1, D), 0.5, dtype=F64)])
    mean = theta.expand(N, D)
    r = Rollout(estimator)
    r.cost(r.sample(mean, torch.ones_like(mean)).sum(-1)).mean().backward()
    assert theta.grad.dtype == torch.float32


def test_a_leg_that_is_not_like_zeta_is_refused(theta):
    def short(zeta, noise, returns, value, baseline):
        return (zeta[0][:, :1], zeta[1])

    with pytest.raises(ValueError, match=r"leg 'short' must return a cotangent like zeta"):
        square_of(make("lr", legs=short), theta).backward()


def test_a_tap_of_fewer_parameters_than_the_probe_is_refused(theta):
    probe = ParameterProbe(
        lambda p, x: (p["t"] + 0 * x, torch.ones_like(x)), {"t": theta}, randn(N, D)
    )
    tap = torch.zeros(N, 1, dtype=F64, requires_grad=True)
    loss = square_of(make("tpx"), theta, probe=probe, tap=tap)
    said = r"tap must be zeros \[20, 2\].* got \[20, 1\]: .* from samples= and tap_size="
    with pytest.raises(ValueError, match=said):
        loss.backward()


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_meter_that_no_k_fits_is_refused(shape, theta):
    meter = torch.zeros(shape, dtype=F64, requires_grad=True)
    said = r"meter must be zeros .* a k \[2\] fits, got .*: torch.zeros\(\[2\]"
    with pytest.raises(ValueError, match=said):
        square_of(make("tpx"), theta, meter=meter).backward()
    meter = torch.zeros([2], dtype=F64, requires_grad=True)
    square_of(make("tpx"), theta, meter=meter).backward()
    assert meter.grad is not None


def test_a_node_that_counts_its_samples_otherwise_is_told_to_be_flattened():
    r, mean = Rollout("tpx"), torch.zeros(4, 3, 2)
    r.sample(mean[:, 0], torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"\[4, 3\], got \[4\]; .* as in mean.flatten\(1\)"):
        r.sample(mean, torch.ones(4, 3, 2))
    r.sample(mean.flatten(1), torch.ones(4, 3, 2).flatten(1))
    r = Rollout("tpx")
    r.sample(mean, torch.ones(4, 3, 2))
    with pytest.raises(ValueError, match=r"\[4\], got \[4, 3\]; .* count their samples alike$"):
        r.sample(mean[:, 0], torch.ones(4, 2))


@pytest.mark.parametrize(
    ("options", "n", "message"),
    [
        ({"baseline": "critic"}, N, r"'critic' needs value=\[N, ...\]"),
        ({}, 1, "'leave_one_out' needs at least 2 samples on axis 0, got 1"),
        ({"legs": "lax"}, 3, "'lax_leg' needs at least 4 samples on axis 0, got 3"),
        ({"legs": "mvd"}, 3, "'mvd_leg' needs at least 4 samples"),
    ],
)
def test_what_a_part_needs_is_said_when_the_node_is_called(options, n, message, theta):
    estimator = make("tpx", **options)
    critic = {"critic": lambda x: x.sum(-1)} if estimator.needs_critic else {}
    with pytest.raises(ValueError, match=message):
        square_of(estimator, theta, n=n, **critic)


def test_each_half_of_cross_fit_needs_the_samples(theta):
    estimator = make("tpx", baseline="critic", cross_fit=True)
    with pytest.raises(ValueError, match=r"at least 3 samples on axis 0 in each half .*, got 2"):
        square_of(estimator, theta, n=5, value=torch.zeros(5, dtype=F64))


@pytest.mark.parametrize("leg", ["biw", "score"])
def test_one_sample_is_enough_without_a_baseline(leg, theta):
    estimator = make("lr", legs=leg, baseline="none")
    (g,) = torch.autograd.grad(square_of(estimator, theta, n=1), theta)
    assert torch.isfinite(g).all()


# `gradient`


def test_gradient_takes_names_and_generators_and_refuses_what_it_cannot_use(theta):
    def rollout(estimator, tap):
        mean, start = theta.expand(N, D), theta.new_zeros(N)
        x, credit = estimator(mean, torch.ones_like(mean), randn(N, D), start, tap=tap, probe=PROBE)
        return estimators.assign_credit(x.square().sum(-1), credit).mean()

    found = gradient(rollout, (p for p in [theta]), "tpx", samples=N)
    expected = gradient(rollout, [theta], make("tpx"), samples=N)
    assert torch.equal(found.gradients[0], expected.gradients[0])
    with pytest.raises(ValueError, match="parameters with requires_grad=True, got none"):
        gradient(rollout, [], "tpx", samples=N)
    with pytest.raises(ValueError, match=r"requires_grad=True, got \[\[2\]\]"):
        gradient(rollout, [theta.detach()], "tpx", samples=N)
    with pytest.raises(ValueError, match=r"tap must be zeros \[20, 2\]"):
        gradient(rollout, [theta], "ivw", samples=N + 1)


PROBE = ParameterProbe(
    lambda p, x: (p["t"] + 0 * x, torch.ones_like(x)), {"t": torch.zeros(D, dtype=F64)}, randn(N, D)
)
WHOLE = [name for name in estimators.names() if make(name).whole_graph]


@pytest.mark.parametrize("name", WHOLE)
def test_a_forgotten_tap_is_no_rp(name, theta):
    with pytest.raises(ValueError, match="no node of the loss recorded them: pass the tap"):
        gradient(lambda e, tap: square_of(e, theta, probe=PROBE), [theta], name, samples=N)


def test_a_loss_without_a_node_has_no_first_order_leg(theta):
    with pytest.raises(ValueError, match="depends on no stochastic node"):
        gradient(lambda e, tap: theta.square().sum(), [theta], "lr-first-order", samples=N)


@pytest.mark.parametrize("name", [name for name in estimators.names() if make(name).several_passes])
def test_no_graph_outlives_a_gradient_of_several_passes(name):
    """Autograd's half of a cycle is hidden from Python's garbage collector."""
    theta = torch.zeros(D, dtype=F64, requires_grad=True)
    alive = []

    def rollout(estimator, tap):
        mean = theta.expand(N, D) + 0.0
        probe = ParameterProbe(
            lambda p, x: (p["t"] + 0 * x, torch.ones_like(x)), {"t": theta}, mean
        )
        alive.append(weakref.ref(probe))  # which the node's part of the graph holds
        r = Rollout(estimator)
        x = r.sample(mean, torch.ones_like(mean), noise=randn(N, D), tap=tap, probe=probe)
        return r.cost(x.square().sum(-1)).mean()

    gradient(rollout, [theta], name, samples=N)
    gc.collect()
    assert len(alive) >= 2
    assert [ref for ref in alive if ref() is not None] == []


# Samples that a path does not reach


JUMP = {"cost": lambda x: (x > 0.5).to(x.dtype).sum(-1)}


@pytest.mark.parametrize("name", ["rp", "tpx", "tpx-scalar", "tpx-ivw", "tpx-unclipped", "ivw-h"])
def test_a_cost_without_a_path_warns_where_the_gradient_would_be_zero(name, theta):
    with pytest.warns(UserWarning, match="pathwise leg is 0"):
        (g,) = torch.autograd.grad(square_of(make(name), theta, **JUMP), theta)
    assert not g.any()


FLAT = {
    "round": lambda x: x.round().sum(-1),
    "floor": lambda x: x.floor().sum(-1),
    "sign": lambda x: x.sign().sum(-1),
    "a saturated clamp": lambda x: (1e9 * x).clamp(-1, 1).sum(-1),
    "where": lambda x: torch.where(x > 0, 1.0 + 0 * x, 0 * x).sum(-1),
}


@pytest.mark.parametrize("name", ["rp", "tpx"])
@pytest.mark.parametrize("cost", FLAT)
def test_a_derivative_of_0_warns_where_the_return_depends_on_the_sample(cost, name, theta):
    with pytest.warns(UserWarning, match="pathwise leg is 0") as caught:
        (g,) = torch.autograd.grad(square_of(make(name), theta, cost=FLAT[cost], n=200), theta)
    assert len(caught) == 1 and not g.any()


def test_a_sample_without_influence_does_not_warn(theta):
    """The cost is that of another, independent draw; 100 batches of 50."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            r = Rollout("rp")
            x = r.sample(theta.expand(50, 2), torch.ones(50, 2, dtype=F64))
            y = r.sample(0 * x, torch.ones_like(x))
            r.cost((y.square() + 0 * x).sum(-1)).mean().backward()


def test_the_round_off_of_a_constant_cost_does_not_warn(theta):
    cost = lambda x: (0.1 * (1 + 1e-15 * x.detach()) + 0 * x).sum(-1)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.autograd.grad(square_of(make("tpx"), theta, cost=cost, n=200), theta)


@pytest.mark.parametrize("name", ["lr", "tpx-guarded"])
def test_rules_that_do_not_trust_the_pathwise_leg_do_not_warn(name, theta):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", PATHLESS[:20])
        (g,) = torch.autograd.grad(square_of(make(name), theta, n=2000, **JUMP), theta)
    assert (g > 0).all()


# Numbers


def test_a_line_through_one_sample_alone_is_not_drawn():
    """relu critics: all others have the same value, and tell no slope, in any precision."""
    for dtype in (torch.float32, F64):
        x = torch.zeros(8, dtype=dtype)
        x[3] = 1e5
        slope, intercept = legs._left_out_line(x, torch.arange(8.0, dtype=dtype))
        assert slope[3] == 0
        assert intercept[3] == pytest.approx((28 - 3) / 7)
        # The others see one other sample beside zeros, through which the line passes.
        assert slope[0] == pytest.approx((3 - (28 - 3) / 6) / 1e5, rel=1e-4)


def test_a_left_out_line_beside_an_outlier_has_its_digits():
    """Against numpy in float64, on float32 data with one value a million times the others."""
    x, y = randn(30, seed=1), randn(30, seed=2)
    x[4] = 1e6
    slope, intercept = legs._left_out_line(x.float(), y.float())
    rest = [i for i in range(30) if i != 4]
    mean, centred = x[rest].mean(), x[rest] - x[rest].mean()
    expected = float(centred @ y[rest] / centred.square().sum())
    assert float(slope[4]) == pytest.approx(expected, rel=2e-2)
    assert float(intercept[4]) == pytest.approx(
        float(y[rest].mean()) - expected * float(mean), rel=2e-2
    )


@pytest.mark.parametrize("start", [1.0, 100.0, 1e3, 1e5])
def test_first_order_is_no_noisier_than_lr_with_an_outlying_start(start):
    """Cost tanh of x from 99 starts N(0, 1) and one far away; 200 gradients each."""
    theta, found = torch.zeros((), dtype=F64, requires_grad=True), {}
    for name in ("lr", "lr-first-order"):
        gradients = []
        for seed in range(200):
            x0, noise = randn(100, 1, seed=10_000 + seed), randn(100, 1, seed=seed)
            x0[7] = start

            def rollout(estimator, tap, x0=x0, noise=noise):
                mean = x0 + theta
                r = Rollout(estimator)
                return r.cost(
                    r.sample(mean, torch.ones_like(mean), noise=noise).tanh().squeeze(-1)
                ).mean()

            gradients.append(gradient(rollout, [theta], name, samples=100).gradients[0])
        found[name] = torch.stack(gradients).std()
    assert found["lr-first-order"] < 1.1 * found["lr"]


def test_mvd_is_finite_for_float32_noise_in_the_tail():
    theta = torch.zeros(1, requires_grad=True)
    noise = torch.linspace(-9, 9, 21).unsqueeze(-1)
    mean = theta.expand(21, 1)
    x, credit = make("lr", legs="mvd")(
        mean, torch.ones_like(mean), noise, mean.new_zeros(21), critic=lambda x: x.sum(-1)
    )
    estimators.assign_credit(x.squeeze(-1), credit).mean().backward()
    assert torch.isfinite(theta.grad).all()


def test_rp_cut_measures_lengths_among_the_samples_that_have_a_gradient():
    g = torch.zeros(9, 1, dtype=F64)
    g[[1, 4, 6]] = torch.tensor([[1.0], [2.0], [100.0]], dtype=F64)
    (k,) = cut((g, g), [(torch.zeros_like(g),) * 2], None)
    assert (g * (1 - k)).flatten()[[1, 4, 6]].tolist() == pytest.approx([1, 2, 8])
    (k,) = cut((0 * g, g), [(torch.zeros_like(g),) * 2], None)
    assert torch.isfinite(k).all()


@pytest.mark.parametrize("name", [n for n in estimators.names() if not make(n).several_passes])
def test_a_backward_inside_autocast_is_the_one_outside(name):
    found = []
    for inside in (False, True):
        theta = torch.tensor([0.3, -0.2], requires_grad=True)
        mean = theta.expand(N, D)
        probe = ParameterProbe(
            lambda p, x: (p["t"] + 0 * x, torch.ones_like(x)), {"t": theta}, torch.zeros(N, D)
        )
        r = Rollout(make(name))
        x = r.sample(mean, torch.ones_like(mean), noise=randn(N, D).float(), probe=probe)
        loss = r.cost(x.square().sum(-1)).mean()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss.backward()
        found.append(theta.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "function",
    [lambda p, x: p["l"] + x, lambda p, x: (p["l"] + x,), lambda p, x: (p["l"] + x, None)],
)
def test_a_probe_takes_logits_as_nodes_do(function):
    probe = ParameterProbe(function, {"l": torch.zeros(3)}, torch.zeros(4, 3))
    assert torch.equal(probe((torch.ones(4, 3),)), torch.ones(4, 3))


def test_categoricals_that_are_one_sample_can_start_a_rollout():
    logits = torch.zeros(N, 4, 3, dtype=F64, requires_grad=True)
    r = Rollout("lr")
    onehot = r.sample(logits, None, joint=True)
    cost = (onehot * torch.arange(3.0)).sum((-1, -2))
    r.cost(cost).mean().backward()
    assert logits.grad.any()


def test_the_median_of_many_values_has_an_interval():
    """2,000 normal values: ranks 957 to 1044 (1000.5 ± 1.96 √500), as for the normal limit."""
    found = median_interval(torch.arange(2000.0))
    assert (found.low, found.high) == (955, 1044)
    assert median_interval(torch.arange(6.0)).low == 0
    assert median_interval(torch.arange(5.0)).low == -math.inf


# `check`


def check_square(theta, estimators=(), **extra):
    def rollout(r):
        mean = theta.expand(200, 1)
        x = r.sample(mean, torch.ones_like(mean), **{k: v() for k, v in extra.items()})
        return r.cost(x.square().squeeze(-1)).mean()

    return check(rollout, estimators=estimators, repeats=5)


def test_a_meter_is_no_parameter():
    theta, meter = (torch.zeros(1, dtype=F64, requires_grad=True) for _ in range(2))
    report = check_square(theta, meter=lambda: meter)
    assert list(report.z) == ["parameter 0"]
    assert report.agree


def test_a_parameter_that_is_made_in_the_rollout_is_refused():
    def rollout(r):
        theta = torch.zeros(9, 1, dtype=F64, requires_grad=True)
        return r.cost(r.sample(theta, torch.ones_like(theta)).squeeze(-1)).mean()

    with pytest.raises(
        ValueError, match=r"parameter 0, of shape \[9, 1\], is not used by the next"
    ):
        check(rollout, repeats=3)


def test_estimators_of_one_rule_have_names_of_their_own():
    theta = torch.zeros(1, dtype=F64, requires_grad=True)
    chosen = ["tpx", make("tpx", legs="biw"), make("tpx", baseline="mean"), "tpx"]
    assert list(check_square(theta, chosen).variances) == ["rp", "lr", "tpx", "tpx 2", "tpx 3"]


@pytest.mark.parametrize("one", ["tpx", make("tpx")])
def test_one_estimator_needs_no_sequence(one):
    theta = torch.zeros(1, dtype=F64, requires_grad=True)
    assert list(check_square(theta, one).variances) == ["rp", "lr", "tpx"]


def test_noise_that_does_not_come_from_the_global_generator_is_refused():
    theta, generator = torch.zeros(1, dtype=F64, requires_grad=True), torch.Generator()

    def rollout(r):
        mean = theta + torch.randn(9, 1, dtype=F64, generator=generator)
        return r.cost(r.sample(mean, torch.ones_like(mean)).squeeze(-1)).mean()

    with pytest.raises(ValueError, match=r"same seed: draw all noise .*torch.initial_seed"):
        check(rollout, repeats=3)
