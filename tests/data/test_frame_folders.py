"""Folders of frames: clips in natural order, windows and strides, gaps, and what is left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vaescale.data.making.items import Clip, Item, Place
from vaescale.data.making.sources import open_source
from vaescale.data.making.sources.frame_folders import gap_of
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.errors import DataError, UserError


def clip(
    folder: Path, numbers: list[int], *, form: str = "frame{}.png", size: tuple[int, int] = (5, 6)
) -> Path:
    folder.mkdir(parents=True)
    for number in numbers:
        Image.new("L", size, number).save(folder / form.format(number))
    return folder


def listed(path: Path, split: str = "train", **options: Any) -> dict[str, list[str]]:
    """For each sequence, the stems of its frames, in order."""
    items: list[Item] = list(open_source(f"frames:{path}", **{"holdout": 0, **options}).splits[split]().items)
    result = {}
    for item in items:
        assert isinstance(item.content, Clip)
        result[item.key] = [
            one.path.stem.removeprefix("frame") for one in item.content.frames if isinstance(one, Place)
        ]
    assert len(result) == len(items)
    return dict(sorted(result.items()))


def test_clips_are_folders_in_natural_order(tmp_path: Path) -> None:
    clip(tmp_path / "walk" / "a", [1, 2, 10, 9, 8, 3, 4, 5, 6, 7])
    clip(tmp_path / "b.c", [7, 8])
    (tmp_path / "notes.txt").write_text("no frame")
    found = listed(tmp_path)
    assert found == {"b_c": ["7", "8"], "walk/a": [str(number) for number in range(1, 11)]}
    assert list(listed(tmp_path / "b.c")) == ["b_c"]  # the folder of a lone clip


def test_folders_of_clips_within_splits_are_classes(tmp_path: Path) -> None:
    for name in ("train/run/a", "train/jump/b", "train/jump/c", "val/walk/d"):
        clip(tmp_path / name, [1, 2])
    splits = open_source(f"frames:{tmp_path}").splits
    train, val = splits["train"](), splits["val"]()
    assert train.class_names == val.class_names == ("jump", "run", "walk")
    assert sorted((item.key, item.label) for item in train.items) == [
        ("jump/b", 0),
        ("jump/c", 0),
        ("run/a", 1),
    ]
    assert [item.label for item in val.items] == [2]
    clip(tmp_path / "val" / "e", [1, 2])  # not below a class
    val = open_source(f"frames:{tmp_path}").splits["val"]()
    assert (val.class_names, [item.label for item in val.items]) == ((), [-1, -1])


def test_windows_begin_every_stride(tmp_path: Path) -> None:
    clip(tmp_path / "a", list(range(7)))
    clip(tmp_path / "b", list(range(3)))
    assert listed(tmp_path, window=3) == {
        "a_000000": ["0", "1", "2"],
        "a_000003": ["3", "4", "5"],
        "b": ["0", "1", "2"],
    }
    found = listed(tmp_path, window=4, stride=2)
    assert found == {"a_000000": ["0", "1", "2", "3"], "a_000002": ["2", "3", "4", "5"]}


def test_short_clips_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, number in (("a", 5), ("b", 2), ("c", 1)):
        clip(tmp_path / name, list(range(number)))
    assert list(listed(tmp_path, window=4)) == ["a_000000"]
    assert "train: 2 clips have fewer than 4 frames and are left out: b, c" in capsys.readouterr().err
    assert list(listed(tmp_path)) == ["a", "b"]
    assert "1 clips have fewer than 2 frames" in capsys.readouterr().err
    with pytest.raises(
        DataError, match="3 clips have fewer than 6 frames and are left out: a, b, c; lower --window"
    ):
        listed(tmp_path, window=6)


@pytest.mark.parametrize(
    ("names", "gap"),
    [
        (["1", "2", "3"], None),
        (["f001", "f002", "f004", "f005"], "has f004 after f002, where others follow by 1"),
        (["0", "5", "10", "20"], "has 20 after 10, where others follow by 5"),
        (["a1x", "a2x", "a2x"], "has a2x after a2x, where others follow by 1"),
        (["a1", "b3", "c9"], None),
        (["left", "right"], None),
    ],
)
def test_gaps_are_found_in_names(names: list[str], gap: str | None) -> None:
    assert gap_of(names) == gap


def test_what_spans_a_gap_is_named_and_left_out_on_demand(tmp_path: Path) -> None:
    clip(tmp_path / "in" / "a", [0, 1, 2, 3, 5, 6, 7])
    making = Making(encoding="npy")

    def items() -> list[Item]:
        return list(
            open_source(f"frames:{tmp_path / 'in'}", holdout=0, window=3, stride=1).splits["train"]().items
        )

    words = "it has frame5 after frame3, where others follow by 1"
    with pytest.raises(DataError, match=f"sequence a_00000[1-3]: {words}; .*--skip-broken"):
        write_shards(items(), tmp_path / "out", making, made={"kind": "sequences"})
    written = write_shards(
        items(), tmp_path / "other", making._replace(skip_broken=True), made={"kind": "sequences"}
    )
    assert written.shards.num_samples == 3
    assert sorted(text.partition(":")[0] for text in written.skipped) == [
        "sequence a_000002",
        "sequence a_000003",
    ]
    assert written.shards.made["table"]["passed_over"]["missing"]["images"] == 2


def test_splits_are_folders(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "valid/c", "test/d"):
        clip(tmp_path / name, [0, 1])
    assert {split: list(listed(tmp_path, split)) for split in ("train", "val", "test")} == {
        "train": ["a", "b"],
        "val": ["c"],
        "test": ["d"],
    }
    clip(tmp_path / "more", [0, 1])
    with pytest.raises(DataError, match=r"holds the splits .* and also more; move the clips into"):
        open_source(f"frames:{tmp_path}")


def test_windows_of_a_clip_are_in_one_split(tmp_path: Path) -> None:
    for number in range(6):  # the last name is not UTF-8
        clip(tmp_path / f"clip{number if number < 5 else chr(0xDCE9)}", list(range(8)))
    parts = [listed(tmp_path, split, window=2, holdout=0.4) for split in ("train", "val")]
    assert sum(map(len, parts)) == 6 * 4
    train, val = ({key.partition("_")[0] for key in part} for part in parts)
    assert val
    assert train
    assert not train & val


def test_frames_are_cut_to_size(tmp_path: Path) -> None:
    clip(tmp_path / "in" / "a", [10, 20], size=(20, 10))
    items = list(open_source(f"frames:{tmp_path / 'in'}", holdout=0).splits["train"]().items)
    making = Making(size=8, crop="square", channels=3, encoding="npy")
    written = write_shards(items, tmp_path / "out", making, made={"kind": "sequences"})
    assert written.shards.image == (8, 8, 3)
    from vaescale.data.making.storing import prepare
    from vaescale.data.sequences import frames_of

    frames = frames_of(prepare(items[0], making).content)
    np.testing.assert_array_equal(frames.reshape(2, -1), np.repeat([[10], [20]], 192, axis=1))


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    clip(tmp_path / "a", [0, 1])
    with pytest.raises(UserError, match=r"--stride .=2. is for windows; add --window T"):
        open_source(f"frames:{tmp_path}", stride=2)
    with pytest.raises(
        DataError, match="is a file; give the folder that holds a folder of frames for each clip"
    ):
        open_source(f"frames:{tmp_path / 'a' / 'frame0.png'}")
