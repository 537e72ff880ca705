"""The node against plain backprop, score-function surrogates and explicit reverse loops."""

import pytest
import torch
from torch.func import jacrev, vmap

import estimators
from estimators import Estimator, ParameterProbe, assign_credit, infer_noise, weights
from estimators.baselines import leave_one_out, none

F64 = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def fixed(value):
    """A weight rule of constant k."""

    def weight(rp, legs, probe):
        return [torch.full_like(rp[0][:1], value)]

    return weight


# A recurrent world model: the state h of a GRU bypasses the node, as in Dreamer.


class RecurrentWorld:
    """h' = GRU([x, u], h), x' ~ N(m(h'), s(h')), u = tanh(policy [h, x]), reward r(h', x', u)."""

    n, horizon, x_size, h_size, a_size = 7, 5, 3, 4, 2

    def __init__(self):
        torch.manual_seed(0)
        self.gru = torch.nn.GRUCell(self.x_size + self.a_size, self.h_size, dtype=F64)
        self.zeta = torch.nn.Linear(self.h_size, 2 * self.x_size, dtype=F64)
        self.policy = torch.nn.Linear(self.h_size + self.x_size, self.a_size, dtype=F64)
        self.reward = torch.nn.Linear(self.h_size + self.x_size + self.a_size, 1, dtype=F64)
        modules = (self.gru, self.zeta, self.policy, self.reward)
        self.parameters = [p for module in modules for p in module.parameters()]
        self.start = randn(self.n, self.h_size, seed=1), randn(self.n, self.x_size, seed=2)
        self.noise = randn(self.horizon, self.n, self.x_size, seed=3)

    def step(self, h, x):
        action = torch.tanh(self.policy(torch.cat((h, x), -1)))
        h = self.gru(torch.cat((x, action), -1), h)
        mean, log_std = self.zeta(h).chunk(2, -1)
        return action, h, mean, (0.5 * log_std).exp()

    def cost(self, h, x, action):
        return torch.sin(2 * self.reward(torch.cat((h, x, action), -1)).squeeze(-1))

    def node_costs(self, estimator):
        """Credited costs [H, N]."""
        h, x = self.start
        credit, costs = x.new_zeros(self.n), []
        for noise in self.noise:
            action, h, mean, std = self.step(h, x)
            x, credit = estimator(mean, std, noise, credit)
            costs.append(assign_credit(self.cost(h, x, action), credit))
        return torch.stack(costs)

    def backprop_costs(self):
        h, x = self.start
        costs = []
        for noise in self.noise:
            action, h, mean, std = self.step(h, x)
            x = mean + std * noise
            costs.append(self.cost(h, x, action))
        return torch.stack(costs)

    def surrogate(self, loss, baseline):
        """Score-function surrogate of loss(costs [H, N]) -> [], linear in the costs."""
        h, x = self.start
        costs, log_probs = [], []
        for noise in self.noise:
            action, h, mean, std = self.step(h, x)
            x = (mean + std * noise).detach()
            log_probs.append(torch.distributions.Normal(mean, std).log_prob(x).sum(-1))
            costs.append(self.cost(h, x, action))
        costs = torch.stack(costs)
        leaf = costs.detach().requires_grad_()
        weight = torch.autograd.grad(loss(leaf), leaf)[0]
        returns = (weight * leaf).detach().flip(0).cumsum(0).flip(0)  # in the loss's scale
        advantage = torch.stack([r - baseline(r, None) for r in returns])
        return loss(costs) + (torch.stack(log_probs) * advantage).sum()


def mean_loss(costs):
    return costs.mean(1).sum()


def lambda_loss(costs):
    """-mean of DreamerV1's lambda-returns, gamma 0.9, lambda 0.8, the last cost as the value."""
    last, returns = costs[-1], []
    for t in range(len(costs) - 2, -1, -1):
        last = costs[t] + 0.9 * (0.2 * costs[t + 1] + 0.8 * last)
        returns.append(last)
    return -torch.stack(returns).mean()


@pytest.fixture(scope="module")
def world():
    return RecurrentWorld()


