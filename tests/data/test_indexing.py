"""Tars made by others: the image and the class that are taken, what is said, and remedies that work."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaescale.commands.make_shards import index_shards as index_command
from vaescale.data.config import DataConfig
from vaescale.data.index import INDEX, ShardIndex, index_content, parse_entries, parse_index
from vaescale.data.making import indexing
from vaescale.data.making.indexing import index_shards, index_tars
from vaescale.data.making.items import Item
from vaescale.data.making.storing import Making
from vaescale.data.making.tar_sets import find_tars, split_of_tar
from vaescale.data.making.verifying import verify_shards
from vaescale.data.making.writing import write_shards
from vaescale.data.reader import open_reader
from vaescale.data.storage import Remote, with_tars
from vaescale.errors import DataError, UserError

Files = list[tuple[str, bytes | tuple[bytes, str]]]


def picture(value: int = 0, kind: str = "PNG", mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    fill = (value, value, value, 100)[: len(mode)]
    Image.new(mode, (4, 4), fill if len(mode) > 1 else value).save(buffer, kind)
    return buffer.getvalue()


def array(kind: type = np.uint8) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((4, 4, 1), kind))
    return buffer.getvalue()


def pack(path: Path, files: Files) -> Path:
    """A tar of files; a pair is a link, its type and its target."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path.parent


def samples(count: int, **contents: Callable[[int], bytes]) -> Files:
    """The members of `count` samples; in a name, `_` is a dot."""
    return [
        (f"{key:03d}.{extension.replace('_', '.')}", content(key))
        for key in range(count)
        for extension, content in contents.items()
    ]


def labels(index: ShardIndex) -> list[list[int]]:
    place = Path(index.place)
    return [
        parse_entries((place / shard.entries_name).read_bytes(), shard, "")["label"].tolist()
        for shard in index.shards
    ]


def is_sound(folder: Path) -> bool:
    return verify_shards(str(folder), deep=True)[1] == []


