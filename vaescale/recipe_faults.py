"""What a recipe's validation found, as one sentence: the key, the value and what would be right."""

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from vaescale.config import OneOf

SECTION_EXAMPLES = {
    "Annealing": "a schedule, {schedule: linear, steps: 1000}",
    "Standardize": "moments, {mean: 0.47, sigma: 0.25}",
    "Decreasing": "a series, {first: 1.0, last: 0.05}",
}
SHAPES = {  # what to write for a key whose value has several shapes, of which pydantic names one
    "data.image_size": "give the side in pixels, or [height, width], such as [48, 96]",
    "data.range": "give the two stored values that become 0 and 1, such as [-1024, 3071]",
    "figures.channels": "name one channel, or three as red, green and blue, such as [3, 2, 1]",
}
REMEDIES = {
    "string_pattern_mismatch": "use letters, digits, '.', '_' and '-', and begin with a letter or digit",
}


def sentence(error: ValidationError, content: Any, root: type[BaseModel]) -> str:
    """The first fault as a sentence: the key, the value and what would be right."""
    faults = error.errors()
    fault = _clearest(faults)
    # pydantic's locations name union members besides keys.
    path = [key for key in fault["loc"] if isinstance(key, int) or key in _names(content)]
    key, value, kind = ".".join(map(str, path or fault["loc"])), fault["input"], fault["type"]
    if kind == "extra_forbidden":
        return _unknown_key(key, value, path, content, root)
    if kind == "missing":
        above = [key for key in fault["loc"][:-1] if isinstance(key, int) or key in _names(content)]
        section = ".".join(map(str, above))
        if section in SHAPES:  # a list that is too short
            return f"{section} is {value!r}; {SHAPES[section]}"
        missing = ".".join(map(str, [*above, fault["loc"][-1]]))
        return f"{missing} is missing; add it to the recipe or as {missing}=VALUE"
    if kind == "union_tag_not_found":
        return f"{key}.kind is missing; add it to the recipe"
    if kind == "value_error":
        # The message about a whole section names the key itself.
        is_section, message = isinstance(value, dict), fault["ctx"]["error"]
        return ".".join([*map(str, path), str(message)]) if is_section else f"{key} is {value!r}; {message}"
    if kind == "union_tag_invalid":
        key, value = f"{key}.kind", fault["ctx"]["tag"]
    if key in SHAPES and kind != "greater_than":
        return f"{key} is {value!r}; {SHAPES[key]}"
    return f"{key} is {value!r}; {_remedy(faults, fault, path, content, root)}"


def _clearest(faults: Sequence[Any]) -> Any:
    """The fault that describes best what a user did, among those that pydantic reports for one value."""
    first = faults[0]
    # Of a union of a number and words (`sigma: a number | optimal`), the fault that lists the words fits a word best.
    alike = [
        fault for fault in faults if fault["input"] is first["input"] and isinstance(fault["input"], str)
    ]
    fault = next((fault for fault in alike if fault["type"] == "literal_error"), first)
    # Of a union of a number and a section, the section's own faults fit a section best.
    within = [
        other for other in faults if len(other["loc"]) > len(first["loc"]) or other["type"] == "value_error"
    ]
    if isinstance(fault["input"], dict) and fault["type"] != "missing" and within:
        return within[0]
    # Of a union of text and a list of sections, the sections' own faults fit a list best.
    if isinstance(fault["input"], list) and fault["type"] == "string_type" and within:
        return _clearest(within)
    if fault["type"] == "missing":  # a mistyped key of the same section may be the one that is missing
        siblings = [other for other in faults if other["loc"][:-1] == fault["loc"][:-1]]
        return next((other for other in siblings if other["type"] == "extra_forbidden"), fault)
    return fault


