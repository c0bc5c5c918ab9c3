"""Sequences of frames: written, read as windows by position, and refused in words where they do not fit."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vaescale.data.batch import Request
from vaescale.data.config import DataConfig
from vaescale.data.index import SEQUENCES
from vaescale.data.loader import evaluation_batches, training_batches
from vaescale.data.making.items import Clip, Item
from vaescale.data.making.writing import write_shards
from vaescale.data.pictures import PictureFault
from vaescale.data.plan import Plan
from vaescale.data.reader import ShardReader, open_reader
from vaescale.data.sequences import encode_sequence, frames_of, lengths_of
from vaescale.errors import DataError

FRAMES = 4
SHAPE = (3, 6, 5)  # C, H, W


def numbered(number: int, length: int) -> NDArray[np.uint8]:
    """Frames [T, H, W, C] that say of which sequence they are, and which."""
    frames = np.full((length, SHAPE[1], SHAPE[2], SHAPE[0]), number, np.uint8)
    frames[:, :, :, 1] = np.arange(length)[:, None, None]
    frames[:, 0, 0, 2] = 7  # so that a wrong order of axes is seen
    return frames


def write(folder: Path, lengths: list[int]) -> Path:
    items = [Item(f"{n:03d}", Clip(tuple(numbered(n, length))), n % 2) for n, length in enumerate(lengths)]
    write_shards(items, folder, made={"kind": SEQUENCES})
    return folder


def read(folder: Path, **changes: Any) -> ShardReader:
    keys = {"train": "a", "val": "b", "image_size": SHAPE[1:], "channels": 3, "global_batch": 8}
    keys |= {"holds": "sequences", "frames": FRAMES, **changes}
    return open_reader(str(folder), DataConfig.model_validate(keys))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("mixed"), [4, 9, 5, 4, 12, 6, 7, 8] * 3)


def windows(
    reader: ShardReader, *, rank: int = 0, world: int = 1, steps: range = range(12)
) -> dict[Any, Any]:
    """The number of the sequence and the first frame of each (step, slot)."""
    plan = Plan(reader.index.shards.samples, 8, seed=3)
    found = {}
    options = {"rank": rank, "world_size": world, "accumulation": 1, "workers": 0}
    for step, (batch,) in zip(steps, training_batches(reader, plan, steps=steps, **options), strict=True):
        assert batch.mask.all()
        assert batch.images.shape == (8 // world, FRAMES, *SHAPE)
        for slot, frames in zip(batch.slots.tolist(), batch.images.numpy(), strict=True):
            starts = frames[:, 1, 0, 0]
            assert (np.diff(starts) == 1).all()
            assert (frames[:, 2, 0, 0] == 7).all()
            found[step, slot] = int(frames[0, 0, 0, 0]), int(starts[0])
    return found


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_windows_are_drawn_by_position(mixed: Path, cache: str) -> None:
    whole = windows(read(mixed, cache=cache))
    halves = [windows(read(mixed, cache=cache), rank=rank, world=2) for rank in range(2)]
    assert whole == halves[0] | halves[1]
    later = windows(read(mixed, cache=cache), steps=range(7, 12))
    assert later == {place: one for place, one in whole.items() if place[0] >= 7}
    epochs = [sorted(number for (step, _), (number, _) in whole.items() if step // 3 == e) for e in range(4)]
    assert epochs == [list(range(24))] * 4  # each sequence once in an epoch
    starts = {number: {start for other, start in whole.values() if other == number} for number in range(24)}
    lengths = [4, 9, 5, 4, 12, 6, 7, 8] * 3
    assert all(max(starts[n]) <= length - FRAMES for n, length in enumerate(lengths))
    assert all(starts[n] == {0} for n, length in enumerate(lengths) if length == FRAMES)
    assert sum(len(found) for found in starts.values()) > 40  # of 24 to 63: drawn anew in each epoch


def test_evaluation_reads_the_first_windows(mixed: Path) -> None:
    batches = list(evaluation_batches(read(mixed), batch=10, rank=0, world_size=1))
    frames = np.concatenate([batch.images.numpy()[batch.mask.numpy()] for batch in batches])
    assert frames[:, 0, 0, 0, 0].tolist() == list(range(24))
    assert (frames[:, :, 1, 3, 3] == np.arange(FRAMES)).all()
    assert lengths_of(read(mixed).index) == {4: 6, 5: 3, 6: 3, 7: 3, 8: 3, 9: 3, 12: 3}


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_shorter_sequences_are_counted_before_training(
    tmp_path: Path, cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, [6, 2, 6, 3, 6, 6, 6, 6])
    with pytest.raises(
        DataError, match=r"2 of 8 sequences of .*have 2 to 6 frames, are shorter than data.frames"
    ):
        read(folder, cache=cache)
    reader = read(folder, cache=cache, max_skipped=0.3)
    assert "2 of 8 sequences" in capsys.readouterr().err
    fetched = reader.__getitems__(Request(np.array([1, 3, 7]), places=np.array([0.9, 0.0, 0.9])))
    assert fetched.images[:, 0, 0, 0, 0].tolist() == [2, 4, 7]  # the next ones take their slots
    assert fetched.images[:, 0, 1, 0, 0].tolist() == [2, 0, 2]
    assert [fault.reason for fault in fetched.faults] == ["short", "short"]
    masked = reader.__getitems__(Request(np.array([1, 2]), refill=False))
    assert masked.usable.tolist() == [False, True]
    assert not masked.images[0].any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": 1}, "holds sequences of 6x5 frames with 3 channels; set data.channels=3"),
        ({"image_size": 8}, r"set data.channels=3 and data.image_size=\[6, 5\]"),
        ({"frames": 13}, "24 of 24 sequences"),
        ({"holds": "images", "frames": None}, "holds sequences of 4 to 12 frames, not images"),
        ({"holds": "codes", "frames": None}, "holds no codes"),
    ],
)
def test_what_does_not_fit_is_refused(mixed: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read(mixed, **changes)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"holds": "sequences"}, "frames is not given"),
        ({"frames": 5}, "frames .=5. needs sequences"),
        ({"holds": "sequences", "frames": 5, "flip": True}, "flip .=True. needs images"),
        ({"holds": "sequences", "frames": 5, "train": ["a", "b"]}, "mixes 2 sets, which needs images"),
    ],
)
def test_sections_that_contradict_themselves_are_refused(keys: dict[str, Any], words: str) -> None:
    section = {"train": "a", "val": "b", "image_size": 8, "channels": 3, "global_batch": 8}
    with pytest.raises(ValueError, match=words):
        DataConfig.model_validate(section | keys)


def saved(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_numpy_reads_a_sequence_and_writes_one() -> None:
    frames = np.arange(2 * 1 * 3 * 4, dtype=np.uint8).reshape(2, 1, 3, 4)
    content = encode_sequence(frames)
    np.testing.assert_array_equal(np.load(io.BytesIO(content)), frames)
    np.testing.assert_array_equal(frames_of(saved(frames)), frames)


def header(*shape: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


WHOLE = saved(np.zeros((4, 1, 8, 8), np.uint8))
OTHERS = {
    "no array": (b"no array", "format", "no npy file"),
    "reals": (saved(np.zeros((4, 1, 8, 8), np.float32)), "shape", r"npy array <f4 \[4, 1, 8, 8\]"),
    "records": (saved(np.zeros(4, [("a", np.uint8)])), "shape", "an array of another kind"),
    "grey": (saved(np.zeros((4, 8, 8), np.uint8)), "shape", r"\[4, 8, 8\]"),
    "channels last": (saved(np.zeros((4, 32, 32, 3), np.uint8)), "shape", "with the channels last"),
    "many channels": (saved(np.zeros((4, 17, 32, 32), np.uint8)), "pixels", "16 channels"),
    "cut values": (WHOLE[:-1], "damaged", "255 bytes of values, its header says 256"),
    "cut header": (WHOLE[:100], "damaged", "its header is cut"),
    "many frames": (header(200_000, 1, 8, 8), "pixels", "up to 100000 frames"),
    "many bytes": (header(99_999, 16, 999_999, 999_999), "pixels", "1073741824 bytes"),
    "no frames": (header(0, 1, 8, 8), "pixels", r"\[0, 1, 8, 8\]"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_arrays_are_refused_in_words(other: str) -> None:
    content, reason, words = OTHERS[other]
    with pytest.raises(PictureFault, match=words) as raised:
        frames_of(content)
    assert raised.value.reason == reason


def test_frames_of_several_shapes_are_refused(tmp_path: Path) -> None:
    frames = (np.zeros((6, 5, 3), np.uint8), np.zeros((6, 6, 3), np.uint8))
    with pytest.raises(DataError, match="frame 1 is 6x6x3, the first one 6x5x3; --size and --channels"):
        write_shards([Item("a", Clip(frames), -1)], tmp_path / "a", made={"kind": SEQUENCES})
    items = [Item(f"{n}", Clip((frame, frame)), -1) for n, frame in enumerate(frames)]
    with pytest.raises(DataError, match="differ in their frames: 1 of 6x5x3, 1 of 6x6x3"):
        write_shards(items, tmp_path / "b", made={"kind": SEQUENCES})
