"""Strict reading of tars: a tar that ends early, in the middle of a file or without end-of-archive blocks, is a fault.

Python's tarfile, like webdataset on top of it, ends quietly at a damaged header and at a cut between two members.
"""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, NamedTuple

BLOCK = 512
LATENT_EXTENSIONS = ("moments.npy", "draws.npy")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "npy")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
# As webdataset splits names: the extension begins at the first dot of the last part.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


class TarFault(ValueError):
    """The fault of a tar: the message is the reason, member and offset its position. key: of an unusable sample."""

    def __init__(self, message: str, *, member: str, offset: int, key: str = "") -> None:
        super().__init__(message)
        self.member, self.offset, self.key = member, offset, key


class Member(NamedTuple):
    """A file in a tar: name, where its content begins, its bytes."""

    name: str
    offset: int
    bytes: int


class Sample(NamedTuple):
    """A sample of a WebDataset tar: its image's offset, content and crc32, and its class (-1: none)."""

    key: str
    offset: int
    content: bytes
    crc32: int
    label: int


def members(file: IO[bytes], *, start: int = 0, stop: int | None = None) -> Iterator[Member]:
    """Yield the regular files of the tar from byte `start` to `stop`, by default of the whole file.

    Raises TarFault at the first fault.
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
            _refuse_unsafe(info)
            yield Member(info.name, info.offset_data, info.size)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, TarFault):
            raise
        at = f"{last or 'its first header'}"
        raise TarFault(
            f"it is cut or corrupt after {at} ({error})", member=last, offset=file.tell()
        ) from error
    _check_end(file, tar.offset, last, stop)


def samples(file: IO[bytes], extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> Iterator[Sample | TarFault]:
    """Yield the samples of a WebDataset tar in order, as webdataset groups them: consecutive members with one key.

    extensions: of the member that holds a sample's content. A sample that cannot be used is yielded as a fault; the fault of a
    repeated key makes the earlier sample void too. Raises TarFault when the tar itself is not sound. Only that member and the
    class are read; `.pkl` and similar members are never opened.
    """
    group: list[tuple[str, Member]] = []
    group_key = ""
    seen: set[str] = set()
    for member in members(file):
        key, extension = split_name(member.name)
        if key is None or _is_metadata(member.name):
            continue
        if group and key != group_key:
            yield _sample(file, group_key, group, seen, extensions)
            group = []
        group_key = key
        group.append((extension, member))
    if group:
        yield _sample(file, group_key, group, seen, extensions)


def split_name(name: str) -> tuple[str | None, str]:
    """Key and extension of a member, as webdataset splits them; no key for a name without an extension."""
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else (None, "")


def _sample(
    file: IO[bytes], key: str, group: list[tuple[str, Member]], seen: set[str], wanted: tuple[str, ...]
) -> Sample | TarFault:
    first = group[0][1]

    def fault(message: str) -> TarFault:
        return TarFault(message, member=first.name, offset=first.offset, key=key)

    extensions = [extension for extension, _ in group]
    if key in seen or len(set(extensions)) != len(extensions):
        return fault(f"key {key!r} occurs twice in it")
    seen.add(key)
    images = [member for extension, member in group if extension in wanted]
    if len(images) != 1:
        known = ", ".join(wanted)
        return fault(f"key {key!r} has {len(images)} images ({known}) among {', '.join(extensions)}, not one")
    label = -1
    for extension, member in group:
        if extension == "cls":
            text = _read(file, member).strip()
            if not re.fullmatch(rb"-1|[0-9]{1,9}", text):
                return fault(
                    f"key {key!r} has class {text[:20].decode(errors='replace')!r}, not a number from 0, or -1"
                )
            label = int(text)
    content = _read(file, images[0])
    return Sample(key, images[0].offset, content, zlib.crc32(content), label)


def _read(file: IO[bytes], member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.bytes)


def _is_metadata(name: str) -> bool:
    """Whether a member is metadata: macOS adds `._NAME` beside every file, webdataset `__NAME__` members."""
    last = name.rpartition("/")[2]
    return last.startswith("._") or (last.startswith("__") and last.endswith("__"))


def _refuse_unsafe(info: tarfile.TarInfo) -> None:
    where = {"member": info.name, "offset": info.offset}
    if not info.isreg() or info.issparse():
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
