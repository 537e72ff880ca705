"""The networks, against plain PyTorch modules, closed forms and reference parameter counts."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from totalprop.world_models.latent import networks
from totalprop.world_models.latent.networks import (
    ImageDecoder,
    ImageEncoder,
    VectorDecoder,
    VectorEncoder,
    initialise,
    mlp,
    normalise,
    symexp,
    symlog,
)

FEATURES, DEPTH, CHANNELS = 7, 2, 3


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randomise(module, seed=0, scale=0.3):
    """Make all weights and biases differ, so that a missing or misplaced bias is noticed."""
    source = generator(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=source))
    return module


def images(*batch, seed=1):
    shape = (*batch, CHANNELS, 64, 64)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(seed))


def weight_shapes(module):
    return [tuple(p.shape) for p in module.parameters() if p.ndim > 1]


def count(module):
    return sum(p.numel() for p in module.parameters())


# Sizes


def test_parameter_counts_of_the_reference():
    """danijar/dreamer with 3x64x64 images and features of size 30 + 200."""
    assert count(ImageEncoder(3, depth=32)) == 690_144
    assert count(ImageDecoder(230, 3, depth=32)) == 3_795_555
    assert count(mlp(230, 400, 2, 1)) == 253_201  # reward
    assert count(mlp(230, 400, 3, 1)) == 413_601  # critic
    assert count(mlp(230, 400, 4, 12)) == 578_412  # actor of 6 actions


def test_layers_of_the_image_networks():
    encoder, decoder = ImageEncoder(3, depth=32), ImageDecoder(230, 3, depth=32)
    assert encoder.outputs == 1024
    assert weight_shapes(encoder) == [
        (32, 3, 4, 4), (64, 32, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4),
    ]  # fmt: skip
    assert weight_shapes(decoder) == [
        (1024, 230), (1024, 128, 5, 5), (128, 64, 5, 5), (64, 32, 6, 6), (32, 3, 6, 6),
    ]  # fmt: skip


@pytest.mark.parametrize("batch", [(1,), (5,), (2, 3), (2, 1, 3)])
def test_shapes(batch):
    encoder = ImageEncoder(CHANNELS, depth=DEPTH)
    decoder = ImageDecoder(FEATURES, CHANNELS, depth=DEPTH)
    features = torch.zeros(*batch, FEATURES)
    assert encoder(images(*batch)).shape == (*batch, encoder.outputs) == (*batch, 32 * DEPTH)
    assert decoder(features).shape == (*batch, CHANNELS, 64, 64)
    assert decoder.log_prob(features, images(*batch)).shape == ()
    vector = VectorDecoder(FEATURES, 4, width=5)
    assert VectorEncoder(4, width=5)(torch.zeros(*batch, 4)).shape == (*batch, 5)
    assert vector(features).shape == (*batch, 4)
    assert vector.log_prob(features, torch.zeros(*batch, 4)).shape == ()


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_mlp_is_linear_layers_with_elu_between(layers):
    net = randomise(mlp(4, 5, layers, 2))
    x = torch.randn(6, 4, generator=generator(2))
    linear = [part for part in net if isinstance(part, nn.Linear)]
    assert len(linear) == layers + 1
    expected = x
    for i, part in enumerate(linear):
        expected = expected @ part.weight.T + part.bias
        if i < layers:
            expected = torch.where(expected > 0, expected, expected.exp() - 1)
    torch.testing.assert_close(net(x), expected)


# Initialisation


class EveryKind(nn.Module):
    """A module with one layer of each kind that the agent uses."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(40, 30)
        self.conv = nn.Conv2d(8, 12, 4, stride=2)
        self.transposed = nn.ConvTranspose2d(10, 6, 5, stride=2)
        self.cell = nn.GRUCell(25, 20)


@pytest.fixture(scope="module")
def initialised():
    module = randomise(EveryKind(), scale=3.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        initialise(module)
    return module


def test_biases_are_zero(initialised):
    biases = [p for name, p in initialised.named_parameters() if "bias" in name]
    assert len(biases) == 5 and not any(b.any() for b in biases)


def test_recurrent_weights_are_orthogonal(initialised):
    """Keras's [deter, 3 deter] kernel with orthonormal rows, transposed: orthonormal columns."""
    weight = initialised.cell.weight_hh
    assert weight.shape == (60, 20)
    torch.testing.assert_close(weight.T @ weight, torch.eye(20), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "fan_in", "fan_out"),
    [
        ("linear.weight", 40, 30),
        ("conv.weight", 8 * 16, 12 * 16),
        ("transposed.weight", 10 * 25, 6 * 25),
        ("cell.weight_ih", 25, 3 * 20),
    ],
)
def test_input_weights_are_glorot_uniform(initialised, name, fan_in, fan_out):
    """U(-b, b), b = sqrt(6 / (fan_in + fan_out)); >= 1200 weights, seed 0.

    Mean 0 and second moment b²/3 within 4 SE (b / sqrt(3 n) and b² sqrt(4/45 / n)); the largest
    of n is within (1 - 20 / n) b with probability 1 - 2e-9.
    """
    weight = initialised.get_parameter(name).detach().flatten()
    bound, n = math.sqrt(6 / (fan_in + fan_out)), weight.numel()
    assert n >= 1200
    assert bound * (1 - 20 / n) < weight.abs().max() <= bound
    assert weight.mean().abs() < 4 * bound / math.sqrt(3 * n)
    assert abs(weight.square().mean() - bound**2 / 3) < 4 * bound**2 * math.sqrt(4 / 45 / n)


