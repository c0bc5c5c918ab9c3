"""An HTML page with a table, figures and strips of pictures. It fetches nothing, and shows text of runs only as text."""

import base64
import html
from collections.abc import Sequence

Picture = tuple[str, bytes]  # a caption and a PNG


def comparison_page(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str,
    warnings: Sequence[str] = (),
    figures: Sequence[Picture] = (),
    strips: Sequence[tuple[str, Sequence[Picture]]] = (),
) -> str:
    """The page as HTML. A click on a cell of the head sorts the table by that column.

    figures: figures in one column. strips: pictures side by side under a heading, such as each run's samples.
    """
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>\n" for row in rows)
    return PAGE.format(
        title=html.escape(title),
        head=cells,
        lines=lines,
        warnings="".join(f'<p class="warning">{html.escape(text)}</p>' for text in warnings),
        drawn="".join(f"<h2>{html.escape(caption)}</h2>{_image(png, caption)}" for caption, png in figures),
        strips="".join(_strip(heading, pictures) for heading, pictures in strips),
    )


def _strip(heading: str, pictures: Sequence[Picture]) -> str:
    figures = "".join(
        f"<figure><figcaption>{html.escape(caption)}</figcaption>{_image(png, caption)}</figure>"
        for caption, png in pictures
    )
    return f"<h2>{html.escape(heading)}</h2><div class='strip'>{figures}</div>"


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(caption, quote=True)}" src="data:image/png;base64,{data}">'


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1400px; padding: 0 1em; color: #222; background: #fff }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
.wide {{ overflow-x: auto }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3em .8em; text-align: right; white-space: nowrap }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: #fff }}
th {{ cursor: pointer; border-bottom: 2px solid #888 }}
th:hover {{ color: #0072b2 }}
img {{ max-width: 100%; height: auto }}
.strip {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1em }}
figure {{ margin: 0 }}
figcaption {{ font-weight: 600 }}
.warning {{ border-left: 4px solid #d55e00; padding-left: .8em }}
</style></head><body>
<h1>{title}</h1>
{warnings}
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{lines}</tbody></table></div>
{drawn}
{strips}
<script>
document.querySelectorAll("th").forEach((th, column) => th.addEventListener("click", () => {{
  const body = document.querySelector("tbody"), rows = [...body.rows];
  const value = row => row.cells[column].textContent, number = row => value(row) === "" ? Infinity : Number(value(row));
  const numeric = rows.every(row => !Number.isNaN(number(row))), sign = th.dataset.up = th.dataset.up === "1" ? "-1" : "1";
  rows.sort((a, b) => sign * (numeric ? number(a) - number(b) : value(a).localeCompare(value(b))));
  rows.forEach(row => body.append(row));
}}));
</script>
</body></html>
"""
