"""A mixture of each class's latents, p(z|y), for `vaescale fit-gmm --per-class`: to sample from a class.

Of a conditional run it replaces p(z|y); of another run it makes samples of a class without training anew.
"""

import shutil
from collections.abc import Sequence
from typing import Any

import torch

from vaescale import comm
from vaescale.aggregate.by_class import labels_of, of_class
from vaescale.aggregate.fits import Fitting, Material, fit_candidate
from vaescale.aggregate.latents import Drawing, load
from vaescale.aggregate.prior import prior_nats
from vaescale.commands.encode import SPLITS, latents_of
from vaescale.data.classes import ClassCounts
from vaescale.errors import UserError
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.by_class import FOLDER
from vaescale.mixtures.held_out import held_out
from vaescale.mixtures.selection import Candidate, Criterion, choose, refuse_unfit, spread_of
from vaescale.runs import class_table
from vaescale.runs.class_table import ClassTable
from vaescale.runs.results import save_result
from vaescale.system import heartbeat
from vaescale.trained import Trained, draw_seed, number_of_classes

PREFIX = "gmm_by_class"
MORE_IS_BETTER = tuple(f"{PREFIX}/{name}" for name in ("val_log_density_nats", "val_prior_log_density_nats"))


def fit_by_class(
    trained: Trained, how: Fitting, *, components: Sequence[int], draws: int, select: Criterion
) -> dict[str, Any]:
    """Fit a mixture to the latents of each class and save them to RUN/gmm/classes. All ranks call it.

    draws: of each image, 0 for moments. Returns a row for each class, and the mean densities over the held-out images. Raises UserError for
    images without classes, and for a class with too few.
    """
    seeds = {split: draw_seed(trained.recipe, split) for split in SPLITS}
    shards = {split: latents_of(trained, split) for split in SPLITS}
    labels = comm.together(lambda: {split: labels_of(shards[split]) for split in SPLITS})
    table = _table(trained, labels["train"].tolist(), shards["train"].index.class_names)
    moments = load(shards["train"], Drawing(0, seeds["train"]), trained.device)
    drawn, val = (
        load(shards[split], Drawing(max(1, draws), seeds[split]), trained.device) for split in SPLITS
    )
    rows, chosen = [], []
    for number, name in enumerate(table.names):
        heartbeat.beat(f"fitting class {name}")
        means, of_train = (of_class(latents, labels["train"], number) for latents in (moments, drawn))
        of_val = of_class(val, labels["val"], number)
        if not of_val.count:
            raise UserError(
                f"class {name} has no held-out image, which chooses its mixture; leave --per-class out"
            )
        train = of_train if draws else means
        material = Material(train, of_train, of_val, spread_of(means), means.count, draws, "")
        try:
            count = train.count if draws else None
            refuse_unfit(material.spread, max(components), means.count, how.covariance, draws=count)
        except UserError as error:
            raise UserError(f"class {name}: {error}") from None
        best = choose([fit_candidate(material, count, how) for count in components], select)
        given = trained.model.given(torch.tensor([number]))
        of_prior = prior_nats(given, of_val)
        judged = held_out(
            best.mixture, of_val, nats=best.val_nats, prior_nats=of_prior, images=material.images
        )
        chosen.append(best)
        rows.append(
            {
                "class": name,
                "images": means.count,
                "val_images": of_val.count // max(1, draws),
                "components": len(best.mixture.weights),
                "train_nats": best.train_nats,
                "val_nats": best.val_nats,
                "prior_val_nats": of_prior,
                "notes": judged.notes(),
            }
        )
    result = _result(trained, how, rows, draws=draws, data_hash=str(shards["train"].index.made["data_hash"]))
    comm.on_main(lambda: _save(trained, table, chosen, result))
    return result


def _table(trained: Trained, labels: list[int], names: Sequence[str]) -> ClassTable:
    """The classes of a run, or of its training images."""
    classes = number_of_classes(trained)
    if classes is not None:
        return comm.on_main(lambda: class_table.read(trained.folder, classes))
    if (without := sum(label < 0 for label in labels)) or not labels:
        raise UserError(
            f"{without} of {len(labels)} training images have no class, which --per-class needs; leave it out"
        )
    counts = ClassCounts(tuple(labels.count(number) for number in range(max(labels) + 1)), 0, 0)
    return ClassTable(counts.names(names), counts.frequencies)


def _result(
    trained: Trained, how: Fitting, rows: list[dict[str, Any]], *, draws: int, data_hash: str
) -> dict[str, Any]:
    images = sum(row["val_images"] for row in rows)

    def mean(name: str) -> float:
        nats: float = sum(row[name] * row["val_images"] for row in rows) / images
        return nats

    metrics = {
        f"{PREFIX}/val_log_density_nats": mean("val_nats"),
        f"{PREFIX}/val_prior_log_density_nats": mean("prior_val_nats"),
    }
    return {
        "run": str(trained.folder),
        "samples_per_image": draws,
        "covariance": how.covariance,
        "seed": how.seed,
        **trained.identity,
        "data_hash": data_hash,
        "measured": {f"{PREFIX}/": f"{draws} draws of an image, images {data_hash[:12]}"},
        "more_is_better": list(MORE_IS_BETTER),
        "classes": rows,
        "metrics": metrics,
    }


def _save(trained: Trained, table: ClassTable, chosen: list[Candidate], result: dict[str, Any]) -> None:
    folder = trained.folder / "gmm" / FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier fit, perhaps with other classes
    for number, (best, row) in enumerate(zip(chosen, result["classes"], strict=True)):
        mixture_files.save(best.mixture, folder / str(number), {**trained.identity, **row})
    if trained.model.condition is None:
        class_table.write(trained.folder, table)
    save_result(
        trained.folder,
        f"gmm/{FOLDER}/selection.json",
        result,
        step=trained.step,
        metrics=result["metrics"],
        tracking=trained.recipe.tracking,
    )
