"""Gaussian and categorical latents, by hand and against torch.distributions, in float64."""

import math

import pytest
import torch
from torch.distributions import Independent, OneHotCategorical
from torch.distributions import kl_divergence as reference_kl

from totalprop.estimators.legs import draw
from totalprop.world_models.latent.distributions import (
    Categorical,
    CategoricalLatents,
    Gaussian,
    GaussianLatents,
    stack,
)

F64 = torch.float64
N, G, C = 4, 3, 5


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(shape, dtype=F64, generator=generator(seed))


def categorical(seed, requires_grad=False):
    raw = randn(N, G * C, seed=seed).requires_grad_(requires_grad)
    return raw, CategoricalLatents(G, C)(raw)


def test_one_percent_is_uniform_by_hand():
    """Raw outputs (log 3, 0) are probabilities (3/4, 1/4): 0.99 p + 0.01 / 2."""
    found = CategoricalLatents(1, 2)(torch.tensor([math.log(3.0), 0.0], dtype=F64))
    expected = torch.tensor([[0.99 * 0.75 + 0.005, 0.99 * 0.25 + 0.005]], dtype=F64)
    torch.testing.assert_close(found.logits, expected.log())
    torch.testing.assert_close(found.mean, expected[0])


def test_no_probability_vanishes_and_the_kl_is_bounded():
    """Certain of one class each, KL = 0.99 log(0.99 + 0.01/C)/(0.01/C) + ..., and finite."""
    certain = 1e4 * torch.eye(C, dtype=F64)
    p, q = (CategoricalLatents(1, C)(certain[i]) for i in (0, 1))
    high, low = 0.99 + 0.01 / C, 0.01 / C
    torch.testing.assert_close(p.mean[:2], torch.tensor([high, low], dtype=F64))
    assert float(p.kl(q)) == pytest.approx((high - low) * math.log(high / low))


def test_logits_are_log_probabilities_and_float32_at_least():
    _, p = categorical(1)
    torch.testing.assert_close(p.logits.exp().sum(-1), torch.ones(N, G, dtype=F64))
    assert CategoricalLatents(G, C)(torch.zeros(G * C, dtype=torch.bfloat16)).logits.dtype == (
        torch.float32
    )


def test_kl_of_categoricals_equals_torch_distributions():
    (raw_p, p), (raw_q, q) = categorical(1, True), categorical(2, True)
    expected = reference_kl(
        Independent(OneHotCategorical(logits=p.logits), 1),
        Independent(OneHotCategorical(logits=q.logits), 1),
    )
    found = p.kl(q)
    assert found.shape == (N,)
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad(kl.sum(), [raw_p, raw_q], retain_graph=True) for kl in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_kl_of_categoricals_by_hand():
    """(1/2, 1/2) from (1/4, 3/4): ½ log 2 + ½ log 2/3; two variables, so twice."""
    p = Categorical(torch.tensor([[0.5, 0.5]] * 2, dtype=F64).log())
    q = Categorical(torch.tensor([[0.25, 0.75]] * 2, dtype=F64).log())
    assert float(p.kl(q)) == pytest.approx(math.log(2) + math.log(2 / 3))
    assert float(p.kl(p)) == 0


def test_sample_frequencies_are_the_probabilities():
    """N = 40000, seed 5: frequencies within 4 standard errors, √(p (1 - p) / N)."""
    n, latents = 40_000, CategoricalLatents(2, 4)
    p = latents(randn(8, seed=3))
    noise = latents.noise(n, generator=generator(5)).double()
    sample = Categorical(p.logits.expand(n, 2, 4)).sample(noise)
    assert sample.shape == (n, 8)
    standard_error = (p.mean * (1 - p.mean) / n).sqrt()
    assert ((sample.mean(0) - p.mean) / standard_error).abs().max() <= 4
    joint = sample.view(n, 2, 4)[:, 0, 0] * sample.view(n, 2, 4)[:, 1, 0]  # they are independent
    both = p.mean[0] * p.mean[4]
    assert abs(joint.mean() - both) <= 4 * (both * (1 - both) / n).sqrt()


def test_a_sample_is_exactly_one_hot_and_the_nodes():
    _, p = categorical(1)
    latents = CategoricalLatents(G, C)
    noise = latents.noise(N, generator=generator(2)).double()
    sample = p.sample(noise)
    assert set(sample.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(sample.view(N, G, C), draw((p.logits,), noise))


def test_the_log_probability_of_a_sample_is_its_logits():
    _, p = categorical(1)
    sample = p.mode
    reference = Independent(OneHotCategorical(logits=p.logits), 1)
    found = (sample * p.logits.flatten(-2)).sum(-1)
    torch.testing.assert_close(found, reference.log_prob(sample.view(N, G, C)))


def test_the_gradient_is_straight_through_by_hand():
    """d Σ w·sample / d raw = 0.99 p_s (w - Σ p_s w), p_s the softmax, whatever the sample is."""
    raw, p = categorical(1, requires_grad=True)
    w = randn(N, G * C, seed=7)
    noise = CategoricalLatents(G, C).noise(N, generator=generator(2)).double()
    found = torch.autograd.grad((p.sample(noise) * w).sum(), raw)[0].view(N, G, C)
    softmax, w = raw.detach().view(N, G, C).softmax(-1), w.view(N, G, C)
    expected = 0.99 * softmax * (w - (softmax * w).sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected)


def test_mode_and_mean():
    logits = torch.tensor([[[0.2, 0.8], [0.9, 0.1]]], dtype=F64).log()
    p = Categorical(logits)
    assert p.mode.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    torch.testing.assert_close(p.mean, logits.exp().flatten(-2))
    gaussian = Gaussian(randn(N, G, seed=1), randn(N, G, seed=2).exp())
    assert torch.equal(gaussian.mode, gaussian.mean)


@pytest.mark.parametrize("latents", [GaussianLatents(G), CategoricalLatents(G, C)])
def test_sizes_fit_together(latents):
    p = latents(randn(N, latents.outputs, seed=1))
    noise = latents.noise(N, generator=generator(1)).double()
    for z in (p.mean, p.mode, p.sample(noise)):
        assert z.shape == (N, latents.size)
    mean, std = p.zeta
    assert mean.shape == noise.shape and (std is None or std.shape == noise.shape)
    assert p.kl(p).shape == (N,)
    assert not any(x.requires_grad for x in p.detach())
    stacked = stack([p, p])
    assert type(stacked) is type(p) and stacked.mean.shape == (2, N, latents.size)


def test_noise_is_normal_or_gumbel():
    """N = 40000, seed 1: mean and variance within 4 standard errors."""
    normal = GaussianLatents(4).noise(10_000, generator=generator(1))
    gumbel = CategoricalLatents(2, 2).noise(10_000, generator=generator(1))
    assert normal.shape == (10_000, 4) and gumbel.shape == (10_000, 2, 2)
    for noise, mean, variance, kurtosis in (
        (normal, 0.0, 1.0, 3.0), (gumbel, 0.57722, math.pi**2 / 6, 5.4)
    ):  # fmt: skip
        n = noise.numel()
        assert abs(noise.mean() - mean) <= 4 * (variance / n) ** 0.5
        assert abs(noise.var() - variance) <= 4 * variance * ((kurtosis - 1) / n) ** 0.5
