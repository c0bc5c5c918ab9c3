"""Latents for the training of another model: of each image and its mirror image, drawn, standardized, in a smaller dtype.

They are made from the float32 moments that `encoding.py` writes, shard by shard, so that the means and standard deviations by
channel are known before the first value is written:

    stored = (z - m_c) / s_c,    m_c, s_c^2 the mean and variance of q(z) = E_x q(z|x) over the training images

Moments are scaled as mu -> (mu - m_c) / s_c, log sigma^2 -> log sigma^2 - 2 log s_c. The index keeps m and s. Of a mirror image,
the number is that of the image plus the number of images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vaescale import comm, noise
from vaescale.aggregate.encoding import alone_in, is_complete
from vaescale.data.code_shards import MIRRORED
from vaescale.data.index import Shard
from vaescale.data.latent_format import LatentDtype
from vaescale.data.latent_shards import (
    LatentShards,
    Standardized,
    open_latents,
    write_latent_index,
    write_latents,
)
from vaescale.errors import DataError
from vaescale.system import heartbeat


class Preparation(NamedTuple):
    """How latents are stored. flip: `both` adds those of mirror images; draws: the number of draws of q(z|x) for each image
    in place of its moments, 0 for moments; standardize: `channel` shifts and scales by channel.
    """

    dtype: LatentDtype = "float32"
    flip: Literal["none", "both"] = "none"
    draws: int = 0
    standardize: Literal["none", "channel"] = "none"

    @property
    def name(self) -> str:
        """The options in a folder's name; empty for the defaults."""
        parts = [
            self.dtype if self.dtype != "float32" else "",
            "both" if self.flip == "both" else "",
            f"draws{self.draws}" if self.draws else "",
            "channel" if self.standardize == "channel" else "",
        ]
        return "-".join(part for part in parts if part)


def prepare(
    views: Sequence[LatentShards],
    folder: Path,
    preparation: Preparation,
    *,
    scale: Standardized,
    draw_seed: int,
) -> LatentShards:
    """Write latents as `preparation` says. All ranks call it, and each writes its shards. Complete latents are kept.

    views: float32 moments of the images, and of their mirror images where they are wanted, with the same keys. scale: of the
    training images, from `scale_of`. Raises DataError when a channel has no variance, or fp16 cannot hold a value.
    """
    made = _origin(views, preparation, scale, draw_seed)
    if comm.on_main(lambda: is_complete(folder, made)):
        return open_latents(folder)
    with alone_in(folder):
        if not comm.on_main(lambda: is_complete(folder, made)):
            mine = range(comm.rank(), len(views[0].index.shards), comm.world_size())
            rows = comm.together(
                lambda: {
                    number: _write(views, folder, number, preparation, scale, draw_seed) for number in mine
                }
            )
            every: dict[int, Shard] = {}
            for rows_of_rank in comm.gather_object(rows):
                every |= rows_of_rank
            names = views[0].index.class_names
            comm.on_main(
                lambda: write_latent_index(folder, [every[number] for number in sorted(every)], names, made)
            )
        return open_latents(folder)


def scale_of(views: Sequence[LatentShards]) -> Standardized:
    """The mean and standard deviation of the aggregate posterior by channel, over all views together."""
    counts = np.array([view.index.num_samples for view in views], dtype=np.float64)[:, None]
    means, stds = (np.array([view.index.made[name] for view in views]) for name in ("mean", "std"))
    share = counts / counts.sum()
    mean = (share * means).sum(0)
    square = (share * (stds**2 + means**2)).sum(0)
    std = np.sqrt(np.maximum(square - mean**2, 0.0)) if len(views) > 1 else stds[0]
    return Standardized(tuple(mean.tolist()), tuple(std.tolist()))


def _origin(
    views: Sequence[LatentShards], preparation: Preparation, scale: Standardized, draw_seed: int
) -> dict[str, Any]:
    """The entries of the index."""
    made = {name: value for name, value in views[0].index.made.items() if name != "kind"}
    mean, std = scale_of(views)
    made |= {"mean": list(mean), "std": list(std), "dtype": preparation.dtype, "flip": preparation.flip}
    made["moments_hash"] = [view.index.data_hash for view in views]
    if preparation.draws:
        made |= {"draws": preparation.draws, "draw_seed": draw_seed}
    if preparation.standardize == "channel":
        if flat := [channel for channel, std in enumerate(scale.std) if not std > 0]:
            raise DataError(
                f"channel {flat[0]} of the latents has no variance over the training images; leave --standardize out"
            )
        made["standardized"] = {"mean": list(scale.mean), "std": list(scale.std)}
    return made


def _write(
    views: Sequence[LatentShards],
    folder: Path,
    number: int,
    preparation: Preparation,
    scale: Standardized,
    draw_seed: int,
) -> Shard:
    """Write one shard: image, mirror image, image, ... in the order of the images."""
    heartbeat.beat("preparing latents")
    blocks = [view.read(number) for view in views]
    if any(block.keys != blocks[0].keys for block in blocks):
        raise DataError(f"the latents of mirror images in {views[-1].folder} are of other images; delete it")
    samples = views[0].index.shards.samples
    first, images = int(samples[:number].sum()), int(samples.sum())
    values = []
    for place, block in enumerate(blocks):
        moments = torch.from_numpy(block.moments)
        numbers = place * images + first + torch.arange(len(moments))
        drawn = _drawn(moments, numbers, preparation.draws, draw_seed) if preparation.draws else moments
        values.append(drawn.view(len(drawn), -1, *views[0].shape).numpy())
    keys = [key + MIRRORED * place for key in blocks[0].keys for place in range(len(views))]
    together = np.stack(values, axis=1).reshape(-1, *values[0].shape[1:])
    if preparation.standardize == "channel":
        together = _standardized(together, scale, draws=preparation.draws > 0)
    return write_latents(
        folder,
        views[0].index.shards[number].name,
        keys=keys,
        labels=np.repeat(blocks[0].labels, len(views)),
        moments=together,
        draws=preparation.draws > 0,
        dtype=preparation.dtype,
    )


def _drawn(moments: torch.Tensor, numbers: torch.Tensor, draws: int, seed: int) -> torch.Tensor:
    """Draws [n, S, Z] of q(z|x) from moments [n, 2, Z]: those that a mixture is fitted to, if the seed is the same."""
    mean, log_variance = moments.unbind(1)
    sigma, size = torch.exp(0.5 * log_variance), (mean.shape[1],)
    drawn = [
        mean + sigma * noise.normal(noise.Stream(seed, draw, numbers), noise.POSTERIOR, size)
        for draw in range(draws)
    ]
    return torch.stack(drawn, dim=1)


def _standardized(values: NDArray[np.float32], scale: Standardized, *, draws: bool) -> NDArray[np.float32]:
    """Shift and scale [n, 2 or S, C, ...] by channel."""
    channels = (len(scale.std), *(1 for _ in values.shape[3:]))
    mean, std = (np.array(value).reshape(channels) for value in scale)
    if draws:
        scaled: NDArray[np.float64] = (values - mean) / std
    else:
        scaled = np.stack([(values[:, 0] - mean) / std, values[:, 1] - 2 * np.log(std)], axis=1)
    return scaled.astype(np.float32)
