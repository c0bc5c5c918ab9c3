"""Sequences in MP4 files, decoded and encoded by PyAV (FFmpeg) where it is installed: pip install vaescale[video].

The codec is inexact, and FFmpeg's conversion of colours may differ in the last bit between its versions and processors: sequences that
must be equal everywhere are written as arrays (`vaescale make-shards frames:DIR OUT`).
"""

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale.data.config import MOST_FRAMES
from vaescale.data.pictures import MAX_PIXELS, Header, PictureFault

CHANNELS = 3
CODEC, QUALITY = "libx264", "12"  # of x264's 0 (exact) to 51


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


def encoded(frames: NDArray[np.uint8], *, milliseconds: int) -> bytes | None:
    """An MP4 (H.264) of frames [T, H, W, 3]; None where PyAV, or its encoder, is missing.

    H.264 with colours at half of the resolution, as every player reads it, needs even sides: a white column or row is added on the right or
    below. milliseconds: the time of a frame.
    """
    try:
        import av

        codec = av.Codec(CODEC, "w")
    except (ImportError, ValueError):  # PyAV's error for an unknown codec is a ValueError
        return None
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), constant_values=255)
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec.name, rate=Fraction(1000, milliseconds))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": QUALITY}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return content.getvalue()


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
