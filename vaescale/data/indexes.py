"""The index of shards at a folder or URL. Imports no torch: reading a recipe may need the number of images."""

from vaescale.data.config import DataConfig
from vaescale.data.index import INDEX, ShardIndex, parse_index
from vaescale.data.storage import open_store


def open_index(
    place: str,
    *,
    cache: str | None = None,
    cache_bytes: int | None = None,
    retry_seconds: float | None = None,
) -> ShardIndex:
    """Read the index of the folder or URL `place`; the options are those of `data`, by default its defaults. Raises DataError."""
    defaults = DataConfig.model_fields
    store = open_store(
        place,
        cache=cache,
        cache_bytes=defaults["cache_bytes"].default if cache_bytes is None else cache_bytes,
        retry_seconds=defaults["retry_seconds"].default if retry_seconds is None else retry_seconds,
    )
    return parse_index(store.read_index(INDEX), place)
