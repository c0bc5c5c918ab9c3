"""Processes that read images during training: torch DataLoader workers, started from a clean process.

A fork of the training process would copy the locks of its threads, perhaps while they are held. The workers are forked
from a server process instead (multiprocessing's forkserver), which has imported torch and this package and does nothing else.
"""

import atexit
import errno
import functools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import select
import signal
import sys
import threading
import time
import types
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.data import DataLoader, get_worker_info

from vaescale.data.batch import Fetched, Request
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError

PRELOADED = ["torch.utils.data", "vaescale.data.workers"]
SHARED_MEMORY = "/dev/shm"  # noqa: S108  # where torch and multiprocessing put what processes share
MORE_SHARED_MEMORY = (
    "make it larger (docker run --shm-size=1g, in Kubernetes an emptyDir with medium: Memory mounted there), or set "
    "data.workers=0"
)
BATCHES_AHEAD = 2  # of each worker, torch's default
IGNORED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Workers:
    """Worker processes that serve one pass after another: `with Workers(reader, 2) as workers: workers.fetch(requests)`.

    They start with the first pass. With a count of 0, or where the images are in memory, this process reads.
    """

    def __init__(self, reader: ShardReader, count: int) -> None:
        self.reader = reader
        self._requests = _Requests()
        count = 0 if reader.in_memory else count
        self._loader = DataLoader(
            reader,
            batch_sampler=self._requests,  # type: ignore[arg-type]  # any iterable of what __getitems__ takes
            num_workers=count,
            collate_fn=_as_fetched,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=functools.partial(_prepare_worker, os.getpid()) if count else None,
            multiprocessing_context=_context() if count else None,
            persistent_workers=count > 0,
            prefetch_factor=BATCHES_AHEAD if count else None,
        )
        self._batches: Any = None

    @property
    def start_method(self) -> str | None:
        """How the processes start: `forkserver`; None without processes."""
        context: BaseContext | None = self._loader.multiprocessing_context
        return context.get_start_method() if context else None

    @property
    def pids(self) -> list[int]:
        """The ids of the processes that run now."""
        return [worker.pid for worker in getattr(self._batches, "_workers", ())]

    def fetch(self, requests: Iterable[Request], *, last_pass: bool = False) -> Iterator[Fetched]:
        """The requested batches in order. The processes start before this returns. last_pass: end them after it.

        The batches raise DataError for what a worker raises, and for a worker that was killed.
        """
        self._requests.current = requests
        if self._loader.num_workers:
            _refuse_no_semaphores()
            start_server()
            _end_workers_at_exit()
        with _one_sentence(with_processes=bool(self.pids)), _without_main():
            self._batches = iter(self._loader)
        _ACTIVE.add(self)
        return self._pass(self._batches, last_pass=last_pass)

    def close(self) -> None:
        """End the processes, which ignore the SIGTERM that torch, and Python at its exit, would send them."""
        if not getattr(self._batches, "_shutdown", True):
            self._batches._shutdown_workers()
            for process in self._batches._workers:
                process.kill()
        # The loader and the batches refer to the queues, whose semaphores the system keeps while somebody does.
        self._batches = self._loader._iterator = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pass(self, batches: Iterator[Fetched], *, last_pass: bool) -> Iterator[Fetched]:
        try:
            with _one_sentence(with_processes=self._loader.num_workers > 0):
                yield from batches
        finally:
            if last_pass:
                self.close()


def refuse_small_shared_memory(workers: int, batch_bytes: int, *, ranks_here: int) -> None:
    """Raise DataError when the batches that all workers of a node read ahead do not fit in the node's shared memory.

    workers: of each rank; batch_bytes: of the images of one batch.
    """
    needed = ranks_here * workers * BATCHES_AHEAD * batch_bytes
    try:
        total = os.statvfs(SHARED_MEMORY)
    except OSError:  # another system
        return
    if needed > total.f_blocks * total.f_frsize:
        raise DataError(
            f"{SHARED_MEMORY} holds {total.f_blocks * total.f_frsize} bytes, less than the {needed} bytes of batches that "
            f"{ranks_here * workers} reading processes hold ready; {MORE_SHARED_MEMORY}"
        )


