"""The one caller of collectives. Each is unconditional on every rank and carries the step, which is checked.

Ranks that fall out of step do not hang at first: an all-reduce pairs one rank's step 5 with another's step 6 and
returns a wrong sum. Every sum here therefore carries (step, step^2): they agree with the own step times the world
size only if all ranks are at the same one.
"""

import os
import pickle
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from vaescale.system import heartbeat

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
_MODULUS = 1 << 20  # step^2 * 4096 ranks stays below 2^53, exact in float64
_step = 0


def at_step(step: int) -> None:
    """Say which step this process is at; the collectives that follow are checked against it."""
    global _step
    _step = step
    heartbeat.at_step(step)


def is_joined() -> bool:
    """Whether this process has found the others."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """The number of processes that take part."""
    return dist.get_world_size() if is_joined() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if is_joined() else 0


def ranks_on_this_node() -> int:
    """How many of the processes share this machine's disk, as the launcher says; all of them if it says nothing."""
    words = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(words) if words.isdecimal() else world_size()


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of `values` [N] over all ranks, in float64.

    Raises RuntimeError when the ranks are not at the same step.
    """
    return start_sum(values)()


def start_sum(values: Tensor) -> Callable[[], Tensor]:
    """`all_reduce_sum` that goes on in the background: call what is returned, on every rank, to wait for the sum."""
    values, step = values.detach().to(torch.float64), _step
    if world_size() == 1:
        return lambda: values
    own = float(step % _MODULUS)
    steps_own = torch.stack([torch.full_like(values[0], own), torch.full_like(values[0], own * own)])
    message = _within_reach(torch.cat([values, steps_own]))
    work = dist.all_reduce(message, async_op=True)

    def wait() -> Tensor:
        with heartbeat.waiting_for_others(f"the all-reduce of {len(values)} numbers"):
            work.wait()
        total, steps = message[:-2], message[-2:] / world_size()
        torch._assert_async(
            (steps == steps_own.to(steps)).all(),
            f"a rank is not at step {step} as rank {rank()} is: the ranks' sums no longer belong together",
        )
        return total.to(values.device)

    return wait


def all_reduce_sum_with_gradient(values: Tensor) -> Tensor:
    """`all_reduce_sum` that a gradient passes through: what each rank's share moves is every rank's loss.

    Its backward pass is a second all-reduce, of the gradients that the ranks' losses have for the sum.
    """
    total: Tensor = _SumOverRanks.apply(values.to(torch.float64))  # type: ignore[no-untyped-call]
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:  # noqa: ARG004
        return all_reduce_sum(values).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        return all_reduce_sum(gradient)


def _within_reach(values: Tensor) -> Tensor:
    """On a GPU, if that is all that the collectives can read."""
    return values.cuda() if dist.get_backend() == "nccl" and not values.is_cuda else values


def all_reduce_plain(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks in their own precision, with no check of the step. Waits for it."""
    total = values.clone()
    if world_size() > 1:
        with heartbeat.waiting_for_others(f"the all-reduce of {values.numel()} numbers"):
            dist.all_reduce(total)
    if total.is_cuda:
        torch.cuda.synchronize()
    return total


def backend() -> str:
    """What the collectives go through: `gloo`, `nccl`, or `none` for one process."""
    return str(dist.get_backend()) if world_size() > 1 else "none"


def broadcast_object(value: T) -> T:
    """Rank 0's `value`, on every rank. For small Python values, outside of the step."""
    box = [value]
    if world_size() > 1:
        with heartbeat.waiting_for_others("the broadcast of rank 0's result"):
            dist.broadcast_object_list(box, src=0)
    return box[0]


def together(function: Callable[[], T]) -> T:
    """Call `function` on every rank; if it raises on some, the lowest one's exception is raised on all."""
    result: T | None = None
    fault: Exception | None = None
    try:
        result = function()
    except Exception as error:
        fault = error
    faults = gather_object(_sendable(fault))
    for other in faults:
        if other is not None:
            raise known_to_all(other)
    return cast(T, result)


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 alone and return its result on every rank; what it raises is raised on every rank."""
    result: T | None = None
    fault: Exception | None = None
    if is_main():
        try:
            result = function()
        except Exception as error:
            fault = error
    result, fault = broadcast_object((result, _sendable(fault)))
    if fault is not None:
        raise known_to_all(fault)
    return cast(T, result)


def is_known_to_all(fault: BaseException) -> bool:
    """Whether every rank raises it, so that one of them may speak for all."""
    return world_size() == 1 or getattr(fault, "_known_to_all", False)


def known_to_all(fault: E) -> E:
    """The same, of which one rank may speak for all, because all raise it."""
    fault._known_to_all = True  # type: ignore[attr-defined]
    return fault


def lost_rank(error: BaseException) -> str:
    """What a collective says of a rank that has ended or is cut off; nothing for any other error."""
    text = str(error)
    lost = isinstance(error, (dist.DistNetworkError, dist.DistStoreError)) or (
        isinstance(error, RuntimeError) and ("/gloo/transport/" in text or "ncclRemoteError" in text)
    )
    # Before the ranks have joined, only the launcher's variable tells that there are others.
    alone = world_size() == 1 and os.environ.get("WORLD_SIZE", "1") == "1"
    if not lost or alone:
        return ""
    return re.sub(r"^\[[^\]]*\] ", "", text.split("\n")[0]).split(". ")[0]


def gather_object(value: T) -> list[T]:
    """Every rank's `value`, on every rank. For small Python values, outside of the step."""
    if world_size() == 1:
        return [value]
    box: list[T | None] = [None] * world_size()
    with heartbeat.waiting_for_others("the gathering of the ranks' results"):
        dist.all_gather_object(box, value)
    return cast(list[T], box)


def _sendable(fault: Exception | None) -> Exception | None:
    """An exception that cannot be sent to other ranks would leave them waiting."""
    try:
        pickle.dumps(fault)
    except Exception:
        return RuntimeError(repr(fault))
    return fault
