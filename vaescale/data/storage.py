"""Storage of a data set's files: a folder, or any fsspec URL behind a node-local cache.

The cache is shared by all processes of a node. Each file is fetched once, under a lock of its own; what arrives is
checked by size and sha256 before it gets its name. Its key is the file's whole URL with its sha256, so two sets never
share a file. The cache is bounded in bytes: before a fetch, the files used longest ago are removed to make room. Files are
opened for each read and closed again, so that an evicted file frees its space.
"""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import quote

from filelock import FileLock, Timeout

from vaescale.errors import DataError
from vaescale.system.caches import cache_home
from vaescale.system.console import say
from vaescale.system.secrets import is_redacted

T = TypeVar("T")
CHUNK = 1 << 20
TOUCH_EVERY_SECONDS = 5.0
MOST_INDEX_BYTES = 1 << 30
WORST_PAUSE_SECONDS = 30.0
LEAST_RATE = 1024  # bytes a second, below which a fetch counts as a fault
STRANGE_ARRIVALS = 3  # fetches with a wrong hash, after which the file counts as replaced


class Folder:
    """A data set in a local folder. tars: another folder that holds its tars, as for an index of a read-only one."""

    def __init__(self, place: str, tars: str = "") -> None:
        self.place = place
        self._path = Path(place).expanduser()
        self._tars = Path(tars) if tars else self._path

    def read_index(self, name: str) -> bytes:
        """Read the index's bytes. Raises DataError with a remedy when there is no index."""
        path = self._path / name
        if not self._path.exists():
            raise DataError(
                f"data folder {self.place} does not exist in {Path.cwd()}; `vaescale make-shards SOURCE OUT` writes "
                f"OUT/train, OUT/val, and OUT/test where the source has one"
            )
        if not self._path.is_dir():
            raise DataError(f"data folder {self.place} is a file; name the folder that holds its {name}")
        if path.is_file():
            return path.read_bytes()
        if inner := sorted(str(other.parent) for other in self._path.glob(f"*/{name}")):
            raise DataError(f"{self.place} holds no shards itself; did you mean {' or '.join(inner)}?")
        if any(self._path.glob("*.tar")):
            raise DataError(
                f"{self.place} holds tars without {name}; `vaescale make-shards --index-only {self.place}` indexes them"
            )
        raise DataError(
            f"{self.place} has no {name}; write the shards with `vaescale make-shards SOURCE OUT`"
        )

    def check(self, name: str, size: int) -> None:
        """Raise DataError when a file is missing or has another size."""
        path = self.local(name, size, "")
        try:
            actual = path.stat().st_size
        except OSError:
            if not self._tars.is_dir():
                raise DataError(
                    f"{self._tars}, which the index {self.place} names as the folder of its tars, is not there; mount it, or index "
                    f"the tars again with `vaescale make-shards --index-only DIR --index-dir {self.place}`"
                ) from None
            raise DataError(f"shard {path} is missing; write the shards again or copy it back") from None
        if actual != size:
            raise DataError(
                f"shard {path} has {actual} bytes, its index says {size}; copy it again, or index it again"
            )

    def local(self, name: str, size: int, sha256: str) -> Path:  # noqa: ARG002  # as Remote.local
        """The path of a file, which is not checked here."""
        return (self._tars if name.endswith(".tar") else self._path) / name


