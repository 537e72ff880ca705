"""What a run imports on its way: a process that is forked from one that has it starts in no time.

This module itself imports next to nothing.
"""

from __future__ import annotations

from totalprop.agents.registry import AGENTS

PRELOAD = ["totalprop.scripts.train", *(f"totalprop.agents.{name}" for name in AGENTS)]
PRELOAD += ["torch._dynamo", "torch.fx.experimental.symbolic_shapes", "matplotlib.figure"]
