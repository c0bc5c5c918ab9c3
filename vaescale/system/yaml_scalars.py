"""YAML scalars as a person means them, before YAML 1.1 resolves them.

YAML 1.1 reads 012 as 10, 1:30 as 90, 0b11 as 3 and 20261127_142530 as 20261127142530, and `yes` as true. Text stays text
here, and a number that is not decimal is refused.
"""

import re
from collections.abc import Callable, Sequence

import yaml

NULLS = ("", "~", "null", "Null", "NULL")
TEXT = "tag:yaml.org,2002:str"
NUMBER = re.compile(r"[-+]?\d[\d_:.]*|[-+]?0[xob][\da-fA-F_]+")
DECIMAL = re.compile(r"[-+]?(0|[1-9][\d_]*|\d+(?=\.))(\.[\d_]*)?")
LONGEST = 1 << 20


class AmbiguousNumberError(ValueError):
    """A number that is not decimal: `key` with dots, `text` as it is written, and `value` as YAML 1.1 reads it."""

    def __init__(self, key: str, text: str) -> None:
        self.key, self.text, self.value = key, text, yaml.safe_load(text)
        super().__init__(f"{key} is {text!r}")


def as_meant(text: str, holds_text: Callable[[Sequence[str]], bool], *, above: Sequence[str] = ()) -> str:
    """The same YAML document, with the scalars of keys that hold text in quotes.

    holds_text: whether a key, as a list of its parts, holds text. above: the parts of the key that holds the document. Raises
    AmbiguousNumberError for a number that is not decimal, and yaml.YAMLError for text that is no YAML. Returns a text of more than
    1 MiB as it is.
    """
    if len(text) > LONGEST:
        return text
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    if document is None or not _quote(document, list(above), holds_text, set()):
        return text
    written: str = yaml.serialize(document, allow_unicode=True, width=2**31)
    return written


def _quote(
    node: yaml.Node, key: list[str], holds_text: Callable[[Sequence[str]], bool], seen: set[int]
) -> bool:
    """Put the scalars of a node in quotes where the key holds text. Returns whether there was one."""
    if id(node) in seen:  # an alias
        return False
    seen.add(id(node))
    below: list[tuple[yaml.Node, list[str]]] = []
    if isinstance(node, yaml.MappingNode):
        below = [(value, [*key, str(name.value)]) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        below = [(value, key) for value in node.value]
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.value not in NULLS:
        if key and holds_text(key):
            node.tag, node.style = TEXT, "'"
            return True
        if NUMBER.fullmatch(node.value) and not DECIMAL.fullmatch(node.value) and node.tag != TEXT:
            raise AmbiguousNumberError(".".join(key), node.value)
    changed = False
    for value, path in below:
        changed |= _quote(value, path, holds_text, seen)
    return changed
