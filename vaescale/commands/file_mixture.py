"""The mixture that a file of `compress --prior gmm` was made with: the run's, of which the run keeps a copy, since a later fit replaces it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from vaescale.aggregate.sampling import refuse_misfit
from vaescale.compression.bits_back import refuse_mixture, refuse_model
from vaescale.errors import UserError
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.gaussian import Mixture
from vaescale.system.console import say
from vaescale.trained import Trained

CodedPrior = Literal["standard", "gmm"]
KEPT = "compression"  # within a run folder; a folder for each mixture, with the beginning of its sha256 as its name


def chosen(trained: Trained) -> Mixture:
    """The mixture of fit-gmm for a run. Raises UserError where the run has none, and for a run whose prior none replaces."""
    refuse_model(trained.model)
    refuse_mixture(trained.model)
    mixture = mixture_files.load(trained.folder / "gmm", **trained.identity)
    refuse_misfit(mixture, trained.model, trained.folder)
    return mixture


def keep(trained: Trained, mixture: Mixture) -> None:
    """Copy a mixture to RUN/compression/SHA256. Prints a message where that is not possible."""
    sha256 = mixture_files.sha256(mixture)
    folder = _kept(trained, sha256)
    try:
        mixture_files.save(mixture, folder, {**trained.identity, "sha256": sha256})
    except OSError as error:
        say(
            f"{folder} cannot be written ({error.strerror}): the file can be decoded as long as {trained.folder / 'gmm'} has the mixture"
        )


def find(trained: Trained, sha256: str, file: Path) -> Mixture:
    """The run's mixture with a sha256: the copy, the chosen one or one of those that were compared. Raises UserError where it is missing."""
    for folder in _candidates(trained, sha256):
        try:
            mixture = mixture_files.load(folder)
        except UserError as error:
            say(f"{folder} is passed over: {error}")
            continue
        if mixture_files.sha256(mixture) == sha256:
            refuse_mixture(trained.model)
            refuse_misfit(mixture, trained.model, trained.folder)
            return mixture
    raise UserError(
        f"{trained.folder} has no mixture with the sha256 {sha256[:12]!r} that {file} was made with; copy {_kept(trained, sha256)} from "
        "where the file was written"
    )


def _candidates(trained: Trained, sha256: str) -> Iterator[Path]:
    """The folders that hold a mixture."""
    gmm = trained.folder / "gmm"
    of_number = [gmm / f"components-{number}" for number in mixture_files.compared(gmm)]
    for folder in (_kept(trained, sha256), gmm, *of_number):
        if (folder / mixture_files.DETAILS).is_file():
            yield folder


def _kept(trained: Trained, sha256: str) -> Path:
    return trained.folder / KEPT / sha256[:12]
