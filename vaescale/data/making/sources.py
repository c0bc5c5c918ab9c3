"""Where images come from: each source lists the images of its splits, to be written as shards.

    digits               scikit-learn's handwritten digits
    idx:PATH             the MNIST family: *images-idx3-ubyte and *labels-idx1-ubyte, gzipped or not
    folder:PATH          an image tree; the first sub-folder is the class
    celeba:PATH          aligned CelebA, with its official partition when that file is there
    imagenet:PATH        ILSVRC folders or tars; a class is its wnid's place among the sorted wnids
    hf:NAME[:SPLIT]      a data set of the Hugging Face hub, or a local folder in one of its formats

A listed image is a small thing (a path, a place in a tar, bytes or an array); it is opened where it is written.
"""

import gzip
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from vaescale.data.config import Crop, Filter
from vaescale.data.making.items import Item, Place
from vaescale.data.tars import TarFault, members
from vaescale.errors import DataError, UserError
from vaescale.system.console import say

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
PARTITION = ("train", "val", "test")  # as CelebA numbers them
MOST_IDX_BYTES = 1 << 34


class Split(NamedTuple):
    """One part of a source. `number` of images is None where only reading tells it."""

    items: Iterable[Item]
    number: int | None
    class_names: tuple[str, ...] = ()


class Source(NamedTuple):
    """A source's splits, each listed when it is called, and how its images are usually cut to size.

    A source without a split `val` has one cut from `train` (`held_out`), unless it is `complete`.
    """

    splits: Mapping[str, Callable[[], Split]]
    crop: Crop = "square"
    resample: Filter = "bicubic"
    channels: Literal[1, 3] | None = None
    complete: bool = False
    held_out: bool = False


def open_source(word: str, *, holdout: float = 0.05, config: str | None = None) -> Source:
    """The source that `KIND:PATH` names.

    holdout: the fraction of train that becomes `val` where a source has none; the image's key decides.
    config: the configuration of a hub data set. Raises UserError and DataError.
    """
    kind, colon, place = word.partition(":")
    if kind not in SOURCES or (kind != "digits") != bool(colon and place):
        forms = ", ".join(("digits", *(f"{name}:PATH" for name in SOURCES if name not in ("digits", "hf"))))
        near = f"did you mean folder:{word}? " if Path(word).is_dir() else ""
        raise UserError(f"source {word!r} is unknown; {near}known sources: {forms}, hf:NAME[:SPLIT]")
    if kind == "hf":
        return with_val(hugging_face(place, config=config), holdout)
    try:
        path = Path(place).expanduser()
        if kind != "digits" and not path.exists():
            raise DataError(f"{path} does not exist in {Path.cwd()}; give the folder that holds the images")
        source = SOURCES[kind](path)
    except (TarFault, RuntimeError) as error:  # a broken ImageNet tar; a `~user` that is not
        raise DataError(f"{place}: {error}") from error
    return with_val(source, holdout)


def with_val(source: Source, holdout: float) -> Source:
    """The source with a split `val`, cut from `train` where it has none of its own."""
    if "val" in source.splits or "train" not in source.splits or source.complete or not holdout:
        return source
    whole = source.splits["train"]
    parts = {name: partial(_held_out, whole, holdout, name == "val") for name in ("train", "val")}
    return source._replace(splits={**source.splits, **parts}, held_out=True)


def digits(_: Path) -> Source:
    """Scikit-learn's 1,797 scanned handwritten digits, 8x8 with 17 grey levels, as 8-bit images.

    train (1,437) and val (360), stratified by digit, always the same. Alpaydin & Kaynak 1998.
    """

    def split(name: str) -> Split:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch = load_digits()
        parts = train_test_split(np.arange(1797), test_size=360, random_state=0, stratify=bunch.target)
        ids = sorted(parts[0] if name == "train" else parts[1])
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
        items = [Item(f"{i:06d}", images[i], int(bunch.target[i])) for i in ids]
        return Split(items, len(items), tuple(map(str, range(10))))

    return Source({name: partial(split, name) for name in ("train", "val")})


def idx(path: Path) -> Source:
    """MNIST, Fashion-MNIST, KMNIST, EMNIST: train and test. LeCun's idx format."""
    splits = {}
    for name, words in (("train", "train"), ("test", "t10k"), ("test", "test")):
        images = _one_file(path, f"{words}*images*idx3*")
        labels = _one_file(path, f"{words}*labels*idx1*")
        if images is not None and name not in splits:
            splits[name] = partial(_idx_split, images, labels)
    if not splits:
        raise DataError(f"{path} holds no idx files such as train-images-idx3-ubyte.gz; give their folder")
    return Source(splits)


