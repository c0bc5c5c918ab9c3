"""The distance of two images in the maps of a frozen network. Zhang et al. 2018 (LPIPS), eq. 1.

    d(x, y) = sum_l  1/(H_l W_l) sum_places  sum_c  w_lc (f_lc(x) - f_lc(y))^2

where f_l are the maps of layer l, at each place divided by their length over the channels, and w the calibration of LPIPS, or 1 for
other networks. Equal to the `lpips` package with the same weights. Its gradient, other than the package's, is finite where all channels
of a place are 0.
"""

import hashlib
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from torch import Tensor, nn

from vaescale.errors import UserError
from vaescale.perceptual import classifier
from vaescale.perceptual.backbones import Lpips
from vaescale.perceptual.config import PROGRAM, PerceptualConfig

TINY = 1e-10  # added to a length


class Distance(nn.Module):
    """The distance [B] of images [B, C, H, W] in [0, 1]. Its network is frozen and belongs to no checkpoint.

    identity: sha256 of everything that determines the distance.
    """

    def __init__(self, network: nn.Module, *, identity: str, weights: dict[str, Tensor], repeat: int) -> None:
        super().__init__()
        self.network, self.identity, self._weights, self._repeat = network, identity, weights, repeat
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.layers: tuple[str, ...] | None = None
        self.autocast: torch.dtype | None = None  # precision of the network; lengths and sums are float32

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """d(x, y). Gradients go to y alone."""
        total = y.new_zeros(len(y), dtype=torch.float32)
        with torch.autocast(y.device.type, self.autocast, enabled=self.autocast is not None):
            with torch.no_grad():
                ours = self._maps(x)
            theirs = self._maps(y)
        with torch.autocast(y.device.type, enabled=False):
            for name, of_y in theirs.items():
                squared = (_unit(ours[name]) - _unit(of_y)).square()
                weight = self._weights.get(name)
                weighted = squared if weight is None else squared * weight.to(squared)
                total = total + weighted.sum(1).flatten(1).mean(1)
        return total

    def _maps(self, images: Tensor) -> dict[str, Tensor]:
        shown = images.expand(-1, 3, -1, -1) if self._repeat else images
        maps: dict[str, Tensor] = self.network(shown.float())
        return maps if self.layers is None else {name: maps[name] for name in self.layers}


def open_distance(
    config: PerceptualConfig, image_shape: tuple[int, int, int], device: torch.device
) -> Distance:
    """The distance of a recipe's section for images of this shape.

    Raises UserError for a file that is missing or damaged, or does not fit the images.
    """
    path = Path(config.features)
    if config.features.endswith(PROGRAM):
        distance = _program(config, path)
    elif path.is_dir():
        distance = _classifier(config, path, image_shape)
    else:
        distance = _lpips(config, path, image_shape)
    distance = distance.to(device)
    _refuse_misfit(distance, config, image_shape, device)
    return distance


def _lpips(config: PerceptualConfig, path: Path, image_shape: tuple[int, int, int]) -> Distance:
    content = _read(path)
    try:
        tensors = from_bytes(content)
    except SafetensorError as error:
        raise UserError(
            f"{path} is no safetensors file ({error}); write it as docs/adversarial.md says"
        ) from None
    network = Lpips(tensors, str(path))
    channels, height, width = image_shape
    if min(height, width) < network.smallest:
        raise UserError(
            f"objective.perceptual.features (={path}) is LPIPS with {network.kind}, for images of at least "
            f"{network.smallest}x{network.smallest}, these have {height}x{width}; give a classifier that train-features wrote"
        )
    repeat = _repeated(config, channels, 3)
    return Distance(
        network, identity=_hash(content, config), weights=network.channel_weights(), repeat=repeat
    )