class Remote:
    """A data set behind a URL, cached on this node. All waiting is bounded by `retry_seconds` without progress."""

    def __init__(self, place: str, *, cache: Path, cache_bytes: int, retry_seconds: float) -> None:
        self.place = place.rstrip("/")
        self.cache_bytes = cache_bytes
        self._cache, self._retry_seconds = cache, retry_seconds
        self._touched: dict[Path, float] = {}
        self.closed = False  # once set, fetches under way give up at their next fault
        protocol = place.partition("://")[0]
        try:
            from fsspec import get_filesystem_class

            get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise DataError(f"{place} cannot be opened: {error}") from error

    def read_index(self, name: str) -> bytes:
        """Fetch the index's bytes. Raises DataError when the server does not have it or does not answer."""
        url = f"{self.place}/{name}"

        def fetch() -> bytes:
            with _open(url) as file:
                content = file.read(MOST_INDEX_BYTES + 1)
            if len(content) > MOST_INDEX_BYTES:
                raise DataError(f"{url} is larger than {MOST_INDEX_BYTES} bytes; it is not an index")
            return bytes(content)

        return _Patience(self, url, self._retry_seconds).call(fetch)

    def check(self, name: str, size: int) -> None:
        """Do nothing: a remote file is checked when it arrives."""

    def local(self, name: str, size: int, sha256: str) -> Path:
        """The path of a file in the cache, fetched if the cache does not have it. It may be evicted at any time.

        Raises DataError when it cannot be fetched, or is not the file that the index names.
        """
        url, path = self._url(name), self._path(name, sha256)
        if self._is_there(path, size):
            return path
        try:
            self._cache.mkdir(parents=True, exist_ok=True)
            with self._held(path, url):
                self._fill(url, path, size, sha256)
        except OSError as error:
            raise DataError(
                f"the cache {self._cache} cannot be written ({error.strerror}); set data.cache_dir to another folder"
            ) from error
        return path

    def forget(self, name: str, sha256: str) -> None:
        """Remove a file from the cache, because it has changed since it arrived."""
        with suppress(OSError):
            self._path(name, sha256).unlink()

    def _path(self, name: str, sha256: str) -> Path:
        return self._cache / hashlib.sha256(f"{self._url(name)} {sha256}".encode()).hexdigest()

    def _url(self, name: str) -> str:
        is_http = self.place.startswith(("http://", "https://"))
        return f"{self.place}/{quote(name) if is_http else name}"

    def _is_there(self, path: Path, size: int) -> bool:
        try:
            if path.stat().st_size != size:
                return False
            now = time.monotonic()
            if now - self._touched.get(path, -TOUCH_EVERY_SECONDS) >= TOUCH_EVERY_SECONDS:
                os.utime(path)
                self._touched[path] = now
        except OSError:
            return False
        return True

    @contextmanager
    def _held(self, path: Path, url: str) -> Iterator[None]:
        """Hold a file's lock within the block. Another process may hold it as long as it makes progress."""
        lock = FileLock(path.with_suffix(".lock"))
        partial = path.with_suffix(".part")
        seen, since = -1.0, time.monotonic()
        while True:
            try:
                lock.acquire(timeout=1.0)
                break
            except Timeout:
                with suppress(OSError):
                    if partial.stat().st_mtime != seen:
                        seen, since = partial.stat().st_mtime, time.monotonic()
                if time.monotonic() - since > self._retry_seconds + WORST_PAUSE_SECONDS:
                    raise DataError(
                        f"{url}: the process that fetches it makes no progress; try again"
                    ) from None
        try:
            yield
        finally:
            lock.release()

    def _fill(self, url: str, path: Path, size: int, sha256: str) -> None:
        """Fetch a file, unless another process has fetched it meanwhile."""
        if self._is_there(path, size):
            return
        try:
            self._make_room(path, size)
            _Patience(self, url, self._retry_seconds).call(lambda: self._fetch(url, path, size, sha256))
        finally:
            path.with_suffix(".part").unlink(missing_ok=True)

    def _make_room(self, path: Path, size: int) -> None:
        """Evict until `size` bytes fit, and reserve them with a file of that size. Raises DataError when they cannot."""
        partial = path.with_suffix(".part")
        partial.unlink(missing_ok=True)  # left by a process that was killed
        since = time.monotonic()
        while True:
            with FileLock(self._cache / "lock"):
                if self._evict(size):
                    with partial.open("wb") as file:
                        file.truncate(size)
                    return
            # Fetches under way hold the remaining bytes, until they end or give up.
            if size > self.cache_bytes or self.closed or time.monotonic() - since > self._retry_seconds:
                raise DataError(
                    f"data.cache_bytes (={self.cache_bytes}) has no room for a shard of {size} bytes beside those "
                    f"under way; raise it"
                )
            time.sleep(0.2)

    def _evict(self, size: int) -> bool:
        """Remove what was used longest ago until `size` bytes fit. Returns whether they do."""
        files, total = [], 0
        for entry in os.scandir(self._cache):
            if entry.name.endswith(".lock") or entry.name == "lock":
                continue
            with suppress(OSError):
                status = entry.stat()
                total += status.st_size
                files.append((status.st_mtime, status.st_size, Path(entry.path)))
        for _, num_bytes, other in sorted(files):
            if total + size <= self.cache_bytes:
                break
            if other.suffix == ".part" and not _abandoned(other):
                continue
            other.unlink(missing_ok=True)
            total -= num_bytes
        return total + size <= self.cache_bytes

    def _fetch(self, url: str, path: Path, size: int, sha256: str) -> None:
        partial, digest, arrived = path.with_suffix(".part"), hashlib.sha256(), 0
        start = time.monotonic()
        with _open(url) as source, partial.open("r+b") as target:
            while arrived <= size and (chunk := source.read(min(CHUNK, size + 1 - arrived))):
                digest.update(chunk)
                target.write(chunk[: size - arrived])
                arrived += len(chunk)
                seconds = time.monotonic() - start
                if self.closed or (seconds > self._retry_seconds and arrived < LEAST_RATE * seconds):
                    raise TimeoutError(f"{arrived} bytes in {seconds:.0f} s")
            target.flush()
            os.fsync(target.fileno())
        if arrived < size:
            raise ConnectionError(f"{arrived} of {size} bytes arrived")
        if arrived > size or digest.hexdigest() != sha256:
            raise _StrangeArrivalError("other content than its index says")
        partial.replace(path)


