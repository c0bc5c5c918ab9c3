"""How an image or a sequence of a source is cut to size and stored."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from vaescale.config import Dtype, Size
from vaescale.data.config import Crop, Filter
from vaescale.data.making.items import Clip, Item, open_content, open_item
from vaescale.data.making.remarks import COLOUR, GREY, cut_remarks, kept_remarks, written_remarks
from vaescale.data.pictures import (
    Colour,
    Decoded,
    Encoding,
    Header,
    Picture,
    PictureFault,
    Values,
    checked,
    decode,
    decode_deep,
    decode_deep_source,
    decode_source,
    encode,
    fit,
    is_known,
    parse_colour,
    read_header,
    to_channels,
)
from vaescale.data.sequences import EXTENSION, encode_sequence, sequence_header

_ADDED = {
    "flatten": None,
    "dtype": "uint8",
}  # settings and their defaults, without which older shards were written


class Making(NamedTuple):
    """How images are cut to size and stored.

    size: the side in pixels, or height and width; None for the images' own. channels: None for the images' own; 2 and 4 keep the alpha channel of files. encoding `keep` stores the
    files as they are. shard_samples: images per shard, unless
    shard_bytes gives its approximate size. skip_broken: leave out images that cannot be used. flatten: the colour (#rrggbb)
    that transparent images are put on; None refuses them. dtype: the type of the values; other images are refused.
    """

    size: Size | None = None
    crop: Crop | None = None
    resample: Filter = "bicubic"
    channels: int | None = None
    encoding: Encoding | Literal["keep"] = "npy"
    quality: int = 95
    shard_samples: int = 1000
    shard_bytes: int | None = None
    skip_broken: bool = False
    flatten: str | None = None
    dtype: Dtype = "uint8"

    def __repr__(self) -> str:
        """The settings as hashes in shards' notes contain them: those that were added later only where they are used."""
        used = {name: value for name, value in self._asdict().items() if _ADDED.get(name, ...) != value}
        return f"Making({', '.join(f'{name}={value!r}' for name, value in used.items())})"

    @property
    def colour(self) -> Colour | None:
        """Red, green and blue of `flatten`."""
        return None if self.flatten is None else parse_colour(self.flatten)

    def words(self) -> dict[str, Any]:
        """The settings that have an effect, for the index."""
        used = {name: value for name, value in self._asdict().items() if value is not None}
        used |= {"size": list(self.size)} if isinstance(self.size, tuple) else {}  # as JSON has it
        unused = [
            *(["resample"] if self.size is None else []),
            *(["quality"] if self.encoding != "jpg" else []),
        ]
        unused += ["dtype"] if self.dtype == "uint8" else []
        unused += ["skip_broken", *(["shard_samples"] if self.shard_bytes is not None else [])]
        return {name: value for name, value in used.items() if name not in unused}


class Prepared(NamedTuple):
    """An image as it is stored: extension, bytes, and what is remarkable about it (`remarks.py`).

    shape: HEIGHTxWIDTHxCHANNELS FORMAT of its source.
    """

    extension: str
    content: bytes
    remarks: list[str]
    shape: str


def prepare(item: Item, making: Making) -> Prepared:
    """Read an item's image or frames, cut them to size and encode them. Raises PictureFault."""
    if isinstance(item.content, Clip):
        return _prepare_clip(item.content, making)
    content = open_item(item)
    if making.dtype != "uint8":
        return _prepare_deep(content, making)
    alpha = making.channels in (2, 4)
    if isinstance(content, np.ndarray):
        if content.dtype != np.uint8:
            raise PictureFault(
                "depth", f"its values are {content.dtype}; keep them with --dtype {content.dtype}"
            )
        source = Decoded(content.astype(np.uint8, copy=False))
    elif making.encoding == "keep" and is_known(content):
        source = decode_source(content, convert=False, colour=making.colour)
        if not source.flattened:
            header = read_header(content)
            return Prepared(header.format, content, kept_remarks(content, header, source), _shape(source))
        source = decode_source(content, convert=True, colour=making.colour)
    else:
        source = decode_source(content, convert=True, colour=making.colour, alpha=alpha)
    image = source.image
    if making.encoding == "keep":
        is_array = isinstance(content, np.ndarray) or image.shape[2] not in (1, 3)
        encoding: Encoding = "npy" if is_array else "png"
        encoded = encode(image, encoding)
        return Prepared(encoding, encoded, written_remarks(source, encoding=encoding), _shape(source))
    if making.size is not None:
        image = fit(image, size=making.size, crop=making.crop, resample=making.resample)
    if making.channels is not None:
        image = _with_alpha(image, making.channels) if alpha else image
        image = to_channels(image, making.channels, grey_from_colour=True)
    encoded = encode(image, making.encoding, quality=making.quality)
    remarks = written_remarks(source._replace(image=image), encoding=making.encoding)
    height, width = source.image.shape[:2]
    remarks += cut_remarks(height, width, making.size, making.crop)
    return Prepared(making.encoding, encoded, remarks, _shape(source))


def _prepare_clip(clip: Clip, making: Making) -> Prepared:
    """Prepare a sequence: each frame as an image of its own, all of one shape, stored as one array."""
    if clip.fault is not None:
        raise PictureFault(*clip.fault)
    frames: list[Picture] = []
    cut: list[str] = []
    for number, content in enumerate(map(open_content, clip.frames)):
        try:
            source = _frame(content, making)
            frame = _as_stored(source, making)
        except PictureFault as error:
            raise PictureFault(error.reason, f"frame {number}: {error}") from error
        if frames and frame.shape != frames[0].shape:
            shapes = ["x".join(map(str, one.shape)) for one in (frame, frames[0])]
            raise PictureFault(
                "shape",
                f"frame {number} is {shapes[0]}, the first one {shapes[1]}; --size and --channels make them alike",
            )
        if not frames:
            cut = cut_remarks(source.shape[0], source.shape[1], making.size, making.crop)
        frames.append(frame)
    encoded = encode_sequence(np.stack(frames).transpose(0, 3, 1, 2))
    sequence_header(encoded)  # its bounds
    remarks = [GREY if frames[0].shape[2] == 1 else COLOUR, *cut]
    return Prepared(
        EXTENSION, encoded, remarks, f"{'x'.join(map(str, frames[0].shape))} {len(frames)} frames"
    )


def _frame(content: bytes | Values, making: Making) -> Picture:
    """A frame [H, W, C] as its source has it."""
    if isinstance(content, np.ndarray):
        return content.astype(np.uint8, copy=False)
    return decode_source(content, convert=True, colour=making.colour).image


def _as_stored(frame: Picture, making: Making) -> Picture:
    if making.size is not None:
        frame = fit(frame, size=making.size, crop=making.crop, resample=making.resample)
    return frame if making.channels is None else to_channels(frame, making.channels, grey_from_colour=True)


def _prepare_deep(content: bytes | Values, making: Making) -> Prepared:
    """Prepare an image whose values are no uint8: numbers that stay as they are."""
    if isinstance(content, np.ndarray):
        if content.dtype != making.dtype:
            raise PictureFault("depth", f"its values are {content.dtype}, not {making.dtype}")
        image, kind = content, "array"
    else:
        image = decode_deep_source(content, making.dtype)
        kind = read_header(content, making.dtype).format if is_known(content) else "tiff"
    shape = f"{'x'.join(map(str, image.shape))} {kind}"
    if making.channels is not None and image.shape[2] != making.channels:
        raise PictureFault("shape", f"it has {image.shape[2]} channels, not {making.channels}")
    remarks = [GREY if checked(image).shape[2] == 1 else COLOUR]
    if making.encoding == "keep" and isinstance(content, bytes) and is_known(content):
        return Prepared(kind, content, remarks, shape)
    if making.size is not None:
        remarks += cut_remarks(image.shape[0], image.shape[1], making.size, making.crop)
        image = fit(image, size=making.size, crop=making.crop, resample=making.resample)
    encoding: Encoding = "npy" if making.encoding == "keep" else making.encoding
    return Prepared(encoding, encode(np.ascontiguousarray(image), encoding), remarks, shape)


def _with_alpha(image: Picture, channels: int) -> Picture:
    """An image of 2 or 4 channels, alpha the last one: grey is repeated, and what has no alpha is opaque."""
    if image.shape[2] in (1, 3):
        image = np.concatenate([image, np.full_like(image[:, :, :1], 255)], axis=2)
    if image.shape[2] == 2 and channels == 4:
        return image[:, :, [0, 0, 0, 1]]
    return image


def values_of(content: bytes, dtype: Dtype) -> Values:
    """The values [H, W, C] of a stored image, whose type is known. Raises PictureFault."""
    return decode(content) if dtype == "uint8" else checked(decode_deep(content, dtype))


def header_check(dtype: Dtype, *, of_sequences: bool = False) -> Callable[[bytes], Header]:
    """A function that reads an image's or a sequence's header, and raises PictureFault for values of another type."""
    return sequence_header if of_sequences else partial(read_header, dtype=dtype)


def _shape(source: Decoded) -> str:
    return f"{'x'.join(map(str, source.image.shape))} {source.format}"
