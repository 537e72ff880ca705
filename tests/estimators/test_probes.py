"""Probes and their Gram matrices, against per-sample Jacobians from autograd."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tests.estimators.conftest import gram_by_hand
from totalprop.estimators import ControlProbe, DenseJacobian, ParameterProbe
from totalprop.estimators.probes import gram, restrict

F64 = torch.float64
N, D, S = 7, 3, 4


def randn(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


# zeta depends on the parameters through F controls u = tanh(W s + b) only.


def control(parameters, state):
    return torch.tanh(parameters["w"] @ state + parameters["b"])


def zeta_of(mixing, control):
    drive = mixing @ control
    return drive + drive.square(), torch.exp(0.3 * drive)


class Problem:
    def __init__(self, f):
        self.parameters = {"w": randn(f, S, seed=0), "b": randn(f, seed=1)}
        self.states, self.mixing = randn(N, S, seed=2), randn(D, f, seed=3)
        self.n_parameters = f * S + f
        self.cotangent = randn(N, D, seed=4), randn(N, D, seed=5)
        self.cotangents = randn(5, N, D, seed=6), randn(5, N, D, seed=7)

    def function(self, parameters, state):
        return zeta_of(self.mixing, control(parameters, state))

    def parameter_probe(self):
        return ParameterProbe(self.function, self.parameters, self.states)

    def control_probe(self, calls=None, counted=None):
        by_control, by_parameters = [], []
        for state in self.states:
            u = control(self.parameters, state)
            jacobian = torch.autograd.functional.jacobian
            by_control.append(jacobian(lambda u: zeta_of(self.mixing, u), u))
            values = tuple(self.parameters.values())

            def flat_control(w, b, state=state):
                return control({"w": w, "b": b}, state)

            du = jacobian(flat_control, values)
            by_parameters.append(torch.cat([j.flatten(1) for j in du], 1))
        zeta_jacobian = [torch.stack(member) for member in zip(*by_control, strict=True)]

        def control_jacobian():
            if calls is not None:
                calls.append(1)
            return DenseJacobian(torch.stack(by_parameters))

        return ControlProbe(zeta_jacobian, control_jacobian, counted)

    def explicit(self, cotangent):
        """[N, P] gradients from plain autograd, one sample at a time."""
        rows = []
        for i in range(N):
            leaves = {name: p.clone().requires_grad_() for name, p in self.parameters.items()}
            zeta = self.function(leaves, self.states[i])
            inner = sum((c[i] * z).sum() for c, z in zip(cotangent, zeta, strict=True))
            g = torch.autograd.grad(inner, list(leaves.values()))
            rows.append(torch.cat([one.flatten() for one in g]))
        return torch.stack(rows)

    def explicit_gram(self):
        return gram_by_hand(
            torch.stack([self.explicit(one) for one in zip(*self.cotangents, strict=True)])
        )


@pytest.fixture(params=[1, 3], ids=["F=1", "F=3"])
def problem(request):
    return Problem(request.param)


KINDS = ["parameter_probe", "control_probe"]


@pytest.mark.parametrize("kind", KINDS)
def test_probe_is_the_per_sample_jacobian_product(problem, kind):
    found = getattr(problem, kind)()(problem.cotangent)
    assert found.shape == (N, problem.n_parameters)
    torch.testing.assert_close(found, problem.explicit(problem.cotangent))


def test_gram_matches_explicit_covariances(problem):
    expected = problem.explicit_gram()
    explicit = problem.explicit  # any callable is a probe
    for probe in (problem.parameter_probe(), problem.control_probe(), explicit):
        torch.testing.assert_close(gram(probe, problem.cotangents), expected)


def test_gram_of_a_control_probe_does_not_lose_the_small_covariance_of_a_large_mean():
    """Cotangents whose mean is 1e3 times their spread: subtracting it must not lose precision."""
    problem = Problem(1)
    shift = torch.tensor(1e3, dtype=F64)
    problem.cotangents = tuple(c + shift for c in problem.cotangents)
    found = gram(problem.control_probe(), problem.cotangents)
    torch.testing.assert_close(found, problem.explicit_gram(), rtol=1e-8, atol=1e-6)


def test_a_function_that_fails_on_one_sample_is_said_to():
    """One that is random, one of all samples, one for a batch; and the remedies."""
    torch.manual_seed(0)
    x, cotangent = randn(N, S, seed=8), (randn(N, D, seed=9),)

    def of_batch(parameters, x):
        return functional_call(net, parameters, (x.unsqueeze(0),)).squeeze(0)

    for layer in (nn.Dropout(0.5), nn.BatchNorm1d(D)):
        net = nn.Sequential(nn.Linear(S, D), layer).double()
        for function in (net, of_batch):
            said = r"must map one sample, .* \(module.eval\(\) for Dropout and BatchNorm\)"
            with pytest.raises(ValueError, match=said):
                ParameterProbe(function, net, x)(cotangent)
        net.eval()
        assert ParameterProbe(of_batch, net, x)(cotangent).shape[0] == N
    weight = {"w": randn(S, D, seed=10)}
    with pytest.raises(ValueError, match=r"a slice of each input .*; it failed with: Dimension"):
        ParameterProbe(lambda p, x: x.sum(1) + p["w"], weight, x)(cotangent)


def test_frozen_parameters_of_a_module_do_not_count():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(S, 5), nn.Linear(5, D)).double(), randn(N, S, seed=8)
    net[0].requires_grad_(False)
    expected = ParameterProbe(net, {k: p for k, p in net.named_parameters() if k[0] == "1"}, x)
    cotangent = (randn(N, D, seed=9),)
    assert torch.equal(ParameterProbe(net, net, x)(cotangent), expected(cotangent))
    for empty in (net.requires_grad_(False), {}):
        with pytest.raises(ValueError, match=r"at least one tensor, got (Sequential|dict) without"):
            ParameterProbe(net, empty, x)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, N)])
@pytest.mark.parametrize("kind", [*KINDS, "explicit"])
def test_restricted_probe_is_the_probe_of_those_rows(problem, kind, rows):
    probe = problem.explicit if kind == "explicit" else getattr(problem, kind)()
    part = restrict(probe, rows, N)
    cotangent = tuple(c[rows] for c in problem.cotangent)
    torch.testing.assert_close(part(cotangent), problem.explicit(problem.cotangent)[rows])


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, N)])
def test_restricted_gram_has_the_mean_of_those_rows(problem, rows):
    b = [problem.explicit(one)[rows] for one in zip(*problem.cotangents, strict=True)]
    expected = gram_by_hand(torch.stack(b))
    part = tuple(c[:, rows] for c in problem.cotangents)
    for probe in (problem.parameter_probe(), problem.control_probe(), problem.explicit):
        torch.testing.assert_close(gram(restrict(probe, rows, N), part), expected)


def test_control_jacobian_is_computed_only_when_a_gram_asks_and_once():
    calls = []
    problem = Problem(3)
    probe = problem.control_probe(calls)
    restrict(probe, slice(0, 3), N)
    assert calls == []
    gram(probe, problem.cotangents)
    assert calls == [1]


def test_counted_parameters_weigh_and_all_are_returned():
    """`tps`: covariances use the counted columns only, but a call returns all columns."""
    problem = Problem(3)
    everything = problem.control_probe().control_jacobian().jacobian
    probe = problem.control_probe(counted=lambda: DenseJacobian(everything[..., -3:]))  # the bias
    b = [problem.explicit(one)[:, -3:] for one in zip(*problem.cotangents, strict=True)]
    for rows in (slice(0, N), slice(2, N)):
        expected = gram_by_hand(torch.stack([one[rows] for one in b]))
        cotangents = tuple(c[:, rows] for c in problem.cotangents)
        torch.testing.assert_close(gram(restrict(probe, rows, N), cotangents), expected)
    torch.testing.assert_close(probe(problem.cotangent), problem.explicit(problem.cotangent))


def test_dense_jacobian_products():
    jacobian, alpha = randn(N, 2, 5, seed=8), randn(4, N, 2, seed=9)
    dense = DenseJacobian(jacobian)
    explicit = torch.stack(
        [torch.stack([alpha[m, i] @ jacobian[i] for i in range(N)]) for m in range(4)]
    )
    torch.testing.assert_close(dense.per_sample(alpha[1]), explicit[1])
    for rows in (slice(None), slice(2, 4)):
        expected = gram_by_hand(explicit[:, rows])
        torch.testing.assert_close(dense.rows(rows).gram(alpha[:, rows]), expected)


def test_parameter_probe_of_a_subset_has_only_its_columns():
    problem = Problem(3)
    subset = {"b": problem.parameters["b"]}

    def function(p, state):
        return problem.function({**problem.parameters, **p}, state)

    found = ParameterProbe(function, subset, problem.states)(problem.cotangent)
    torch.testing.assert_close(found, problem.explicit(problem.cotangent)[:, 3 * S :])


def test_parameter_probe_keeps_no_graph():
    problem = Problem(1)
    parameters = {name: p.requires_grad_() for name, p in problem.parameters.items()}
    probe = ParameterProbe(problem.function, parameters, problem.states.requires_grad_())
    assert not probe(problem.cotangent).requires_grad