def start_server() -> None:
    """Start the process from which workers are forked, if it does not run yet. Returns while it is still importing torch."""
    multiprocessing.forkserver.set_forkserver_preload(PRELOADED)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    try:
        # A cluster, and Ctrl-C, signal all processes of a job. A blocked signal stays blocked in what this starts; the
        # resource tracker's own start unblocks some, and so comes first.
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        with _without_main(), _without_working_folder():
            multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_workers() -> None:
    """End all worker processes and remove multiprocessing's files, in a process that skips Python's own shutdown."""
    for workers in list(_ACTIVE):
        workers.close()
    multiprocessing.util._exit_function()  # type: ignore[attr-defined]


class _Requests:
    """The batch sampler of a DataLoader: the requests of the pass that begins."""

    current: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.current)


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the main module from multiprocessing, which would run a user's script again in each worker."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _without_working_folder() -> Iterator[None]:
    """Keep the working folder from the import path of a Python that starts: a folder `vaescale` in it, such as that of a clone, would
    hide a package that is installed as editable.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


@contextmanager
def _one_sentence(*, with_processes: bool) -> Iterator[None]:
    """Raise what a worker raises as one sentence, without the page of traceback that torch puts before it."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).strip().rpartition("DataError: ")[2]) from None
    except (RuntimeError, EOFError, OSError) as error:
        if not with_processes or not _comes_from_a_death(error):
            raise
        raise DataError(
            "a reading process was killed, perhaps for memory; lower data.workers or data.global_batch"
        ) from error


def _comes_from_a_death(error: Exception) -> bool:
    """Whether a worker died instead of raising: torch reports that it is gone, or what it read does not arrive."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker (pid" in str(error)
    return "in DataLoader worker process" not in str(error)


_ACTIVE: "weakref.WeakSet[Workers]" = weakref.WeakSet()


@functools.cache
def _end_workers_at_exit() -> None:
    """End open workers at Python's exit, which would wait for them. Registers this once."""

    def end() -> None:
        for workers in list(_ACTIVE):
            workers.close()

    atexit.register(end)


def _refuse_no_semaphores() -> None:
    """Raise DataError where processes cannot make the semaphores of their queues."""
    try:
        _context().Lock()
    except OSError as error:
        mount = "mount a folder that can be written there, or set data.workers=0"
        raise DataError(
            f"reading processes cannot start, because semaphores cannot be made in {SHARED_MEMORY} ({error.strerror}); "
            f"{MORE_SHARED_MEMORY if error.errno == errno.ENOSPC else mount}"
        ) from error


def _context() -> BaseContext:
    return multiprocessing.get_context("forkserver")


def _prepare_worker(parent: int, worker: int) -> None:  # noqa: ARG001
    """Ignore the signals that end training, and end with the process that reads, whose number is `parent`.

    A cluster and Ctrl-C signal all processes of a job: training saves first, then ends its workers. A worker is a child of
    the forkserver, so the kernel does not tell it that training was killed.
    """
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True, name="end-with-parent").start()


def _end_with(parent: int) -> None:
    """Wait until a process has ended, then end this one."""
    with suppress(ProcessLookupError):
        if hasattr(os, "pidfd_open"):
            ended = select.poll()
            ended.register(os.pidfd_open(parent), select.POLLIN)
            ended.poll()
        else:
            while True:
                os.kill(parent, 0)
                time.sleep(1.0)
    os._exit(0)


def _as_fetched(batch: Any) -> Any:
    """Return a batch, whose tensors `__getitems__` made already; a worker moves them to shared memory first.

    torch does the same later, in a thread whose errors nobody sees: the training process would wait for the batch for ever.
    """
    if get_worker_info() is not None:
        for tensor in (batch.images, batch.labels, batch.usable, batch.vectors):
            if tensor is None:
                continue
            try:
                tensor.share_memory_()
            except RuntimeError as error:
                reason = str(error).rpartition(": ")[
                    2
                ]  # of "unable to allocate ... for file <...>: No space left"
                raise DataError(
                    f"a reading process cannot hand over a batch of {batch.images.numel()} bytes in {SHARED_MEMORY} "
                    f"({reason}); {MORE_SHARED_MEMORY}"
                ) from error
    return batch
