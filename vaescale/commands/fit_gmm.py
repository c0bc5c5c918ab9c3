"""Fit Gaussian mixtures to a run's aggregate posterior: gather its latents, fit, choose, save.

The latents are draws of q(z|x) or its moments. The joint q(z_1, z_2, ... | x) of a ladder's first groups is not Gaussian, so only
its draws are fitted.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from vaescale import comm, figures
from vaescale.aggregate.fits import Fitting, Material, fit_candidate
from vaescale.aggregate.latents import Drawing, ShardLatents, load
from vaescale.aggregate.prior import prior_nats, replaces
from vaescale.commands.class_mixtures import fit_by_class
from vaescale.commands.encode import SPLITS, latents_of
from vaescale.commands.signature import Count, NonNegative, checked
from vaescale.conditions.config import VectorCondition
from vaescale.data.latent_shards import LatentShards
from vaescale.errors import UserError
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.gaussian import Kind
from vaescale.mixtures.held_out import held_out
from vaescale.mixtures.points import Points
from vaescale.mixtures.selection import Candidate, Criterion, Spread, choose, refuse_unfit, spread_of
from vaescale.mixtures.starts import Start
from vaescale.models.vae import VAE
from vaescale.runs.results import save_result
from vaescale.runs.tracking import push
from vaescale.system import heartbeat
from vaescale.system.console import say
from vaescale.system.files import LockHeldError, exclusive
from vaescale.trained import (
    Trained,
    Which,
    draw_seed,
    open_split,
    open_trained,
    refuse_codes,
    refuse_condition,
)
from vaescale.training import launch

DRAWS_WANTED, MOST_DRAWS = 1 << 16, 8
LEAST_JOINT_DRAWS = 2  # per image, to separate the variance within q(z|x) from that between images
PICTURE = "mixture_selection.png"
BetweenZeroAndOne = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
DrawsPerImage = Annotated[int, Field(ge=0, le=1000)]
LOCK = ".gmm.lock"
WAIT_SECONDS = 600.0  # for another fit that saves
ROUND_SECONDS = 1.0  # a collective would time out before the wait ends
NOT_SUMMED_UP = ("candidates", "more_is_better")
MORE_IS_BETTER = (
    "gmm/train_log_density_nats",
    "gmm/val_log_density_nats",
    "gmm/val_prior_log_density_nats",
)


def _different(numbers: Sequence[int]) -> Sequence[int]:
    if len(set(numbers)) < len(numbers):
        raise ValueError("be different numbers")
    return numbers


Components = Annotated[Sequence[Count], Field(min_length=1), AfterValidator(_different)]


@checked
def fit_gmm(
    run: Path,
    *,
    components: Components = (10,),
    covariance: Kind = "full",
    samples_per_image: DrawsPerImage | None = None,
    groups: Count = 1,
    start: Start = "kmeans",
    restarts: Count = 1,
    tolerance: BetweenZeroAndOne = 1e-3,
    max_iterations: Count = 500,
    ridge: BetweenZeroAndOne = 1e-6,
    select: Criterion = "held-out",
    online: Count | None = None,
    online_batch: Count = 8192,
    seed: NonNegative = 0,
    per_class: bool = False,
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Fit Gaussian mixtures of several sizes to a run's aggregate posterior and save the best one to RUN/gmm.

    components: numbers of components to compare. samples_per_image: number of draws of each q(z|x) to fit, 0 for its moments,
    None for a suitable number. groups: number of a ladder's groups, from the top, to fit together. start, restarts, tolerance
    (nats), max_iterations, ridge: options of EM, see `Fitting`. select: the criterion that chooses among the numbers of
    components. online: number of passes of stepwise EM, with batches of `online_batch` latents, in place of EM. seed: random
    seed of the starts and draws. per_class: fit a mixture to the latents of each class, to sample from a class; see `class_mixtures`. checkpoint:
    see `Which`.

    Returns the mean log densities (nats) of the chosen mixture, of the model's prior and of all candidates; of held-out latents
    also under the chosen components with simpler covariances; and notes on what is wrong with the mixture. Raises UserError
    for latents that cannot be fitted, and saves nothing for full covariances without enough draws that are worse than the prior.
    """
    how = Fitting(covariance, start, restarts, tolerance, max_iterations, ridge, online, online_batch, seed)
    with launch.joined():
        trained = open_trained(run, which=checkpoint)
        trained.announce("fit-gmm")
        refuse_codes(trained, "fit-gmm", "fit a prior over its codes with `vaescale fit-prior RUN`")
        heartbeat.beat("gathering latents")
        if isinstance(trained.model.condition, VectorCondition):
            refuse_condition(
                trained, "a mixture", "sample draws z from N(0, I), or from p(z|y) with condition.prior"
            )
        if per_class:
            if groups > 1 or online:
                other = f"--groups (={groups})" if groups > 1 else f"--online (={online})"
                raise UserError(f"--per-class fits the first group in memory; leave {other} out")
            number = samples_per_image
            return fit_by_class(
                trained,
                how,
                components=components,
                draws=_suitable(trained, least=1) if number is None else number,
                select=select,
            )
        refuse_condition(
            trained, "a mixture of all images' latents", "give --per-class: a mixture for each class"
        )
        material = gather(
            trained, groups=groups, samples_per_image=samples_per_image, online=online is not None
        )
        which = _which_groups(trained.model, groups)
        draws = material.train.count if material.draws else None
        refuse_unfit(material.spread, max(components), material.images, covariance, which, draws=draws)
        candidates = [fit_candidate(material, number, how) for number in components]
        chosen = choose(candidates, select)
        of_prior = prior_nats(trained.model, material.val)
        on_val = held_out(
            chosen.mixture,
            material.val,
            nats=chosen.val_nats,
            prior_nats=of_prior,
            images=material.images,
        )
        on_val.refuse_singular()
        metrics = _metrics(chosen, of_prior)
        origin = _origin(trained, material, how, groups)
        result = {
            **origin,
            **chosen.summary(),
            "prior_val_nats": of_prior,
            "simpler_val_nats": on_val.simpler_nats,
            "fewest_images": on_val.fewest,
            "notes": on_val.notes(),
            **metrics,
            "covariance": covariance,
            "selected_by": select,
            "more_is_better": list(MORE_IS_BETTER),
            "candidates": [candidate.summary() for candidate in candidates],
        }
        _save(trained, lambda: _write_files(trained, candidates, chosen, origin, result, metrics))
        return result


