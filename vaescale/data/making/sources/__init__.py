"""Sources of images: one module per source, and the dict that names them.

To add a source: a module with a function that returns a `Source`, and a line in SOURCES.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vaescale.config import Dtype, Size
from vaescale.data.making.sources.arrays import arrays
from vaescale.data.making.sources.bair import bair
from vaescale.data.making.sources.base import Source, Split, with_val
from vaescale.data.making.sources.celeba import celeba
from vaescale.data.making.sources.cifar import cifar
from vaescale.data.making.sources.digits import digits
from vaescale.data.making.sources.folder import folder
from vaescale.data.making.sources.frame_folders import frame_folders
from vaescale.data.making.sources.hugging_face import hugging_face
from vaescale.data.making.sources.idx import idx
from vaescale.data.making.sources.imagenet import imagenet
from vaescale.data.making.sources.lsun import lsun
from vaescale.data.making.sources.moving_mnist import moving_mnist
from vaescale.data.making.sources.phantom import phantom
from vaescale.data.making.sources.stacked import stacked
from vaescale.data.making.sources.suggestions import refuse_stacks, suggest
from vaescale.data.tars import TarFault
from vaescale.errors import DataError, UserError
from vaescale.system.plugins import import_installed


class Kind(NamedTuple):
    """A kind of source. takes: what follows `KIND:` on the command line, the argument of `open`. options: its other ones.

    needs: what is at its path, for messages.
    """

    open: Callable[..., Source]
    takes: Literal["nothing", "path", "name"] = "path"
    options: tuple[str, ...] = ()
    needs: str = "the folder that holds the images"

    def form(self, name: str) -> str:
        """The form of the argument, as a user types it."""
        return name + {"nothing": "", "path": ":PATH", "name": ":NAME[:SPLIT]"}[self.takes]


SOURCES: dict[str, Kind] = {
    "digits": Kind(digits, "nothing", options=("dtype",)),
    "idx": Kind(idx, needs="the folder of the idx files"),
    "folder": Kind(folder, options=("splits", "classes_only")),
    "celeba": Kind(celeba),
    "imagenet": Kind(imagenet),
    "lsun": Kind(lsun),
    "hf": Kind(hugging_face, "name", options=("config", "column")),
    "arrays": Kind(
        arrays,
        options=("column", "dtype"),
        needs="a .npz, .npy, .mat or .h5 file, or the folder of the files",
    ),
    "cifar": Kind(cifar, options=("column",), needs="the folder of the batches, or one above it"),
    "phantom": Kind(phantom, "nothing", options=("dtype",)),
    "stacked": Kind(stacked, needs="the folder of the idx files"),
    "frames": Kind(
        frame_folders,
        options=("window", "stride"),
        needs="the folder that holds a folder of frames for each clip",
    ),
    "bair": Kind(bair, options=("column",), needs="the folder that holds train and test"),
    "moving-mnist": Kind(
        moving_mnist,
        options=("frames", "size", "count", "deterministic"),
        needs="the folder of the idx files",
    ),
}


def open_source(
    argument: str,
    *,
    holdout: float | None = None,
    config: str | None = None,
    column: str | None = None,
    splits: str | None = None,
    classes_only: bool = False,
    dtype: Dtype = "uint8",
    size: Size | None = None,
    frames: int | None = None,
    count: int | None = None,
    deterministic: bool = False,
    window: int | None = None,
    stride: int | None = None,
) -> Source:
    """The source that `KIND:PATH` names.

    holdout: the fraction of train that becomes `val` where a source has no `val`; the image's key decides which images.
    None: 5% where train is the only split, otherwise nothing. config: the configuration of a hub data set. column: its columns, or
    the keys of arrays, as image=NAME,label=NAME. splits: folders of a folder's splits, as train=DIR,val=DIR;
    classes_only: all its sub-folders are classes. dtype: the type of the values that are wanted. size, frames, count,
    deterministic: of sequences that are made; window, stride: of those that are cut of clips. Raises UserError and DataError.
    """
    import_installed()
    name, colon, rest = argument.partition(":")
    kind = SOURCES.get(name)
    if kind is None or (kind.takes != "nothing") != bool(colon and rest):
        forms = ", ".join(known.form(name) for name, known in SOURCES.items())
        suggestion = suggest(_expanded(argument))
        near = f"did you mean {suggestion}? " if suggestion else ""
        raise UserError(f"source {argument!r} is unknown; {near}known sources: {forms}")
    try:
        options: dict[str, Any] = {
            "column": column,
            "config": config,
            "splits": splits,
            "classes_only": classes_only or None,
        }
        options |= {"frames": frames, "count": count, "deterministic": deterministic or None}
        options |= {"window": window, "stride": stride}
        options |= {"dtype": dtype} if "dtype" in kind.options else {}
        options |= {"size": size} if "size" in kind.options else {}
        source = kind.open(**_arguments(kind, rest, options))
    except DataError as error:
        raise _with_suggestion(error, name, rest) from error
    except (TarFault, RuntimeError) as error:  # a broken ImageNet tar; a `~user` that does not exist
        raise _with_suggestion(DataError(f"{rest}: {error}"), name, rest) from error
    if kind.takes == "path":
        source = source._replace(
            splits={each: partial(_listed, split, name, rest) for each, split in source.splits.items()}
        )
    return with_val(source, holdout)


def _listed(split: Callable[[], Split], kind: str, rest: str) -> Split:
    """The split. Raises DataError with the kind that reads the path, where it is another one."""
    try:
        listed = split()
        if kind == "folder":
            refuse_stacks(listed)
    except DataError as error:
        raise _with_suggestion(error, kind, rest) from error
    return listed


def _with_suggestion(error: DataError, kind: str, rest: str) -> DataError:
    """The error; where the path holds the files of another kind only, that kind is the remedy."""
    suggestion = suggest(_expanded(rest), wrong=kind) if SOURCES[kind].takes == "path" else None
    if suggestion is None or "did you mean" in str(error):
        return error
    return DataError(f"{str(error).partition('; ')[0]}; did you mean {suggestion}?")


def _expanded(text: str) -> Path:
    """The path of a text, with `~` where there is such a user."""
    return Path(os.path.expanduser(text))


def _arguments(kind: Kind, rest: str, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a kind's function. Raises DataError for a path that does not exist."""
    given = {name: value for name, value in options.items() if value is not None}
    if unused := sorted(given.keys() - set(kind.options)):
        *others, last = [f"{name}:" for name, known in SOURCES.items() if unused[0] in known.options]
        kinds = f"{', '.join(others)} and {last}" if others else last
        raise UserError(f"--{unused[0].replace('_', '-')} is for {kinds} sources; leave it out")
    if kind.takes == "nothing":
        return given
    if kind.takes == "name":
        return {"name": rest, **given}
    path = Path(rest).expanduser()
    if not path.exists():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise DataError(f"{path} does not exist{where}; give {kind.needs}")
    return {"path": path, **given}
