"""What the program asks of the C library's allocator."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from lit_prune.cli.memory import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(15):
    torch.ones(1 << 24)  # 64 MiB, written and freed
    if turn == 4:  # the heap has its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
pages = 10 * (1 << 26) // resource.getpagesize()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / pages)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")
def test_a_freed_tensor_is_reused_without_touching_its_pages_anew():
    found = {
        way: float(
            subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True, check=True).stdout
        )
        for way in ("keep", "leave")
    }
    assert found["keep"] < 0.01 < found["leave"]  # as a share of the pages written