def gather(trained: Trained, *, groups: int, samples_per_image: int | None, online: bool) -> Material:
    """The latents of both splits, encoded unless the run folder has them. All ranks call it.

    groups, samples_per_image: see `fit_gmm`. online: read the shards at each pass. Raises UserError for groups that the
    model does not have, or that have no moments.
    """
    _refuse_groups(trained.model, groups, samples_per_image)
    draws = samples_per_image
    seeds = {split: draw_seed(trained.recipe, split) for split in SPLITS}
    read: Callable[..., Points | ShardLatents] = ShardLatents if online else load
    if groups > 1:
        draws = samples_per_image or _suitable(trained, least=LEAST_JOINT_DRAWS)
        joint = {
            split: latents_of(trained, split, suffix=f"-top{groups}", groups=groups, draws=draws)
            for split in SPLITS
        }
        drawn, val = (read(joint[split], Drawing(draws, seeds[split]), trained.device) for split in SPLITS)
        return _material(drawn, drawn, val, spread_of(drawn, draws), joint["train"], draws)
    shards = {split: latents_of(trained, split) for split in SPLITS}
    if draws is None:
        draws = _suitable(trained, least=1)
    moments = read(shards["train"], Drawing(0, seeds["train"]), trained.device)
    # The density under moments is not known; it is measured on one draw of each image.
    drawn, val = (
        read(shards[split], Drawing(max(1, draws), seeds[split]), trained.device) for split in SPLITS
    )
    train = moments if draws == 0 else drawn
    return _material(train, drawn, val, spread_of(moments), shards["train"], draws)


def _metrics(chosen: Candidate, of_prior: float) -> dict[str, float]:
    return {
        "gmm/components": float(len(chosen.mixture.weights)),
        "gmm/train_log_density_nats": chosen.train_nats,
        "gmm/val_log_density_nats": chosen.val_nats,
        "gmm/val_prior_log_density_nats": of_prior,
        "gmm/bic": chosen.bic,
    }


def _origin(trained: Trained, material: Material, how: Fitting, groups: int) -> dict[str, Any]:
    """The details in every candidate's file: the run, the latents and the fit."""
    plural = "s" if groups > 1 else ""
    return {
        "run": str(trained.folder),
        "groups": groups,
        "samples_per_image": material.draws,
        "start": how.start,
        "restarts": how.restarts,
        "ridge": how.ridge,
        "online_passes": how.online,
        "seed": how.seed,
        "replaces": replaces(trained.model, groups),
        "collapsed_latents": material.spread.collapsed.nonzero()[:, 0].tolist(),
        **trained.identity,
        "data_hash": material.data_hash,
        "measured": {
            "gmm/": f"{groups} group{plural} of latents, {material.draws} draws of an image, images {material.data_hash[:12]}"
        },
    }


