"""How an image of a source is cut to size and stored."""

from typing import Any, Literal, NamedTuple

import numpy as np

from vaescale.data.config import Crop, Filter
from vaescale.data.making.items import Item, open_item
from vaescale.data.pictures import (
    Encoding,
    Picture,
    decode,
    decode_foreign,
    encode,
    fit,
    is_known,
    read_header,
    to_channels,
)


class Making(NamedTuple):
    """How images are cut to size and stored.

    size: pixels, None for the images' own. channels: 1, 3, or None for the images' own. encoding `keep` stores the
    files as they are. shard_samples: images per shard, unless
    shard_bytes gives its approximate size. skip_broken: leave out images that cannot be used.
    """

    size: int | None = None
    crop: Crop | None = None
    resample: Filter = "bicubic"
    channels: Literal[1, 3] | None = None
    encoding: Encoding | Literal["keep"] = "npy"
    quality: int = 95
    shard_samples: int = 1000
    shard_bytes: int | None = None
    skip_broken: bool = False

    def words(self) -> dict[str, Any]:
        """The settings that have an effect, for the index."""
        used = {name: value for name, value in self._asdict().items() if value is not None}
        unused = [
            *(["resample"] if self.size is None else []),
            *(["quality"] if self.encoding != "jpg" else []),
        ]
        unused += ["skip_broken", *(["shard_samples"] if self.shard_bytes is not None else [])]
        return {name: value for name, value in used.items() if name not in unused}


def prepare(item: Item, making: Making) -> tuple[str, bytes]:
    """The extension and the bytes of an item's image. Raises PictureFault."""
    content = open_item(item)
    foreign = isinstance(content, bytes) and not is_known(content)
    image: Picture = (
        content
        if isinstance(content, np.ndarray)
        else decode_foreign(content)
        if foreign
        else decode(content)
    )
    if making.encoding == "keep":
        if isinstance(content, np.ndarray):
            return "npy", encode(image, "npy")
        return ("png", encode(image, "png")) if foreign else (read_header(content).format, content)
    if making.size is not None:
        image = fit(image, size=making.size, crop=making.crop, resample=making.resample)
    if making.channels is not None:
        image = to_channels(image, making.channels, grey_from_colour=True)
    return making.encoding, encode(image, making.encoding, quality=making.quality)
