"""The order: every sample once an epoch, the same global batches at every world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from vaescale.data.order import MOST_LANES
from vaescale.data.plan import Plan, rank_slots
from vaescale.errors import DataError, UserError


def even(num_samples: int, global_batch: int, seed: int = 0, **options) -> Plan:
    """A plan over shards of 7 samples."""
    shards = [7] * (num_samples // 7) + ([num_samples % 7] if num_samples % 7 else [])
    return Plan(np.array(shards), global_batch, seed, **options)


@settings(deadline=None)
@given(
    shards=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    global_batch=st.integers(1, 50),
    block_samples=st.sampled_from([1, 8, 30, 1 << 16]),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 5),
)
def test_an_epoch_visits_no_sample_twice(
    shards: list[int], global_batch: int, block_samples: int, seed: int, epoch: int
) -> None:
    num_samples = sum(shards)
    if num_samples < global_batch:
        with pytest.raises(DataError, match="exceeds"):
            Plan(np.array(shards), global_batch, seed)
        return
    plan = Plan(np.array(shards), global_batch, seed, block_samples)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    visited = np.concatenate([plan.samples(step) for step in steps])
    assert len(visited) == plan.steps_per_epoch * global_batch
    assert len(set(visited.tolist())) == len(visited)
    assert visited.min() >= 0
    assert visited.max() < num_samples
    assert num_samples - len(visited) < global_batch


@settings(deadline=None)
@given(
    step=st.integers(0, 100),
    first=st.integers(0, 23),
    count=st.integers(0, 24),
    block=st.sampled_from([1, 8, 100]),
)
def test_some_slots_are_a_part_of_all(step: int, first: int, count: int, block: int) -> None:
    plan = even(100, 24, seed=3, block_samples=block)
    slots = np.arange(first, min(24, first + count))
    assert np.array_equal(plan.samples(step, slots), plan.samples(step)[slots])


def test_epochs_and_seeds_differ() -> None:
    plan = even(100, 100)
    assert not np.array_equal(plan.samples(0), plan.samples(1))
    assert not np.array_equal(plan.samples(0), even(100, 100, 1).samples(0))
    assert np.array_equal(plan.samples(3), even(100, 100).samples(3))


def test_plans_of_one_shape_over_other_shards_do_not_mix() -> None:
    first = [Plan(np.array(shards), 4, 0).samples(0).tolist() for shards in ([50, 50], [10, 90], [50, 50])]
    assert first[0] == first[2]
    plans = [Plan(np.array(shards), 4, 0, 1) for shards in ([5, 95], [95, 5])]
    for plan in plans:
        visited = np.concatenate([plan.samples(step) for step in range(25)])
        assert sorted(visited.tolist()) == list(range(100))


def test_what_one_epoch_drops_comes_in_another() -> None:
    plan = even(10, 8)
    assert set(np.concatenate([plan.samples(step) for step in range(8)]).tolist()) == set(range(10))


def test_a_set_of_one_block_is_shuffled_perfectly() -> None:
    """Each sample is equally likely in each place: 3,000 epochs of 6 samples, chi-squared with 25 degrees of freedom."""
    plan = Plan(np.array([4, 2]), 6, 0)
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        counts[np.arange(6), plan.samples(epoch)] += 1
    assert chi2(25).sf(((counts - 500) ** 2 / 500).sum()) > 0.001


def test_a_batch_mixes_blocks_and_a_part_of_it_touches_few_shards() -> None:
    plan = Plan(np.full(200, 100), 64, 0, block_samples=1000)  # 20 blocks of 10 shards
    assert plan.lanes == 16
    whole = [len(np.unique(plan.samples(step) // 100)) for step in range(50)]
    assert np.mean(whole) > 40, "64 images come from many of the 200 shards"
    eighth = np.concatenate([plan.samples(step, np.arange(8)) for step in range(50)])
    assert len(np.unique(eighth // 100)) <= 40, "two lanes over 50 steps stay within four blocks"


def test_memory_does_not_grow_with_the_epochs() -> None:
    plan = Plan(np.array([200_000]), 100, 0)
    for epoch in range(30):
        plan.samples(epoch * plan.steps_per_epoch)
    assert len(plan.order.kept) <= MOST_LANES
    assert sum(order.size == 200_000 for order in plan.order.kept.values()) <= 2


def test_shards_are_not_visited_in_order() -> None:
    plan = Plan(np.full(100, 10), 10, 0, block_samples=1)
    shards = np.concatenate([plan.samples(step) for step in range(100)]).reshape(-1, 10)[:, 0] // 10
    assert abs(np.corrcoef(shards, np.arange(100))[0, 1]) < 0.4


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
    cases = [([5, 5], 5, 0), ([6, 4], 5, 0), ([10], 5, 0), ([5, 5], 4, 0), ([5, 5], 5, 1)]
    hashes = {Plan(np.array(shards), batch, seed).hash for shards, batch, seed in cases}
    assert len(hashes) == 5
    assert Plan(np.array([5, 5]), 5, 0).hash in hashes


@settings(deadline=None, max_examples=60)
@given(
    shards=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    cuts=st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 5)), min_size=1, max_size=6),
    block=st.sampled_from([1, 10, 1000]),
)
def test_ranks_that_come_and_go_see_every_sample_once_an_epoch(shards, cuts, block) -> None:
    """Each start continues at the step where the one before stopped, with another number of ranks."""
    if sum(shards) < 24:
        shards = [*shards, 24]
    plan = Plan(np.array(shards), 24, 5, block)
    step, visited = 0, []
    for world_size, steps in cuts:
        for step_now in range(step, step + steps):
            parts = [
                plan.samples(step_now, rank_slots(24, rank=rank, world_size=world_size, accumulation=1)[0])
                for rank in range(world_size)
            ]
            assert len({len(part) for part in parts}) == 1
            visited.append(np.concatenate(parts))
        step += steps
    assert all(np.array_equal(part, plan.samples(number)) for number, part in enumerate(visited))
    for epoch in range(step // plan.steps_per_epoch):
        whole = np.concatenate(visited[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch])
        assert len(set(whole.tolist())) == len(whole)


def class_runs(plan: Plan, classes: np.ndarray) -> float:
    """Runs of equal class in an epoch's order, over what a true permutation has on average."""
    order = np.concatenate([plan.samples(step) for step in range(plan.steps_per_epoch)])
    labels = classes[order]
    runs = 1 + np.count_nonzero(labels[1:] != labels[:-1])
    shares = np.bincount(labels) / len(labels)
    return float(runs / (1 + (len(labels) - 1) * (1 - (shares**2).sum())))


def neighbours(plan: Plan) -> float:
    """How often samples that were written side by side come within one batch, over a true permutation's share."""
    count = plan.num_samples
    near = [
        np.count_nonzero(np.diff(np.sort(plan.samples(step))) == 1) for step in range(plan.steps_per_epoch)
    ]
    return float(np.mean(near) / ((plan.global_batch - 1) * plan.global_batch / count))


def test_shuffling_is_as_good_as_its_block() -> None:
    """20 classes written one after the other: the worst order to shuffle in blocks."""
    shards = np.full(200, 50)
    classes = np.repeat(np.arange(20), 500)
    runs, near = {}, {}
    for block in (1, 500, 2500, 10_000):
        plan = Plan(shards, 100, 0, block)
        runs[block], near[block] = class_runs(plan, classes), neighbours(plan)
    assert runs[1] < runs[500] < 1.02
    assert abs(runs[10_000] - 1) < 0.01, "one block is a true permutation"
    assert abs(runs[2500] - 1) < 0.02
    assert near[1] > near[500] > near[2500]
    assert abs(near[10_000] - 1) < 0.15
