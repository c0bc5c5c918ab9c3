"""Sequences in tars that others made: numbered frames, arrays and videos, indexed, verified, and counted where they do not fit."""

import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vaescale.data import frame_files, sequences
from vaescale.data.batch import Request
from vaescale.data.config import DataConfig
from vaescale.data.making.indexing import Written, index_shards
from vaescale.data.making.verifying import verify_shards
from vaescale.data.pictures import PictureFault
from vaescale.data.reader import ShardReader, open_reader
from vaescale.data.sequences import encode_sequence, frames_of, lengths_of, sequence_header
from vaescale.errors import DataError, UserError

SIZE = (6, 5)  # H, W
Files = list[tuple[str, bytes]]


def png(value: int, size: tuple[int, int] = SIZE) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size[::-1], (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def frames(key: str, first: int, numbers: list[int], **options: Any) -> Files:
    """The files of a sequence whose frames have the values from `first` on."""
    return [(f"{key}.{number:03d}.png", png(first + number, **options)) for number in numbers]


def index(folder: Path, **options: Any) -> Written:
    return index_shards(folder, image_member="frames", **options)


def pack(path: Path, files: Files, kind: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.parent


def opened(folder: Path, length: int) -> ShardReader:
    keys = {"train": "a", "val": "b", "image_size": SIZE, "channels": 3, "global_batch": 2}
    config = DataConfig.model_validate({**keys, "holds": "sequences", "frames": length})
    return open_reader(str(folder), config)


def first_values(folder: Path, length: int, numbers: list[int], places: list[float]) -> NDArray[np.uint8]:
    fetched = opened(folder, length).__getitems__(Request(np.array(numbers), places=np.array(places)))
    assert fetched.usable.all()
    assert (fetched.images[:, :, 0].int() + fetched.images[:, :, 2].int() == 255).all()
    return fetched.images.numpy()[:, :, 0, 0, 0]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_numbered_frames_are_sequences(tmp_path: Path, kind: int, capsys: pytest.CaptureFixture[str]) -> None:
    long = "clips/" + "long" * 40  # a name that needs a header of its own
    names = ("a", "b", "c") if kind == tarfile.USTAR_FORMAT else ("a", long, "é")
    files = [*frames(names[0], 0, [0, 1, 2]), (f"{names[0]}.cls", b"1"), (f"{names[0]}.json", b"{}")]
    files += [*frames(names[1], 100, [4, 5, 6, 7]), (f"{names[1]}.cls", b"0"), *frames(names[2], 200, [0, 1])]
    folder = pack(tmp_path / "set" / "one.tar", files, kind)
    written = index(folder)
    said = capsys.readouterr().err
    assert "sequences are the numbered members of a sample, 2 to 4 frames" in said
    assert "members left out: json (1," in said
    assert lengths_of(written.shards) == {2: 1, 3: 1, 4: 1}
    assert written.shards.image == (*SIZE, 3)
    assert verify_shards(str(folder), deep=True) == (3, [])
    values = first_values(folder, 2, [0, 1, 2, 1], [0.0, 0.99, 0.5, 0.4])
    assert values.tolist() == [[0, 1], [106, 107], [200, 201], [105, 106]]


def test_frames_that_expand_beyond_the_bounds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their headers: nothing is decoded."""
    folder = pack(tmp_path / "one.tar", frames("a", 0, [0, 1, 2]))
    assert first_values(folder_indexed(folder), 2, [0], [0.99]).tolist() == [[1, 2]]
    monkeypatch.setattr(sequences, "MOST_SEQUENCE_BYTES", 3 * 3 * SIZE[0] * SIZE[1] - 1)
    monkeypatch.setattr(frame_files, "decode", None)
    with pytest.raises(DataError, match="its frames exceed 100000 in number or 269 bytes"):
        index(folder)


def folder_indexed(folder: Path) -> Path:
    index(folder)
    return folder


def test_after_the_first_reading_a_window_decodes_its_own_frames_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_indexed(pack(tmp_path / "one.tar", frames("a", 0, list(range(9)))))
    reader, decoded = opened(folder, 3), list[bytes]()
    decode = frame_files.decode
    monkeypatch.setattr(frame_files, "decode", lambda content: decoded.append(content) or decode(content))
    for place, numbers in ((0.5, range(9)), (0.5, range(3, 6)), (0.99, range(6, 9))):
        window = reader.__getitems__(Request(np.array([0]), places=np.array([place]))).images
        assert window[0, :, 0, 0, 0].tolist() == list(range(int(7 * place), int(7 * place) + 3))
        assert decoded == [png(number) for number in numbers]
        decoded.clear()


def test_a_damaged_frame_is_a_fault_of_every_window(tmp_path: Path) -> None:
    """Whether a sample is used must not depend on the windows that this process has drawn before."""
    files = [*frames("a", 0, list(range(9))), *frames("b", 100, list(range(9)))]
    files[8] = (files[8][0], files[8][1][:50])  # its header is sound
    reader = opened(folder_indexed(pack(tmp_path / "one.tar", files)), 3)
    fetched = reader.__getitems__(Request(np.array([0, 0]), places=np.array([0.0, 0.99])))
    assert fetched.images[:, :, 0, 0, 0].tolist() == [[100, 101, 102], [106, 107, 108]]
    assert [fault.reason for fault in fetched.faults] == ["damaged", "damaged"]


def test_arrays_are_sequences(tmp_path: Path) -> None:
    arrays = [np.zeros((length, 3, *SIZE), np.uint8) for length in (5, 7)]
    for number, array in enumerate(arrays):
        array[:, 0] = 10 * number + np.arange(len(array))[:, None, None]
        array[:, 2] = 255 - array[:, 0]
    files = [(f"k{n}.frames.npy", encode_sequence(array)) for n, array in enumerate(arrays)]
    folder = pack(tmp_path / "one.tar", files)
    assert lengths_of(index_shards(folder).shards) == {5: 1, 7: 1}
    assert first_values(folder, 5, [1], [0.99]).tolist() == [[12, 13, 14, 15, 16]]
    with pytest.raises(UserError, match=r"--dtype .=int16. is for images"):
        index_shards(folder, dtype="int16")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (frames("bad", 9, [0, 1, 3]), "misses frame 2 of 0 to 3"),
        (frames("bad", 9, [0, 4]), "misses frames 1 to 3 of 0 to 4"),
        (frames("bad", 9, [1, 0, 2]), "has frame 0 after frame 1"),
        (frames("bad", 9, [5]), "has 1 numbered frames"),
        ([*frames("bad", 9, [0]), ("bad.001.png", png(3, (6, 6)))], "frame 1 is 6x6x3, the first one 6x5x3"),
        ([*frames("bad", 9, [0]), ("bad.001.png", b"no picture")], "shards hold JPEG, PNG"),
    ],
)
def test_a_bad_sequence_is_named_and_left_out_on_demand(tmp_path: Path, bad: Files, reason: str) -> None:
    folder = pack(tmp_path / "one.tar", [*frames("a", 0, [0, 1, 2]), *bad, *frames("c", 50, [0, 1, 2])])
    with pytest.raises(DataError, match=f"{reason}.*leave such samples out with --skip-broken"):
        index(folder)
    written = index(folder, skip_broken=True)
    assert written.shards.num_samples == 2
    assert reason in written.skipped[0]
    assert written.shards.made["skipped"] == 1


def test_sequences_of_other_frames_are_counted(tmp_path: Path) -> None:
    files = [*frames("a", 0, [0, 1]), *frames("b", 0, [0, 1], size=(8, 8)), *frames("c", 0, [0, 1])]
    with pytest.raises(DataError, match="differ in their frames: 2 of 6x5x3, 1 of 8x8x3; write them"):
        index(pack(tmp_path / "one.tar", files))


def test_frames_are_one_of_the_choices(tmp_path: Path) -> None:
    folder = pack(tmp_path / "one.tar", frames("a", 0, [0, 1]))
    with pytest.raises(DataError, match="take them as the frames of sequences with --image-member frames"):
        index_shards(folder)


def test_a_changed_frame_is_found(tmp_path: Path) -> None:
    folder = pack(tmp_path / "one.tar", frames("a", 0, [0, 1, 2]))
    index(folder)
    content = bytearray((tmp_path / "one.tar").read_bytes())
    content[content.rindex(b"IDAT") + 6] ^= 1
    (tmp_path / "one.tar").write_bytes(content)
    (fault,) = verify_shards(str(folder))[1]
    assert (fault.member, fault.words) == ("a", "its bytes are not those that were indexed")


def video(length: int, *, size: tuple[int, int] = (32, 48), codec: str = "mpeg4") -> bytes:
    """An MP4 of grey frames, each 10 levels brighter than the one before."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(length):
            frame = av.VideoFrame.from_ndarray(
                np.full((*size, 3), 50 + 10 * number, np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_videos_are_sequences(tmp_path: Path) -> None:
    contents = [video(length) for length in (6, 9)]
    folder = pack(tmp_path / "one.tar", [(f"{n}.mp4", content) for n, content in enumerate(contents)])
    written = index_shards(folder)
    assert lengths_of(written.shards) == {6: 1, 9: 1}
    assert written.shards.image == (32, 48, 3)
    assert verify_shards(str(folder), deep=True) == (2, [])
    keys = {"train": "a", "val": "b", "image_size": (32, 48), "channels": 3, "global_batch": 2}
    config = DataConfig.model_validate({**keys, "holds": "sequences", "frames": 4})
    fetched = open_reader(str(folder), config).__getitems__(Request(np.array([1]), places=np.array([0.99])))
    means = fetched.images.double().mean((0, 2, 3, 4)).numpy()
    np.testing.assert_allclose(means, 50 + 10 * np.arange(5, 9), atol=3)


@pytest.mark.parametrize("end", [0.3, 0.6, 0.9])
def test_a_cut_video_is_damaged(end: float) -> None:
    content = video(9)
    with pytest.raises(PictureFault, match="its video") as raised:
        sequence_header(content[: int(end * len(content))])
    assert raised.value.reason == "damaged"


def test_a_video_that_expands_beyond_the_bounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    content = video(9)
    assert frames_of(content).shape == (9, 3, 32, 48)
    monkeypatch.setattr(sequences, "MOST_SEQUENCE_BYTES", 9 * 3 * 32 * 48 - 1)
    with pytest.raises(PictureFault, match="exceed 100000 in number or 41471 bytes"):
        frames_of(content)


def test_without_pyav_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    content = b"\0\0\0\x1cftypisom" + b"\0" * 20
    folder = pack(tmp_path / "one.tar", [("a.mp4", content)])
    with pytest.raises(ModuleNotFoundError) as raised:
        index_shards(folder)
    assert raised.value.name == "av"
