"""Tables for a terminal: aligned columns, in blocks below one another where they do not fit side by side."""

from collections.abc import Sequence

MOST_LETTERS = 28  # of a cell; longer ones are cut
GAP = "  "
ELLIPSIS = "..."


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, width: int) -> str:
    """Lines of text, the first column at the left of each block and the others right-aligned below their names.

    A name such as `val/neg_elbo_nats` takes two lines. width: of the terminal, in letters; a column that is wider alone is kept.
    """
    columns = [_cut([row[place] for row in rows]) for place in range(1, len(head))]
    names = [_parted(name) for name in head[1:]]
    widths = [max(map(len, (*name, *column))) for name, column in zip(names, columns, strict=True)]
    labels = [row[0] for row in rows]
    left = max(map(len, (head[0], *labels)))
    blocks = _blocks(widths, width - left)
    return "\n\n".join(
        "\n".join(
            _line(label, [cells[number] for cells in shown], [widths[place] for place in block], left)
            for number, label in enumerate(("", head[0], *labels))
        )
        for block in blocks
        for shown in [[[*names[place], *columns[place]] for place in block]]
    )


def _blocks(widths: Sequence[int], room: int) -> list[list[int]]:
    """The columns of each block: as many as fit side by side."""
    blocks: list[list[int]] = [[]]
    used = 0
    for place, width in enumerate(widths):
        needed = len(GAP) + width
        if blocks[-1] and used + needed > room:
            blocks.append([])
            used = 0
        blocks[-1].append(place)
        used += needed
    return blocks


def _line(label: str, cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    texts = [f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)]
    return GAP.join([f"{label:<{left}}", *texts]).rstrip()


def _parted(name: str) -> tuple[str, str]:
    """A name in two lines, parted at its last slash or dot."""
    at = max(name.rfind("/"), name.rfind("."))
    return (name[: at + 1], name[at + 1 :]) if 0 < at < len(name) - 1 else ("", name)


def _cut(cells: Sequence[str]) -> list[str]:
    return [
        cell if len(cell) <= MOST_LETTERS else cell[: MOST_LETTERS - len(ELLIPSIS)] + ELLIPSIS
        for cell in cells
    ]
