"""Page faults of memory that is made and freed again and again, in processes of their own."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
if sys.argv[1] == "kept":
    from vaescale.system.host import keep_freed_pages
    keep_freed_pages()
torch.set_num_threads(1)
def churn():
    for _ in range(30):
        torch.ones(4 << 20)  # 16 MiB, 4,096 pages
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | environment)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_pages_are_used_again() -> None:
    assert faults("kept") < 1000
    assert faults("kept", MALLOC_MMAP_THRESHOLD_="131072") > 10_000, "the environment has the last word"
    assert faults("given back", MALLOC_MMAP_THRESHOLD_="131072") > 10_000, "or there would be nothing to keep"
