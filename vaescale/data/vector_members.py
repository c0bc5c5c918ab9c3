"""Vectors of the samples of a tar, from a member of each: a NumPy file, or a number or a list of numbers in a JSON file."""

import json
import re
from collections import Counter
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vaescale.data.config import VectorMember
from vaescale.data.index import Entries
from vaescale.data.tars import Member, groups

MISSING, OTHER, SIZE, INFINITE = (
    "have none",
    "are no vectors",
    "have another size",
    "hold NaN or infinite values",
)
MOST_BYTES = 1 << 20  # of a member
# As np.save writes one-dimensional arrays; np.load would evaluate the header, and accept more.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<|][fiu][1248]|\|b1)', 'fortran_order': (?:False|True), "
    rb"'shape': \(((?:1, )?[0-9]{1,7}),?\), \} *\n",
    re.DOTALL,
)


class ShardVectors(NamedTuple):
    """The vectors of a shard's samples in order, float32 [n, V], NaN without one; faults: numbers of samples by kind and detail."""

    values: NDArray[np.float32]
    faults: Counter[tuple[str, str]]


def vectors_of(file: IO[bytes], entries: Entries, wanted: VectorMember) -> ShardVectors:
    """The vectors of the samples that a tar's index has. Raises TarFault for a tar that is not sound."""
    rows = {key: row for row, key in enumerate(entries["key"].tolist())}
    values = np.full((len(entries), wanted.size), np.nan, np.float32)
    faults, seen = Counter[tuple[str, str]](), set[int]()
    ending, _, inner = wanted.name.partition(":")
    for key, group in groups(file):
        row = rows.get(key.encode())
        if row is None:
            continue
        member = next((member for extension, member in group if extension == ending), None)
        try:
            vector = _parsed(file, member, inner, ", ".join(extension for extension, _ in group))
            if len(vector) != wanted.size:
                raise _Fault(SIZE, f"{len(vector)} values")
            if not np.isfinite(vector).all():
                raise _Fault(INFINITE, f"such as {key}")
            values[row] = vector
        except _Fault as fault:
            faults[fault.kind, fault.detail] += 1
        seen.add(row)
    if len(seen) < len(entries):
        faults[MISSING, "the tar ends before them"] += len(entries) - len(seen)
    return ShardVectors(values, faults)


class _Fault(ValueError):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def _parsed(file: IO[bytes], member: Member | None, inner: str, others: str) -> NDArray[np.float32]:
    """The values of a member. inner: the key in a JSON file; empty for a NumPy file. others: the sample's members. Raises _Fault."""
    if member is None:
        raise _Fault(MISSING, f"a sample has {others}")
    if member.is_link or member.bytes > MOST_BYTES:
        raise _Fault(OTHER, "links" if member.is_link else f"{member.bytes} bytes")
    file.seek(member.offset)
    content = file.read(member.bytes)
    return _of_json(content, inner) if inner else _of_npy(content)


def _of_npy(content: bytes) -> NDArray[np.float32]:
    match = _NPY.match(content)
    if match is None:
        raise _Fault(OTHER, "other than a NumPy file of numbers [V] or [1, V]")
    kind, size = np.dtype(match[1].decode()), int(match[2].split(b", ")[-1])
    if len(content) != match.end() + size * kind.itemsize:
        raise _Fault(OTHER, "cut NumPy files")
    with np.errstate(over="ignore"):
        return np.frombuffer(content, kind, offset=match.end()).astype(np.float32)


def _of_json(content: bytes, inner: str) -> NDArray[np.float32]:
    try:
        fields: Any = json.loads(content)
    except (ValueError, RecursionError):
        raise _Fault(OTHER, "no JSON") from None
    value = fields.get(inner) if isinstance(fields, dict) else None
    if value is None:
        known = ", ".join(map(str, list(fields)[:8])) if isinstance(fields, dict) else "no keys"
        raise _Fault(MISSING, f"a JSON file has {known}")
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(one, int | float) for one in numbers):
        raise _Fault(OTHER, "JSON values that are not numbers")
    try:
        with np.errstate(over="ignore"):  # infinite values are a fault of their own
            return np.array(numbers, dtype=np.float64).astype(np.float32)
    except OverflowError:
        raise _Fault(INFINITE, "integers beyond float64") from None
