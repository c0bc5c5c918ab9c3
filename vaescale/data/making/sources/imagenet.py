"""`imagenet:PATH`: ILSVRC folders or tars; a class is its wnid's position among the sorted wnids."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from vaescale.data.making.items import Place
from vaescale.data.making.sources.base import Source, Split
from vaescale.data.making.sources.files import image_files, keyed, shuffled, tree_split
from vaescale.data.tars import TarFault, members
from vaescale.errors import DataError


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
        splits[name] = (
            partial(_wnid_split, listed[name], wnids) if listed[name] else partial(tree_split, home)
        )
    return Source(splits, crop="whole", resample="box", channels=3)


def _wnids(home: Path) -> dict[str, Path | tuple[Path, int, int]]:
    """The folder, the tar, or the range in a tar of tars, of each wnid."""
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
                yield from ((f"{wnid}/{file.stem}", Place(file), labels[wnid]) for file in image_files(home))
                continue
            tar, start, stop = home if isinstance(home, tuple) else (home, 0, None)
            with tar.open("rb") as file:
                try:
                    for member in members(file, start=start, stop=stop):
                        location = Place(tar, member.offset, member.bytes)
                        yield f"{wnid}/{Path(member.name).stem}", location, labels[wnid]
                except TarFault as error:
                    raise DataError(f"{tar} ({wnid}): {error}; fetch it again") from error

    items = keyed(listed())
    return Split(shuffled(items), len(items), wnids)
