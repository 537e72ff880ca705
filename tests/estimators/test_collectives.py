"""A batch over two processes has the gradient, k and gauge of one process with all samples."""

import functools

import pytest
import torch

import totalprop.estimators as estimators
from tests.estimators.conftest import LinearGaussian
from tests.processes import together
from totalprop.estimators import ControlProbe, DenseJacobian
from totalprop.estimators.gauge import SHAPE

N = 24  # of all processes
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
VARIANTS = {
    **{name: (name, {}) for name in estimators.names()},
    "tpx of halves": ("tpx", {"cross_fit": True}),
    "tp of halves": ("tp", {"cross_fit": True}),
    "lr with the mean as baseline": ("lr", {"baseline": "mean"}),
    "tpx with batch importance weights": ("tpx", {"legs": "biw"}),
    "tpx of two legs": ("tpx", {"legs": ("score", "biw")}),
}
CHAIN = LinearGaussian().without_direct_paths()
CATEGORICAL = ("lr", "tps", "tpx", "tpg", "tp-guarded")


def results(group, variants) -> dict[str, dict[str, torch.Tensor]]:
    """Gradient, k, gauge and per-sample gradients of each variant, for this process's samples."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    rows = slice(rank * N // size, (rank + 1) * N // size)
    found = {}
    for label, (name, changes) in variants.items():
        estimator = estimators.make(name, **changes, group=group)
        parameters = CHAIN.parameters()
        start, noise = CHAIN.noise(N, torch.Generator().manual_seed(1))
        noise = start[rows], noise[:, rows]
        meter = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        gauge = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)

        def rollout(
            estimator, tap, parameters=parameters, noise=noise, meter=meter, gauge=gauge
        ):  # fmt: skip
            measured = functools.partial(estimator, meter=meter, gauge=gauge)
            measured.probe = estimator.probe
            return CHAIN.loss(measured, tap, parameters, noise)

        result = estimators.gradient(
            rollout, list(parameters.values()), estimator, samples=N // size,
            per_sample=estimator.probe != "subset", meter=meter, gauge=gauge,
            tap_size=8 if estimator.probe == "subset" else None,
        )  # fmt: skip
        per_sample = result.per_sample
        found[label] = {
            "gradient": torch.cat([g.flatten() for g in result.gradients]),
            "k": result.k,
            "gauge": result.gauge,
            # In the scale of a loss that is the average over all samples.
            "per_sample": torch.zeros(1) if per_sample is None else per_sample / size,
        }
    return found


def at_categoricals(group, names=CATEGORICAL) -> dict[str, torch.Tensor]:
    """Gradient of two categoricals [N, 2, 3] with a `ControlProbe` and a critic's value."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    rows = slice(rank * N // size, (rank + 1) * N // size)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, 2, dtype=torch.float64, generator=generator)[rows]
    noise = torch.empty(N, 2, 3, dtype=torch.float64)
    noise = -noise.exponential_(generator=generator).log()[rows]
    to_logits = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)
    found = {}
    for name in names:
        weights = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
        controls = x @ weights.T
        logits = torch.einsum("gcf,nf->ngc", to_logits, controls)
        eye = torch.eye(2, dtype=torch.float64)
        by_weights = torch.einsum("fg,nk->nfgk", eye, x).flatten(2)  # [N, 2, 4]
        jacobian = DenseJacobian(by_weights)
        probe = ControlProbe([to_logits.expand(len(x), -1, -1, -1)], lambda j=jacobian: j)
        estimator = estimators.make(name, baseline="critic", group=group)
        value = x.sum(1)
        sample, credit = estimator(
            logits, None, noise, torch.zeros(len(x), dtype=torch.float64), probe=probe, value=value
        )
        cost = (sample * to_logits[..., 0]).sum((1, 2)) * (1 + x[:, 0]) + value
        loss = estimators.assign_credit(cost.square(), credit).mean()
        found[name] = torch.autograd.grad(loss, weights)[0]
    return found


def everything(group):
    return results(group, VARIANTS), at_categoricals(group)


@pytest.fixture(scope="module")
def in_two():
    return together(everything)


@pytest.mark.parametrize("label", VARIANTS)
def test_two_processes_have_the_gradient_of_one(in_two, label):
    expected = results(None, {label: VARIANTS[label]})[label]
    first, second = (nodes[label] for nodes, _ in in_two)
    mean = (first["gradient"] + second["gradient"]) / 2
    torch.testing.assert_close(mean, expected["gradient"], **CLOSE)
    for name in ("k", "gauge"):
        torch.testing.assert_close(first[name], expected[name], **CLOSE)
        torch.testing.assert_close(second[name], expected[name], **CLOSE)
    if len(expected["per_sample"]) == N:
        both = torch.cat((first["per_sample"], second["per_sample"]))
        torch.testing.assert_close(both, expected["per_sample"], **CLOSE)


@pytest.mark.parametrize("name", CATEGORICAL)
def test_two_processes_have_the_gradient_of_one_at_categoricals(in_two, name):
    first, second = (found[name] for _, found in in_two)
    torch.testing.assert_close((first + second) / 2, at_categoricals(None, [name])[name], **CLOSE)


def ignoring(group):
    """As `results` of tpx, but the estimator is given no group, although there is one."""
    rows = slice(group.rank() * N // 2, (group.rank() + 1) * N // 2)
    parameters = CHAIN.parameters()
    start, noise = CHAIN.noise(N, torch.Generator().manual_seed(1))
    loss = CHAIN.loss(estimators.make("tpx"), None, parameters, (start[rows], noise[:, rows]))
    return torch.autograd.grad(loss, list(parameters.values()))


def test_without_a_group_a_process_is_alone_whatever_was_initialised():
    parameters = CHAIN.parameters()
    start, noise = CHAIN.noise(N, torch.Generator().manual_seed(1))
    for rank, found in enumerate(together(ignoring)):
        rows = slice(rank * N // 2, (rank + 1) * N // 2)
        part = start[rows], noise[:, rows]
        loss = CHAIN.loss(estimators.make("tpx"), None, parameters, part)
        expected = torch.autograd.grad(loss, list(parameters.values()))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("leg", ["lax", "mvd"])
def test_a_critic_of_the_sample_is_refused_across_processes(leg):
    with pytest.raises(ValueError, match="set legs='score', or group=None"):
        estimators.make("tpx", legs=leg, group=object())


def test_torch_func_is_refused_across_processes():
    estimator = estimators.make("tpx", group=object())

    def loss(mean):
        sample, credit = estimator(mean, torch.ones(4, 1), torch.zeros(4, 1), torch.zeros(4))
        return estimators.assign_credit(sample.sum(-1), credit).mean()

    with pytest.raises(ValueError, match=r"torch\.func cannot transform"):
        torch.func.grad(loss)(torch.zeros(4, 1))
