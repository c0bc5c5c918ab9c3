"""`celeba:PATH`: aligned CelebA, with its official partition where that file is present."""

import re
from functools import partial
from pathlib import Path

from vaescale.data.making.sources.base import Source
from vaescale.data.making.sources.files import image_files, listed_split
from vaescale.errors import DataError

PARTITION = ("train", "val", "test")  # as CelebA numbers them


def celeba(path: Path) -> Source:
    """Aligned and cropped CelebA, 178x218: the centre 148x148 is kept, as VAE papers do. Liu et al. 2015.

    list_eval_partition.txt (or Kaggle's .csv) beside the images gives train, val and test.
    """
    folders = [path, path / "img_align_celeba", path / "img_align_celeba" / "img_align_celeba"]
    images = next((each for each in reversed(folders) if each.is_dir() and image_files(each)), None)
    if images is None:
        raise DataError(
            f"{path} holds no images and no img_align_celeba with images; give the folder of the images"
        )
    files = {file.name: file for file in image_files(images)}
    partition = next(
        (
            file
            for each in (images, *images.parents[:2])
            for name in ("list_eval_partition.txt", "list_eval_partition.csv")
            if (file := each / name).is_file()
        ),
        None,
    )
    if partition is None:
        return Source({"train": partial(listed_split, list(files.values()))}, crop=148, channels=3)
    rows = re.findall(r"^([^\s,]+\.\w+)[\s,]+([012])\s*$", partition.read_text(), re.MULTILINE)
    missing = [name for name, _ in rows if name not in files]
    if missing or not rows:
        what = f"{len(missing)} images that are missing, such as {missing[0]}" if rows else "no image"
        raise DataError(f"{partition} names {what}; complete {images} or move the file away")
    listed = {
        split: [files[name] for name, number in rows if int(number) == n] for n, split in enumerate(PARTITION)
    }
    splits = {split: partial(listed_split, paths) for split, paths in listed.items() if paths}
    return Source(splits, crop=148, channels=3)
