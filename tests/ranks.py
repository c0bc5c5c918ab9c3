"""A function on several gloo ranks of this machine."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a process that has imported these once: as new processes, each would take seconds to import them.
PRELOADED = (
    *(
        "pytest",
        "sklearn.mixture",
        "torch.distributed",
        "torch._dynamo",
        "deepspeed",
        "matplotlib.backends.backend_agg",
    ),
    *("vaescale.commands.train", "vaescale.commands.evaluate", "tests.ranks"),
)


def on_ranks(folder: Path, function: Callable[..., Any], *arguments: object, ranks: int = 2) -> list[Any]:
    """`function(rank, ranks, *arguments)` on each rank, at the same time. Returns what each returned: tensors in lists and
    mappings. The function must be at a module's top level, because other processes import it by name.
    """
    folder.mkdir(exist_ok=True)
    forked(_work, str(folder / "store"), ranks, function, arguments, ranks=ranks)
    return [torch.load(folder / f"store-{rank}.pt", weights_only=True) for rank in range(ranks)]


def forked(
    function: Callable[..., None], *arguments: object, ranks: int, preloaded: tuple[str, ...] = PRELOADED
) -> None:
    """`function(rank, *arguments)` in so many processes. Raises for the first that fails. preloaded: what the first call of this
    process has imported for all.
    """
    multiprocessing.set_forkserver_preload(list(preloaded))
    mp.start_processes(function, arguments, nprocs=ranks, start_method="forkserver")


def _work(
    rank: int, store: str, ranks: int, function: Callable[..., Any], arguments: tuple[object, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        torch.save(function(rank, ranks, *arguments), f"{store}-{rank}.pt")
    finally:
        dist.destroy_process_group()
