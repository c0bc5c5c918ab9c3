"""What writing a split would give: counts by class, shape and fault, from headers, without writing anything."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from vaescale.data.making.indexing import quietly
from vaescale.data.making.items import Clip, Item, name_of, open_content
from vaescale.data.making.remarks import cut_remarks, cut_sentences
from vaescale.data.making.sources.base import Split
from vaescale.data.making.storing import Making
from vaescale.data.making.table import Counts, table_rows
from vaescale.data.pictures import PictureFault, decode_deep_source, decode_source, is_known, read_header


def survey(
    split: Split, making: Making, *, limit: int | None = None, progress: Callable[[int], None] = quietly
) -> dict[str, Any]:
    """Count the images of a split by class, shape and fault.

    Returns a table (`table.py`), and `rows`, the same in words. Of JPEG, PNG, WebP and npy files only the headers are read, so
    damage and transparency are not found; other files are decoded. progress: called with the number of images done.
    """
    cuts, counts = Counter[str](), Counts()
    items = split.items if split.outline is None else split.outline()
    for number, item in enumerate(islice(items, limit), start=1):
        try:
            height, width, channels, kind = _shape(item, making)
            if isinstance(item.content, Clip):
                number = len(item.content.frames)
                kind = f"{number} frames" if number > 1 else "frames"  # one stands for an unknown number
        except PictureFault as error:
            counts.fault(error.reason, f"{name_of(item)}: {error}")
        else:
            counts.image(f"{height}x{width}x{channels} {kind}", item.label)
            cuts.update(cut_remarks(height, width, making.size, making.crop))
        progress(number)
    table = counts.table(split.class_names, split.left_out)
    crop = cut_sentences(cuts, table["images"])
    return {**table, "rows": table_rows(table) | ({"crop": crop[0]} if crop else {})}


def _shape(item: Item, making: Making) -> tuple[int, int, int, str]:
    """Height, width, channels and format; of a sequence those of its first frame."""
    if isinstance(item.content, Clip) and item.content.fault is not None:
        raise PictureFault(*item.content.fault)
    content = open_content(item.content.frames[0] if isinstance(item.content, Clip) else item.content)
    if isinstance(content, np.ndarray):
        if content.dtype != making.dtype:
            raise PictureFault("depth", f"its values are {content.dtype}, not {making.dtype}")
        return *content.shape, "array"
    if is_known(content):
        header = read_header(content, making.dtype)
        return header.height, header.width, header.channels, header.format
    if making.dtype != "uint8":
        return *decode_deep_source(content, making.dtype).shape, "tiff"
    alpha = making.channels in (2, 4)
    source = decode_source(content, convert=False, colour=making.colour, alpha=alpha)
    return *source.image.shape, source.format
