"""The categorical node: sampling, its two legs, and their mixture."""

import pytest
import torch

from totalprop import estimators
from totalprop.estimators import assign_credit
from totalprop.estimators.baselines import leave_one_out, none
from totalprop.estimators.mixing import tpg
from totalprop.estimators.probes import gram, gram_of_variables, restrict

F64 = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def test_categorical_sample_is_one_hot_with_softmax_frequencies():
    """N = 40000, seed 100: frequencies within 4 SE of softmax(logits)."""
    n, logits = 40_000, torch.tensor([0.0, 1.0, -0.5], dtype=F64)
    uniform = torch.rand(n, 3, dtype=F64, generator=generator(100))
    gumbel = -torch.log(-torch.log(uniform))
    sample, _ = estimators.make("lr")(logits.expand(n, 3), None, gumbel, logits.new_zeros(n))
    assert torch.equal(sample.sum(-1), torch.ones(n, dtype=F64))
    assert set(sample.unique().tolist()) == {0.0, 1.0}
    p = logits.softmax(0)
    assert ((sample.mean(0) - p) / (p * (1 - p) / n).sqrt()).abs().max() <= 4


@pytest.mark.parametrize("baseline", [leave_one_out, none])
def test_categorical_lr_matches_enumeration(baseline):
    """N = 40000, seed 101, tabular cost: within 4 SE of the gradient of Σ p_k c_k."""
    n, table = 40_000, torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=F64)
    logits = torch.tensor([0.2, -0.4, 0.1, 0.6], dtype=F64, requires_grad=True)
    exact = torch.autograd.grad(logits.softmax(0) @ table, logits)[0]
    batch = logits.detach().expand(n, 4).clone().requires_grad_()
    gumbel = -torch.log(-torch.log(torch.rand(n, 4, dtype=F64, generator=generator(101))))
    sample, credit = estimators.make("lr", baseline=baseline)(
        batch, None, gumbel, logits.new_zeros(n)
    )
    g = torch.autograd.grad(assign_credit(sample @ table, credit).sum(), batch)[0]
    standard_error = g.std(0) / n**0.5
    assert standard_error.max() < 0.1 * exact.abs().max()
    assert ((g.mean(0) - exact) / standard_error).abs().max() <= 4


def categorical(name, explode=1.0):
    logits = randn(30, 4, seed=102).requires_grad_()
    gumbel = -torch.log(-torch.log(torch.rand(30, 4, dtype=F64, generator=generator(103))))
    weight = randn(4, 4, seed=104)
    meter = torch.zeros(1, 4, dtype=F64, requires_grad=True)
    sample, credit = estimators.make(name)(logits, None, gumbel, logits.new_zeros(30), meter=meter)
    if sample.requires_grad:
        sample.register_hook(lambda g: g * explode)

    def cost(s):
        return torch.tanh(s @ weight).sum(-1)

    g, k = torch.autograd.grad(assign_credit(cost(sample), credit).mean(), [logits, meter])
    return g, k, logits, sample.detach(), cost


def test_categorical_rp_is_straight_through():
    g, k, logits, sample, cost = categorical("rp")
    p = logits.softmax(-1)
    straight_through = sample + p - p.detach()
    expected = torch.autograd.grad(cost(straight_through).mean(), logits)[0]
    torch.testing.assert_close(g, expected)
    assert torch.equal(k, torch.zeros_like(k))


def test_categorical_tpx_mixes_its_legs():
    (g_rp, *_), (g_lr, *_) = categorical("rp"), categorical("lr")
    g, k, *_ = categorical("tpx")
    torch.testing.assert_close(g, k * g_lr + (1 - k) * g_rp)
    assert ((k > 0) & (k < 1)).any()
    torch.testing.assert_close(categorical("tpx", explode=torch.nan)[0], g_lr)


# A node of G categorical variables that are one sample, [N, G, C] with a credit [N].

