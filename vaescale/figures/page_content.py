"""The content of a comparison's page, and the JSON that its charts are drawn from."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Picture = tuple[str, bytes]  # a caption and a PNG
Point = tuple[float, float, float, float]  # step; mean, least and greatest over repetitions

FIRST_SHOWN = 20  # lines; further ones are hidden until they are clicked
MOST_POINTS = 400  # of a line, of at most FIRST_SHOWN lines
FEWEST_POINTS = 100


class Row(NamedTuple):
    """A run in the table. group: the number of its line in the charts. cells: texts. link: address of another page on it, or ""."""

    name: str
    location: str
    group: int
    cells: Sequence[str]
    link: str = ""


class Panel(NamedTuple):
    """Curves of a metric over steps, as (group, points). missing: names of the runs that have no value of it."""

    metric: str
    lines: Sequence[tuple[int, Sequence[Point]]]
    is_log: bool = False
    missing: Sequence[str] = ()


class Plane(NamedTuple):
    """Two metrics of each run against each other, as (row, x, y)."""

    x: str
    y: str
    points: Sequence[tuple[int, float, float]]


class Content(NamedTuple):
    """What a page shows. head: names of the columns after the run's name, the last `settings` of which are keys of recipes.

    groups: the label of each line. strips: pictures side by side under a heading, each with the number of its row and what it is.
    """

    title: str
    head: Sequence[str]
    settings: int
    rows: Sequence[Row]
    groups: Sequence[str]
    sorted_by: str = ""
    panels: Sequence[Panel] = ()
    plane: Plane | None = None
    warnings: Sequence[str] = ()
    stills: Sequence[Picture] = ()
    strips: Sequence[tuple[str, Sequence[tuple[int, str, bytes]]]] = ()


def as_json(content: Any) -> str:
    """JSON that ends no element of the page, whatever its texts are."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def chart_data(content: Content, *, colours: int) -> dict[str, Any]:
    """What the charts are drawn from. Many lines have fewer points each, so that the page stays small.

    colours: their number; the script takes them in turn.
    """
    most = max(FEWEST_POINTS, min(MOST_POINTS, MOST_POINTS * FIRST_SHOWN // max(1, len(content.groups))))
    panels: list[dict[str, Any]] = [
        {
            "title": panel.metric,
            "x": "step",
            "log": panel.is_log,
            "plane": False,
            "lines": [{"group": group, "points": thinned(points, most)} for group, points in panel.lines],
        }
        for panel in content.panels
    ]
    if content.plane:
        plane = content.plane
        heights = [y for _, _, y in plane.points]
        lines = [
            {"group": content.rows[row].group, "run": row, "name": content.rows[row].name, "points": [[x, y]]}
            for row, x, y in plane.points
        ]
        is_log = bool(heights) and min(heights) > 0
        panels.append({"title": plane.y, "x": plane.x, "log": is_log, "plane": True, "lines": lines})
    return {
        "groups": [*content.groups],
        "colours": colours,
        "first": FIRST_SHOWN,
        "panels": panels,
    }


def thinned(points: Sequence[Point], most: int) -> list[list[float]]:
    """Points with six digits, at most about `most` of them: the first, the last, and the extremes of each stretch between.

    A point whose least and greatest value are its mean has two numbers.
    """
    kept = [*points]
    if len(kept) > most:
        size = math.ceil(2 * len(kept) / most)
        chosen = {0, len(kept) - 1}
        for start in range(0, len(kept), size):
            stretch = range(start, min(start + size, len(kept)))
            chosen |= {min(stretch, key=lambda n: kept[n][1]), max(stretch, key=lambda n: kept[n][1])}
        kept = [kept[number] for number in sorted(chosen)]
    return [
        [float(f"{value:.6g}") if place else value for place, value in enumerate(_short(point))]
        for point in kept
    ]


def _short(point: Point) -> Sequence[float]:
    return point[:2] if len(set(point[1:])) == 1 else point
