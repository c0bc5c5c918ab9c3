"""An HTML page of several runs: a table, charts and strips of pictures. It fetches nothing, and shows text of runs only as text.

The charts are drawn by the page's own script (`browser/`) from the JSON that the page holds; a browser without scripts shows
`stills` in their place. The page's security policy names the script by its hash: no other script runs, whatever a run's text is.
"""

import base64
import hashlib
import html
import itertools
from collections.abc import Sequence
from pathlib import Path

from vaescale.figures.page_content import FIRST_SHOWN, Content, Row, as_json, chart_data

BROWSER = Path(__file__).with_name("browser")
SCRIPTS = ("table.js", "charts.js")  # in this order
# On white and on the dark paper each has a contrast of at least 3. Ten colours and four dashes make 40 distinct lines.
LIGHT_PAPER, DARK_PAPER = "#ffffff", "#15181c"
LIGHT = (
    *("#0060b0", "#d55e00", "#007f4f", "#c2408f", "#b07800", "#222222"),
    *("#7b3fa0", "#0095a8", "#8a2318", "#6b8500"),
)
DARK = (
    *("#4aa8ff", "#ff8a3d", "#2fc79a", "#f08bc0", "#e8b93c", "#f2f2f2"),
    *("#bd93f9", "#8fe3ff", "#d98f7a", "#b7d04a"),
)
INKS = {  # name: light, dark
    "ink": ("#1c1f23", "#e6e8eb"),
    "quiet": ("#5a626b", "#a3abb5"),
    "paper": (LIGHT_PAPER, DARK_PAPER),
    "raised": ("#f3f5f7", "#23282e"),
    "line": ("#cfd5db", "#3d444d"),
    "link": ("#0060a0", "#7ab8ff"),
    "alarm": ("#d55e00", "#ff8a3d"),
}
MOST_NAMED = 8  # runs that a panel lacks
LONG_LETTERS = 16  # of the last part of a column's name, from which on it may be broken
NAME_LETTERS = 7  # the width of what is beside a run's name, in letters