G, C = 2, 3
COMPOSITES = [
    name for name in estimators.names()
    if estimators.make(name).needs_score and estimators.make(name).needs_pathwise
    and not estimators.make(name).several_passes and name != "rp-cut"
]  # fmt: skip


def joint_cost(x, curvature=1.0):
    """A cost of x [N, G, C] that is not linear in the one-hot vectors, [N]."""
    weight = randn(G * C, 4, seed=110)
    return torch.tanh(curvature * x.flatten(1) @ weight).sum(-1)


def enumerated():
    """All Cᴳ outcomes [Cᴳ, G, C]."""
    index = torch.cartesian_prod(*[torch.arange(C)] * G)
    return torch.nn.functional.one_hot(index, C).double()


def exact_means(logits, cost=joint_cost):
    """By enumeration: the gradient of E[cost], and the mean of the straight-through leg."""
    logits = logits.clone().requires_grad_()
    x = enumerated()
    p = (x * logits.softmax(-1)).sum(-1).prod(-1)
    exact = torch.autograd.grad(p @ cost(x), logits)[0]
    leaf = x.clone().requires_grad_()
    g = torch.autograd.grad(cost(leaf).sum(), leaf)[0]
    mean = (p.detach().view(-1, 1, 1) * g).sum(0)
    p = logits.detach().softmax(-1)
    return exact, p * (mean - (p * mean).sum(-1, keepdim=True))


def mean_by_enumeration(estimator, logits, cost=joint_cost):
    """The node's mean gradient, exactly: one sample per outcome, whose cost has its probability."""
    x = enumerated()
    p = (x * logits.softmax(-1)).sum(-1).prod(-1)
    batch = logits.expand(len(x), G, C).clone().requires_grad_()
    sample, credit = estimator(batch, None, 1e3 * x, p.new_zeros(len(x)))
    assert torch.equal(sample, x)
    loss = (p * assign_credit(cost(sample), credit)).sum()
    return torch.autograd.grad(loss, batch)[0].sum(0)


@pytest.mark.parametrize(
    ("curvature", "expected"), [(0.1, 0.01), (0.5, 0.18), (1.0, 0.61), (2.0, 1.67)]
)
def test_lr_of_a_joint_node_is_exact_and_straight_through_is_biased(curvature, expected):
    """The straight-through mean is off by `expected`, as a share of the gradient's norm.

    The more the cost curves between the one-hot vectors, the more.
    """

    def cost(x):
        return joint_cost(x, curvature)

    logits = 0.5 * randn(G, C, seed=111)
    exact, straight_through = exact_means(logits, cost)
    lr = mean_by_enumeration(estimators.make("lr", baseline="none"), logits, cost)
    torch.testing.assert_close(lr, exact)
    rp = mean_by_enumeration(estimators.make("rp"), logits, cost)
    torch.testing.assert_close(rp, straight_through)
    bias = float((rp - exact).norm() / exact.norm())
    assert bias == pytest.approx(expected, abs=0.005)


def test_straight_through_is_exact_for_a_cost_linear_in_each_variable():
    logits, table = randn(G, C, seed=111).requires_grad_(), randn(C, C, seed=112)

    def cost(x):
        return torch.einsum("na,ab,nb->n", x[:, 0], table, x[:, 1])

    x, p = enumerated(), logits.softmax(-1)
    exact = torch.autograd.grad(p[0] @ table @ p[1], logits)[0]
    batch = logits.detach().expand(len(x), G, C).clone().requires_grad_()
    sample, credit = estimators.make("rp")(batch, None, 1e3 * x, x.new_zeros(len(x)))
    weight = (x * p.detach()).sum(-1).prod(-1)
    g = torch.autograd.grad((weight * assign_credit(cost(sample), credit)).sum(), batch)[0].sum(0)
    torch.testing.assert_close(g, exact)


