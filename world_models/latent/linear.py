"""`nn.Linear` with oneDNN on the CPU, which can be twice as fast as PyTorch's default library.

PyTorch multiplies float32 matrices with MKL, which is limited to AVX2 on CPUs not made by Intel.
oneDNN, which PyTorch uses for convolutions, exploits all instructions of the CPU. At 2500 x 400 x
400 on a Zen 5, MKL reaches 180 and oneDNN 410 GFLOP/s. On Intel CPUs and on a Zen 4, whose vector
units are no wider than AVX2, the two are equally fast. The results are equal up to round-off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# torch.compile emits this operator for linear layers on the CPU. It is private, so F.linear is used
# where it is missing.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Multiply-accumulates; with fewer, the operator's overhead exceeds its gain: on a Zen 4 it takes 91
# instead of 65 µs at 256 x 100 x 100, and 117 instead of 72 µs for the weights' gradient.
MIN_WORK = 6_000_000


class Linear(nn.Linear):
    """`nn.Linear`, with the same parameters and initialisation, but faster on some CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        return fast_linear(x, self.weight, self.bias)


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, [..., I], [O, I], [O] -> [..., O].

    Args:
        x: [..., I].
        weight: [O, I], contiguous or transposed; a slice of a larger matrix would be slow.
        bias: [O] or None.
    """
    if not is_plain(x, weight) or x.numel() * len(weight) < MIN_WORK:
        return linear(x, weight, bias)
    out: Tensor = _OneDNNLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], len(weight))


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether this is float32 on the CPU that nothing traces, maps, or runs in bfloat16."""
    return (
        HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None  # not inside torch.func
    )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a bᵀ + bias."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return out


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return (
            _product(g, weight.T) if needs_x else None,
            _product(g.T, x.T) if needs_weight else None,
            g.sum(0) if needs_weight and ctx.has_bias else None,
        )
