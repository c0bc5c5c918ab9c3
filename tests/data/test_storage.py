"""Remote shards: over HTTP and fsspec's memory file system, through a bounded cache that several processes share."""

import copy
import hashlib
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from vaescale.data.config import DataConfig
from vaescale.data.loader import refuse_small_cache, training_batches
from vaescale.data.making.indexing import index_shards
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.data.plan import Plan
from vaescale.data.prefetch import Ahead
from vaescale.data.reader import open_reader
from vaescale.data.storage import Folder, Remote, open_store
from vaescale.data.training_sets import open_training, training_plan
from vaescale.errors import DataError

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


class Server:
    """An HTTP server on this machine that counts what it is asked for, and can be told to fail."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.failing = 0  # that many requests are answered with 503
        self.port = 0
        self._folder = folder
        self.start()

    def start(self) -> None:
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path.lstrip("/"))
                if outer.failing:
                    outer.failing -= 1
                    self.send_error(503)
                else:
                    super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(
            ("127.0.0.1", self.port), partial(Handler, directory=str(self._folder))
        )
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def shards(tmp_path: Path, make_items) -> tuple[Path, np.ndarray]:
    """64 images in 8 shards of 8."""
    items = make_items(64)
    write_shards(items, tmp_path / "shards", Making(shard_samples=8))
    return tmp_path / "shards", np.stack([item.content for item in items]).transpose(0, 3, 1, 2)


@pytest.fixture
def server(shards) -> Iterator[Server]:
    server = Server(shards[0])
    yield server
    server.stop()


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., DataConfig]:
    def make(place: Any, **changes: Any) -> DataConfig:
        return DataConfig(
            **{
                "train": place,
                "val": str(place),
                "image_size": 8,
                "global_batch": 16,
                "shuffle_block": 8,
                "cache_dir": str(tmp_path / "cache"),
                "retry_seconds": 5.0,
                **changes,
            }
        )

    return make


def cached(tmp_path: Path) -> list[int]:
    return [
        p.stat().st_size for p in (tmp_path / "cache").iterdir() if p.suffix != ".lock" and p.name != "lock"
    ]


def epoch(config: DataConfig, *, workers: int = 0, steps: range = range(4)) -> dict[int, list[np.ndarray]]:
    """Sample numbers and images of some steps."""
    reader = open_reader(config.train, config)
    plan = Plan(reader.index.shards.samples, config.global_batch, 0, config.shuffle_block)
    batches = training_batches(
        reader, plan, steps=steps, rank=0, world_size=1, accumulation=1, workers=workers
    )
    return {
        step: [plan.samples(step), batch[0].images.numpy()]
        for step, batch in zip(steps, batches, strict=True)
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_http_gives_the_same_batches_and_fetches_each_file_once(
    shards, server, configured, tmp_path, workers
) -> None:
    for numbers, images in epoch(configured(server.url), workers=workers).values():
        assert np.array_equal(images, shards[1][numbers])
    files = [name for name in server.asked if name.endswith((".tar", ".npy"))]
    assert sorted(set(files)) == sorted(p.name for p in shards[0].glob("shard-*"))
    assert len(files) == len(set(files)), "the reader, its workers and the fetching ahead share what arrives"
    before = len(server.asked)
    epoch(configured(server.url))
    assert server.asked[before:] == ["index.json"], "the second time everything is there already"


def test_a_mixture_of_a_folder_and_a_server_is_that_of_two_folders(
    shards, server, configured, tmp_path
) -> None:
    """The fetching ahead asks for the server's shards alone, each once."""
    shutil.copytree(shards[0], tmp_path / "other")
    batches = []
    for second in (server.url, str(shards[0])):
        config = configured([{"path": str(tmp_path / "other"), "weight": 1}, {"path": second, "weight": 3}])
        reader = open_training(config, ())
        plan = training_plan(reader, config, 0)
        refuse_small_cache(reader, plan, config)
        options = {"rank": 0, "world_size": 1, "accumulation": 1, "workers": 0}
        batches.append([step[0].images for step in training_batches(reader, plan, steps=range(6), **options)])
        assert all(store.closed for store in reader.remote_stores)
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    files = [name for name in server.asked if name.endswith((".tar", ".npy"))]
    assert files
    assert len(files) == len(set(files))
    small = config.model_copy(update={"cache_bytes": 10})
    reader = open_training(
        configured([{"path": server.url, "weight": 1}, {"path": str(shards[0]), "weight": 1}]), ()
    )
    with pytest.raises(DataError, match=r"cache_bytes \(=10\) is less than the \d+ bytes of shards"):
        refuse_small_cache(reader, training_plan(reader, config, 0), small)


