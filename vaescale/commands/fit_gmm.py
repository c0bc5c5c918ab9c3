"""What `vaescale fit-gmm` fits to: the latents of a run's images, drawn or as moments, and what is known of them beforehand.

Of a ladder's first groups together q(z_1, z_2, ... | x) is no Gaussian, so that they have draws and no moments.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from vaescale import comm
from vaescale.aggregate.latents import Drawing, ShardLatents, load
from vaescale.data.latent_shards import LatentShards
from vaescale.errors import UserError
from vaescale.mixtures.points import Points
from vaescale.mixtures.selection import Spread, spread_of
from vaescale.models.vae import VAE
from vaescale.trained import Trained, draw_seed, latents_of, open_split

SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
DRAWS_WANTED, MOST_DRAWS = 1 << 16, 8
LEAST_JOINT_DRAWS = 2  # of an image: what varies within q(z|x), and what between images


class Material(NamedTuple):
    """train: what is fitted to; drawn, val: draws of the training and of the held-out images, of which densities are taken.

    images: how many for training; draws: of each, 0 where moments are fitted; data_hash: of the training images.
    """

    train: Points | ShardLatents
    drawn: Points | ShardLatents
    val: Points | ShardLatents
    spread: Spread
    images: int
    draws: int
    data_hash: str


def gather(trained: Trained, *, groups: int, samples_per_image: int | None, online: bool) -> Material:
    """The latents of both splits, encoded unless they are there. All ranks call it.

    groups: so many of a ladder's first ones; samples_per_image: draws, 0 for moments, None for what suits the number of
    images; online: read the shards at each pass. Raises UserError for groups that the model has not, or that have no moments.
    """
    _refuse_groups(trained.model, groups, samples_per_image)
    device = next(trained.model.parameters()).device
    draws = samples_per_image
    seeds = {split: draw_seed(trained.recipe, split) for split in SPLITS}
    read: Callable[..., Points | ShardLatents] = ShardLatents if online else load
    if groups > 1:
        draws = samples_per_image or _suitable(trained, least=LEAST_JOINT_DRAWS)
        joint = {
            split: latents_of(trained, split, suffix=f"-top{groups}", groups=groups, draws=draws)
            for split in SPLITS
        }
        drawn, val = (read(joint[split], Drawing(draws, seeds[split]), device) for split in SPLITS)
        return _material(drawn, drawn, val, spread_of(drawn, draws), joint["train"], draws)
    shards = {split: latents_of(trained, split) for split in SPLITS}
    if draws is None:
        draws = _suitable(trained, least=1)
    moments = read(shards["train"], Drawing(0, seeds["train"]), device)
    # Of moments a density is not known: it is taken of one draw.
    drawn, val = (read(shards[split], Drawing(max(1, draws), seeds[split]), device) for split in SPLITS)
    train = moments if draws == 0 else drawn
    return _material(train, drawn, val, spread_of(moments), shards["train"], draws)


def prior_nats(model: VAE, val: Points | ShardLatents) -> float:
    """The mean log density of the held-out draws under the model's own prior of the same latents."""
    own = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        for z, _ in val.parts():
            for part in torch.split(z, 4096):
                own += model.prior_log_density(part).double().sum().cpu()
    return float(comm.all_reduce_sum(own)) / val.count


def replaces(model: VAE, groups: int) -> str:
    """Which prior a mixture of so many groups takes the place of."""
    everything = len(model.group_sizes)
    if everything == 1:
        return "the prior N(0, I) of all latents"
    if groups == everything:
        return f"the prior of all {groups} groups, together"
    which = "the top group" if groups == 1 else f"the first {groups} groups, together,"
    return f"the prior of {which} of {everything}; the others keep theirs"


def _material(
    train: Points | ShardLatents,
    drawn: Points | ShardLatents,
    val: Points | ShardLatents,
    spread: Spread,
    shards: LatentShards,
    draws: int,
) -> Material:
    made = shards.index.made
    return Material(train, drawn, val, spread, shards.index.num_samples, draws, made["data_hash"])


def _suitable(trained: Trained, *, least: int) -> int:
    """How many draws of each image make enough latents."""
    images = len(comm.together(lambda: open_split(trained.recipe, "train")))
    return min(MOST_DRAWS, max(least, -(-DRAWS_WANTED // images)))


def _refuse_groups(model: VAE, groups: int, samples_per_image: int | None) -> None:
    there = len(model.group_sizes)
    if groups > there:
        words = f"a ladder of {there} groups" if there > 1 else "no ladder: its latents are one group"
        raise UserError(f"--groups (={groups}) is too many, this run has {words}")
    if groups > 1 and samples_per_image is not None and samples_per_image < LEAST_JOINT_DRAWS:
        raise UserError(
            f"several groups together have no moments: --samples-per-image (={samples_per_image}) must be at least "
            f"{LEAST_JOINT_DRAWS} with --groups"
        )