def assert_same_gradients(loss, expected, parameters):
    found = torch.autograd.grad(loss, parameters)
    wanted = torch.autograd.grad(expected, parameters)
    assert max(w.abs().max() for w in wanted) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", [mean_loss, lambda_loss])
def test_rp_equals_plain_backprop(world, loss):
    node, plain = world.node_costs(estimators.make("rp")), world.backprop_costs()
    torch.testing.assert_close(node, plain, rtol=1e-13, atol=1e-13)
    assert_same_gradients(loss(node), loss(plain), world.parameters)


@pytest.mark.parametrize("loss", [mean_loss, lambda_loss])
@pytest.mark.parametrize("baseline", [leave_one_out, none])
def test_lr_equals_score_function_with_bypass(world, loss, baseline):
    """The lambda weights (TPX 2023, Eq. 17) need no code: the credit carries them."""
    node = world.node_costs(estimators.make("lr", baseline=baseline))
    assert_same_gradients(loss(node), world.surrogate(loss, baseline), world.parameters)


def test_the_forward_value_is_the_same_for_every_estimator(world):
    plain = world.backprop_costs()
    for name in ("rp", "lr", "tpx", "tpx-ivw"):
        torch.testing.assert_close(world.node_costs(estimators.make(name)), plain)


def test_credit_gradient_is_the_return_to_go_in_the_scale_of_the_loss():
    seen = []

    def leg(zeta, noise, returns, value, baseline):
        seen.append(returns)
        return torch.zeros_like(noise), torch.zeros_like(noise)

    spy = Estimator(weights.likelihood_ratio, legs=(leg,))
    mean = torch.zeros(3, 1, dtype=F64, requires_grad=True)
    credit, loss = mean.new_zeros(3), mean.new_zeros(())
    costs = randn(4, 3, seed=5)
    for t in range(4):
        _, credit = spy(mean, torch.ones_like(mean), torch.zeros_like(mean), credit)
        loss = loss + 0.9**t * assign_credit(costs[t], credit).mean()
    loss.backward()
    discounted = costs * 0.9 ** torch.arange(4.0, dtype=F64).unsqueeze(1) / 3
    expected = discounted.flip(0).cumsum(0)  # the backward visits the last node first
    torch.testing.assert_close(torch.stack(seen), expected)


# A nonlinear chain in two dimensions with everything through its nodes: explicit reverse loops.


