"""This machine: how many cores a process may use, how busy it is, and how its C library keeps freed memory."""

import contextlib
import ctypes
import os
import signal
import sys

import psutil

MEGABYTE = 1e6
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # which torch reads at its first allocation
# A cluster's requests to stop, which `vaescale launch` keeps from torch's launcher.
HELD_BACK = (signal.SIGTERM, signal.SIGUSR1)
SET_PARENT_DEATH_SIGNAL = 1  # from sys/prctl.h
# From malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3


def cores() -> int:
    """The number of cores that this process may run on; all of the machine's where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def take_signals() -> None:
    """Receive a cluster's requests to stop. A rank inherits a mask without them from its launcher."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)


def follow_parent(number: signal.Signals) -> None:
    """Ask Linux to send this process a signal when its parent ends, also if that is killed. Does nothing on other systems."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, int(number))


def system_metrics() -> dict[str, float]:
    """Use of the whole machine in percent and megabytes, under the names of MLflow's system metrics.

    Rates are averages since the last call.
    """
    import torch

    memory = psutil.virtual_memory()
    metrics = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
    }
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        metrics[f"system/gpu_{number}_memory_usage_megabytes"] = (total - free) / MEGABYTE
        metrics[f"system/gpu_{number}_memory_usage_percentage"] = 100 * (1 - free / total)
    return metrics


def keep_freed_pages() -> None:
    """Make glibc keep up to 2 GiB of freed memory, and return blocks of 1 GiB and more at once; and have torch ask for huge pages.

    By default glibc returns blocks above 128 KiB to the kernel, which zeroes their pages again for the next tensor: the
    evaluation of a small convolutional network on one core spent 11.5 of 24.8 s in the kernel, and 2.1 of 15.7 s with
    this setting. On pages of 2 MiB, which Linux gives to tensors of that size and more, training steps of convolutional networks take 1 to 7% less
    (tools/bench/README.md). To be called before torch makes a tensor. Does nothing on other systems, or where the environment configures malloc itself.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    os.environ.setdefault(HUGE_PAGES, "1")
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(TOP_PAD, 64 << 20)
