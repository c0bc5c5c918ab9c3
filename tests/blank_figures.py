"""The curves of trainings without their pixels.

matplotlib takes longer to draw the curves of a tiny training than the training takes. Everything up to the last call is done as ever:
the panels are chosen, lines and texts are placed. Then the picture is white. `tests/figures` looks at pixels, and so do the tests with
the fixture `drawn_curves` and those of processes of their own.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO
from unittest.mock import patch

from PIL import Image

from vaescale.figures import group_rates, training_curves
from vaescale.training import summary

DRAWN = (training_curves, group_rates)


def white(figure: Any, picture: BinaryIO, **_: object) -> None:
    """Write a white PNG of the figure's size, in place of `Figure.savefig`."""
    Image.new("L", figure.canvas.get_width_height(), 255).save(picture, "png")


@contextlib.contextmanager
def white_curves() -> Iterator[None]:
    """While it lasts, what the end of a training draws is white."""

    def without_pixels(draw: Callable[..., None]) -> Callable[..., None]:
        def draw_white(*arguments: Any, **options: Any) -> None:
            from matplotlib.figure import Figure

            with patch.object(Figure, "savefig", white):
                draw(*arguments, **options)

        return draw_white

    with patch.multiple(summary, **{draw.__name__: without_pixels(draw) for draw in DRAWN}):
        yield


@contextlib.contextmanager
def true_curves() -> Iterator[None]:
    """Within `white_curves`: they are drawn after all."""
    with patch.multiple(summary, **{draw.__name__: draw for draw in DRAWN}):
        yield
