"""Write docs/recipe_reference.md: every key of a recipe, from the config classes that validate it.

python tools/docs/recipe_reference.py           write the page
python tools/docs/recipe_reference.py --check   exit with code 1 if the page is stale
"""

import argparse
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vaescale.conditions.config import CONDITIONS
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.models.config import POSTERIORS
from vaescale.networks.config import NETWORKS
from vaescale.objectives.config import OBJECTIVES
from vaescale.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "recipe_reference.md"
REGISTRIES: dict[str, Mapping[str, type[BaseModel]]] = {
    "network": NETWORKS,
    "posterior": POSTERIORS,
    "likelihood": LIKELIHOODS,
    "objective": OBJECTIVES,
    "condition": CONDITIONS,
}
BOUNDS = {Gt: "above {0.gt}", Ge: "at least {0.ge}", Lt: "below {0.lt}", Le: "at most {0.le}"}
SCALARS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
INTRODUCTION = """\
# Recipe reference

This page lists every key of a recipe. `python tools/docs/recipe_reference.py` writes it from the config classes that
validate recipes, and a test fails when it is out of date. Do not edit it by hand.

## How a recipe is read

1. A recipe is a YAML file. Each heading below is one section of it.
2. `base: FILE` names another recipe in the same folder, which must not have a base itself. Its keys are the defaults of
   this recipe. A section with another `kind` replaces the whole section of the base.
3. `KEY=VALUE` on the command line overrides a key, for example `optimizer.lr=1e-3` or `network.widths=[32,64]`.
   `likelihood.kind=bernoulli` changes the kind; the other keys of that section are then dropped, and required keys of
   the new kind must be given (`network.kind=conv network.latent_dim=16`).
4. `${KEY}` is replaced by the value of another key: `run_dir: runs/${name}`.
5. The result is validated. A key that is not in these tables is refused, and the message names the nearest valid key.
   NaN, Inf and truth values in place of numbers are refused. YAML reads an unquoted `yes`, `no`, `on` and `off` as
   truth values.

`vaescale train RECIPE --dry-run` prints the resolved recipe and stops.

In the tables, "required" in the default column means that the recipe must give the key. A section that comes in several
kinds has one table for each `kind`.
"""


class Section(NamedTuple):
    """One table of the page: a section of the recipe, its kind if it has several, and the class that validates it."""

    name: str
    kind: str | None
    config: type[BaseModel]


def sections() -> Iterator[Section]:
    """Every section of a recipe, in the order of Recipe's fields; a section of several kinds once for each kind."""
    for name, field in Recipe.model_fields.items():
        if name in REGISTRIES:
            for kind, entry in REGISTRIES[name].items():
                yield Section(name, kind, entry)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield Section(name, None, field.annotation)


def page() -> str:
    """The whole page as Markdown."""
    named = {section.name for section in sections()}
    top = {name: field for name, field in Recipe.model_fields.items() if name not in named}
    pieces = [INTRODUCTION, "## Top-level keys\n", _table(top), *_nested(top)]
    headed: set[str] = set()
    for name, kind, config in sections():
        if name not in headed:
            pieces.append(f"## `{name}:`\n")
            headed.add(name)
        if kind is not None:
            pieces.append(f"### `{name}: {{kind: {kind}}}`\n")
        fields = {key: field for key, field in config.model_fields.items() if key != "kind" or kind is None}
        pieces += [_summary(config), _table(fields), *_nested(fields)]
    return "\n".join(piece for piece in pieces if piece)


def _table(fields: dict[str, FieldInfo]) -> str:
    """One row a key: name, type, default, meaning."""
    if not fields:
        return "This kind has no other keys.\n"
    rows = [
        f"| `{key}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {_escaped(field.description or '')} |"
        for key, field in fields.items()
    ]
    return "\n".join(["| Key | Type | Default | Meaning |", "|---|---|---|---|", *rows]) + "\n"


def _nested(fields: dict[str, FieldInfo]) -> Iterator[str]:
    """A table for each section that is the value of a key, such as `beta: {schedule: ..., steps: ...}`."""
    for key, field in fields.items():
        for config in _configs(field.annotation):
            yield f"Keys of the section `{key}`: {_summary(config)}"
            yield _table(config.model_fields)
            yield from _nested(config.model_fields)


def _configs(annotation: Any) -> list[type[BaseModel]]:
    """The config classes that a type allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [config for member in get_args(annotation) for config in _configs(member)]


def _type(annotation: Any, metadata: list[Any] | None = None) -> str:
    """A type in words: `int | None` with Field(gt=0) to "integer above 0, or null"."""
    metadata = metadata or []
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [
            each
            for item in arguments[1:]
            for each in (item.metadata if isinstance(item, FieldInfo) else [item])
        ]
        return _type(arguments[0], [*inner, *metadata])
    if origin in (Union, types.UnionType):
        return ", or ".join(_type(member, metadata) for member in arguments)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return _list(arguments, metadata)
    if origin is dict:
        return f"map from {_type(arguments[0])} to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return SCALARS[annotation] + (_bounds(metadata) if annotation in (int, float) else "")


def _list(members: tuple[Any, ...], metadata: list[Any]) -> str:
    if members[-1] is not Ellipsis:
        return f"list of {len(members)}: {_type(members[0])}"
    lengths = [item for item in metadata if isinstance(item, MinLen | Len) and item.min_length]
    return f"list of {_type(members[0])}" + (", not empty" if lengths else "")


def _bounds(metadata: list[Any]) -> str:
    """Of a number: " above 0 and at most 1"."""
    given = [BOUNDS[type(item)].format(item) for item in metadata if type(item) in BOUNDS]
    return f" {' and '.join(given)}".replace(str(2**63), "2^63") if given else ""


def _default(field: FieldInfo) -> str:
    """The default as YAML writes it."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _summary(config: type[BaseModel]) -> str:
    """The first paragraph of a config class's docstring."""
    return _escaped(" ".join((config.__doc__ or "").strip().partition("\n\n")[0].split())) + "\n"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Write or check the page. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with code 1 if the page is stale"
    )
    fresh = page()
    if parser.parse_args().check:
        return int(not PAGE.is_file() or PAGE.read_text() != fresh)
    PAGE.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