# Images


def test_normalise():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(normalise(pixels), torch.tensor([-0.5, -0.3, 0.5]))


def with_weights_of(plain, module):
    """Copy a module's weights, which have the same order, into a plain chain."""
    state = zip(plain.state_dict(), module.state_dict().values(), strict=True)
    plain.load_state_dict(dict(state))
    return plain


def plain_encoder(encoder):
    sizes = [CHANNELS, DEPTH, 2 * DEPTH, 4 * DEPTH, 8 * DEPTH]
    layers = []
    for i in range(4):
        layers += [nn.Conv2d(sizes[i], sizes[i + 1], 4, stride=2), nn.ReLU()]
    return with_weights_of(nn.Sequential(*layers, nn.Flatten()), encoder)


def plain_decoder(decoder):
    plain = nn.Sequential(
        nn.Linear(FEATURES, 32 * DEPTH),
        nn.Unflatten(1, (32 * DEPTH, 1, 1)),
        nn.ConvTranspose2d(32 * DEPTH, 4 * DEPTH, 5, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4 * DEPTH, 2 * DEPTH, 5, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * DEPTH, DEPTH, 6, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(DEPTH, CHANNELS, 6, stride=2),
    )
    return with_weights_of(plain.to(decoder.dense.weight.dtype), decoder)


def test_image_encoder_equals_plain_convolutions():
    encoder = randomise(ImageEncoder(CHANNELS, depth=DEPTH))
    batch = images(2, 3)
    expected = plain_encoder(encoder)(batch.flatten(0, 1).float() / 255 - 0.5)
    assert (expected > 0).any() and (expected == 0).any()
    torch.testing.assert_close(encoder(batch), expected.unflatten(0, (2, 3)))


def test_image_decoder_equals_plain_transposed_convolutions():
    """Values and gradients, since the first layer is implemented as a matrix product."""
    decoder = randomise(ImageDecoder(FEATURES, CHANNELS, depth=DEPTH)).double()
    plain = plain_decoder(decoder)
    features = torch.randn(2, 3, FEATURES, dtype=torch.float64, generator=generator(2))
    found, expected = decoder(features), plain(features.flatten(0, 1)).unflatten(0, (2, 3))
    assert (expected < 0).any()  # no ReLU on the output
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn(found.shape, dtype=torch.float64, generator=generator(3))
    torch.testing.assert_close(
        torch.autograd.grad(found, list(decoder.parameters()), cotangent),
        torch.autograd.grad(expected, list(plain.parameters()), cotangent),
    )


@pytest.mark.parametrize("std", [1.0, 0.2])
def test_image_log_prob_is_a_gaussian_summed_over_pixels(std):
    decoder = randomise(ImageDecoder(FEATURES, CHANNELS, depth=DEPTH, std=std))
    features, batch = torch.randn(2, 3, FEATURES, generator=generator(2)), images(2, 3)
    pixels = batch.float() / 255 - 0.5
    expected = Independent(Normal(decoder(features), std), 3).log_prob(pixels)
    assert expected.shape == (2, 3)
    torch.testing.assert_close(decoder.log_prob(features, batch), expected.sum())


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_chunks_change_nothing(chunk, monkeypatch):
    """5 images in one chunk, in chunks that leave a remainder, and in a chunk that is too large."""
    encoder = randomise(ImageEncoder(CHANNELS, depth=DEPTH))
    decoder = randomise(ImageDecoder(FEATURES, CHANNELS, depth=DEPTH))
    parameters = [*encoder.parameters(), *decoder.parameters()]
    features, batch = torch.randn(5, FEATURES, generator=generator(2)), images(5)
    sizes, decode = [], decoder._decode

    def spy(rows):
        sizes.append(len(rows))
        return decode(rows)

    monkeypatch.setattr(decoder, "_decode", spy)

    def outcome():
        outputs = encoder(batch), decoder(features), decoder.log_prob(features, batch)
        loss = outputs[0].square().sum() + outputs[1].square().sum() + outputs[2]
        return [*outputs, *torch.autograd.grad(loss, parameters)]

    monkeypatch.setattr(networks, "CPU_CHUNK", 5)
    whole = outcome()
    assert sizes == [5, 5]
    monkeypatch.setattr(networks, "CPU_CHUNK", chunk)
    sizes.clear()
    for found, expected in zip(outcome(), whole, strict=True):
        # A sum in another order is off by the round-off of its largest terms, not of its value.
        error = (found - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5
    once = [chunk] * (5 // chunk) + [5 % chunk] * (5 % chunk > 0)
    assert sizes == 2 * [min(n, 5) for n in once]


# Vectors


def test_symexp_inverts_symlog():
    x = torch.cat((torch.logspace(-8, 8, 200), torch.zeros(1))).double()
    x = torch.cat((-x, x))
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=1e-12, atol=0)
    torch.testing.assert_close(symlog(symexp(x.clamp(-30, 30))), x.clamp(-30, 30))


def test_symlog_by_hand():
    x = torch.tensor([-(math.e - 1), 0.0, 1.0, math.e**2 - 1])
    torch.testing.assert_close(symlog(x), torch.tensor([-1.0, 0.0, math.log(2), 2.0]))
    slope = torch.autograd.functional.jacobian(symlog, torch.tensor([1e-4, -3.0])).diagonal()
    torch.testing.assert_close(slope, torch.tensor([1 / (1 + 1e-4), 0.25]))


def test_vector_encoder_equals_its_layers():
    encoder = randomise(VectorEncoder(4, width=5))
    x = 30 * torch.randn(6, 4, generator=generator(2))
    squashed = torch.where(x > 0, 1.0, -1.0) * torch.log(1 + x.abs())
    expected = encoder.net(squashed).clamp_min(0)
    assert (expected > 0).any()
    torch.testing.assert_close(encoder(x), expected)


@pytest.mark.parametrize("std", [1.0, 0.3])
def test_vector_log_prob_is_a_gaussian_over_symlog(std):
    decoder = randomise(VectorDecoder(FEATURES, 4, width=5, std=std))
    features = torch.randn(2, 3, FEATURES, generator=generator(2))
    x = 30 * torch.randn(2, 3, 4, generator=generator(3))
    expected = Independent(Normal(decoder.net(features), std), 1).log_prob(symlog(x)).sum()
    torch.testing.assert_close(decoder.log_prob(features, x), expected)
    torch.testing.assert_close(symlog(decoder(features)), decoder.net(features))


def test_log_probs_are_largest_at_the_decoded_observation():
    """In closed form: at the decoded observation only the constants remain."""
    decoder = randomise(VectorDecoder(FEATURES, 4, width=5, std=0.3))
    features = torch.randn(6, FEATURES, generator=generator(2))
    constant = -24 * (math.log(0.3) + 0.5 * math.log(2 * math.pi))
    found = decoder.log_prob(features, decoder(features))
    assert found.item() == pytest.approx(constant, rel=1e-5)
    image = randomise(ImageDecoder(FEATURES, CHANNELS, depth=DEPTH), scale=0.0)
    grey = torch.full((2, CHANNELS, 64, 64), 255, dtype=torch.uint8)
    expected = -2 * CHANNELS * 64 * 64 * (0.5 * 0.25 + 0.5 * math.log(2 * math.pi))
    assert image.log_prob(features[:2], grey).item() == pytest.approx(expected, rel=1e-5)


# Layer norm


def test_hidden_layers_with_layer_norm():
    """By hand: SiLU((x - mean) / sqrt(var + 1e-3)) of the linear layer's output."""
    net = randomise(mlp(3, 4, 1, 2, layer_norm=True))
    nn.init.ones_(net[1].weight), nn.init.zeros_(net[1].bias)
    x = torch.randn(5, 3, generator=generator(2))
    hidden = net[0](x)
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(net(x), net[3](normed * normed.sigmoid()))


def test_layer_norm_of_images_is_over_channels():
    """Scaling one pixel's channels changes no other pixel, and not even its own, up to epsilon."""
    norm = networks.ChannelNorm(6)
    x = 5 * torch.randn(2, 6, 4, 4, generator=generator(3))
    scaled = x.clone()
    scaled[0, :, 1, 2] *= 10
    torch.testing.assert_close(norm(scaled), norm(x), rtol=1e-2, atol=1e-2)
    expected = nn.functional.layer_norm(x.movedim(1, -1), (6,), eps=1e-3).movedim(-1, 1)
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_images_of_normed_networks_have_the_same_shapes(layer_norm):
    encoder = ImageEncoder(CHANNELS, depth=DEPTH, layer_norm=layer_norm)
    decoder = ImageDecoder(FEATURES, CHANNELS, depth=DEPTH, layer_norm=layer_norm)
    n_norms = sum(isinstance(m, nn.LayerNorm) for net in (encoder, decoder) for m in net.modules())
    assert n_norms == 7 * layer_norm
    assert encoder(images(2, 3)).shape == (2, 3, encoder.outputs)
    assert decoder(torch.randn(2, 3, FEATURES)).shape == (2, 3, CHANNELS, 64, 64)
