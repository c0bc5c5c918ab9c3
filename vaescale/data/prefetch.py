"""Prefetching of the shards of the next steps, within a share of the cache."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Condition, Thread
from typing import Self

from vaescale.errors import DataError

FETCHERS = 4
REMEMBERED = 1 << 16
Need = tuple[int, int]


class Ahead:
    """A thread that fetches shards ahead: `with Ahead(needs, fetch, sizes, limit) as ahead: ... ahead.reached(step)`.

    needs: for each step in order, the step and its (epoch, shard) pairs; each pair is fetched once, so that a shard that
    was evicted since comes again in the next epoch. sizes: a shard's bytes. At most `limit` bytes are ahead of the step
    that was reached. An error of `fetch` is ignored, because the reader raises it too.
    """

    def __init__(
        self,
        needs: Iterable[tuple[int, Iterable[Need]]],
        fetch: Callable[[int], None],
        *,
        sizes: Callable[[int], int],
        limit: int,
    ) -> None:
        self._needs, self._fetch, self._sizes, self._limit = needs, fetch, sizes, limit
        self._step, self._ended, self._changed = -1, False, Condition()

    def __enter__(self) -> Self:
        Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()

    def reached(self, step: int) -> None:
        """Record the step that training has reached."""
        with self._changed:
            self._step = step
            self._changed.notify()

    def _run(self) -> None:
        waiting: dict[Need, int] = {}  # the step that needs it first
        asked: OrderedDict[Need, None] = OrderedDict()
        with ThreadPoolExecutor(FETCHERS) as pool:
            for step, needs in self._needs:
                for need in needs:
                    if need in asked:
                        continue
                    waiting[need] = step
                    if not self._wait_for_room(waiting):
                        pool.shutdown(cancel_futures=True)
                        return
                    asked[need] = None
                    if len(asked) > REMEMBERED:
                        asked.popitem(last=False)
                    pool.submit(self._fetch_one, need[1])

    def _fetch_one(self, shard: int) -> None:
        with suppress(DataError, OSError):
            if not self._ended:
                self._fetch(shard)

    def _wait_for_room(self, waiting: dict[Need, int]) -> bool:
        """Wait until the shards of later steps fit. Returns False at the end of training."""
        with self._changed:
            while not self._ended:
                for need in [need for need, step in waiting.items() if step <= self._step]:
                    del waiting[need]
                if sum(self._sizes(shard) for _, shard in waiting) <= self._limit:
                    return True
                self._changed.wait()
        return False
