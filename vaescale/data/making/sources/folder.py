"""`folder:PATH`: a tree of images; the first sub-folder is the class."""

from functools import partial
from pathlib import Path

from vaescale.data.making.sources.base import SPLIT_NAMES, Source
from vaescale.data.making.sources.files import EXTENSIONS, tree_split
from vaescale.errors import DataError


def folder(path: Path) -> Source:
    """Every JPEG, PNG and WebP below `path`, in a fixed random order; sub-folders train, val and test are splits."""
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give the folder that holds the images")
    inside = sorted(path.iterdir())
    splits = {SPLIT_NAMES[p.name]: p for p in inside if p.is_dir() and p.name in SPLIT_NAMES}
    if "train" not in splits:
        return Source({"train": partial(tree_split, path)})
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
    return Source({name: partial(tree_split, inner) for name, inner in splits.items()})
