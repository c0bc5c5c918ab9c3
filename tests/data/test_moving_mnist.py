"""Moving digits: the same sequence whatever is made beside it, within the frame, and with new velocities at walls alone."""

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vaescale.data.making.items import Clip
from vaescale.data.making.sources import open_source
from vaescale.data.making.sources.moving_mnist import Motion, Paths, draw, rendered
from vaescale.errors import DataError, UserError

KNOWN_DIGITS = [11621, 13456]
KNOWN_CORNERS = [
    [[5, 22], [1, 21], [0, 20], [2, 19]],  # the first digit bounces off the upper wall
    [[29, 27], [27, 26], [25, 25], [23, 24]],
]
MOTION = Motion(frames=60, room=32, speed=4)


def paths(number: int, motion: Motion = MOTION) -> NDArray[np.int64]:
    return draw("train", number, 100, motion).corners


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Ten train images of brightness 10 to 19, five test images of 200 to 204."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for prefix, first, number in (("train", 10, 10), ("t10k", 200, 5)):
        images = np.broadcast_to(
            np.arange(first, first + number, dtype=np.uint8)[:, None, None], (number, 28, 28)
        )
        header = struct.pack(">4B3I", 0, 0, 8, 3, number, 28, 28)
        with gzip.open(folder / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
            file.write(header + images.tobytes())
    return folder


def listed(folder: Path, split: str, **options: Any) -> list[NDArray[np.uint8]]:
    items = list(open_source(f"moving-mnist:{folder}", **options).splits[split]().items)
    assert all(isinstance(item.content, Clip) and item.label == -1 for item in items)
    return [np.stack(item.content.frames) for item in items]  # type: ignore[union-attr, arg-type]


def test_the_first_values_are_known() -> None:
    first = draw("train", 0, 60_000, MOTION._replace(frames=4))
    assert first.digits.tolist() == KNOWN_DIGITS
    assert first.corners.tolist() == KNOWN_CORNERS
    assert draw("val", 0, 60_000, MOTION).digits.tolist() != KNOWN_DIGITS


def test_a_longer_sequence_begins_as_a_shorter_one() -> None:
    np.testing.assert_array_equal(paths(5, MOTION._replace(frames=20)), paths(5)[:, :20])


def test_digits_stay_inside_and_turn_at_walls_alone() -> None:
    corners = np.concatenate([paths(number) for number in range(100)])  # [200, T, 2]
    assert corners.min() == 0
    assert corners.max() == MOTION.room
    velocities = np.diff(corners, axis=1)
    assert np.abs(velocities).max() == MOTION.speed
    turned = (np.diff(velocities, axis=1) != 0).any(-1)  # at the frames from 1 on
    at_wall = ((corners == 0) | (corners == MOTION.room)).any(-1)
    # The step that ends at a wall may be shorter than the one before.
    assert (at_wall[:, 1:-1] | at_wall[:, 2:])[turned].all()
    assert turned.sum() > 500
    # The velocity along a wall is drawn anew, too, so that the path is not that of a mirror.
    assert len(np.unique(velocities[:, :-1][turned], axis=0)) > 40


def test_the_deterministic_variant_reflects_exactly() -> None:
    """Corner t is the triangle wave of where the digit would be without walls."""
    motion = MOTION._replace(deterministic=True)
    for number in range(50):
        free = paths(number, motion._replace(room=10**6))
        corners = paths(number, motion)
        start, velocity = corners[:, :1], (free[:, 1] - free[:, 0])[:, None]
        period = 2 * motion.room
        phase = (start + velocity * np.arange(motion.frames)[:, None]) % period
        np.testing.assert_array_equal(corners, np.minimum(phase, period - phase))


def test_where_digits_overlap_their_brightness_adds_up_to_white() -> None:
    digits = np.stack([np.full((4, 4), value, np.uint8) for value in (100, 200)])
    corners = np.array([[[0, 0], [0, 0]], [[4, 4], [2, 0]]])
    frames = rendered(digits, Paths(np.array([0, 1]), corners), 8)
    assert frames.shape == (2, 8, 8, 1)
    assert frames[0, 0, 0, 0] == 100
    assert frames[0, 7, 7, 0] == 200
    assert frames[0].sum() == 16 * 300
    assert frames[1, 2, 0, 0] == 255
    assert frames[1, 5, 0, 0] == 200


def test_a_sequence_does_not_depend_on_the_others(idx_folder: Path) -> None:
    few, many = (listed(idx_folder, "train", count=count, frames=5) for count in (3, 40))
    assert [len(few), len(many), len(listed(idx_folder, "val", count=40, frames=5))] == [3, 40, 4]
    for one, other in zip(few, many, strict=False):
        np.testing.assert_array_equal(one, other)
    assert few[0].shape == (5, 64, 64, 1)
    assert max(frames.max() for frames in many) <= 2 * 19  # digits of train
    assert min(frames.max() for frames in listed(idx_folder, "val", count=40)) >= 200  # digits of test
    small = listed(idx_folder, "train", count=2, size=32)
    assert small[0].shape == (20, 32, 32, 1)
    assert (small[0][0] > 0).sum() <= 2 * 16 * 16


def test_the_class_is_the_unordered_pair_of_the_digits(idx_folder: Path) -> None:
    without = listed(idx_folder, "train", count=40, frames=3)
    for prefix, labels in (("train", [4, 7, 9, 4, 7, 9, 4, 7, 9, 4]), ("t10k", [9, 9, 7, 4, 4])):
        (idx_folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + bytes(labels)
        )
    split = open_source(f"moving-mnist:{idx_folder}", count=40, frames=3).splits["train"]()
    assert split.class_names == ("4+4", "4+7", "4+9", "7+7", "7+9", "9+9")
    items, outline = list(split.items), list(split.outline())  # type: ignore[misc]
    assert [item.label for item in items] == [item.label for item in outline]
    for number, (item, frames) in enumerate(zip(items, without, strict=True)):
        assert isinstance(item.content, Clip)
        np.testing.assert_array_equal(np.stack(item.content.frames), frames)  # type: ignore[arg-type]
        digits = draw("train", number, 10, MOTION).digits
        assert split.class_names[item.label] == "+".join(sorted("479"[digit % 3] for digit in digits))


def test_what_cannot_be_made_is_refused(idx_folder: Path) -> None:
    with pytest.raises(UserError, match=r"--size .=8. of moving-mnist must be one number, 16 at least"):
        open_source(f"moving-mnist:{idx_folder}", size=8)
    with pytest.raises(UserError, match="--frames is for moving-mnist: sources; leave it out"):
        open_source("digits", frames=5)
    with pytest.raises(DataError, match=rf"did you mean moving-mnist:{idx_folder}\?"):
        open_source(f"moving-mnist:{idx_folder.parent}")
    (idx_folder / "t10k-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DataError, match="holds no test images"):
        open_source(f"moving-mnist:{idx_folder}")
