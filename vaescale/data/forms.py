"""The form of a sample: what a reader makes of its bytes, a picture, the moments of a latent, a map of codes, or a window of a sequence."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vaescale.config import Window
from vaescale.data.config import Crop, Filter
from vaescale.data.latent_format import LatentDtype, from_stored
from vaescale.data.pictures import PictureFault, Values, cut, decode, decode_deep, to_channels
from vaescale.data.sequences import frames_of, start_of, window_of

DTYPES = {"uint8": torch.uint8, "uint16": torch.uint16, "int16": torch.int16, "float32": torch.float32}


class Pictures(NamedTuple):
    """Pictures, cut to size. image_shape: (C, H, W). window: the type of their values, and those that the model sees as 0 and 1."""

    image_shape: tuple[int, int, int]
    crop: Crop | None = None
    resample: Filter = "bicubic"
    window: Window = Window()

    @property
    def dtype(self) -> torch.dtype:
        """The type of a sample's values."""
        return DTYPES[self.window.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample's values."""
        return self.image_shape

    def part(self, content: bytes) -> Values:
        """The part [h, w, C] of a picture, which a `Resizer` makes an image. Raises PictureFault."""
        channels, size = self.image_shape[0], self.image_shape[1:]
        if self.window.dtype == "uint8":
            image: Values = to_channels(decode(content), channels)
        else:
            image = decode_deep(content, self.window.dtype)
            if image.shape[2] != channels:
                raise PictureFault("shape", f"it has {image.shape[2]} channels, not {channels}")
        return cut(image, size=size, crop=self.crop)


class Moments(NamedTuple):
    """The mean and log variance of each q(z|x), as an image of two parts.

    image_shape: (C, H, W) of a latent map, (Z, 1, 1) of a vector. stored: the dtype of the stored values; header, member_bytes: of a
    sample's member, see `LatentShards`.
    """

    image_shape: tuple[int, int, int]
    stored: LatentDtype
    header: bytes
    member_bytes: int
    dtype: torch.dtype = torch.float32
    window: Window = Window()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample's values."""
        return (2, *self.image_shape)

    def values(self, content: bytes) -> NDArray[np.float32]:
        """The values float32 [2, C, H, W] of a member's bytes. Raises PictureFault."""
        if len(content) != self.member_bytes or not content.startswith(self.header):
            raise PictureFault("changed", "it is no latent of the shape that was indexed")
        row = np.frombuffer(content, np.uint8)[len(self.header) :]
        return from_stored(row[None], self.stored).reshape(self.shape)


class CodeMaps(NamedTuple):
    """The codes of an image. image_shape: (K, h, w), that of K codes as one-hot vectors; header: of a sample's member, see `CodeShards`."""

    image_shape: tuple[int, int, int]
    header: bytes
    dtype: torch.dtype = torch.int32
    window: Window = Window()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample's values."""
        return (1, *self.image_shape[1:])

    def values(self, content: bytes) -> NDArray[np.int32]:
        """The values int32 [1, h, w] of a member's bytes. Raises PictureFault."""
        codes, height, width = self.image_shape
        if len(content) != len(self.header) + 4 * height * width or not content.startswith(self.header):
            raise PictureFault("changed", "it is no map of codes of the shape that was indexed")
        values = np.frombuffer(content, "<i4", offset=len(self.header)).reshape(self.shape)
        if not 0 <= int(values.min()) <= int(values.max()) < codes:
            raise PictureFault("changed", f"it has codes that are not from 0 to {codes - 1}")
        return values


class Windows(NamedTuple):
    """Windows of sequences. image_shape: (C, H, W) of a frame; frames: of a window."""

    image_shape: tuple[int, int, int]
    frames: int
    dtype: torch.dtype = torch.uint8
    window: Window = Window()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a sample's values."""
        return (self.frames, *self.image_shape)

    def values(self, content: bytes, place: float = 0.0) -> NDArray[np.uint8]:
        """The window [T, C, H, W] of a sequence's bytes at `place`. Raises PictureFault."""
        return self._checked(window_of(content, self.frames, place))

    def whole(self, content: bytes) -> NDArray[np.uint8]:
        """All frames [n, C, H, W] of a sequence's bytes, T at least. Raises PictureFault."""
        frames = self._checked(frames_of(content))
        start_of(len(frames), self.frames, 0)
        return frames

    def cut(self, frames: NDArray[np.uint8], place: float) -> NDArray[np.uint8]:
        """The window [T, C, H, W] of all frames at `place`."""
        start = start_of(len(frames), self.frames, place)
        return frames[start : start + self.frames]

    def _checked(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if frames.shape[1:] != self.image_shape:
            raise PictureFault("changed", "its frames are not of the shape that was indexed")
        return frames


Form = Pictures | Moments | CodeMaps | Windows
