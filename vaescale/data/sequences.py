"""Sequences of frames as WebDataset shards: KEY.frames.npy, uint8 [T, C, H, W], and, where there is a class, KEY.cls.

In tars made by others also KEY.000.png, KEY.001.png and so on (`frame_files.py`), and KEY.mp4 (`videos.py`); the first bytes of a
sample decide. index.json's `made` has the number of sequences by length, `lengths`; the entries have each sequence's own. Imports no torch.
"""

import io
import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale.data.config import MOST_CHANNELS, MOST_FRAMES
from vaescale.data.frame_files import decoded_files, files_header, files_of, is_part_of_tar
from vaescale.data.index import SEQUENCES, ShardIndex
from vaescale.data.pictures import Header, PictureFault
from vaescale.data.tars import MOST_SEQUENCE_BYTES, SEQUENCE_EXTENSIONS
from vaescale.data.videos import frames_of_video, is_video, video_header
from vaescale.errors import DataError

EXTENSION = SEQUENCE_EXTENSIONS[0]
VIDEO = SEQUENCE_EXTENSIONS[1]
_HOW = "save a sequence as uint8 [T, C, H, W] in C order"
_HEADER = re.compile(
    rb"\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d{1,9}), (\d{1,9}), (\d{1,9}), (\d{1,9})\), \} *\n"
)
_SHAPE = re.compile(
    rb"\{'descr': '([^']{1,20})', 'fortran_order': (?:True|False), 'shape': \(([\d, ]{0,100})\)"
)

Lengths = Mapping[int, int]
"""The number of sequences by length in frames."""


def encode_sequence(frames: NDArray[np.uint8]) -> bytes:
    """The bytes of a member, from frames uint8 [T, C, H, W]."""
    buffer = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": frames.shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + frames.tobytes()


def sequence_header(content: bytes) -> Header:
    """The header of a sequence, with the number of its frames. Raises PictureFault for what is none, and above the bounds."""
    if is_part_of_tar(content):
        return files_header(content, most_bytes=MOST_SEQUENCE_BYTES)
    if is_video(content):
        return video_header(content, most_bytes=MOST_SEQUENCE_BYTES)
    _, (frames, channels, height, width) = _layout(content)
    return Header("frames", height, width, channels, frames=frames)


def frames_of(content: bytes) -> NDArray[np.uint8]:
    """The frames [T, C, H, W] of a sequence's bytes. Raises PictureFault."""
    if is_part_of_tar(content):
        return decoded_files(files_of(content), most_bytes=MOST_SEQUENCE_BYTES)
    if is_video(content):
        return frames_of_video(content, most_bytes=MOST_SEQUENCE_BYTES)
    begin, shape = _layout(content)
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


def window_of(content: bytes, frames: int, place: float) -> NDArray[np.uint8]:
    """The window of `frames` frames [T, C, H, W] of a sequence's bytes at `place` (`start_of`). Raises PictureFault.

    Of files, only those of the window are decoded.
    """
    if is_part_of_tar(content):
        files = files_of(content)
        start = start_of(len(files), frames, place)
        return decoded_files(files[start : start + frames], most_bytes=MOST_SEQUENCE_BYTES)
    whole = frames_of(content)
    start = start_of(len(whole), frames, place)
    return whole[start : start + frames]


def start_of(length: int, frames: int, place: float) -> int:
    """The first frame of a window in a sequence of `length`: place 0 is the first window, just below 1 the last one.

    Raises PictureFault for a shorter sequence.
    """
    if length < frames:
        raise PictureFault("short", f"it has {length} frames, fewer than data.frames (={frames})")
    return int(place * (length - frames + 1))


def lengths_of(index: ShardIndex) -> Lengths:
    """The lengths of the sequences that an index describes. Raises DataError when it describes none, or other numbers."""
    if index.made.get("kind") != SEQUENCES:
        raise DataError(
            f"{index.place} holds no sequences; give shards that `vaescale make-shards` writes of frames, such as "
            "moving-mnist:PATH, or leave data.holds out"
        )
    stated: Any = index.made.get("lengths")
    lengths: dict[int, int] = {}
    for frames, count in stated.items() if isinstance(stated, dict) else ():
        if re.fullmatch(r"[1-9]\d{0,5}", frames) and type(count) is int and count > 0:
            lengths[int(frames)] = count
    if sum(lengths.values()) != index.num_samples or index.image is None:
        raise DataError(
            f"{index.place} does not state the lengths of its {index.num_samples} sequences; write the shards again"
        )
    return dict(sorted(lengths.items()))


def lengths_text(lengths: Lengths) -> str:
    """The lengths in words: 20 frames, or 8 to 30 frames."""
    least, most = min(lengths), max(lengths)
    return f"{least} frames" if least == most else f"{least} to {most} frames"


def _layout(content: bytes) -> tuple[int, tuple[int, int, int, int]]:
    """Where the values of a member begin, and their shape. Only the headers that numpy writes are accepted."""
    if not content.startswith(b"\x93NUMPY") or len(content) < 10:
        raise PictureFault("format", f"it is no npy file; {_HOW}")
    (length,) = struct.unpack("<H", content[8:10])
    header, start = content[10 : 10 + length], 10 + length
    if len(header) < length:
        raise PictureFault("damaged", "its header is cut")
    match = _HEADER.fullmatch(header) if content[6:8] == b"\x01\x00" else None
    if match is None:
        raise PictureFault("shape", f"it is {_array(header)}; {_HOW}")
    frames, channels, height, width = (int(number) for number in match.groups())
    if channels > MOST_CHANNELS >= width:
        raise PictureFault("shape", f"it is {_array(header)}, with the channels last; {_HOW}")
    size = frames * channels * height * width
    if channels > MOST_CHANNELS or frames > MOST_FRAMES or not 0 < size <= MOST_SEQUENCE_BYTES:
        raise PictureFault(
            "pixels",
            f"it is {_array(header)}; sequences have up to {MOST_FRAMES} frames, {MOST_CHANNELS} channels and {MOST_SEQUENCE_BYTES} bytes",
        )
    if len(content) != start + size:
        raise PictureFault(
            "damaged", f"it has {len(content) - start} bytes of values, its header says {size}"
        )
    return start, (frames, channels, height, width)


def _array(header: bytes) -> str:
    """An array in words, by the header of its file."""
    match = _SHAPE.match(header)
    if match is None:
        return "an array of another kind"
    return f"an npy array {match[1].decode('latin-1')} [{match[2].decode().rstrip(',')}]"
