"""Versions, devices, the way processes were launched, and missing software; under a launcher, a test of communication."""

import importlib.metadata
import os
import platform
import shutil
import statistics
import time
from typing import Any

import vaescale
from vaescale.errors import UserError
from vaescale.system.host import cores
from vaescale.system.packages import OPTIONAL, OTHERS, TRAINING

MOST_SECONDS = 600
EXCHANGED = 1 << 22  # float32 numbers: 16 MiB
NEEDED = (*TRAINING, *OTHERS)
PROGRAMS = {"g++": "training.compile and faster normalization on CPUs", "git": "the git revision of runs"}


def doctor(*, seconds: float = 2.0) -> dict[str, Any]:
    """Return versions, devices, launch and missing software; under a launcher also the result of an exchange of numbers.

    seconds: duration of the exchange between the processes. Raises UserError for a duration out of bounds.
    """
    # By hand: this function also runs where pydantic is missing.
    if not 0 < seconds <= MOST_SECONDS:
        raise UserError(f"seconds (={seconds!r}) must be above 0 and at most {MOST_SECONDS}")
    versions = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    gpus: list[str] = []
    bf16 = False
    if versions["torch"]:
        import torch

        gpus, bf16 = _gpus()
        versions["torch"] = (
            torch.__version__
        )  # the package's own version does not tell the build, such as +cu130
    missing = [f"{name}: pip install -c constraints.txt {name}" for name in NEEDED if versions[name] is None]
    missing += [f"{name} (for {use}): optional" for name, use in OPTIONAL.items() if versions[name] is None]
    missing += [
        f"{name} (for {use}): optional" for name, use in PROGRAMS.items() if shutil.which(name) is None
    ]
    return {
        "vaescale": vaescale.__version__,
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cores": cores(),
        "gpus": gpus,
        "bf16": bf16,
        "launch": _launch(),
        **(_exchange(seconds) if "WORLD_SIZE" in os.environ else {}),
        "missing": missing,
    }


def _exchange(seconds: float) -> dict[str, Any]:
    """All-reduce on all processes for `seconds`, in the layout that the launcher asks for."""
    import torch

    from vaescale import comm
    from vaescale.training import launch as backends

    launch = backends.start()
    device = launch.accelerator.device
    try:
        values = torch.ones(EXCHANGED, device=device)
        sums = set()
        begun, times = time.perf_counter(), []
        # All ranks must stop at the same round: rank 0's clock decides.
        while comm.broadcast_object(time.perf_counter() - begun < seconds):
            start = time.perf_counter()
            total = comm.all_reduce_plain(values)
            sums |= {float(total[0]), float(total[-1])}
            times.append(time.perf_counter() - start)
        right = sums == {float(comm.world_size())}
        median = statistics.median(times)
        size = values.numel() * values.element_size()
        return {
            "layout": backends.layout(launch.strategy),
            "world_size": comm.world_size(),
            "backend": comm.backend(),
            "exchange": f"{len(times)} all-reduces of {size / 2**20:.0f} MiB, median {1e3 * median:.1f} ms"
            + ("" if right else f", WRONG SUMS {sorted(sums)}"),
            # The bytes that each process sends in a ring: the bus bandwidth of NCCL's tests.
            "bus_gigabytes_per_second": round(2 * (1 - 1 / comm.world_size()) * size / median / 1e9, 3),
        }
    finally:
        backends.stop(launch.accelerator)


def _gpus() -> tuple[list[str], bool]:
    """The GPUs' names, and whether the device that training uses computes in bf16."""
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return names, torch.cuda.is_bf16_supported() if names else True


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _launch() -> str:
    """A sentence on the launch of this process."""
    try:
        from vaescale.training.launch import refuse_lost_processes

        refuse_lost_processes(os.environ)
    except (UserError, ImportError) as error:
        return str(error)
    if "WORLD_SIZE" in os.environ:
        return f"process {os.environ.get('RANK', '0')} of {os.environ['WORLD_SIZE']}, started by a launcher"
    return "one process"
