"""Processes for the work on shards, or none where there is little."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from vaescale.errors import DataError


@contextmanager
def pool_of(jobs: int) -> Iterator[Callable[..., Future[Any]]]:
    """Yield `submit(function, *arguments)` to `jobs` processes; with one job, this process does the work at once."""
    if jobs <= 1:
        yield _at_once
        return
    # Not forked: a source may have threads of its own, and a fork would copy their locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_leave_interrupts)
    try:
        yield pool.submit
    except BrokenProcessPool as error:
        raise DataError(
            "a writing process was killed, perhaps for memory; lower --jobs and repeat the command"
        ) from error
    except BaseException:
        # Shards under way are abandoned: one may take minutes, and is written again.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    submit: Callable[..., Future[Any]],
    jobs: int,
    function: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
) -> Iterator[Any]:
    """Yield the results of `function` for the arguments of each call, with a few calls under way in each process."""
    pending: deque[Future[Any]] = deque()
    for arguments in calls:
        pending.append(submit(function, *arguments))
        if jobs <= 1 or len(pending) > 2 * jobs:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _leave_interrupts() -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal: the first one handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _at_once(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(function(*arguments))
    return future
