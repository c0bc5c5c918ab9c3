"""`cifar:PATH`: CIFAR-10 and CIFAR-100 as published, the binary and the Python version. Krizhevsky 2009."""

from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaescale.data.making.sources.archives import is_archive
from vaescale.data.making.sources.array_images import BYTES, Part, array_split, flat_images
from vaescale.data.making.sources.base import Source, Split, report_absent
from vaescale.data.making.sources.hub_columns import parse_columns
from vaescale.data.making.sources.plain_pickle import read_plain
from vaescale.data.making.sources.stored import Raw, Stored, reading
from vaescale.data.pictures.foreign import known_as
from vaescale.errors import DataError, UserError
from vaescale.system.console import say

SIDE = 32
CLASSES = {"labels": 10, "coarse_labels": 20, "fine_labels": 100}
BATCHES = 5  # of CIFAR-10's train


class _Form(NamedTuple):
    """A published form. batches: pattern of the files of train. test: the file of test. meta: the file of the classes' names.

    labels: the kinds of labels, in the order of the binary version, each with the file (binary) or the key of `meta` (Python)
    that names its classes. default: the kind that is taken unless another one is chosen.
    """

    batches: str
    test: str
    meta: str
    labels: dict[str, str]
    default: str

    @property
    def binary(self) -> bool:
        """Whether rows of labels and pixels are in the file, and not a pickle."""
        return self.test.endswith(".bin")


_TEN, _HUNDRED = (
    {"labels": "label_names"},
    {"coarse_labels": "coarse_label_names", "fine_labels": "fine_label_names"},
)
FORMS = (
    _Form("data_batch_?", "test_batch", "batches.meta", _TEN, "labels"),
    _Form("data_batch_?.bin", "test_batch.bin", "batches.meta.txt", {"labels": "batches.meta.txt"}, "labels"),
    _Form("train", "test", "meta", _HUNDRED, "fine_labels"),
    _Form("train.bin", "test.bin", "", {key: f"{name}.txt" for key, name in _HUNDRED.items()}, "fine_labels"),
)


def cifar(path: Path, *, column: str | None = None) -> Source:
    """CIFAR-10 and CIFAR-100: train and test. The Python version's pickles are read without unpickling.

    path: the folder of the batches, or one above it. column: `label=coarse_labels` takes the 20 coarse classes of CIFAR-100,
    `label=` none. Raises DataError for other or damaged files, UserError for `column`.
    """
    found = find_cifar(path)
    if found is None:
        raise DataError(_why_none(path))
    home, form = found
    label = _label(column, form)
    others = ", ".join(key for key in form.labels if key != label)
    if others and label:
        say(
            f"cifar:{home}: the classes are the {label}; left out: {others} (choose with --column label={others})"
        )
    files = {"train": sorted(home.glob(form.batches)), "test": sorted(home.glob(form.test))}
    if form.labels.keys() == {"labels"} and len(files["train"]) != BATCHES:
        say(f"cifar:{home}: train has {len(files['train'])} of {BATCHES} batches")

    @cache
    def names() -> tuple[str, ...]:
        return _names(home, form, label) if label else ()

    def split(name: str) -> Split:
        parts = [
            _binary_part(file, form, label) if form.binary else batch_of(file, read_plain(file), label)
            for file in files[name]
        ]
        largest = max((max(part.labels, default=-1) for part in parts), default=-1)
        class_names = names() or tuple(map(str, range(CLASSES.get(label, 0))))
        if largest >= len(class_names) and label:
            raise DataError(
                f"{home} has label {largest} for {len(class_names)} classes; fetch its files again"
            )
        present = {class_names[number] for part in parts for number in set(part.labels) if number >= 0}
        report_absent(name, class_names, present)
        return array_split(parts, class_names, BYTES)

    return Source({name: partial(split, name) for name in files if files[name]})