def open_store(
    place: str, *, cache: str | None = None, cache_bytes: int = 1 << 37, retry_seconds: float = 300.0
) -> Folder | Remote:
    """The folder or URL at `place`. cache: the node's cache folder, by default below ~/.cache.

    Raises DataError for what is neither, a shell pipe in particular.
    """
    if place.startswith("pipe:") or "::" in place:
        raise DataError(f"{place!r} is not a folder or a plain URL; pipes and chained URLs are never opened")
    if is_redacted(place):
        raise DataError(
            f"{place} had credentials, which run folders do not keep; name it without them and give them through the "
            f"environment, as AWS_ACCESS_KEY_ID or ~/.netrc"
        )
    if "://" not in place.removeprefix("file://"):
        return Folder(place.removeprefix("file://"))
    folder = Path(cache).expanduser() if cache else cache_home() / "vaescale" / "shards"
    return Remote(place, cache=folder, cache_bytes=cache_bytes, retry_seconds=retry_seconds)


def with_tars(store: Folder | Remote, tars: str) -> Folder | Remote:
    """The store whose tars are in the folder `tars`, which an index names. Raises DataError for an index behind a URL."""
    if not tars:
        return store
    if isinstance(store, Remote):
        raise DataError(
            f"the index at {store.place} names tars in a folder ({tars}); only an index in a folder of this machine may do so"
        )
    return Folder(store.place, tars)


class _StrangeArrivalError(Exception):
    """A fetched file that is not the one that the index names."""


class _Patience:
    """Repeated calls with growing pauses, until one works or `seconds` have passed since the first fault."""

    def __init__(self, store: Remote, url: str, seconds: float) -> None:
        self._store, self._url, self._seconds = store, url, seconds

    def call(self, fetch: Callable[[], T]) -> T:
        """Return what `fetch` returns. Raises DataError at once where waiting cannot help."""
        since, pause, strange = 0.0, 0.5, 0
        while True:
            try:
                fetched = fetch()
                if since:
                    say(f"{self._url} answers again after {time.monotonic() - since:.0f} s")
                return fetched
            except DataError:
                raise
            except Exception as error:  # every protocol of fsspec raises kinds of its own
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if hopeless := _hopeless(error):
                    raise DataError(f"{self._url} {hopeless}") from error
                root = _chain(error)[-1]  # fsspec says FileNotFoundError of a server that does not answer
                reason = " ".join(f"{type(root).__name__}: {root}".split())[:200]
                strange += isinstance(error, _StrangeArrivalError)
                if strange >= STRANGE_ARRIVALS:
                    raise DataError(
                        f"{self._url} has {error}; upload data and index together again"
                    ) from error
                now = time.monotonic()
                if not since:
                    since = now
                    say(f"waiting for {self._url} ({reason}), up to {self._seconds:.0f} s")
                elif now - since > self._seconds or self._store.closed:
                    raise DataError(
                        f"{self._url} could not be fetched in {self._seconds:.0f} s ({reason}); repeat the command when it is back"
                    ) from error
            until = time.monotonic() + min(pause, self._seconds / 4, WORST_PAUSE_SECONDS)
            while time.monotonic() < until and not self._store.closed:
                time.sleep(0.1)
            pause *= 2


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and its causes."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _hopeless(error: Exception) -> str:
    """The reason why waiting cannot help, or "". fsspec also says "not found" of a server that does not answer."""
    chain = _chain(error)
    statuses = {status for link in chain if isinstance(status := getattr(link, "status", None), int)}
    if statuses & {401, 403} or isinstance(error, PermissionError):
        return "may not be read; check the credentials"
    if statuses & {404, 410}:
        return "does not exist; check the address"
    unreachable = any(
        "Connect" in type(link).__name__ or isinstance(link, ConnectionError | TimeoutError) for link in chain
    )
    if isinstance(error, FileNotFoundError) and not statuses and not unreachable:
        return "does not exist; check the address"
    return ""


def _open(url: str) -> IO[bytes]:
    """Open the URL as a file, with a file system of this process: fsspec's connections do not survive a fork."""
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        # Timeouts for a server that accepts and then sends nothing. A block size of 0 reads the file as a stream, from its
        # beginning to its end: not every server can do more.
        options["block_size"] = 0
        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    file: IO[bytes] = fsspec.open(url, "rb", **options).open()
    return file


def _abandoned(partial: Path) -> bool:
    """Whether the process that fetched a partial file has ended."""
    try:
        with FileLock(partial.with_suffix(".lock"), timeout=0):
            return True
    except Timeout:
        return False
