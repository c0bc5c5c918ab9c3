"""Figures: real PNG files whose pixels follow the data."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vaescale import figures
from vaescale.config import Window
from vaescale.figures.config import FiguresConfig
from vaescale.figures.drawing import DISTINCT, log_ticks, look, montage, text_inches, wrapped
from vaescale.figures.labels import Box, overlap, place


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), dtype=float)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The matplotlib figures that are written, in order."""
    written: list[Any] = []

    def keep(self: Figure, *_: Any, **__: Any) -> None:
        self.draw_without_rendering()
        written.append(self)
        savefig(self, *_, **__)

    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", keep)
    return written


def texts(figure: Any) -> list[Any]:
    """The texts of a figure that have letters and are shown."""
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def words(figure: Any) -> str:
    return "\n".join(text.get_text() for text in texts(figure))


def boxes(some: Sequence[Any]) -> list[Box]:
    """Where texts are, in pixels: left, bottom, right, top."""
    extents = [text.get_window_extent() for text in some]
    return [(box.x0, box.y0, box.x1, box.y1) for box in extents]


def overlapping(places: Sequence[Box]) -> list[tuple[Box, Box]]:
    return [(one, other) for one, other in itertools.combinations(places, 2) if overlap(one, other)]


def test_montage_places_images_row_by_row() -> None:
    images = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1) / 10 * np.ones((5, 1, 2, 3), np.float32)
    canvas = montage(images, 3)
    assert canvas.shape == (1, 5, 11)
    assert canvas[0, 0, 4] == np.float32(0.1)
    assert canvas[0, 3, 0] == np.float32(0.3)
    assert canvas[0, 3, 8] == 1, "an empty place is white"
    assert (canvas[0, 2] == 1).all(), "a white gap between the rows"


