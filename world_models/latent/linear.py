"""`nn.Linear` through oneDNN on a CPU, where PyTorch's own choice of library can be half as fast.

PyTorch multiplies float32 matrices with MKL, which keeps to AVX2 on CPUs that are not Intel's; the
convolutions beside go through oneDNN, which uses what the CPU has. At 2500 x 400 x 400 on a Zen 5
that is 180 against 410 GFLOP/s. On Intel's the two are alike. Same numbers up to round-off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# The operator is what torch.compile itself emits for a linear layer on a CPU, and private: where it
# is missing, F.linear takes its place.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
MIN_WORK = 2**20  # multiply-accumulates; below, the operator's set-up costs more than it saves


class Linear(nn.Linear):
    """The same layer, same parameters and initialisation."""

    def forward(self, x: Tensor) -> Tensor:
        return fast_linear(x, self.weight, self.bias)


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b: [..., I], [O, I], [O] -> [..., O]; W whole or transposed, not a slice (slow)."""
    if not _is_plain(x, weight) or x.numel() * len(weight) < MIN_WORK:
        return linear(x, weight, bias)
    out: Tensor = _OneDNNLinear.apply(x.flatten(0, -2), weight, bias)
    return out.unflatten(0, x.shape[:-1])


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    return (
        HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.peek_interpreter_stack() is None  # inside torch.func: jvp, vmap
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
