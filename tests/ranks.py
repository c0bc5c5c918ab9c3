"""A function on several gloo ranks of this machine."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(folder: Path, function: Callable[..., Any], *arguments: object, ranks: int = 2) -> list[Any]:
    """`function(rank, ranks, *arguments)` on each rank, at the same time. Returns what each returned: tensors in lists and
    mappings. The function must be a module's own, for it is sent to other processes.
    """
    mp.spawn(_work, (str(folder / "store"), ranks, function, arguments), nprocs=ranks)
    return [torch.load(folder / f"store-{rank}.pt", weights_only=True) for rank in range(ranks)]


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
