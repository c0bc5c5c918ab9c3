"""Modules from outside that add kinds to vaescale: those of `--import`, and those that installed packages offer.

Only the user decides what is imported: by `--import MODULE`, by VAESCALE_IMPORT, or by installing a package with an entry point of the group
`vaescale.plugins`. A run folder names the modules that it was made with, and never causes an import: it may come from anybody.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vaescale.errors import UserError
from vaescale.system.console import say

GROUP = "vaescale.plugins"
VARIABLE = "VAESCALE_IMPORT"
"""The environment variable with the modules of `--import`, separated by commas; processes that a verb starts inherit it."""

_imported: list[str] = []
_installed_are_loaded = False


class Origin(NamedTuple):
    """The module that a kind from outside comes from: the name to import, and the sha256 of the file with its class ("" if unknown)."""

    module: str
    sha256: str


def import_named(names: Sequence[str]) -> None:
    """Import the modules of VAESCALE_IMPORT and these, by name or as a path of a .py file, and pass them on to started processes.

    The current folder is searched after the installed packages. Raises UserError for a module that is missing, or fails.
    """
    every = list(dict.fromkeys([*named(), *(_lasting(name) for name in names)]))
    if not every:
        return
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in every:
        _import(name)
    os.environ[VARIABLE] = ",".join(every)


def named() -> list[str]:
    """The modules that this process was told to import, by `--import` or VAESCALE_IMPORT."""
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def import_installed() -> None:
    """Import what installed packages offer in the group `vaescale.plugins`, once. One that fails is reported and left out."""
    global _installed_are_loaded
    if _installed_are_loaded:
        return
    _installed_are_loaded = True
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
            _imported.append(entry.module)
        except Exception as error:  # whatever a module of somebody else may raise
            if os.environ.get("RANK", "0") == "0":
                say(f"the plugin {entry.name} ({entry.value}) is left out: {_fault(error)}")


def origin_of(kind: type) -> Origin | None:
    """Where a class from outside comes from; None of vaescale's own."""
    root = kind.__module__.partition(".")[0]
    if root == "vaescale":
        return None
    named = [name for name in _imported if name.partition(".")[0] == root]
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    content = Path(file).read_bytes() if file and Path(file).is_file() else b""
    return Origin(
        named[0] if named else kind.__module__, hashlib.sha256(content).hexdigest() if content else ""
    )


def is_imported(module: str) -> bool:
    """Whether a module was imported in this process, by whatever way."""
    return module in sys.modules


def _lasting(name: str) -> str:
    """The name, or the absolute path of a .py file, which holds in other working folders too."""
    return os.path.abspath(name) if name.endswith(".py") else name


def _import(name: str) -> None:
    module = name
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise UserError(
                f"--import {name} does not exist; give the name of a module or the path of a .py file"
            )
        module = path.stem
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        known = sys.modules.get(module)
        spec = known.__spec__ if known else importlib.util.find_spec(module)
        if spec is None or spec.origin != str(path):
            raise UserError(f"--import {name} has the name of another module ({module}); rename the file")
    try:
        importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever a user's module may raise
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            raise UserError(
                f"--import {module}: there is no such module in {os.getcwd()} or among the installed packages; give its name without .py, "
                "or the path of the file"
            ) from None
        raise UserError(f"--import {module} fails: {_fault(error)}") from error
    if module not in _imported:
        _imported.append(module)


def _fault(error: Exception) -> str:
    """The fault in one line, with the file and line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({last[0].filename}, line {last[0].lineno})" if last else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
