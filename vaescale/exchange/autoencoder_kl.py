"""diffusers' AutoencoderKL as vaescale's `network: resnet`, and back: configuration, names and values of tensors.

Both are the network of Rombach et al. 2022. What differs is exact in float32 but for the last bias:

    images        [-1, 1] there, [0, 1] here. The encoder computes 2 x - 1 itself; the decoder's last weights are halved, its bias b
                  becomes (b + 1) / 2. A file of vaescale.json beside the weights keeps the bias bit for bit.
    log variance  there, log sigma here, with `posterior.bounded: false`: the rows that give it are halved. There it is also clamped
                  to [-30, 20], log sigma to [-15, 10].
    quant_conv, post_quant_conv   layers of the network here, the identity where the configuration leaves them out.
    attention     linear layers there, convolutions of one place here.

No tensor is read from a pickle.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaescale.config import Size, sides, size_of
from vaescale.errors import UserError
from vaescale.exchange.autoencoder_kl_names import names_of
from vaescale.exchange.folders import Files, read_json
from vaescale.networks.config import ResnetConfig

CLASS = "AutoencoderKL"
CONFIG, OWN = "config.json", "vaescale.json"
EPSILON = 1e-6  # of every GroupNorm there
DOWN, ATTENDING_DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP, ATTENDING_UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"
HEAD_BIAS = "decoder.conv_out.bias"
REMEDY = "vaescale reads the AutoencoderKL of Stable Diffusion 1, 2, XL and 3, and of FLUX"


class Autoencoder(NamedTuple):
    """An AutoencoderKL in vaescale's terms. tensors: by the names of `ResnetNetwork`, float32; channels of the images.

    theirs: its own configuration; own: what vaescale has written beside it, {} if nothing; sha256: of the files of weights.
    """

    network: ResnetConfig
    channels: int
    image_size: Size
    tensors: dict[str, Tensor]
    theirs: dict[str, Any]
    own: dict[str, Any]
    sha256: str


def sample_size(path: Path) -> Size | None:
    """The size of the images that a folder's configuration names, if it does."""
    return _size_of(_config_of(folder_of(path)).get("sample_size"))


def _size_of(given: object) -> Size | None:
    pair = [given, given] if isinstance(given, int) else given
    if (
        not isinstance(pair, list)
        or len(pair) != 2
        or not all(type(side) is int and side > 0 for side in pair)
    ):
        return None
    return size_of(*pair)


def is_folder(path: Path) -> bool:
    """Whether a folder, or its subfolder `vae`, says that it holds an AutoencoderKL."""
    try:
        return _config_of(folder_of(path)).get("_class_name") == CLASS
    except (OSError, UserError):
        return False


def folder_of(path: Path) -> Path:
    """The folder with config.json: `path`, or its subfolder `vae`, as in a pipeline's folder."""
    return path / "vae" if not (path / CONFIG).is_file() and (path / "vae" / CONFIG).is_file() else path


def read(path: Path, *, image_size: Size | None = None) -> Autoencoder:
    """Read the folder of an AutoencoderKL by its configuration alone. Raises UserError for what vaescale cannot say.

    image_size: of the images; None for the configuration's sample_size.
    """
    folder = folder_of(path)
    theirs = _config_of(folder)
    if theirs.get("_class_name") != CLASS:
        raise UserError(f"{folder / CONFIG} describes {theirs.get('_class_name')!r}; {REMEDY}")
    size = image_size or _size_of(theirs.get("sample_size"))
    if size is None:
        raise UserError(f"{folder / CONFIG} has no sample_size; give the size of the images")
    network = _network(theirs, folder / CONFIG, size=size)
    channels = int(theirs.get("in_channels", 3))
    if theirs.get("out_channels", 3) != channels:
        raise UserError(f"{folder / CONFIG} has other channels in than out; {REMEDY}")
    stored = Files(folder)
    names = names_of(network, image_size=size)
    has = {
        "quant_conv": theirs.get("use_quant_conv", True),
        "post_quant_conv": theirs.get("use_post_quant_conv", True),
    }
    wanted = {here: there for here, there in names.items() if has.get(there.partition(".")[0], True)}
    stored.refuse_other_names(set(wanted.values()))
    shapes = shapes_of(network, channels=channels, image_size=size)
    tensors = {here: stored.tensor(there, shapes[here]) for here, there in wanted.items()}
    last = "quant_conv" if has["quant_conv"] else "encoder.conv_out"
    for here, there in wanted.items():
        if there.startswith(f"{last}."):
            tensors[here] = _scaled_rows(tensors[here], 0.5)
        if there == "decoder.conv_out.weight":
            tensors[here] = tensors[here] / 2
        if there == HEAD_BIAS:
            tensors[here] = _to_unit(tensors[here], _own(folder))
    tensors |= {here: _identity(shapes[here]) for here in names if here not in tensors}
    return Autoencoder(network, channels, size, tensors, theirs, _own(folder), stored.sha256())


