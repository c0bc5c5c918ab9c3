"""Who is named when a rank does not start."""

import threading

import pytest
import torch
import torch.distributed as dist

from tests.training.test_watchdog import Store
from vaescale import comm
from vaescale.errors import TrainingStopped
from vaescale.training import roll_call
from vaescale.training.launch import join_anew
from vaescale.training.roll_call import call_the_roll, launcher_s_store


def test_it_ends_when_all_have_come() -> None:
    store = Store()
    others = [
        threading.Thread(target=call_the_roll, args=(store,), kwargs={"rank": rank, "size": 3, "seconds": 5})
        for rank in (1, 2)
    ]
    for other in others:
        other.start()
    call_the_roll(store, rank=0, size=3, seconds=5, say=pytest.fail)
    for other in others:
        other.join(5)
        assert not other.is_alive()


def test_the_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "FIRST_WORD_SECONDS", 0.05)
    said: list[str] = []
    store = Store({"here/2": "1"})
    with pytest.raises(TrainingStopped, match="ranks 1, 3 of 4 did not start within 0 s"):
        call_the_roll(store, rank=0, size=4, seconds=0.2, say=said.append)
    assert said == ["waiting for ranks 1, 3 of 4; 0 s are left"]
    with pytest.raises(TrainingStopped, match="rank 3 of 4 did not start"):
        call_the_roll(store, rank=1, size=4, seconds=0.1, say=pytest.fail)


def test_only_torch_s_launcher_has_a_store() -> None:
    assert launcher_s_store({}) is None
    assert launcher_s_store({"TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "1"}) is None
    assert launcher_s_store({"WORLD_SIZE": "2"}) is None


def test_a_restarted_rank_joins_in_a_store_of_its_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's own store has the addresses of the ranks of the attempt before."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    store = dist.HashStore()
    join_anew(store)
    try:
        assert comm.is_joined()
        assert float(comm.all_reduce_plain(torch.ones(1))) == 1
        keys = store.list_keys()
        assert keys
        assert all(key.startswith("group/") for key in keys), keys
    finally:
        dist.destroy_process_group()
