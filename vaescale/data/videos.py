"""Sequences in MP4 files, decoded by PyAV (FFmpeg) where it is installed: pip install vaescale[video].

The codec is inexact, and FFmpeg's conversion of colours may differ in the last bit between its versions and processors: sequences that
must be equal everywhere are written as arrays (`vaescale make-shards frames:DIR OUT`).
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale.data.config import MOST_FRAMES
from vaescale.data.pictures import MAX_PIXELS, Header, PictureFault

CHANNELS = 3


def is_video(content: bytes) -> bool:
    """Whether bytes begin as MP4 files do."""
    return content[4:8] == b"ftyp"


def require_decoder() -> None:
    """Raise ModuleNotFoundError, of which a verb says how to install the package, where PyAV is missing."""
    import av  # noqa: F401


def video_header(content: bytes, *, most_bytes: int) -> Header:
    """The header of a video. Its frames are decoded to be counted: what a file states of them may be wrong. Raises PictureFault."""
    number, height, width = 0, 0, 0
    for number, frame in enumerate(_decoded(content, most_bytes), start=1):  # noqa: B007
        height, width = frame.height, frame.width
    return Header("mp4", height, width, CHANNELS, frames=number)


def frames_of_video(content: bytes, *, most_bytes: int) -> NDArray[np.uint8]:
    """The frames [T, 3, H, W] of a video. most_bytes: of all of them. Raises PictureFault."""
    frames = [frame.to_ndarray(format="rgb24") for frame in _decoded(content, most_bytes)]
    return np.stack(frames).transpose(0, 3, 1, 2)


def _decoded(content: bytes, most_bytes: int) -> Iterator[Any]:
    """The frames of a video as PyAV has them, one at least and all of one size."""
    import av

    number, size = 0, None
    try:
        with av.open(io.BytesIO(content), format="mp4") as container:
            for number, frame in enumerate(container.decode(video=0), start=1):
                size = size or (frame.height, frame.width)
                if (frame.height, frame.width) != size:
                    raise PictureFault("shape", f"frame {number - 1} has another size than the first one")
                pixels = frame.height * frame.width
                if number > MOST_FRAMES or pixels > MAX_PIXELS or number * pixels * CHANNELS > most_bytes:
                    raise PictureFault(
                        "pixels", f"its frames exceed {MOST_FRAMES} in number or {most_bytes} bytes"
                    )
                yield frame
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        if isinstance(error, PictureFault):
            raise
        raise PictureFault("damaged", f"its video cannot be decoded ({error})") from error
    if not number:
        raise PictureFault("damaged", "its video has no frames")
