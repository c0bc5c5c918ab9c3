"""Extractors of the features by which images are compared. Scores are comparable only with the same extractor.

pixels              the pixel values, for small images
DIR                 a classifier that `vaescale train-features` trained; of sequences, one of frames and one of videos
inception[:FILE]    torchmetrics' Inception v3 (torch-fidelity's weights), the FID of the literature
FILE.pt2            a module that `torch.export.save` wrote: [B, C, H, W] in [0, 1] to [B, F]; it is a program and must be trusted
"""

import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaescale.errors import UserError
from vaescale.perceptual import classifier, video_classifier

MOST_PIXELS = 4096
INCEPTION = "inception"
INCEPTION_SHA256 = "6726825d"  # first digits of the hash
INCEPTION_FILE = (
    f"weights-inception-2015-12-05-{INCEPTION_SHA256}.pth"  # as torch-fidelity names it in torch's cache
)
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Extractor(NamedTuple):
    """A function from images to features.

    name: name for files and metrics. description: phrase for the protocol. identity: hash of everything that determines the
    features. of: images [B, C, H, W] in [0, 1] to features [B, F].
    """

    name: str
    description: str
    identity: str
    of: Callable[[Tensor], Tensor]


def open_video_extractor(
    name: str, *, image_shape: tuple[int, int, int], frames: int, device: torch.device
) -> Extractor | None:
    """Open the extractor of sequences [B, T, C, H, W] in [0, 1] that is in the folder of a classifier of their frames.

    None where the name is not that of a folder with one. frames: T. Raises UserError for features of another T or shape.
    """
    folder = Path(name)
    if not (folder / video_classifier.DETAILS).is_file():
        return None
    frame, shape, details = classifier.load(folder)
    _refuse_other_shape(folder, shape, image_shape)
    model, known = video_classifier.load(folder, frame, shape, details["sha256"])
    if known.frames != frames:
        raise UserError(
            f"the features in {folder} are of videos of {known.frames} frames, these have {frames}; train features with `vaescale train-features "
            f"DIR --frames {frames}`"
        )
    for network in (frame, model):
        network.to(device)
    description = (
        f"the {model.size} features of a classifier of {shape.classes} classes and of the order of frames, of videos of {frames} frames "
        f"({folder.name}, held-out accuracy {known.accuracy}, of the order {known.order_accuracy})"
    )
    return Extractor(folder.name, description, known.identity, model.features)


def open_extractor(
    name: str, *, image_shape: tuple[int, int, int], device: torch.device, trusted: bool = False
) -> Extractor:
    """Open an extractor by its name (see the module docstring), for images of this shape.

    trusted: whether FILE.pt2, a program, may run. Raises UserError for features that are missing, do not fit or are not
    trusted.
    """
    kind, _, location = name.partition(":")
    if name == "pixels":
        return _pixels(image_shape)
    if kind == INCEPTION:
        if image_shape[0] not in (1, 3):
            raise UserError(
                f"Inception takes images of 1 or 3 channels, these have {image_shape[0]}; give --features pixels, or train features"
            )
        return _inception(location, device)
    if name.endswith(".pt2"):
        return _exported(Path(name), image_shape, device, trusted=trusted)
    return _trained(Path(name), image_shape, device)


def _pixels(image_shape: tuple[int, int, int]) -> Extractor:
    values = image_shape[0] * image_shape[1] * image_shape[2]
    if values > MOST_PIXELS:
        raise UserError(
            f"--features pixels allows images of at most {MOST_PIXELS} values, these have {values}; train features on a "
            f"labelled data set with `vaescale train-features`"
        )
    return Extractor("pixels", f"the {values} values of an image, in [0, 1]", f"pixels {values}", _flat)


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1).float()


def _trained(folder: Path, image_shape: tuple[int, int, int], device: torch.device) -> Extractor:
    model, shape, details = classifier.load(folder)
    _refuse_other_shape(folder, shape, image_shape)
    model.to(device)
    accuracy = str(details.get("accuracy"))
    if "balanced_accuracy" in details:
        accuracy += f", balanced {details['balanced_accuracy']}, share of the largest class {details['majority_share']}"
    description = f"the {model.size} features of a classifier of {shape.classes} classes ({folder.name}, held-out accuracy {accuracy})"
    return Extractor(folder.name, description, details["sha256"], model.features)


def _refuse_other_shape(folder: Path, shape: classifier.Shape, image_shape: tuple[int, int, int]) -> None:
    if shape.image_shape != image_shape:
        raise UserError(
            f"the features in {folder} are for {'x'.join(map(str, shape.image_shape))} images, these are "
            f"{'x'.join(map(str, image_shape))}; train features on images of this shape"
        )