def comparison_page(content: Content) -> str:
    """The page as HTML: one file without a network."""
    script = "".join((BROWSER / name).read_text() for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = html.escape(content.title)
    warnings = "".join(f'<p class="warning">{html.escape(text)}</p>\n' for text in content.warnings)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
{_colours()}{(BROWSER / "page.css").read_text()}</style></head><body>
<h1>{title}</h1>
{warnings}{_table(content)}
{_charts(content)}
{"".join(_strip(heading, pictures, content.rows) for heading, pictures in content.strips)}
<script type="application/json" id="data">{as_json(chart_data(content, colours=len(LIGHT)))}</script>
<script>{script}</script>
</body></html>
"""


def _colours() -> str:
    """The CSS variables of both colour schemes."""
    schemes = [
        "".join(f"--{name}:{values[number]};" for name, values in INKS.items())
        + "".join(f"--c{place}:{colour};" for place, colour in enumerate(series))
        for number, series in enumerate((LIGHT, DARK))
    ]
    return f":root {{{schemes[0]}}}\n@media (prefers-color-scheme: dark) {{ :root {{{schemes[1]}}} }}\n"


def _table(content: Content) -> str:
    metrics = len(content.head) - content.settings
    head = "".join(
        f'<th scope="col"{_sorted(name, content)}{_setting(place >= metrics)}>'
        f'<button type="button" title="sort by {html.escape(name)}">{_column(name)}</button></th>'
        for place, name in enumerate(content.head)
    )
    widest = max((len(row.name) for row in content.rows), default=0) + NAME_LETTERS
    lines = "\n".join(_line(number, row, metrics) for number, row in enumerate(content.rows))
    return f"""<div class="tools live">
<label for="filter">filter</label><input id="filter" type="search" placeholder="words that a row must have" autocomplete="off">
<button type="button" id="all">show all</button><button type="button" id="none">hide all</button>
<output class="quiet" id="count" for="filter"></output></div>
<div class="wide" role="region" aria-label="table of the runs" tabindex="0"><table style="--name: {widest}ch">
<thead><tr><th scope="col"><button type="button" title="sort by name">run</button></th>{head}</tr></thead><tbody>
{lines}
</tbody></table></div>
<p class="quiet live">A click on a column's name sorts, a click on a run's name hides it and shows it again.</p>"""


def _sorted(name: str, content: Content) -> str:
    """The attribute of the column that the rows are sorted by, if its values rise or fall."""
    if name != content.sorted_by:
        return ""
    place = [*content.head].index(name)
    try:
        values = [float(row.cells[place]) for row in content.rows if row.cells[place]]
    except ValueError:
        return ""
    for order, sign in (("ascending", 1), ("descending", -1)):
        if all(sign * one <= sign * other for one, other in itertools.pairwise(values)):
            return f' aria-sort="{order}"'
    return ""


def _setting(is_setting: bool) -> str:
    return ' class="setting"' if is_setting else ""


def _line(number: int, row: Row, metrics: int) -> str:
    name, location = html.escape(row.name), html.escape(row.location)
    link = f'<a href="{html.escape(row.link)}" rel="noopener noreferrer" target="_blank">MLflow</a>'
    cells = "".join(
        f'<td{_setting(place >= metrics)} title="{html.escape(text)}">{html.escape(text)}</td>'
        for place, text in enumerate(row.cells)
    )
    return (
        f'<tr data-run="{number}" data-group="{row.group}"><th scope="row" data-value="{name}"><span>'
        f'<button type="button" class="toggle" data-toggle="{row.group}" aria-pressed="true" title="{location}">'
        f"{_swatch(row.group)}<b>{_breakable(row.name)}</b></button>{link if row.link else ''}</span></th>{cells}</tr>"
    )


def _swatch(group: int, *, has_symbol: bool = False) -> str:
    symbol = ' data-symbol="1"' if has_symbol else ""
    return f'<svg class="swatch" data-group="{group}"{symbol} viewBox="0 0 30 12" aria-hidden="true"></svg>'


def _column(name: str) -> str:
    """A column's name as HTML that may be broken after its last slash or dot, and in the middle of what follows if that is long."""
    at = max(name.rfind("/"), name.rfind(".")) + 1
    first, last = name[:at], name[at:]
    middle = min(
        (place for place, sign in enumerate(last) if sign == "_"),
        key=lambda place: abs(2 * place - len(last)),
        default=0,
    )
    cut = middle + 1 if len(last) > LONG_LETTERS and middle else 0
    return "<wbr>".join(html.escape(part) for part in (first, last[:cut], last[cut:]) if part)


def _breakable(name: str) -> str:
    """A name as HTML that may be broken after a slash, a dot, a dash or an underscore."""
    text = html.escape(name)
    for sign in "/._-":
        text = text.replace(sign, f"{sign}\N{ZERO WIDTH SPACE}")
    return text.replace("\N{ZERO WIDTH SPACE}", "<wbr>")


def _charts(content: Content) -> str:
    drawn: list[tuple[str, str, bool, Sequence[str]]] = [
        (panel.metric, f"{panel.metric} over steps", False, panel.missing) for panel in content.panels
    ]
    if content.plane:
        what = f"{content.plane.y} over {content.plane.x}"
        drawn.append((what, what, True, ()))
    if not drawn:
        return ""
    legend = "".join(
        f'<button type="button" class="toggle" data-toggle="{group}" aria-pressed="true">'
        f"{_swatch(group, has_symbol=True)}{html.escape(label)}</button>"
        for group, label in enumerate(content.groups)
    )
    panels = "\n".join(_panel(number, *each) for number, each in enumerate(drawn))
    stills = "".join(
        f"<h3>{html.escape(caption)}</h3>{_image(png, caption)}" for caption, png in content.stills
    )
    more = len(content.groups) - FIRST_SHOWN
    hidden = f" At first {more} of the {len(content.groups)} lines are hidden." if more > 0 else ""
    several = len(content.rows) > len(content.groups)
    bands = (
        " Runs that differ in the seed alone share a line: their mean, in a band from the least to the greatest."
        if several
        else ""
    )
    return f"""<h2>Curves</h2>
<noscript><style>.live {{ display: none }}</style>{stills}</noscript>
<div class="live"><div class="legend" role="group" aria-label="lines to show">{legend}</div>
<p class="quiet">A click hides a line. Values are under the pointer, or at the arrow keys in a chart that has the focus.{hidden}{bands}</p>
<div class="panels">
{panels}
</div></div>"""


def _panel(number: int, heading: str, label: str, is_plane: bool, missing: Sequence[str]) -> str:
    more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
    without = f"without a value: {', '.join(missing[:MOST_NAMED])}{more}" if missing else ""
    whole = (
        ""
        if is_plane
        else '<button type="button" class="choice" data-choice="isWhole" aria-pressed="false">whole range</button>'
    )
    return f"""<figure class="panel" data-panel="{number}"><figcaption><span>{html.escape(heading)}</span>
<button type="button" class="choice" data-choice="isLog" aria-pressed="false">log</button>{whole}</figcaption>
<svg role="application" tabindex="0" aria-label="{html.escape(label)}; arrow keys read values"></svg>
<p class="quiet empty" hidden>no run that is shown has it</p>
<p class="quiet cut" hidden>the largest values are cut off</p>
<p class="quiet"{"" if without else " hidden"}>{html.escape(without)}</p>
<div class="tip" hidden></div><div class="unseen" aria-live="polite"></div></figure>"""


def _strip(heading: str, pictures: Sequence[tuple[int, str, bytes]], rows: Sequence[Row]) -> str:
    figures = "".join(
        f'<figure data-run="{row}"><button type="button" aria-expanded="false" aria-label="enlarge {html.escape(heading)} of '
        f'{html.escape(rows[row].name)}">{_image(png, f"{heading} of {rows[row].name}")}</button>'
        f"<figcaption>{html.escape(f'{rows[row].name}{what}')}</figcaption></figure>"
        for row, what, png in pictures
    )
    return f"<h2>{html.escape(heading)}</h2><div class='strip'>{figures}</div>\n"


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
