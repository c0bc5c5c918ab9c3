"""Worker processes: the same batches as without them, kept over several passes, and started from a clean process."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.launching import environment
from tests.nameless import run_with_shared_memory
from vaescale.data import workers as worker_processes
from vaescale.data.batch import Batch, Request
from vaescale.data.config import DataConfig
from vaescale.data.loader import evaluation_batches
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.data.reader import ShardReader, open_reader
from vaescale.data.workers import Workers, refuse_small_shared_memory
from vaescale.errors import DataError


@pytest.fixture
def reader(tmp_path: Path, make_items) -> ShardReader:
    write_shards(make_items(23), tmp_path / "shards", Making(shard_samples=10, encoding="png"))
    place = str(tmp_path / "shards")
    return open_reader(place, DataConfig(train=place, val=place, image_size=8, global_batch=4))


def one_pass(reader: ShardReader, workers: int | Workers) -> list[Batch]:
    return list(evaluation_batches(reader, batch=5, rank=0, world_size=1, workers=workers))


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    for one, other in zip(a, b, strict=True):
        assert all(
            torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
            for x, y in zip(one, other, strict=True)
        )


def test_two_passes_are_read_by_the_same_processes(reader: ShardReader) -> None:
    expected = one_pass(reader, 0)
    with Workers(reader, 2) as workers:
        assert workers.start_method == "forkserver"
        assert_same(one_pass(reader, workers), expected)
        pids = workers.pids
        assert len(set(pids)) == 2
        assert_same(one_pass(reader, workers), expected)
        assert workers.pids == pids
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    """Whether a process lives; one that ended and was not waited for yet does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_pass_that_ends_early_leaves_nothing_to_the_next(reader: ShardReader) -> None:
    with Workers(reader, 2) as workers:
        first = evaluation_batches(reader, batch=5, rank=0, world_size=1, workers=workers)
        next(first)
        first.close()
        assert_same(one_pass(reader, workers), one_pass(reader, 0))


def test_images_in_memory_need_no_processes(reader: ShardReader) -> None:
    place = reader.index.place
    config = DataConfig(train=place, val=place, image_size=8, global_batch=4, cache="memory")
    with Workers(open_reader(place, config), 2) as workers:
        assert workers.start_method is None
        list(workers.fetch([Request(np.arange(5))]))
        assert workers.pids == []


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_a_killed_worker_is_one_sentence(reader: ShardReader, seconds: float) -> None:
    """After a while batches are waiting that only the worker could hand over."""
    with Workers(reader, 1) as workers:
        batches = workers.fetch(Request(np.arange(3)) for _ in range(100))
        next(batches)
        time.sleep(seconds)
        os.kill(workers.pids[0], signal.SIGKILL)
        time.sleep(seconds)
        with pytest.raises(
            DataError, match=r"^a reading process was killed, perhaps for memory; lower data.workers"
        ):
            list(batches)
        with pytest.raises(DataError, match=r"^a reading process was killed"):
            list(workers.fetch([Request(np.arange(3))]))


def test_what_a_worker_gets_is_small_however_much_was_read(reader: ShardReader) -> None:
    before = len(pickle.dumps(reader))
    reader.__getitems__(Request(np.arange(23)))
    assert len(pickle.dumps(reader)) == before < 4096


SCRIPT = """
import sys
from vaescale.data.loader import evaluation_batches
from vaescale.data.config import DataConfig
from vaescale.data.reader import open_reader
print("the script runs", flush=True)
config = DataConfig(train=sys.argv[1], val=sys.argv[1], image_size=8, global_batch=4)
reader = open_reader(config.train, config)
print(sum(len(batch.slots) for batch in evaluation_batches(reader, batch=5, rank=0, world_size=1, workers=2)))
"""


def test_a_user_s_script_is_not_run_again_in_the_workers(reader: ShardReader, tmp_path: Path) -> None:
    """A script without `if __name__ == "__main__"`, as people write them, in a folder above a clone of the package."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "above/vaescale/data").mkdir(parents=True)
    variables = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), os.path.abspath(reader.index.place)],
        cwd=tmp_path / "above",
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == ["the script runs", "25", ""]


CODE = """
import multiprocessing.forkserver, sys, time
from vaescale.data.config import DataConfig
from vaescale.data.reader import open_reader
from vaescale.data import workers as worker_processes
from vaescale.data.workers import Workers, refuse_small_shared_memory
from vaescale.data.batch import Request
import numpy as np
place = sys.argv[1]
config = DataConfig(train=place, val=place, image_size=8, global_batch=4)
workers = Workers(open_reader(place, config), 2)
batches = workers.fetch([Request(np.arange(4)) for _ in range(100)])
next(batches)
print(*workers.pids, multiprocessing.forkserver._forkserver._forkserver_pid, flush=True)
time.sleep(600)
"""


@pytest.mark.distributed
def test_workers_end_with_a_process_that_is_killed(digits: Path) -> None:
    """By the system for memory, or by a cluster: nothing may stay behind and hold memory and the terminal."""
    with subprocess.Popen(
        [sys.executable, "-c", CODE, str(digits / "train")], stdout=subprocess.PIPE, text=True
    ) as reading:
        assert reading.stdout is not None
        pids = [int(word) for word in reading.stdout.readline().split()]
        assert len(pids) == 3
        reading.kill()
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


SMALL = """
import sys
import numpy as np
from vaescale.data.batch import Request
from vaescale.data.config import DataConfig
from vaescale.data.reader import open_reader
from vaescale.data.workers import Workers
from vaescale.errors import DataError
place = sys.argv[1]
reader = open_reader(place, DataConfig(train=place, val=place, image_size=8, global_batch=4))
with Workers(reader, 1) as workers:
    try:
        for batch in workers.fetch(Request(np.arange(count) % 1000) for count in (4, 4096)):
            print(len(batch.images), flush=True)
    except DataError as error:
        print(error)
"""


@pytest.mark.distributed
def test_a_full_shared_memory_is_one_sentence(digits: Path, tmp_path: Path) -> None:
    """torch alone prints a traceback in a thread of the worker, and the training process waits for ever."""
    done = run_with_shared_memory("128k", SMALL, tmp_path, str(digits / "train"))
    assert (done.returncode, done.stderr) == (0, "")
    first, sentence = done.stdout.splitlines()
    assert first == "4"
    assert sentence == (
        "a reading process cannot hand over a batch of 262144 bytes in /dev/shm (No space left on device (28)); make it "
        "larger (docker run --shm-size=1g, in Kubernetes an emptyDir with medium: Memory mounted there), or set data.workers=0"
    )


def test_a_small_shared_memory_is_refused_at_the_start() -> None:
    refuse_small_shared_memory(2, 4096, ranks_here=2)
    with pytest.raises(
        DataError, match=r"^/dev/shm holds \d+ bytes, less than the 4503599627370496 bytes of batches"
    ):
        refuse_small_shared_memory(2, 1 << 50, ranks_here=1)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EACCES, "mount a folder"), (errno.ENOSPC, "make it larger")]
)
def test_a_shared_memory_that_cannot_be_written_is_one_sentence(
    reader: ShardReader, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    class Refusing:
        def Lock(self) -> None:  # noqa: N802
            raise OSError(number, os.strerror(number))

    with Workers(reader, 1) as workers:
        monkeypatch.setattr(worker_processes, "_context", Refusing)
        with pytest.raises(
            DataError, match=rf"^reading processes cannot start, .* \({os.strerror(number)}\); {remedy}"
        ):
            workers.fetch([Request(np.arange(3))])
