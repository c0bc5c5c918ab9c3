"""Texts beside points, none over another: greedy placement on rings around each point."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale.figures.drawing import LABEL_POINTS, plain

DIRECTIONS = 16
RINGS = (0.0, 6.0, 11.0, 18.0, 28.0, 40.0, 55.0, 75.0, 100.0, 130.0, 170.0, 220.0)  # points around a box
GAP_POINTS = 2.0  # between two boxes
MARKER_POINTS = 5.0  # around the centre of a marker
NEIGHBOURS = 3
LEADER_POINTS = 8.0  # a label farther away has a line to its point
COVERED_POINT = 60.0  # what covering a marker costs, in points of distance
NEARER_POINT = 25.0  # what each marker costs that is nearer to the label than the label's own
Box = tuple[float, float, float, float]  # left, bottom, right, top


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    *,
    bounds: Box,
    unit: float = 1.0,
    centred: bool = False,
) -> list[Box]:
    """A box of each size near its point, within bounds and over no other box, while there is room.

    Lengths are in pixels; unit: pixels per point (1/72 inch). centred: begin on the point itself, and let boxes cover points.
    Among the candidates on rings around a point, the nearest one that covers no other box and few points wins.
    """
    markers = np.array(points, dtype=float).reshape(-1, 2)
    placed: dict[int, Box] = {}
    for number in _crowded_first(markers):
        others = np.delete(markers, number, axis=0)
        taken = [*placed.values()]
        placed[number] = _best(markers[number], sizes[number], others, taken, bounds, unit, centred)
    return [placed[number] for number in range(len(points))]


def _crowded_first(markers: NDArray[np.float64]) -> list[int]:
    """The points in order of the mean distance to their nearest neighbours: where room is scarce, labels choose first."""
    if len(markers) < 2:
        return [*range(len(markers))]
    distances = np.sort(np.linalg.norm(markers[:, None] - markers[None], axis=-1), axis=1)
    order: list[int] = np.argsort(distances[:, 1 : 1 + NEIGHBOURS].mean(axis=1), kind="stable").tolist()
    return order


def _best(
    point: NDArray[np.float64],
    size: tuple[float, float],
    others: NDArray[np.float64],
    taken: Sequence[Box],
    bounds: Box,
    unit: float,
    centred: bool,
) -> Box:
    """The candidate of least cost near a point; the box on the point itself if there is no room anywhere."""
    best, least = _box(float(point[0]), float(point[1]), *size), math.inf
    for ring in RINGS[0 if centred else 1 :]:
        if ring >= least:
            break
        for number in range(DIRECTIONS):
            angle = 2 * math.pi * number / DIRECTIONS
            away = 0.0 if centred and not ring else 1.0
            x = point[0] + away * math.cos(angle) * (size[0] / 2 + ring * unit)
            y = point[1] + away * math.sin(angle) * (size[1] / 2 + ring * unit)
            box = _box(x, y, *size)
            inside = (
                box[0] >= bounds[0] and box[1] >= bounds[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
            )
            if not inside or any(overlap(box, other, GAP_POINTS * unit) for other in taken):
                continue
            cost = ring + (0.0 if centred else _cost_of_others(box, point, others, unit))
            if cost < least:
                best, least = box, cost
    return best


def _cost_of_others(box: Box, point: NDArray[np.float64], others: NDArray[np.float64], unit: float) -> float:
    """What a box costs for the other markers that it covers, or that are nearer to it than its own."""
    distances, own = _distances(box, others), _distances(box, point[None])[0]
    covered = int((distances < MARKER_POINTS * unit).sum())
    return COVERED_POINT * covered + NEARER_POINT * int((distances < own).sum())


def _distances(box: Box, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance of points from a box, 0 inside."""
    beside = np.maximum(0, np.maximum(np.array(box[:2]) - points, points - np.array(box[2:])))
    result: NDArray[np.float64] = np.linalg.norm(beside, axis=1)
    return result


def overlap(one: Box, other: Box, gap: float = 0.0) -> bool:
    """Whether two boxes are closer than a gap."""
    return (
        one[0] < other[2] + gap
        and other[0] < one[2] + gap
        and one[1] < other[3] + gap
        and other[1] < one[3] + gap
    )


def label_points(
    axis: Any,
    labels: Sequence[tuple[str, float, float]],
    *,
    colours: Sequence[str],
    inks: Sequence[str] = (),
    centred: bool = False,
    framed: bool = False,
    points: float = LABEL_POINTS,
) -> None:
    """Write (text, x, y) beside the points of an axis whose scales and limits are final, with a line where a text is far away.

    colours: of lines and frames; inks: of letters, by default black. framed: on white, in a frame. centred: on the points themselves where there is room.
    """
    from matplotlib.patheffects import withStroke

    figure = axis.figure
    figure.draw_without_rendering()  # settles the layout, which decides the places of the points
    renderer, unit = figure.canvas.get_renderer(), figure.dpi / 72
    frame = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85}
    texts = [
        axis.text(
            x,
            y,
            plain(text),
            fontsize=points,
            ha="center",
            va="center",
            zorder=5,
            color=ink,
            path_effects=None if framed else [withStroke(linewidth=2.5, foreground="white")],
            weight="bold" if framed else "normal",
            bbox={**frame, "edgecolor": colour} if framed else None,
        )
        for (text, x, y), colour, ink in zip(labels, colours, inks or ["black"] * len(labels), strict=True)
    ]
    places = axis.transData.transform([(x, y) for _, x, y in labels])
    extents = [text.get_window_extent(renderer) for text in texts]
    padding = 0.5 * points * unit if framed else 0.0
    sizes = [(box.width + padding, box.height + padding) for box in extents]
    shown = axis.get_window_extent(renderer)
    boxes = place(
        [(float(x), float(y)) for x, y in places],
        sizes,
        bounds=(shown.x0 + 2, shown.y0 + 2, shown.x1 - 2, shown.y1 - 2),
        unit=unit,
        centred=centred,
    )
    back = axis.transData.inverted()
    for text, box, colour, anchor in zip(texts, boxes, colours, places, strict=True):
        text.set_position(back.transform(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)))
        nearest = (min(max(anchor[0], box[0]), box[2]), min(max(anchor[1], box[1]), box[3]))
        if math.dist(nearest, anchor) > LEADER_POINTS * unit:
            ends = back.transform([nearest, anchor])
            axis.plot(ends[:, 0], ends[:, 1], "-", color=colour, linewidth=0.7, alpha=0.8, zorder=4)
    axis.set_autoscale_on(False)


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2
