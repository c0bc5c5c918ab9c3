"""What writing a split would give: counts by class, shape and fault, from headers, without writing anything."""

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from vaescale.data.making.indexing import quietly
from vaescale.data.making.items import Item, name_of, open_item
from vaescale.data.making.remarks import cut_remarks, cut_sentences
from vaescale.data.making.sources.base import Split
from vaescale.data.making.storing import Making
from vaescale.data.pictures import PictureFault, decode_source, is_known, read_header

MOST_SHAPES = 20


def survey(
    split: Split, making: Making, *, limit: int | None = None, progress: Callable[[int], None] = quietly
) -> dict[str, Any]:
    """Count the images of a split by class, shape and fault.

    Returns `images`, the number of those that can be used; `classes`, their numbers by name, and `without_class`;
    `shapes`, their numbers by HEIGHTxWIDTHxCHANNELS FORMAT, the most frequent first; `passed_over`, for each reason the
    number of images and the sentence of the first; `rows`, all of this in words for a table. Of JPEG, PNG, WebP and npy
    files only the headers are read, so damage and transparency are not found; other files are decoded. progress: called
    with the number of images done.
    """
    cuts = Counter[str]()
    classes, shapes, faults = Counter[int](), Counter[str](), dict[str, list[Any]]()
    for number, item in enumerate(islice(split.items, limit), start=1):
        try:
            shape = _shape(item, making)
        except PictureFault as error:
            faults.setdefault(error.reason, [0, f"{name_of(item)}: {error}"])[0] += 1
        else:
            shapes["x".join(map(str, shape[:3])) + " " + shape[3]] += 1
            if making.size is not None and making.crop == "square":
                cuts.update(cut_remarks(*shape[:2]))
            classes[item.label] += 1
        progress(number)
    found = {
        "images": shapes.total(),
        "classes": {name: classes[label] for label, name in enumerate(split.class_names)},
        "without_class": classes[-1],
        "shapes": dict(shapes.most_common(MOST_SHAPES)),
        "more_shapes": max(0, len(shapes) - MOST_SHAPES),
        "passed_over": {
            reason: {"images": count, "first": first} for reason, (count, first) in faults.items()
        },
    }
    return {**found, "rows": _rows(found, cut_sentences(cuts, shapes.total()))}


def _rows(found: dict[str, Any], cut: list[str]) -> dict[str, str]:
    """What was found, in words for a table. cut: a sentence on the crop, or nothing."""
    classes = found["classes"] | ({"without class": found["without_class"]} if found["without_class"] else {})
    more = f" and {found['more_shapes']} more" if found["more_shapes"] else ""
    rows = {
        "classes": ", ".join(f"{name} {count}" for name, count in classes.items()),
        "shapes": ", ".join(f"{shape} ({count})" for shape, count in found["shapes"].items()) + more,
    }
    rows |= {"crop": cut[0]} if cut else {}
    faults = found["passed_over"].items()
    return rows | {f"cannot be used: {why}": f"{one['images']}, first: {one['first']}" for why, one in faults}


def _shape(item: Item, making: Making) -> tuple[int, int, int, str]:
    """Height, width, channels and format."""
    content = open_item(item)
    if isinstance(content, np.ndarray):
        return *content.shape, "array"
    if is_known(content):
        header = read_header(content)
        return header.height, header.width, header.channels, header.format
    return *decode_source(content, convert=False, colour=making.colour).image.shape, "other"
