"""Page faults of memory that is made and freed again and again, and huge pages, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource, sys
import torch
if sys.argv[1] != "given back":
    from vaescale.system.host import keep_freed_pages
    keep_freed_pages()
if sys.argv[1] == "huge":
    tensor = torch.ones(16 << 20)  # 64 MiB
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
    sys.exit()
torch.set_num_threads(1)
def churn():
    for _ in range(30):
        torch.ones(4 << 20)  # 16 MiB, 4,096 pages
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def printed(how: str, **environment: str) -> int:
    """Page faults, or KiB on huge pages."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_"))}
    command = [sys.executable, "-c", SCRIPT, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | environment)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_pages_are_used_again() -> None:
    assert printed("kept") < 1000
    assert printed("kept", MALLOC_MMAP_THRESHOLD_="131072") > 10_000, "the environment has the last word"
    assert printed("given back", MALLOC_MMAP_THRESHOLD_="131072") > 10_000, (
        "or there would be nothing to keep"
    )


@pytest.mark.skipif(
    not SWITCH.is_file() or "[madvise]" not in SWITCH.read_text(),
    reason="this kernel gives huge pages always or never",
)
def test_large_tensors_lie_on_huge_pages() -> None:
    assert printed("huge") >= 32 << 10
    assert printed("huge", THP_MEM_ALLOC_ENABLE="0") < 32 << 10, "the environment has the last word"
