"""`digits`: scikit-learn's handwritten digits."""

from functools import partial

import numpy as np

from vaescale.config import Dtype
from vaescale.data.making.items import Item
from vaescale.data.making.sources.base import Source, Split
from vaescale.errors import UserError


def digits(*, dtype: Dtype = "uint8") -> Source:
    """Scikit-learn's 1,797 scanned handwritten digits, 8x8 with 17 grey levels, as 8-bit images, 16-bit ones of 257 times the values, or float32
    from 0 to 1.

    257 * 255 is 65,535, so all are the same numbers in [0, 1]. dtype: uint8, uint16 or float32. train (1,437) and val (360), stratified by digit, always the same. Alpaydin & Kaynak 1998.
    """

    if dtype == "int16":
        raise UserError(f"--dtype (={dtype}) must be uint8, uint16 or float32 for digits")

    def split(name: str) -> Split:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch = load_digits()
        parts = train_test_split(np.arange(1797), test_size=360, random_state=0, stratify=bunch.target)
        ids = sorted(parts[0] if name == "train" else parts[1])
        images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
        deep = {"uint16": images * np.uint16(257), "float32": images / np.float32(255)}
        values = deep.get(dtype, images)
        items = [Item(f"{i:06d}", values[i], int(bunch.target[i])) for i in ids]
        return Split(items, len(items), tuple(map(str, range(10))))

    return Source({name: partial(split, name) for name in ("train", "val")})
