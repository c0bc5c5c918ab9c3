"""DeepSpeed's operator for collectives in shared memory, which a machine without GPUs compiles at its first start.

torch's extension builder guards a build by the bare existence of a file `lock`. A build that was killed leaves it, and every
later start waits for it without a word and without an end. Here one process of a user builds at a time, under a lock of the
kernel's, and knows what an earlier build has left.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vaescale.errors import UserError
from vaescale.system.console import say
from vaescale.system.files import LockHeldError, exclusive

BUILDING = "vaescale-builds"  # exists while a process of this package builds
PATIENCE_SECONDS = 600.0
QUIET_SECONDS = 10.0
POLL_SECONDS = 0.5


def build_extensions(*, patience: float = PATIENCE_SECONDS) -> list[str]:
    """Compile what DeepSpeed needs on a CPU, if it is not there yet. Returns the operators' names.

    patience: seconds to wait for another process that builds it. Raises UserError when that is over, with the file to delete.
    """
    # DeepSpeed prints to stdout, which is reserved for a verb's result.
    with contextlib.redirect_stdout(sys.stderr):
        from deepspeed.accelerator import get_accelerator

        builder: Any = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is None or not builder.is_compatible(verbose=False):
            return []
        if comes_compiled(builder.name):
            return [builder.NAME]
        folder = build_folder(builder.NAME)
        if not is_built(folder, builder.NAME):
            with building(folder, patience=patience):
                builder.load(verbose=False)
    return [builder.NAME]


def comes_compiled(name: str) -> bool:
    """Whether DeepSpeed was installed with this operator, as in a container image (DS_BUILD_SHM_COMM=1)."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(name, False))


def build_folder(name: str) -> Path:
    """The folder in which torch builds the extension of this name."""
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    if not os.environ.get("TORCH_EXTENSIONS_DIR"):
        import torch

        device = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
        root = os.path.join(root, f"py{sys.version_info.major}{sys.version_info.minor}_{device}")
    return Path(root, name)


def is_built(folder: Path, name: str) -> bool:
    """Whether an extension is there, and nobody is building it."""
    return (folder / f"{name}.so").is_file() and not (folder / "lock").exists()


@contextlib.contextmanager
def building(folder: Path, *, patience: float) -> Iterator[None]:
    """Keep other processes of this package from building in a folder within the block, and remove what a killed build has left.

    Waits for builds of other programs, whose file `lock` may as well be left over: after ten seconds it is named, and after
    `patience` seconds UserError is raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own, foreign = folder / "vaescale.lock", folder / "lock"
    try:
        with exclusive(
            own, wait_seconds=patience, waiting=f"waiting for a build of DeepSpeed's operator in {folder}"
        ):
            mark = folder / BUILDING
            if mark.exists():  # its process was killed, or the kernel would hold the lock
                foreign.unlink(missing_ok=True)
            _wait_for(foreign, patience)
            mark.touch()
            yield
            mark.unlink(missing_ok=True)
    except LockHeldError as error:
        raise UserError(
            f"DeepSpeed's operator has been built in {folder} for {patience:.0f} s ({error.holder}); end that process, or try "
            "again when it is done"
        ) from None


def _wait_for(lock: Path, patience: float) -> None:
    """Wait until the file is gone. Raises UserError when the patience is over."""
    start, is_said = time.monotonic(), False
    while lock.exists():
        waited, age = time.monotonic() - start, time.time() - lock.stat().st_mtime
        words = f"{lock} ({age:.0f} s old) says that another program builds DeepSpeed's operator"
        if waited >= patience:
            raise UserError(f"{words}; if none does, it is left from one that was killed: delete the file")
        if waited >= QUIET_SECONDS and not is_said:
            is_said = True
            say(f"{words}; waiting up to {patience:.0f} s; if none does, delete the file")
        time.sleep(POLL_SECONDS)
