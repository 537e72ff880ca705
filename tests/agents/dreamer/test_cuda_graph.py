"""The bookkeeping of a recorded function, on a CPU that plays the part of the GPU.

That a graph computes what the function does is tested on a GPU: test_dreamer_update.py.
"""

import contextlib
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves

from totalprop.agents.dreamer import cuda_graph
from totalprop.agents.dreamer.cuda_graph import EAGER_CALLS, GraphedFunction


class Input(NamedTuple):
    x: torch.Tensor
    rows: torch.Tensor | None


class Output(NamedTuple):
    named: dict
    rest: tuple


class Recorder:
    """The parts of torch.cuda that `GraphedFunction` uses; a replay calls the function again."""

    def __init__(self):
        self.graphed = None
        self.calls, self.recordings, self.replays = 0, 0, 0

    def function(self, given, y):
        self.calls += 1
        return Output({"sum": given.x + y}, (given.x * y,))

    def graph(self, _):
        self.recordings += 1
        return contextlib.nullcontext()

    def replay(self):
        self.replays += 1
        fresh = self.function(*self.graphed._inputs)
        for old, new in zip(tree_leaves(self.graphed._outputs), tree_leaves(fresh), strict=True):
            old.copy_(new)


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    found.graphed = GraphedFunction(found.function)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fake = SimpleNamespace(
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda _: contextlib.nullcontext(),
        CUDAGraph=lambda: SimpleNamespace(replay=found.replay),
        graph=found.graph,
    )
    monkeypatch.setattr(cuda_graph.torch, "cuda", fake)
    return found


def test_every_call_gives_the_result_of_its_own_inputs(recorder):
    results = []
    for i in range(EAGER_CALLS + 3):
        results.append(recorder.graphed(Input(torch.full((2,), float(i)), None), torch.ones(2)))
    for i, result in enumerate(results):  # later replays have not written over earlier results
        assert result.named["sum"].tolist() == [i + 1.0] * 2
        assert result.rest[0].tolist() == [float(i)] * 2
    assert (recorder.recordings, recorder.replays) == (1, 3)


def test_the_caller_s_tensors_are_not_the_graph_s(recorder):
    x, y = torch.zeros(2), torch.ones(2)
    for _ in range(EAGER_CALLS + 1):
        recorder.graphed(Input(x, None), y)
    x.fill_(5.0)
    assert recorder.graphed._inputs[0].x.tolist() == [0.0, 0.0]


def test_another_shape_is_an_error(recorder):
    for _ in range(EAGER_CALLS + 1):
        recorder.graphed(Input(torch.zeros(2), torch.zeros(3)), torch.ones(2))
    with pytest.raises(ValueError, match=r"one shape, \[2\], got \[4\]; keep batch_size"):
        recorder.graphed(Input(torch.zeros(4), torch.zeros(3)), torch.ones(4))
