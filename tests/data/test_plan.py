"""The order: every sample once an epoch, the same global batches at every world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vaescale.data.plan import Plan, rank_slots
from vaescale.errors import DataError, UserError


@settings(deadline=None)
@given(
    num_samples=st.integers(1, 200),
    global_batch=st.integers(1, 50),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 5),
)
def test_an_epoch_visits_no_sample_twice(num_samples: int, global_batch: int, seed: int, epoch: int) -> None:
    if num_samples < global_batch:
        with pytest.raises(DataError, match="exceeds"):
            Plan(num_samples, global_batch, seed)
        return
    plan = Plan(num_samples, global_batch, seed)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    visited = np.concatenate([plan.samples(step) for step in steps])
    assert len(visited) == plan.steps_per_epoch * global_batch
    assert len(set(visited.tolist())) == len(visited)
    assert visited.min() >= 0
    assert visited.max() < num_samples
    assert num_samples - len(visited) < global_batch


def test_epochs_and_seeds_differ() -> None:
    plan = Plan(100, 100, 0)
    assert not np.array_equal(plan.samples(0), plan.samples(1))
    assert not np.array_equal(plan.samples(0), Plan(100, 100, 1).samples(0))
    assert np.array_equal(plan.samples(3), Plan(100, 100, 0).samples(3))


def test_what_epoch_one_drops_comes_in_another() -> None:
    plan = Plan(10, 8, 0)
    assert set(np.concatenate([plan.samples(step) for step in range(8)]).tolist()) == set(range(10))


@settings(deadline=None)
@given(world_size=st.integers(1, 8), accumulation=st.integers(1, 4), each=st.integers(1, 5))
def test_ranks_share_every_micro_batch(world_size: int, accumulation: int, each: int) -> None:
    global_batch = world_size * accumulation * each
    ranks = [
        rank_slots(global_batch, rank=rank, world_size=world_size, accumulation=accumulation)
        for rank in range(world_size)
    ]
    for number in range(accumulation):
        micro_batch = np.concatenate([slots[number] for slots in ranks])
        size = global_batch // accumulation
        assert micro_batch.tolist() == list(range(number * size, (number + 1) * size))


def test_one_micro_batch_is_the_contract_s_range() -> None:
    assert rank_slots(12, rank=1, world_size=3, accumulation=1)[0].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("batch", "world_size", "accumulation", "nearest"), [(10, 4, 1, 8), (9, 2, 2, 8), (1, 2, 1, 2)]
)
def test_an_indivisible_batch_names_the_nearest(
    batch: int, world_size: int, accumulation: int, nearest: int
) -> None:
    with pytest.raises(UserError, match=f"={batch}\\).*use {nearest}$"):
        rank_slots(batch, rank=0, world_size=world_size, accumulation=accumulation)


def test_the_hash_names_the_order() -> None:
    hashes = {Plan(n, b, s).hash for n, b, s in [(10, 5, 0), (11, 5, 0), (10, 4, 0), (10, 5, 1)]}
    assert len(hashes) == 4