class NonlinearChain:
    n, horizon = 9, 6

    def __init__(self):
        self.parameters = {
            "weight": 0.7 * randn(1, 2, seed=10),
            "bias": 0.3 * randn(1, seed=11),
        }
        self.start = 0.5 * randn(self.n, 2, seed=12)
        self.noise = randn(self.horizon, self.n, 2, seed=13)

    @staticmethod
    def zeta(parameters, x):
        action = torch.tanh(parameters["weight"] @ x + parameters["bias"])
        mean = 1.3 * torch.sin(1.7 * x.flip(0)) + torch.cat((action, action * x[:1]))
        std = 0.2 + 0.3 * torch.sigmoid(x + action)
        return mean, std

    @staticmethod
    def cost(x):
        return 1 - torch.exp(-x.square().sum(-1)) + 0.3 * x[..., 0]

    def node_gradient(self, estimator):
        parameters = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
        x, credit = self.start, self.start.new_zeros(self.n)
        loss, meters = 0.0, []
        for noise in self.noise:
            probe = ParameterProbe(self.zeta, parameters, x)
            meters.append(torch.zeros(1, 2, dtype=F64, requires_grad=True))
            mean, std = vmap(self.zeta, (None, 0))(parameters, x)
            x, credit = estimator(mean, std, noise, credit, probe=probe, meter=meters[-1])
            loss = loss + assign_credit(self.cost(x), credit).mean()
        found = torch.autograd.grad(loss, [*parameters.values(), *meters])
        g, k = found[: len(parameters)], found[len(parameters) :]
        return torch.cat([one.flatten() for one in g]), torch.stack(k)

    def reverse_loop(self, choose_k):
        """PIPPS 2018, Alg. 2: adjoints a of zeta, [N, 4] = (mean, std), from the last step back."""
        states, zetas = [self.start], []
        for noise in self.noise:
            zetas.append(vmap(self.zeta, (None, 0))(self.parameters, states[-1]))
            states.append(zetas[-1][0] + zetas[-1][1] * noise)
        costs = torch.stack([self.cost(x) for x in states[1:]])

        def joined(parameters, x):
            return torch.cat(self.zeta(parameters, x))

        gradient, ks = torch.zeros(3, dtype=F64), []
        adjoint = torch.zeros(self.n, 4, dtype=F64)  # of the node after this one
        for t in range(self.horizon - 1, -1, -1):
            x, noise, std = states[t + 1], self.noise[t], zetas[t][1]
            zeta_by_x = vmap(jacrev(joined, 1), (None, 0))(self.parameters, x)
            cost_by_x = vmap(jacrev(self.cost))(x)
            signal = torch.einsum("nz,nzx->nx", adjoint, zeta_by_x) + cost_by_x
            rp = torch.cat((signal, signal * noise), 1)
            to_go = costs[t:].sum(0)
            others = torch.stack([to_go[torch.arange(self.n) != i].mean() for i in range(self.n)])
            score = torch.cat((noise / std, (noise**2 - 1) / std), 1)
            lr = (to_go - others).unsqueeze(1) * score
            by_parameters = vmap(jacrev(joined), (None, 0))(self.parameters, states[t])
            jacobian = torch.cat([j.flatten(2) for j in by_parameters.values()], 2)  # [N, 4, P]
            to_parameters = [torch.einsum("nz,nzp->np", g, jacobian) for g in (rp, lr)]
            k = choose_k(rp, lr, *to_parameters)
            adjoint = k * lr + (1 - k) * rp
            gradient += torch.einsum("nz,nzp->np", adjoint, jacobian).mean(0)
            ks.append(k.expand(4)[:2])
        return gradient, torch.stack(ks[::-1])


def variance(g):
    return (g - g.mean(0)).square().sum(0) / (len(g) - 1)


def k_pipps(rp, lr, rp_parameters, lr_parameters):
    """PIPPS 2018, Alg. 2; TPX 2023, Eq. 5."""
    v_rp, v_lr = variance(rp_parameters).sum(), variance(lr_parameters).sum()
    return v_rp / (v_rp + v_lr)


def k_tpx(rp, lr, *_):
    """TPX 2023, Eq. 8, from the mean's adjoints; footnote 4: the same for the std."""
    rp, lr = rp[:, :2], lr[:, :2]
    covariance = ((rp - rp.mean(0)) * (lr - lr.mean(0))).sum(0) / (len(rp) - 1)
    numerator = variance(rp) - covariance
    k = numerator / (variance(lr) + variance(rp) - 2 * covariance)
    return k.clamp(0, 1).repeat(2)


def k_tpx_scalar(rp, lr, *_):
    rp, lr = rp[:, :2], lr[:, :2]
    covariance = ((rp - rp.mean(0)) * (lr - lr.mean(0))).sum() / (len(rp) - 1)
    v_rp, v_lr = variance(rp).sum(), variance(lr).sum()
    return ((v_rp - covariance) / (v_lr + v_rp - 2 * covariance)).clamp(0, 1)


def k_tpx_ivw(rp, lr, *_):
    v_rp, v_lr = variance(rp[:, :2]), variance(lr[:, :2])
    return (v_rp / (v_rp + v_lr)).repeat(2)


def k_tpx_ivw_scalar(rp, lr, *_):
    v_rp, v_lr = variance(rp[:, :2]).sum(), variance(lr[:, :2]).sum()
    return v_rp / (v_rp + v_lr)


RULES = {
    "rp": lambda rp, *_: torch.zeros((), dtype=F64),
    "lr": lambda rp, *_: torch.ones((), dtype=F64),
    "tp": k_pipps,
    "tpx": k_tpx,
    "tpx-scalar": k_tpx_scalar,
    "tpx-ivw": k_tpx_ivw,
    "tpx-ivw-scalar": k_tpx_ivw_scalar,
}


