"""The page of a comparison, read as HTML: its table, its data, and nothing of a run's that is more than text. No browser."""

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from tests.commands.test_compare_runs import PNG, record
from vaescale.commands.compare_runs import page
from vaescale.figures.page import DARK, DARK_PAPER, INKS, LIGHT, LIGHT_PAPER
from vaescale.figures.page_content import thinned
from vaescale.runs.comparison import Record, compare

WICKED = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;"
VOID = ("meta", "img", "input", "wbr", "link", "br")


class Parsed(HTMLParser):
    """The elements of a page with their attributes, the text of each, and the tags that are open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(page)
        self.close()
        assert self._open == [], "each element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        text: list[str] = []
        self.elements.append((tag, dict(attrs), text))
        if tag not in VOID:
            self._open.append((tag, text))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, text in self._open:
            text.append(data)

    def find(self, tag: str, **attributes: str) -> list[tuple[dict[str, Any], str]]:
        return [
            (given, "".join(text))
            for name, given, text in self.elements
            if name == tag and all(given.get(key) == value for key, value in attributes.items())
        ]

    def data(self) -> dict[str, Any]:
        ((_, text),) = self.find("script", id="data")
        return json.loads(text)  # type: ignore[no-any-return]


def parsed(records: list[Record], **options: Any) -> Parsed:
    return Parsed(page(compare(records), options.get("stills", []), title=options.get("title", "runs")))


def test_text_of_runs_is_text() -> None:
    wicked = record(WICKED, 1.0, likelihood__sigma=WICKED)._replace(location=WICKED)
    text = page(compare([wicked, record("b", 2.0)]), [(WICKED, PNG)], title=WICKED)
    shown = Parsed(text)
    scripts = shown.find("script")
    assert [attributes for attributes, _ in scripts] == [{"type": "application/json", "id": "data"}, {}]
    assert {tag for tag, _, _ in shown.elements} <= {
        *(
            "html",
            "head",
            "body",
            "meta",
            "title",
            "style",
            "script",
            "noscript",
            "h1",
            "h2",
            "h3",
            "p",
            "div",
            "span",
            "b",
        ),
        *("table", "thead", "tbody", "tr", "th", "td", "wbr", "button", "input", "label", "output"),
        *("figure", "figcaption", "svg", "img"),
    }
    assert not [key for _, attributes, _ in shown.elements for key in attributes if key.startswith("on")]
    assert all(str(given["src"]).startswith("data:image/png;base64,") for given, _ in shown.find("img"))
    assert shown.find("h1")[0][1] == shown.find("title")[0][1] == WICKED
    assert shown.data()["groups"][0] == WICKED
    assert WICKED in [text for _, text in shown.find("b")]


def test_the_page_fetches_nothing_and_runs_its_own_script_alone() -> None:
    text = page(compare([record("a", 1.0), record("b", 2.0)]), [("curves", PNG)], title="two runs")
    for word in ("http://", "https://", "@import", "url(http", 'src="http', "<link", "<iframe"):
        assert word not in text
    shown = Parsed(text)
    policy = shown.find("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
    digest = base64.b64encode(hashlib.sha256(shown.find("script")[1][1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy and "script-src 'unsafe" not in policy  # noqa: PT018


def test_only_a_server_is_linked() -> None:
    here = record("here", 1.0)._replace(link="https://host/#/experiments/1/runs/a")
    ((link, text),) = parsed([here, record("there", 2.0)]).find("a")
    assert (link["href"], text) == ("https://host/#/experiments/1/runs/a", "MLflow")
    assert link["rel"] == "noopener noreferrer"


def test_the_table_has_numbers_then_settings_and_says_its_order() -> None:
    shown = parsed(
        [record("one", 3.0, likelihood__sigma="optimal"), record("two", -1.0, likelihood__sigma=0.1)]
    )
    heads = [(given, text) for given, text in shown.find("th") if given["scope"] == "col"]
    assert [text for _, text in heads] == ["run", "val/neg_elbo_nats", "val/mse", "step", "likelihood.sigma"]
    assert [given.get("aria-sort") for given, _ in heads] == [None, "ascending", None, None, None]
    assert [text for given, text in shown.find("th", scope="row")] == ["two", "one"]
    assert [text for _, text in shown.find("td")] == ["-1", "0.1", "20", "0.1", "3", "0.1", "20", "optimal"]
    by_recall = Parsed(
        page(
            compare([record("one", 3.0), record("two", -1.0)], sort="quality/f/prior-mean/recall"),
            [],
            title="t",
        )
    )
    assert [given.get("aria-sort") for given, _ in by_recall.find("th") if given["scope"] == "col"] == [
        *(None, None, None, "descending", None)
    ]


def test_the_data_hold_each_run_with_a_value() -> None:
    one = record("one", 1.0)
    seeds = record("again", 3.0, seed=1)
    short = record("short", 2.0, likelihood__sigma=1)._replace(curves={"val/neg_elbo_nats": [(5.0, 2.0)]})
    without = record("profile", 0.0, likelihood__sigma=2)._replace(metrics={"val/mse": 0.1}, curves={})
    with_rate = one._replace(metrics={**one.metrics, "val/kl_nats": 7.0})
    shown = parsed([with_rate, seeds, short, without])
    data = shown.data()
    assert data["groups"] == ["one (2 runs)", "short", "profile"]
    bound, plane = data["panels"]
    assert bound["lines"] == [
        {"group": 0, "points": [[10.0, 7.0, 6.0, 8.0], [20.0, 2.0, 1.0, 3.0]]},
        {"group": 1, "points": [[5.0, 2.0]]},
    ]
    assert plane["lines"] == [{"group": 0, "run": 0, "name": "one", "points": [[7.0, 0.1]]}]
    assert plane["log"] is True
    assert bound["log"] is False
    assert "without a value: profile" in [text for _, text in shown.find("p", **{"class": "quiet"})]
    assert [given["data-group"] for given, _ in shown.find("tr") if "data-group" in given] == [
        "0",
        "1",
        "0",
        "2",
    ]


def test_runs_that_were_not_evaluated_show_pictures_of_their_training() -> None:
    def with_pictures(name: str, *pictures: str) -> Record:
        return record(name, 1.0)._replace(pictures=dict.fromkeys(pictures, PNG))

    both = ("reconstructions.png", "samples.png", "step-000000040.png")
    shown = parsed(
        [
            with_pictures("a", *both),
            with_pictures("b", "step-000000040.png"),
            with_pictures("c", "samples.png", "step-000000007.png"),
            with_pictures("d"),
        ]
    )
    headings = [text for _, text in shown.find("h2")]
    assert headings == ["Curves", "reconstructions", "samples", "last pictures of the training"]
    assert [text for _, text in shown.find("figcaption")][1:] == ["a", "a", "c", "b, step 40", "c, step 7"]


def test_every_control_has_a_name_and_is_a_button() -> None:
    shown = parsed([record("a", 1.0), record("b", 2.0)])
    for given, text in shown.find("button"):
        assert given["type"] == "button"
        assert text.strip() or given["aria-label"]
    assert all(
        given["aria-label"] and given["tabindex"] == "0" for given, _ in shown.find("svg", role="application")
    )
    assert shown.find("label", **{"for": "filter"})
    assert all(given.get("alt") for given, _ in shown.find("img"))
    assert shown.find("html", lang="en")
    assert [given["aria-live"] for given, _ in shown.find("div", **{"class": "unseen"})] == ["polite"]
    assert "prefers-color-scheme: dark" in shown.find("style")[0][1]


def test_a_page_without_curves_or_pictures_is_a_table() -> None:
    bare = [record(name, 1.0)._replace(curves={}, pictures={}, metrics={"val/mse": 0.1}) for name in "ab"]
    shown = parsed(bare)
    assert not shown.find("figure")
    assert len(shown.find("td")) == 4


def test_values_that_are_no_numbers_are_left_out() -> None:
    """MLflow keeps NaN and Inf."""
    nan, inf = float("nan"), float("inf")
    metrics = {"val/neg_elbo_nats": nan, "val/mse": inf, "val/kl_nats": 1.0}
    curves = {"val/neg_elbo_nats": [(1.0, nan), (2.0, inf)], "val/mse": [(1.0, 0.1), (2.0, nan)]}
    odd = record("odd", 1.0)._replace(metrics=metrics, curves=curves)
    shown = parsed([odd, record("b", 2.0, likelihood__sigma=1)])
    assert "without a value: odd" in [text for _, text in shown.find("p", **{"class": "quiet"})]
    lines = {panel["title"]: panel["lines"] for panel in shown.data()["panels"]}
    assert lines == {
        "val/neg_elbo_nats": [{"group": 0, "points": [[10.0, 7.0], [20.0, 2.0]]}],
        "val/mse": [{"group": 1, "points": [[1.0, 0.1]]}],
    }


def luminance(colour: str) -> float:
    channels = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast of two colours."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def lab(colour: str) -> np.ndarray:
    """CIELAB under D65."""
    channels = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    relative = np.array(matrix) @ linear / [0.9505, 1.0, 1.089]
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize(("series", "paper"), [(LIGHT, LIGHT_PAPER), (DARK, DARK_PAPER)])
def test_lines_are_readable_and_told_apart(series: tuple[str, ...], paper: str) -> None:
    assert min(contrast(colour, paper) for colour in series) >= 3, "WCAG 1.4.11"
    distances = [float(np.linalg.norm(lab(a) - lab(b))) for a, b in itertools.combinations(series, 2)]
    assert min(distances) > 25
    script = parsed([record("a", 1.0), record("b", 2.0)]).find("script")[1][1]
    dashes = len(json.loads(re.search(r"const DASHES = (\[.*?\]);", script)[1]))  # type: ignore[index]
    looks = {(group % len(series), (group + group // 20) % dashes) for group in range(40)}
    assert len(looks) == 40, "as charts.js chooses colour and dash"


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_is_readable(scheme: int) -> None:
    for ink in ("ink", "quiet", "link"):
        for paper in ("paper", "raised"):
            assert contrast(INKS[ink][scheme], INKS[paper][scheme]) >= 4.5, "WCAG 1.4.3"


def test_long_curves_keep_their_extremes() -> None:
    points = [(float(step), *3 * (float(step % 7),)) for step in range(5000)]
    points[777] = (777.0, 99.0, 98.0, 100.0)
    kept = thinned(points, 400)
    assert 300 <= len(kept) <= 420
    assert [777.0, 99.0, 98.0, 100.0] in kept
    assert [kept[0], kept[-1]] == [[0.0, 0.0], [4999.0, 1.0]]
    assert all(one[0] < other[0] for one, other in itertools.pairwise(kept))
    many = [
        record(str(number), 1.0, likelihood__sigma=number)._replace(
            curves={"val/mse": [(float(step), 1.0 + step % 3) for step in range(1000)]}
        )
        for number in range(50)
    ]
    lengths = [len(line["points"]) for line in parsed(many).data()["panels"][0]["lines"]]
    assert len(lengths) == 50
    assert 100 <= max(lengths) <= 180, "with more lines fewer points each"
    assert thinned([(1.0, 1 / 3, 1 / 3, 1 / 3)], 400) == [[1.0, 0.333333]]
