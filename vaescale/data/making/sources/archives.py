"""Zip and tar archives of folders, listed without unpacking: `ArchivePath` is a folder or a file in one, with the methods of
`pathlib.Path` that the sources use.

The names of members are used only to build keys and classes, never as paths on this machine.
"""

import bz2
import gzip
import lzma
import stat
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from vaescale.data.making.items import DEFLATED, STORED, STREAMED, Packed, Place, read_packed
from vaescale.data.making.sources.forward import Forward
from vaescale.data.pictures import PictureFault
from vaescale.data.pictures.foreign import known_as
from vaescale.data.tars import BLOCK, TarFault, members
from vaescale.errors import DataError
from vaescale.system.console import Progress, say

QUIET_SECONDS = 0.5  # what takes longer to list shows its progress
MOST_TEXT_BYTES = 1 << 26
ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
_OPENERS: tuple[tuple[bytes, Callable[[Path], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ", lzma.open),
)
_ZIP = b"PK\3\4"
MOST_DEPTH = 100  # of folders in each other
_UNSAFE = "have unsafe names; pack it again without them"
_ENCRYPTED = 1  # a flag of a file in a zip


class Archive:
    """The listing of an archive. children: for each folder by its path, the folders (None) and files in it, by name."""

    def __init__(self, path: Path, files: Iterable[Packed]) -> None:
        self.path = path
        self.children: dict[str, dict[str, Packed | None]] = {"": {}}
        self._twice = 0
        for packed in files:
            folder, _, name = packed.name.rpartition("/")
            self._add(folder, name, packed)
        if self._twice:
            say(f"{path}: {self._twice} names occur again; the last of each is read, as unpacking leaves it")

    @property
    def root(self) -> "ArchivePath":
        """The folder that holds everything."""
        return ArchivePath(self, "")

    def _add(self, folder: str, name: str, packed: Packed | None) -> None:
        if folder not in self.children:
            above, _, own = folder.rpartition("/")
            self._add(above, own, None)
            self.children[folder] = {}
        known = self.children[folder]
        self._twice += name in known
        if known.get(name, packed) is not None or packed is None:  # a folder stays one
            known[name] = packed


class ArchivePath:
    """A folder or a file in an archive. inner: its path in it, empty for the archive itself."""

    __slots__ = ("archive", "inner")

    def __init__(self, archive: Archive, inner: str) -> None:
        self.archive, self.inner = archive, inner

    @property
    def name(self) -> str:
        """The last part; of the archive itself, its file's name without the ending."""
        return self.inner.rpartition("/")[2] if self.inner else without_ending(self.archive.path.name)

    @property
    def suffix(self) -> str:
        """The ending of a file's name, with its dot."""
        name = self.name
        dot = name.rfind(".")
        return name[dot:] if self.inner and 0 < dot < len(name) - 1 else ""

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.name.removesuffix(self.suffix)

    @property
    def parents(self) -> "list[TreePath]":
        """The folders above, in the archive and then on this machine."""
        parts = self.inner.split("/")
        inside = [
            ArchivePath(self.archive, "/".join(parts[:count])) for count in range(len(parts) - 1, 0, -1)
        ]
        root = [self.archive.root] if self.inner else []
        return [*inside, *root, *self.archive.path.parents]

    @property
    def packed(self) -> Packed:
        """Where the bytes of a file are."""
        above, _, name = self.inner.rpartition("/")
        packed = self.archive.children[above][name]
        assert packed is not None
        return packed

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        return self.inner in self.archive.children

    def is_file(self) -> bool:
        """Whether it is a file."""
        above, _, name = self.inner.rpartition("/")
        return self.archive.children.get(above, {}).get(name) is not None

    def iterdir(self) -> "Iterator[ArchivePath]":
        """The files and folders in a folder."""
        for name in self.archive.children[self.inner]:
            yield self / name

    def glob(self, pattern: str) -> "Iterator[ArchivePath]":
        """The files and folders in a folder whose name fits."""
        return (each for each in self.iterdir() if fnmatch(each.name, pattern))

    def relative_to(self, other: "TreePath") -> PurePosixPath:
        """The path below a folder of the same archive."""
        return PurePosixPath(self.inner).relative_to(cast(ArchivePath, other).inner)

    def is_relative_to(self, other: "TreePath") -> bool:
        """Whether it is a folder of the same archive or below it."""
        if not isinstance(other, ArchivePath) or other.archive is not self.archive:
            return False
        return not other.inner or f"{self.inner}/".startswith(f"{other.inner}/")

    def read_text(self, *, errors: str = "strict") -> str:
        """The text of a small file. Raises DataError."""
        packed = self.packed
        try:
            if packed.size > MOST_TEXT_BYTES:
                raise PictureFault("pixels", f"it has {packed.size} bytes")
            with open_expanded(self.archive.path) as file:
                return read_packed(file, packed).decode(errors=errors)
        except (OSError, ValueError) as error:
            raise DataError(f"{self} cannot be read: {error}") from error

    def __truediv__(self, name: str) -> "ArchivePath":
        return ArchivePath(self.archive, f"{self.inner}/{name}" if self.inner else name)

    def __str__(self) -> str:
        return f"{self.archive.path}/{self.inner}" if self.inner else str(self.archive.path)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, ArchivePath) and other.archive is self.archive
        return same and cast(ArchivePath, other).inner == self.inner

    def __hash__(self) -> int:
        return hash((id(self.archive), self.inner))

    def __lt__(self, other: "ArchivePath") -> bool:
        return self.inner.split("/") < other.inner.split("/")


TreePath = Path | ArchivePath


def place_of(file: TreePath) -> Place | Packed:
    """Where the bytes of a file are."""
    return file.packed if isinstance(file, ArchivePath) else Place(file)


def is_archive(path: Path) -> bool:
    """Whether a file is named as an archive that is read."""
    return path.name.lower().endswith(ENDINGS)


def without_ending(name: str) -> str:
    """The name of an archive without `.zip`, `.tar.gz` and so on."""
    endings = sorted((ending for ending in ENDINGS if name.lower().endswith(ending)), key=len)
    return name[: -len(endings[-1])] if endings else name


def opened(path: Path) -> TreePath:
    """A folder, or the root of an archive. Raises DataError for another file and for an archive that is not sound."""
    if path.is_dir():
        return path
    if not is_archive(path):
        raise DataError(
            f"{path} is no folder and no {', '.join(ENDINGS)} archive; give the folder that holds the images"
        )
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return _listed(path, status.st_size, status.st_mtime_ns).root


def open_expanded(path: Path) -> IO[bytes]:
    """Open an archive to read its files; a compressed tar as what it expands to, forwards."""
    opener = _opener(path)
    return path.open("rb") if opener is None else cast(IO[bytes], Forward(opener(path)))


@lru_cache(maxsize=8)  # several questions are asked of one archive
def _listed(path: Path, _size: int, _changed: int) -> Archive:
    try:
        with path.open("rb") as file:
            head = file.read(BLOCK)
        if head.startswith(_ZIP) or zipfile.is_zipfile(path):
            return Archive(path, _zip_files(path))
        if (what := known_as(head)) and not head.startswith(tuple(magic for magic, _ in _OPENERS)):
            raise DataError(f"{path} is no archive: {what}; fetch it again")
        return _tar(path)
    except TarFault as error:
        raise DataError(f"{path}: {error}; fetch it again") from error
    except (OSError, EOFError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {why}; fetch it again") from error


def _opener(path: Path) -> Callable[[Path], Any] | None:
    """What opens a compressed file; None for others."""
    with path.open("rb") as file:
        start = file.read(6)
    return next((opener for magic, opener in _OPENERS if start.startswith(magic)), None)


def _tar(path: Path) -> Archive:
    compressed = _opener(path) is not None
    # The end of a compressed tar is where reading ends.
    stop, method = (1 << 62, STREAMED) if compressed else (None, None)
    files, links, unsafe = [], 0, list[str]()
    with (
        Progress(f"list {path}", 0, unit="files", quiet_seconds=QUIET_SECONDS) as progress,
        open_expanded(path) as file,
    ):
        for number, member in enumerate(members(file, stop=stop, with_links=True), start=1):
            links += member.is_link
            name = _clean(member.name)
            if not name:
                unsafe.append(member.name)
            elif not member.is_link:
                files.append(Packed(path, name, member.offset, member.bytes, member.bytes, method))
            progress.update(number)
    if unsafe:
        raise DataError(_refusal(path, unsafe, number, _UNSAFE))
    if links:
        say(
            f"{path}: {links} links are left out, which are not followed; `tar --dereference --hard-dereference` stores the files"
        )
    return Archive(path, files)


def _zip_files(path: Path) -> list[Packed]:
    infos = [info for info in _zip_list(path) if not info.is_dir()]
    links = [info for info in infos if stat.S_ISLNK(info.external_attr >> 16)]
    names = {info: _clean(info.filename) for info in infos}
    unread = {
        "are encrypted; unpack it with its password": [info for info in infos if info.flag_bits & _ENCRYPTED],
        _UNSAFE: [info for info in infos if not names[info]],
        "are compressed in a way that is not read; unpack it, or pack it again with deflate": [
            info for info in infos if info.compress_type not in (STORED, DEFLATED)
        ],
    }
    for what, which in unread.items():
        if which:
            raise DataError(_refusal(path, [info.filename for info in which], len(infos), what))
    if links:
        say(
            f"{path}: {len(links)} links are left out, which are not followed; `zip` without -y stores the files"
        )
    left_out = set(map(id, links))
    return [
        Packed(
            path,
            names[info],
            info.header_offset,
            info.compress_size,
            info.file_size,
            info.compress_type,
            info.CRC,
        )
        for info in infos
        if id(info) not in left_out
    ]


def _zip_list(path: Path) -> list[zipfile.ZipInfo]:
    """The list at the end of a zip, read in another thread so that its progress can be shown."""
    archive = zipfile.ZipFile.__new__(zipfile.ZipFile)
    faults: list[Exception] = []

    def read() -> None:
        try:
            archive.__init__(path)  # type: ignore[misc]
        except Exception as error:  # raised again below, in the thread that waits
            faults.append(error)

    thread = threading.Thread(target=read, daemon=True)
    with Progress(f"list {path}", 0, unit="files", quiet_seconds=QUIET_SECONDS) as progress:
        thread.start()
        while thread.is_alive():
            thread.join(QUIET_SECONDS + 0.01)
            progress.update(len(getattr(archive, "filelist", ())))
        progress.update(len(getattr(archive, "filelist", ())))
    if faults and not isinstance(faults[0], OSError):
        raise DataError(f"{path} is cut or is no zip ({faults[0]}); fetch it again") from faults[0]
    if faults:
        raise faults[0]
    with archive:
        return archive.infolist()


def _refusal(path: Path, names: list[str], number: int, what: str) -> str:
    return f"{path}: {len(names)} of {number} files, such as {names[0][:100]!r}, {what}"


def _clean(name: str) -> str:
    """The path of a member without `.`; empty for one that is not safe. Some programs write backslashes."""
    parts = [
        part
        for part in (name if "/" in name else name.replace("\\", "/")).split("/")
        if part not in ("", ".")
    ]
    unsafe = name.startswith("/") or ".." in parts or len(parts) > MOST_DEPTH
    unsafe |= any(ord(letter) < 32 for letter in name)
    return "" if unsafe else "/".join(parts)