def _inception(location: str, device: torch.device) -> Extractor:
    path = Path(location) if location else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    instead = "or train features on your own images: `vaescale train-features DIR`"
    if not path.is_file():
        raise UserError(
            f"Inception's weights are not at {path}; fetch {INCEPTION_FILE} of torch-fidelity and give "
            f"--features inception:FILE, {instead}"
        )
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        with no_code_from_pickles():
            module: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    except ModuleNotFoundError as error:
        raise UserError(
            f"Inception needs torch-fidelity and torchvision ({error.name or 'torch-fidelity'} is missing); `pip install torch-fidelity torchvision`, "
            f"{instead}"
        ) from None
    except Exception as error:  # a damaged file or a mismatched torchvision may raise anything
        raise UserError(
            f"Inception cannot be built from {path} ({type(error).__name__}: {str(error).partition(chr(10))[0]}); fetch "
            f"{INCEPTION_FILE} of torch-fidelity again, {instead}"
        ) from error
    module = module.to(device)

    def features(images: Tensor) -> Tensor:
        levels = (
            (255 * images).round().byte().expand(-1, 3, -1, -1)
        )  # of 8 bits, whatever the depth of the images
        output: Tensor = module(levels)
        return output.float()

    identity = hashlib.sha256(path.read_bytes()).hexdigest()
    weights = "torch-fidelity's weights"
    if not identity.startswith(INCEPTION_SHA256):
        weights = f"weights that are not torch-fidelity's (sha256 {identity[:12]}), so not the FID of the literature"
    description = f"Inception v3, 2048 features, {weights}, torch-fidelity's resizing, through torchmetrics"
    return Extractor(INCEPTION, description, identity, features)


@contextmanager
def no_code_from_pickles() -> Iterator[None]:
    """Make torch load only tensors in this context, even where a library, such as torch-fidelity, asks for full unpickling."""
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        os.environ.pop(WEIGHTS_ONLY)
        os.environ |= {WEIGHTS_ONLY: before} if before is not None else {}


@contextmanager
def _faults_of_export() -> Iterator[list[BaseException]]:
    """Collect the exceptions that torch.export logs with a traceback before it raises another one."""
    faults: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1]:
            faults.append(record.exc_info[1])
        return not record.exc_info

    logger = logging.getLogger("torch.export")
    logger.addFilter(keep)
    try:
        yield faults
    finally:
        logger.removeFilter(keep)


def _refuse_misfit(
    features: Callable[[Tensor], Tensor], path: Path, image_shape: tuple[int, int, int], device: torch.device
) -> None:
    """Raise UserError unless batches of two and three images of this shape give as many rows of features."""
    shape = "x".join(map(str, image_shape))
    sizes = set()
    for count in (2, 3):
        try:
            with torch.no_grad():
                output = features(torch.zeros(count, *image_shape, device=device))
            sizes.add(output.shape[1])
            fault = "" if len(output) == count and output.shape[1] else f"gives {list(output.shape)}"
        except Exception as error:  # a program may raise anything
            fault = f"says {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if fault or len(sizes) > 1:
            raise UserError(
                f"{path} does not map {count} images of {shape} to features ({fault or 'their number varies'}); export it for images "
                f"of this shape, with dynamic_shapes for the batch"
            )


def _exported(
    path: Path, image_shape: tuple[int, int, int], device: torch.device, *, trusted: bool
) -> Extractor:
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file that torch.export.save wrote")
    if not trusted:
        raise UserError(
            f"{path} is a program and could do anything; if you trust its author, give --trust-features"
        )
    with _faults_of_export() as faults:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module: nn.Module = torch.export.load(str(path)).module().to(device)
        except Exception as error:  # a damaged file may raise anything
            fault = faults[-1] if faults else error
            remedy = "on a CPU, or use it on a machine with a GPU" if "CUDA" in str(fault) else "again"
            reason = " ".join(str(fault).split())
            raise UserError(
                f"{path} cannot be loaded ({type(fault).__name__}: {reason}); export it {remedy}"
            ) from error

    def features(images: Tensor) -> Tensor:
        output: Tensor = module(images.float())
        return output.flatten(1).float()

    _refuse_misfit(features, path, image_shape, device)
    identity = hashlib.sha256(path.read_bytes()).hexdigest()
    return Extractor(
        path.stem, f"the exported module {path.name} (sha256 {identity[:12]})", identity, features
    )
