"""Shards that plain webdataset reads; written in parallel, gone on with after a stop, the same bytes each time."""

import gc
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from filelock import FileLock
from PIL import Image

from vaescale.data.index import INDEX, ShardIndex, parse_entries, parse_index
from vaescale.data.making.indexing import index_shards
from vaescale.data.making.items import Item, Place
from vaescale.data.making.storing import Making
from vaescale.data.making.verifying import verify_shards
from vaescale.data.making.writing import NOTES, damaged_shards, write_shards
from vaescale.errors import DataError, UserError


def read_index(folder: Path) -> ShardIndex:
    return parse_index((folder / INDEX).read_bytes(), str(folder))


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def stop_at(count: int) -> Callable[[int], None]:
    """A person's Ctrl-C after so many items."""

    def progress(done: int) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def files(tmp_path: Path, make_items) -> list[Item]:
    """60 PNG files of 12x10 pixels."""
    folder = tmp_path / "files"
    folder.mkdir()
    items = []
    for item in make_items(60, shape=(12, 10, 3)):
        path = folder / f"{item.key}.png"
        Image.fromarray(item.content).save(path)
        items.append(Item(item.key, Place(path), item.label))
    return items


def test_the_index_says_what_is_there(tmp_path: Path, make_items) -> None:
    items = make_items(25)
    written = write_shards(
        items, tmp_path, Making(shard_samples=10), class_names=("a", "b", "c"), made={"source": "x"}
    )
    index = read_index(tmp_path)
    assert written.shards == index._replace(shards=written.shards.shards)
    assert index.shards.samples.tolist() == [10, 10, 5]
    assert index.image == (8, 8, 1)
    assert index.class_names == ("a", "b", "c")
    assert index.made == {
        "source": "x",
        "encoding": "npy",
        "shard_samples": 10,
        "skipped": 0,
        "table": {
            "images": 25,
            "classes": {"a": 9, "b": 8, "c": 8},
            "without_class": 0,
            "shapes": {"8x8x1 array": 25},
            "more_shapes": 0,
            "passed_over": {},
            "left_out": {},
        },
    }
    number = 0
    for shard in index.shards:
        content = (tmp_path / shard.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
        for entry in parse_entries((tmp_path / shard.entries_name).read_bytes(), shard, ""):
            image = np.load(io.BytesIO(content[entry["offset"] :][: entry["bytes"]]))
            assert np.array_equal(image, items[number].content)
            assert (entry["key"].decode(), entry["label"]) == (items[number].key, items[number].label)
            number += 1
    assert number == 25
    assert sorted(contents(tmp_path)) == sorted(
        [
            INDEX,
            NOTES,
            *(shard.name for shard in index.shards),
            *(shard.entries_name for shard in index.shards),
        ]
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
@pytest.mark.parametrize("encoding", ["npy", "png", "webp", "jpg"])
def test_plain_webdataset_reads_them(tmp_path: Path, make_items, encoding: str) -> None:
    items = make_items(25, shape=(8, 8, 3))
    write_shards(items, tmp_path, Making(shard_samples=10, encoding=encoding))
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple(encoding, "cls", "__key__")
    )
    assert [(label, key) for _, label, key in read] == [(item.label, item.key) for item in items]
    if encoding != "jpg":
        assert all(np.array_equal(one[0], item.content) for one, item in zip(read, items, strict=True))
    gc.collect()  # here, where the warning is expected


def test_the_same_items_give_the_same_bytes_in_any_number_of_processes(tmp_path: Path, make_items) -> None:
    items = make_items(2100, shape=(4, 4, 1))  # more than are written without processes
    for name, jobs in (("a", 1), ("b", 2)):
        write_shards(items, tmp_path / name, Making(shard_samples=300), jobs=jobs)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    other = write_shards(make_items(2100, shape=(4, 4, 1), seed=1), tmp_path / "c").shards.data_hash
    assert other != read_index(tmp_path / "a").data_hash


def test_a_stopped_writing_goes_on(tmp_path: Path, files: list[Item]) -> None:
    making = Making(size=8, crop="square", shard_samples=10)
    write_shards(files, tmp_path / "whole", making)

    with pytest.raises(KeyboardInterrupt):
        write_shards(files, tmp_path / "parts", making, progress=stop_at(20))
    assert not (tmp_path / "parts" / INDEX).exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.tar")}
    assert before
    (tmp_path / "parts" / "shard-000001.tar").write_bytes(b"cut")
    write_shards(files, tmp_path / "parts", making)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.tar")}
    kept = {name for name in before if before[name] == after[name]}
    assert kept == set(before) - {"shard-000001.tar"}, "only whole shards are kept, and those are"
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_an_image_that_was_mended_meanwhile_is_written_anew(tmp_path: Path, files: list[Item]) -> None:
    making = Making(encoding="keep", shard_samples=10)
    with pytest.raises(KeyboardInterrupt):
        write_shards(files, tmp_path / "parts", making, progress=stop_at(20))
    path = files[3].content.path
    path.write_bytes(path.read_bytes() + b"mended")
    write_shards(files, tmp_path / "parts", making)
    assert b"mended" in (tmp_path / "parts" / "shard-000000.tar").read_bytes()


def test_leaving_broken_images_out_keeps_the_shards_without_any(tmp_path: Path, files: list[Item]) -> None:
    broken = [*files[:45], Item("broken", b"nothing", 0), *files[45:]]
    with pytest.raises(DataError, match="--skip-broken"):
        write_shards(broken, tmp_path, Making(shard_samples=10))
    first = (tmp_path / "shard-000000.tar").stat().st_mtime_ns
    write_shards(broken, tmp_path, Making(shard_samples=10, skip_broken=True))
    assert (tmp_path / "shard-000000.tar").stat().st_mtime_ns == first


def test_a_second_writer_of_one_folder_is_refused(tmp_path: Path, make_items) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(DataError, match="another process writes to"):
        write_shards(make_items(3), tmp_path)
    write_shards(make_items(3), tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_of_a_key_that_stands_twice_none_is_taken(tmp_path: Path) -> None:
    """Members in an order that webdataset does not write: both images would lose their class."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.jpg", "b.jpg", "a.cls", "b.cls", "c.jpg"):
            content = _image(0) if name.endswith("jpg") else b"1"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"occurs again .* sorted by name"):
        index_shards(tmp_path)
    written = index_shards(tmp_path, skip_broken=True)
    (shard,) = written.shards.shards
    entries = parse_entries((tmp_path / shard.entries_name).read_bytes(), shard, "")
    assert entries["key"].tolist() == [b"c"]
    assert verify_shards(str(tmp_path), deep=True) == (1, []), "what was left out on purpose is no fault"


def test_own_shards_are_not_indexed_as_foreign_ones(tmp_path: Path, make_items) -> None:
    write_shards(make_items(3), tmp_path, class_names=("a", "b", "c"), made={"source": "digits"})
    with pytest.raises(UserError, match=r"has an index already \(of digits\)"):
        index_shards(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    assert index_shards(tmp_path).shards.num_samples == 3, "one that cannot be read is replaced"


def test_unfinished_shards_of_another_making_are_not_overwritten(tmp_path: Path, files: list[Item]) -> None:
    before = Making(size=8, crop="square", shard_samples=10)
    with pytest.raises(KeyboardInterrupt):
        write_shards(files, tmp_path / "parts", before, progress=stop_at(20))
    with pytest.raises(
        UserError, match=r"unfinished shards that were made otherwise \(size 8 -> 6\); delete"
    ):
        write_shards(files, tmp_path / "parts", before._replace(size=6))
    write_shards(files, tmp_path / "parts", before)
    assert not [
        path for path in (tmp_path / "parts").iterdir() if path.name.startswith((".shard", ".making"))
    ]


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "entries"])
def test_a_damaged_shard_of_a_finished_set_is_written_anew_alone(
    tmp_path: Path, files: list[Item], damage: str
) -> None:
    making = Making(size=8, crop="square", shard_samples=10)
    write_shards(files, tmp_path / "x", making)
    whole = contents(tmp_path / "x")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x").glob("*.tar")}
    path = tmp_path / "x" / "shard-000002.tar"
    content = bytearray(path.read_bytes())
    content[1600] ^= 1
    if damage == "entries":
        (tmp_path / "x" / "shard-000002.index.npy").unlink()
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flipped" else content[:3000])
    named = damaged_shards(read_index(tmp_path / "x"), tmp_path / "x")
    assert named == ([] if damage == "flipped" else ["shard-000002.tar"]), "sizes alone are looked at"
    write_shards(files, tmp_path / "x", making)
    assert contents(tmp_path / "x") == whole
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x").glob("*.tar")}
    assert [name for name in times if times[name] != after[name]] == ["shard-000002.tar"]


def test_an_attempt_that_wrote_nothing_binds_nobody(tmp_path: Path, files: list[Item]) -> None:
    with pytest.raises(DataError, match="too small for a crop"):
        write_shards(files, tmp_path / "x", Making(size=8, crop=500))
    assert write_shards(files, tmp_path / "x", Making(size=8, crop=6)).shards.num_samples == 60


def test_a_finished_set_is_not_mixed_with_other_images(tmp_path: Path, make_items) -> None:
    write_shards(make_items(30), tmp_path / "x", Making(shard_samples=10))
    others = make_items(30, seed=1)
    write_shards(others, tmp_path / "x", Making(shard_samples=10))
    write_shards(others, tmp_path / "y", Making(shard_samples=10))
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def test_files_are_kept_as_they_are_or_cut_to_size(tmp_path: Path, files: list[Item]) -> None:
    write_shards(files, tmp_path / "kept", Making(encoding="keep"))
    tar = (tmp_path / "kept" / "shard-000000.tar").read_bytes()
    assert all(item.content.path.read_bytes() in tar for item in files)
    assert read_index(tmp_path / "kept").image == (12, 10, 3)
    write_shards(files, tmp_path / "cut", Making(size=6, crop="square", channels=1))
    assert read_index(tmp_path / "cut").image == (6, 6, 1)


def test_about_so_many_bytes_a_shard(tmp_path: Path, files: list[Item]) -> None:
    write_shards(files, tmp_path, Making(encoding="keep", shard_bytes=30_000))
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.tar"))]
    assert len(sizes) > 2
    assert all(abs(size - 30_000) < 10_240 for size in sizes[:-1]), "tar rounds to 10,240"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_broken_image_is_refused_or_left_out(tmp_path: Path, make_items, jobs: int) -> None:
    items = make_items(2500, shape=(4, 4, 1))
    items[2300] = Item("broken", b"not an image", 0)
    with pytest.raises(DataError, match=r"image broken: it begins with 6e6f.*--skip-broken"):
        write_shards(items, tmp_path, Making(), jobs=jobs)
    assert not (tmp_path / INDEX).exists()
    written = write_shards(items, tmp_path, Making(skip_broken=True), jobs=jobs)
    assert written.shards.num_samples == 2499
    assert written.shards.made["skipped"] == len(written.skipped) == 1
    assert "broken" in written.skipped[0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.png cannot be read"):
        write_shards([Item("a", Place(tmp_path / "gone.png"), 0)], tmp_path / "out")


def test_images_of_several_shapes_are_said_to_be(tmp_path: Path, make_items) -> None:
    mixed = make_items(2) + [item._replace(key=f"x{item.key}") for item in make_items(1, shape=(4, 4, 1))]
    assert write_shards(mixed, tmp_path).shards.image is None


def test_keys_that_cannot_be_are_refused(tmp_path: Path, make_items) -> None:
    twice = make_items(2)
    with pytest.raises(DataError, match="occurs twice"):
        write_shards([twice[0], twice[0]], tmp_path)


@pytest.mark.parametrize("skip", [False, True])
def test_nothing_to_write_is_refused(tmp_path: Path, skip: bool) -> None:
    with pytest.raises(DataError, match="no image"):
        write_shards([], tmp_path, Making(skip_broken=skip))
    with pytest.raises(DataError, match=r"not a known image format|no image"):
        write_shards([Item("a", b"nothing", 0)], tmp_path, Making(skip_broken=skip))


def foreign(folder: Path, name: str, files: list[tuple[str, bytes]]) -> None:
    """A tar as others write them."""
    folder.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(folder / name), encoder=False) as tar:
        for key, content in files:
            tar.write({"__key__": key, **content})


def _image(seed: int, size: int = 9) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(values).save(buffer, "JPEG")
    return buffer.getvalue()


def test_tars_of_others_are_indexed_in_place(tmp_path: Path) -> None:
    for shard in range(3):
        files = [(f"{i:04d}", {"jpg": _image(i), "txt": b"words", "json": b"{}"}) for i in range(shard + 2)]
        foreign(tmp_path / "tars", f"cc 12m-{shard}.tar", files)
    before = contents(tmp_path / "tars")
    written = index_shards(tmp_path / "tars", jobs=2)
    index = read_index(tmp_path / "tars")
    assert written.skipped == []
    assert index.shards.samples.tolist() == [2, 3, 4]
    assert index.image == (9, 9, 3)
    assert {name: digest for name, digest in contents(tmp_path / "tars").items() if name in before} == before


def test_tars_of_others_that_are_broken_are_refused_or_thinned(tmp_path: Path) -> None:
    files = [
        ("a", {"jpg": _image(0)}),
        ("b", {"txt": b"alone"}),
        ("c", {"jpg": b"no image"}),
        ("d", {"jpg": _image(1)}),
    ]
    foreign(tmp_path / "tars", "x.tar", files)
    with pytest.raises(DataError, match=r"x.tar member 'b.txt' at byte \d+: .*, and 1 more; .*--skip-broken"):
        index_shards(tmp_path / "tars")
    written = index_shards(tmp_path / "tars", skip_broken=True)
    assert len(written.skipped) == 2
    assert written.shards.num_samples == 2
    (tmp_path / "tars" / "y.tar").write_bytes((tmp_path / "tars" / "x.tar").read_bytes()[:2500])
    with pytest.raises(DataError, match=r"y.tar: it is cut"):
        index_shards(tmp_path / "tars", skip_broken=True)


def test_an_empty_folder_and_an_empty_tar_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no .tar files"):
        index_shards(tmp_path)
    (tmp_path / "a.tar").write_bytes(bytes(10_240))
    with pytest.raises(DataError, match="holds no images"):
        index_shards(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        index_shards(tmp_path)


def test_the_index_is_plain_json(tmp_path: Path, make_items) -> None:
    write_shards(make_items(3), tmp_path)
    content = json.loads((tmp_path / INDEX).read_text())
    assert content["format"] == "vaescale-shards"
    assert content["shards"][0].endswith("shard-000000.tar")
