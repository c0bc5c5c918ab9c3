"""Python's cyclic garbage collector, paused while modules are imported.

Imports make a million objects that stay and no garbage, yet they start hundreds of collections: without these, torch, MLflow and
matplotlib take less CPU time to import. What the imports at a verb's start leave is frozen: later collections, also those
between training steps, skip it.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_paused_since_start = False


def pause_until_start() -> None:
    """Pause collections until `start` is called. For a program that imports what it needs before its work begins."""
    global _paused_since_start
    _paused_since_start = gc.isenabled()
    gc.disable()


def start() -> None:
    """Collect again, if `pause_until_start` stopped it, and freeze the objects of the imported modules."""
    global _paused_since_start
    if _paused_since_start:
        _paused_since_start = False
        gc.freeze()
        gc.enable()


@contextmanager
def paused() -> Iterator[None]:
    """Pause collections within the block."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
