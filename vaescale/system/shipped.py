"""Files that come with the package: recipes, and layouts of training under `backends`."""

import difflib
from pathlib import Path

from vaescale.errors import UserError

PREFIX = "vaescale:"
BACKENDS = "backends"
NO_RECIPES = (BACKENDS, "slurm", "kubernetes")  # folders of other files
MOST_LISTED = 20


def shipped_folder() -> Path:
    """The folder `recipes`, in the source tree or in the installed package."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_file(name: str, folder: str = "") -> Path:
    """A YAML file: the path itself if such a file exists, else the file of this name among those that come with the package.

    name: a path, or `zero2` in the folder `backends`, or `vaescale:digits/optimal`. Raises UserError that names the
    nearest or lists the names, if there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    place = shipped_folder() / folder
    names = _names(place)
    wanted = name.removeprefix(PREFIX).removesuffix(".yaml")
    if wanted in names:
        return place / f"{wanted}.yaml"
    prefix = "" if folder else PREFIX
    near = difflib.get_close_matches(wanted, names, n=1)
    if len(names) > MOST_LISTED:
        names = [f"{group}/..." for group in sorted({one.partition("/")[0] for one in names})]
    raise UserError(
        f"{name!r} is neither a file nor one of {', '.join(prefix + one for one in names)}"
        + (f"; did you mean {prefix}{near[0]}?" if near else "")
    )


def _names(place: Path) -> list[str]:
    """The YAML files below a folder, by path and without .yaml."""
    paths = (file.relative_to(place).with_suffix("") for file in place.rglob("*.yaml"))
    return sorted(path.as_posix() for path in paths if path.parts[0] not in NO_RECIPES)
