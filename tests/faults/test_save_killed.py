"""A save that is killed at each of its system calls leaves a sound checkpoint: the new one or the one before."""

import contextlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.faults.tracing import killed_at, may_trace
from tests.ranks import on_ranks
from vaescale.runs import checkpoint
from vaescale.runs.checkpoint import Keep, newest, write

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"w": torch.full((5000,), value)} for name in ("model", "ema", "optimizer")}


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_a_save_killed_anywhere_leaves_a_sound_one(tmp_path: Path, again: bool) -> None:
    if not may_trace():
        pytest.skip("this machine lets no process trace its child")
    # In a process of its own: one that runs many tests has much memory and takes long to fork.
    ((old, new),) = on_ranks(tmp_path, kill_saves, tmp_path, 1 if again else 2, ranks=1)
    assert old > 50, "before the rename"
    assert new > 2, "after it"


def kill_saves(rank: int, ranks: int, parent: Path, step: int) -> list[Tensor]:
    """Saves of a step, each killed at a later system call than the last. Returns how many left the old checkpoint and the new."""
    outcomes: Counter[float] = Counter()
    call = 0
    while True:
        call += 1
        folder = parent / str(call)
        write(folder, 1, tensors(1.0), {}, keep=Keep(1))
        if not killed_at(call, lambda: write(folder, step, tensors(2.0), {}, keep=Keep(1))):  # noqa: B023
            break
        found = newest(folder)
        assert found is not None, f"killed at system call {call}: nothing sound is left"
        (value,) = set(found.tensors("model")["w"].tolist())
        outcomes[value] += 1
        assert found.step == (1 if value == 1.0 else step)
        for name in ("ema", "optimizer"):
            assert set(found.tensors(name)["w"].tolist()) == {value}
        # And the next start's save cleans up.
        write(folder, 3, tensors(3.0), {}, keep=Keep(1))
        assert [path.name for path in folder.iterdir()] == ["step-000000003"]
    return [torch.tensor(outcomes[value]) for value in (1.0, 2.0)]


def test_an_error_of_the_disk_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO at each sync of a save in turn: a disk says there what it could not keep."""
    for number in range(1, 20):
        folder = tmp_path / str(number)
        write(folder, 1, tensors(1.0), {}, keep=Keep(1))
        left = [number]

        def failing(path: Path, left: list[int] = left, real=checkpoint.sync) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(5, "Input/output error", str(path))
            real(path)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "sync", failing)
            if number == 1:
                with pytest.raises(OSError, match="Input/output error"):
                    write(folder, 2, tensors(2.0), {}, keep=Keep(1))
            else:
                with contextlib.suppress(OSError):
                    write(folder, 2, tensors(2.0), {}, keep=Keep(1))
        if left[0] > 0:
            assert number > 4, "three files and two folders are synced"
            break
        assert newest(folder).step in (1, 2)
    else:
        pytest.fail("a save never came to its end")
