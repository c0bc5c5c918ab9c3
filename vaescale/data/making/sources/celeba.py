"""`celeba:PATH`: aligned CelebA, with its official partition where that file is present."""

import re
from functools import partial
from pathlib import Path

from vaescale.data.making.sources.base import Source
from vaescale.data.making.sources.files import holds_images, image_files, listed_split
from vaescale.errors import DataError
from vaescale.system.console import say

PARTITION = ("train", "val", "test")  # as CelebA numbers them


def celeba(path: Path) -> Source:
    """Aligned and cropped CelebA, 178x218: the centre 148x148 is kept, as VAE papers do. Liu et al. 2015.

    path: the folder of the images, or one above it, such as the published one with Img, Eval and Anno.
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


def _images(path: Path) -> Path:
    """The folder of the images: img_align_celeba, once or twice, in `path`, its Img or one folder more; else `path` itself."""
    for outer in (path, *sorted(each for each in path.glob("*") if each.is_dir())):
        for inner in ("img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba"):
            if holds_images(outer / inner, below=False):
                return outer / inner
    if holds_images(path, below=False):
        return path
    if packed := sorted([*path.glob("*.zip"), *path.glob("*/img_align_celeba*.zip"), *path.glob("*/*.7z*")]):
        raise DataError(f"{path} holds no images; unpack {packed[0]} first")
    raise DataError(
        f"{path} holds no images and no img_align_celeba with images; give the folder of the images"
    )


def _partition(images: Path) -> Path | None:
    """The official partition: beside the images, or in one of the three folders above them, or in their Eval or Anno."""
    for folder in (images, *images.parents[:3]):
        for inner in ("", "Eval", "Anno"):
            for name in ("list_eval_partition.txt", "list_eval_partition.csv"):
                if (file := folder / inner / name).is_file():
                    return file
    return None
