"""Tables and pages of several runs: what differs, the best first, nothing executed and nothing fetched."""

import json
from pathlib import Path

import pytest
import yaml

from tests.launching import ROOT
from vaescale.commands.compare_runs import measure_of, page, panels_of, read_picture, records_of_folders
from vaescale.config import flat
from vaescale.errors import UserError
from vaescale.likelihoods.config import LIKELIHOODS
from vaescale.runs.comparison import (
    Record,
    compare,
    groups,
    in_brief,
    in_columns,
    larger_is_better,
    limited_by,
    markdown,
    measured_by,
    spread,
)
from vaescale.runs.mlflow_page import page_of_run

PNG = b"\x89PNG\r\n\x1a\nrest"


def record(name: str, bound: float, *, data_hash: str = "a", **recipe: object) -> Record:
    said = {
        "name": name,
        "seed": 0,
        "likelihood.kind": "gaussian",
        **{k.replace("__", "."): v for k, v in recipe.items()},
    }
    metrics = {"val/neg_elbo_nats": bound, "val/mse": 0.1, "quality/f/prior-mean/recall": -bound}
    curves = {"val/neg_elbo_nats": [(10.0, bound + 5), (20.0, bound)]}
    measure = measure_of(str(said["likelihood.kind"]))
    return Record(
        name, f"runs/{name}", said, metrics, curves, {"samples.png": PNG}, data_hash, measure=measure
    )


def test_the_best_is_first_and_what_differs_is_a_column() -> None:
    one, two = record("one", 3.0, likelihood__sigma="optimal"), record("two", -1.0, likelihood__sigma=0.1)
    found = compare([one, two])
    assert [own.name for own in found.records] == ["two", "one"]
    assert found.differing == ["likelihood.sigma"]
    assert found.columns == ["val/neg_elbo_nats", "val/mse"]
    assert found.warnings == []
    stopped = two._replace(curves={**two.curves, "train/mse": [(23.0, 0.1)]})
    assert (
        "two: val/neg_elbo_nats is of step 20, and the run is at step 23"
        in compare([one, stopped]).warnings[0]
    )
    by_recall = compare([one, two], sort="quality/f/prior-mean/recall")
    assert [own.name for own in by_recall.records] == ["two", "one"], "more of it is better"
    without = record("zero", -9.0)._replace(metrics={"val/mse": 1.0})
    for metric in ("val/neg_elbo_nats", "quality/f/prior-mean/recall"):
        assert [own.name for own in compare([without, one, two], sort=metric).records] == [
            "two",
            "one",
            "zero",
        ]
    with pytest.raises(UserError, match="no run has the metric 'val/nats'"):
        compare([one, two], sort="val/nats")


def test_a_key_of_another_kind_is_no_difference() -> None:
    one, two = record("one", 1.0, likelihood__horizon=100), record("two", 2.0, likelihood__kind="bernoulli")
    assert compare([one, two]).differing == ["likelihood.kind"]
    without = record("three", 2.0)
    assert compare([one, without]).differing == ["likelihood.horizon"]


def test_what_does_not_compare_is_said() -> None:
    one, two = record("one", 1.0), record("two", 2.0, likelihood__kind="categorical", data_hash="b")
    words = " ".join(compare([one, two]).warnings)
    assert "same held-out images" in words
    assert "masses (categorical) and of densities (gaussian)" in words
    larger = record("four", 2.0, data__image_size=64)
    assert "data.image_size differs" in " ".join(
        compare([record("a", 1.0, data__image_size=32), larger]).warnings
    )
    some = record("five", 2.0, training__evaluate_images=100)
    assert "training.evaluate_images differs" in " ".join(compare([one, some]).warnings)
    binary = record("three", 2.0, likelihood__kind="bernoulli")
    assert "binarized" in " ".join(compare([one, binary]).warnings)
    without = two._replace(metrics={"val/mse": 1.0})
    assert "without val/neg_elbo_nats: two" in compare([one, without]).warnings[0]


def test_sequences_and_images_are_told_apart() -> None:
    one, two = (
        record(name, 1.0, data__holds="sequences", network__context=context)
        for name, context in (("one", 2), ("two", 3))
    )
    image = record("three", 2.0, data__holds="images")
    (words,) = compare([one, image]).warnings
    assert "one is of sequences and three of images" in words
    assert compare([one, one._replace(name="again")]).warnings == []
    assert "network.context differs" in compare([one, two]).warnings[0]
    shown = page(compare([one, two, image]), [], title="t")
    assert shown.count("<h2>samples</h2>") == 1
    assert shown.count("<h2>sequences: truth, decoded frames, best and other futures</h2>") == 1
    one, image = (
        each._replace(pictures={"step-000000008.png": each.pictures["samples.png"]}) for each in (one, image)
    )
    shown = page(compare([one, image]), [], title="t")
    assert shown.count("<h2>last pictures of the training</h2>") == 1
    assert shown.count("<h2>sequences: last pictures of the training</h2>") == 1


