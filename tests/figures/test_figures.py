"""Figures: real PNG files whose pixels follow the data."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaescale import figures
from vaescale.figures.drawing import look, montage


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), dtype=float)


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
    assert len({look(number) for number in range(35)}) == 35
    points = [(f"run {number}", float(number), 0.1 + number) for number in range(40)]
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