def test_bright_images_make_bright_figures(tmp_path: Path) -> None:
    means = {}
    for name, level in (("dark", 0.0), ("bright", 1.0)):
        images = np.full((16, 1, 8, 8), level, np.float32)
        figures.sample_panels(tmp_path / f"s-{name}.png", [("a", images), ("b", images)], title="t")
        figures.image_rows(tmp_path / f"r-{name}.png", [("a", images), ("b", images)], title="t")
        means[name] = [pixels(tmp_path / f"{kind}-{name}.png").mean() for kind in "sr"]
    assert all(bright > dark + 50 for dark, bright in zip(means["dark"], means["bright"], strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_of_training_are_named(tmp_path: Path, channels: int) -> None:
    rows = [(name, np.full((3, channels, 8, 8), 0.5, np.float32)) for name in ("original", "sigma to 0.1")]
    heights = []
    for title in ("run, step 8", "run, step 8: " + 20 * "many words "):
        figures.picture_rows(tmp_path / "rows.png", rows, title=title)
        drawn = pixels(tmp_path / "rows.png")
        width, height = (3 * 8 + 2) * 8, (2 * 8 + 1) * 8
        pad = 6
        assert drawn.shape[1] > width + pad
        assert drawn.shape[0] > height + pad
        names, images = (
            drawn[-height - pad :, : -width - pad],
            drawn[-height - pad : -pad, -width - pad : -pad],
        )
        assert names.min() < 60, "letters"
        assert (names[:, 0] == 255).all(), "which begin within the picture"
        assert 127 <= np.median(images) <= 128
        head = drawn[: -height - pad]
        assert head.min() < 60, "a title"
        assert (head[:, [0, -1]] == 255).all(), "which is within the picture"
        heights.append(len(head))
    assert heights[1] > heights[0], "a long title has several lines"


def test_colour_images_are_drawn_in_colour(tmp_path: Path) -> None:
    red = np.zeros((4, 3, 8, 8), np.float32)
    red[:, 0] = 1
    figures.image_rows(tmp_path / "red.png", [("a", red), ("b", red)], title="t")
    with Image.open(tmp_path / "red.png") as image:
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (colours == [255, 0, 0]).all(axis=1).mean() > 0.2


def test_values_outside_the_unit_range_are_clipped(tmp_path: Path) -> None:
    images = np.full((4, 1, 4, 4), 7.0, np.float32)
    figures.sample_panels(tmp_path / "clipped.png", [("a", images)], title="t")
    assert pixels(tmp_path / "clipped.png").max() == 255


def test_many_runs_are_told_apart(tmp_path: Path) -> None:
    """By colour and marker together; more than there are pairs of these are drawn all the same."""
    assert len({look(number) for number in range(DISTINCT)}) == DISTINCT == 55
    points = [(f"run {number}", float(number), 0.1 + number) for number in range(60)]
    figures.rate_distortion(tmp_path / "plane.png", [("0.1", 1.0, 1.0)], points, title="t")
    lines = [(name, [(1.0, y, y, y + 1), (2.0, y, y, y)]) for name, _, y in points]
    figures.curves_of_runs(tmp_path / "curves.png", [("a", lines), ("b", lines[:2])], title="t")
    figures.calibration(
        tmp_path / "calibration.png", [(name, [0.5, 1.0]) for name, _, _ in points[:9]], title="t"
    )
    assert all(pixels(path).std() > 1 for path in tmp_path.glob("*.png"))


def test_every_figure_of_latents_and_quality_follows_its_numbers(tmp_path: Path) -> None:
    candidate = {"train_nats": -3.0, "val_nats": -4.0, "bic": 9.0}
    row = {"of": "prior", "decode": "mean", "frechet": 1.0, "precision": 0.5, "recall": 0.5}
    scattered = np.random.default_rng(0).normal(size=(60, 2))

    def draw(folder: Path, scale: float) -> None:
        numbers = [{"components": k, **candidate, "val_nats": -4.0 * scale * k} for k in (1, 10, 100)]
        figures.mixture_selection(folder / "m.png", numbers, chosen=10, prior_nats=-9.0, title="t")
        use = [1.0, 0.2 * scale, 0.0]
        curve = [("delta", [0.01, 1.0], [0.1, min(1.0, 0.3 * scale)])]
        figures.latent_use(folder / "u.png", use, [True, True, False], curve, title="t")
        figures.sigma_and_density(
            folder / "s.png", [("a", [-1e3, 5.0], [-2.0, -scale])], density="d", title="t"
        )
        labels = np.arange(60) % 25 - 1
        figures.latent_scatter(
            folder / "l.png", scale * scattered**3, labels, axes_labels=("z_1", "z_2"), title="t"
        )
        figures.variance_split(folder / "v.png", [("q(z)", 1.0, scale)], data=2.0, title="t")
        figures.quality(folder / "q.png", [row, {**row, "of": "b", "recall": 0.2 * scale}], title="t")
        grey = np.full((4, 1, 4, 4), scale / 4, np.float32)
        figures.image_map(folder / "i.png", grey, values=[-scale, scale], title="t")

    for scale in (1.0, 2.0):
        (tmp_path / str(scale)).mkdir()
        draw(tmp_path / str(scale), scale)
    for path in (tmp_path / "1.0").iterdir():
        other = pixels(tmp_path / "2.0" / path.name)
        same = pixels(path)
        assert same.shape != other.shape or (same != other).any(), path.name


def test_curves_show_what_is_there(tmp_path: Path) -> None:
    rows = [
        {"step": s, "train/mse": 1 / s, "train/sigma": s**-0.5, "train/kl_nats": s, "train/neg_elbo_nats": -s}
        for s in range(1, 9)
    ]
    figures.training_curves(tmp_path / "curves.png", rows, title="t")
    with_dots = [*rows, {"step": 8, "val/mse": 0.5}]
    figures.training_curves(tmp_path / "dots.png", with_dots, title="t")
    assert (pixels(tmp_path / "curves.png") != pixels(tmp_path / "dots.png")).any()
    figures.training_curves(tmp_path / "empty.png", [], title="t")
    assert not list(tmp_path.glob(".*"))


def test_group_rates_show_what_is_logged(tmp_path: Path) -> None:
    labels = ["00  1x1", "01  4x4"]
    rows = [
        {"step": step, "train/group_kl_nats/00": step / 10, "train/group_kl_nats/01": 1e-9}
        for step in range(1, 30)
    ]
    figures.group_rates(tmp_path / "groups.png", rows, labels, title="t")
    figures.group_rates(tmp_path / "fewer.png", rows[:10], labels, title="t")
    assert (pixels(tmp_path / "groups.png") != pixels(tmp_path / "fewer.png")).any()
    figures.group_rates(tmp_path / "none.png", [{"step": 1}], labels, title="t")
    assert not (tmp_path / "none.png").exists()


def test_labels_of_a_crowd_are_apart_and_within_bounds() -> None:
    places = np.random.default_rng(0).normal([300, 200], [60, 30], (40, 2)).tolist()
    sizes = [(80.0 + number, 12.0) for number in range(40)]
    for centred in (False, True):
        found = place(places, sizes, bounds=(0, 0, 600, 400), centred=centred)
        assert overlapping(found) == []
        assert all(box[0] >= 0 and box[1] >= 0 and box[2] <= 600 and box[3] <= 400 for box in found)
        assert [round(box[2] - box[0]) for box in found] == [round(width) for width, _ in sizes]
    (alone,) = place([(300, 200)], [(80, 12)], bounds=(0, 0, 600, 400), centred=True)
    assert alone == (260, 194, 340, 206)
    (beside,) = place([(300, 200)], [(80, 12)], bounds=(0, 0, 600, 400))
    assert not beside[0] < 300 < beside[2] or not beside[1] < 200 < beside[3]
    assert place([], [], bounds=(0, 0, 1, 1)) == []


def test_each_run_of_the_plane_is_named_beside_its_mark(tmp_path: Path, drawn: list[Any]) -> None:
    places = np.random.default_rng(1).gamma(2, 20, 18)
    points = [(f"decoder number {number}", float(x), 0.01 + 0.0001 * x) for number, x in enumerate(places)]
    curve = [("0.1", 5.0, 0.05), ("1", 1.0, 0.08)]
    figures.rate_distortion(tmp_path / "p.png", curve, points, title="t")
    (figure,) = drawn
    names = [text for text in texts(figure) if text.get_text() in {name for name, _, _ in (*points, *curve)}]
    assert len(names) == 20
    assert overlapping(boxes(names)) == []
    assert min(text.get_fontsize() for text in names) >= 9
    assert "log scale" in words(figure)


def test_classes_have_their_names_and_axes_a_meaning_or_no_numbers(tmp_path: Path, drawn: list[Any]) -> None:
    points = np.random.default_rng(0).normal(size=(400, 2)) / 10
    labels = np.arange(400) % 10
    names = [
        "T-shirt",
        "Trouser",
        "Pull$over",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        60 * "x",
    ]
    figures.latent_scatter(
        tmp_path / "a.png", points, labels, class_names=names, axes_labels=("", ""), note="t-SNE", title="t"
    )
    figures.latent_scatter(tmp_path / "b.png", points, labels, axes_labels=("z_1", "z_2"), title="t")
    many = np.arange(400) % 50 - 1
    figures.latent_scatter(tmp_path / "c.png", points, many, axes_labels=("z", ""), title="t")
    named, numbered, crowded = drawn
    shown = words(named).splitlines()
    assert {*names[:2], r"Pull\$over", *names[3:9], "t-SNE"} <= {*shown}
    assert max(len(line) for line in shown) <= 24
    assert [len(axis.get_xticks()) + len(axis.get_yticks()) for axis in named.axes] == [0]
    assert {"z_1", "z_2", *map(str, range(10))} <= {*words(numbered).splitlines()}
    assert len(crowded.axes[0].get_xticks()) > 2
    assert len(crowded.axes[0].get_yticks()) == 0
    assert "20 of 49 classes are named" in words(crowded)
    for figure in drawn:
        labelled = [text for text in texts(figure) if text.get_weight() == "bold"]
        assert len(labelled) == (20 if figure is crowded else 10)
        assert overlapping(boxes(labelled)) == []


def test_rows_of_pictures_fill_their_figure(tmp_path: Path, drawn: list[Any]) -> None:
    """For any shape of image: names of at least 9 points beside pictures that leave no part of the width empty."""
    for shape in ((1, 8, 8), (3, 20, 60), (1, 60, 20)):
        rows = [
            (name, np.zeros((16, *shape), np.float32)) for name in ("prior", "a mixture of 100, ancestral")
        ]
        figures.image_strips(tmp_path / "strips.png", rows, title="run, step 8: " + 12 * "some words ")
        figure = drawn[-1]
        axis, *others = figure.axes
        assert others == []
        box = axis.get_tightbbox()
        assert box.x0 <= 0.05 * figure.bbox.width
        assert axis.get_window_extent().x1 >= 0.98 * figure.bbox.width
        dark = pixels(tmp_path / "strips.png") < 10
        columns = np.flatnonzero(dark.mean(axis=0) > 0.3)
        assert columns[-1] > 0.97 * dark.shape[1]
        assert min(text.get_fontsize() for text in texts(figure)) >= 9
        assert overlapping(boxes(texts(figure))) == []
        assert all(box[0] >= 0 and box[2] <= figure.bbox.width for box in boxes(texts(figure)))


def test_quality_needs_no_legend_of_its_rows(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [
        {"of": of, "decode": decode, "frechet": 1.0 + number, "precision": 0.9, "recall": 0.85 + number / 100}
        for number, (of, decode) in enumerate(itertools.product(["prior", *"abcd"], ["mean", "ancestral"]))
    ]
    figures.quality(tmp_path / "q.png", rows, title="t")
    (figure,) = drawn
    distance, shares = figure.axes
    assert [text.get_text() for text in distance.get_yticklabels()] == [
        f"{of}{ending}" for of in ["prior", *"abcd"] for ending in ("", ", ancestral")
    ]
    assert len(shares.get_legend().get_texts()) == 2
    low, high = shares.get_xlim()
    assert 0.8 < low < 0.85
    assert 1 <= high < 1.1
    assert abs(distance.get_window_extent().width - shares.get_window_extent().width) < 20
    assert distance.get_ylim() == shares.get_ylim()


def test_the_variance_of_the_data_is_drawn(tmp_path: Path, drawn: list[Any]) -> None:
    figures.variance_split(tmp_path / "v.png", [("q(z)", 3.0, 0.5), ("p(z)", 2.0, 0.5)], data=4.25, title="t")
    (figure,) = drawn
    lines = [line.get_xdata() for line in figure.axes[0].lines]
    assert lines == [[4.25, 4.25]]
    assert {"the data: 4.25", "total 3.5", "total 2.5"} <= {*words(figure).splitlines()}
    assert figure.axes[0].get_xlim()[1] > 4.25


def test_logarithmic_axes_say_so(tmp_path: Path, drawn: list[Any]) -> None:
    rows = [
        {"step": s, "train/mse": 1 / s, "train/sigma": 0.5, "train/neg_elbo_nats": -s} for s in range(1, 99)
    ]
    figures.training_curves(tmp_path / "a.png", rows, title="t")
    figures.group_rates(
        tmp_path / "b.png", [{"step": 1, "train/group_kl_nats/00": 2.0}] * 2, ["00  1x1"], title="t"
    )
    panels = [
        ("val/mse", [("one", [(1.0, 1.0, 1.0, 1.0)]), ("two", [(1.0, 0.1, 0.1, 0.1), (2.0, 0.1, 0.1, 0.1)])])
    ]
    for distortion, axis_label in ((0.0, "mean squared error"), (0.1, "mean squared error (log scale)")):
        figures.rate_distortion(tmp_path / "r.png", [], [("a", 1.0, distortion)], title="t")
        assert drawn.pop().axes[0].get_ylabel() == f"distortion: {axis_label}"
    figures.curves_of_runs(tmp_path / "c.png", panels, missing={"val/mse": ["far", "off"]}, title="t")
    training, groups, runs = drawn
    assert [axis.get_title() for axis in training.axes] == [
        "negative ELBO (nats)",
        "mean squared error (log scale)",
    ]
    assert [axis.get_yscale() for axis in training.axes] == ["linear", "log"]
    assert "KL of the group (nats, log scale)" in words(groups)
    assert "val/mse (log scale)" in words(runs)
    assert "without far, off" in words(runs)
    assert [len(line.get_xdata()) for line in runs.axes[0].lines] == [1, 2]


@pytest.mark.parametrize(
    ("low", "high"), [(0.08, 0.4), (1e-5, 3.0), (0.99, 1.02), (4e-3, 0.13), (20.0, 30.0), (1e-9, 1e300)]
)
def test_logarithmic_axes_have_round_ticks(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)
    assert all(float(f"{tick:.2g}") == tick for tick in ticks)


def test_titles_are_as_wide_as_their_figure() -> None:
    title = "a-run-with-a-name, step 400, ema weights: " + 5 * "and what it shows "
    lines = wrapped(title, 4.0).splitlines()
    assert len(lines) > 1
    assert " ".join(lines) == title.strip()
    assert max(text_inches([line], 10) for line in lines) <= 4.0
    assert wrapped("short", 4.0) == "short"
    assert text_inches(["$x$ and $"], 10) > text_inches(["x"], 10)


def test_channels_are_chosen_and_one_may_have_colours_with_a_bar(tmp_path: Path) -> None:
    images = np.zeros((4, 5, 8, 8), np.float32)
    images[:, 3] = 1.0
    assert FiguresConfig().view(5, Window()).of(images).shape[1] == 3
    assert FiguresConfig().view(2, Window()).of(images[:, :2]).shape[1] == 1
    chosen = FiguresConfig.model_validate({"channels": [4, 2, 1]}).view(5, Window())
    assert chosen.of(images)[0, :, 0, 0].tolist() == [1, 0, 0]
    assert not chosen.has_bar
    coloured = FiguresConfig.model_validate({"channels": [4], "colours": "magma"}).view(5, Window())
    brightest = coloured.of(images)[0, :, 0, 0]
    assert brightest[0] > brightest[2] > 0.5, "the end of magma is a light yellow"
    assert coloured.of(images[:, :1], "|error|, 0 to 0.2").shape[1] == 1, "a row with a scale of its own"
    scan = FiguresConfig().view(1, Window("int16", -1024, 3071))
    assert scan.has_bar
    for draw in (figures.image_rows, figures.sample_panels, figures.picture_rows):
        rows = [(name, images[:, :1]) for name in "ab"]
        sizes = []
        for view in (FiguresConfig().view(1, Window()), scan):
            draw(tmp_path / "one.png", rows, title="t", view=view)
            sizes.append(pixels(tmp_path / "one.png").shape)
        assert sizes[1][0] > sizes[0][0]
        assert sizes[1][1] == sizes[0][1]
    for low, high, text in ((-1024, 3071, "-1024 to 3071"), (0, 65535, "0 to 65535")):
        bar = FiguresConfig().view(1, Window("int16" if low else "uint16", low, high)).bar()
        assert bar is not None
        assert bar.text.startswith(f"{text}, ")
    assert figures.Scale("sigma", 0.123456, "sigma").bar().text == "0 to 0.123, sigma"
    with pytest.raises(ValueError, match=r"colours \(=magma\) is for one channel"):
        FiguresConfig.model_validate({"channels": [3, 2, 1], "colours": "magma"})
