"""Pictures of what a run of sequences makes of held-out contexts: strips of frames, and an animation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vaescale import figures
from vaescale.data.lookup import MOST_LOOKED_AT, first_usable, images_at
from vaescale.data.reader import ShardReader
from vaescale.errors import DataError, UserError
from vaescale.evaluation.futures import LEVEL, strips
from vaescale.models.sequence_model import SequenceModel
from vaescale.runs.tracking import push
from vaescale.system.console import say
from vaescale.system.secrets import redact
from vaescale.trained import Trained, open_split

FUTURES = 20  # default
MOST_FUTURES = 1000
FEW, SHOWN = 4, 2  # sequences in a picture, and random futures of each


def draw_futures(trained: Trained, *, number: int, seed: int) -> dict[str, Any]:
    """Draw RUN/figures/samples.png and samples.gif, and samples.mp4 where PyAV with libx264 is installed: of the first held-out sequences the truth, the
    decoded means, the best of `number` futures by PSNR, two of them, and sigma where it differs. Returns a description and the paths. Raises
    UserError for too many, DataError where no sequence can be used.
    """
    if number > MOST_FUTURES:
        raise UserError(f"--count (={number}) must be at most {MOST_FUTURES} futures; lower it")
    model = trained.model
    assert isinstance(model, SequenceModel)
    reader = open_split(trained.recipe, "val")
    of_each, scale = strips_of(trained, reader, count=FEW, futures=number, shown=SHOWN, seed=seed)
    if not of_each:
        raise DataError(
            f"none of the first {min(len(reader), MOST_LOOKED_AT)} held-out sequences of {redact(trained.recipe.data.val)} can be used; `vaescale verify-shards DIR "
            "--deep` names their faults"
        )
    folder, view = trained.folder / "figures", trained.recipe.view
    strip, clip = folder / "samples.png", folder / "samples.gif"
    context = model.context
    title = trained.title(f"frames of held-out sequences; futures begin after frame {context}")
    rows = [row for rows in of_each for row in rows]
    figures.image_strips(strip, rows, title=title, view=view, scale=scale)
    paths = [strip, *figures.animation(clip, of_each, given=context, view=view, scale=scale)]
    if len(paths) == 2:  # a strip and a GIF
        say("for samples.mp4 beside the GIF install PyAV with libx264: pip install 'vaescale[video]'")
    push(trained.folder, trained.recipe.tracking)
    return {
        "sequences": len(of_each),
        "context": context,
        "horizon": model.frames - context,
        "futures": number,
        "seed": seed,
        "figures": [str(path) for path in paths],
    }


def strips_of(
    trained: Trained,
    reader: ShardReader,
    *,
    count: int,
    futures: int = 1,
    shown: int = 1,
    seed: int | None = None,
) -> tuple[list[list[tuple[str, Any]]], figures.Scale | None]:
    """`futures.strips` of the first `count` usable sequences, as arrays, and the scale of their sigma. seed: by default the recipe's.

    Nothing where none of the first ones can be used.
    """
    model = trained.model
    assert isinstance(model, SequenceModel)
    slots = first_usable(reader, count)
    if not len(slots):
        return [], None
    images = images_at(reader, slots)
    seed = trained.recipe.seed if seed is None else seed
    drawn = strips(model, images, slots, seed=seed, futures=futures, shown=shown)
    of_each = [[(name, frames.numpy()) for name, frames in rows] for rows in drawn.rows]
    if drawn.level is None:
        return of_each, None
    largest = max(float(np.nanmax(frames)) for rows in of_each for name, frames in rows if name == LEVEL)
    return of_each, figures.Scale(LEVEL, largest, f"{drawn.level}, of values in [0, 1]")


def refuse_for_futures(given: Sequence[str]) -> None:
    """Raise UserError for options of `sample` that a run of sequences does not have. given: names of options."""
    for name in given:
        if name != "count":
            raise UserError(
                f"--{name} does not apply to a model of sequences, whose futures follow held-out contexts; leave it out"
            )