def joint_batch(n, seed):
    """Logits [n, G, C] = x W + b, with their parameters, a probe and Gumbel noise."""
    parameters = {"w": randn(4, G * C, seed=seed), "b": randn(G * C, seed=seed + 1)}
    inputs = randn(n, 4, seed=seed + 2)

    def function(p, x):
        return ((x @ p["w"] + p["b"]).unflatten(-1, (G, C)),)

    probe = estimators.ParameterProbe(function, parameters, inputs)
    uniform = torch.rand(n, G, C, dtype=F64, generator=generator(seed + 3))
    return function(parameters, inputs)[0], probe, -torch.log(-torch.log(uniform))


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_composite_with_its_k_fixed_mixes_the_means(name):
    """E = k · exact + (1 - k) · straight-through: it inherits the bias of the latter."""
    logits, probe, noise = joint_batch(40, seed=120)
    batch = logits.clone().requires_grad_()
    meter = torch.zeros(G, C, dtype=F64, requires_grad=True)
    sample, credit = estimators.make(name)(
        batch, None, noise, logits.new_zeros(40), probe=probe, meter=meter
    )
    k = torch.autograd.grad(assign_credit(joint_cost(sample), credit).mean(), meter)[0]
    assert (k > 0).any() and (k < 1).any()
    if name in ("tpg", "tpg-guarded", "tpx-scalar", "tpx-ivw-scalar"):  # one k per variable
        assert torch.equal(k, k[:, :1].expand(G, C)) and k[0, 0] != k[1, 0]
    elif name in ("tp", "tps", "tp-guarded"):
        assert torch.equal(k, k[:1, :1].expand(G, C))

    def fixed(rp, legs, probe):
        return [k.unsqueeze(0)]

    logits = 0.5 * randn(G, C, seed=111)
    exact, straight_through = exact_means(logits)
    found = mean_by_enumeration(estimators.Estimator(fixed, baseline=none), logits)
    torch.testing.assert_close(found, k * exact + (1 - k) * straight_through)


def test_lr_of_a_chain_of_joint_nodes_is_exact():
    """Two steps, the second's logits depend on the first's sample; N = 81 enumerated paths."""
    theta, transition = 0.5 * randn(G * C, seed=130), randn(G * C, G * C, seed=131)
    theta.requires_grad_()

    def logits_after(x):  # [N, G, C] -> [N, G, C]
        return (theta + x.flatten(1) @ transition).unflatten(-1, (G, C))

    x = enumerated()
    first, second = (pair.flatten(0, 1) for pair in (
        x.unsqueeze(1).expand(-1, len(x), -1, -1), x.unsqueeze(0).expand(len(x), -1, -1, -1)
    ))  # fmt: skip
    start = theta.unflatten(0, (G, C)).expand(len(first), G, C)

    def probability(logits, outcome):
        return (outcome * logits.softmax(-1)).sum(-1).prod(-1)

    costs = joint_cost(first) + 2 * joint_cost(second)
    p = probability(start, first) * probability(logits_after(first), second)
    exact = torch.autograd.grad(p @ costs, theta)[0]
    lr, credit = estimators.make("lr", baseline="none"), first.new_zeros(len(first))
    sample, credit = lr(start, None, 1e3 * first, credit)
    loss = (p.detach() * assign_credit(joint_cost(sample), credit)).sum()
    sample, credit = lr(logits_after(sample), None, 1e3 * second, credit)
    loss = loss + (p.detach() * assign_credit(2 * joint_cost(sample), credit)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, theta)[0], exact)


def legs_of(n, seed):
    logits, probe, noise = joint_batch(n, seed)
    leaf = logits.clone().requires_grad_()

    def leg(name):
        sample, credit = estimators.make(name)(leaf, None, noise, logits.new_zeros(n))
        loss = assign_credit(joint_cost(sample), credit).mean()
        return torch.autograd.grad(loss, leaf)[0]

    return leg("rp"), leg("lr"), probe


