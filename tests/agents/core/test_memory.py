"""The allocator keeps freed memory: repeating an allocation causes hardly any page faults."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from totalprop import DAAPPO, PIPPS, DreamerTPX  # as where it is used: a new heap has no small gaps
from totalprop.agents.core.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(32, 1024, 1024)  # 128 MiB
    del x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
kept = keep_freed_memory()
print(kept, given_back, min(faults() for _ in range(8)))  # now and then the heap moves on
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_freed_blocks_are_used_again():
    # In a process of its own, since the setting cannot be undone.
    command = [sys.executable, "-c", SCRIPT]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kept, given_back, again = output.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert int(again) < 0.1 * int(given_back)
