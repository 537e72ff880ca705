"""Scalar heads and their two-hot encoding, against hand-computed numbers."""

import math

import pytest
import torch

from totalprop.world_models.latent.heads import (
    N_BINS,
    ScalarHead,
    bins_beside,
    symexp_bins,
    two_hot_mean,
)
from totalprop.world_models.latent.networks import initialise, mlp, symexp

BINS = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])


def two_hot(x, bins):
    """[..., K] probabilities."""
    index, weight = bins_beside(x, bins)
    return weight.new_zeros(*x.shape, len(bins)).scatter_(-1, index, weight)


def test_two_hot_by_hand():
    found = two_hot(torch.tensor([0.25, 2.0, -1.0, 3.0, 9.0, -5.0]), BINS)
    assert found.tolist() == [
        [0, 0, 0.75, 0.25, 0],
        [0, 0, 0, 0.5, 0.5],
        [0, 1, 0, 0, 0],  # exact at a bin
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1],  # beyond the last: as if at it
        [1, 0, 0, 0, 0],
    ]


def test_the_expectation_of_a_two_hot_is_the_number():
    """Over 12 orders of magnitude, within float32's relative precision of the wider bin."""
    bins = symexp_bins()
    x = symexp(torch.linspace(-19, 19, 1001))
    probabilities = two_hot(x, bins)
    assert (probabilities.sum(-1) - 1).abs().max() < 1e-6
    assert (probabilities > 0).sum(-1).max() <= 2
    torch.testing.assert_close(two_hot_mean(probabilities, bins), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two_hot_mean(two_hot(bins, bins), bins), bins, rtol=0, atol=0)


def test_bins_are_symmetric_and_a_uniform_head_gives_exactly_zero():
    bins = symexp_bins()
    assert len(bins) == N_BINS and bins[N_BINS // 2] == 0
    assert torch.equal(bins, -bins.flip(0))
    assert bins[-1] == pytest.approx(math.expm1(20))
    uniform = torch.full((N_BINS,), 1 / N_BINS)
    assert two_hot_mean(uniform, bins) == 0
    assert (uniform * bins).sum() != 0  # a plain sum leaves round-off: why it is summed in pairs


def agrees_with_float64(device):
    """Bins of up to 4.9e8 in TF32 or bfloat16 would leave 3 digits of a mean of about 1."""
    torch.manual_seed(0)
    head = ScalarHead(5, 8, 1, kind="two-hot").to(device)
    logits = 3 * torch.randn(1000, 255, device=device)
    expected = two_hot_mean(logits.double().softmax(-1), head.bins.double())
    scale = float(expected.abs().mean())
    for bf16 in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            mean = head.mean(logits)
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6 * scale)


def test_a_two_hot_mean_is_not_rounded_to_bfloat16():
    agrees_with_float64("cpu")


@pytest.mark.gpu
def test_a_two_hot_mean_is_not_rounded_on_a_gpu():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32, as in totalprop train
    try:
        agrees_with_float64("cuda")
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_two_hot_head_starts_at_zero_and_learns_any_scale():
    """The same steps fit targets of 0.01 and of 10,000 to 2 %: Adam, rate 3e-2, 300 steps."""
    for target in (0.01, -1.0, 1e4):
        torch.manual_seed(0)
        head = ScalarHead(3, 8, 1, kind="two-hot", layer_norm=True)
        initialise(head)
        head.zero_last_layer()
        features = torch.randn(16, 3)
        assert torch.equal(head.mean(head(features)), torch.zeros(16))
        targets = torch.full((16,), target)
        optimizer = torch.optim.Adam(head.parameters(), 3e-2)
        for _ in range(300):
            loss = head.loss(head(features), targets).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(head.mean(head(features)), targets, rtol=0.02, atol=1e-3)


def test_the_loss_of_a_two_hot_head_is_a_cross_entropy():
    head = ScalarHead(3, 4, 1, kind="two-hot")
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0.0, 1.0, -3.0, 250.0, 1e9])
    out = head(features)
    expected = torch.nn.functional.cross_entropy(out, two_hot(target, head.bins), reduction="none")
    torch.testing.assert_close(head.loss(out, target), expected)


def test_losses_of_several_targets_are_added():
    for kind in ("two-hot", "gaussian"):
        head = ScalarHead(3, 4, 1, kind=kind)
        out = head(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
        one, other = torch.arange(5.0), torch.arange(5.0).flip(0) - 2  # one pair of bins is shared
        both = head.loss(out, one, other)
        torch.testing.assert_close(both, head.loss(out, one) + head.loss(out, other))


def test_the_gradients_of_mean_and_loss_are_those_of_the_definitions():
    """In float64, where the heads' own autograd functions and plain operations must agree."""
    head = ScalarHead(3, 4, 1, kind="two-hot").double()
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(2, 6, N_BINS, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = [torch.randn(2, 6, generator=generator, dtype=torch.float64) * s for s in (1, 100)]
    bins, weights = head.bins, torch.linspace(-1, 2, 12, dtype=torch.float64).view(2, 6)
    entropies = [-(two_hot(x, bins) * out.log_softmax(-1)).sum(-1) for x in targets]
    for found, expected in (
        (head.mean(out), (out.softmax(-1) * bins).sum(-1)),
        (head.loss(out, *targets), sum(entropies)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-6)
        gradients = [torch.autograd.grad((weights * x).sum(), out)[0] for x in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12 * float(gradients[1].norm()))


def test_the_gradient_of_a_two_hot_loss_does_not_grow_with_the_target():
    """It is softmax - two-hot, at most 2 in the 1-norm; a squared error's grows with the target."""
    for kind, bounded in (("two-hot", True), ("gaussian", False)):
        head = ScalarHead(3, 4, 1, kind=kind)
        out = head(torch.ones(1, 3))
        (gradient,) = torch.autograd.grad(head.loss(out, torch.tensor([1e6])).sum(), out)
        assert (float(gradient.abs().sum()) <= 2) is bounded


def test_a_gaussian_head_is_the_plain_perceptron():
    """DreamerV1's: the same parameters in the same order, and half the squared error."""
    torch.manual_seed(0)
    head = ScalarHead(3, 8, 2)
    torch.manual_seed(0)
    plain = mlp(3, 8, 2, 1)
    assert list(head.state_dict()) == list(plain.state_dict())
    features = torch.randn(5, 3)
    torch.testing.assert_close(head.mean(head(features)), plain(features).squeeze(-1))
    loss = head.loss(head(features), torch.ones(5))
    torch.testing.assert_close(loss, 0.5 * (plain(features).squeeze(-1) - 1).square())


def test_bins_are_not_in_files():
    """They are constants, so that a file cannot change them."""
    assert "bins" not in ScalarHead(3, 4, 1, kind="two-hot").state_dict()
