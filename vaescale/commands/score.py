"""Score single images under a run: bound, reconstruction error and KL of each, and how well a score tells odd images."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from vaescale import comm, figures
from vaescale.commands.make_shards import parse_crop
from vaescale.commands.signature import Count, checked
from vaescale.commands.source_images import Choice, ImageSet, open_images
from vaescale.data.batch import Batch
from vaescale.data.config import Crop, Filter
from vaescale.errors import DataError, UserError
from vaescale.evaluation import likelihood as bounds
from vaescale.evaluation.auroc import auroc
from vaescale.evaluation.glimpse import error_maps
from vaescale.evaluation.measures import measure
from vaescale.evaluation.score_table import ScoreTable, check_table_path
from vaescale.evaluation.scores import (
    NOT_RANKED,
    PROTOCOL,
    Background,
    Compressor,
    Extremes,
    Rows,
    Scores,
    refuse_background,
    score_names,
)
from vaescale.runs.identity import git_revision
from vaescale.system.console import Progress
from vaescale.system.secrets import redact
from vaescale.trained import Trained, Weights, Which, open_trained, refuse_condition
from vaescale.training import launch

SHOWN = 10  # images of each end in the result
IN_ORDER = "none"  # `sort` that keeps the order of the source
MISLED = 0.5  # AUROC below which a bound ranks odd images as more likely


class Labels(NamedTuple):
    """Which images are odd: those of the classes `classes`, and all of a second source."""

    classes: tuple[str, ...]
    second: str | None

    @property
    def given(self) -> bool:
        """Whether any image may be odd."""
        return bool(self.classes) or self.second is not None


class Files(NamedTuple):
    """The files to write, each if it is not None, and the number of images in each picture of `maps`."""

    out: Path | None
    maps: Path | None
    maps_images: int
    histograms: Path | None


class Scoring(NamedTuple):
    """What to score images by. names: of the scores; sort: the one to sort by, None for the source's order."""

    trained: Trained
    background: Background | None
    complexity: Compressor | None
    labels: Labels
    names: tuple[str, ...]
    sort: str | None


class Scored:
    """The images that were scored so far. The table is filled on the first process only, the extremes are each process's own.

    skipped: for each reason the number of images that cannot be used, and the sentence of the first.
    """

    def __init__(self, scoring: Scoring, *, kept: int) -> None:
        self.table, self.extremes = ScoreTable(scoring.names), Extremes(kept)
        self.skipped: dict[str, dict[str, Any]] = {}
        self._odd_classes = scoring.labels.classes
        self._column = scoring.names.index(scoring.sort or scoring.names[0])

    def take(self, images: ImageSet, second: bool, rows: Rows, batch: Batch) -> None:
        """Add this batch's rows of all processes. second: whether they are of --odd. All ranks call it."""
        self.extremes.add(rows.values[:, self._column], rows.names, batch)
        for each in comm.gather_object(rows):
            for fault in each.faults:
                counts = self.skipped.setdefault(fault.reason, {"images": 0, "first": fault.words})
                counts["images"] += 1
            if comm.is_main():
                classes = [_class_name(images, label) for label in each.labels]
                self.table.add(
                    (name, images.split, class_name, second or class_name in self._odd_classes, *values)
                    for name, class_name, values in zip(
                        each.names, classes, each.values.tolist(), strict=True
                    )
                )


