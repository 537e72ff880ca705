"""Two convolutions of the image networks, computed on the CPU in a form that oneDNN is faster at.

oneDNN's convolutions reach two thirds of a core's peak where there are many channels and many
outputs. The encoder's last layer has 2 x 2 outputs, the decoder's last one 3 channels, and there it
reaches a third of that. Parameters, initialisation and results, up to round-off, are PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pixel_shuffle
from torch.nn.grad import conv2d_weight

from totalprop.world_models.latent.linear import fast_linear, is_plain


class PatchConv2d(nn.Conv2d):
    """`nn.Conv2d` without padding, as a product of the patches below its few outputs."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H', W']."""
        if not is_plain(x, self.weight):
            return super().forward(x)
        (height, width), (down, right) = self.kernel_size, self.stride
        x = x.movedim(1, -1)
        rows = range(0, x.shape[1] - height + 1, down)
        columns = range(0, x.shape[2] - width + 1, right)
        patches = [x[:, i : i + height, j : j + width].flatten(1) for i in rows for j in columns]
        weight = self.weight.movedim(1, -1).flatten(1)
        out = fast_linear(torch.stack(patches, 1), weight, self.bias)
        return out.mT.unflatten(-1, (len(rows), len(columns)))


class FewChannelsConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` to few channels, with stride 2 and no padding.

    Args:
        inputs: channels of the input.
        outputs: channels O of the output.
        kernel_size: K, an even number.
        bias: whether there is one.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, *, bias: bool = True) -> None:
        super().__init__(inputs, outputs, kernel_size, stride=2, bias=bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[N, C, H, W] -> [N, O, 2 H + K - 2, 2 W + K - 2]."""
        if not is_plain(x, self.weight) or output_size is not None:
            return super().forward(x, output_size)
        out: Tensor = _SubPixelConvolution.apply(x, self.weight, self.bias)
        return out


class _SubPixelConvolution(torch.autograd.Function):
    """A transposed convolution of stride 2 as a convolution that makes 2 x 2 pixels at once.

    Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?". Only the
    forward pass is faster that way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        inputs, outputs, size, _ = weight.shape
        half = size // 2
        # Pixel 2 p + a gets Σ_j weight[2 j + a] x[p - j].
        taps = weight.view(inputs, outputs, half, 2, half, 2).flip(2, 4)
        taps = taps.permute(1, 3, 5, 0, 2, 4).reshape(4 * outputs, inputs, half, half)
        bias = None if bias is None else bias.repeat_interleave(4)
        return pixel_shuffle(conv2d(x, taps, bias, padding=half - 1), 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        # The adjoint of the convolution with these weights, which maps g to the shape of x.
        return (
            conv2d(g, weight, stride=2) if needs_x else None,
            conv2d_weight(g, list(weight.shape), x, stride=2) if needs_weight else None,
            g.sum((0, 2, 3)) if needs_weight and ctx.has_bias else None,
        )
