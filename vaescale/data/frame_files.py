"""Sequences whose frames are image files in a tar: KEY.000.png, KEY.001.png and so on, read as one part of the tar.

Such a sequence is one sample: its bytes go from the header of its first frame to the end of its last one. What else the tar holds
between them is passed over.
"""

import io
import re
import tarfile
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vaescale.data.pictures import Header, PictureFault, decode, read_header

FRAME = re.compile(r"(\d{1,6})\.(?:jpg|jpeg|png|webp|npy)")
"""The extension of a frame, with its number."""

_MAGIC, _MAGIC_AT = b"ustar", 257


def is_part_of_tar(content: bytes) -> bool:
    """Whether bytes begin with the header of a file in a tar."""
    return content[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC


def files_header(content: bytes) -> Header:
    """The header of a sequence from the headers of its frames. Raises PictureFault where they differ or cannot be used."""
    headers = [read_header(one) for one in _frames(content)]
    first = headers[0]
    for number, header in enumerate(headers):
        if header.shape != first.shape:
            shapes = ["x".join(map(str, one.shape)) for one in (header, first)]
            raise PictureFault("shape", f"frame {number} is {shapes[0]}, the first one {shapes[1]}")
    return Header("frames", *first.shape, frames=len(headers))


def frames_of_files(content: bytes) -> NDArray[np.uint8]:
    """The frames [T, C, H, W] of a sequence. Raises PictureFault."""
    frames = [decode(one) for one in _frames(content)]
    if len({frame.shape for frame in frames}) > 1:
        raise PictureFault("shape", "its frames are of several shapes")
    return np.stack(frames).transpose(0, 3, 1, 2)


def _frames(content: bytes) -> Iterator[bytes]:
    """The files of a sequence in order. The first one may have its name in a header before this part."""
    try:
        padding = bytes(
            -len(content) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE
        )  # of the last file, and the end
        tar = tarfile.TarFile(fileobj=io.BytesIO(content + padding), mode="r")
        first = True
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
            if first or FRAME.fullmatch(info.name.rpartition("/")[2].partition(".")[2].lower()):
                yield content[info.offset_data : info.offset_data + info.size]
            first = False
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, PictureFault):
            raise
        raise PictureFault("damaged", f"its part of the tar cannot be read ({error})") from error