def folder(path: Path) -> Source:
    """Every JPEG, PNG and WebP below `path`, in a fixed random order; sub-folders train, val and test are splits."""
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give the folder that holds the images")
    inside = sorted(path.iterdir())
    splits = {SPLIT_NAMES[p.name]: p for p in inside if p.is_dir() and p.name in SPLIT_NAMES}
    if "train" not in splits:
        return Source({"train": partial(_tree, path)})
    if strange := [
        p.name
        for p in inside
        if p not in splits.values()
        and not p.name.startswith(".")
        and (p.is_dir() or p.suffix.lower() in EXTENSIONS)
    ]:
        raise DataError(
            f"{path} holds train and, beside it, {', '.join(strange[:3])}; leave only train, val and test there"
        )
    return Source({name: partial(_tree, part) for name, part in splits.items()})


def celeba(path: Path) -> Source:
    """Aligned and cropped CelebA, 178x218: the centre 148x148 is kept, as VAE papers do. Liu et al. 2015.

    list_eval_partition.txt (or Kaggle's .csv) beside the images gives train, val and test.
    """
    homes = [path, path / "img_align_celeba", path / "img_align_celeba" / "img_align_celeba"]
    images = next((home for home in reversed(homes) if home.is_dir() and _pictures(home)), None)
    if images is None:
        raise DataError(
            f"{path} holds no images and no img_align_celeba with images; give the folder of the images"
        )
    files = {file.name: file for file in _pictures(images)}
    partition = next(
        (
            file
            for home in (images, *images.parents[:2])
            for name in ("list_eval_partition.txt", "list_eval_partition.csv")
            if (file := home / name).is_file()
        ),
        None,
    )
    if partition is None:
        return Source({"train": partial(_listed, list(files.values()))}, crop=148, channels=3)
    parts = re.findall(r"^([^\s,]+\.\w+)[\s,]+([012])\s*$", partition.read_text(), re.MULTILINE)
    missing = [name for name, _ in parts if name not in files]
    if missing or not parts:
        what = f"{len(missing)} images that are missing, such as {missing[0]}" if parts else "no image"
        raise DataError(f"{partition} names {what}; complete {images} or move the file away")
    splits = {
        split: [files[name] for name, number in parts if int(number) == n]
        for n, split in enumerate(PARTITION)
    }
    found = {split: partial(_listed, listed) for split, listed in splits.items() if listed}
    return Source(found, crop=148, channels=3)


def imagenet(path: Path) -> Source:
    """ILSVRC: train and val of wnid folders, of one tar a wnid, or ILSVRC2012_img_train.tar. Russakovsky et al. 2015.

    The whole image is averaged down to SIZE, as in the down-sampled ImageNet (Chrabaszcz, Loshchilov & Hutter 2017);
    with crop `square` and a smoother filter it is the usual short side + centre crop. A flat val has no classes.
    """
    homes = {name: path / name for name in ("train", "val") if (path / name).is_dir()}
    homes = homes if "train" in homes else {"train": path, **homes}
    listed = {name: _wnids(home) for name, home in homes.items()}
    if not listed.get("train"):
        raise DataError(
            f"{path} holds no wnid folders or tars such as train/n01440764; give the ILSVRC folder"
        )
    wnids = tuple(sorted(listed["train"]))
    splits: dict[str, Callable[[], Split]] = {}
    for name, home in homes.items():
        if strange := sorted(set(listed[name]) - set(wnids)):
            raise DataError(f"{home} has class {strange[0]}, which train has not; check the folders")
        splits[name] = partial(_wnid_split, listed[name], wnids) if listed[name] else partial(_tree, home)
    return Source(splits, crop="whole", resample="box", channels=3)