@pytest.mark.parametrize("name", RULES)
def test_equals_reverse_loop(name):
    chain = NonlinearChain()
    expected, expected_k = chain.reverse_loop(RULES[name])
    found, k = chain.node_gradient(estimators.make(name))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(k[:, 0], expected_k, rtol=1e-9, atol=1e-12)
    if name.startswith("t"):
        assert (k > 0.02).any()
        assert (k < 0.98).any()


def test_the_rules_differ_on_the_chain():
    chain = NonlinearChain()
    ks = [chain.reverse_loop(rule)[1] for rule in RULES.values()]
    for i, one in enumerate(ks):
        assert all((one - other).abs().max() > 1e-3 for other in ks[:i])


# Contracts of the node.


def single_node(estimator, *, n=16, d=3, seed=20, loss_scale=1.0, dtype=F64, explode=None, **extra):
    """Gradient w.r.t. (mean, std), k, at one node; `explode` multiplies dL/dsample, [N, d]."""
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
    """Parameters enter every coordinate of every sample: mean = W f_i, std = exp(V f_i)."""
    features = randn(n, 4, seed=seed).to(dtype)
    parameters = {"w": torch.ones(d, 4, dtype=dtype), "v": torch.zeros(d, 4, dtype=dtype)}

    def zeta(p, f):
        return p["w"] @ f, (p["v"] @ f).exp()

    return ParameterProbe(zeta, parameters, features)


COMPOSITES = ("tp", "tps", "tpx", "tpx-scalar", "tpx-ivw", "tpx-ivw-scalar", "tpg")


def make_with_probe(name, n=16, d=3, dtype=F64, **changes):
    estimator = estimators.make(name, **changes)
    return estimator, {"probe": probe_of(n, d, dtype)} if estimator.probe != "none" else {}


def test_uncredited_term_is_shrunk_by_one_minus_k():
    """Documented behaviour of `assign_credit`: the credited cost mixes, the other keeps RP only."""
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


PER_COORDINATE = ("tpx", "tpx-ivw", "tpg")


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
        if name == "tpg":
            assert (k[0, 1:] < 1).any()
        else:
            torch.testing.assert_close(k[0, 1:], calm[0, 1:])


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize(("dtype", "factor"), [(F64, 1e200), (torch.float32, 1e25)])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_exploded_rp_with_a_large_mean_does_not_leak(name, dtype, factor, spread):
    """N = 512, RP = factor·(1 + spread·normal): k must be 1 to all digits, or RP swamps the LR."""
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
    """A cost that does not reach the sample (a step, a dead unit): RP is exactly 0, V_RP = 0."""
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
    assert ((k >= 0) & (k <= 1)).all()
    if not cross_fit:  # the mixture of the two legs with this k is the gradient
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
    """[N, R, D] with credit [N, R] equals R nodes [N, D]: statistics are over axis 0 only."""
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


# A categorical node.


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
    """N = 40000, seed 101, cost a table: mean of per-sample gradients <= 4 SE from Σ p_k c_k."""
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


# Errors.


def test_wrong_credit_shape_says_what_was_expected():
    mean, std = torch.zeros(4, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"credit.*\[4\].*\[4, 1\]"):
        estimators.make("rp")(mean, std, mean, torch.zeros(4, 1))


def test_tap_without_probe_is_refused():
    mean, std = torch.zeros(4, 3), torch.ones(4, 3)
    with pytest.raises(ValueError, match="probe"):
        estimators.make("rp")(mean, std, mean, torch.zeros(4), tap=torch.zeros(4, 2))


@pytest.mark.parametrize("name", ["tp", "tps", "tpg"])
def test_a_rule_without_its_probe_says_so_in_one_sentence(name):
    with pytest.raises(ValueError, match=r"needs probe=.*'tpx', which needs none") as caught:
        single_node(estimators.make(name))
    assert "\n" not in str(caught.value)
