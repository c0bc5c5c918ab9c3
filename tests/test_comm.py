"""Collectives on one process and on two gloo ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ranks import on_ranks
from vaescale import comm
from vaescale.errors import UserError


def test_alone_a_sum_is_itself_in_float64() -> None:
    total = comm.all_reduce_sum(torch.tensor([1.5, 2.0]))
    assert total.dtype == torch.float64
    assert total.tolist() == [1.5, 2.0]
    assert (comm.rank(), comm.world_size(), comm.is_main()) == (0, 1, True)


def _sums(rank: int) -> None:
    comm.at_step(7)
    # In float32 the small value would be lost beside the large one.
    total = comm.all_reduce_sum(torch.tensor([1e9 if rank else 0.125, rank], dtype=torch.float64))
    assert total.tolist() == [1e9 + 0.125, 1.0]


def _one_behind(rank: int) -> None:
    comm.at_step(7 - rank)
    with pytest.raises(RuntimeError, match=f"not at step {7 - rank} as rank {rank} is"):
        comm.all_reduce_sum(torch.ones(1))


def _main_speaks(rank: int) -> None:
    assert comm.on_main(comm.rank) == 0
    assert comm.broadcast_object(rank) == 0

    def refuse() -> None:
        raise UserError("the folder is taken")

    with pytest.raises(UserError, match="the folder is taken"):
        comm.on_main(refuse)


def _all_hear(rank: int) -> None:
    assert comm.together(lambda: rank) == rank

    def refuse_on_the_second() -> None:
        if rank == 1:
            raise UserError("no data here")

    with pytest.raises(UserError, match="no data here") as caught:
        comm.together(refuse_on_the_second)
    assert comm.is_known_to_all(caught.value)
    assert not comm.is_known_to_all(UserError("on this rank"))

    def refuse_unsendably() -> None:
        class Local(Exception):
            pass

        raise Local("cannot be pickled")

    with pytest.raises(Exception, match="cannot be pickled"):
        comm.together(refuse_unsendably)


def _start(rank: int, ranks: int, work: Callable[[int], None]) -> list[Tensor]:
    work(rank)
    return []


@pytest.mark.distributed
@pytest.mark.parametrize("work", [_sums, _one_behind, _main_speaks, _all_hear])
def test_on_two_ranks(tmp_path: Path, work: Callable[[int], None]) -> None:
    on_ranks(tmp_path, _start, work)
