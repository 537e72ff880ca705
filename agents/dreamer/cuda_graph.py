"""A function of tensors as one CUDA graph: recorded once, then launched by a single call.

A DreamerTPX update consists of some ten thousand small kernels, which a GPU finishes faster than
Python can launch them. The recipe is PyTorch's ("CUDA semantics", whole-network capture).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

EAGER_CALLS = 3  # before recording: Adam's moments and workspaces are created at first use

Result = TypeVar("Result")


class GraphedFunction(Generic[Result]):
    """Calls `function` eagerly a few times, then records it, then replays the recording.

    Args:
        function: maps nested tuples of CUDA tensors to nested tuples of CUDA tensors. It must not
            draw random numbers or wait for a result on the host, must keep its state in tensors
            that it changes in place, and must be given the same shapes at each call.
    """

    def __init__(self, function: Callable[..., Result]) -> None:
        self.function = function
        self._eager_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Any = None
        self._outputs: Any = None

    def __call__(self, *inputs: Any) -> Result:
        """Return the function's result, which later calls do not overwrite.

        Raises:
            ValueError: the inputs do not have the recorded shapes.
        """
        if self._eager_calls < EAGER_CALLS:
            self._eager_calls += 1
            return self._on_side_stream(inputs)
        if self._graph is None:
            self._record(inputs)
        self._load(inputs)
        assert self._graph is not None
        self._graph.replay()
        result: Result = tree_map(_copy, self._outputs)  # the next replay overwrites them
        return result

    def _on_side_stream(self, inputs: Any) -> Result:
        """Run eagerly on a side stream, as PyTorch requires before a recording."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            # The warning says that the optimiser is not being recorded; later calls will be.
            warnings.filterwarnings("ignore", ".*capturable=True")
            result = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self, inputs: Any) -> None:
        """Record the function; nothing is computed yet."""
        self._inputs = tree_map(_copy, inputs)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = self.function(*self._inputs)

    def _load(self, inputs: Any) -> None:
        for own, given in zip(tree_leaves(self._inputs), tree_leaves(inputs), strict=True):
            if not isinstance(own, Tensor):
                continue
            if own.shape != given.shape:
                raise ValueError(
                    f"a CUDA graph takes one shape, {list(own.shape)}, got {list(given.shape)}; "
                    "keep batch_size and sequence_length, or choose cuda_graph=False"
                )
            own.copy_(given)


def _copy(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x
