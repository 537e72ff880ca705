"""A function of tensors as one CUDA graph: recorded once, then launched by one call.

A DreamerTPX update is some ten thousand small kernels; a GPU finishes them faster than Python can
launch them. The recipe is PyTorch's ("CUDA semantics", whole-network capture).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

EAGER_CALLS = 3  # what is made at first use (Adam's moments, workspaces) must be there to record

Result = TypeVar("Result")


class GraphedFunction(Generic[Result]):
    """`function`, called as usual a few times, then recorded, then replayed.

    Args:
        function: of nested tuples of CUDA tensors, to the same. It must not wait for a result on
            the host or draw random numbers, must keep its state in tensors that it changes in
            place, and is given the same shapes at each call.
    """

    def __init__(self, function: Callable[..., Result]) -> None:
        self.function = function
        self._eager_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Any = None
        self._outputs: Any = None

    def __call__(self, *inputs: Any) -> Result:
        """The function's result, in memory of its own.

        Raises:
            ValueError: the inputs have not the shapes that were recorded.
        """
        if self._eager_calls < EAGER_CALLS:
            self._eager_calls += 1
            return self._on_side_stream(inputs)
        if self._graph is None:
            self._record(inputs)
        self._load(inputs)
        assert self._graph is not None
        self._graph.replay()
        result: Result = tree_map(_copy, self._outputs)  # the next replay writes over them
        return result

    def _on_side_stream(self, inputs: Any) -> Result:
        """As PyTorch asks of the calls before a recording."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            # Of optimisers that could be recorded and are not: they will be.
            warnings.filterwarnings("ignore", ".*capturable=True")
            result = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self, inputs: Any) -> None:
        """Nothing is computed while recording."""
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
