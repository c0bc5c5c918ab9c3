"""Files that come with the package: recipes, and layouts of training under `backends`."""

import difflib
from pathlib import Path

from vaescale.errors import UserError

PREFIX = "vaescale:"
BACKENDS = "backends"


def shipped_folder() -> Path:
    """The folder `recipes`, in the source tree or in the installed package."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_file(name: str, folder: str = "") -> Path:
    """A YAML file: the path itself if such a file exists, else the file of this name among those that come with the package.

    Raises UserError that lists the names, if there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    place = shipped_folder() / folder
    names = sorted(file.relative_to(place).with_suffix("").as_posix() for file in place.rglob("*.yaml"))
    wanted = name.removeprefix(PREFIX).removesuffix(".yaml")
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=1)
        raise UserError(
            f"{name!r} is neither a file nor one of {', '.join(names)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return place / f"{wanted}.yaml"
