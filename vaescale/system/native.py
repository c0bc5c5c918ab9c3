"""The package's C++ sources, compiled for this machine's processor when they are first used, and kept in the user's cache.

A source has C functions only and no headers of torch, so that a compilation takes seconds. OpenMP's threads are those of torch: a
second runtime of OpenMP in the process would have threads of its own, which would wait for the same cores.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vaescale.errors import UserError
from vaescale.system.caches import cache_home
from vaescale.system.console import say

if TYPE_CHECKING:
    from torch import Tensor

SWITCH = "VAESCALE_NATIVE"
"""The environment variable that switches the compiled functions off, with the value 0."""

FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # What lets loops use a processor's vectors; neither changes a sum's order nor loses an Inf or a NaN.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    "-Wno-psabi",  # no function outside of a source takes a vector
)
HEADERS = Path(__file__).parent
LONGEST_SECONDS = 120


_switched_off = 0


def load(source: Path) -> ctypes.CDLL | None:
    """The library of a C++ source, or None where it cannot be compiled, with the reason said once, and where functions are switched off.

    None without AVX-512, too: on half as wide vectors the functions are slower than torch's operations.
    """
    return None if _switched_off or not has_wide_vectors() else _loaded(source)


@contextmanager
def switched_off() -> Iterator[None]:
    """Use torch's operations in the block, for what counts or compares them."""
    global _switched_off
    _switched_off += 1
    try:
        yield
    finally:
        _switched_off -= 1


@cache
def _loaded(source: Path) -> ctypes.CDLL | None:
    if os.environ.get(SWITCH, "1") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_built(source)))
    except (OSError, UserError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[0]
        say(f"{source.stem} uses torch's slower operations: {reason}")
        return None
    return library


def place(tensor: "Tensor | None") -> ctypes.c_void_p:
    """Where a tensor's values lie in memory, for a C function; the caller keeps the tensor until it returns."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def loaded(source: Path) -> ctypes.CDLL:
    """The library that `load` has returned in this process, also where it is switched off meanwhile."""
    library = _loaded(source)
    assert library is not None
    return library


@cache
def has_wide_vectors() -> bool:
    """Whether the processor has AVX-512."""
    return Path("/proc/cpuinfo").exists() and "avx512f" in _processor().split()


@cache
def multiplies_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 matrices (AMX), as torch's convolutions and `bottleneck.cpp` do there."""
    return "amx_bf16" in _processor().split()


def _built(source: Path) -> Path:
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise UserError("there is no C++ compiler (apt-get install g++)")
    runtime = _openmp()
    sources = [*sorted(HEADERS.glob("*.h")), source]
    text = "\n".join(
        (*FLAGS, _version(compiler), str(runtime), _processor(), *(path.read_text() for path in sources))
    )
    folder = cache_home() / "vaescale" / "native"
    built = folder / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.so"
    if built.exists():
        return built
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Written aside: another process may compile the same.
    descriptor, aside = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(descriptor)
    try:
        command = [
            compiler,
            *FLAGS,
            f"-I{HEADERS}",
            str(source),
            "-o",
            aside,
            "-Wl,--as-needed",
            str(runtime),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST_SECONDS)
        if done.returncode:
            faults = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise UserError(f"{Path(compiler).name} cannot compile {source.name} ({faults[0].strip()})")
        os.replace(aside, built)
    finally:
        Path(aside).unlink(missing_ok=True)
    return built


@cache
def _version(compiler: str) -> str:
    command = [compiler, "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=LONGEST_SECONDS).stdout


def _openmp() -> Path:
    """The file of the OpenMP runtime that this process has loaded with torch."""
    maps = Path("/proc/self/maps")
    found = re.search(r"/\S*/libgomp[^/\s]*", maps.read_text()) if maps.exists() else None
    if found is None:
        raise UserError("torch's threads are not those of GNU OpenMP")
    return Path(found.group())


def _processor() -> str:
    """What tells processors apart whose instructions differ, for caches that several machines share."""
    text = Path("/proc/cpuinfo").read_text()
    return "\n".join(
        sorted({line for line in text.splitlines() if re.match(r"model name|flags|Features|CPU part", line)})
    )
