"""The convolutions of their own form, against PyTorch's: results and all gradients."""

import pytest
import torch
from torch.func import vmap
from torch.testing import assert_close

from totalprop.world_models.latent.convolution import FewChannelsConvTranspose2d, PatchConv2d

WANTED = {"all": slice(None), "of input": slice(1), "of parameters": slice(1, None)}


def layers(kind, inputs, outputs, size, **settings):
    """The layer and PyTorch's, with the same parameters."""
    plain = kind.__base__(inputs, outputs, size, **{"stride": 2, **settings})
    if kind is FewChannelsConvTranspose2d:
        own = kind(inputs, outputs, size, **settings)
    else:
        own = kind(inputs, outputs, size, **{"stride": 2, **settings})
    own.load_state_dict(plain.state_dict())
    return own, plain


def results(layer, x, wanted):
    """The output, and gradients of a weighted sum of it."""
    x = x.clone().requires_grad_()
    out = layer(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    variables = [x, *layer.parameters()][WANTED[wanted]]
    return out, *torch.autograd.grad((out * weights).sum(), variables)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 6, 6, 6), (1, 6, 9, 7), (3, 6, 4, 5)])
def test_convolution_by_patches(shape, bias, wanted):
    own, plain = layers(PatchConv2d, 6, 8, (4, 3), stride=(2, 1), bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_close(results(own, x, wanted), results(plain, x, wanted))


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("size", "shape"), [(6, (4, 5, 7, 7)), (4, (1, 5, 3, 6)), (2, (2, 5, 1, 1))]
)
def test_transposed_convolution_to_few_channels(size, shape, bias, wanted):
    own, plain = layers(FewChannelsConvTranspose2d, 5, 3, size, bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_close(results(own, x, wanted), results(plain, x, wanted))


@pytest.mark.parametrize("kind", [PatchConv2d, FewChannelsConvTranspose2d])
def test_with_frozen_parameters(kind):
    own, plain = layers(kind, 4, 3, 4)
    for layer in (own, plain):
        layer.requires_grad_(False)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert_close(results(own, x, "of input"), results(plain, x, "of input"))


@pytest.mark.parametrize("kind", [PatchConv2d, FewChannelsConvTranspose2d])
def test_pytorchs_form_where_theirs_does_not_apply(kind):
    """In float64, in torch.func and under autocast, bit for bit."""
    own, plain = layers(kind, 4, 3, 4)
    x = torch.randn(5, 2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert_close(vmap(own)(x), vmap(plain)(x), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert own(x[0]).dtype == torch.bfloat16
        assert_close(own(x[0]), plain(x[0]), rtol=0, atol=0)
    own, plain = own.double(), plain.double()
    assert_close(own(x[0].double()), plain(x[0].double()), rtol=0, atol=0)
