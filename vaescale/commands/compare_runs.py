"""Several runs side by side: what of their recipes differs, their last numbers, their curves and pictures; as Markdown and as one
HTML page that needs nothing else.

Runs whose recipes differ in the seed alone are repetitions: their curves are one, with the spread around it.
"""

import base64
import difflib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from vaescale.errors import UserError
from vaescale.system.secrets import redact

Curves = dict[str, list[tuple[float, float]]]
SHOWN_METRICS = (
    "val/neg_elbo_nats",
    "val/neg_profile_elbo_nats",
    "val/bits_per_dim",
    "val/kl_nats",
    "val/mse",
    "val/sigma",
    "val/active_units",
)
CURVES = ("train/neg_elbo_nats", "val/neg_elbo_nats", "train/kl_nats", "val/mse", "train/sigma")
OWN = ("name", "run_dir", "tracking.")  # keys of a recipe that always differ, or say nothing of the model
MORE_IS_BETTER = (  # the last word of a metric's name
    *("log_px_nats", "profile_log_px_nats", "train_log_density_nats", "val_log_density_nats", "active_units"),
    *(
        "effective_samples",
        "mutual_information_nats",
        "psnr_db",
        "ssim",
        "precision",
        "recall",
        "density",
        "coverage",
    ),
    *("val_prior_log_density_nats", "linear_probe", "knn_5", "images_per_second"),
)
CALIBRATED = re.compile(r"/coverage/(\d+)$")  # best where a share is what it says, in percent
NAMED = 8  # metrics in a sentence
SEED = re.compile(r"-seed-\d+$")  # what a sweep adds to a name
SEEN = ("likelihood.dequantize", "data.image_size", "data.channels", "data.crop", "data.resample")
PICTURES = ("reconstructions.png", "samples.png")
MEASURED = (
    "evaluation/*.json",
    "gmm/selection.json",
)  # of a run folder: results that say how they were measured


class Record(NamedTuple):
    """A run: its recipe and last metrics, flat; (step, value) of each metric; its pictures, PNG; the hash of its held-out images;
    and how what verbs measured was measured, in words, by what the names of those metrics begin with.
    """

    name: str
    place: str
    recipe: Mapping[str, Any]
    metrics: Mapping[str, float]
    curves: Curves
    pictures: Mapping[str, bytes]
    data_hash: str = ""
    measured: Mapping[str, str] = MappingProxyType({})


class Comparison(NamedTuple):
    """records, sorted; differing: the recipe keys that do; columns: the metrics that are shown; warnings: why some do not compare."""

    records: list[Record]
    sort: str
    differing: list[str]
    columns: list[str]
    warnings: list[str]


def compare(records: Sequence[Record], *, sort: str | None = None, columns: Sequence[str] = ()) -> Comparison:
    """Sort and choose what is shown. sort: a metric, the best first; by default the bound. columns: metrics besides the usual
    ones. Raises UserError for a metric that no run has.
    """
    known = sorted({name for record in records for name in record.metrics})
    shown = [name for name in SHOWN_METRICS if name in known]
    for name in [*columns, *([sort] if sort else [])]:
        if name not in known:
            raise UserError(f"no run has the metric {name!r}; {_near(name, known)}")
        shown += [name] if name not in shown else []
    sort = sort or (shown[0] if shown else "")
    names = [record.name for record in records]
    records = [
        record if names.count(record.name) == 1 else record._replace(name=f"{record.name} ({record.place})")
        for record in records
    ]
    ordered = sorted(records, key=lambda record: _place(record, sort))
    warnings = [*_warnings(records, sort), *_measured_otherwise(records, shown)]
    return Comparison(ordered, sort, _differing(records), shown, warnings)


def _near(name: str, known: Sequence[str]) -> str:
    """Which metrics there are, those that are likeliest meant, or the verb that makes such ones."""
    first = name.partition("/")[0]
    if first in ("quality", "baselines", "latents") and not any(one.startswith(f"{first}/") for one in known):
        return f"`vaescale {first} RUN` measures what begins with {first}/"
    alike = [one for one in known if name.rpartition("/")[2] in one]
    alike = (
        alike
        or difflib.get_close_matches(name, known, 5, 0.6)
        or [one for one in known if one.startswith(first)]
        or [*known]
    )
    more = f" and {len(alike) - NAMED} more" if len(alike) > NAMED else ""
    return f"there are {', '.join(alike[:NAMED])}{more}"


