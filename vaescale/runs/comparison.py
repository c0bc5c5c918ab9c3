"""A comparison of runs: differences of their recipes, their last metrics, and warnings of metrics that do not compare.

Runs whose recipes differ only in the seed are repetitions: they share one curve, which shows their spread.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from vaescale.errors import UserError
from vaescale.system.columns import aligned
from vaescale.system.secrets import redact

Curves = dict[str, list[tuple[float, float]]]
SHOWN_METRICS = (
    "val/neg_elbo_nats",
    "val/neg_profile_elbo_nats",
    "val/neg_elbo_nats_per_frame",
    "val/neg_profile_elbo_nats_per_frame",
    "val/bits_per_dim",
    "val/kl_nats",
    "val/mse",
    "val/sigma",
    "val/active_units",
    "val/code_perplexity",
    "evaluation/val/horizon_neg_elbo_nats",
    "evaluation/val/best_psnr_db",
    "evaluation/val/best_ssim",
)
UNCOMPARED = (
    "name",
    "run_dir",
    "tracking.",
    "figures.",
)  # recipe keys that always differ or do not concern the model
MORE_IS_BETTER = (  # the last part of a metric's name; results of verbs name further metrics
    *("log_px_nats", "profile_log_px_nats", "train_log_density_nats", "val_log_density_nats", "active_units"),
    *("effective_samples", "mutual_information_nats", "psnr_db", "ssim", "precision", "recall", "density"),
    *("coverage", "val_prior_log_density_nats", "linear_probe", "knn_5", "images_per_second"),
)
CALIBRATED = re.compile(r"/(?:interval_)?coverage/(\d+)$")  # best where the share equals this percentage
MOST_NAMED = 8  # metrics in a sentence
SEED = re.compile(r"-seed-\d+$")  # what a sweep adds to a name
IMAGE_KEYS = (
    *("likelihood.dequantize", "data.image_size", "data.channels", "data.crop", "data.resample"),
    *("data.dtype", "data.range"),
)
EVALUATED = "training.evaluate_images"
MASSES = ("mass", "binary mass")


class Record(NamedTuple):
    """A run, with its recipe and its last metrics, both flat.

    location: its folder, or its id in MLflow. curves: (step, value) of each metric. pictures: PNG by file name. data_hash: of
    the held-out images. measured: how verbs measured metrics, as a sentence, by the beginning of the metrics' names.
    limited: what limits a metric's value in place of the model, by the metric's name.
    more_is_better: names of metrics. link: address of the run's page in MLflow, or "". measure: of the likelihood, `density`, `mass` or `binary mass`; empty when unknown.
    """

    name: str
    location: str
    recipe: Mapping[str, Any]
    metrics: Mapping[str, float]
    curves: Curves
    pictures: Mapping[str, bytes]
    data_hash: str = ""
    measured: Mapping[str, str] = MappingProxyType({})
    more_is_better: frozenset[str] = frozenset()
    measure: str = ""
    limited: Mapping[str, str] = MappingProxyType({})
    link: str = ""

    def last_step(self) -> float | None:
        """The last step with a metric, None without one."""
        return max((points[-1][0] for points in self.curves.values() if points), default=None)


class Comparison(NamedTuple):
    """The content of a comparison.

    records: sorted by the metric `sort`. differing: the recipe keys that differ. columns: the metrics shown. warnings: which
    metrics do not compare, and why.
    """

    records: list[Record]
    sort: str
    differing: list[str]
    columns: list[str]
    warnings: list[str]


def compare(records: Sequence[Record], *, sort: str | None = None, columns: Sequence[str] = ()) -> Comparison:
    """Sort runs, and choose the recipe keys and metrics to show.

    sort: a metric, the best run first; by default the bound on held-out images. columns: metrics besides the usual ones. Raises
    UserError for a metric that no run has.
    """
    known = sorted({name for record in records for name in record.metrics})
    shown = [name for name in SHOWN_METRICS if name in known]
    for name in [*columns, *([sort] if sort else [])]:
        if name not in known:
            raise UserError(f"no run has the metric {name!r}; {_near(name, known)}")
        shown += [name] if name not in shown else []
    metric = sort or (shown[0] if shown else "")
    names = [record.name for record in records]
    records = [
        record
        if names.count(record.name) == 1
        else record._replace(name=f"{record.name} ({record.location})")
        for record in records
    ]
    more = is_more_better(metric, records)
    ordered = sorted(records, key=lambda record: _sort_key(record, metric, more=more))
    warnings = [
        *_warnings(records, metric),
        *_kind_warnings(records),
        *_measure_warnings(records),
        *_measured_otherwise(records, shown),
        *_limited(records, shown),
    ]
    return Comparison(ordered, metric, _differing(records), shown, warnings)


def is_more_better(metric: str, records: Sequence[Record]) -> bool:
    """Whether larger values of a metric are better, according to its name or to a run's results."""
    return metric.rpartition("/")[2] in MORE_IS_BETTER or any(
        metric in record.more_is_better for record in records
    )


