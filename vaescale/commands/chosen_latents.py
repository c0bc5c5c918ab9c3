"""Pictures that `vaescale sample` draws at chosen latents, written to RUN/figures and sent to MLflow.

They are lines between images, the plane of two latents, and samples before and after a descent to a smaller sigma.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vaescale import figures, noise
from vaescale.aggregate.class_choice import ClassChoice
from vaescale.aggregate.refinement import RefinedSamples, refine_draws
from vaescale.aggregate.sampling import Prior, from_latents
from vaescale.aggregate.traversal import between_conditions, lines_between, plane_means
from vaescale.aggregate.vector_choice import VectorChoice
from vaescale.errors import UserError
from vaescale.mixtures.by_class import ClassMixtures
from vaescale.mixtures.gaussian import Mixture
from vaescale.runs.tracking import push
from vaescale.system.console import say
from vaescale.trained import Trained, open_split

SHOWN = 24  # refined samples in the picture
ROW = 12
COLUMNS, MOST_CLASSES = 12, 40  # samples of a class, and classes, in the pictures by class
ROWS_BETWEEN = 4  # draws of z on the way from one class to another


def interpolate(trained: Trained, pairs: Sequence[tuple[int, int]], *, seed: int) -> dict[str, Any]:
    """Draw figures/interpolations.png: decoded means along straight lines between held-out images, by number.

    Raises UserError for a number beyond the held-out images.
    """
    recipe, reader = trained.recipe, open_split(trained.recipe, "val")
    lines = lines_between(trained.model, reader, pairs, data_seed=recipe.seed, seed=seed)
    rows = [(f"{first} to {second}", line) for (first, second), line in zip(pairs, lines, strict=True)]
    path = trained.folder / "figures" / "interpolations.png"
    title = trained.title("from one image (left) to another (right), decoded means between")
    figures.image_rows(path, rows, title=title, view=recipe.view)
    push(trained.folder, recipe.tracking)
    return {"pairs": [list(pair) for pair in pairs], "figure": str(path)}


def map_latents(
    trained: Trained, choice: ClassChoice | VectorChoice | None, side: int, *, seed: int
) -> dict[str, Any]:
    """Draw figures/latent_map.png: side x side decoded means over the plane of two latents.

    choice: of a conditional model, the class or the vector. Raises UserError unless the model has exactly two latents.
    """
    y = _single(trained, choice, side * side)
    of_class = f", {choice.text}" if choice is not None and y is not None else ""
    means, values = plane_means(trained.model.given(y), side, seed=seed)
    path = trained.folder / "figures" / "latent_map.png"
    title = trained.title(f"decoded means over the plane of the latents{of_class}")
    figures.image_map(path, means, values=values, title=title, view=trained.recipe.view)
    push(trained.folder, trained.recipe.tracking)
    return {"side": side, "figure": str(path)}


def _single(trained: Trained, choice: ClassChoice | VectorChoice | None, number: int) -> Tensor | None:
    """The one condition of a map, for each of its points. Raises UserError where there are several."""
    if isinstance(choice, VectorChoice):
        if len(choice.rows) > 1:
            raise UserError("--map of a conditional run is drawn for one vector; give --vector")
        return choice.rows.expand(number, -1)
    if choice is None or choice.chosen is not None:
        return None if choice is None or choice.chosen is None else torch.full((number,), choice.chosen)
    if trained.model.condition is not None:
        raise UserError("--map of a conditional run is drawn for one class; give --class")
    return None


def draw_classes(
    trained: Trained, sources: Mapping[str, Prior], choice: ClassChoice, *, temperature: float, seed: int
) -> list[str]:
    """Draw figures/samples-classes.png, a row of decoded means for each class, and another picture for each further source of z.

    The columns share the noise of z. Returns the paths.
    """
    paths = []
    device, names = trained.device, choice.table.names[:MOST_CLASSES]
    if len(names) < len(choice.table.names):
        say(
            f"the pictures by class show the first {len(names)} of {len(choice.table.names)} classes; --class draws any"
        )
    stream = noise.Stream(seed, 0, torch.arange(COLUMNS, device=device))
    for name, source in sources.items():
        if trained.model.condition is None and not isinstance(source, ClassMixtures):
            continue  # the classes make no difference
        rows = []
        for number, of_class in enumerate(names):
            chosen = choice._replace(chosen=number)
            params = from_latents(trained.model, source, stream, temperature, choice=chosen)
            rows.append((of_class, trained.model.likelihood.mean(params).float().cpu().numpy()))
        ending = "" if source is None else "-" + name.replace(" ", "-")
        paths.append(trained.folder / "figures" / f"samples-classes{ending}.png")
        title = trained.title(f"decoded means, z of the {name}")
        figures.image_strips(paths[-1], rows, title=title, view=trained.recipe.view)
    push(trained.folder, trained.recipe.tracking)
    return [str(path) for path in paths]


def draw_between(
    trained: Trained,
    pairs: Sequence[tuple[str, str]],
    choice: ClassChoice | VectorChoice | None,
    *,
    seed: int,
) -> dict[str, Any]:
    """Draw figures/class_interpolations.png, or vector_interpolations.png: decoded means from one class to another, or from a vector of
    `choice` to another by number, where each row has the same noise of z.

    Raises UserError for a run without a condition, and for another class or number.
    """
    if choice is None or trained.model.condition is None:
        raise UserError(
            f"--between needs a conditional run, and {trained.folder} has no condition; leave it out"
        )
    rows, what = [], "vector" if isinstance(choice, VectorChoice) else "class"
    for pair in pairs:
        names, ends = _ends(choice, pair)
        means = between_conditions(trained.model, ends, rows=ROWS_BETWEEN, seed=seed)
        rows += [(f"{names[0]} to {names[1]}" if not row else "", means[row]) for row in range(len(means))]
    path = trained.folder / "figures" / f"{what}_interpolations.png"
    title = trained.title(
        f"from one {what} (left) to another (right), decoded means, the same noise of z in a row"
    )
    figures.image_strips(path, rows, title=title, view=trained.recipe.view)
    push(trained.folder, trained.recipe.tracking)
    return {"between": [list(pair) for pair in pairs], "seed": seed, "figure": str(path)}


def _ends(choice: ClassChoice | VectorChoice, pair: tuple[str, str]) -> tuple[list[str], Tensor]:
    """The names of two classes and the classes, or the numbers of two vectors and the vectors. Raises UserError."""
    if isinstance(choice, ClassChoice):
        numbers = [choice.table.number_of(word) for word in pair]
        return [choice.table.names[number] for number in numbers], torch.tensor(numbers)
    for word in pair:
        if not word.isdecimal() or int(word) >= len(choice.rows):
            raise UserError(
                f"--between {','.join(pair)} of a run with vectors takes numbers of the {choice.text}, 0 to {len(choice.rows) - 1}"
            )
    return [f"vector {word}" for word in pair], choice.rows[[int(word) for word in pair]]


def refine_samples(
    trained: Trained,
    mixture: Mixture | None,
    *,
    count: int,
    steps: int,
    rate: float,
    weight: float,
    temperature: float,
    seed: int,
) -> dict[str, Any]:
    """Draw figures/refined.png: samples of the prior, or of a mixture in its place, before and after `refine`.

    Returns the means of log sigma and of the density before and after. Raises UserError when sigma does not depend on z.
    """
    device = next(trained.model.parameters()).device
    stream = noise.Stream(seed, 0, torch.arange(count, device=device))
    samples = refine_draws(
        trained.model, mixture, stream, steps=steps, rate=rate, weight=weight, temperature=temperature
    )
    source = "prior" if mixture is None else f"mixture of {len(mixture.weights)}"
    path = trained.folder / "figures" / "refined.png"
    title = trained.title(f"{source}, {steps} steps towards a smaller sigma(z)")
    figures.image_rows(path, _rows(samples), title=title, view=trained.recipe.view)
    push(trained.folder, trained.recipe.tracking)
    latents, before, after = samples
    return {
        "prior": source,
        "count": count,
        "steps": steps,
        "weight": weight,
        "mean_log_sigma_before": float(latents.log_sigma_before.mean()),
        "mean_log_sigma_after": float(latents.log_sigma_after.mean()),
        "log_density_before_nats": float(latents.density_before.mean()),
        "log_density_after_nats": float(latents.density_after.mean()),
        "distance_of_z": float((latents.after - latents.before).norm(dim=1).mean()),
        "change_of_images_rms": float((after - before).square().mean().sqrt()),
        "figure": str(path),
    }


def _rows(samples: RefinedSamples) -> list[tuple[str, Any]]:
    """Rows of images before, images after, and their difference in units of the largest one."""
    before, after = samples.images_before, samples.images_after
    difference = (after - before).abs().mean(1, keepdim=True).expand_as(before)
    largest = max(float(difference.max()), 1e-12)
    kinds = (
        ("drawn", before),
        ("refined", after),
        (f"|difference|, 0 to {largest:.2g}", difference / largest),
    )
    return [
        (name, images[start : start + ROW].cpu().numpy())
        for start in range(0, min(SHOWN, len(before)), ROW)
        for name, images in kinds
    ]
