"""The node against plain backpropagation, score-function surrogates and explicit reverse loops."""

import pytest
import torch
from torch.func import jacrev, vmap

from totalprop import estimators
from totalprop.estimators import Estimator, ParameterProbe, assign_credit, make, mixing
from totalprop.estimators.baselines import leave_one_out, none

F64 = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


# A recurrent world model, in which the state h of a GRU bypasses the node, as in Dreamer.


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
        """Score-function surrogate of a loss(costs [H, N]) -> [] that is linear in the costs."""
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
        returns = (weight * leaf).detach().flip(0).cumsum(0).flip(0)  # in the scale of the loss
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
    """The credit carries the lambda weights (Parmas et al. 2023, Eq. 17) without further code."""
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

    spy = Estimator(mixing.likelihood_ratio, legs=(leg,))
    mean = torch.zeros(3, 1, dtype=F64, requires_grad=True)
    credit, loss = mean.new_zeros(3), mean.new_zeros(())
    costs = randn(4, 3, seed=5)
    for t in range(4):
        _, credit = spy(mean, torch.ones_like(mean), torch.zeros_like(mean), credit)
        loss = loss + 0.9**t * assign_credit(costs[t], credit).mean()
    loss.backward()
    discounted = costs * 0.9 ** torch.arange(4.0, dtype=F64).unsqueeze(1) / 3
    expected = discounted.flip(0).cumsum(0)  # the backward pass visits the last node first
    torch.testing.assert_close(torch.stack(seen), expected)


# A nonlinear chain in two dimensions without bypass, against explicit reverse loops.


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
        """Parmas et al. 2018, Alg. 2: adjoints of zeta, [N, 4] = (mean, std), in reverse order."""
        states, zetas = [self.start], []
        for noise in self.noise:
            zetas.append(vmap(self.zeta, (None, 0))(self.parameters, states[-1]))
            states.append(zetas[-1][0] + zetas[-1][1] * noise)
        costs = torch.stack([self.cost(x) for x in states[1:]])

        def joined(parameters, x):
            return torch.cat(self.zeta(parameters, x))

        gradient, ks = torch.zeros(3, dtype=F64), []
        adjoint = torch.zeros(self.n, 4, dtype=F64)  # from the next node
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
    """Parmas et al. 2018, Alg. 2; Parmas et al. 2023, Eq. 5."""
    v_rp, v_lr = variance(rp_parameters).sum(), variance(lr_parameters).sum()
    return v_rp / (v_rp + v_lr)


def k_tpx(rp, lr, *_):
    """Parmas et al. 2023, Eq. 8, from the mean's adjoints; footnote 4: the std uses the same k."""
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


# carry: what earlier nodes receive


def two_steps(estimator, *, split, seed=0, n=40):
    """x_1 ~ N(θ, s), x_2 ~ N(sin(x_1) θ, s): dL/dθ, and dL/dx_1 through the second node's mean."""
    theta = torch.tensor([0.7], dtype=F64, requires_grad=True)
    noise = torch.randn(2, n, 1, dtype=F64, generator=torch.Generator().manual_seed(seed))
    credit, x = noise.new_zeros(n), torch.zeros(n, 1, dtype=F64)
    states = []
    for z in noise:

        def zeta(p, x):
            mean = p["theta"] * (1 + x.sin())
            return mean, torch.full_like(mean, 0.5)

        (mean, std), carried = zeta({"theta": theta}, x), None
        if split:
            (mean, std), carried = estimators.own_and_carried(zeta, {"theta": theta}, x)
        x, credit = estimator(mean, std, z, credit, carried=carried)
        states.append(x)
    loss = estimators.assign_credit((x.squeeze(-1) ** 3).cos(), credit).mean()
    return torch.autograd.grad(loss, [theta, states[0]])


@pytest.mark.parametrize(
    "name",
    [n for n in estimators.names() if make(n).probe == "none" and not make(n).several_passes],
)
def test_splitting_a_node_changes_nothing_but_what_carry_says(name):
    mixture = make(name, carry="mixture")
    for found, expected in zip(
        two_steps(mixture, split=True), two_steps(mixture, split=False), strict=True
    ):
        torch.testing.assert_close(found, expected)
    pathwise, rp = make(name, carry="pathwise"), two_steps(make("rp"), split=False)
    theta, state = two_steps(pathwise, split=True)
    torch.testing.assert_close(state, rp[1])
    if name not in ("rp",):
        assert (two_steps(mixture, split=True)[1] - rp[1]).abs().max() > 1e-6
    assert theta.isfinite().all()


def test_a_pathwise_carry_changes_nothing_for_lr():
    """No node of LR passes on what it receives from later states."""
    found = [two_steps(make("lr", carry=c), split=True)[0] for c in ("pathwise", "mixture")]
    torch.testing.assert_close(*found)


def test_ivw_h_weighs_mean_and_std_by_their_own_variances():
    rp, lr = (
        tuple(
            scale * torch.randn(30, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        )
        for scale, seeds in ((1, (1, 2)), (3, (3, 4)))
    )
    (members,) = mixing.ivw_h(rp, [lr], None)
    for k, g, other in zip(members, rp, lr, strict=True):
        torch.testing.assert_close(k[0], g.var(0) / (g.var(0) + other.var(0)))
    assert make("ivw-h").carry == "pathwise"


def test_what_is_carried_has_the_node_s_shape():
    mean = torch.zeros(5, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"carried must be like mean and std.*got \[\[5, 1\]"):
        make("tpx")(mean, mean + 1, mean, mean.new_zeros(5), carried=(mean[:, :1], mean[:, :1]))
    with pytest.raises(ValueError, match="carry is 'mixture' or 'pathwise', got 'both'"):
        make("tpx", carry="both")