def test_large_shards_come_from_a_server_without_ranges(tmp_path: Path, make_items, configured) -> None:
    """Python's own http.server is one; fsspec refuses it for files beyond its block of 5 MiB."""
    items = make_items(40, shape=(256, 256, 3))
    write_shards(items, tmp_path / "large")
    assert (tmp_path / "large" / "shard-000000.tar").stat().st_size > 6 << 20
    server = Server(tmp_path / "large")
    config = configured(server.url, image_size=256, channels=3, global_batch=40)
    ((numbers, images),) = epoch(config, steps=range(1)).values()
    expected = np.stack([item.content for item in items]).transpose(0, 3, 1, 2)
    assert np.array_equal(images, expected[numbers])
    server.stop()


def test_fsspec_s_memory_file_system(shards, configured) -> None:
    fsspec.filesystem("memory").put(str(shards[0]) + "/", "/data/", recursive=True)
    for numbers, images in epoch(configured("memory://data")).values():
        assert np.array_equal(images, shards[1][numbers])


def test_the_cache_is_bounded_and_the_batches_are_right_all_the_same(
    shards, server, configured, tmp_path
) -> None:
    size = max(path.stat().st_size for path in shards[0].glob("*.tar"))
    config = configured(server.url, cache_bytes=4 * size)
    largest = 0
    for round_ in range(3):
        for numbers, images in epoch(config, steps=range(4 * round_, 4 * round_ + 4)).values():
            assert np.array_equal(images, shards[1][numbers])
            largest = max(largest, sum(cached(tmp_path)))
    assert size < largest <= 4 * size
    assert len([name for name in server.asked if name.endswith(".tar")]) > 8, (
        "evicted shards are fetched again"
    )


def test_what_was_used_longest_ago_goes_first(shards, server, tmp_path) -> None:
    names = sorted(path.name for path in shards[0].glob("*.tar"))
    size = (shards[0] / names[0]).stat().st_size
    store = Remote(server.url, cache=tmp_path / "cache", cache_bytes=3 * size, retry_seconds=5)
    paths = {}

    def fetch(name: str) -> None:
        content = (shards[0] / name).read_bytes()
        paths[name] = store.local(name, size, hashlib.sha256(content).hexdigest())
        os.utime(paths[name], times=(fetch.clock, fetch.clock))
        fetch.clock += 10

    fetch.clock = time.time() - 1000
    for name in (*names[:3], names[0], names[3]):
        fetch(name)
    assert {name for name in names[:4] if paths[name].exists()} == {names[0], names[2], names[3]}


def test_a_shard_that_does_not_fit_is_refused(shards, server, tmp_path) -> None:
    store = Remote(server.url, cache=tmp_path / "cache", cache_bytes=100, retry_seconds=5)
    size = (shards[0] / "shard-000000.tar").stat().st_size
    with pytest.raises(DataError, match=rf"cache_bytes \(=100\) has no room for a shard of {size} bytes"):
        store.local("shard-000000.tar", size, "0" * 64)


def test_a_cache_smaller_than_the_working_set_is_refused_with_a_number(shards, server, configured) -> None:
    config = configured(server.url, cache_bytes=60_000, shuffle_block=64)
    reader = open_reader(config.train, config)
    plan = Plan(reader.index.shards.samples, 16, 0, 64)
    with pytest.raises(
        DataError, match=r"data.cache_bytes \(=60000\) is less than .* lower data.shuffle_block \(=64\)"
    ):
        refuse_small_cache(reader, plan, config)
    refuse_small_cache(reader, plan, configured(server.url))
    everything = sum(path.stat().st_size for path in shards[0].glob("shard-*"))
    refuse_small_cache(reader, plan, configured(server.url, cache_bytes=f"{everything / 1000}KB"))


def test_an_absent_server_is_waited_for(shards, server, configured, capsys) -> None:
    server.failing = 3
    for numbers, images in epoch(configured(server.url)).values():
        assert np.array_equal(images, shards[1][numbers])
    words = capsys.readouterr().err
    assert words.count("waiting for http") == words.count("answers again after") >= 1


def test_a_server_that_dies_in_mid_epoch_stalls_and_resumes(shards, server, configured) -> None:
    size = max(path.stat().st_size for path in shards[0].glob("*.tar"))
    config = configured(server.url, cache_bytes=3 * size, retry_seconds=30.0, shuffle_block=1)
    reader = open_reader(config.train, config)
    plan = Plan(reader.index.shards.samples, 2, 0, 1)
    batches = training_batches(reader, plan, steps=range(32), rank=0, world_size=1, accumulation=1, workers=0)
    seen = []
    for step, batch in enumerate(batches):
        if step == 3:
            server.stop()
            threading.Timer(2.0, server.start).start()
        assert np.array_equal(batch[0].images.numpy(), shards[1][plan.samples(step)])
        seen += plan.samples(step).tolist()
    assert sorted(seen) == list(range(64))


