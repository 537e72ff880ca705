"""The allocator keeps what a step frees: a request that fits into a freed block faults no page.

A request of the same size need not fit. PyTorch aligns to 64 bytes, for which glibc looks for a
block that is larger by the alignment; where something small was allocated right behind the freed
block, the next one takes new memory, up to seven times in a row. So the sizes here fall: each fits.
"""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from totalprop import DAAPPO, PIPPS, DreamerTPX  # as where it is used: a new heap has no small gaps
from totalprop.agents.core.memory import keep_freed_memory

def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(n)
    del x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

sizes = [32 * 2**20 - i * 2**14 for i in range(7)]  # 128 MiB, each 64 KiB less than the last
given_back = min(faults(n) for n in sizes)
kept = keep_freed_memory()
faults(sizes[0])
print(kept, given_back, *(faults(n) for n in sizes[1:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's setting")
def test_freed_blocks_are_used_again():
    # In a process of its own: the setting cannot be taken back.
    command = [sys.executable, "-c", SCRIPT]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kept, given_back, *again = output.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert max(map(int, again)) < 0.01 * int(given_back)