def _classifier(config: PerceptualConfig, path: Path, image_shape: tuple[int, int, int]) -> Distance:
    model, shape, details = classifier.load(path)
    if shape.image_shape[1:] != image_shape[1:]:
        raise UserError(
            f"the features in {path} are for {shape.image_shape[1]}x{shape.image_shape[2]} images, these have "
            f"{image_shape[1]}x{image_shape[2]}; train "
            "features on images of this shape"
        )
    repeat = _repeated(config, image_shape[0], shape.channels)
    return Distance(
        classifier.Maps(model), identity=_hash(details["sha256"].encode(), config), weights={}, repeat=repeat
    )


def _program(config: PerceptualConfig, path: Path) -> Distance:
    content = _read(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network: nn.Module = torch.export.load(str(path)).module()
    except Exception as error:  # a damaged file may raise anything
        raise UserError(
            f"{path} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}); export it again"
        ) from error
    # `repeat_channels` is the user's word that the program is for colour images.
    distance = Distance(
        network, identity=_hash(content, config), weights={}, repeat=int(config.repeat_channels)
    )
    distance.layers = config.layers
    return distance


def _refuse_misfit(
    distance: Distance,
    config: PerceptualConfig,
    image_shape: tuple[int, int, int],
    device: torch.device,
) -> None:
    """Raise UserError unless batches of two and three images give maps by name, with a gradient."""
    shape = "x".join(map(str, image_shape))
    for count in (2, 3):
        images = torch.rand(count, *image_shape, device=device, generator=_generator(device))
        images.requires_grad_()
        try:
            maps = distance.network(images.expand(-1, 3, -1, -1) if distance._repeat else images)
        except Exception as error:  # a program may raise anything
            raise UserError(
                f"{config.features} does not take {count} images of {shape} ({type(error).__name__}: {str(error).partition(chr(10))[0]}); "
                "export it for images of this shape, with dynamic_shapes for the batch"
            ) from error
        if not isinstance(maps, dict) or not all(
            isinstance(value, Tensor) and value.ndim >= 2 and len(value) == count for value in maps.values()
        ):
            raise UserError(
                f"{config.features} does not return a dict of maps [B, F, ...] by their names for {count} images of {shape}; export a module "
                "that does"
            )
        if missing := [name for name in config.layers or () if name not in maps]:
            raise UserError(
                f"objective.perceptual.layers: {config.features} has no {missing[0]}; it has {', '.join(sorted(maps))}"
            )
        if not distance(images.detach(), images).requires_grad:
            raise UserError(
                f"{config.features} gives no gradient for the images; export it without torch.no_grad"
            )


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _repeated(config: PerceptualConfig, channels: int, wanted: int) -> int:
    """1 where grey images are shown three times, else 0. Raises UserError where channels do not fit."""
    if channels == wanted and not (config.repeat_channels and channels == 1):
        return 0
    if channels == 1 and wanted == 3 and config.repeat_channels:
        return 1
    remedy = (
        "set objective.perceptual.repeat_channels to true to show each three times"
        if channels == 1 and wanted == 3
        else f"give features of images with {channels}"
        + (", or set repeat_channels to false" if config.repeat_channels else "")
    )
    raise UserError(
        f"objective.perceptual.features (={config.features}) is for images with {wanted} channels, these have {channels}; {remedy}"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"objective.perceptual.features (={path}) cannot be read ({error.strerror}); give FILE.safetensors, FILE.pt2 or a folder "
            "that train-features wrote"
        ) from None


def _hash(content: bytes, config: PerceptualConfig) -> str:
    return hashlib.sha256(
        hashlib.sha256(content).digest() + repr((config.layers, config.repeat_channels)).encode()
    ).hexdigest()


def _unit(maps: Tensor) -> Tensor:
    """Maps [B, F, ...] divided by their length over the channels."""
    maps = maps.float()
    # The sum has a small number more, because the gradient of a root is Inf at 0.
    return maps / ((maps.square().sum(1, keepdim=True) + TINY**2).sqrt() + TINY)
