"""A sound tar gives what webdataset gives; each way a tar can be broken is a fault with its place."""

import gc
import gzip
import io
import pickle
import tarfile
import zlib
from pathlib import Path

import pytest
import webdataset

from vaescale.data.tars import Sample, TarFault, members, samples


def tar_of(files: list[tuple[str, bytes]], *, form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def found_in(content: bytes) -> list[Sample | TarFault]:
    return list(samples(io.BytesIO(content)))


FILES = [(f"n0{i}/img.{i}.{ext}" if i == 3 else f"n0{i}/img{i}.{ext}", words) for i in range(5) for ext, words in (("cls", b"%d" % i), ("JPG", b"image %d" % i))]  # fmt: skip
SOUND = tar_of(FILES)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_sound_tar_gives_webdataset_s_samples(tmp_path: Path, form: int) -> None:
    long_name = "/".join(["folder" * 10] * 3)
    files = [(f"{i}{name}.{ext}", b"7" if ext == "cls" else b"%d" % i) for i, name in enumerate(["a", "ü b", long_name]) for ext in ("cls", "png", "json")]  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar_of(files, form=form))
    expected = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    found = found_in((tmp_path / "x.tar").read_bytes())
    assert [(f.key, f.content, f.label) for f in found] == [
        (sample["__key__"], sample["png"], int(sample["cls"])) for sample in expected
    ]
    for one in found:
        assert (tmp_path / "x.tar").read_bytes()[one.offset :].startswith(one.content)
        assert one.crc32 == zlib.crc32(one.content)
    gc.collect()  # here, where the warning is expected


def test_a_sound_tar_has_no_faults() -> None:
    found = found_in(SOUND)
    assert [one.label for one in found[:3]] == [0, 1, 2]
    assert isinstance(found[3], TarFault), "img.3.jpg has extension 3.jpg, which is no image"
    assert len(found) == 5


def _corrupt(place: int) -> bytes:
    content = bytearray(SOUND)
    content[place] ^= 0x55
    return bytes(content)


BROKEN = {
    "empty": (b"", "is empty"),
    "cut at a member's end": (SOUND[: 512 * 4], "without end-of-archive blocks"),
    "cut in a header": (SOUND[: 512 * 4 + 100], "cut in the header"),
    "cut in a body": (SOUND[: 512 * 5 + 3], "cut"),
    "cut in the first header": (SOUND[:100], "cut or corrupt"),
    "one end block": (SOUND[: 512 * 20] + bytes(512), "without end-of-archive blocks"),
    "corrupt first header": (_corrupt(3), "cut or corrupt"),
    "corrupt header": (_corrupt(512 * 4 + 3), "header at byte 2048 is corrupt"),
    "corrupt checksum": (_corrupt(512 * 6 + 149), "header at byte 3072 is corrupt"),
    "zeroed header": (SOUND[:2048] + bytes(512) + SOUND[2560:], "header at byte 2048 is corrupt"),
    "zeroed page": (SOUND[:2048] + bytes(4096) + SOUND[6144:], "zeros at byte 2048 end it, but more follows"),
    "two tars in one": (SOUND + SOUND, "zeros at byte 10240 end it, but more follows"),
    "gzip": (gzip.compress(SOUND), "it is gzip"),
    "not a tar": (b"hello " * 1000, "cut or corrupt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tar_is_a_fault(name: str) -> None:
    content, words = BROKEN[name]
    with pytest.raises(TarFault, match=words):
        found_in(content)


@pytest.mark.parametrize("cut", range(0, len(SOUND) - 1, 97))
def test_no_cut_is_silent(cut: int) -> None:
    if SOUND[cut:] == bytes(len(SOUND) - cut) and cut >= 512 * 22:
        assert len(found_in(SOUND[:cut])) == 5
        return
    with pytest.raises(TarFault):
        found_in(SOUND[:cut])


def test_no_damaged_header_is_silent() -> None:
    """webdataset ends there without a word."""
    for member in range(10):
        for place in (0, 50, 124, 130, 148, 156, 257, 345):
            content = bytearray(SOUND)
            content[member * 1024 + place] ^= 0x15
            with pytest.raises(TarFault):
                found_in(bytes(content))


def _with_member(kind: bytes, name: str = "b.png", target: str = "/etc/passwd") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_devices_are_refused(kind: bytes) -> None:
    with pytest.raises(TarFault, match="not a plain file"):
        found_in(_with_member(kind))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_is_one_unusable_sample_and_never_followed(kind: bytes) -> None:
    (fault,) = found_in(_with_member(kind))
    assert isinstance(fault, TarFault)
    assert (fault.reason, fault.key) == ("link", "b")
    with pytest.raises(TarFault, match="not a plain file"):
        list(members(io.BytesIO(_with_member(kind))))


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "a/../../b.png", "a\nb.png"])
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(TarFault, match="unsafe name"):
        found_in(tar_of([(name, b"x")]))


UNUSABLE = {
    "twice in a row": ([("a.png", b"x"), ("a.png", b"y")], "occurs twice"),
    "twice apart": ([("a.png", b"x"), ("b.png", b"x"), ("a.png", b"y")], "occurs twice"),
    "without an image": ([("a.cls", b"1"), ("b.cls", b"2"), ("b.png", b"x")], "has 0 images"),
    "two images": ([("a.png", b"x"), ("a.jpg", b"x")], "has 2 images"),
    "class is a word": ([("a.cls", b"cat"), ("a.png", b"x")], "has class 'cat'"),
    "class is negative": ([("a.cls", b"-3"), ("a.png", b"x")], "has class '-3'"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_samples_that_cannot_be_used_are_named(name: str) -> None:
    files, words = UNUSABLE[name]
    faults = [one for one in found_in(tar_of(files)) if isinstance(one, TarFault)]
    assert len(faults) == 1
    assert words in str(faults[0])
    assert faults[0].member == (files[2][0] if name == "twice apart" else files[0][0])


def test_other_members_are_passed_over_unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pickle.dumps(["a", "list"])
    content = tar_of([("a.pkl", plain), ("a.png", b"x"), ("a.pth", plain), ("a.pyd", plain), ("._a.png", b"mac"), ("README", b"")])  # fmt: skip
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("a member is unpickled"))
    (found,) = found_in(content)
    assert (found.key, found.content, found.label) == ("a", b"x", -1)


def test_a_tar_within_a_tar_is_read_in_place() -> None:
    outer = tar_of(
        [("n01.tar", tar_of([("n01_1.JPEG", b"one")])), ("n02.tar", tar_of([("n02_1.JPEG", b"two")]))]
    )
    file = io.BytesIO(outer)
    inner = [
        list(members(file, start=member.offset, stop=member.offset + member.bytes))
        for member in list(members(file))
    ]
    assert [[(m.name, outer[m.offset : m.offset + m.bytes]) for m in one] for one in inner] == [
        [("n01_1.JPEG", b"one")],
        [("n02_1.JPEG", b"two")],
    ]
