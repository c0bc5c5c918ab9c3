"""Sequences whose frames are image files in a tar: KEY.000.png, KEY.001.png and so on, read as one part of the tar.

Such a sequence is one sample: its bytes go from the header of its first frame to the end of its last one. What else the tar holds
between them is passed over.
"""

import io
import math
import re
import tarfile
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vaescale.data.config import MOST_FRAMES
from vaescale.data.pictures import Header, PictureFault, decode, read_header

FRAME = re.compile(r"(\d{1,6})\.(?:jpg|jpeg|png|webp|npy)")
"""The extension of a frame, with its number."""

_MAGIC, _MAGIC_AT = b"ustar", 257


def is_part_of_tar(content: bytes) -> bool:
    """Whether bytes begin with the header of a file in a tar."""
    return content[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC


def files_header(content: bytes, *, most_bytes: int) -> Header:
    """The header of a sequence from the headers of its frames. Raises PictureFault where they differ or cannot be used."""
    return _together(files_of(content), most_bytes)


def decoded_files(files: Sequence[bytes], *, most_bytes: int) -> NDArray[np.uint8]:
    """The frames [T, C, H, W] of image files of one shape. most_bytes: of all of them. Raises PictureFault."""
    header = _together(files, most_bytes)
    frames = np.empty((header.frames, header.channels, header.height, header.width), np.uint8)
    for frame, content in zip(frames, files, strict=True):
        frame[:] = decode(content).transpose(2, 0, 1)
    return frames


def _together(files: Sequence[bytes], most_bytes: int) -> Header:
    """The header of a sequence of these files. Nothing is expanded, so that little files cannot fill the memory."""
    headers = [read_header(content) for content in files]
    if not headers:
        raise PictureFault("damaged", "it has no frames")
    first = headers[0]
    for number, header in enumerate(headers):
        if header.shape != first.shape:
            shapes = ["x".join(map(str, one.shape)) for one in (header, first)]
            raise PictureFault("shape", f"frame {number} is {shapes[0]}, the first one {shapes[1]}")
    if len(headers) > MOST_FRAMES or len(headers) * math.prod(first.shape) > most_bytes:
        raise PictureFault("pixels", f"its frames exceed {MOST_FRAMES} in number or {most_bytes} bytes")
    return Header("frames", *first.shape, frames=len(headers))


def files_of(content: bytes) -> list[bytes]:
    """The files of a sequence in order, undecoded. Raises PictureFault.

    The first one is a frame whatever its name: a long name is in a header before this part.
    """
    files = []
    try:
        padding = bytes(
            -len(content) % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE
        )  # of the last file, and the end
        tar = tarfile.TarFile(fileobj=io.BytesIO(content + padding), mode="r")
        first = True
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
            if first or FRAME.fullmatch(info.name.rpartition("/")[2].partition(".")[2].lower()):
                files.append(content[info.offset_data : info.offset_data + info.size])
            first = False
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise PictureFault("damaged", f"its part of the tar cannot be read ({error})") from error
    return files