def find_cifar(path: Path) -> tuple[Path, _Form] | None:
    """The folder of the batches, `path` or one below it, and their form. None where there are no batches."""
    if not path.is_dir():
        return None
    for home in (path, *sorted(each for each in path.iterdir() if each.is_dir())):
        for form in FORMS:
            batches = [*home.glob(form.batches)]
            if batches and all(map(_may_be_batch, batches)):
                return home, form
    return None


def _why_none(path: Path) -> str:
    """Why there are no batches: a file in place of the folder, or batches that are no such files."""
    if path.is_file():
        if (found := find_cifar(path.parent)) and path.parent == found[0]:
            return f"{path} is a file; did you mean cifar:{path.parent}?"
        unpack = "; unpack it first" if is_archive(path) else "; give the folder of the batches"
        return f"{path} is a file{unpack}"
    homes = (path, *sorted(each for each in path.iterdir() if each.is_dir()))
    batches = (file for home in homes for form in FORMS for file in sorted(home.glob(form.batches)))
    broken = next((file for file in batches if file.is_file() and not _may_be_batch(file)), None)
    if broken is None:
        return f"{path} holds no CIFAR batches such as data_batch_1, data_batch_1.bin, train or train.bin; give their folder"
    with broken.open("rb") as file:
        what = known_as(file.read(128)) or "it is no pickle"
    return f"{broken} is no CIFAR batch: {what}; fetch it again"


def _may_be_batch(file: Path) -> bool:
    """Whether a file has the beginning of a pickle or the size of whole rows."""
    if not file.is_file():
        return False
    if file.suffix == ".bin":
        return True
    with file.open("rb") as opened:
        return opened.read(1) == b"\x80"


def _label(column: str | None, form: _Form) -> str:
    given = parse_columns(column)
    label = given.get("label", form.default)
    if "image" in given or (label and label not in form.labels):
        raise UserError(
            f"--column {column}: CIFAR has label={' or label='.join(form.labels)}; choose one, or label= for none"
        )
    return label


def _names(home: Path, form: _Form, label: str) -> tuple[str, ...]:
    """The names of the classes, or nothing where their file is missing."""
    if form.binary:
        file = home / form.labels[label]
        return tuple(file.read_text(errors="replace").split()) if file.is_file() else ()
    if not (home / form.meta).is_file():
        return ()
    names = read_plain(home / form.meta).get(form.labels[label], [])
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{home / form.meta} holds no list {form.labels[label]}; fetch it again")
    return tuple(name.decode(errors="replace") if isinstance(name, bytes) else name for name in names)


def _binary_part(file: Path, form: _Form, label: str) -> Part:
    """Rows of one byte for each kind of label and 3,072 of pixels."""
    lead = len(form.labels)
    row, size = lead + 3 * SIDE * SIDE, file.stat().st_size
    if not size or size % row:
        raise DataError(f"{file} has {size} bytes, which are no whole rows of {row}; fetch it again")
    stored = Raw(file, str(file), (size // row, row), np.dtype(np.uint8), 0)
    if not label:
        return Part(flat_images(stored, lead=lead), [-1] * (size // row))
    column = list(form.labels).index(label)
    labels = np.concatenate([block[:, column] for block in stored.blocks()])
    return Part(flat_images(stored, lead=lead), labels.tolist())


def batch_of(file: Path, content: dict[str, Any], label: str) -> Part:
    """The images `data` [N, 3*S*S] and the labels of a batch; label: their key, or empty. Raises DataError for other content."""
    data = content.get("data")
    if not isinstance(data, Stored):
        raise DataError(
            f"{file} holds no array `data`, but {', '.join(content) or 'nothing'}; give the batches as published"
        )
    images = flat_images(data)
    if not label:
        return Part(images, [-1] * images.number)
    labels = content.get(label)
    with reading(file):
        values = labels.whole().ravel().tolist() if isinstance(labels, Stored) else labels
    if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
        raise DataError(f"{file} holds no whole numbers `{label}`; give the batches as published")
    if len(values) != images.number:
        raise DataError(f"{file} holds {images.number} images and {len(values)} {label}; fetch it again")
    return Part(images, values)