def test_a_second_pass_waits_for_its_server_as_the_first_did(shards, server, configured, tmp_path) -> None:
    """Training that returns to a checkpoint begins a new pass over the same reader."""
    config = configured(server.url, retry_seconds=30.0)
    reader = open_reader(config.train, config)
    plan = Plan(reader.index.shards.samples, 16, 0)
    options = {"rank": 0, "world_size": 1, "accumulation": 1, "workers": 0}
    first = training_batches(reader, plan, steps=range(4), **options)
    next(first)
    first.close()
    assert reader.store.closed
    for path in (tmp_path / "cache").iterdir():
        path.unlink(missing_ok=True)
    reader = copy.copy(reader)  # without the entries that it has read
    server.stop()
    threading.Timer(1.0, server.start).start()
    second = list(training_batches(reader, plan, steps=range(4), **options))
    assert len(second) == 4


def test_a_server_that_stays_away_stops_with_one_sentence_after_the_bound(shards, server, configured) -> None:
    config = configured(server.url, retry_seconds=1.0)
    reader = open_reader(config.train, config)
    plan = Plan(reader.index.shards.samples, 16, 0)
    server.stop()
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"could not be fetched in 1 s .* repeat the command when it is back"
    ) as caught:
        list(training_batches(reader, plan, steps=range(4), rank=0, world_size=1, accumulation=1, workers=1))
    server.start()
    assert "\n" not in str(caught.value)
    assert 1.0 < time.monotonic() - start < 20.0


def test_what_is_not_there_is_said_at_once(server, configured) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"nowhere/index.json does not exist"):
        open_reader(f"{server.url}/nowhere", configured(server.url, retry_seconds=60.0))
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("change", ["content", "longer", "shorter"])
def test_a_file_that_is_not_the_index_s_is_refused_on_arrival(
    shards, server, configured, tmp_path, change
) -> None:
    path = shards[0] / "shard-000003.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes({"content": content, "longer": content + bytes(9999), "shorter": content[:-9]}[change])
    words = (
        r"could not be fetched in 2 s .*of 20480 bytes arrived"
        if change == "shorter"
        else r"has other content than"
    )
    with pytest.raises(DataError, match=rf"shard-000003.tar {words}"):
        epoch(configured(server.url, retry_seconds=2.0))
    assert max(cached(tmp_path)) <= len(content)
    assert not [
        p for p in (tmp_path / "cache").iterdir() if p.stat().st_size == len(content) and _is(p, content)
    ]


def _is(path: Path, content: bytes) -> bool:
    return path.read_bytes() == bytes(content)


def test_sets_of_one_name_do_not_meet(tmp_path: Path, make_items, configured) -> None:
    """webdataset's cache knows files by their last name alone."""
    for number, name in enumerate(("a", "b")):
        write_shards(make_items(16, seed=number), tmp_path / "sets" / name, Making(shard_samples=8))
    server = Server(tmp_path / "sets")
    for number, name in enumerate(("a", "b", "a")):
        expected = np.stack([item.content for item in make_items(16, seed=number % 2)]).transpose(0, 3, 1, 2)
        for numbers, images in epoch(configured(f"{server.url}/{name}"), steps=range(1)).values():
            assert np.array_equal(images, expected[numbers])
    server.stop()


def test_a_set_that_was_uploaded_anew_is_fetched_anew(shards, server, make_items, configured) -> None:
    epoch(configured(server.url))
    items = make_items(64, seed=5)
    write_shards(items, shards[0], Making(shard_samples=8))
    expected = np.stack([item.content for item in items]).transpose(0, 3, 1, 2)
    for numbers, images in epoch(configured(server.url)).values():
        assert np.array_equal(images, expected[numbers])


def _fetch_all(url: str, cache: str, names: list[tuple[str, int, str]]) -> None:
    store = Remote(url, cache=Path(cache), cache_bytes=1 << 30, retry_seconds=10)
    for name, size, digest in names:
        assert store.local(name, size, digest).stat().st_size == size


