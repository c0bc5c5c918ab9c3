"""Pickles of plain data, read without unpickling: nothing is imported, called or built but what is listed here.

Dicts, lists, tuples, numbers, strings and numpy arrays of numbers are read, in the forms in which Python 2 (protocol 2) and
Python 3 (protocols 2 to 5) write them. The opcodes are those of `pickletools`. Long strings, which the elements of arrays are,
stay in the file.
"""

import pickletools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from vaescale.data.making.sources.stored import InMemory, Raw, Stored, reading
from vaescale.errors import DataError

MOST_OPCODES = 20_000_000
MOST_TEXT_BYTES = 1 << 30
SHORT_BYTES = 1 << 16  # a longer string stays in the file
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_PLAIN = re.compile(r"[<>=|]?[biuf][1248]")
# Opcodes of strings of bytes and of text, and the bytes of their lengths.
_BYTES = {
    "SHORT_BINSTRING": 1,
    "BINSTRING": 4,
    "SHORT_BINBYTES": 1,
    "BINBYTES": 4,
    "BINBYTES8": 8,
    "BYTEARRAY8": 8,
}
_TEXTS = {"SHORT_BINUNICODE": 1, "BINUNICODE": 4, "BINUNICODE8": 8}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = ("PROTO", "FRAME")
_ALLOWED = {
    *(*_BYTES, *_TEXTS, *_NUMBERS, *_CONSTANTS, *_TUPLES, *_IGNORED),
    *("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "MARK", "TUPLE", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "STOP"),
}
_OTHERS = {
    "EMPTY_SET": "a set",
    "FROZENSET": "a frozenset",
    **dict.fromkeys(("PERSID", "BINPERSID"), "a persistent id"),
}
# What numpy and Python's own bytes are written with. Old and new names of modules are the same.
_RECONSTRUCT, _NDARRAY, _DTYPE = "numpy.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"
_FROM_BUFFER, _ENCODE, _NO_BYTES = "numpy.numeric._frombuffer", "_codecs.encode", "builtins.bytes"
_SCALAR = "numpy.multiarray.scalar"
_KNOWN = (_RECONSTRUCT, _NDARRAY, _DTYPE, _FROM_BUFFER, _ENCODE, _NO_BYTES, _SCALAR)
_RENAMED = (("numpy.core.", "numpy."), ("numpy._core.", "numpy."), ("__builtin__.", "builtins."))


def read_plain(path: Path) -> dict[str, Any]:
    """The dict that a pickle holds. Arrays are `Stored`, strings of Python 2 are bytes, keys are text.

    Raises DataError for a file that is damaged, or that holds anything but plain data.
    """
    with reading(path), path.open("rb") as file:
        content = _Machine(path, file).run()
        if not isinstance(content, dict):
            raise _refusal(path, f"a {_kind(content)}")
        return {_text(key): _stored(path, _text(key), value) for key, value in content.items()}


class _Span(NamedTuple):
    """A string of bytes that stays in the file."""

    offset: int
    bytes: int


class _Name(NamedTuple):
    """A function or class that a pickle names, as MODULE.NAME. It is never imported."""

    name: str


class _Type:
    """A numpy element type under construction."""

    def __init__(self, code: str) -> None:
        self.code = code


class _Array:
    """A numpy array under construction. content: its bytes."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype: _Type | None = None
        self.fortran = False
        self.content: bytes | _Span = b""


def _refusal(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} is a pickle that holds {what}; only plain dicts, lists, numbers, strings and numpy arrays are read: save its "
        "arrays with numpy.savez, and use arrays:FILE.npz"
    )


def _kind(value: Any) -> str:
    return {_Span: "bytes", _Name: "class", _Array: "numpy array", _Type: "numpy dtype"}.get(
        type(value), type(value).__name__
    )


def _text(key: Any) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


def _stored(path: Path, key: str, value: Any) -> Any:
    """A value as it is handed out."""
    if isinstance(value, _Name | _Type):
        raise _refusal(path, f"a {_kind(value)}")
    if not isinstance(value, _Array):
        return value
    if value.dtype is None:
        raise ValueError(f"the array {key} has no elements")
    dtype, name = np.dtype(value.dtype.code), f"{path} ({key})"
    content = value.content
    size = content.bytes if isinstance(content, _Span) else len(content)
    if any(length < 0 for length in value.shape):
        raise ValueError(f"the array {key} has the shape {list(value.shape)}")
    if isinstance(content, _Span):
        stored: Stored = Raw(path, name, value.shape, dtype, content.offset, value.fortran)
    else:
        values = np.frombuffer(content, np.uint8)
        stored = InMemory(path, name, value.shape, dtype, values)
    if stored.nbytes != size:
        raise ValueError(f"the array {key} is {stored.described()}, with {size} bytes")
    if isinstance(stored, InMemory):
        order: Any = "F" if value.fortran else "C"
        values = values.view(dtype).reshape(value.shape, order=order)
        stored = InMemory(path, name, value.shape, dtype, values)
    return stored


class _Machine:
    """Interpret the opcodes of a pickle with a stack and a memo."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object that the pickle holds. Raises ValueError for a damaged pickle and DataError for one that is not plain."""
        for number, (name, argument) in enumerate(self._opcodes()):
            if number > MOST_OPCODES:
                raise _refusal(self.path, f"more than {MOST_OPCODES} values")
            if name == "STOP":
                (value,) = self.stack
                return value
            self._do(name, argument)
        raise EOFError("it is cut")

    def read(self, size: int) -> bytes:
        """Read bytes; a length that the file does not have is refused before memory is taken."""
        if not 0 <= size <= self.size - self.file.tell():
            raise EOFError("it is cut")
        return self.file.read(size)

    def _line(self) -> str:
        line = self.file.readline(1000)
        if not line.endswith(b"\n"):
            raise EOFError("it is cut")
        return line[:-1].decode("ascii")

    def _opcodes(self) -> Iterator[tuple[str, Any]]:
        while code := self.file.read(1):
            opcode = _OPCODES.get(code.decode("latin-1"))
            if opcode is None:
                raise ValueError(f"it is no pickle: byte {code!r} is no opcode")
            if opcode.name not in _ALLOWED:  # before its argument is read
                raise _refusal(self.path, _OTHERS.get(opcode.name, f"the opcode {opcode.name}"))
            if (width := _BYTES.get(opcode.name)) is not None:
                yield opcode.name, self._bytes(int.from_bytes(self.read(width), "little"))
            elif (width := _TEXTS.get(opcode.name)) is not None:
                length = int.from_bytes(self.read(width), "little")
                if length > MOST_TEXT_BYTES:
                    raise _refusal(self.path, f"a text of {length} bytes")
                yield opcode.name, self.read(length).decode("utf-8", "surrogatepass")
            elif opcode.name == "GLOBAL":
                yield opcode.name, f"{self._line()}.{self._line()}"
            else:
                yield opcode.name, opcode.arg.reader(cast(Any, self)) if opcode.arg else None

    def _bytes(self, length: int) -> bytes | _Span:
        if length <= SHORT_BYTES:
            return self.read(length)
        span = _Span(self.file.tell(), length)
        if span.offset + length > self.size:
            raise EOFError("it is cut")
        self.file.seek(length, 1)
        return span

    def _do(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _BYTES or name in _TEXTS or name in _NUMBERS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "MARK":
            self.marked.append(stack)
            self.stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            self.stack = self.marked.pop()
            self._fill(name, stack)
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "APPEND":
            self._fill("APPENDS", [stack.pop()])
        elif name == "SETITEM":
            value = stack.pop()
            self._fill("SETITEMS", [stack.pop(), value])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument)
        elif name in ("REDUCE", "BUILD"):
            given = stack.pop()
            stack.append(
                self._reduce(stack.pop(), given) if name == "REDUCE" else self._build(stack.pop(), given)
            )
        else:
            assert name in _IGNORED, name

    def _fill(self, name: str, values: list[Any]) -> None:
        """Put values into a tuple, the list or the dict below them."""
        if name == "TUPLE":
            self.stack.append(tuple(values))
            return
        target = self.stack[-1]
        if not isinstance(target, list if name == "APPENDS" else dict):
            raise ValueError(f"it adds elements to a {_kind(target)}")
        if isinstance(target, list):
            target.extend(values)
            return
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | bytes | int):
                raise _refusal(self.path, f"a dict with a {_kind(key)} as a key")
            target[key] = value

    def _name(self, argument: Any) -> None:
        if argument is None:
            name, module = self.stack.pop(), self.stack.pop()
            argument = f"{_text(module)}.{_text(name)}"
        full = argument[:100]
        known = full
        for old, new in _RENAMED:
            known = new + known.removeprefix(old) if known.startswith(old) else known
        if known not in _KNOWN:
            raise _refusal(self.path, full)
        self.stack.append(_Name(known))

    def _reduce(self, name: Any, given: Any) -> Any:
        """What a call of a known name gives. Raises DataError for any other call."""
        match name, given:
            case _Name(name=known), (_Name(name=kind), (0,), b"b" | "b") if (known, kind) == (
                _RECONSTRUCT,
                _NDARRAY,
            ):
                return _Array()
            case _Name(name=known), (str() | bytes() as code, *_) if known == _DTYPE:
                if not _PLAIN.fullmatch(_text(code)):
                    raise _refusal(self.path, f"an array of dtype {_text(code)[:20]}")
                return _Type(_text(code))
            case _Name(name=known), (str() as text, "latin1" | "latin-1") if known == _ENCODE:
                return text.encode("latin-1")
            case _Name(name=known), (_Type(code=code), bytes() as content) if known == _SCALAR:
                (number,) = np.frombuffer(content, code)
                return number.item()
            case _Name(name=known), () if known == _NO_BYTES:
                return b""
            case _Name(name=known), (content, _Type() as dtype, tuple() as shape, "C" | "F" as order) if (
                known == _FROM_BUFFER
            ):
                return self._build(_Array(), (1, shape, dtype, order == "F", content))
        raise _refusal(self.path, f"a call of {name.name if isinstance(name, _Name) else _kind(name)}")

    def _build(self, target: Any, state: Any) -> Any:
        """An element type with its byte order, or an array with its elements."""
        match target, state:
            case _Type(), (
                int(),
                "<" | ">" | "|" | "=" | b"<" | b">" | b"|" | b"=" as order,
                None,
                None,
                None,
                *_,
            ):
                target.code = _text(order) + target.code.lstrip("<>=|")
                return target
            case _Array(), (
                int(),
                tuple() as shape,
                _Type() as dtype,
                bool() | int() as fortran,
                content,
            ) if isinstance(content, bytes | _Span) and all(isinstance(length, int) for length in shape):
                target.shape, target.dtype, target.fortran, target.content = (
                    shape,
                    dtype,
                    bool(fortran),
                    content,
                )
                return target
        raise _refusal(self.path, f"the state of a {_kind(target)}")
