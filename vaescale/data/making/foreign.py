"""Tars made by others: which member of a sample is its image, which one its class, and what is left out.

The first reading of a tar opens its headers and the classes only. What the samples of all tars have in common then decides.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from vaescale.data.frame_files import FRAME
from vaescale.data.index import SEQUENCES
from vaescale.data.making.sources.base import split_of
from vaescale.data.making.sources.files import EXTENSIONS
from vaescale.data.tars import (
    FRAMES,
    IMAGE_EXTENSIONS,
    LEAST_FRAMES,
    NUMBER,
    SEQUENCE_EXTENSIONS,
    USUAL,
    Member,
    Roles,
    TarFault,
    class_of,
    groups,
)
from vaescale.errors import DataError, UserError

MOST_CLASSES = 100_000
LABELS = ("cls", "json:label", "json:cls", "json:class")  # where a class is looked for, the first one first
NAMED = 5  # choices, words or members that a sentence names


class Survey(NamedTuple):
    """What the samples of a tar hold: their number, and the numbers of samples by what they have.

    members: by extension; images: by their usual images, joined with a comma; classes: by the class as text, for each place
    of a class; folders: by the part of the key before its last slash; frames: by the number of their numbered members; name: of a file in the tar, as an example. headers: the
    tar's members for `unpacked_headers`, so that they are read once.
    """

    samples: int
    members: Counter[str]
    images: Counter[str]
    classes: dict[str, Counter[str]]
    folders: Counter[str]
    name: str
    frames: Counter[int]
    headers: bytes = b""


def survey(path: Path, labels: tuple[str, ...]) -> Survey:
    """Read the headers of a tar, and the classes in `labels`. Raises DataError when the tar is not sound."""
    count, name = 0, ""
    headers: list[Member] = []
    members, images, folders = Counter[str](), Counter[str](), Counter[str]()
    frames = Counter[int]()
    classes: dict[str, Counter[str]] = {label: Counter() for label in labels}
    try:
        with path.open("rb") as file:
            for key, group in groups(file):
                count += 1
                headers += (member for _, member in group)
                extensions = [extension for extension, _ in group]
                name = group[0][1].name if not name or "." in extensions[0] else name
                members.update(set(extensions))
                images[",".join(sorted(set(extensions) & set(IMAGE_EXTENSIONS)))] += 1
                folders[key.rpartition("/")[0]] += 1
                frames[sum(FRAME.fullmatch(extension) is not None for extension in extensions)] += 1
                for label, found in classes.items():
                    text = None
                    with suppress(ValueError):  # that sample is named when it is indexed
                        text = class_of(file, key, group, label)
                    if text and len(found) <= MOST_CLASSES:
                        found[text] += 1
    except TarFault as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return Survey(
        count, members, images, classes, folders, name, frames, zlib.compress(json.dumps(headers).encode(), 1)
    )


def unpacked_headers(headers: bytes) -> list[Member]:
    """The members of a tar from its survey."""
    return [Member(*row) for row in json.loads(zlib.decompress(headers))]


def together(surveys: Iterable[Survey]) -> Survey:
    """The survey of several tars."""
    total = Survey(0, Counter(), Counter(), {}, Counter(), "", Counter())
    for one in surveys:
        for counter, more in (
            (total.members, one.members),
            (total.images, one.images),
            (total.folders, one.folders),
        ):
            counter.update(more)
        total.frames.update(one.frames)
        for label, found in one.classes.items():
            total.classes.setdefault(label, Counter()).update(found)
        total = total._replace(samples=total.samples + one.samples, name=total.name or one.name)
    return total


def labels_of(class_member: str | None) -> tuple[str, ...]:
    """The places in which to look for a class. Raises UserError for a member that holds more than a class."""
    if class_member is None:
        return LABELS
    kind, colon, field = class_member.partition(":")
    class_member = kind.lower().removeprefix(".") + colon + field
    if class_member == "json":
        raise UserError("--class-member json is a whole object; name its field, such as json:label")
    return () if class_member in ("none", "folder") else (class_member,)


def choose(
    surveys: list[Survey],
    stems: list[str],
    *,
    place: str,
    image_member: str | None,
    class_member: str | None,
    skip_broken: bool,
    alone: bool,
) -> tuple[Roles, list[str]]:
    """The roles of the members, and sentences that say what was taken and what was left out.

    surveys, stems: of each tar, its content and its name. alone: other folders are not indexed with it. Raises UserError
    and DataError where no choice is sure.
    """
    whole = together(surveys)
    images, sentences = _choose_images(whole, place, image_member, skip_broken=skip_broken)
    label, words, said = _choose_classes(whole, surveys, stems, class_member)
    roles = Roles(images, label, words)
    if alone and words is not None:
        said = [
            *said,
            "where the splits have folders train, val and test, index the folder above them, so that the numbers are the "
            "same in each",
        ]
    return roles, [*sentences, *said, *_left_out(whole, roles)]


def kept_roles(made: dict[str, Any], class_names: tuple[str, ...]) -> Roles:
    """The roles with which an index was made, from its own words."""
    images, label = made.get("image_member"), made.get("class_member")
    if images is None and made.get("kind") == SEQUENCES:
        images = SEQUENCE_EXTENSIONS[0]
    words = (
        {name: number for number, name in enumerate(class_names)} if made.get("classes") == "words" else None
    )
    return Roles(
        tuple(images.split(",")) if isinstance(images, str) else USUAL.images,
        label if isinstance(label, str) else USUAL.label,
        words,
    )


def noted(roles: Roles) -> dict[str, str]:
    """The roles for an index: what differs from the usual ones."""
    images = {"image_member": ",".join(roles.images)} if roles.images != USUAL.images else {}
    label = {"class_member": roles.label} if roles.label != USUAL.label else {}
    return {**images, **label, **({"classes": "words"} if roles.words is not None else {})}


def _choose_images(
    whole: Survey, place: str, wanted: str | None, *, skip_broken: bool
) -> tuple[tuple[str, ...], list[str]]:
    if wanted is not None:
        names = tuple(name.strip().lower().removeprefix(".") for name in wanted.split(","))
        if names == (FRAMES,) and whole.frames.total() > whole.frames[0]:
            return names, [_frames_taken(whole)]
        if unknown := [name for name in names if name not in whole.members]:
            raise UserError(
                f"--image-member {wanted}: no sample in {place} has a member {unknown[0]!r}; the members are "
                f"{_counts(whole.members)}"
            )
        return names, [f"images are the members {_counts({name: whole.members[name] for name in names})}"]
    if not whole.images.total() - whole.images[""]:
        for kind in SEQUENCE_EXTENSIONS:
            if 2 * whole.members[kind] > whole.samples:
                return (kind,), [f"sequences are the members {_counts({kind: whole.members[kind]})}"]
    candidates = _candidates(whole.members)
    several = sum(count for kinds, count in whole.images.items() if "," in kinds)
    single = sum(count for kinds, count in whole.images.items() if kinds and "," not in kinds)
    if several and (not skip_broken or not single):
        usual = {name: count for name, count in candidates.items() if name in IMAGE_EXTENSIONS}
        raise DataError(
            f"{several} of {whole.samples} samples in {place} have several images: {_counts(usual)}; choose one with "
            f"--image-member {_most(usual)}"
        )
    if several or single or not whole.samples:
        return IMAGE_EXTENSIONS, []
    if not candidates:
        raise DataError(_without_images(whole, place))
    if len(candidates) > 1:
        numbered = sum(1 for name in candidates if FRAME.fullmatch(name)) >= LEAST_FRAMES
        frames = (
            f"take them as the frames of sequences with --image-member {FRAMES}, or, " if numbered else "or, "
        )
        raise DataError(
            f"each sample in {place} may have several images: {_counts(candidates)}; choose one with --image-member "
            f"{_most(candidates)}, {frames}if these are dots in the names of single images, replace those "
            f"dots: names are split at the first dot, as webdataset does (of {whole.name!r}, the key is "
            f"{whole.name.partition('.')[0]!r})"
        )
    return tuple(candidates), [f"images are the members {_counts(candidates)}"]


def _frames_taken(whole: Survey) -> str:
    numbers = [number for number in whole.frames if number]
    least, most = min(numbers), max(numbers)
    length = f"{most}" if least == most else f"{least} to {most}"
    return f"sequences are the numbered members of a sample, {length} frames"


def _candidates(members: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in members.items() if name.rpartition(".")[2] in IMAGE_EXTENSIONS}


def _without_images(whole: Survey, place: str) -> str:
    message = (
        f"the samples in {place} have no images ({', '.join(IMAGE_EXTENSIONS)}), but {_counts(whole.members)}"
    )
    if any("." + name.rpartition(".")[2] in EXTENSIONS for name in whole.members):
        return f"{message}; unpack the tars, and write shards of their files with `vaescale make-shards folder:DIR OUT`"
    return f"{message}; if one of these is a JPEG, PNG, WebP or npy image, name it with --image-member"


def _choose_classes(
    whole: Survey, surveys: list[Survey], stems: list[str], wanted: str | None
) -> tuple[str, dict[str, int] | None, list[str]]:
    """The place of the classes, their numbers where they are words, and sentences."""
    if wanted == "none":
        return "none", None, []
    if wanted == "folder":
        above = _common(whole.folders)
        return _folder_classes(whole, above)
    found = {label: texts for label, texts in whole.classes.items() if texts}
    if not found:
        if wanted is not None:
            raise UserError(
                f"--class-member {wanted}: no sample has such a class; the members are {_counts(whole.members)}"
            )
        return _guess_folders(whole, surveys, stems)
    label = next(iter(found))
    others = [
        f"classes in {other} are left out ({found[other].total()} samples)"
        for other in found
        if other != label
    ]
    texts = found[label]
    numbers = sum(count for text, count in texts.items() if NUMBER.fullmatch(text))
    if 2 * numbers >= texts.total():
        said = (
            [] if label == USUAL.label else [f"classes are the numbers in {label} of {texts.total()} samples"]
        )
        return label, None, [*said, *others]
    if wanted is None and label != USUAL.label and 2 * len(texts) > texts.total() > NAMED:
        raise DataError(
            f"{label} holds {len(texts)} different words for {texts.total()} samples, which look like no classes; "
            f"take them with --class-member {label}, or leave them out with --class-member none"
        )
    return label, _numbered(texts, label), [_named_classes(texts, label), *others]


def _numbered(texts: Counter[str], label: str) -> dict[str, int]:
    """The number of each word, in sorted order. Raises DataError when there are too many."""
    if len(texts) > MOST_CLASSES:
        raise DataError(
            f"{label} holds more than {MOST_CLASSES} different words; leave them out with --class-member none"
        )
    return {word: number for number, word in enumerate(sorted(texts))}


def _named_classes(texts: Counter[str], label: str) -> str:
    words = sorted(texts)
    more = f" ... {words[-1]}" if len(words) > NAMED else ""
    return f"classes are the {len(words)} words in {label}, numbered in sorted order: {', '.join(words[:NAMED])}{more}"


def _common(folders: Iterable[str]) -> str:
    """The folders above the last one that all keys have in common, with a slash at the end, or nothing."""
    parts = [folder.split("/") for folder in folders]
    depth = 0
    least = min(map(len, parts), default=1)
    while depth < least - 1 and len({tuple(part[: depth + 1]) for part in parts}) == 1:
        depth += 1
    return "".join(f"{part}/" for part in parts[0][:depth]) if parts else ""


def _folder_classes(whole: Survey, above: str) -> tuple[str, dict[str, int], list[str]]:
    label = f"folder:{above}" if above else "folder"
    texts = Counter[str]()
    for folder, count in whole.folders.items():
        if name := folder.removeprefix(above):
            texts[name] += count
    if not texts:
        raise UserError("--class-member folder: no name in the tars has a folder")
    return label, _numbered(texts, "folder"), [_named_classes(texts, "folder")]


def _guess_folders(
    whole: Survey, surveys: list[Survey], stems: list[str]
) -> tuple[str, dict[str, int] | None, list[str]]:
    """Folders as classes, where each key has exactly one and nothing else speaks against it."""
    above = _common(whole.folders)
    names = [folder.removeprefix(above) for folder in whole.folders]
    if len(names) < 2:
        return USUAL.label, None, []
    why = ""
    if any(not name or "/" in name for name in names):
        why = "not every name has exactly one folder"
    elif all(map(split_of, names)):
        why = "they have the names of splits"
    elif 2 * len(names) > whole.samples:
        why = f"there are {len(names)} for {whole.samples} samples"
    elif all(len(one.folders) == 1 for one in surveys) and all(
        name.isdecimal() and name in stem
        for one, stem in zip(surveys, stems, strict=True)
        for name in one.folders
        for name in [name.removeprefix(above)]
    ):
        why = "each is named after its tar"
    if why:
        return (
            USUAL.label,
            None,
            [f"folders in the tars are not taken as classes: {why}; --class-member folder takes them"],
        )
    return _folder_classes(whole, above)


def _left_out(whole: Survey, roles: Roles) -> list[str]:
    """A sentence on the members that are not used."""
    used = {*roles.images, roles.label.partition(":")[0]}
    unused = {name: count for name, count in whole.members.items() if name not in used}
    if roles.images == (FRAMES,):
        unused = {name: count for name, count in unused.items() if not FRAME.fullmatch(name)}
    if not unused:
        return []
    notes = {"txt": "captions"}
    if roles.label == USUAL.label:
        notes["json"] = "without label, cls or class"
    return [f"members left out: {_counts(unused, notes)}"]


def _most(counts: dict[str, int]) -> str:
    return min(counts, key=lambda name: (-counts[name], name))


def _counts(counts: dict[str, int] | Counter[str], notes: dict[str, str] | None = None) -> str:
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(most) - NAMED} more kinds" if len(most) > NAMED else ""
    named = (
        f"{name} ({count}{f', {notes[name]}' if notes and name in notes else ''})" for name, count in most
    )
    return ", ".join(islice(named, NAMED)) + more