def test_what_was_measured_otherwise_is_said() -> None:
    metric = "quality/f/prior-mean/recall"
    ways = [
        measured_by([b'{"measured": {"quality/f/": "features %d"}}' % n, b"no JSON", b"[1]"]) for n in (1, 2)
    ]
    one, two, same = (
        record(name, 1.0)._replace(measured=ways[way]) for name, way in (("one", 0), ("two", 1), ("same", 0))
    )
    (words,) = compare([one, two, same], sort=metric).warnings
    assert "quality/f/prior-mean/recall was not measured in the same way" in words
    assert "features 1 for one, same, but features 2 for two" in words
    assert compare([one, two]).warnings == [], "of what is not shown"
    assert compare([one, same], sort=metric).warnings == []


def test_what_a_metric_is_limited_by_is_said() -> None:
    metric = "quality/f/prior-mean/recall"
    limited = limited_by([b'{"limited": {"%s": "limited by 9 images"}}' % metric.encode(), b'{"limited": 1}'])
    one, two = record("one", 1.0)._replace(limited=limited), record("two", 1.0)
    assert compare([one, two], sort=metric).warnings == [f"{metric} of one is limited by 9 images"]
    assert compare([one, two]).warnings == [], "of what is not shown"


@pytest.mark.parametrize(
    ("metric", "order"),
    [
        ("evaluation/val/coverage/90", (0.91, 1.0, 0.7)),  # as earlier versions called it
        ("evaluation/val/interval_coverage/90", (0.91, 1.0, 0.7)),
        ("perf/images_per_second", (9.0, 8.0, 1.0)),
        ("quality/density-recall/prior-mean/frechet", (1.0, 2.0, 3.0)),
        ("quality/f/prior-mean/density", (3.0, 2.0, 1.0)),
        ("evaluation/val/neg_log_px_nats", (-3.0, -2.0, 1.0)),
    ],
)
def test_what_is_better_goes_by_the_metric(metric: str, order: tuple[float, ...]) -> None:
    records = [record(str(value), 1.0)._replace(metrics={metric: value}) for value in sorted(order)]
    assert [float(own.name) for own in compare(records, sort=metric).records] == list(order)


def test_results_name_metrics_of_which_more_is_better() -> None:
    named = larger_is_better(
        [b'{"more_is_better": ["quality/f/realism"]}', b'{"more_is_better": "x"}', b"[1]", b"no JSON"]
    )
    assert named == {"quality/f/realism"}
    values = {"quality/f/realism": 1.0, "quality/f/fakeness": 1.0}
    low, high = (
        record(name, 1.0)._replace(metrics={metric: factor * value for metric, value in values.items()})
        for name, factor in (("low", 1), ("high", 2))
    )
    high = high._replace(more_is_better=named)
    for metric, best in (("quality/f/realism", "high"), ("quality/f/fakeness", "low")):
        assert compare([low, high], sort=metric).records[0].name == best


def test_a_likelihood_of_unknown_measure_is_named() -> None:
    foreign = record("foreign", 1.0, likelihood__kind="poisson")
    (message,) = compare([record("one", 1.0), foreign]).warnings
    assert "does not know the likelihood poisson" in message
    assert compare([foreign, foreign._replace(name="again")]).warnings == []


def test_bounds_of_binarized_images_compare_with_no_others() -> None:
    assert [kind for kind in LIKELIHOODS if measure_of(kind) == "binary mass"] == ["bernoulli"]
    assert (measure_of("gaussian"), measure_of("bitwise"), measure_of("poisson")) == ("density", "mass", "")


def test_runs_that_differ_in_the_seed_are_repetitions() -> None:
    one, two = record("one", 1.0), record("again", 3.0, seed=1)
    other = record("other", 9.0, likelihood__sigma=0.5)
    assert [label for label, _ in groups([one, two, other])] == ["one (2 runs)", "other"]
    sweep = [
        record("x-seed-0", 1.0, likelihood__sigma=1),
        record("x-seed-1", 3.0, seed=1, likelihood__sigma=1),
    ]
    assert groups(sweep)[0][0] == "x (2 runs)"
    assert spread([one, two], "val/neg_elbo_nats") == [(10.0, 7.0, 6.0, 8.0), (20.0, 2.0, 1.0, 3.0)]
    later = two._replace(curves={"val/neg_elbo_nats": [(20.0, 3.0)]})
    assert [row[0] for row in spread([one, later], "val/neg_elbo_nats")] == [20.0]
    elsewhere = two._replace(curves={"val/neg_elbo_nats": [(15.0, 3.0)]})
    assert spread([one, elsewhere], "val/neg_elbo_nats") == [
        (10.0, 6.0, 6.0, 6.0),
        (15.0, 3.0, 3.0, 3.0),
        (20.0, 1.0, 1.0, 1.0),
    ], "without a common step, no run disappears"
    without = two._replace(curves={})
    assert len(spread([one, without], "val/neg_elbo_nats")) == 2
    assert spread([without], "val/neg_elbo_nats") == []


def test_names_that_coincide_have_their_places() -> None:
    one, two = record("one", 1.0), record("one", 2.0)._replace(location="elsewhere/one")
    assert [own.name for own in compare([one, two]).records] == ["one (runs/one)", "one (elsewhere/one)"]


