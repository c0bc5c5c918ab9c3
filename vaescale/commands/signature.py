"""Arguments of the verbs' functions, checked by their annotations before the function does anything."""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, cast

from pydantic import ConfigDict, Field, ValidationError, validate_call

from vaescale.errors import UserError
from vaescale.system import collector
from vaescale.system.arguments import MOST_JOBS

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# The bounds are those of the options in `tools/`.
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Jobs = Annotated[int, Field(ge=1, le=MOST_JOBS)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]

BOUNDS = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "True or False",
    "bool_parsing": "True or False",
    "string_type": "a string",
    "path_type": "a path",
    "is_instance_of": "a {class}",
    "sequence_str": "a list or a tuple of values",
}
"""What a value must be, by the type of pydantic's fault, with the values of its context."""


def checked(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Check the arguments of each call by the function's annotations, as pydantic reads them.

    A value that the annotations do not allow raises UserError, which names the argument, the value and what is allowed. An
    unknown or missing argument raises TypeError. Paths may be strings or what stands for a path, such as an opened run, and whole numbers
    may be numpy's.
    """
    signature = inspect.signature(function)
    unchecked = cast(Callable[..., Result], function)

    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    @functools.wraps(unchecked)
    def validated(**arguments: Any) -> dict[str, Any]:
        return arguments

    @functools.wraps(function)
    def call(*positional: Parameters.args, **named: Parameters.kwargs) -> Result:
        given = {
            name: value if name == "self" else _plain(value)
            for name, value in signature.bind(*positional, **named).arguments.items()
        }
        try:
            arguments = cast(Callable[..., dict[str, Any]], validated)(**given)
        except ValidationError as error:
            raise UserError(_sentence(error.errors()[0])) from None
        collector.start()
        return unchecked(**arguments)

    return call


def _plain(value: Any) -> Any:
    """The value; of what stands for a path without being one, the path as a string."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
    return os.fspath(value) if isinstance(value, os.PathLike) and not isinstance(value, Path) else value


def _sentence(fault: Mapping[str, Any]) -> str:
    """The argument's name, its value and what it must be."""
    name, kind, context = fault["loc"][0], fault["type"], fault.get("ctx", {})
    if kind == "value_error":
        requirement = f"must {context['error']}"
    elif kind == "too_short":
        requirement = f"must have {context['min_length']} value{'s'[: context['min_length'] > 1]} at least"
    elif kind in BOUNDS:
        requirement = f"must be {BOUNDS[kind].format(**context)}"
    else:
        requirement = f"is refused: {fault['msg']}"
    return f"{name} (={fault['input']!r}) {requirement}"
