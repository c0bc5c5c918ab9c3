"""How an image of a source is cut to size and stored."""

from typing import Any, Literal, NamedTuple

import numpy as np

from vaescale.config import Size
from vaescale.data.config import Crop, Filter
from vaescale.data.making.items import Item, open_item
from vaescale.data.making.remarks import cut_remarks, kept_remarks, written_remarks
from vaescale.data.pictures import (
    Colour,
    Decoded,
    Encoding,
    decode_source,
    encode,
    fit,
    is_known,
    parse_colour,
    read_header,
    to_channels,
)

_ADDED = {"flatten": None}  # settings and their defaults, without which older shards were written


class Making(NamedTuple):
    """How images are cut to size and stored.

    size: the side in pixels, or height and width; None for the images' own. channels: 1, 3, or None for the images' own. encoding `keep` stores the
    files as they are. shard_samples: images per shard, unless
    shard_bytes gives its approximate size. skip_broken: leave out images that cannot be used. flatten: the colour (#rrggbb)
    that transparent images are put on; None refuses them.
    """

    size: Size | None = None
    crop: Crop | None = None
    resample: Filter = "bicubic"
    channels: Literal[1, 3] | None = None
    encoding: Encoding | Literal["keep"] = "npy"
    quality: int = 95
    shard_samples: int = 1000
    shard_bytes: int | None = None
    skip_broken: bool = False
    flatten: str | None = None

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
    """Read an item's image, cut it to size and encode it. Raises PictureFault."""
    content = open_item(item)
    if isinstance(content, np.ndarray):
        source = Decoded(content)
    elif making.encoding == "keep" and is_known(content):
        source = decode_source(content, convert=False, colour=making.colour)
        if not source.flattened:
            header = read_header(content)
            return Prepared(header.format, content, kept_remarks(content, header, source), _shape(source))
        source = decode_source(content, convert=True, colour=making.colour)
    else:
        source = decode_source(content, convert=True, colour=making.colour)
    image = source.image
    if making.encoding == "keep":
        encoding: Encoding = "npy" if isinstance(content, np.ndarray) else "png"
        encoded = encode(image, encoding)
        return Prepared(encoding, encoded, written_remarks(source, encoding=encoding), _shape(source))
    if making.size is not None:
        image = fit(image, size=making.size, crop=making.crop, resample=making.resample)
    if making.channels is not None:
        image = to_channels(image, making.channels, grey_from_colour=True)
    encoded = encode(image, making.encoding, quality=making.quality)
    remarks = written_remarks(source._replace(image=image), encoding=making.encoding)
    height, width = source.image.shape[:2]
    remarks += cut_remarks(height, width, making.size, making.crop)
    return Prepared(making.encoding, encoded, remarks, _shape(source))


def _shape(source: Decoded) -> str:
    return f"{'x'.join(map(str, source.image.shape))} {source.format}"
