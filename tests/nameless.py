"""Programs run as a user without a name, and with a small /dev/shm, in namespaces of Linux."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launching import ROOT

UID = 54321
NAMELESS = ["unshare", "--user", f"--map-user={UID}", f"--map-group={UID}"]
OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


@functools.cache
def _works(*words: str) -> bool:
    return (
        shutil.which(words[0]) is not None
        and subprocess.run(words, capture_output=True, check=False).returncode == 0
    )


def run_nameless(
    code: str, folder: Path, *words: str, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Python code in a folder as a user whom the password file does not know, with only these variables.

    There is no HOME and no git unless the variables say so. The folders of the user who calls belong to this user, too.
    """
    if not _works(*NAMELESS, "true"):
        pytest.skip("unshare cannot map users here")
    return _run([*NAMELESS, *_python(code, *words)], folder, timeout, {"PATH": "/nonexistent", **variables})


def run_with_shared_memory(
    size: str, code: str, folder: Path, *words: str, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Python code in a folder with a /dev/shm of a size, such as 64k."""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    if not _works(*OWN_MOUNTS, "sh", "-c", mount, "sh", "true"):
        pytest.skip("a small /dev/shm cannot be mounted here")
    return _run(
        [*OWN_MOUNTS, "sh", "-c", mount, "sh", *_python(code, *words)], folder, timeout, dict(os.environ)
    )


def _python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", code, *words]


def _run(
    command: Sequence[str], folder: Path, timeout: float, variables: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    environment = {**variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = shutil.which(command[0])
    return subprocess.run(
        [str(program), *command[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
