"""Strict reading of tars: a tar that ends early, in the middle of a file or without end-of-archive blocks, is a fault.

Python's tarfile, like webdataset on top of it, ends quietly at a damaged header and at a cut between two members.
"""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import IO, Any, NamedTuple

from vaescale.data.frame_files import FRAME

BLOCK = 512
LATENT_EXTENSIONS = ("moments.npy", "draws.npy", "moments.safetensors", "draws.safetensors", "codes.npy")
SEQUENCE_EXTENSIONS = ("frames.npy", "mp4")
FRAMES = "frames"  # in Roles: numbered frames
LEAST_FRAMES = 2
MOST_SEQUENCE_BYTES = 1 << 30  # of the files of a sequence
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "npy")
MOST_CLASS_BYTES = 1 << 20  # of a member that holds a class
MOST_CLASS_LETTERS = 200
NUMBER = re.compile(r"-1|[0-9]{1,9}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
# As webdataset splits names: the extension begins at the first dot of the last part.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


class TarFault(ValueError):
    """The fault of a tar: the message says why, member and offset where. key: of an unusable sample.

    reason: of an unusable sample: image, twice, order, missing, link or class.
    """

    def __init__(self, message: str, *, member: str, offset: int, key: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.member, self.offset, self.key, self.reason = member, offset, key, reason


class Member(NamedTuple):
    """A file in a tar: name, where its content begins, its bytes. is_link: a link, which has no content and is not followed."""

    name: str
    offset: int
    bytes: int
    is_link: bool = False


Group = tuple[str, list[tuple[str, Member]]]


class Roles(NamedTuple):
    """Which members of a sample are its image and its class.

    images: extensions, of which each sample has one, or FRAMES where it has numbered ones. label: `cls` or another extension; `json:FIELD`; `folder`, the one part of
    a key before its last slash, or `folder:ABOVE` for keys that begin with ABOVE; `none`. words: the number of each
    class where classes are words, None where they are numbers.
    """

    images: tuple[str, ...] = IMAGE_EXTENSIONS
    label: str = "cls"
    words: Mapping[str, int] | None = None

    @property
    def of_sequences(self) -> bool:
        """Whether samples are sequences of frames."""
        return set(self.images) <= {*SEQUENCE_EXTENSIONS, FRAMES}


USUAL = Roles()


class Sample(NamedTuple):
    """A sample of a WebDataset tar: its image's offset, content and crc32, and its class (-1: none)."""

    key: str
    offset: int
    content: bytes
    crc32: int
    label: int


def members(
    file: IO[bytes], *, start: int = 0, stop: int | None = None, with_links: bool = False
) -> Iterator[Member]:
    """Yield the regular files of the tar from byte `start` to `stop`, by default of the whole file.

    with_links: yield links too, which are a fault otherwise. Raises TarFault at the first fault.
    """
    file.seek(start)
    first = file.read(BLOCK)
    if not first:
        raise TarFault("it is empty", member="", offset=start)
    for magic, name in (
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
    ):
        if first.startswith(magic):
            raise TarFault(f"it is {name}, not a tar; unpack it first", member="", offset=start)
    file.seek(start)
    last = ""
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r")
        while (info := tar.next()) is not None:
            last = info.name
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
            if info.isdir():
                continue
            is_link = with_links and (info.issym() or info.islnk())
            _refuse_unsafe(info, is_link=is_link)
            yield Member(info.name, info.offset_data, 0 if is_link else info.size, is_link)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, TarFault):
            raise
        at = f"{last or 'its first header'}"
        raise TarFault(
            f"it is cut or corrupt after {at} ({error})", member=last, offset=file.tell()
        ) from error
    _check_end(file, tar.offset, last, stop)


def samples(
    file: IO[bytes], roles: Roles = USUAL, grouped: Iterable[Group] | None = None
) -> Iterator[Sample | TarFault]:
    """Yield the samples of a WebDataset tar in order, as webdataset groups them: consecutive members with one key.

    grouped: its `groups` where they are known, so that its headers are not read again.

    A sample that cannot be used is yielded as a fault; the fault of a repeated key makes the earlier sample void too. Raises
    TarFault when the tar itself is not sound. Only the image and the class are read; `.pkl` and similar members are
    never opened, and links are never followed.
    """
    seen: dict[str, tuple[str, ...]] = {}
    for key, group in groups(file) if grouped is None else grouped:
        yield _sample(file, key, group, seen, roles)


def groups(file: IO[bytes], listed: Iterable[Member] | None = None) -> Iterator[Group]:
    """Yield the key of each sample, and its members by extension, unread. listed: the tar's members. Raises TarFault."""
    group: list[tuple[str, Member]] = []
    group_key = ""
    for member in members(file, with_links=True) if listed is None else listed:
        key, extension = split_name(member.name)
        if key is None or _is_metadata(member.name):
            continue
        if group and key != group_key:
            yield group_key, group
            group = []
        group_key = key
        group.append((extension, member))
    if group:
        yield group_key, group


def class_of(file: IO[bytes], key: str, group: list[tuple[str, Member]], label: str) -> str | None:
    """The class of a sample as text, None where it has none. label: as in Roles. Raises ValueError with a phrase."""
    kind, _, inner = label.partition(":")
    if kind == "folder":
        return key.removeprefix(inner).rpartition("/")[0] or None
    member = next((member for extension, member in group if extension == kind), None)
    if member is None:
        return None
    if member.is_link:
        raise ValueError("is a link, which is not followed")
    if member.bytes > MOST_CLASS_BYTES:
        raise ValueError(f"has {member.bytes} bytes")
    content = _read(file, member)
    text = _field(content, inner) if inner else content.decode(errors="replace").strip()
    if text is not None and (len(text) > MOST_CLASS_LETTERS or not text.isprintable()):
        raise ValueError(f"{text[:20]!r} is no name of a class")
    return text


def _field(content: bytes, name: str) -> str | None:
    """A number or a word in a JSON object, as text; None where it is absent or null."""
    try:
        fields: Any = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("is no JSON") from None
    value = fields.get(name) if isinstance(fields, dict) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is not None and not isinstance(value, int | str):
        raise ValueError(f"is no number or word ({type(value).__name__})")
    return None if value is None else str(value).strip()


def split_name(name: str) -> tuple[str | None, str]:
    """Key and extension of a member, as webdataset splits them; no key for a name without an extension."""
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else (None, "")


def _sample(
    file: IO[bytes],
    key: str,
    group: list[tuple[str, Member]],
    seen: dict[str, tuple[str, ...]],
    roles: Roles,
) -> Sample | TarFault:
    first = group[0][1]

    def fault(reason: str, message: str) -> TarFault:
        return TarFault(
            f"key {key!r} {message}", member=first.name, offset=first.offset, key=key, reason=reason
        )

    extensions = tuple(extension for extension, _ in group)
    before = seen.setdefault(key, extensions)
    if before is not extensions and not set(before) & set(extensions):
        return fault("order", "occurs again after another key, so that its members do not follow each other")
    if before is not extensions or len(set(extensions)) != len(extensions):
        return fault("twice", "occurs twice in it")
    if roles.images == (FRAMES,):
        try:
            images = [_part_of(_in_order(group))]
        except TarFault as error:
            return fault(error.reason, str(error))
    else:
        images = [member for extension, member in group if extension in roles.images]
    if len(images) != 1:
        known, dots = ", ".join(roles.images), ""
        if not images and any("." in extension for extension in extensions):
            dots = "; names are split at the first dot, as webdataset does"
        return fault(
            "image", f"has {len(images)} images ({known}) among {', '.join(extensions)}, not one{dots}"
        )
    if images[0].is_link:
        return fault("link", f"is a link ({images[0].name}), which is not followed")
    try:
        text = class_of(file, key, group, roles.label)
    except ValueError as error:
        return fault("class", f"has no usable class ({roles.label}): it {error}")
    label = -1
    if text is not None and roles.words is not None:
        if text not in roles.words:
            return fault("class", f"has class {text[:20]!r}, not one of the {len(roles.words)} classes")
        label = roles.words[text]
    elif text is not None:
        if not NUMBER.fullmatch(text):
            return fault("class", f"has class {text[:20]!r}, not a number from 0, or -1")
        label = int(text)
    content = _read(file, images[0])
    return Sample(key, images[0].offset, content, zlib.crc32(content), label)


def _in_order(group: list[tuple[str, Member]]) -> list[Member]:
    """The frames of a sample, whose numbers follow each other. Raises TarFault with a phrase and a reason."""
    frames = [(int(match[1]), member) for ext, member in group if (match := FRAME.fullmatch(ext))]
    for (before, _), (number, member) in pairwise(frames):
        if number <= before:
            raise _phrase("order", f"has frame {number} after frame {before} ({member.name})")
        if number > before + 1:
            missing = (
                f"frame {before + 1}" if number == before + 2 else f"frames {before + 1} to {number - 1}"
            )
            raise _phrase("missing", f"misses {missing} of {frames[0][0]} to {frames[-1][0]}")
    if len(frames) < LEAST_FRAMES:
        raise _phrase(
            "image",
            f"has {len(frames)} numbered frames, such as KEY.000.png, {LEAST_FRAMES} at least are needed",
        )
    if links := [member for _, member in frames if member.is_link]:
        raise _phrase("link", f"is a link ({links[0].name}), which is not followed")
    return [member for _, member in frames]


def _part_of(frames: list[Member]) -> Member:
    """The part of a tar from the header of the first frame to the end of the last one."""
    start = frames[0].offset - BLOCK
    size = frames[-1].offset + frames[-1].bytes - start
    if size > MOST_SEQUENCE_BYTES:
        raise _phrase("image", f"has frames of {size} bytes, more than {MOST_SEQUENCE_BYTES}")
    return Member(frames[0].name, start, size)


def _phrase(reason: str, words: str) -> TarFault:
    return TarFault(words, member="", offset=0, reason=reason)


def _read(file: IO[bytes], member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.bytes)


def _is_metadata(name: str) -> bool:
    """Whether a member is metadata: macOS adds `._NAME` beside every file, webdataset `__NAME__` members."""
    last = name.rpartition("/")[2]
    return last.startswith("._") or (last.startswith("__") and last.endswith("__"))


def _refuse_unsafe(info: tarfile.TarInfo, *, is_link: bool) -> None:
    where = {"member": info.name, "offset": info.offset}
    if not is_link and (not info.isreg() or info.issparse()):
        raise TarFault(f"member {info.name!r} is not a plain file (a link, a device or sparse)", **where)  # type: ignore[arg-type]
    if info.name.startswith("/") or ".." in info.name.split("/") or _CONTROL.search(info.name):
        raise TarFault(f"member {info.name!r} has an unsafe name", **where)  # type: ignore[arg-type]


def _check_end(file: IO[bytes], offset: int, last: str, stop: int | None) -> None:
    """Check that two blocks of zeros follow the last member; otherwise the tar is cut, or a header is corrupt."""
    file.seek(offset)
    end = file.read(2 * BLOCK)
    stop = file.seek(0, os.SEEK_END) if stop is None else stop
    file.seek(offset + len(end))
    while not any(end) and (more := file.read(min(1 << 20, max(0, stop - file.tell())))):
        # Zeros in the place of a header end a tar for every reader; what follows them would be lost.
        if any(more):
            raise TarFault(
                f"zeros at byte {offset} end it, but more follows: it is damaged, or several tars in one",
                member=last,
                offset=offset,
            )
    if any(end) and len(end) < BLOCK:
        raise TarFault(f"it is cut in the header at byte {offset}", member=last, offset=offset)
    if any(end):
        raise TarFault(f"the header at byte {offset} is corrupt", member=last, offset=offset)
    if len(end) < 2 * BLOCK:
        raise TarFault(
            f"it ends at byte {offset + len(end)} without end-of-archive blocks: it was cut",
            member=last,
            offset=offset,
        )
