"""The base of every recipe section: frozen, nothing unknown, nothing infinite."""

import re
from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Config(BaseModel):
    """A recipe section. Unknown keys, NaN, Inf and truth values posing as numbers are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _no_bool_as_number(cls, values: Any) -> Any:
        # YAML 1.1 reads `yes` and `on` as true, and pydantic would take true for 1.
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(
                    f"{name} (={value}) is a truth value, which YAML makes of yes, no, on and off; quote it or write a number"
                )
        return values


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """`{"data": {"train": 1}}` to `{"data.train": 1}`."""
    if not isinstance(content, dict):
        return {prefix: content}
    parts = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in content.items()]
    return {key: value for part in parts for key, value in part.items()}


UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def parse_bytes(value: Any) -> Any:
    """100MB, 1.5GiB or a number of bytes. Raises ValueError for other words."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", value.strip().upper())
    if match is None or match[2] not in UNITS:
        raise ValueError("give a number of bytes or a size such as 100MB")
    return int(float(match[1]) * UNITS[match[2]])


def one_of(sections: Iterable[type[Config]], *, default: str | None = None) -> Any:
    """The type of a recipe section that comes in several kinds, told apart by its `kind:` field; default: where it is not
    given.
    """
    members = tuple(sections)
    if default is None:
        return Annotated[reduce(or_, members), Field(discriminator="kind")]

    def with_kind(values: Any) -> Any:
        return {"kind": default, **values} if isinstance(values, dict) else values

    return Annotated[reduce(or_, members), Field(discriminator="kind"), BeforeValidator(with_kind)]