def written(
    network: ResnetConfig, tensors: Mapping[str, Tensor], *, channels: int, image_size: Size
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """The configuration and tensors of the AutoencoderKL with a network's weights, and what OWN must keep.

    tensors: by the names of `ResnetNetwork`, with the parameters of a diagonal posterior without bounds and of an image in [0, 1].
    Layers that are the identity are left out, as in Stable Diffusion 3. Raises UserError for a network that AutoencoderKL has not.
    """
    _refuse_unsayable(network)
    names = names_of(network, image_size=image_size)
    if missing := sorted(names.keys() - tensors.keys()):
        raise UserError(
            f"network: {missing[0]} is no layer of this network, whose maps are too small for a norm; {CLASS} has one there"
        )
    here_of = {there: here for here, there in names.items()}
    has = {}
    for layer in ("quant_conv", "post_quant_conv"):
        parts = [tensors[here_of[f"{layer}.{part}"]] for part in ("weight", "bias")]
        has[layer] = not all(torch.equal(part.cpu(), _identity(list(part.shape))) for part in parts)
    last = "quant_conv" if has["quant_conv"] else "encoder.conv_out"
    theirs, own = {}, {}
    for here, there in names.items():
        value = tensors[here].detach().float().cpu()
        if not has.get(there.partition(".")[0], True):
            continue
        if there.startswith(f"{last}."):
            value = _scaled_rows(value, 2.0)
        if there == "encoder.conv_in.weight" and network.standardize is not None:
            value = value * (0.5 / network.standardize.sigma)
        if there == "decoder.conv_out.weight":
            value = value * 2
        if there == HEAD_BIAS:
            own = {"unit_bias": [float(one) for one in value]}
            value = value * 2 - 1
        is_linear = re.search(r"\.attentions\.\d+\.to_", there) is not None and value.ndim == 4
        theirs[there] = (value.flatten(1) if is_linear else value).contiguous().clone()
    return _config(network, channels=channels, image_size=image_size, has=has), theirs, own


def shapes_of(network: ResnetConfig, *, channels: int, image_size: Size) -> dict[str, list[int]]:
    """The shape of each parameter of the network, without its memory."""
    with torch.device("meta"):
        module = network.implement(
            image_size=sides(image_size),
            channels=channels,
            encoder_out=2 * network.latent_dim,
            out_channels=channels,
        )
    return {name: list(value.shape) for name, value in module.named_parameters()}


def _network(theirs: Mapping[str, Any], path: Path, *, size: Size) -> ResnetConfig:
    """The network section of a configuration. Raises UserError where vaescale has no such network."""
    fits = {"act_fn": "silu", "norm_type": "group"}
    for key, value in fits.items():
        if theirs.get(key, value) != value:
            raise UserError(f"{path} has {key} {theirs[key]!r}; {REMEDY}")
    try:
        widths = [int(width) for width in theirs["block_out_channels"]]
        down, up = list(theirs["down_block_types"]), list(theirs["up_block_types"])
        latents, blocks, groups = (
            int(theirs[key]) for key in ("latent_channels", "layers_per_block", "norm_num_groups")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no whole configuration of an {CLASS} ({error!r}); fetch it again"
        ) from None
    if not widths or min(widths) < 1 or any(width % widths[0] for width in widths):
        raise UserError(
            f"{path} has block_out_channels {widths}, which are no multiples of the first; {REMEDY}"
        )
    attends = [kind == ATTENDING_DOWN for kind in down]
    known = {DOWN, ATTENDING_DOWN}.issuperset(down) and {UP, ATTENDING_UP}.issuperset(up)
    if not known or len(down) != len(widths) or [kind == ATTENDING_UP for kind in reversed(up)] != attends:
        raise UserError(f"{path} has the blocks {down} and {up}; {REMEDY}")
    if min(latents, blocks, groups) < 1 or any(width % groups for width in widths):
        raise UserError(
            f"{path} has norm_num_groups {groups} for block_out_channels {widths}; fetch it again"
        )
    return ResnetConfig(
        latent_dim=latents,
        width=widths[0],
        multipliers=tuple(width // widths[0] for width in widths),
        blocks=blocks,
        attention=bool(theirs.get("mid_block_add_attention", True)),
        attention_at=tuple(sides(size)[0] >> level for level, attending in enumerate(attends) if attending),
        norm_groups=groups,
        norm_epsilon=EPSILON,
    )


def _config(
    network: ResnetConfig, *, channels: int, image_size: Size, has: Mapping[str, bool]
) -> dict[str, Any]:
    attends = [
        sides(image_size)[0] >> level in network.attention_at for level in range(len(network.multipliers))
    ]
    return {
        "_class_name": CLASS,
        "act_fn": "silu",
        "block_out_channels": [network.width * multiplier for multiplier in network.multipliers],
        "down_block_types": [ATTENDING_DOWN if attending else DOWN for attending in attends],
        "force_upcast": False,
        "in_channels": channels,
        "latent_channels": network.latent_dim,
        "layers_per_block": network.blocks,
        "mid_block_add_attention": network.attention,
        "norm_num_groups": num_norm_groups(network, image_size=image_size),
        "out_channels": channels,
        "sample_size": image_size if isinstance(image_size, int) else list(image_size),
        "up_block_types": [ATTENDING_UP if attending else UP for attending in reversed(attends)],
        "use_post_quant_conv": has["post_quant_conv"],
        "use_quant_conv": has["quant_conv"],
    }


def _refuse_unsayable(network: ResnetConfig) -> None:
    if network.multipliers[0] != 1:
        raise UserError(
            f"network.multipliers begins with {network.multipliers[0]}, and {CLASS} with 1; diffusers cannot say this network"
        )
    if network.standardize is not None and network.standardize.mean != 0.5:
        raise UserError(
            f"network.standardize.mean is {network.standardize.mean}, and {CLASS} pads with the value of 0.5; diffusers cannot say this "
            "network"
        )


def num_norm_groups(network: ResnetConfig, *, image_size: Size) -> int:
    """The groups of every GroupNorm. Raises UserError where they differ, which AutoencoderKL cannot say."""
    if network.norm_groups is not None:
        return network.norm_groups
    with torch.device("meta"):
        module = network.implement(image_size=sides(image_size), channels=3, encoder_out=2, out_channels=3)
    groups = {
        name: layer.num_groups for name, layer in module.named_modules() if hasattr(layer, "num_groups")
    }
    if len(set(groups.values())) > 1:
        fewest = min(groups, key=lambda name: groups[name])
        most = max(groups.values())
        raise UserError(
            f"network: {fewest} has {groups[fewest]} groups of channels and other norms {most}; {CLASS} has one number for all: train with "
            f"network.norm_groups={groups[fewest]}"
        )
    number: int = next(iter(groups.values()))
    return number


def _scaled_rows(value: Tensor, factor: float) -> Tensor:
    """A layer's weight or bias with the second half of its rows times a power of two."""
    means, others = value.chunk(2)
    return torch.cat([means, others * factor])


def _to_unit(bias: Tensor, own: Mapping[str, Any]) -> Tensor:
    """The bias of the means in [0, 1]: as it was written, where nobody has changed it since."""
    kept = own.get("unit_bias")
    if isinstance(kept, list) and len(kept) == len(bias) and all(isinstance(one, float) for one in kept):
        before = torch.tensor(kept)
        if torch.equal(before * 2 - 1, bias):
            return before
    return (bias + 1) / 2


def _identity(shape: list[int]) -> Tensor:
    """The weight or bias of a convolution of one place that changes nothing."""
    return torch.eye(shape[0]).view(shape) if len(shape) == 4 else torch.zeros(shape)


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {CONFIG}; name the folder of an {CLASS}, such as a pipeline's vae/")
    return read_json(path)


def _own(folder: Path) -> dict[str, Any]:
    return read_json(folder / OWN) if (folder / OWN).is_file() else {}