def test_a_misspelt_metric_is_answered_with_near_ones() -> None:
    with pytest.raises(UserError, match="there are val/mse"):
        compare([record("one", 1.0), record("two", 2.0)], sort="val/mze")


def test_markdown_is_one_table() -> None:
    lines = markdown(compare([record("a|b", 1.0), record("c", 2.0)])).splitlines()
    assert lines[0].startswith("| run | val/neg_elbo_nats | val/mse | step |")
    assert lines[1].count("---") == lines[0].count("|") - 1
    assert lines[2].startswith("| a\\|b | 1 | 0.1 | 20 |")


def test_a_run_with_one_point_is_in_the_panels_and_one_without_is_named() -> None:
    short = record("short", 2.0)._replace(curves={"val/neg_elbo_nats": [(5.0, 2.0)]})
    without = record("without", 3.0, likelihood__sigma=1)._replace(curves={"val/mse": [(5.0, 0.1)]})
    whole = record("whole", 1.0, likelihood__sigma=2)
    panels = {panel.metric: panel for panel in panels_of(compare([whole, short, without]))}
    assert panels["val/neg_elbo_nats"].lines == [
        (0, [(10.0, 6.0, 6.0, 6.0), (20.0, 1.0, 1.0, 1.0)]),
        (1, [(5.0, 2.0, 2.0, 2.0)]),
    ]
    assert panels["val/neg_elbo_nats"].missing == ["without"]
    assert panels["val/mse"].missing == ["whole", "short"]


def test_a_terminal_gets_columns_and_no_pipes() -> None:
    comparison = compare(
        [record("a", -1.5, likelihood__sigma=0.5), record("longer", 2.0, likelihood__sigma="optimal")]
    )
    wide = in_columns(in_brief(comparison), width=100).splitlines()
    assert [line.split() for line in wide] == [
        ["val/", "val/", "likelihood."],
        ["run", "neg_elbo_nats", "mse", "step", "sigma"],
        ["a", "-1.5", "0.1", "20", "0.5"],
        ["longer", "2", "0.1", "20", "optimal"],
    ]
    assert (
        len(
            {line.index(word) + len(word) for line, word in zip(wide[1:], ("nats", "-1.5", "2"), strict=True)}
        )
        == 1
    )
    narrow = in_columns(in_brief(comparison), width=34).splitlines()
    assert max(map(len, narrow)) <= 34
    assert sum(line.startswith("longer") for line in narrow) == narrow.count("") + 1 > 1, "in blocks"
    assert "|" not in "\n".join(wide + narrow)


def test_a_run_folder_gives_its_last_progress_picture_and_its_page(tmp_path: Path) -> None:
    write_run(tmp_path / "a", uri="http://me:se/cret@mlflow.example.com:5000/base/")
    write_run(tmp_path / "b", uri="sqlite:///runs/mlflow.db")
    write_run(tmp_path / "c", uri=None)
    (tmp_path / "c" / "mlflow.json").write_text("damaged")
    one, two, three = records_of_folders([tmp_path / name for name in "abc"])
    assert [*one.pictures] == ["step-000000020.png"]
    assert one.link == "http://mlflow.example.com:5000/base/#/experiments/7/runs/0ab"
    assert (two.link, three.link) == ("", "")


def write_run(folder: Path, *, uri: str | None) -> None:
    recipe = yaml.safe_load((ROOT / "recipes/digits/base.yaml").read_text())
    recipe |= {"name": folder.name, "likelihood": {"kind": "gaussian", "sigma": "optimal"}}
    (folder / "figures" / "progress").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "metrics.jsonl").write_text('{"step": 20, "time": 1.0, "val/mse": 0.1}\n')
    for step in (10, 20):
        (folder / "figures" / "progress" / f"step-{step:09d}.png").write_bytes(PNG)
    if uri:
        state = {"tracking_uri": uri, "experiment_id": "7", "run_id": "0ab"}
        (folder / "mlflow.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("https://host", "https://host/#/experiments/1/runs/x%2Fy"),
        ("http://[::1]:80/a", "http://[::1]:80/a/#/experiments/1/runs/x%2Fy"),
        ("javascript://host/%0aalert(1)", ""),
        ("file:///tmp/x", ""),
        ("databricks", ""),
        ("http://host:port", ""),
        ("", ""),
    ],
)
def test_only_servers_have_pages(uri: str, address: str) -> None:
    assert page_of_run(uri, "1", "x/y") == address
    assert page_of_run(uri, "1", "") == ""


def test_credentials_are_cut_out() -> None:
    secret = record("a", 1.0, data__train="https://me:word@host/x")
    assert "word" not in markdown(compare([secret, record("b", 2.0, data__train="c")]))


def test_flat_keeps_lists() -> None:
    assert flat({"a": {"b": [1, 2], "c": {"d": None}}}) == {"a.b": [1, 2], "a.c.d": None}


def test_a_picture_is_a_png(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(b"<svg onload=alert(1)>")
    assert read_picture(tmp_path / "a.png") == PNG
    assert read_picture(tmp_path / "b.png") is None
    assert read_picture(tmp_path / "c.png") is None