def explicit(probe, cotangent):
    """[N, P] gradients of the parameters by autograd, one sample at a time."""
    rows = []
    for x, c in zip(probe.inputs[0], cotangent, strict=True):
        leaves = {name: p.clone().requires_grad_() for name, p in probe.parameters.items()}
        inner = (probe.function(leaves, x)[0] * c).sum()
        g = torch.autograd.grad(inner, list(leaves.values()))
        rows.append(torch.cat([one.flatten() for one in g]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["tp", "tps"])
def test_tp_of_a_joint_node_is_its_definition(name):
    """k = V_RP / (V_RP + V_LR), V = Σ_p Var_i of the parameters' gradients."""
    rp, lr, probe = legs_of(30, seed=140)
    v_rp, v_lr = (explicit(probe, leg).var(0).sum() for leg in (rp, lr))
    (k,) = estimators.make(name).weight((rp,), [(lr,)], probe)
    torch.testing.assert_close(k, (v_rp / (v_rp + v_lr)).view(1, 1, 1))


@pytest.mark.parametrize("carried", [1.0, 0.0])
def test_tpg_of_a_joint_node_minimises_its_objective(carried):
    """One k per variable, by brute force: no k nearby has a smaller objective."""
    rp, lr, probe = legs_of(200, seed=150)
    (k,) = tpg((rp,), [(lr,)], probe, carried=carried)
    assert k.shape == (1, G, 1) and ((k > 0) & (k < 1)).all()

    def shares(leg):  # [G, N, P] the gradients of the parameters through each variable
        masks = torch.eye(G, dtype=F64).view(G, 1, G, 1)
        return torch.stack([explicit(probe, leg * mask) for mask in masks])

    shares_rp, shares_lr = shares(rp), shares(lr)
    own = shares_lr.var(1).sum(-1)  # [G] C_LR,dd
    v_rp, v_lr = (leg.var(0).sum(-1) for leg in (rp, lr))  # [G] in the node's own space

    def objective(k):
        weight = k.view(G, 1, 1)
        value = ((1 - weight) * shares_rp).sum(0).var(0).sum()
        value = value + (weight * shares_lr).sum(0).var(0).sum() + carried * (k**2 @ own)
        unit = 1e-2 * own.sum() / v_lr.sum()
        return value + unit * ((1 - k) ** 2 @ v_rp + k**2 @ v_lr)

    found = k.flatten()
    g = torch.autograd.functional.jacobian(objective, found)
    assert g.abs().max() < 1e-6 * objective(found) / found.min()
    for d in range(G):
        for step in (-0.01, 0.01):
            other = found.clone()
            other[d] += step
            assert objective(other) > objective(found)


def test_an_exploded_variable_gets_its_own_k():
    rp, lr, probe = legs_of(30, seed=160)
    for factor in (1e200, torch.nan):
        exploded = rp.clone()
        exploded[:, 1] *= factor
        (k,) = tpg((exploded,), [(lr,)], probe)
        assert k[0, 1] == 1 and k[0, 0] < 1


@pytest.mark.parametrize("controls", [1, 2])
def test_a_control_probe_of_a_joint_node_equals_the_general_one(controls):
    """Calls, Gram matrices of cotangents and of variables."""
    n, state = 6, randn(6, 3, seed=170)
    parameters = {"w": randn(controls, 3, seed=171)}
    mixing = randn(controls, G * C, seed=172)

    def zeta(u):
        return (torch.sin(u @ mixing) + (u @ mixing).square()).unflatten(-1, (G, C))

    general = estimators.ParameterProbe(lambda p, s: (zeta(p["w"] @ s),), parameters, state)
    u = state @ parameters["w"].T
    by_control = torch.stack([torch.autograd.functional.jacobian(zeta, one) for one in u])
    by_parameter = torch.stack(
        [torch.autograd.functional.jacobian(lambda w, s=s: w @ s, parameters["w"]).flatten(1)
         for s in state]
    )  # fmt: skip
    probe = estimators.ControlProbe([by_control], lambda: estimators.DenseJacobian(by_parameter))
    cotangents = randn(5, n, G, C, seed=173)
    torch.testing.assert_close(probe((cotangents[0],)), general((cotangents[0],)))
    torch.testing.assert_close(gram(probe, (cotangents,)), gram(general, (cotangents,)))
    legs = [(cotangents[0],), (cotangents[1],)]
    expected = gram_of_variables(general, legs)
    assert expected.covariance.shape == (2 * G, 2 * G)
    torch.testing.assert_close(gram_of_variables(probe, legs), expected)
    rows = slice(1, 4)
    part = [tuple(g[rows] for g in leg) for leg in legs]
    torch.testing.assert_close(
        gram_of_variables(restrict(probe, rows, n), part),
        gram_of_variables(restrict(general, rows, n), part),
    )


@pytest.mark.parametrize("name", estimators.names())
def test_cross_fit_and_critic_work_at_a_joint_node(name):
    if estimators.make(name).several_passes or name == "rp-cut":
        return
    logits, probe, noise = joint_batch(8, seed=180)
    leaf = logits.clone().requires_grad_()
    estimator = estimators.make(name, baseline="critic", cross_fit=True)
    sample, credit = estimator(
        leaf, None, noise, logits.new_zeros(8), probe=probe, value=randn(8, seed=181)
    )
    g = torch.autograd.grad(assign_credit(joint_cost(sample), credit).mean(), leaf)[0]
    assert g.shape == leaf.shape and g.isfinite().all() and g.any()


def test_a_joint_node_takes_what_fits_it_only():
    logits, _, noise = joint_batch(8, seed=190)
    lr = estimators.make("lr")
    with pytest.raises(ValueError, match=r"credit must have .* \[8, 2\], got \[2\]"):
        lr(logits, None, noise, logits.new_zeros(2))
    with pytest.raises(ValueError, match=r"value must have the credit's shape, \[8\], got \[8, 2"):
        lr(logits, None, noise, logits.new_zeros(8), value=logits[..., 0])
    leaf = logits.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"'biw' needs a Gaussian node .* got a categorical"):
        estimators.make("lr", legs="biw")(leaf, None, noise, logits.new_zeros(8))
    sample, _ = lr(leaf, None, noise, logits.new_zeros(8, requires_grad=True))
    loss = joint_cost(sample).mean()
    with pytest.warns(UserWarning, match="not on the credit"):  # a loss without a credited cost
        loss.backward()
    assert not leaf.grad.any()


@pytest.mark.parametrize("name", COMPOSITES)
def test_one_categorical_is_several_of_which_there_is_one(name):
    """Logits [N, C] and [N, 1, C] give the same k and the same gradient."""
    n, found = 30, []
    for lead in ((), (1,)):
        logits = randn(n, *lead, C, seed=180).requires_grad_()
        noise = -torch.empty(n, *lead, C, dtype=F64).exponential_(generator=generator(181)).log()
        meter = torch.zeros(*lead, C, dtype=F64, requires_grad=True)
        probe = estimators.ParameterProbe(
            lambda p, x: (p["b"] + x,), {"b": torch.zeros(*lead, C, dtype=F64)}, logits
        )
        sample, credit = estimators.make(name)(
            logits, None, noise, logits.new_zeros(n), probe=probe, meter=meter
        )
        cost = joint_cost(torch.cat((sample.reshape(n, 1, C), torch.ones(n, 1, C, dtype=F64)), 1))
        loss = assign_credit(cost, credit).mean()
        g, k = torch.autograd.grad(loss, (logits, meter))
        found.append((g.reshape(n, C), k.reshape(C)))
    torch.testing.assert_close(*found)
    assert (found[0][1] > 0).any()