def measured_by(results: Iterable[bytes]) -> dict[str, str]:
    """How metrics were measured, from the JSON files that verbs leave in a run folder. Other content is ignored."""
    return _notes(results, "measured")


def limited_by(results: Iterable[bytes]) -> dict[str, str]:
    """What limits metrics in place of the model, from the key `limited` of JSON results. Other content is ignored."""
    return _notes(results, "limited")


def _notes(results: Iterable[bytes], key: str) -> dict[str, str]:
    """The sentences of all results under a key."""
    sentences: dict[str, str] = {}
    for result in _objects(results):
        notes = result.get(key)
        if isinstance(notes, dict):
            sentences |= {str(name): str(sentence) for name, sentence in notes.items()}
    return sentences


def larger_is_better(results: Iterable[bytes]) -> frozenset[str]:
    """The metrics that the key `more_is_better` of JSON results names in full. Other content is ignored."""
    lists = [result.get("more_is_better") for result in _objects(results)]
    return frozenset(
        name for names in lists if isinstance(names, list) for name in names if isinstance(name, str)
    )


def _objects(results: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects among the contents of files."""
    for content in results:
        try:
            result = json.loads(content)
        except (ValueError, RecursionError):
            continue
        if isinstance(result, dict):
            yield result


def groups(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Group repetitions, in order; each group has a label: the run's name and the number of runs."""
    by_recipe: dict[str, list[Record]] = {}
    for record in records:
        settings = {
            key: value
            for key, value in record.recipe.items()
            if key != "seed" and not key.startswith(UNCOMPARED)
        }
        recipe = json.dumps(settings, sort_keys=True, default=str) if settings else record.location
        by_recipe.setdefault(recipe, []).append(record)
    grouped = list(by_recipe.values())
    labels = [
        group[0].name if len(group) == 1 else f"{SEED.sub('', group[0].name)} ({len(group)} runs)"
        for group in grouped
    ]
    return [
        (label if labels.count(label) == 1 else f"{label} in {group[0].location}", group)
        for label, group in zip(labels, grouped, strict=True)
    ]


def spread(records: Sequence[Record], metric: str) -> list[tuple[float, float, float, float]]:
    """Statistics (step, mean, least, greatest) over the repetitions that have the metric, at the steps that all of them have.

    Where they have no step in common, at each step over those that have it.
    """
    curves = [curve for record in records if (curve := dict(finite_points(record, metric)))]
    if not curves:
        return []
    steps = set.intersection(*map(set, curves)) or set.union(*map(set, curves))
    columns = [(step, [curve[step] for curve in curves if step in curve]) for step in sorted(steps)]
    return [(step, sum(values) / len(values), min(values), max(values)) for step, values in columns]


def finite_points(record: Record, metric: str) -> list[tuple[float, float]]:
    """The curve of a metric without NaN and Inf, which MLflow keeps."""
    return [(step, value) for step, value in record.curves.get(metric, []) if math.isfinite(value)]


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table, as text without credentials: numbers, then the recipe keys that differ."""
    head = ["run", *comparison.columns, "step", *comparison.differing]
    rows = []
    for record in comparison.records:
        numbers = [_number(record.metrics.get(name)) for name in comparison.columns]
        settings = [_setting(record.recipe.get(key)) for key in comparison.differing]
        rows.append([record.name, *numbers, _number(record.last_step()), *settings])
    return head, rows


def in_brief(comparison: Comparison) -> list[dict[str, Any]]:
    """A row for each run, the best first: name, place, metrics, step, and the recipe keys that differ."""
    return [
        {
            "name": record.name,
            "place": record.location,
            **{name: record.metrics.get(name) for name in comparison.columns},
            "step": record.last_step(),
            **{key: record.recipe.get(key) for key in comparison.differing},
        }
        for record in comparison.records
    ]


def in_columns(brief: Sequence[Mapping[str, Any]], *, width: int) -> str:
    """The rows of `in_brief` as lines of text in columns, no wider than `width` letters. Credentials are cut out."""
    keys = [key for key in brief[0] if key not in ("name", "place")] if brief else []
    rows = [[str(row["name"]), *(_text(row[key]) for key in keys)] for row in brief]
    return aligned(["run", *keys], rows, width=width)


def markdown(comparison: Comparison) -> str:
    """The comparison in Markdown: a table with the best run first, and the warnings."""
    head, rows = cells(comparison)
    lines = [f"| {' | '.join(map(_plain, line))} |" for line in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n" + "".join(f"\n{_plain(text)}\n" for text in comparison.warnings)


def _near(name: str, known: Sequence[str]) -> str:
    """A phrase with the metrics that are most likely meant, or the verb that measures such metrics."""
    first = name.partition("/")[0]
    if first in ("quality", "baselines", "latents") and not any(
        metric.startswith(f"{first}/") for metric in known
    ):
        return f"`vaescale {first} RUN` measures what begins with {first}/"
    similar = (
        [metric for metric in known if name.rpartition("/")[2] in metric]
        or difflib.get_close_matches(name, known, 5, 0.6)
        or [metric for metric in known if metric.startswith(first)]
        or [*known]
    )
    more = f" and {len(similar) - MOST_NAMED} more" if len(similar) > MOST_NAMED else ""
    return f"there are {', '.join(similar[:MOST_NAMED])}{more}"


def _differing(records: Sequence[Record]) -> list[str]:
    keys = sorted({key for record in records for key in record.recipe if not key.startswith(UNCOMPARED)})
    return [key for key in keys if _differs(key, records)]


def _differs(key: str, records: Sequence[Record]) -> bool:
    """Whether runs have several values of a recipe key, or some of the same kind lack it."""
    having = [record for record in records if key in record.recipe]
    if len({json.dumps(record.recipe[key], default=str) for record in having}) > 1:
        return True
    kind = f"{key.partition('.')[0]}.kind"
    kinds = {record.recipe.get(kind) for record in having}
    return any(key not in record.recipe and record.recipe.get(kind) in kinds for record in records)


def _warnings(records: Sequence[Record], sort: str) -> list[str]:
    """Warnings of runs without the metric `sort`, and of held-out images that differ."""
    warnings = []
    without = [record.name for record in records if sort not in record.metrics]
    if without:
        warnings.append(f"without {sort or 'numbers'}: {', '.join(without)}")
    if len({record.data_hash for record in records}) > 1:
        warnings.append(
            "these runs were not all measured on the same held-out images: their numbers do not compare"
        )
    for record in records:
        curve, last = record.curves.get(sort), record.last_step()
        if curve and last is not None and curve[-1][0] < last:
            measured = curve[-1][0]
            warnings.append(
                f"{record.name}: {sort} is of step {measured:.0f}, and the run is at step {last:.0f}; `vaescale evaluate` measures "
                "the last checkpoint"
            )
    for key in IMAGE_KEYS:
        if len({str(record.recipe[key]) for record in records if key in record.recipe}) > 1:
            warnings.append(
                f"{key} differs, so the models see different images and their nats do not compare"
            )
    if len({str(record.recipe.get(EVALUATED)) for record in records}) > 1:
        warnings.append(
            f"{EVALUATED} differs, so val/ was measured on different images and does not compare; "
            "`vaescale evaluate` measures all"
        )
    return warnings


def is_of_sequences(record: Record) -> bool:
    """Whether a run is a model of sequences."""
    return record.recipe.get("data.holds") == "sequences"


def _kind_warnings(records: Sequence[Record]) -> list[str]:
    """A warning of runs of sequences among runs of images, or of sequences that are predicted after other contexts."""
    sequences = [record.name for record in records if is_of_sequences(record)]
    images = [record.name for record in records if not is_of_sequences(record)]
    if sequences and images:
        return [
            f"{', '.join(sequences[:MOST_NAMED])} {'is' if len(sequences) == 1 else 'are'} of sequences and "
            f"{', '.join(images[:MOST_NAMED])} of images: nats are of a sequence or of an image, and neither they nor bits_per_dim and mse "
            "compare"
        ]
    return [
        f"{key} differs, so the bounds are of other frames and do not compare"
        for key in ("network.context", "data.frames")
        if len({str(record.recipe.get(key)) for record in records if is_of_sequences(record)}) > 1
    ]


def _measure_warnings(records: Sequence[Record]) -> list[str]:
    """Warnings of likelihoods that do not compare: densities, masses, and masses of binarized images."""
    by_measure: dict[str, set[str]] = {}
    for record in records:
        by_measure.setdefault(record.measure, set()).add(str(record.recipe.get("likelihood.kind")))
    kinds = set().union(*by_measure.values())
    densities, binary = by_measure.get("density", set()), by_measure.get("binary mass", set())
    masses = set().union(*(by_measure.get(measure, set()) for measure in MASSES))
    warnings = []
    if masses and densities:
        names = [", ".join(sorted(group)) for group in (masses, densities)]
        warnings.append(f"bounds of masses ({names[0]}) and of densities ({names[1]}) do not compare")
    if binary and kinds - binary:
        warnings.append(
            f"the likelihood of binarized images ({', '.join(sorted(binary))}) has no number that compares with those of other "
            "likelihoods"
        )
    unknown = by_measure.get("", set())
    if unknown and len(kinds) > 1:
        warnings.append(
            f"this version of vaescale does not know the likelihood {', '.join(sorted(unknown))}: whether its bounds compare is not "
            "checked"
        )
    return warnings


def _measured_otherwise(records: Sequence[Record], columns: Sequence[str]) -> list[str]:
    """A sentence for each column whose numbers were not measured in the same way."""
    warnings = []
    for column in columns:
        having = [record for record in records if column in record.metrics]
        ways: dict[str, list[str]] = {}
        for record in having:
            notes = [text for prefix, text in record.measured.items() if column.startswith(prefix)]
            if notes:
                ways.setdefault("; ".join(notes), []).append(record.name)
        if len(ways) > 1:
            each = ", but ".join(f"{way} for {', '.join(names)}" for way, names in ways.items())
            warnings.append(f"{column} was not measured in the same way and does not compare: {each}")
    return warnings


def _limited(records: Sequence[Record], columns: Sequence[str]) -> list[str]:
    """A sentence for each column with numbers that something other than the model limits."""
    warnings = []
    for column in columns:
        having = [record for record in records if column in record.metrics and column in record.limited]
        if having:
            each = "; ".join(f"{record.name} is {record.limited[column]}" for record in having[:MOST_NAMED])
            more = f"; and {len(having) - MOST_NAMED} more" if len(having) > MOST_NAMED else ""
            warnings.append(f"{column} of {each}{more}")
    return warnings


def _sort_key(record: Record, metric: str, *, more: bool) -> tuple[bool, float, str]:
    """The key that sorts the best run first and runs without the metric last. more: whether larger is better."""
    value = record.metrics.get(metric, math.nan)
    if not math.isfinite(value):
        return True, 0.0, record.name
    if percent := CALIBRATED.search(metric):
        return False, abs(value - float(percent[1]) / 100), record.name
    return False, -value if more else value, record.name


def _setting(value: Any) -> str:
    return "" if value is None else redact(str(value))


def _text(value: Any) -> str:
    return _number(value) if isinstance(value, float) else _setting(value)


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