def hugging_face(place: str, *, config: str | None = None) -> Source:
    """A data set of the hub, or a local folder in one of its formats, streamed through `datasets`.

    The first image column and the first class column are taken. Raises DataError when there is no image column.
    """
    import datasets
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    # A split stands behind the last colon: `hf:ylecun/mnist:train`.
    name, _, wanted = place.rpartition(":") if ":" in place else (place, "", "")
    try:
        found = [wanted] if wanted else datasets.get_dataset_split_names(name, config)
        opened = {split: datasets.load_dataset(name, config, split=split, streaming=True) for split in found}
    except Exception as error:  # the library raises a dozen kinds, network faults among them
        words = " ".join(str(error).split())[:300]
        raise DataError(f"hf:{place} cannot be opened: {words}") from error
    splits = {
        SPLIT_NAMES.get(split, split): partial(_hub_split, name, data) for split, data in opened.items()
    }
    return Source(splits, complete=bool(wanted))  # who names a split wants that one


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "idx": idx,
    "folder": folder,
    "celeba": celeba,
    "imagenet": imagenet,
    "hf": hugging_face,
}


def _held_out(whole: Callable[[], Split], fraction: float, held: bool) -> Split:
    """The part of the items whose key's hash falls below the fraction, or the others. At least one is held out."""
    split = whole()
    below = fraction * 2**32
    if not isinstance(split.items, list):  # a stream
        return split._replace(
            items=(item for item in split.items if (_hash(item) < below) == held), number=None
        )
    below = max(below, min(map(_hash, split.items)) + 1)
    items = [item for item in split.items if (_hash(item) < below) == held]
    return split._replace(items=items, number=len(items))


def _hash(item: Item) -> int:
    return zlib.crc32(item.key.encode())


def _shuffled(items: list[Item]) -> list[Item]:
    """In a fixed random order: files lie by class, and shards of one class would mix badly."""
    order = np.random.Generator(np.random.Philox(key=len(items))).permutation(len(items))
    return [items[i] for i in order.tolist()]


def _pictures(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS and file.is_file())


def _keyed(items: Iterable[tuple[str, Place, int]]) -> list[Item]:
    """Keys without dots, where webdataset would split them, each once."""
    result, taken = [], set()
    for name, place, label in items:
        printable = (
            letter if letter.isprintable() and not "\ud800" <= letter <= "\udfff" else "_" for letter in name
        )
        base = key = "".join(printable).replace(".", "_")
        number = 1
        while key in taken:
            number += 1
            key = f"{base}~{number}"
        taken.add(key)
        result.append(Item(key, place, label))
    return result


def _listed(files: list[Path]) -> Split:
    return Split(_keyed((file.stem, Place(file), -1) for file in files), len(files))


def _tree(path: Path) -> Split:
    files, others = _walk(path)
    if not files:
        raise DataError(f"{path} holds no {', '.join(EXTENSIONS)} files; check the path")
    if others:
        kinds = ", ".join(
            f"{count} {suffix or 'without extension'}" for suffix, count in others.most_common(5)
        )
        say(f"passed over in {path}: {kinds}")
    parts = [file.relative_to(path).parts for file in files]
    names = tuple(sorted({part[0] for part in parts if len(part) > 1}))
    labels = {name: number for number, name in enumerate(names)}
    items = _keyed(
        (str(Path(*part).with_suffix("")), Place(file), labels[part[0]] if len(part) > 1 else -1)
        for file, part in zip(files, parts, strict=True)
    )
    return Split(_shuffled(items), len(items), names)


def _walk(path: Path) -> tuple[list[Path], Counter[str]]:
    """Image files below `path`, links followed but not in circles; and how many others of which extension."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}")

    files, others = [], Counter[str]()
    above = {
        str(path): {os.path.realpath(path)}
    }  # a folder's own way from the top: a link back up would never end
    for place, folders, names in os.walk(path, followlinks=True, onerror=fail):
        inner = {name: os.path.realpath(os.path.join(place, name)) for name in sorted(folders)}
        folders[:] = [name for name, real in inner.items() if name[0] != "." and real not in above[place]]
        above |= {os.path.join(place, name): above[place] | {inner[name]} for name in folders}
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix in EXTENSIONS and not name.startswith("."):
                files.append(Path(place, name))
            else:
                others[suffix] += 1
    return sorted(files), others


def _wnids(home: Path) -> dict[str, Path | tuple[Path, int, int]]:
    """Wnid to its folder, its tar, or its tar's place in a tar of tars."""
    if home.is_file() or (home / "ILSVRC2012_img_train.tar").is_file():
        outer = home if home.is_file() else home / "ILSVRC2012_img_train.tar"
        with outer.open("rb") as file:
            return {
                Path(member.name).stem: (outer, member.offset, member.offset + member.bytes)
                for member in members(file)
            }
    pattern = re.compile(r"n\d{8}(\.tar)?")
    return {
        entry.name.removesuffix(".tar"): entry for entry in home.iterdir() if pattern.fullmatch(entry.name)
    }


