"""`celeba:PATH`: aligned CelebA, with its official partition where that file is present."""

import re
from functools import partial
from pathlib import Path

from vaescale.data.making.sources.archives import TreePath, is_archive, opened, without_ending
from vaescale.data.making.sources.base import Source
from vaescale.data.making.sources.files import holds_images, image_files, listed_split, scan
from vaescale.errors import DataError
from vaescale.system.console import say

PARTITION = ("train", "val", "test")  # as CelebA numbers them


def celeba(path: Path) -> Source:
    """Aligned and cropped CelebA, 178x218: the centre 148x148 is kept, as VAE papers do. Liu et al. 2015.

    path: the folder of the images, or one above it, such as the published one with Img, Eval and Anno; img_align_celeba.zip need
    not be unpacked.
    list_eval_partition.txt (or Kaggle's .csv) gives train, val and test; it is looked for beside the images, in the three
    folders above them, and in an Eval or Anno there.
    """
    images = _images(path)
    files = {file.name: file for file in image_files(images)}
    partition = _partition(images)
    if partition is None:
        say(f"no list_eval_partition.txt near {images}: all its images are one split")
        return Source({"train": partial(listed_split, list(files.values()))}, crop=148, channels=3)
    rows = re.findall(r"^([^\s,]+\.\w+)[\s,]+([012])\s*$", partition.read_text(), re.MULTILINE)
    missing = [name for name, _ in rows if name not in files]
    if missing or not rows:
        what = f"{len(missing)} images that are missing, such as {missing[0]}" if rows else "no image"
        raise DataError(f"{partition} names {what}; complete {images} or move the file away")
    if left_out := sorted(files.keys() - {name for name, _ in rows}):
        say(
            f"{len(left_out)} of {len(files)} images in {images} are left out: {partition} does not name them"
        )
    listed = {
        split: [files[name] for name, number in rows if int(number) == n] for n, split in enumerate(PARTITION)
    }
    splits = {split: partial(listed_split, paths) for split, paths in listed.items() if paths}
    return Source(splits, crop=148, channels=3)


def _images(path: Path) -> TreePath:
    """The folder of the images: img_align_celeba, once or twice, in `path`, its Img or one folder more; else `path` itself.

    Where no folder holds images, an archive named img_align_celeba in these places, and what `path` is an archive of.
    """
    top = opened(path)
    every = (top, *sorted((each for each in scan(top)[0]), key=str))
    for outer in every:
        for inner in ("img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba"):
            if holds_images(outer / inner, below=False):
                return outer / inner
    if holds_images(top, below=False):
        return top
    if isinstance(top, Path):
        packed = (file for each in (*every, *(each / "Img" for each in every)) for file in _archives(each))
        if (archive := next(packed, None)) is not None:
            return _images(archive)
        if strange := sorted([*path.glob("*.7z*"), *path.glob("*/*.7z*"), *path.glob("*.zip")]):
            raise DataError(f"{path} holds no images; unpack {strange[0]} first")
    raise DataError(
        f"{path} holds no images and no img_align_celeba with images; give the folder of the images"
    )


def _archives(folder: TreePath) -> list[Path]:
    """The archives of the images in a folder."""
    if not isinstance(folder, Path) or not folder.is_dir():
        return []
    names = (file for file in folder.iterdir() if is_archive(file) and file.is_file())
    return sorted(file for file in names if without_ending(file.name) == "img_align_celeba")


def _partition(images: TreePath) -> TreePath | None:
    """The official partition: beside the images, or in one of the three folders above them, or in their Eval or Anno."""
    for folder in (images, *images.parents[:3]):
        for inner in ("", "Eval", "Anno"):
            for name in ("list_eval_partition.txt", "list_eval_partition.csv"):
                file: TreePath = folder / inner / name if inner else folder / name
                if file.is_file():
                    return file
    return None
