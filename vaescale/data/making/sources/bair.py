"""`bair:PATH`: the robot pushing set, TFRecord files with a sequence in each record. Ebert, Finn, Lee & Levine 2017.

Feature N/CAMERA/encoded has frame N of a camera, 64x64x3 bytes. Cameras are image_aux1, which video prediction uses, and image_main.
"""

import re
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np

from vaescale.data.making.items import Clip, Item
from vaescale.data.making.sources.base import Source, Split, split_of
from vaescale.data.making.sources.frame_folders import natural
from vaescale.data.making.sources.tfrecords import Record, bytes_features, list_records, read_records
from vaescale.data.pictures import Values, is_known
from vaescale.errors import DataError, UserError

CAMERA = "image_aux1"
SHAPE = (64, 64, 3)
_FEATURE = re.compile(r"(\d{1,6})/(\w+)/encoded")


def bair(path: Path, *, column: str | None = None) -> Source:
    """The splits of the folders train, val and test with *.tfrecords files, or train alone of files in one folder.

    column: image=CAMERA. Raises UserError for another column, and DataError without files.
    """
    camera = CAMERA
    if column is not None:
        name, _, camera = column.partition("=")
        if name != "image" or not re.fullmatch(r"\w+", camera):
            raise UserError(f"--column (={column}) of bair: must be image=CAMERA, such as image=image_main")
    files = _files(path)

    @cache
    def listed(split: str) -> list[tuple[Path, list[Record]]]:
        return [(file, list_records(file)) for file in files[split]]

    def one(split: str) -> Split:
        rows = listed(split)
        number = sum(len(records) for _, records in rows)

        def outline() -> Iterator[Item]:
            blank = Clip(
                (np.broadcast_to(np.uint8(0), SHAPE),)
            )  # the record alone knows how many frames it has
            return (Item(_key(file, n), blank, -1) for file, records in rows for n in range(len(records)))

        return Split(_items(rows, camera), number, outline=outline)

    return Source({split: partial(one, split) for split in files}, holds="sequences")


def clip_of(content: bytes | None, camera: str) -> Clip:
    """The frames of a camera in the content of a record, or their fault. content: None for one without its checksum."""
    if content is None:
        return Clip((), fault=("damaged", "its crc32c is not the one that its file states"))
    try:
        features = bytes_features(content)
    except ValueError as error:
        return Clip((), fault=("damaged", f"its record is no tf.train.Example: {error}"))
    matches = [(match, value) for name, value in features.items() if (match := _FEATURE.fullmatch(name))]
    frames = {int(match[1]): value for match, value in matches if match[2] == camera}
    if not frames:
        cameras = ", ".join(sorted({match[2] for match, _ in matches})) or "none"
        return Clip((), fault=("missing", f"it has no frames of {camera}; its cameras are {cameras}"))
    if missing := sorted(set(range(max(frames))) - frames.keys()):
        text = f"it misses frame {missing[0]} of 0 to {max(frames)}"
        return Clip(
            (), fault=("missing", text + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""))
        )
    values: list[bytes | Values] = []
    for number in range(len(frames)):
        value = frames[number]
        if len(value) == np.prod(SHAPE):
            values.append(np.frombuffer(value, np.uint8).reshape(SHAPE))
        elif is_known(value):  # other sets of robots have files
            values.append(value)
        else:
            text = f"its frame {number} has {len(value)} bytes, not those of {'x'.join(map(str, SHAPE))} pixels or an image file"
            return Clip((), fault=("shape", text))
    return Clip(tuple(values))


def _items(rows: list[tuple[Path, list[Record]]], camera: str) -> Iterator[Item]:
    for file, records in rows:
        for number, content in enumerate(read_records(file, records)):
            yield Item(_key(file, number), clip_of(content, camera), -1)


def _key(file: Path, number: int) -> str:
    return f"{file.name.partition('.')[0]}_{number:06d}"


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of each split in natural order, in `path` or in a folder of it."""
    tops = [path, *sorted(each for each in path.iterdir() if each.is_dir())] if path.is_dir() else []
    for top in tops:
        homes = {
            split: each for each in sorted(top.iterdir()) if each.is_dir() and (split := split_of(each.name))
        }
        found = {split: files for split, home in homes.items() if (files := _records_in(home))}
        if found:
            return found
        if files := _records_in(top):
            return {"train": files}
    raise DataError(f"{path} holds no *.tfrecords files in folders train and test; give the folder of these")


def _records_in(folder: Path) -> list[Path]:
    files = [file for file in folder.iterdir() if file.is_file() and ".tfrecord" in file.name]
    return sorted(files, key=lambda file: natural(file.name))