def _unknown_key(key: str, value: Any, path: list[Any], content: Any, root: type[BaseModel]) -> str:
    known = _known_keys(root, content, path[:-1])
    word, colon, rest = str(path[-1]).partition(":")
    if colon and value is None and word in known:  # {kind:class} is one key without a value
        return f"unknown key {key}; YAML needs a space after the colon: {word}: {rest}"
    near = difflib.get_close_matches(str(path[-1]), known, 1, 0.8)
    if (elsewhere := _other_kinds(root, path)) and not near:
        kinds = f"which {path[0]}.kind {' or '.join(elsewhere)} has"
        return f"unknown key {key} (={value!r}), {kinds}; known here: {', '.join(known)}"
    return f"unknown key {key} (={value!r}); {_nearest(str(path[-1]), known, path[:-1])}"


def _remedy(faults: Sequence[Any], fault: Any, path: list[Any], content: Any, root: type[BaseModel]) -> str:
    """A remedy: what to write in place of a value."""
    kind, value = fault["type"], fault["input"]
    if kind in ("literal_error", "union_tag_invalid"):
        context = fault["ctx"]
        allowed = context["expected_tags"] if kind == "union_tag_invalid" else context["expected"]
        word = str(context["tag"] if kind == "union_tag_invalid" else value)
        return _nearest(word, allowed.replace("'", "").replace(" or ", ", ").split(", "), [])
    if kind in ("model_type", "model_attributes_type"):
        return f"it is a section with keys of its own: {', '.join(_known_keys(root, content, path))}"
    if kind == "tuple_type":
        return f"it is a list, such as [{value}]"
    if kind.startswith("float_") and (section := _section_instead(faults, fault)):
        return f"give a number or {section}"
    remedy = str(REMEDIES.get(kind, fault["msg"][0].lower() + fault["msg"][1:]))
    return (
        f"{remedy}; YAML's word for none is null"
        if isinstance(value, str) and value.lower() == "none"
        else remedy
    )


def _nearest(word: str, known: list[str], parents: list[Any]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    prefix = "".join(f"{parent}." for parent in parents)
    return f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(known)}"


def _known_keys(root: type[BaseModel], content: Any, parents: list[Any]) -> list[str]:
    """The keys of the section at `parents`. Of several kinds, the one that the recipe names counts."""
    section = root
    for key in parents:
        if isinstance(key, int):
            content = content[key] if isinstance(content, list) else None
            continue
        content = content.get(key) if isinstance(content, dict) else None
        kinds = kinds_of(section, key)
        named = content.get("kind") if isinstance(content, dict) else None
        section = next((kind for kind in kinds if _kind(kind) == named), kinds[0])
    return list(section.model_fields)


def kinds_of(section: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The section classes that a key of a section allows, in order; [] for a key with a plain value."""
    field = section.model_fields.get(key)
    if field is None:
        return []
    for annotation in field.metadata:
        if isinstance(annotation, OneOf):
            return list(annotation.kinds.values())
    members = get_args(field.annotation) or (field.annotation,)
    members = tuple(inner for one in members for inner in (get_args(one) or (one,)))  # of a list of sections
    return [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]


def _other_kinds(root: type[BaseModel], path: list[Any]) -> list[str]:
    """The kinds of a section that have the key at `path`, SECTION.KEY."""
    sections = kinds_of(root, path[0]) if len(path) == 2 else []
    return [str(_kind(section)) for section in sections if path[1] in section.model_fields]


def _section_instead(faults: Any, fault: Any) -> str:
    """An example of a section in place of a number; an empty string where the type allows none."""
    sections = [
        other for other in faults if other["type"] == "model_type" and other["input"] is fault["input"]
    ]
    if not sections:
        return ""
    name = sections[0]["ctx"]["class_name"]
    return SECTION_EXAMPLES.get(name, f"a section ({name})")


def _kind(section: type[BaseModel]) -> str | None:
    field = section.model_fields.get("kind")
    return None if field is None else field.default


def _names(content: Any) -> set[str]:
    """Every key that the recipe holds."""
    if isinstance(content, list):
        return set[str]().union(*(_names(value) for value in content))
    if not isinstance(content, dict):
        return set()
    return set(content).union(*(_names(value) for value in content.values()))
