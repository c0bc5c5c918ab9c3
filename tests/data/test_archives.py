"""Zip and tar archives of folders are read as the folders that they hold, without unpacking, and refused in one sentence."""

import gzip
import io
import itertools
import os
import pickle
import re
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaescale.commands.make_shards import index_shards, make_shards
from vaescale.data.making import items as making_items
from vaescale.data.making.items import Item, Packed, open_item
from vaescale.data.making.sources import archives, forward, open_source
from vaescale.data.making.sources import files as files_module
from vaescale.data.pictures import PictureFault, decode
from vaescale.errors import DataError

KINDS = ("zip", "tar", "tar.gz", "tar.xz", "tar.bz2")


def picture(number: int, *, size: tuple[int, int] = (4, 4)) -> bytes:
    """A PNG of one grey value, which says which one it is."""
    buffer = io.BytesIO()
    Image.new("L", size, number).save(buffer, "PNG")
    return buffer.getvalue()


def tree(*folders: str, each: int = 3) -> dict[str, bytes]:
    """Some images in each folder, each with a value of its own."""
    names = [f"{folder}/{number}.png" for folder in folders for number in range(each)]
    return {name: picture(place) for place, name in enumerate(names)}


def pack(path: Path, files: dict[str, bytes]) -> Path:
    """An archive of the kind that its name tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    ending = path.name.rpartition(".tar")[2].removeprefix(".")
    with tarfile.open(path, f"w:{ending}") as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def unpack(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def value(item: Item) -> int:
    content = open_item(item)
    assert isinstance(content, bytes)
    return int(decode(content)[0, 0, 0])


def listed(argument: str, **options: object) -> dict[str, dict[str, tuple[str, int]]]:
    """For each split, key -> (name of the class, value)."""
    result = {}
    for name, split in open_source(argument, **{"holdout": 0, **options}).splits.items():
        whole = split()
        names = (*whole.class_names, "")
        got = {item.key: (names[item.label], value(item)) for item in whole.items}
        assert whole.number == len(got)
        result[name] = got
    return result


SPLITS = {**tree("set/train/ant", "set/train/bee", "set/val/ant", "set/__MACOSX/x"), "set/README.md": b"x"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_is_the_folder_that_it_holds(tmp_path: Path, kind: str, capsys) -> None:
    unpack(tmp_path / "folder", SPLITS)
    expected = listed(f"folder:{tmp_path}/folder")
    assert {split: len(rows) for split, rows in expected.items()} == {"train": 6, "val": 3}
    pack(tmp_path / f"a.{kind}", SPLITS)
    before = set(tmp_path.rglob("*"))
    capsys.readouterr()
    assert listed(f"folder:{tmp_path}/a.{kind}") == expected
    assert set(tmp_path.rglob("*")) == before, "nothing is unpacked"
    said = capsys.readouterr().err
    assert f"the images are read from {tmp_path}/a.{kind}/set" in said
    assert "left out: __MACOSX" in said
    assert "val has no image of 1 of 2 classes (bee)" in said


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_an_archive_have_the_bytes_of_those_of_its_folder(tmp_path: Path, kind: str) -> None:
    files = tree("ant", "bee", each=20)
    unpack(tmp_path / "folder", files)
    pack(tmp_path / f"a.{kind}", files)
    hashes = []
    for source in ("folder", f"a.{kind}"):
        result = make_shards(f"folder:{tmp_path}/{source}", tmp_path / f"out of {source}", jobs=1)
        hashes.append({split: one["samples"] for split, one in result.items()})
        if kind in ("zip", "tar"):
            hashes[-1] |= {f"{split} hash": one["data_hash"] for split, one in result.items()}
    assert hashes[0] == hashes[1]
    assert hashes[0]["val"] >= 1


def test_a_zip_is_read_by_several_processes(tmp_path: Path) -> None:
    """Their items are pickled: they hold no open file."""
    pack(tmp_path / "a.zip", tree("ant", "bee"))
    split = open_source(f"folder:{tmp_path}/a.zip", holdout=0).splits["train"]()
    copies = pickle.loads(pickle.dumps(list(split.items)))  # noqa: S301  # its own
    assert sorted(map(value, copies)) == list(range(6))
    assert all(isinstance(item.content, Packed) for item in copies)


def test_one_archive_per_split_and_an_archive_that_lies_in_a_folder(tmp_path: Path, capsys) -> None:
    pack(tmp_path / "a" / "train.zip", tree("train/ant", "train/bee"))
    pack(tmp_path / "a" / "val.tar", tree("ant", "bee"))
    pack(tmp_path / "a" / "test.tar.gz", tree("test"))
    splits = listed(f"folder:{tmp_path}/a")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6, "val": 6, "test": 3}
    assert splits["train"] == splits["val"]
    assert {name for name, _ in splits["test"].values()} == {""}
    pack(tmp_path / "b" / "photos.zip", tree("train/ant", "train/bee"))
    assert listed(f"folder:{tmp_path}/b") == {"train": splits["train"]}
    assert f"the images are read from {tmp_path}/b/photos.zip" in capsys.readouterr().err
    pack(tmp_path / "b" / "labels.zip", tree("x"))
    with pytest.raises(DataError, match=r"give one of its archives \(2 \.zip\), such as .*labels\.zip"):
        listed(f"folder:{tmp_path}/b")
    chosen = listed(f"folder:{tmp_path}/b", splits="train=photos.zip,val=labels.zip")
    assert chosen["train"] == splits["train"]
    assert len(chosen["val"]) == 3


def test_archives_beside_their_unpacked_folders_are_not_read_twice(tmp_path: Path, capsys) -> None:
    unpack(tmp_path, tree("train/ant", "train/bee"))
    pack(tmp_path / "train.zip", tree("train/ant", "train/bee"))
    pack(tmp_path / "val.zip", tree("val/ant", "val/bee"))
    pack(tmp_path / "more.zip", tree("ant"))
    splits = listed(f"folder:{tmp_path}")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 6, "val": 6}
    assert "left out: more.zip, train.zip" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "imagenet"])
def test_tiny_imagenet_as_it_is_published(tmp_path: Path, kind: str, capsys) -> None:
    wnids = ("n01443537", "n01629819")
    files = {f"{wnid}/images/{wnid}_{number}.JPEG": picture(number) for wnid in wnids for number in range(2)}
    files = {f"tiny-imagenet-200/train/{name}": content for name, content in files.items()}
    files |= {f"tiny-imagenet-200/val/images/val_{number}.JPEG": picture(number) for number in range(2)}
    rows = "".join(f"val_{number}.JPEG\t{wnids[number]}\t0\t0\t62\t57\n" for number in range(2))
    files["tiny-imagenet-200/val/val_annotations.txt"] = rows.encode()
    splits = listed(f"{kind}:{pack(tmp_path / 'tiny-imagenet-200.zip', files)}")
    assert {name.rpartition("/")[2]: label for name, (label, _) in splits["val"].items()} == {
        "val_0": wnids[0],
        "val_1": wnids[1],
    }
    assert sorted(label for label, _ in splits["train"].values()) == sorted(wnids * 2)
    assert "left out" not in capsys.readouterr().err, "the file with the classes is read"


@pytest.mark.parametrize("given", ["", "Img", "Img/img_align_celeba.zip"])
def test_celeba_as_it_is_published(tmp_path: Path, given: str) -> None:
    files = {f"img_align_celeba/{number:06d}.jpg": picture(number) for number in range(3)}
    pack(tmp_path / "CelebA" / "Img" / "img_align_celeba.zip", files)
    rows = "".join(f"{number:06d}.jpg {number}\n" for number in range(3)).encode()
    unpack(tmp_path / "CelebA", {"Eval/list_eval_partition.txt": rows})
    expected = {split: {f"{n:06d}": ("", n)} for n, split in enumerate(("train", "val", "test"))}
    assert listed(f"celeba:{tmp_path}/CelebA/{given}") == expected
    whole = pack(tmp_path / "archive.zip", {f"img_align_celeba/{name}": content for name, content in files.items()} | {"list_eval_partition.csv": rows.replace(b" ", b",")})  # fmt: skip
    assert listed(f"celeba:{whole}") == expected, "Kaggle's"


@pytest.mark.parametrize("packed", [False, True])
def test_omniglot_as_it_is_published(tmp_path: Path, packed: bool, capsys) -> None:
    splits = {"images_background": ("Greek", "Latin"), "images_evaluation": ("Tengwar",)}
    for name, alphabets in splits.items():
        folders = [f"{name}/{alphabet}/character{number:02d}" for alphabet in alphabets for number in (1, 2)]
        files = {}
        for place, folder in enumerate(folders):
            buffer = io.BytesIO()
            Image.fromarray(np.arange(25).reshape(5, 5) % 2 == place % 2).save(buffer, "PNG")
            files[f"{folder}/{place:04d}_01.png"] = buffer.getvalue()
        assert Image.open(io.BytesIO(files[f"{folders[0]}/0000_01.png"])).mode == "1"
        if packed:
            pack(tmp_path / f"{name}.zip", files)
        else:
            unpack(tmp_path, files)
    source = open_source(f"folder:{tmp_path}")
    assert source.splits.keys() == {"train", "test"}
    train, test = source.splits["train"](), source.splits["test"]()
    assert train.class_names == test.class_names
    assert train.class_names == tuple(f"{alphabet}/character{n:02d}" for alphabet in ("Greek", "Latin", "Tengwar") for n in (1, 2))  # fmt: skip
    assert sorted(item.label for item in train.items) == [0, 1, 2, 3]
    assert sorted(item.label for item in test.items) == [4, 5]
    for item in train.items:
        content = open_item(item)
        assert isinstance(content, bytes)
        place = int(item.key.rpartition("/")[2][:4])
        bits = np.arange(25).reshape(5, 5) % 2 == place % 2
        assert np.array_equal(decode(content)[:, :, 0], bits * 255)
    assert "classes are ALPHABET/characterNN" in capsys.readouterr().err


def damaged(path: Path, fault: str) -> Path:
    """An archive with a fault."""
    files = tree("ant", "bee")
    if fault == "cut zip":
        content = pack(path / "a.zip", files).read_bytes()
        (path / "a.zip").write_bytes(content[: len(content) // 2])
    elif fault == "empty zip":
        (path / "a.zip").write_bytes(b"")
    elif fault == "encrypted":
        content = bytearray(pack(path / "a.zip", files).read_bytes())
        at = -1
        while (at := content.find(b"PK\1\2", at + 1)) >= 0:  # a flag in the list at the end
            content[at + 8] |= 1
        (path / "a.zip").write_bytes(content)
    elif fault == "method":
        with zipfile.ZipFile(path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("ant/1.png", files["ant/1.png"])
    elif fault.startswith("unsafe"):
        pack(path / f"a.{fault.partition(' ')[2]}", {"../x.png": b"x", **files})
    elif fault == "zips in a zip":
        pack(path / "a.zip", {"train.zip": b"x", "test1.zip": b"x"})
    else:
        kind = fault.partition(" ")[2]
        content = pack(path / f"a.{kind}", files).read_bytes()
        (path / f"a.{kind}").write_bytes(content[: len(content) * 2 // 3])
    return next(path.iterdir())


FAULTS = {
    "cut zip": "a.zip is cut or is no zip .*fetch it again",
    "empty zip": r"a.zip is no archive: it is empty \(0 bytes\)",
    "encrypted": "6 of 6 files, such as 'ant/0.png', are encrypted; unpack it with its password",
    "method": "1 of 1 files, such as 'ant/1.png', are compressed in a way that is not read; unpack it",
    "unsafe zip": "1 of 7 files, such as '../x.png', have unsafe names",
    "unsafe tar": "'../x.png' has an unsafe name",
    "unsafe tar.gz": "'../x.png' has an unsafe name",
    "zips in a zip": "unpack .*a.zip, whose 2 .zip files are archives, and give the folder",
    "cut tar": "a.tar: it is cut|a.tar: it ends at",
    "cut tar.gz": "a.tar.gz",
    "cut tar.xz": "a.tar.xz",
    "cut tar.bz2": "a.tar.bz2",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_archives_that_are_not_sound_are_one_sentence(tmp_path: Path, fault: str) -> None:
    path = damaged(tmp_path, fault)
    with pytest.raises(DataError, match=FAULTS[fault]) as caught:
        open_source(f"folder:{path}").splits["train"]()
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value), "a remedy"


def test_the_remedy_for_zips_in_a_zip_works(tmp_path: Path) -> None:
    inner = pack(tmp_path / "train.zip", tree("ant", "bee"))
    outer = pack(tmp_path / "a.zip", {"train.zip": inner.read_bytes(), "notes.zip": b"x"})
    inner.unlink()
    with pytest.raises(DataError, match="and give the folder"):
        listed(f"folder:{outer}")
    with zipfile.ZipFile(outer) as archive:
        archive.extract("train.zip", tmp_path / "out")
    assert len(listed(f"folder:{tmp_path}/out")["train"]) == 6


@pytest.mark.parametrize("fault", ["method", "unsafe zip", "unsafe tar", "encrypted"])
def test_the_other_remedies_work(tmp_path: Path, fault: str) -> None:
    """To pack it again, with deflate and without unsafe names, or to unpack it."""
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError):
        listed(f"folder:{damaged(tmp_path / 'in', fault)}")
    files = tree("ant", "bee")
    again = pack(tmp_path / f"again{'.tar' if 'tar' in fault else '.zip'}", files)
    assert len(listed(f"folder:{again}")["train"]) == 6
    assert listed(f"folder:{unpack(tmp_path / 'out', files)}") == listed(f"folder:{again}")


def test_an_image_that_a_zip_does_not_hold_soundly_is_one_fault(tmp_path: Path, monkeypatch) -> None:
    files = {f"{number}.png": picture(number) for number in range(4)}
    path = pack(tmp_path / "a.zip", files)
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
    content = bytearray(path.read_bytes())
    content[infos["1.png"].header_offset] ^= 255
    content[infos["2.png"].header_offset + 30 + 5 + 10] ^= 255
    end = content.find(b"PK\1\2", content.find(b"PK\1\2", content.find(b"PK\1\2", content.find(b"PK\1\2") + 1) + 1) + 1)  # fmt: skip
    content[end + 24 : end + 28] = (1 << 30).to_bytes(4, "little")  # the size that the last one claims
    path.write_bytes(content)
    found = {item.key: item for item in open_source(f"folder:{path}", holdout=0).splits["train"]().items}
    assert value(found["0"]) == 0
    for key, reason in (("1", "damaged"), ("2", "damaged"), ("3", "pixels")):
        with pytest.raises(PictureFault) as caught:
            open_item(found[key])
        assert caught.value.reason == reason
    result = make_shards(f"folder:{path}", tmp_path / "out", skip_broken=True, holdout=0)
    assert (result["train"]["samples"], result["train"]["skipped"]) == (1, 3)
    with pytest.raises(DataError, match=r"a\.zip/[123]\.png: .*--skip-broken"):
        make_shards(f"folder:{path}", tmp_path / "again", holdout=0)


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_file_that_expands_to_too_much_is_not_expanded(tmp_path: Path, monkeypatch, kind: str) -> None:
    for module in (making_items, forward):
        monkeypatch.setattr(module, "MOST_FILE_BYTES", 1000)
    path = pack(tmp_path / f"a.{kind}", {"large.png": bytes(1001), "small.png": picture(9)})
    for item in open_source(f"folder:{path}", holdout=0).splits["train"]().items:
        if item.key == "small":
            assert value(item) == 9
        else:
            with pytest.raises(PictureFault, match="expands to 1001 bytes"):
                open_item(item)


def test_links_in_archives_are_counted_and_not_followed(tmp_path: Path, capsys) -> None:
    content = picture(5)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("real.png")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
        for name, kind in (("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    assert listed(f"folder:{tmp_path}/a.tar") == {"train": {"real": ("", 5)}}
    assert "2 links are left out" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("real.png", content)
        link = zipfile.ZipInfo("soft.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    assert listed(f"folder:{tmp_path}/a.zip") == {"train": {"real": ("", 5)}}
    assert "1 links are left out" in capsys.readouterr().err


def test_names_of_other_programs(tmp_path: Path, capsys) -> None:
    """Backslashes, leading `./`, names that occur twice, and the resource forks of macOS."""
    path = pack(
        tmp_path / "a.tar", {"./ant/1.png": picture(1), "./bee/2.png": picture(2), "./bee/._2.png": b"x"}
    )
    assert listed(f"folder:{path}")["train"] == {"ant/1": ("ant", 1), "bee/2": ("bee", 2)}
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("ant\\1.png", picture(1))
        archive.writestr("bee\\2.png", picture(2))
    assert listed(f"folder:{tmp_path}/b.zip") == listed(f"folder:{path}")
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("ant/1.png")
        info.size = len(picture(7))
        tar.addfile(info, io.BytesIO(picture(7)))
    capsys.readouterr()
    assert listed(f"folder:{path}")["train"]["ant/1"] == ("ant", 7), "as unpacking leaves it"
    assert "1 names occur again" in capsys.readouterr().err


def test_a_compressed_tar_is_read_in_one_pass_for_each_split(tmp_path: Path, monkeypatch) -> None:
    path = pack(tmp_path / "a.tar.gz", tree("train/ant", "train/bee", "test/ant", "test/bee", each=30))
    opened, back = [], []
    original, seek = forward.Forward.__init__, forward.Forward.seek

    def counted(self: forward.Forward, raw: object) -> None:
        opened.append(self)
        original(self, raw)

    def sought(self: forward.Forward, offset: int, whence: int = 0) -> int:
        back.append(self._end - offset)
        return seek(self, offset, whence)

    monkeypatch.setattr(forward.Forward, "__init__", counted)
    monkeypatch.setattr(forward.Forward, "seek", sought)
    source = open_source(f"folder:{path}")
    assert len(opened) == 1, "for the list"
    assert max(back) <= 1024
    labels = [item.label for item in source.splits["train"]().items]
    list(source.splits["test"]().items)
    assert len(opened) == 3
    assert sum(a != b for a, b in itertools.pairwise(labels)) > 15, "classes are mixed"


def test_a_stream_is_mixed_in_blocks_and_held_out_by_name(tmp_path: Path, monkeypatch, capsys) -> None:
    files = tree("ant", "bee", each=30)
    path = pack(tmp_path / "a.tar.gz", files)
    one, unpacked = listed(f"folder:{path}", holdout=0.2), unpack(tmp_path / "f", files)
    assert one == listed(f"folder:{unpacked}", holdout=0.2)
    assert "MiB" not in capsys.readouterr().err
    for module in (forward, files_module):
        monkeypatch.setattr(module, "MIXED_BYTES", 500)
    assert listed(f"folder:{path}", holdout=0.2) == one
    assert "images are mixed only within blocks" in capsys.readouterr().err
    assert len(make_shards(f"folder:{path}", tmp_path / "out", limit=4, holdout=0)) == 1


def test_forward_reads_what_the_file_holds(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(3 << 20)
    file = forward.Forward(io.BytesIO(content))
    for offset, size in ((0, 512), (0, 512), (2 << 20, 100), ((2 << 20) - 1000, 2000), (3 << 20, 10)):
        file.seek(offset)
        assert file.read(size) == content[offset : offset + size]
        assert file.tell() == min(len(content), offset + size)
    with pytest.raises(OSError, match="forwards only"):
        file.seek(0)


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    with pytest.raises(DataError, match=r"a\.rar is no folder and no \.zip, \.tar"):
        open_source(f"folder:{tmp_path}/a.rar")
    os.symlink("/nowhere", tmp_path / "b.zip")
    with pytest.raises(DataError, match="does not exist"):
        open_source(f"folder:{tmp_path}/b.zip")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_a_listing_that_takes_long_shows_its_number_of_files(
    tmp_path: Path, monkeypatch, capsys, kind: str
) -> None:
    path = unpack(tmp_path / "a", SPLITS) if kind == "folder" else pack(tmp_path / f"a.{kind}", SPLITS)
    listed(f"folder:{path}")
    assert f"list {path}" not in capsys.readouterr().err, "a short one says nothing"
    for module in (archives, files_module):
        monkeypatch.setattr(module, "QUIET_SECONDS", 1e-9)
    os.utime(path, (0, 0))  # another state of the file, which is listed anew
    listed(f"folder:{path}")
    inner = "/set/train" if kind == "folder" else ""
    assert re.search(rf"list {path}{inner}  \d+ files", capsys.readouterr().err)


def test_a_folder_of_many_tars_is_not_listed_tar_by_tar(tmp_path: Path, monkeypatch) -> None:
    for number in range(5):
        pack(tmp_path / f"{number:05d}.tar", {"a.png": picture(1), "a.cls": b"0"})
    monkeypatch.setattr(archives, "_listed", lambda *_: pytest.fail("it is listed"))
    with pytest.raises(DataError, match=rf"5 \.tar.*--index-only {tmp_path}$"):
        listed(f"folder:{tmp_path}")
    assert index_shards(tmp_path, jobs=1)["index"]["samples"] == 5, "the remedy"


def test_imagenet_s_two_published_tars(tmp_path: Path, capsys) -> None:
    inner = pack(tmp_path / "n01000001.tar", {"n01000001_1.JPEG": picture(3)}).read_bytes()
    pack(tmp_path / "in" / "ILSVRC2012_img_train.tar", {"n01000001.tar": inner})
    pack(tmp_path / "in" / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000001.JPEG": picture(9)})
    splits = listed(f"imagenet:{tmp_path}/in")
    assert splits["train"] == {"n01000001/n01000001_1": ("n01000001", 3)}
    assert splits["val"] == {"ILSVRC2012_val_00000001": ("", 9)}
    assert "val has no classes (n01000001)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar.bz2"])
def test_a_changed_byte_of_a_compressed_tar_is_noticed(tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path / f"a.{kind}", {f"{n}.png": np.random.default_rng(n).bytes(3000) for n in range(5)})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.{kind}"):
        open_source(f"folder:{path}")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_are_very_deep_are_refused(tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path / f"a.{kind}", {"a/" * 5000 + "1.png": picture(1), **tree("ant")})
    with pytest.raises(DataError, match=r"1 of 4 files, such as 'a/a/.*', have unsafe names"):
        listed(f"folder:{path}")


def test_a_folder_with_the_name_of_a_file_stays_a_folder(tmp_path: Path, capsys) -> None:
    files = {"a/1.png": picture(1), "a": b"x", "b": b"x", "b/2.png": picture(2)}
    assert listed(f"folder:{pack(tmp_path / 'a.tar', files)}")["train"] == {"a/1": ("a", 1), "b/2": ("b", 2)}
    assert "2 names occur again" in capsys.readouterr().err


def test_a_header_that_expands_to_too_much_is_not_expanded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(forward, "MOST_READ_BYTES", 1 << 20)
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2 << 20
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(header.tobuf() + bytes(2 << 20)))
    with pytest.raises(DataError, match=r"a\.tar\.gz: .*a header of 2097152 bytes"):
        listed(f"folder:{tmp_path}/a.tar.gz")