def measured_by(results: Iterable[bytes]) -> dict[str, str]:
    """How it was measured, from the JSON files that verbs leave in a run folder. What is none says nothing."""
    found: dict[str, str] = {}
    for content in results:
        try:
            said = json.loads(content)["measured"]
            found |= {str(key): str(value) for key, value in said.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found


def groups(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Repetitions together, in order, with a label: the run's name, and how many there are."""
    found: dict[str, list[Record]] = {}
    for record in records:
        said = {
            key: value for key, value in record.recipe.items() if key != "seed" and not key.startswith(OWN)
        }
        found.setdefault(json.dumps(said, sort_keys=True, default=str) if said else record.place, []).append(
            record
        )
    labels = [
        own[0].name if len(own) == 1 else f"{SEED.sub('', own[0].name)} ({len(own)} runs)"
        for own in found.values()
    ]
    return [
        (label if labels.count(label) == 1 else f"{label} in {own[0].place}", own)
        for label, own in zip(labels, found.values(), strict=True)
    ]


def spread(records: Sequence[Record], metric: str) -> list[tuple[float, float, float, float]]:
    """(step, mean, least, greatest) over repetitions, at the steps that all of them have."""
    of_each = [dict(record.curves.get(metric, [])) for record in records]
    steps = sorted(set.intersection(*(set(one) for one in of_each)))
    values = [[one[step] for one in of_each] for step in steps]
    return [(step, sum(own) / len(own), min(own), max(own)) for step, own in zip(steps, values, strict=True)]


def markdown(comparison: Comparison) -> str:
    """One table, best first."""
    head, rows = _cells(comparison)
    lines = [f"| {' | '.join(map(_plain, line))} |" for line in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n" + "".join(f"\n{_plain(words)}\n" for words in comparison.warnings)


def page(comparison: Comparison, figures: Sequence[tuple[str, bytes]], *, title: str) -> str:
    """One HTML page: the table, whose columns sort at a click, the figures (caption, PNG), and each run's pictures side by side.
    It fetches nothing, and nothing that a run says is more than text in it.
    """
    head, rows = _cells(comparison)
    cells = "".join(f"<th>{html.escape(word)}</th>" for word in head)
    lines = "".join(f"<tr>{''.join(f'<td>{html.escape(word)}</td>' for word in row)}</tr>\n" for row in rows)
    warnings = "".join(f'<p class="warning">{html.escape(words)}</p>' for words in comparison.warnings)
    drawn = "".join(f"<h2>{html.escape(caption)}</h2>{_image(png, caption)}" for caption, png in figures)
    strips = ""
    for name in PICTURES:
        own = [
            (record.name, record.pictures[name]) for record in comparison.records if name in record.pictures
        ]
        if own:
            strips += f"<h2>{html.escape(name.removesuffix('.png'))}</h2><div class='strip'>"
            strips += "".join(
                f"<figure><figcaption>{html.escape(who)}</figcaption>{_image(png, who)}</figure>"
                for who, png in own
            )
            strips += "</div>"
    return PAGE.format(
        title=html.escape(title), head=cells, lines=lines, warnings=warnings, drawn=drawn, strips=strips
    )


def _cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    head = ["run", *comparison.differing, *comparison.columns, "step"]
    rows = []
    for record in comparison.records:
        said = [_said(record.recipe.get(key)) for key in comparison.differing]
        numbers = [_shown(record.metrics.get(name)) for name in comparison.columns]
        last = max((points[-1][0] for points in record.curves.values() if points), default=math.nan)
        rows.append([record.name, *said, *numbers, _shown(last)])
    return head, rows


def _differing(records: Sequence[Record]) -> list[str]:
    keys = sorted({key for record in records for key in record.recipe if not key.startswith(OWN)})
    return [key for key in keys if _differs(key, records)]


def _differs(key: str, records: Sequence[Record]) -> bool:
    """Whether runs have several values of it, or some none at all although they are of the same kind."""
    having = [record for record in records if key in record.recipe]
    if len({json.dumps(record.recipe[key], default=str) for record in having}) > 1:
        return True
    kind = f"{key.partition('.')[0]}.kind"
    kinds = {record.recipe.get(kind) for record in having}
    return any(key not in record.recipe and record.recipe.get(kind) in kinds for record in records)


def _warnings(records: Sequence[Record], sort: str) -> list[str]:
    found = []
    without = [record.name for record in records if sort not in record.metrics]
    if without:
        found.append(f"without {sort or 'numbers'}: {', '.join(without)}")
    if len({record.data_hash for record in records}) > 1:
        found.append(
            "these runs were not all measured on the same held-out images: their numbers do not compare"
        )
    for key in SEEN:
        if len({str(record.recipe[key]) for record in records if key in record.recipe}) > 1:
            found.append(f"{key} differs, and with it what the models see: their nats do not compare")
    kinds = {str(record.recipe.get("likelihood.kind")) for record in records}
    masses = kinds & {
        "bernoulli",
        "categorical",
        "bitwise",
        "discretized_logistic",
        "discretized_logistic_mixture",
    }
    if masses and kinds - masses:
        found.append(
            f"bounds of masses ({', '.join(sorted(masses))}) and of densities ({', '.join(sorted(kinds - masses))}) do not "
            "compare"
        )
    if "bernoulli" in kinds and len(kinds) > 1:
        found.append(
            "a bernoulli likelihood is of binarized images: none of its numbers compares with the others'"
        )
    return found


def _measured_otherwise(records: Sequence[Record], columns: Sequence[str]) -> list[str]:
    """Where the runs' numbers of a column were not measured in the same way."""
    found = []
    for column in columns:
        having = [record for record in records if column in record.metrics]
        ways: dict[str, list[str]] = {}
        for record in having:
            said = [words for prefix, words in record.measured.items() if column.startswith(prefix)]
            if said:
                ways.setdefault("; ".join(said), []).append(record.name)
        if len(ways) > 1:
            told = ", but ".join(f"{words} for {', '.join(names)}" for words, names in ways.items())
            found.append(f"{column} was not measured alike and does not compare: {told}")
    return found


def _place(record: Record, metric: str) -> tuple[bool, float, str]:
    """The best first, those without the metric last."""
    value = record.metrics.get(metric, math.nan)
    if not math.isfinite(value):
        return True, 0.0, record.name
    if says := CALIBRATED.search(metric):
        return False, abs(value - float(says[1]) / 100), record.name
    more = metric.rpartition("/")[2] in MORE_IS_BETTER
    return False, -value if more else value, record.name


def _said(value: Any) -> str:
    return "" if value is None else redact(str(value))


def _shown(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


def _plain(words: str) -> str:
    return words.replace("|", "\\|").replace("\n", " ")


def _image(png: bytes, words: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(words, quote=True)}" src="data:image/png;base64,{data}">'


def read_picture(path: Path) -> bytes | None:
    """A PNG file, or None when it is not there or something else."""
    content = path.read_bytes() if path.is_file() else b""
    return content if content.startswith(b"\x89PNG\r\n\x1a\n") else None


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
