"""How many stored values a recipe's range clips: counted before training, since clipped values are other images."""

import numpy as np

from vaescale import comm
from vaescale.data.batch import Request
from vaescale.data.config import MOST_CLIPPED
from vaescale.data.lookup import evenly
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError
from vaescale.system.console import say

MOST_IMAGES, MOST_BYTES = 1000, 1 << 26  # that are counted


def refuse_clipping(reader: ShardReader) -> None:
    """Raise DataError where more than 0.1% of the values are outside of data.range, and say how many are where some are.

    The bounds in the index tell whether any are; then evenly spaced images are counted, the same ones on every rank.
    """
    for one in reader.sets:
        _refuse_clipping(one)


def _refuse_clipping(reader: ShardReader) -> None:
    values, window = reader.index.values, reader.window
    if not window.clips or window.low <= values.low <= values.high <= window.high:
        return
    most = max(1, min(MOST_IMAGES, MOST_BYTES // reader.sample_bytes))
    below, above, total, numbers = 0, 0, 0, evenly(len(reader), most)
    for part in np.array_split(np.asarray(numbers), -(-len(numbers) // 64)):
        fetched = reader.__getitems__(Request(part, refill=False))
        stored = fetched.images[fetched.usable].numpy()
        below += int((stored < window.low).sum())
        above += int((stored > window.high).sum())
        total += stored.size
    counts = (
        f"{below + above:,} of {total:,} values in {len(numbers)} images of {reader.index.place} are outside of data.range "
        f"[{window.low:g}, {window.high:g}] ({below:,} below, {above:,} above; the set has {values.low:g} to {values.high:g})"
    )
    if below + above > MOST_CLIPPED * total:
        raise DataError(f"{counts}, more than {MOST_CLIPPED:.1%} of them; widen data.range")
    if below + above and comm.rank() == 0:
        say(f"{counts}; they are clipped")