def _save(trained: Trained, write_files: Callable[[], None]) -> None:
    """Write the files of a fit while no other fit of the run writes its own, then send them to MLflow.

    All ranks call it. Raises UserError when another fit is saving for longer than the wait.
    """
    folder, start, is_reported = trained.folder, time.monotonic(), False

    def write() -> bool:
        nonlocal is_reported
        try:
            with exclusive(folder / LOCK, wait_seconds=min(ROUND_SECONDS, WAIT_SECONDS)):
                write_files()
        except LockHeldError as error:
            if time.monotonic() - start >= WAIT_SECONDS:
                raise UserError(
                    f"another fit of {folder} is saving its mixtures ({error.holder}); run the same command again when it "
                    "has ended"
                ) from None
            if not is_reported:
                say(f"waiting for another fit of {folder} to save its mixtures ({error.holder})")
            is_reported = True
            return False
        return True

    while not comm.on_main(write):
        heartbeat.beat("waiting for another fit that saves")
    comm.on_main(lambda: push(folder, trained.recipe.tracking))


def _write_files(
    trained: Trained,
    candidates: list[Candidate],
    chosen: Candidate,
    origin: dict[str, Any],
    result: dict[str, Any],
    metrics: dict[str, float],
) -> None:
    """Write the mixtures, the comparison and its picture, and remove the files of an earlier fit."""
    folder = trained.folder
    of_all = ("prior_val_nats", "simpler_val_nats", "notes", "covariance", "selected_by")
    details = {**origin, **{name: result[name] for name in of_all}}
    _save_mixtures(folder / "gmm", candidates, chosen, details)
    picture = folder / "figures" / PICTURE
    if len(candidates) == 1:
        picture.unlink(missing_ok=True)  # from an earlier fit

    def draw() -> None:
        figures.mixture_selection(
            picture,
            result["candidates"],
            chosen=len(chosen.mixture.weights),
            prior_nats=metrics["gmm/val_prior_log_density_nats"],
            title=f"{folder.name}, step {trained.step}: {chosen.mixture.kind} mixtures of q(z)",
        )

    save_result(
        folder,
        "gmm/selection.json",
        result,
        step=trained.step,
        metrics=metrics,
        tracking=trained.recipe.tracking,
        summary={"gmm": {name: value for name, value in result.items() if name not in NOT_SUMMED_UP}},
        draw=draw if len(candidates) > 1 else None,
        send=False,  # MLflow may take minutes, and another fit waits
    )


def _save_mixtures(
    folder: Path, candidates: list[Candidate], chosen: Candidate, details: dict[str, Any]
) -> None:
    earlier = sorted(folder.glob("components-*"))
    if earlier:
        say(
            f"the earlier mixtures of {folder.parent} ({', '.join(old.name for old in earlier)}) are replaced"
        )
    for old in earlier:
        shutil.rmtree(old)
    for candidate in candidates if len(candidates) > 1 else []:
        mixture_files.save(
            candidate.mixture,
            folder / f"components-{len(candidate.mixture.weights)}",
            {**details, **candidate.summary()},
        )
    mixture_files.save(chosen.mixture, folder, {**details, **chosen.summary()})


def _material(
    train: Points | ShardLatents,
    drawn: Points | ShardLatents,
    val: Points | ShardLatents,
    spread: Spread,
    shards: LatentShards,
    draws: int,
) -> Material:
    index = shards.index
    return Material(train, drawn, val, spread, index.num_samples, draws, index.made["data_hash"])


def _suitable(trained: Trained, *, least: int) -> int:
    """The number of draws of each image that gives enough latents."""
    images = len(comm.together(lambda: open_split(trained.recipe, "train")))
    return min(MOST_DRAWS, max(least, -(-DRAWS_WANTED // images)))


def _which_groups(model: VAE, groups: int) -> str:
    """The part of a message that names a ladder's fitted groups; empty for a flat model."""
    if len(model.group_sizes) == 1:
        return ""
    return f" of the first {groups} groups" if groups > 1 else " of the top group"


def _refuse_groups(model: VAE, groups: int, samples_per_image: int | None) -> None:
    number = len(model.group_sizes)
    if groups > number:
        kind = f"a ladder of {number} groups" if number > 1 else "a flat model with one group"
        raise UserError(f"--groups (={groups}) is too many, this run is {kind}")
    if groups > 1 and samples_per_image is not None and samples_per_image < LEAST_JOINT_DRAWS:
        raise UserError(
            f"several groups together have no moments: --samples-per-image (={samples_per_image}) must be at least "
            f"{LEAST_JOINT_DRAWS} with --groups"
        )
