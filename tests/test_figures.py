"""Figures: real PNG files whose pixels follow the data."""

from pathlib import Path

import numpy as np
from PIL import Image

from vaescale import figures
from vaescale.figures.drawing import montage


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