@checked
def score(
    run: Path,
    source: str,
    *,
    split: str | None = None,
    odd: str | None = None,
    odd_split: str | None = None,
    odd_class: Sequence[str] = (),
    background: Path | None = None,
    complexity: Compressor | None = None,
    sort: str | None = None,
    limit: Count | None = None,
    crop: Crop | str | None = None,
    resample: Filter | None = None,
    weights: Weights = "ema",
    out: Path | None = None,
    maps: Path | None = None,
    maps_images: Annotated[int, Field(ge=1, le=100)] = 8,
    histograms: Path | None = None,
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Score every image of a source of make-shards, of shards or of a folder of pictures, at the run's size.

    odd: a second source, whose images are odd; odd_class: classes whose images are odd. With either, the AUROC of each score.
    background: a run for the likelihood ratio; complexity: a compressor for the input complexity. sort: the score to sort by, the
    highest first, by default the negative bound; `none` keeps the source's order. limit: number of first images of each split.
    crop, resample: None for those with which the run's images were made. out: .csv or .parquet file with a row for each image. maps:
    folder for pictures of the `maps_images` highest and lowest images with reconstruction, error and sigma; histograms: PNG file.

    Writes nothing into the run folder. Raises UserError for arguments that contradict each other, DataError for images that cannot be used. checkpoint: see `Which`.
    """
    labels, files = Labels(tuple(odd_class), odd), Files(out, maps, maps_images, histograms)
    _refuse_unused(labels, files, odd_split)
    choice = Choice(split, limit, parse_crop(crop), resample)
    with launch.joined():
        trained = open_trained(run, weights=weights, which=checkpoint)
        bounds.refuse_without_bound(trained.model, "score images with a run of another objective")
        refuse_condition(trained, "score", "score images with a run without condition")
        trained.announce(f"score {redact(source)} under")
        divisor = None if background is None else _open_background(trained, background, weights)
        names = score_names(trained.model.likelihood, background=divisor, complexity=complexity)
        scoring = Scoring(trained, divisor, complexity, labels, names, _sort_column(sort, names))
        sources = {"images": open_images(trained, source, choice)}
        _refuse_unknown_classes(labels, sources["images"])
        if odd is not None:
            sources["odd_images"] = open_images(trained, odd, choice._replace(split=odd_split))
        scored = Scored(scoring, kept=maps_images if maps else 0)
        metrics = {kind: _score_all(scoring, sets, scored, kind) for kind, sets in sources.items()}
        scored.extremes.merge(comm.gather_object(scored.extremes))
        given = {"odd": odd and redact(odd), "odd_classes": [*odd_class], "background": background}
        description = {
            "run": str(trained.folder),
            "source": redact(source),
            **{
                name: value if name == "odd_classes" else str(value) for name, value in given.items() if value
            },
            **trained.identity,
            "code": comm.on_main(git_revision),
            "sizing": {
                kind: {each.split or "all": each.sizing for each in sets} for kind, sets in sources.items()
            },
        }
        return comm.on_main(lambda: description | _finish(scoring, scored, files) | {"metrics": metrics})


def _refuse_unused(labels: Labels, files: Files, odd_split: str | None) -> None:
    """Raise UserError for arguments that have no effect or cannot work."""
    if files.out is not None:
        check_table_path(files.out)
    if odd_split is not None and labels.second is None:
        raise UserError(
            f"--odd-split (={odd_split}) is for the images of --odd; give it or leave the split out"
        )
    if files.histograms is not None and not labels.given:
        raise UserError("--histograms compares odd images with others; give --odd or --odd-class")
    if files.histograms is not None and files.histograms.suffix != ".png":
        raise UserError(f"--histograms (={files.histograms}) must end with .png")


def _refuse_unknown_classes(labels: Labels, sets: list[ImageSet]) -> None:
    """Raise UserError for an odd class that no image can have. Classes without names are called by their numbers."""
    known = {name for images in sets for name in images.class_names}
    unnamed = any(not images.class_names for images in sets)
    for name in labels.classes:
        if name not in known and not (unnamed and name.isdecimal()):
            some = ", ".join(sorted(known)[:SHOWN]) or "numbers, without names"
            raise comm.known_to_all(
                UserError(f"--odd-class (={name}) is no class of the source; its classes are {some}")
            )


def _open_background(trained: Trained, folder: Path, weights: Weights) -> Background:
    opened = open_trained(folder, weights=weights)
    refuse_condition(opened, "--background", "give a run without condition")
    refuse_background(trained.model, opened.model)
    return Background(opened.model, opened.recipe.seed)


def _sort_column(sort: str | None, names: tuple[str, ...]) -> str | None:
    if sort == IN_ORDER:
        return None
    if sort is not None and sort not in names:
        raise UserError(f"--sort (={sort}) must be one of {', '.join(names)} or {IN_ORDER}")
    return sort or names[0]


def _score_all(scoring: Scoring, sets: list[ImageSet], scored: Scored, kind: str) -> dict[str, float]:
    """Score the images of all splits of one source. Returns the metrics that `evaluate` has of them. All ranks call it."""
    model, second = scoring.trained.model, kind == "odd_images"
    bound, earlier = bounds.Bound(model), comm.on_main(scored.table.count)
    for images in sets:
        scores = Scores(
            model,
            partial(scored.take, images, second),
            bound=bound,
            background=scoring.background,
            complexity=scoring.complexity,
        )
        total = images.number or 0
        name = " ".join(filter(None, ("score", "odd" if second else "", images.split)))
        with Progress(name, total, unit="images", shown=comm.is_main()) as progress:
            progress.update(0, passing=True)

            def show(done: int, progress: Progress = progress, total: int = total) -> None:
                done *= comm.world_size()
                progress.update(min(done, total) if total else done)

            measure(model, images.batches(), [scores], seed=scoring.trained.recipe.seed, progress=show)
    if comm.on_main(scored.table.count) == earlier:
        raise comm.known_to_all(DataError(f"no image can be used; {_remedy(scored.skipped)}"))
    return bound.metrics()


def _remedy(skipped: dict[str, dict[str, Any]]) -> str:
    """What to do about images of which none can be used."""
    if not skipped:
        return "give a source that has images"
    firsts = [str(one["first"]) for one in sorted(skipped.values(), key=lambda one: -int(one["images"]))]
    small = any("too small for a crop" in first for first in firsts)
    crop = "; --crop square takes the largest centre square" if small else ""
    return f"{firsts[0]}{crop}"


def _class_name(images: ImageSet, label: int) -> str | None:
    if label < 0:
        return None
    return images.class_names[label] if label < len(images.class_names) else str(label)


def _finish(scoring: Scoring, scored: Scored, files: Files) -> dict[str, Any]:
    """Write the files. Returns the result without the means over all images."""
    table, labelled = scored.table, scoring.labels.given
    by = scoring.sort or scoring.names[0]
    areas = _areas(table) if labelled else []
    paths: dict[str, Any] = {}
    if files.out is not None:
        table.write(files.out, sort=scoring.sort, labelled=labelled)
        paths["table"] = str(files.out)
    if files.maps is not None:
        paths["maps"] = _draw_maps(scoring.trained, scored.extremes, files.maps, by)
    if files.histograms is not None:
        _draw_histograms(scoring.trained, table, areas, files.histograms)
        paths["histograms"] = str(files.histograms)
    protocol = bounds.protocol(scoring.trained.model) | PROTOCOL
    return {
        "protocol": {name: protocol[name] for name in ("bound", "noise", *scoring.names) if name in protocol},
        "scores": list(scoring.names),
        "skipped": scored.skipped,
        "auroc": areas,
        "sort": scoring.sort,
        "highest": list(table.rows(by, limit=SHOWN)),
        "lowest": list(table.rows(by, limit=SHOWN, lowest_first=True)),
        "notes": _notes(areas),
        **paths,
    }


def _areas(table: ScoreTable) -> list[dict[str, Any]]:
    """The AUROC of each score with its standard error and the number of images of each kind. Raises DataError without either."""
    usual, odd = table.number(odd=False), table.number(odd=True)
    if not usual or not odd:
        raise DataError(f"AUROC needs usual and odd images, and there are {usual} and {odd}; choose others")
    areas = []
    for name in table.scores:
        if name not in NOT_RANKED:
            area = auroc(table.values(name, odd=False), table.values(name, odd=True))
            areas.append({"score": name, **area._asdict(), "usual_images": usual, "odd_images": odd})
    return areas


def _notes(areas: list[dict[str, Any]]) -> list[str]:
    """What to say of a bound that misleads."""
    return [
        f"by {one['score']} the odd images are more likely than the usual ones (AUROC {one['auroc']:.3f}): a likelihood prefers "
        "simple images (Nalisnick et al. 2019); see the scores of --background RUN and --complexity png"
        for one in areas
        if one["score"].endswith("elbo_nats") and one["auroc"] < MISLED
    ]


def _draw_histograms(trained: Trained, table: ScoreTable, areas: list[dict[str, Any]], path: Path) -> None:
    panels = [
        (
            one["score"],
            table.values(one["score"], odd=False),
            table.values(one["score"], odd=True),
            f"AUROC {one['auroc']:.3f} (standard error {one['standard_error']:.3f})",
        )
        for one in areas
    ]
    title = trained.title("scores of usual and odd images")
    figures.score_histograms(path, panels, names=("usual", "odd"), title=title)


def _draw_maps(trained: Trained, extremes: Extremes, folder: Path, column: str) -> list[str]:
    """Draw the images of both ends with what the model makes of them. Returns the paths."""
    paths = []
    for name, kept in (("highest", extremes.highest()), ("lowest", extremes.lowest())):
        path = folder / f"{name}.png"
        first = ", ".join(f"{value:.5g}" for value, *_ in kept[:1])
        images, slots = torch.stack([one[3] for one in kept]), torch.tensor([one[1] for one in kept])
        rows = error_maps(trained.model, images, slots, seed=trained.recipe.seed)
        title = trained.title(f"{name} {column}, from {first}")
        figures.image_rows(
            path,
            [(label, pictures.numpy()) for label, pictures in rows],
            title=title,
            view=trained.recipe.view,
        )
        paths.append(str(path))
    return paths
