"""torch.compile: a node is one graph, and compiled gradients equal eager ones."""

import os
import shutil

import pytest
import torch
from torch.utils.cpp_extension import get_cxx_compiler

from totalprop import estimators
from totalprop.estimators import ControlProbe, DenseJacobian, Rollout, assign_credit
from totalprop.estimators.gauge import SHAPE

N, D, A, H = 12, 3, 2, 1
NAMES = ("rp", "lr", "tpx", "tpx-ivw", "tp", "tpg")


def inputs(dtype):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    weight = (0.5 * randn(A, D)).requires_grad_()
    meter = torch.zeros(1, D, dtype=dtype, requires_grad=True)
    return weight, meter, randn(N, D), randn(D, A), randn(H, N, D)


def loss_of(estimator, weight, meter, x, mixing, noise):
    """Loss after two nodes of a nonlinear model whose parameters act through the action only."""
    credit = x.new_zeros(N)
    total = x.new_zeros(())
    for noise_t in noise:
        action = torch.tanh(x @ weight.T)
        mean, std = torch.sin(2 * x) + action @ mixing.T, 0.3 + 0.2 * torch.sigmoid(x)
        features, slope = x.detach(), (1 - action.square()).detach()

        def control_jacobian(features=features, slope=slope):  # [N, A, A·D]
            outer = torch.eye(A, dtype=features.dtype)[None, :, :, None] * features[:, None, None]
            return DenseJacobian((slope[:, :, None, None] * outer).flatten(2))

        by_action = mixing.detach().expand(N, D, A)
        probe = ControlProbe([by_action, torch.zeros_like(by_action)], control_jacobian)
        x, credit = estimator(mean, std, noise_t, credit, probe=probe, meter=meter)
        total = total + assign_credit(torch.sin(3 * x).sum(-1) + x.prod(-1), credit).mean()
    return total


def gradients(function, dtype):
    weight, meter, *rest = inputs(dtype)
    loss = function(weight, meter, *rest)
    return (loss.detach(), *torch.autograd.grad(loss, [weight, meter]))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager(name):
    """Full graph, forward and backward, through AOTAutograd; float64 to round-off."""
    estimator = estimators.make(name)

    def function(*arguments):
        return loss_of(estimator, *arguments)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = gradients(function, torch.float64)
    found = gradients(compiled, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if name not in ("rp", "lr"):
        assert ((expected[2] > 0) & (expected[2] < H)).any()


@pytest.mark.parametrize("leg", ["score", "lax"])
def test_a_rollout_can_be_made_within_the_compiled_function(leg):
    estimator = "tpx" if leg == "score" else estimators.make("tpx", legs=leg)
    extra = {} if leg == "score" else {"critic": lambda x: x.square().sum(-1)}
    noise = torch.randn(H + 1, N, D, generator=torch.Generator().manual_seed(0))

    def function(theta):
        r, x, loss = Rollout(estimator), torch.zeros(N, D), 0.0
        for noise_t in noise:
            x = r.sample(x + theta, torch.ones_like(x), noise=noise_t, **extra)
            loss = loss + r.cost(x.sin().sum(-1)).mean()
        return loss

    theta = torch.full((D,), 0.3, requires_grad=True)
    (expected,) = torch.autograd.grad(function(theta), theta)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(theta), theta)[0], expected)


@pytest.mark.parametrize("name", ["rp", "lr", "tpx"])
def test_compiled_gauge_equals_eager(name):
    estimator = estimators.make(name)

    def function(mean, gauge, noise):
        sample, credit = estimator(mean, torch.ones_like(mean), noise, mean[:, 0] * 0, gauge=gauge)
        return assign_credit(torch.sin(3 * sample).sum(-1), credit).mean()

    def gauge_of(function):
        _, _, mean, _, noise = inputs(torch.float64)
        gauge = torch.zeros(SHAPE, dtype=mean.dtype, requires_grad=True)
        return torch.autograd.grad(function(mean.requires_grad_(), gauge, noise[0]), gauge)[0]

    torch._dynamo.reset()
    found = gauge_of(torch.compile(function, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, gauge_of(function), rtol=1e-9, atol=1e-12)
    assert found[:, 1].tolist() == [2 * D, 1, 1, 1]


def stacked_gradients(compile_with, names):
    """Gradients of all estimators, in one function that is compiled once; float32."""
    chosen = [estimators.make(name) for name in names]

    def function(weight, meter, *rest):
        losses = [
            loss_of(estimator, weight[i], meter[i], *rest) for i, estimator in enumerate(chosen)
        ]
        return torch.stack(losses)

    weight, _, *rest = inputs(torch.float32)
    weight = weight.detach().expand(len(names), A, D).clone().requires_grad_()
    meter = torch.zeros(len(names), 1, D, requires_grad=True)
    losses = compile_with(function)(weight, meter, *rest)
    return (losses.detach(), *torch.autograd.grad(losses.sum(), [weight, meter]))


needs_compiler = pytest.mark.skipif(
    shutil.which(get_cxx_compiler()) is None, reason="inductor needs a C++ compiler on the CPU"
)


@needs_compiler
@pytest.mark.parametrize("names", [("tpx",), pytest.param(NAMES, marks=pytest.mark.slow)], ids=len)
def test_inductor_equals_eager(names):
    # The cache would give code for another ATEN_CPU_CAPABILITY, which does not compile here.
    is_cached = "ATEN_CPU_CAPABILITY" not in os.environ
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=is_cached):
        found = stacked_gradients(
            lambda function: torch.compile(function, fullgraph=True, backend="inductor"), names
        )
    expected = stacked_gradients(lambda function: function, names)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