def _wnid_split(homes: Mapping[str, Path | tuple[Path, int, int]], wnids: tuple[str, ...]) -> Split:
    labels = {wnid: number for number, wnid in enumerate(wnids)}

    def listed() -> Iterator[tuple[str, Place, int]]:
        for wnid, home in sorted(homes.items()):
            if isinstance(home, Path) and home.is_dir():
                yield from ((f"{wnid}/{file.stem}", Place(file), labels[wnid]) for file in _pictures(home))
                continue
            tar, start, stop = home if isinstance(home, tuple) else (home, 0, None)
            with tar.open("rb") as file:
                try:
                    for member in members(file, start=start, stop=stop):
                        place = Place(tar, member.offset, member.bytes)
                        yield f"{wnid}/{Path(member.name).stem}", place, labels[wnid]
                except TarFault as error:
                    raise DataError(f"{tar} ({wnid}): {error}; fetch it again") from error

    items = _keyed(listed())
    return Split(_shuffled(items), len(items), wnids)


def _hub_split(name: str, data: Any) -> Split:
    import datasets
    from datasets.utils.file_utils import xopen

    features = data.features or {}
    columns = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        named = f"; its columns are {', '.join(features)}" if features else ""
        raise DataError(f"hf:{name} has no image column{named}")
    classes = next((k for k, feature in features.items() if isinstance(feature, datasets.ClassLabel)), None)
    data = data.select_columns([columns[0], *([classes] if classes else [])])
    data = data.cast_column(columns[0], datasets.Image(decode=False))

    def items() -> Iterator[Item]:
        rows = enumerate(data)
        while True:
            try:
                number, row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # network faults, damaged parquet: the library raises a dozen kinds
                raise DataError(
                    f"hf:{name}: {' '.join(str(error).split())[:300]}; call again to go on"
                ) from error
            image, label = row[columns[0]] or {}, row[classes] if classes else -1
            content = image.get("bytes")
            if content is None and image.get("path") and _is_within(image["path"], name):
                with xopen(image["path"], "rb") as file:
                    content = file.read()
            # No image at all is a broken one, which can be left out.
            yield Item(f"{number:09d}", content or b"", -1 if label is None else label)

    count = data.info.splits[data.split].num_examples if data.info.splits and data.split else None
    return Split(items(), count, tuple(features[classes].names) if classes else ())


def _is_within(path: str, name: str) -> bool:
    """Whether a file that a row names belongs to its data set: a row may name any file of this machine."""
    last = path.rpartition("::")[2]
    if "://" in last:
        return last.startswith(("hf://", "https://huggingface.co/"))
    return Path(last).resolve().is_relative_to(Path(name).resolve())


def _one_file(path: Path, pattern: str) -> Path | None:
    found = sorted([*path.glob(pattern), *path.glob(f"*-{pattern}")]) if path.is_dir() else []
    stems = {file.name.removesuffix(".gz") for file in found}
    if len(stems) > 1:
        raise DataError(f"{path} holds several data sets ({', '.join(sorted(stems))}); give each its folder")
    return found[0] if found else None


def _idx_split(images: Path, labels: Path | None) -> Split:
    values = _read_idx(images, dimensions=3)[..., None]
    classes = np.full(len(values), -1) if labels is None else _read_idx(labels, dimensions=1)
    if len(classes) != len(values):
        raise DataError(
            f"{images} holds {len(values)} images, {labels} {len(classes)} labels; fetch them again"
        )
    items = [
        Item(f"{number:06d}", image, int(label))
        for number, (image, label) in enumerate(zip(values, classes, strict=True))
    ]
    return Split(items, len(items), tuple(map(str, range(int(classes.max()) + 1))))


def _read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """An idx file of bytes. Its header says how much is read, so that a gzip bomb expands to no more."""
    try:
        with cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            head = file.read(4 + 4 * dimensions)
            if head[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(f"{path} is not an idx file of {dimensions} dimensions of bytes")
            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = int(np.prod(shape, dtype=object))
            if not 0 < size <= MOST_IDX_BYTES:
                raise DataError(f"{path} claims to hold {size} bytes; at most {MOST_IDX_BYTES} are read")
            values = file.read(size)
            rest = file.read(1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read ({error}); fetch it again") from error
    if len(values) != size or rest:
        raise DataError(f"{path} is cut or too long for its header {shape}; fetch it again")
    return np.frombuffer(values, np.uint8).reshape(shape)
