"""`imagenet:PATH`: ILSVRC folders or tars; a class is its wnid's position among the sorted wnids."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from vaescale.data.making.items import Packed, Place
from vaescale.data.making.sources.archives import ArchivePath, TreePath, opened, place_of
from vaescale.data.making.sources.base import Source, Split
from vaescale.data.making.sources.files import counted, image_files, keyed, readable, scan, shuffled, walk
from vaescale.data.making.sources.folder import descended
from vaescale.data.making.sources.imagenet_batches import find_batches, imagenet_batches
from vaescale.data.making.sources.tree import annotated, tree_split, with_classes
from vaescale.data.tars import TarFault, members
from vaescale.errors import DataError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"  # of one tar a wnid; of images
_Home = TreePath | tuple[Path, int, int]


def imagenet(path: Path) -> Source:
    """ILSVRC: train and val of wnid folders, of one tar a wnid, or the published tars. Russakovsky et al. 2015.

    The whole image is averaged down to SIZE, as in the down-sampled ImageNet (Chrabaszcz, Loshchilov & Hutter 2017);
    with crop `square` and a smoother filter it is the usual short side + centre crop. Also Tiny ImageNet, whose images lie in
    WNID/images. A flat val or test has no classes, unless a file such as val_annotations.txt tells them. path may be a zip or a
    tar of such folders. The down-sampled ImageNet as published, train_data_batch_1 and so on, is read by `imagenet_batches.py`.
    """
    if batches := find_batches(path):
        return imagenet_batches(path, batches)
    top: TreePath = path
    if path.is_file() and not _is_tar_of_tars(path):
        top, _ = descended(opened(path))
    homes = {name: top / name for name in ("train", "val", "test") if (top / name).is_dir()}
    homes = homes if "train" in homes else {"train": top, **homes}
    if "val" not in homes and (path / VAL_TAR).is_file():
        homes["val"] = opened(path / VAL_TAR)
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
        splits[name] = (
            partial(_wnid_split, name, listed[name], wnids)
            if listed[name]
            else partial(_flat_split, name, home, wnids)
        )
    return Source(splits, crop="whole", resample="box", channels=3)


def _is_tar_of_tars(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return next(members(file)).name.endswith(".tar")
    except (TarFault, StopIteration, OSError):
        return False


def _wnids(home: TreePath) -> dict[str, _Home]:
    """The folder, the tar, or the range in a tar of tars, of each wnid."""
    pattern = re.compile(r"n\d{8}(\.tar)?")
    if isinstance(home, ArchivePath):
        return {each.name: each for each in scan(home)[0] if pattern.fullmatch(each.name)}
    if home.is_file() or (home / TRAIN_TAR).is_file():
        outer = home if home.is_file() else home / TRAIN_TAR
        with outer.open("rb") as file:
            return {
                Path(member.name).stem: (outer, member.offset, member.offset + member.bytes)
                for member in members(file)
            }
    return {
        entry.name.removesuffix(".tar"): entry for entry in home.iterdir() if pattern.fullmatch(entry.name)
    }


def _flat_split(split: str, home: TreePath, wnids: tuple[str, ...]) -> Split:
    """A split whose folder has no wnids; the classes may be in a file beside the images."""
    images, others = walk(home)
    files = {split: [(file.relative_to(home), place_of(file)) for file in images]}  # type: ignore[arg-type]
    rows, names = with_classes(files, {split: annotated(home)})
    if strange := sorted(set(names) - set(wnids)):
        raise DataError(f"{home} has class {strange[0]}, which train has not; check the folders")
    return tree_split(split, rows[split], wnids, others)


def _wnid_split(split: str, homes: Mapping[str, _Home], wnids: tuple[str, ...]) -> Split:
    labels = {wnid: number for number, wnid in enumerate(wnids)}

    def listed() -> Iterator[tuple[str, Place | Packed, int]]:
        for wnid, home in counted(f"list {split}", sorted(homes.items()), unit="classes"):
            if not isinstance(home, tuple) and home.is_dir():
                files = image_files(home) or (
                    image_files(home / "images") if (home / "images").is_dir() else []
                )
                yield from ((f"{wnid}/{file.stem}", place_of(file), labels[wnid]) for file in files)
                continue
            assert not isinstance(home, ArchivePath), "only folders of archives are wnids"
            tar, start, stop = home if isinstance(home, tuple) else (home, 0, None)
            with tar.open("rb") as file:
                try:
                    for member in members(file, start=start, stop=stop):
                        location = Place(tar, member.offset, member.bytes)
                        yield f"{wnid}/{Path(member.name).stem}", location, labels[wnid]
                except TarFault as error:
                    raise DataError(f"{tar} ({wnid}): {error}; fetch it again") from error

    items = keyed(listed())
    if not items:
        raise DataError(f"{split}: its {len(homes)} wnid folders hold no images; check them")
    return Split(readable(shuffled(items)), len(items), wnids)
