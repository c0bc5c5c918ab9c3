"""Page faults of memory that is made and freed again and again, and huge pages, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import resource
import torch
from vaescale.system.host import keep_freed_pages
keep_freed_pages()
torch.set_num_threads(1)
def churn():
    for _ in range(10):
        torch.ones(4 << 20)  # 16 MiB, 4,096 pages
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
tensor = torch.ones(16 << 20)  # 64 MiB
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(faults, next(line.split()[1] for line in lines if line.startswith("AnonHugePages")))
"""
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")


def pages(**environment: str) -> tuple[int, int]:
    """Page faults of the second ten tensors, and MiB of the process on huge pages."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=clean | environment
    )
    faults, kibibytes = map(int, done.stdout.split())
    return faults, kibibytes >> 10


def test_freed_pages_are_used_again() -> None:
    faults, huge = pages(THP_MEM_ALLOC_ENABLE="0")
    assert faults < 1000
    if SWITCH.is_file() and "[always]" in SWITCH.read_text():
        return
    assert huge < 32, "the environment has the last word"
    assert pages(MALLOC_MMAP_THRESHOLD_="131072")[0] > 4000, "the environment has the last word"


@pytest.mark.skipif(
    not SWITCH.is_file() or "[madvise]" not in SWITCH.read_text(),
    reason="this kernel gives huge pages always or never",
)
def test_large_tensors_lie_on_huge_pages() -> None:
    assert pages()[1] >= 32
