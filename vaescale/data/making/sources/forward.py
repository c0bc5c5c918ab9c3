"""Compressed tars, read once from the beginning to the end: a file object that goes back only a little, and a stream of items."""

import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np

from vaescale.data.making.items import MOST_FILE_BYTES, Item, Packed
from vaescale.errors import DataError

HISTORY_BYTES = 1 << 20
MOST_READ_BYTES = MOST_FILE_BYTES  # at once, whatever a header says
MIXED_BYTES = 1 << 28  # of images in a stream that are mixed with each other


class Forward(io.RawIOBase):
    """What a compressed file expands to. It can be sought forwards, and HISTORY_BYTES back, which tars need.

    Raises EOFError where the compressed file is cut, and OSError where it is damaged.
    """

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._history = b""  # the last bytes before `_end`
        self._end = self._at = 0

    def tell(self) -> int:
        """The position in what the file expands to."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to an absolute position. Nothing is read before it is needed."""
        assert whence == 0, "its end is not known"
        if offset < self._end - len(self._history):
            raise OSError("it can be read forwards only")
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        """Read up to so many bytes; fewer only at the end."""
        assert size >= 0, "its size is not known"
        if size > MOST_READ_BYTES:
            raise OSError(f"a header of {size} bytes")
        while self._end < self._at and self._more(min(HISTORY_BYTES, self._at - self._end)):
            pass
        start = self._at - (self._end - len(self._history))
        pieces = [self._history[start : start + size]] if start <= len(self._history) else []
        wanted = size - sum(map(len, pieces))
        while wanted > 0 and (piece := self._more(min(HISTORY_BYTES, wanted))):
            pieces.append(piece)
            wanted -= len(piece)
        content = b"".join(pieces)
        self._at += len(content)
        return content

    def close(self) -> None:
        """Close the file below."""
        self._raw.close()
        super().close()

    def _more(self, size: int) -> bytes:
        try:
            piece: bytes = self._raw.read(size)
        except (zlib.error, lzma.LZMAError) as error:
            raise OSError(f"it does not expand ({error})") from error
        self._end += len(piece)
        self._history = (self._history + piece)[-HISTORY_BYTES:]
        return piece


class Streamed:
    """The items of a compressed tar, read in one pass. listed: the items, with the place of each.

    Images are mixed in a fixed order within blocks of MIXED_BYTES: tars are sorted by class.
    """

    def __init__(self, listed: list[Item], opened: Callable[[], IO[bytes]]) -> None:
        self.listed, self.opened = listed, opened

    def __iter__(self) -> Iterator[Item]:
        block: list[Item] = []
        held = 0
        with self.opened() as file:
            for item in sorted(self.listed, key=_offset):
                packed = item.content
                assert isinstance(packed, Packed)
                if packed.size > MOST_FILE_BYTES:
                    yield item  # it is refused when it is opened
                    continue
                block.append(item._replace(content=_read(file, packed)))
                held += packed.size
                if held >= MIXED_BYTES:
                    yield from _mixed(block)
                    block, held = [], 0
        yield from _mixed(block)


def _read(file: IO[bytes], packed: Packed) -> bytes:
    try:
        file.seek(packed.offset)
        content = file.read(packed.size)
    except (OSError, EOFError) as error:
        raise DataError(
            f"{packed.path} cannot be read up to {packed.name} ({error}); fetch it again"
        ) from error
    if len(content) < packed.size:
        raise DataError(f"{packed.path} ends before {packed.name}; fetch it again")
    return content


def _offset(item: Item) -> int:
    return item.content.offset if isinstance(item.content, Packed) else 0


def _mixed(items: list[Item]) -> list[Item]:
    order = np.random.Generator(np.random.Philox(key=len(items))).permutation(len(items))
    return [items[i] for i in order.tolist()]
