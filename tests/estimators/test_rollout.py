"""`Rollout` gives the gradient of the node by hand, for every registry entry."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from totalprop import estimators
from totalprop.estimators import ParameterProbe, Rollout, assign_credit, make

F64 = torch.float64
NODEWISE = [name for name in estimators.names() if not make(name).several_passes]


def probe_of(name, theta, x):
    if make(name).probe == "none":
        return {}
    return {"probe": ParameterProbe(lambda p, s: (s + p["t"], 0.4 + 0 * s), {"t": theta}, x)}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", NODEWISE)
def test_a_rollout_equals_the_nodes_by_hand(name, given):
    theta = torch.full((2,), 0.3, dtype=F64, requires_grad=True)
    generator = torch.Generator().manual_seed(3)
    start = torch.zeros(8, 2, dtype=F64)
    noise = torch.randn(3, 8, 2, dtype=F64, generator=generator)
    x, credit, by_hand = start, start.new_zeros(8), start.square().sum()
    for noise_t in noise:
        extra = probe_of(name, theta, x)
        x, credit = make(name)(x + theta, torch.full_like(x, 0.4), noise_t, credit, **extra)
        by_hand = by_hand + assign_credit(x.sin().sum(-1), credit).mean()

    r = Rollout(make(name) if given else name, generator=torch.Generator().manual_seed(3))
    x, loss = start, r.cost(start.square().sum(-1)).sum()  # before the first node: no credit
    for noise_t in noise:
        extra = probe_of(name, theta, x) | ({"noise": noise_t} if given else {})
        x = r.sample(x + theta, torch.full_like(x, 0.4), **extra)
        loss = loss + r.cost(x.sin().sum(-1)).mean()
    assert torch.equal(loss, by_hand)
    assert torch.equal(torch.autograd.grad(loss, theta)[0], torch.autograd.grad(by_hand, theta)[0])


def test_a_categorical_draws_gumbel_noise():
    """N = 20000, seed 0: frequencies within 4 standard errors of softmax(logits)."""
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=F64).expand(20_000, 3)
    r = Rollout("lr", generator=torch.Generator().manual_seed(0))
    found, p = r.sample(logits, None).mean(0), logits[0].softmax(0)
    assert ((found - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt()).all()


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize("name", ["rp", "lr", "tpx"])
def test_a_checkpointed_rollout_has_the_gradient_of_the_plain_one(name, is_given):
    """With noise from the global generator, and with noise from outside."""
    theta = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def gradient(call):
        torch.manual_seed(0)
        r, x, loss = Rollout(name), torch.zeros(50, 1, dtype=F64), 0.0

        def step(x, noise):
            x = r.sample(x + theta, torch.full_like(x, 0.5), noise=noise)
            return x, r.cost(x.square().sum(-1))

        for _ in range(3):
            x, cost = call(step, x, torch.randn_like(x) if is_given else None)
            loss = loss + cost.mean()
        return torch.autograd.grad(loss, theta)[0]

    plain = gradient(lambda step, *inputs: step(*inputs))
    assert torch.equal(gradient(partial(checkpoint, use_reentrant=False)), plain)


@pytest.mark.parametrize("is_gaussian", [True, False])
def test_vmap_draws_other_noise_for_each_rollout(is_gaussian):
    """Also at a first node, whose mean or logits are the same in all."""

    def samples(shift):
        r, start = Rollout("rp"), torch.zeros(20, 2, dtype=F64)
        x = r.sample(start, torch.ones_like(start) if is_gaussian else None)
        return x, r.sample(x + shift, torch.ones_like(start) if is_gaussian else None)

    for x in vmap(samples, randomness="different")(torch.zeros(3, dtype=F64)):
        assert not torch.equal(x[0], x[1]) and not torch.equal(x[1], x[2])


def test_wrong_arguments_get_the_nodes_sentences():
    r, mean = Rollout("tpx"), torch.zeros(4, 2)
    with pytest.raises(ValueError, match="mean must be a tensor"):
        r.sample(0.5, mean)
    with pytest.raises(ValueError, match=r"of real numbers, got torch.int64; pass mean.float\("):
        r.sample(mean.long(), mean + 1)
    with pytest.raises(ValueError, match="std must be positive"):
        r.sample(mean, mean - 1)
    r.sample(mean, mean + 1)
    with pytest.raises(TypeError, match="cost and credit must be tensors"):
        r.cost(1.0)
    with pytest.raises(ValueError, match=r"cost of shape \[\] cannot take a credit"):
        r.cost(torch.tensor(1.0))
    with pytest.raises(ValueError, match="unknown estimator 'tpxx'"):
        Rollout("tpxx")


def test_rollout_and_check_are_imported_without_an_agents_libraries():
    code = (
        "import sys, totalprop; assert 'torch' not in sys.modules; totalprop.Rollout; "
        "totalprop.check; heavy = ('gymnasium', 'stable_baselines3'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
