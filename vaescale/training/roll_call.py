"""The roll call of the ranks that torch's launcher has started: who is missing is said, instead of waiting without a word.

The ranks meet in the launcher's key-value store, before any library joins them: a rank that hangs while it imports, or that a
cluster has stopped, is named.
"""

import os
import time
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from typing import Any

from vaescale.errors import TrainingStopped
from vaescale.system import siblings
from vaescale.system.console import say
from vaescale.system.meeting import EVERY_SECONDS, FIRST_WORD_SECONDS, patience

RETRY_SECONDS = 0.05
NAMED = 8  # ranks in one message


def launcher_s_store(environment: MutableMapping[str, str]) -> Any:
    """A connection to the key-value store of torch's launcher, or None where it has started no other ranks."""
    size = environment.get("WORLD_SIZE", "1")
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or size == "1":
        return None
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    store = TCPStore(
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        int(size),
        is_master=False,
        timeout=timedelta(seconds=patience(environment)),
    )
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"vaescale/{attempt}", store)


def call_the_roll(
    store: Any, *, rank: int, size: int, seconds: float, say: Callable[[str], None] = say
) -> None:
    """Wait until all ranks have called this. The first rank says after ten seconds who is missing, then every half minute.

    seconds: how long to wait. Raises TrainingStopped, on every rank that waits, when that is over.
    """
    store.set(f"here/{rank}", "1")
    start = time.monotonic()
    next_word = FIRST_WORD_SECONDS
    missing = list(range(size))
    while True:
        missing = [other for other in missing if not store.check([f"here/{other}"])]
        if not missing:
            return
        waited = time.monotonic() - start
        names = ", ".join(map(str, missing[:NAMED])) + (", ..." if len(missing) > NAMED else "")
        who = f"rank{'s'[: len(missing) > 1]} {names} of {size}"
        if waited >= seconds:
            siblings.give_up(missing)
            raise TrainingStopped(
                f"{who} did not start within {seconds:.0f} s; look at its process and its log, and run the same command again"
            )
        if waited >= next_word and rank == 0:
            next_word += EVERY_SECONDS
            say(f"waiting for {who}; {seconds - waited:.0f} s are left")
        time.sleep(RETRY_SECONDS)


def meet_in_store(environment: MutableMapping[str, str] = os.environ) -> Any:
    """Call the roll where torch's launcher has started several ranks. Returns its store, or None."""
    store = launcher_s_store(environment)
    if store is not None:
        rank, size = int(environment.get("RANK", "0")), int(environment["WORLD_SIZE"])
        call_the_roll(store, rank=rank, size=size, seconds=patience(environment))
    return store