def images_of(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Key with shard, class and first value of every image, as training reads them."""
    config = DataConfig(train="", val="", image_size=4, channels=3, global_batch=1)
    opened = open_reader(str(folder), config)
    for number in range(len(opened)):
        got = opened[number]
        (key,) = opened.keys_of(np.array([number]))
        yield key, int(got.labels[0]), int(got.images[0, 0, 0, 0])


def word(key: int) -> bytes:
    return (b"dog", b"ant", b"cat")[key % 3]


TWO = samples(3, input_png=picture, target_png=lambda key: picture(100 + key))
IMAGES = {
    "one compound member": (samples(3, image_png=picture), None, [0, 1, 2], "images are the members image.png (3)"),
    "the usual one among others": (samples(3, png=picture, seg_png=picture), None, [0, 1, 2], "left out: seg.png (3)"),
    "chosen, compound": (TWO, "target.png", [100, 101, 102], "left out: input.png (3)"),
    "chosen, with a dot before it": (TWO, ".INPUT.png", [0, 1, 2], "images are the members input.png (3)"),
    "chosen of two usual ones": (samples(3, jpg=lambda _: picture(9, "JPEG"), png=picture), "png", [0, 1, 2], "left out: jpg (3)"),
    "chosen without an image's ending": (samples(3, img=picture), "img", [0, 1, 2], "images are the members img (3)"),
    "two kinds": ([*samples(1, png=picture), ("1.jpg", picture(7, "JPEG"))], None, [0, 7], ""),
    "two kinds, chosen": ([("0.a.png", picture(1)), ("1.b.png", picture(2))], "a.png,b.png", [1, 2], "a.png (1), b.png (1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_the_image_among_the_members(tmp_path: Path, capsys, name: str) -> None:
    files, member, values, said = IMAGES[name]
    index_shards(pack(tmp_path / "a.tar", files), image_member=member)
    assert [value for _, _, value in images_of(tmp_path)] == values
    assert said in capsys.readouterr().err
    assert is_sound(tmp_path)


REFUSED = {
    "several compound members": (TWO, {}, r"input.png \(3\), target.png \(3\); choose one with --image-member input.png"),
    "numbered members": (samples(2, **{"0_png": picture, "1_png": picture}), {}, r"0.png \(2\), 1.png \(2\); choose .* --image-member 0.png"),
    "several usual members": (samples(2, png=picture, webp=picture), {}, r"2 of 2 samples .*: png \(2\), webp \(2\); .*--image-member png"),
    "dots in names": ([(f"22.0{key}.png", picture()) for key in range(3)], {}, r"split at the first dot.*of '22.00.png', the key is '22'"),
    "no image": (samples(2, txt=word, tif=picture), {}, r"no images .* but tif \(2\), txt \(2\); unpack .*make-shards folder:DIR OUT"),
    "no image at all": (samples(2, txt=word), {}, r"no images .* but txt \(2\); .*--image-member"),
    "unknown member": (TWO, {"image_member": "x.jpg"}, r"no member 'x.jpg'|no sample .* has a member 'x.jpg'; the members are input.png \(3\)"),
    "unknown class": (samples(2, png=picture), {"class_member": "label"}, r"--class-member label: no sample"),
    "a whole object": (samples(2, png=picture), {"class_member": "json"}, r"name its field, such as json:label"),
    "no folders": (samples(2, png=picture), {"class_member": "folder"}, r"no name in the tars has a folder"),
    "texts as classes": (samples(8, png=picture, json=lambda key: json.dumps({"label": f"text {key}"}).encode()), {}, r"8 different words for 8 .*--class-member json:label, or .*--class-member none"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_sure_is_refused_with_the_choices(tmp_path: Path, name: str) -> None:
    files, options, message = REFUSED[name]
    pack(tmp_path / "a.tar", files)
    for skip_broken in (False, True):
        with pytest.raises((DataError, UserError), match=message) as caught:
            index_shards(tmp_path, skip_broken=skip_broken, **options)
        assert "\n" not in str(caught.value)
        assert "--skip-broken" not in str(caught.value)
    assert not (tmp_path / INDEX).exists()


def fields(**values: object) -> Callable[[int], bytes]:
    """JSON objects; a list has the value of each sample."""
    return lambda key: json.dumps(
        {n: v[key] if isinstance(v, list) else v for n, v in values.items()}
    ).encode()


FOLDERS: Files = [(f"n0{key % 2}/{key}.png", picture(key)) for key in range(4)]
CLASSES = {
    "numbers": (samples(3, cls=b"%d".__mod__, png=picture), None, [0, 1, 2], "0 1 2", ""),
    "numbers and none": (samples(3, cls=lambda key: b"%d" % (key - 1), png=picture), None, [-1, 0, 1], "0 1", "1 of 3 images have no class"),
    "phantoms": (samples(3, cls=lambda key: b"%d" % (3 + 2 * key), png=picture), None, [3, 5, 7], "0 1 2 3 4 5 6 7", "5 of 8 classes have no image: 0-2, 4, 6"),
    "words": (samples(3, cls=word, png=picture), None, [2, 0, 1], "ant cat dog", "3 words in cls, numbered in sorted order: ant, cat, dog"),
    "json numbers": (samples(3, png=picture, json=fields(label=[2, 0.0, "1"], cls=9)), None, [2, 0, 1], "0 1 2", "classes in json:cls are left out (3 samples)"),
    "json words": (samples(3, png=picture, json=fields(**{"class": ["b", None, "a"]})), None, [1, -1, 0], "a b", "1 of 3 images have no class"),
    "a field": (samples(3, png=picture, json=fields(kind=[1, 0, 1])), "json:kind", [1, 0, 1], "0 1", "the numbers in json:kind of 3 samples"),
    "another member": (samples(3, label=word, png=picture), ".Label", [2, 0, 1], "ant cat dog", "3 words in label"),
    "left out": (samples(3, cls=word, png=picture), "none", [-1, -1, -1], "", "members left out: cls (3)"),
    "captions": (samples(3, png=picture, txt=word), None, [-1, -1, -1], "", "members left out: txt (3, captions)"),
    "img2dataset": (samples(3, png=picture, json=fields(status="success", caption="a", key="0"), txt=word), None, [-1, -1, -1], "", "json (3, without label, cls or class)"),
    "folders": (FOLDERS, None, [0, 1, 0, 1], "n00 n01", "2 words in folder"),
    "folders below others": ([(f"./train/{name}", content) for name, content in FOLDERS], None, [0, 1, 0, 1], "n00 n01", "2 words in folder"),
    "folders and cls": ([*FOLDERS[:2], ("n01/1.cls", b"0")], None, [-1, 0], "0", "1 of 2 images have no class"),
    "folders of parts": ([(f"a{key}/{key}.png", picture(key)) for key in range(4)], None, [-1] * 4, "", "not taken as classes: there are 4 for 4 samples"),
    "folders of splits": ([(f"{('train', 'val')[key % 2]}/{key}.png", picture(key)) for key in range(4)], None, [-1] * 4, "", "they have the names of splits"),
    "folders and none": ([*FOLDERS, ("5.png", picture(5))], None, [-1] * 5, "", "not every name has exactly one folder"),
    "folders wanted": ([*FOLDERS, ("5.png", picture(5))], "folder", [0, 1, 0, 1, -1], "n00 n01", "1 of 5 images have no class"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_among_the_members(tmp_path: Path, capsys, name: str) -> None:
    files, member, expected, names, said = CLASSES[name]
    index = index_shards(pack(tmp_path / "a.tar", files), class_member=member).shards
    assert labels(index) == [expected]
    assert " ".join(index.class_names) == names
    assert [label for _, label, _ in images_of(tmp_path)] == expected
    assert said in capsys.readouterr().err
    assert is_sound(tmp_path)
    assert parse_index((tmp_path / INDEX).read_bytes(), str(tmp_path)).made == index.made


def test_words_are_numbered_over_all_tars_and_splits(tmp_path: Path, capsys) -> None:
    pack(tmp_path / "Train" / "a.tar", samples(3, cls=word, png=picture))
    pack(tmp_path / "Train" / "b.tar", [("x.cls", b"bee"), ("x.png", picture())])
    pack(tmp_path / "validation" / "a.tar", [("x.cls", b"cat"), ("x.png", picture())])
    result = index_command(tmp_path, jobs=1)
    assert {split: one["classes"] for split, one in result.items()} == {"train": 4, "val": 4}
    indices = [
        parse_index((tmp_path / n / INDEX).read_bytes(), str(tmp_path / n)) for n in ("Train", "validation")
    ]
    assert [labels(index) for index in indices] == [[[3, 0, 2], [1]], [[2]]]
    assert {index.class_names for index in indices} == {("ant", "bee", "cat", "dog")}
    assert "validation: 3 of 4 classes have no image: ant, bee, dog" in capsys.readouterr().err
    assert is_sound(tmp_path / "validation")


def test_folders_named_after_their_tars_are_no_classes(tmp_path: Path, capsys) -> None:
    for number in (0, 1):
        files: Files = [(f"0000{number}/{key}.png", picture(key)) for key in range(2)]
        pack(tmp_path / f"0000{number}.tar", files)
    assert labels(index_shards(tmp_path).shards) == [[-1, -1], [-1, -1]]
    assert "each is named after its tar" in capsys.readouterr().err


def test_one_key_in_every_tar_stays_two_images(tmp_path: Path) -> None:
    for number in (0, 1):
        pack(tmp_path / f"{number}.tar", [("a.png", picture(10 * number))])
    index_shards(tmp_path)
    assert list(images_of(tmp_path)) == [("0.tar:a", -1, 0), ("1.tar:a", -1, 10)]
    assert is_sound(tmp_path)


@pytest.mark.parametrize("kind", [(tarfile.SYMTYPE, "/etc/hostname"), (tarfile.LNKTYPE, "000.png")])
def test_a_link_costs_one_sample(tmp_path: Path, kind: tuple[bytes, str]) -> None:
    pack(
        tmp_path / "a.tar",
        [*samples(2, png=picture), ("k.png", kind), ("m.png", picture(3)), ("m.txt", kind)],
    )
    with pytest.raises(DataError, match=r"'k' is a link \(k.png\).*--hard-dereference\), or .*--skip-broken"):
        index_shards(tmp_path)
    written = index_shards(tmp_path, skip_broken=True)
    assert written.shards.num_samples == 3
    assert len(written.skipped) == 1
    assert is_sound(tmp_path)


def test_a_dot_in_one_name_is_one_unusable_sample(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", [*samples(2, png=picture), ("img.3.png", picture())])
    message = (
        r"'img' has 0 images .* among 3.png, not one; names are split at the first dot, .*; mend it, or leave"
    )
    with pytest.raises(DataError, match=message):
        index_shards(tmp_path)
    assert index_shards(tmp_path, skip_broken=True).shards.num_samples == 2


def test_two_of_the_chosen_members_in_each_sample(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"none of 3 .*has 2 images .*; name one member of each sample with --image-member"
    ):
        index_shards(pack(tmp_path / "a.tar", TWO), image_member="input.png,target.png")
    assert index_shards(tmp_path, image_member="target.png").shards.num_samples == 3


def test_members_apart_and_the_remedy(tmp_path: Path) -> None:
    files = samples(3, png=picture, cls=b"%d".__mod__)
    apart = sorted(files, key=lambda file: file[0].rpartition(".")[2])
    pack(tmp_path / "a.tar", apart)
    for skip_broken in (False, True):
        with pytest.raises(DataError, match=r"none of 3 samples .*, 3 for the same reason: .*'000' occurs again.*sorted by name") as caught:  # fmt: skip
            index_shards(tmp_path, skip_broken=skip_broken)
        assert "--skip-broken" not in str(caught.value)
    pack(tmp_path / "a.tar", sorted(apart))
    assert labels(index_shards(tmp_path).shards) == [[0, 1, 2]]


NONE_LEFT = {
    "transparent": ("png", lambda _: picture(5, mode="RGBA"), "transparency (3); unpack", picture(5)),
    "int16": ("npy", lambda _: array(np.int16), "its values are int16, not uint8; keep them with --dtype int16", array()),
    "gif": ("jpg", lambda _: picture(5, "GIF"), "make-shards folder:DIR OUT", None),
    "links": ("png", lambda _: (tarfile.SYMTYPE, "/etc/hostname"), "store the files themselves", picture()),
}  # fmt: skip


@pytest.mark.parametrize("name", NONE_LEFT)
def test_where_nothing_is_left_the_remedy_is_another_one(tmp_path: Path, name: str) -> None:
    extension, content, remedy, mended = NONE_LEFT[name]
    pack(tmp_path / "a.tar", [(f"{key}.{extension}", content(key)) for key in range(3)])
    for skip_broken in (False, True):
        with pytest.raises(DataError, match="none of 3") as caught:
            index_shards(tmp_path, skip_broken=skip_broken)
        assert remedy in str(caught.value)
        assert "--skip-broken" not in str(caught.value)
    if mended is None:  # unpacked, they are images of a folder
        items = [Item(str(key), content(key), -1) for key in range(3)]
        assert write_shards(items, tmp_path / "out").shards.num_samples == 3
    else:
        pack(tmp_path / "a.tar", [(f"{key}.{extension}", mended) for key in range(3)])
        assert index_shards(tmp_path).shards.num_samples == 3


def test_some_transparent_images_are_counted(tmp_path: Path, capsys) -> None:
    files = [*samples(3, png=picture), ("x.png", picture(mode="RGBA")), ("y.png", picture(255, mode="L"))]
    assert index_shards(pack(tmp_path / "a.tar", files)).shards.num_samples == 5
    assert "1 of 5 images cannot be used: transparency (1)" in capsys.readouterr().err


def test_a_usable_tar_after_unusable_ones(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", samples(2, npy=lambda _: array(np.int16)))
    pack(tmp_path / "b.tar", samples(2, npy=lambda _: array()))
    with pytest.raises(
        DataError, match=r"a.tar member '000'.*and 1 more; convert them to 8 bits.*or leave .*--skip-broken"
    ):
        index_shards(tmp_path)
    assert index_shards(tmp_path, skip_broken=True).shards.num_samples == 2


def test_a_writer_advises_to_leave_out_only_where_something_is_left(tmp_path: Path) -> None:
    broken = [Item(str(key), picture(mode="RGBA"), -1) for key in range(3)]
    with pytest.raises(DataError, match="none of the first 3 images") as caught:
        write_shards(broken, tmp_path / "a")
    assert "--skip-broken" not in str(caught.value)
    with pytest.raises(
        DataError, match=r"3 of 3 images cannot be used .*transparent.*another colour, or .*alpha channel$"
    ):
        write_shards(broken, tmp_path / "b", Making(skip_broken=True))
    with pytest.raises(DataError, match="--skip-broken"):
        write_shards([*broken, Item("x", picture(), -1)], tmp_path / "c")
    converted = [item._replace(content=picture()) for item in broken]
    assert write_shards(converted, tmp_path / "a").shards.num_samples == 3


def test_an_index_elsewhere(tmp_path: Path, monkeypatch) -> None:
    tars = pack(tmp_path / "tars" / "a.tar", samples(3, cls=word, png=picture))
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, _: Path(path) != tars)
        with pytest.raises(DataError, match=r"tars cannot be written; .*--index-dir DIR"):
            index_shards(tars)
        result = index_command(tars, index_dir=tmp_path / "new" / "index", jobs=1)
    assert [path.name for path in tars.iterdir()] == ["a.tar"]
    place = tmp_path / "new" / "index"
    assert result["index"]["tars"] == str(tars)
    assert [(label, value) for _, label, value in images_of(place)] == [(2, 0), (0, 1), (1, 2)]
    assert is_sound(place)
    with (tars / "a.tar").open("r+b") as file:
        file.seek(1600)
        file.write(b"other")
    assert not is_sound(place)
    shutil.rmtree(tars)
    with pytest.raises(DataError, match=r"tars, which the index .* names .* is not there; mount it"):
        list(images_of(place))


@pytest.mark.parametrize("tars", ["relative", "/a/../etc", "s3://bucket", "/a\nb"])
def test_an_index_names_no_other_place(tmp_path: Path, tars: str) -> None:
    index = index_shards(pack(tmp_path / "a.tar", samples(1, png=picture))).shards
    with pytest.raises(DataError, match="not the absolute path of a folder"):
        parse_index(index_content(index._replace(tars=tars)), "x")


def test_an_index_on_a_server_names_no_folder_here(tmp_path: Path) -> None:
    store = Remote("http://127.0.0.1:9/x", cache=tmp_path, cache_bytes=1, retry_seconds=1)
    with pytest.raises(DataError, match="only an index in a folder of this machine"):
        with_tars(store, "/etc")
    assert with_tars(store, "") is store


def test_tars_of_several_splits_in_one_folder(tmp_path: Path) -> None:
    assert [split_of_tar(name) for name in ("x-Train-000.tar", "x_val.tar", "photos.tar", "train-val-1.tar")] == ["train", "val", "", ""]  # fmt: skip
    tars = tmp_path / "tars"
    for number, split in enumerate(("train", "train", "val")):
        pack(tars / f"set-{split}-{number}.tar", samples(2, cls=word, png=picture))
    with pytest.raises(
        DataError, match=r"several splits by their names \(2 train, 1 val\); add --index-dir DIR"
    ):
        find_tars(tars)
    written = index_tars(find_tars(tars, tmp_path / "index"))
    assert {split: one.shards.num_samples for split, one in written.items()} == {"train": 4, "val": 2}
    assert len(list(images_of(tmp_path / "index" / "val"))) == 2
    assert is_sound(tmp_path / "index" / "train")
    pack(tars / "set-train-9.tar", samples(1, png=picture))
    assert not is_sound(tmp_path / "index" / "train"), "a tar of this split is not in the index"
    pack(tars / "more.tar", samples(1, png=picture))
    with pytest.raises(DataError, match=r"1 of no split, 3 train, 1 val, such as more.tar\); move"):
        find_tars(tars, tmp_path / "index")


def test_what_is_beside_the_tars_is_said(tmp_path: Path, capsys) -> None:
    pack(tmp_path / "00000.tar", samples(1, png=picture))
    for name in ("00000.parquet", "00000_stats.json", "x.tar.gz", "B.TAR"):
        (tmp_path / name).write_bytes(b"x")
    pack(tmp_path / "more" / "a.tar", samples(1, png=picture))
    index_shards(tmp_path)
    index_shards(tmp_path)  # again: the index is no stranger
    said = capsys.readouterr().err.splitlines()[0]
    assert all(words in said for words in ("1 .parquet", "1 .json", "1 .gz", "1 .TAR", "1 folder more")), said
    assert "index" not in said


def test_a_file_of_a_class_is_read_with_bounds(tmp_path: Path) -> None:
    bad = {"long": b"x" * 300, "big": b"1" + b" " * (1 << 20), "lines": b"a\nb", "json": b"[" * 100_000}
    for name, content in bad.items():
        member = "json" if name == "json" else "cls"
        files = [*samples(2, png=picture, **{member: fields(label=1) if name == "json" else b"%d".__mod__}), (f"x.{member}", content), ("x.png", picture())]  # fmt: skip
        pack(tmp_path / name / "a.tar", files)
        with pytest.raises(
            DataError, match=r"key 'x' has no usable class .*--class-member none.*--skip-broken"
        ):
            index_shards(tmp_path / name)
        assert index_shards(tmp_path / name, skip_broken=True).shards.num_samples == 2
        assert index_shards(tmp_path / name, class_member="none").shards.num_samples == 3


@pytest.mark.parametrize("most", [1 << 20, 0])
def test_headers_are_read_once(tmp_path: Path, monkeypatch, most: int) -> None:
    """Also for words as classes, whose numbers are known only when all tars are read; twice beyond what is held in memory."""
    for name in ("a", "b"):
        pack(
            tmp_path / f"{name}.tar",
            samples(5, png=picture, cls=lambda number: b"ant" if number % 2 else b"bee"),
        )
    headers, original = [], tarfile.TarFile.next

    def counted(self: tarfile.TarFile) -> tarfile.TarInfo | None:
        headers.append(self)
        return original(self)

    monkeypatch.setattr(tarfile.TarFile, "next", counted)
    monkeypatch.setattr(indexing, "MOST_HEADER_BYTES", most)
    written = index_shards(tmp_path)
    assert written.shards.class_names == ("ant", "bee")
    assert len(headers) == 2 * (10 + 2) * (1 if most else 2), (
        "ten members, the end, and a first one by tarfile itself"
    )
    assert verify_shards(str(tmp_path), deep=True) == (10, [])
