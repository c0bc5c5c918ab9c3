"""The kind of source that reads what a path holds, for messages about a wrong one."""

from collections.abc import Callable, Iterable
from pathlib import Path

from vaescale.data.making.items import Place
from vaescale.data.making.sources.archives import is_archive, opened
from vaescale.data.making.sources.array_files import SUFFIXES
from vaescale.data.making.sources.array_names import holds_several
from vaescale.data.making.sources.base import Split
from vaescale.data.making.sources.cifar import find_cifar
from vaescale.data.making.sources.files import holds_images
from vaescale.data.making.sources.imagenet_batches import find_batches
from vaescale.errors import DataError

LOOKED_AT = 10
IMAGENET_TAR, WNID = "ILSVRC2012_img_train.tar", "n" + "[0-9]" * 8


def suggest(path: Path, *, wrong: str = "") -> str | None:
    """The argument, as KIND:PATH, that reads what is at `path`; None if nothing does. wrong: the kind that was tried.

    Where the files of the tried kind are there, nothing else is suggested.
    """
    if not path.exists():
        return None
    own: dict[str, Callable[[Path], bool]] = {"arrays": _has_arrays, "frames": holds_images}
    if wrong and (own[wrong](path) if wrong in own else _FINDERS.get(wrong, _nothing)(path) is not None):
        return None
    homes = ((kind, find(path)) for kind, find in _FINDERS.items())
    return next((f"{kind}:{home}" for kind, home in homes if home is not None), None)


def refuse_stacks(split: Split) -> None:
    """Raise DataError for a folder of .npy files of which some of the first ones hold several images each."""
    first = split.items[:LOOKED_AT] if isinstance(split.items, list) else []
    places = [item.content for item in first if isinstance(item.content, Place)]
    for place in places:
        if place.path.suffix.lower() == ".npy" and holds_several(place.path):
            raise DataError(f"{place.path} holds several images; did you mean arrays:{place.path.parent}?")


def _nothing(path: Path) -> None:  # noqa: ARG001  # of a kind whose files are not known here
    return None


def _first(files: Iterable[Path]) -> Path | None:
    return min(files, default=None)


def _idx(path: Path) -> Path | None:
    if path.is_file():
        return path.parent if "-ubyte" in path.name and "idx" in path.name else None
    file = _first([*path.glob("*idx3-ubyte*"), *path.glob("*/*idx3-ubyte*"), *path.glob("*/*/*idx3-ubyte*")])
    return None if file is None else file.parent


def _bair(path: Path) -> Path | None:
    """The folder above those of TFRecord files."""
    file = _first([*path.glob("*/*.tfrecord*"), *path.glob("*/*/*.tfrecord*")]) if path.is_dir() else None
    return None if file is None else file.parent.parent


def _cifar(path: Path) -> Path | None:
    found = find_cifar(path if path.is_dir() else path.parent)
    if found is None or (path.is_file() and not (path.match(found[1].batches) or path.name == found[1].test)):
        return None
    return found[0]


def _imagenet(path: Path) -> Path | None:
    if path.is_file():
        batches = [file for files in find_batches(path.parent).values() for file in files]
        return path.parent if path in batches else path if path.name == IMAGENET_TAR else None
    if find_batches(path) or (path / IMAGENET_TAR).is_file():
        return path
    wnids = _first([*path.glob(WNID), *path.glob(f"{WNID}.tar"), *path.glob(f"train/{WNID}*")])
    return None if wnids is None else path


def _celeba(path: Path) -> Path | None:
    folders = [path, *path.glob("*/")] if path.is_dir() else []
    names = ("img_align_celeba", "Img/img_align_celeba", "list_eval_partition.txt", "list_eval_partition.csv")
    return path if any((folder / name).exists() for folder in folders for name in names) else None


def _arrays(path: Path) -> Path | None:
    """The file or the folder of arrays. A folder of .npy files with one image each is none."""
    if path.is_file():
        return path if path.suffix.lower() in SUFFIXES else None
    for folder in (path, *sorted(path.glob("*/"))):
        files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES]
        if any(file.suffix.lower() != ".npy" for file in files) or (files and holds_several(min(files))):
            return folder
    return None


def _has_arrays(path: Path) -> bool:
    return (path.is_file() and path.suffix.lower() in SUFFIXES) or any(
        file.suffix.lower() in SUFFIXES for file in path.glob("*")
    )


def _folder(path: Path) -> Path | None:
    if path.is_file():
        return path if is_archive(path) and _may_hold_images(path) else None
    home = path if path.is_dir() else None
    return home if home is not None and holds_images(home) else None


def _may_hold_images(archive: Path) -> bool:
    """Whether an archive holds images; a compressed tar, whose listing takes long, may."""
    if not archive.name.lower().endswith((".zip", ".tar")):
        return True
    try:
        return holds_images(opened(archive))
    except DataError:
        return False


_FINDERS: dict[str, Callable[[Path], Path | None]] = {
    "idx": _idx,
    "bair": _bair,
    "cifar": _cifar,
    "imagenet": _imagenet,
    "celeba": _celeba,
    "arrays": _arrays,
    "folder": _folder,
}