def test_processes_of_a_node_fetch_each_file_once(shards, server, tmp_path) -> None:
    names = [
        (path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(shards[0].glob("*.tar"))
    ]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_fetch_all, args=(server.url, str(tmp_path / "cache"), names))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    assert sorted(server.asked) == [name for name, _, _ in names]


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("what", [".tar", ".npy"])
def test_a_cached_file_that_a_disk_changed_is_fetched_anew(
    shards, server, configured, tmp_path, what, cache
) -> None:
    epoch(configured(server.url))
    largest = max(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    for path in (tmp_path / "cache").iterdir():
        if (
            path.suffix != ".lock"
            and path.name != "lock"
            and (path.stat().st_size == largest) == (what == ".tar")
        ):
            path.write_bytes(bytes(path.stat().st_size))
    for numbers, images in epoch(configured(server.url, cache=cache)).values():
        assert np.array_equal(images, shards[1][numbers])


def test_a_killed_fetch_of_the_same_file_leaves_room_for_it(shards, server, tmp_path) -> None:
    content = (shards[0] / "shard-000000.tar").read_bytes()
    store = Remote(server.url, cache=tmp_path / "cache", cache_bytes=len(content) * 3 // 2, retry_seconds=5)
    digest = hashlib.sha256(content).hexdigest()
    path = store.local("shard-000000.tar", len(content), digest)
    path.rename(path.with_suffix(".part"))
    assert store.local("shard-000000.tar", len(content), digest).read_bytes() == content


def test_names_are_quoted(tmp_path: Path, make_items, configured) -> None:
    write_shards(make_items(8), tmp_path / "set")
    (tmp_path / "set" / "shard-000000.tar").rename(tmp_path / "set" / "b #1%.tar")
    (tmp_path / "set" / "index.json").unlink()
    index_shards(tmp_path / "set")
    server = Server(tmp_path / "set")
    assert len(epoch(configured(server.url, global_batch=8), steps=range(1))) == 1
    server.stop()


def test_closing_ends_a_download_under_way(shards, server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("vaescale.data.storage.CHUNK", 1)
    store = Remote(server.url, cache=tmp_path / "cache", cache_bytes=1 << 20, retry_seconds=60)
    content = (shards[0] / "shard-000000.tar").read_bytes()
    threading.Timer(0.05, lambda: setattr(store, "closed", True)).start()
    start = time.monotonic()

    def fetch_for_ever() -> None:
        while True:
            store.local("shard-000000.tar", len(content), hashlib.sha256(content).hexdigest()).unlink()

    with pytest.raises(DataError):
        fetch_for_ever()
    assert time.monotonic() - start < 10


def test_what_a_killed_process_left_is_evicted(shards, server, tmp_path) -> None:
    size = (shards[0] / "shard-000000.tar").stat().st_size
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ("a" * 64 + ".part")).write_bytes(bytes(size))
    store = Remote(server.url, cache=tmp_path / "cache", cache_bytes=size, retry_seconds=5)
    content = (shards[0] / "shard-000000.tar").read_bytes()
    assert store.local("shard-000000.tar", size, hashlib.sha256(content).hexdigest()).read_bytes() == content


@pytest.mark.parametrize(
    "place", ["pipe:cat /etc/passwd", "simplecache::http://x/y", "nosuch://x", "zip://a::b"]
)
def test_pipes_chains_and_unknown_protocols_are_refused(place: str) -> None:
    with pytest.raises(DataError):
        open_store(place)


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}")
    assert isinstance(store, Folder)
    with pytest.raises(DataError, match="make-shards"):
        store.read_index("index.json")


def test_fetching_ahead_keeps_to_its_bytes() -> None:
    fetched: list[int] = []
    needs = [(step, [(0, 2 * step), (0, 2 * step + 1), (0, 0)]) for step in range(50)]
    with Ahead(needs, fetched.append, sizes=lambda _: 10, limit=60) as ahead:
        for step in range(40):
            ahead.reached(step)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and len(fetched) < min(100, 2 * step + 2 + 6):
                time.sleep(0.001)
            assert max(fetched) <= 2 * step + 1 + 6, "six shards of ten bytes ahead of the step"
    assert len(set(fetched)) == len(fetched), "none is asked for twice in an epoch"


def test_what_was_evicted_is_fetched_ahead_again_in_the_next_epoch() -> None:
    fetched: list[int] = []
    needs = [(step, [(step // 10, step % 10)]) for step in range(30)]
    with Ahead(needs, fetched.append, sizes=lambda _: 1, limit=2) as ahead:
        for step in range(30):
            ahead.reached(step)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and len(fetched) < min(30, step + 1):
                time.sleep(0.001)
    assert sorted(fetched) == sorted(3 * list(range(10)))


def test_fetching_ahead_survives_faults_and_ends() -> None:
    def fail(_: int) -> None:
        raise DataError("gone")

    before = threading.active_count()
    with Ahead([(step, [(0, step)]) for step in range(10)], fail, sizes=lambda _: 1, limit=5) as ahead:
        ahead.reached(3)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
