"""Sources of images: one module per source, and the dict that names them.

To add a source: a module with a function that returns a `Source`, and a line in SOURCES.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vaescale.data.making.sources.base import Source, with_val
from vaescale.data.making.sources.celeba import celeba
from vaescale.data.making.sources.digits import digits
from vaescale.data.making.sources.folder import folder
from vaescale.data.making.sources.hugging_face import hugging_face
from vaescale.data.making.sources.idx import idx
from vaescale.data.making.sources.imagenet import imagenet
from vaescale.data.tars import TarFault
from vaescale.errors import DataError, UserError


class Kind(NamedTuple):
    """A kind of source. takes: what follows `KIND:` on the command line, the argument of `open`."""

    open: Callable[..., Source]
    takes: Literal["nothing", "path", "name"] = "path"

    def form(self, name: str) -> str:
        """The form of the argument, as a user types it."""
        return name + {"nothing": "", "path": ":PATH", "name": ":NAME[:SPLIT]"}[self.takes]


SOURCES: dict[str, Kind] = {
    "digits": Kind(digits, "nothing"),
    "idx": Kind(idx),
    "folder": Kind(folder),
    "celeba": Kind(celeba),
    "imagenet": Kind(imagenet),
    "hf": Kind(hugging_face, "name"),
}


def open_source(
    argument: str, *, holdout: float = 0.05, config: str | None = None, column: str | None = None
) -> Source:
    """The source that `KIND:PATH` names.

    holdout: the fraction of train that becomes `val` where a source has no `val`; the image's key decides which images.
    config, column: the configuration and the columns of a hub data set, the latter as image=NAME,label=NAME. Raises
    UserError and DataError.
    """
    name, colon, rest = argument.partition(":")
    kind = SOURCES.get(name)
    if kind is None or (kind.takes != "nothing") != bool(colon and rest):
        forms = ", ".join(known.form(name) for name, known in SOURCES.items())
        near = f"did you mean folder:{argument}? " if Path(argument).is_dir() else ""
        raise UserError(f"source {argument!r} is unknown; {near}known sources: {forms}")
    try:
        source = kind.open(**_arguments(kind, rest, config=config, column=column))
    except (TarFault, RuntimeError) as error:  # a broken ImageNet tar; a `~user` that does not exist
        raise DataError(f"{rest}: {error}") from error
    return with_val(source, holdout)


def _arguments(kind: Kind, rest: str, *, config: str | None, column: str | None) -> dict[str, Any]:
    """The arguments of a kind's function. Raises DataError for a path that does not exist."""
    if column is not None and kind.takes != "name":
        raise UserError("--column names columns of an hf: data set; leave it out for other sources")
    if kind.takes == "nothing":
        return {}
    if kind.takes == "name":
        return {"name": rest, "config": config, "column": column}
    path = Path(rest).expanduser()
    if not path.exists():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"{path} does not exist{where}; give the folder that holds the images")
    return {"path": path}
