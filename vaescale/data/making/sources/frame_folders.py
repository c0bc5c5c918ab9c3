"""`frames:PATH`: folders of frames, one folder for each clip, as sequences or as windows of them.

Folders train, val and test directly in PATH are splits. Where all of their clips are CLASS/CLIP, as those of UCF-101, the first folder is
the class. Files are in natural order: frame2 before frame10. Where names number the frames, a missing number is a gap, and what would
span it is named and not used.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import groupby, pairwise
from pathlib import Path

from vaescale.data.config import MOST_FRAMES
from vaescale.data.making.items import Clip, Item, Place, printable
from vaescale.data.making.sources.base import SPLIT_NAMES, Source, Split, split_of
from vaescale.data.making.sources.files import holds_images, is_junk, keyed, shuffled, walk
from vaescale.data.tars import LEAST_FRAMES
from vaescale.errors import DataError, UserError
from vaescale.system.console import say

NAMED = 3  # clips that a sentence names
CLASS_AND_CLIP = 2  # folders of a clip below that of its split
_LAST_NUMBER = re.compile(r"^(.*?)(\d{1,12})(\D*)$", re.DOTALL)
_NUMBERS = re.compile(r"(\d+)")


def frame_folders(path: Path, *, window: int | None = None, stride: int | None = None) -> Source:
    """The clips below a folder. window: frames of a sequence that is cut of a clip; None takes whole clips. stride: frames from the
    begin of a window to that of the next one, by default `window`.

    Clips of fewer frames than a window, or than two, are left out, which is said with their number. Raises UserError and DataError.
    """
    if stride is not None and window is None:
        raise UserError(f"--stride (={stride}) is for windows; add --window T")
    if not path.is_dir():
        raise DataError(f"{path} is a file; give the folder that holds a folder of frames for each clip")
    homes = _homes(path)
    clips = cache(lambda name: _clips(homes[name]))

    @cache
    def class_names() -> tuple[str, ...]:
        inside = [folder.relative_to(home) for name, home in homes.items() for folder in clips(name)[0]]
        names = {folder.parts[0] for folder in inside if len(folder.parts) == CLASS_AND_CLIP}
        are_classes = path not in homes.values() and len(names) > 1
        all_have = all(len(folder.parts) == CLASS_AND_CLIP for folder in inside)
        return tuple(sorted(names)) if are_classes and all_have else ()

    @cache
    def split(name: str) -> Split:
        found, others = clips(name)
        items = _items(name, homes[name], found, window, stride or window or 1, class_names())
        return Split(items, len(items), class_names(), left_out=others)

    return Source({name: partial(split, name) for name in homes}, holds="sequences")


def gap_of(names: Sequence[str]) -> str | None:
    """The first gap in the names of frames, without their endings, as a phrase; None without one.

    The step from frame to frame is the most frequent one. Names that do not differ in their last number alone have no gaps.
    """
    matches = [_LAST_NUMBER.match(name) for name in names]
    parts = [(match[1], match[3], int(match[2])) for match in matches if match]
    if len(parts) < len(names) or len({part[:2] for part in parts}) > 1 or len(parts) < LEAST_FRAMES:
        return None
    steps = [after[2] - before[2] for before, after in pairwise(parts)]
    counts = Counter(step for step in steps if step > 0)
    step = min(counts, key=lambda one: (-counts[one], one), default=1)
    for place, one in enumerate(steps, start=1):
        if one != step:
            return f"has {names[place]} after {names[place - 1]}, where others follow by {step}"
    return None


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names as people do, by the numbers in them."""
    parts = _NUMBERS.split(name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def _homes(path: Path) -> dict[str, Path]:
    """The folder of each split. Raises DataError where other folders of frames are beside those of splits."""
    inside = sorted(each for each in path.iterdir() if each.is_dir() and not is_junk(each.name))
    named = [(each, split) for each in inside if (split := split_of(each.name)) is not None]
    if not named:
        return {"train": path}
    homes = {split: each for each, split in named}
    strange = [each.name for each in inside if each not in homes.values() and holds_images(each)]
    if strange or holds_images(path, below=False):
        known = ", ".join(home.name for home in homes.values())
        raise DataError(
            f"{path} holds the splits {known} and also {', '.join(strange[:NAMED]) or 'frames in no folder'}; move the clips into the "
            f"folders of splits ({', '.join(sorted(set(SPLIT_NAMES.values())))})"
        )
    return homes


def _clips(home: Path) -> tuple[dict[Path, list[Path]], Mapping[str, int]]:
    """The frames of each folder of a split, in order, and the numbers of other files by ending."""
    files, others = walk(home)
    paths = sorted((Path(str(file)) for file in files), key=_by_folder)
    return {folder: list(inside) for folder, inside in groupby(paths, key=lambda file: file.parent)}, others


def _items(
    split: str,
    home: Path,
    clips: Mapping[Path, list[Path]],
    window: int | None,
    stride: int,
    class_names: tuple[str, ...],
) -> list[Item]:
    rows: list[tuple[str, Clip, int]] = []
    short: list[str] = []
    wanted = window or LEAST_FRAMES
    for folder, frames in clips.items():
        if len(frames) > MOST_FRAMES and window is None:
            raise DataError(
                f"{folder} holds {len(frames)} frames, more than {MOST_FRAMES}; cut them with --window T"
            )
        name = os.path.relpath(folder, home)
        name = home.name if name == "." else name
        if len(frames) < wanted:
            short.append(printable(name))
            continue
        label = class_names.index(Path(name).parts[0]) if class_names else -1
        rows += _windows(name, frames, window or len(frames), stride if window else len(frames), label)
    if short:
        more = f" and {len(short) - NAMED} more" if len(short) > NAMED else ""
        text = f"{split}: {len(short)} clips have fewer than {wanted} frames and are left out: {', '.join(short[:NAMED])}{more}"
        if not rows:
            remedy = "lower --window" if window else "give a folder that holds a folder for each clip"
            raise DataError(f"{text}; {remedy}")
        say(text)
    return shuffled(keyed(rows))


def _by_folder(path: Path) -> tuple[list[tuple[int, int, str]], list[tuple[int, int, str]]]:
    return natural(str(path.parent)), natural(path.name)


def _windows(
    name: str, frames: list[Path], window: int, stride: int, label: int
) -> Iterator[tuple[str, Clip, int]]:
    """The windows of a clip, each a row for `keyed`."""
    whole = window == len(frames)
    for start in range(0, len(frames) - window + 1, stride):
        files = frames[start : start + window]
        gap = gap_of([file.stem for file in files])
        places = tuple(Place(file) for file in files)
        yield (
            name if whole else f"{name}_{start:06d}",
            Clip(places, name, None if gap is None else ("missing", f"it {gap}")),
            label,
        )
