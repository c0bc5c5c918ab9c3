"""`RUN/plugins.json`: the kinds of a run's recipe that come from modules outside of vaescale, so that later verbs can name a missing one.

The file causes no import: a run folder may come from anybody, and an import runs code. The user imports, with `--import`.
"""

from collections.abc import Mapping
from pathlib import Path

from vaescale.config import Config
from vaescale.errors import UserError
from vaescale.runs import folder as run_folder
from vaescale.system.console import say
from vaescale.system.plugins import Origin, is_imported, origin_of

FILE = "plugins.json"


def origins_of(sections: Mapping[str, Config]) -> dict[str, dict[str, str]]:
    """The kind, module and sha256 of each section of a recipe that is not vaescale's own, by section."""
    found: dict[str, Origin | None] = {name: origin_of(type(section)) for name, section in sections.items()}
    return {
        name: {"kind": str(getattr(sections[name], "kind", "")), **origin._asdict()}
        for name, origin in found.items()
        if origin is not None
    }


def record(folder: Path, sections: Mapping[str, Config]) -> None:
    """Write the file, where a recipe has kinds from outside."""
    origins = origins_of(sections)
    if origins:
        run_folder.write_json(folder / FILE, origins)
    else:
        (folder / FILE).unlink(missing_ok=True)


def refuse_missing(folder: Path) -> None:
    """Raise UserError when a run needs a module that is not imported."""
    for section, origin in run_folder.read_json(folder / FILE).items():
        module = str(origin.get("module", ""))
        if not is_imported(module):
            raise UserError(
                f"{folder} has the {section} {origin.get('kind')!r} of the module {module}, which is not imported: add `--import {module}`, or "
                f"in Python `import {module}` first (vaescale imports nothing because a run folder names it)"
            )


def tell_changes(folder: Path, sections: Mapping[str, Config]) -> None:
    """Say which modules have changed since the run was made."""
    recorded = run_folder.read_json(folder / FILE)
    for section, origin in origins_of(sections).items():
        before, now = recorded.get(section, {}).get("sha256"), origin["sha256"]
        if before and before != now:
            say(
                f"{folder} was made with another version of {origin['module']} ({section} {origin['kind']!r}, sha256 {before[:12]} -> "
                f"{now[:12]})"
            )
