"""Files that are written whole or not at all, and lock files that end with the process that holds them."""

import fcntl
import hashlib
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vaescale.system.console import say

ABANDONED_SECONDS = 24 * 3600.0  # another host's temporary file of this age has no living writer
POLL_SECONDS = 0.05
QUIET_SECONDS = 1.0  # a shorter wait for a lock is not mentioned
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "KUBERNETES_POD_NAME")
_thread_locks: dict[Path, threading.Lock] = {}
_reported_unlockable: set[Path] = set()


class LockHeldError(Exception):
    """Another process or thread holds a lock. holder: its host, process id and job, in words."""

    def __init__(self, holder: str) -> None:
        super().__init__(f"held by {holder}")
        self.holder = holder


class NoLocksError(Exception):
    """The file system has no locks. reason: the system's; content: what the lock file holds."""

    def __init__(self, reason: str, content: str) -> None:
        super().__init__(reason)
        self.reason, self.content = reason, content


class _Lock(NamedTuple):
    """A held lock. file: None where the file system has no locks, so that only this process's threads are kept out."""

    path: Path
    file: BinaryIO | None
    thread_lock: threading.Lock


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename it. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_synced(temporary, content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to `path` at the end; delete it if the block raises.

    No other process or thread has the same temporary path. The caller syncs what it writes.
    """
    temporary = path.with_name(f".{path.name}.tmp-{_host_hash()}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def remove_abandoned(folder: Path) -> None:
    """Delete temporary files of this host's processes that have ended, and those of other hosts that are a day old."""
    for path in folder.glob(".*.tmp-*"):
        host, _, rest = path.name.rpartition(".tmp-")[2].partition("-")
        process = rest.partition("-")[0]
        with suppress(FileNotFoundError):  # its writer has just renamed it
            if host == _host_hash() and process.isdecimal():
                is_abandoned = not _is_alive(int(process))
            else:
                is_abandoned = time.time() - path.stat().st_mtime > ABANDONED_SECONDS
            if is_abandoned:
                path.unlink()


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Append a line in one write call, so that lines of several processes do not mix.

    A line without an end, which a killed process left, is ended first.
    """
    content = line.encode() + b"\n"
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                content = b"\n" + content
        while content:  # a full disk takes only some bytes, and raises at the next call
            content = content[file.write(content) :]


def make_readable(path: Path) -> None:
    """Give a file, or all that a folder holds, the permissions of a new file or folder by the process's umask.

    safetensors (0.8) and tempfile make files that only their owner may read.
    """
    folder = path if path.is_dir() else path.parent
    probe = folder / f".{path.name}.mode-{os.getpid()}-{secrets.token_hex(4)}"
    probe.touch()  # the umask cannot be read without a change that other threads would see
    try:
        mode = probe.stat().st_mode & 0o777
    finally:
        probe.unlink()
    for one in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if not one.is_symlink():
            one.chmod(mode | (mode & 0o444) >> 2 if one.is_dir() else mode)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def strict_json(content: Any, *, indent: int | None = None) -> str:
    """JSON text in which NaN and Inf, which JSON does not have, are null. RFC 8259, section 6."""
    try:
        return json.dumps(content, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_with_nulls(content), indent=indent, allow_nan=False)


def _with_nulls(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _with_nulls(value) for name, value in content.items()}
    return [_with_nulls(value) for value in content] if isinstance(content, list | tuple) else content


@contextmanager
def exclusive(path: Path, *, wait_seconds: float = 0.0, waiting: str = "") -> Iterator[None]:
    """Hold the lock file `path` against all other processes and threads; the file is deleted afterwards.

    The kernel releases the lock when the process ends, however it ends. Where the file system has no locks, only this
    process's threads are kept out, which is reported once. wait_seconds: how long to wait for the holder; waiting: a message
    to write meanwhile. Raises LockHeldError when the wait is over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start, is_reported = time.monotonic(), not waiting
    while True:
        try:
            lock = _acquire(path)
            break
        except LockHeldError as error:
            waited = time.monotonic() - start
            if waited >= wait_seconds:
                raise
            if waited > QUIET_SECONDS and not is_reported:
                say(f"{waiting} ({error.holder})")
                is_reported = True
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        try:
            if lock.file is not None:
                release_lock(lock.path, lock.file)
        finally:  # also when the file cannot be deleted
            lock.thread_lock.release()


def acquire_lock(path: Path) -> BinaryIO:
    """Open `path` and lock it for this process. Writes this process's host, id and job into it.

    Raises LockHeldError when another process, or another thread of this one, holds it; NoLocksError where the file system
    has no locks.
    """
    while True:
        file = path.open("ab+", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            content = file.read().decode(errors="replace")
            file.close()
            if isinstance(error, BlockingIOError):
                raise LockHeldError(holder_in(content)) from None
            raise NoLocksError(str(error.strerror), content) from error
        # The last holder may have deleted the file between its opening and its locking here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                with suppress(OSError):  # a full disk; the lock holds without a name
                    sign(file)
                return file
        file.close()


def release_lock(path: Path, file: BinaryIO) -> None:
    """Delete a lock file that this process holds, and release the lock."""
    try:
        path.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # where the file system has no locks
            # Closing does not release the lock while a forked process has the file.
            fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


def sign(file: BinaryIO) -> None:
    """Write this process's host, id and job into an open lock file, for people to read."""
    job = next((os.environ[name] for name in JOB_VARIABLES if os.environ.get(name)), None)
    holder = {"host": socket.gethostname(), "pid": os.getpid(), **({"job": job} if job else {})}
    file.truncate(0)
    file.write(json.dumps(holder).encode())


def holder_in(content: str) -> str:
    """The holder that a lock file names: `host vm, pid 25600`."""
    try:
        return ", ".join(f"{name} {value}" for name, value in json.loads(content).items())
    except (ValueError, AttributeError):
        return content or "a process that has not written its name yet"


def _acquire(path: Path) -> _Lock:
    thread_lock = _thread_locks.setdefault(path.absolute(), threading.Lock())
    if not thread_lock.acquire(blocking=False):
        raise LockHeldError(f"another thread of this process, pid {os.getpid()}")
    try:
        return _Lock(path, _lock_file(path), thread_lock)
    except BaseException:
        thread_lock.release()
        raise


def _lock_file(path: Path) -> BinaryIO | None:
    """Open and lock a file. Returns None, and reports it once, where the file system has no locks."""
    try:
        return acquire_lock(path)
    except NoLocksError as error:
        if path not in _reported_unlockable:
            _reported_unlockable.add(path)
            say(
                f"{path} cannot be locked ({error.reason}); make sure that no two processes write in {path.parent}"
            )
        path.unlink(missing_ok=True)
        return None


def _host_hash() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
