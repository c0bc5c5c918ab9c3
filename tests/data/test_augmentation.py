"""Augmentation: each change against plain arithmetic, drawn by position, and never in evaluation."""

import colorsys

import numpy as np
import pytest
import torch
from scipy import ndimage

from vaescale import noise
from vaescale.data.augmentation import LUMA, YIQ, Changes, changed, draw
from vaescale.data.config import AugmentConfig


def pictures(number: int = 12, channels: int = 3, height: int = 9, width: int = 7) -> torch.Tensor:
    return torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (number, channels, height, width), np.uint8)
    )


def drawn(config: dict, slots: list[int], step: int = 3) -> Changes:
    return draw(AugmentConfig.model_validate(config), noise.Stream(5, step, torch.tensor(slots)))


EVERY = {
    "shift": 2,
    "crop": {"scale": [0.3, 0.9]},
    "turns": "half",
    "jitter": {"brightness": 0.3, "contrast": 0.4, "saturation": 0.5, "hue": 0.2},
}


def test_changes_depend_on_step_and_slot_alone() -> None:
    x = pictures()
    whole = changed(x, drawn(EVERY, list(range(12))))
    assert torch.equal(changed(x[4:7], drawn(EVERY, [4, 5, 6])), whole[4:7])
    assert torch.equal(x, pictures()), "what is read is not written to"
    assert not torch.equal(changed(x, drawn(EVERY, list(range(12)), step=4)), whole)
    assert whole.dtype == torch.uint8
    assert whole.shape == x.shape


@pytest.mark.parametrize(
    ("padding", "mode"), [("edge", "nearest"), ("zero", "constant"), ("reflect", "mirror")]
)
def test_shifts_are_those_of_a_padded_image(padding: str, mode: str) -> None:
    x, changes = pictures(), drawn({"shift": 2, "padding": padding}, list(range(12)))
    for image, (down, right), shifted in zip(
        x.numpy(), changes.shifts, changed(x, changes).numpy(), strict=True
    ):
        expected = ndimage.shift(image, (0, down, right), order=0, mode=mode)
        assert np.array_equal(shifted, expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_shifts_and_turns_move_deep_values(dtype: type) -> None:
    x, changes = pictures(6, 2, 5, 5), drawn({"shift": 1, "turns": "quarter"}, list(range(6)))
    deep = changed(torch.from_numpy(x.numpy().astype(dtype) * dtype(100)), changes)
    assert np.array_equal(deep.numpy(), changed(x, changes).numpy().astype(dtype) * dtype(100))


@pytest.mark.parametrize(
    ("dtype", "low", "step"), [(np.uint16, 0, 257), (np.int16, -1000, 7), (np.float32, -1, 0.5)]
)
def test_crops_and_zero_padding_of_deep_values(dtype: type, low: float, step: float) -> None:
    x = pictures(6, 2, 8, 5)
    deep = torch.from_numpy((x.double().numpy() * step + low).astype(dtype))
    changes = drawn({"crop": {"scale": [0.3, 0.9]}}, list(range(6)))
    cropped, eight = changed(deep, changes).numpy(), changed(x, changes).numpy()
    assert cropped.dtype == dtype
    assert abs((cropped - low) / step - eight).max() <= 1, "half a level, twice"
    assert (np.unique(cropped).size > np.unique(eight).size) or dtype is np.float32
    shifts = drawn({"shift": 2, "padding": "zero"}, list(range(6)))
    moved = changed(deep, shifts, zero=low).numpy()
    assert np.array_equal(moved, (changed(x, shifts).double().numpy() * step + low).astype(dtype))


def test_shifts_and_turns_are_equally_likely() -> None:
    changes = drawn({"shift": 1, "turns": "quarter"}, list(range(9000)))
    places = np.bincount((changes.shifts + 1) @ np.array([3, 1]), minlength=9)
    turns = np.bincount(changes.turns, minlength=4)
    assert abs(places - 1000).max() < 150
    assert abs(turns - 2250).max() < 200
    assert set(drawn({"turns": "half"}, list(range(50))).turns.tolist()) == {0, 2}


def test_turns_are_rotations() -> None:
    x = pictures(4, 1, 6, 6)
    turned = changed(x, Changes(turns=np.arange(4)))
    for number in range(4):
        assert torch.equal(turned[number], torch.rot90(x[number], number, (1, 2)))


def test_crops_are_linear_interpolation_to_half_a_level() -> None:
    x = pictures(3, 2, 8, 12)
    boxes = np.array([[0.0, 0.0, 1.0, 1.0], [0.25, 0.5, 0.5, 0.5], [0.0, 0.25, 0.75, 0.5]])
    cropped = changed(x, Changes(boxes=boxes))
    assert torch.equal(cropped[0], x[0]), "the whole image is itself"
    rows = (0.25 * 8 + (np.arange(8) + 0.5) * 0.5 - 0.5).clip(0, 7)
    columns = (0.5 * 12 + (np.arange(12) + 0.5) * 0.5 - 0.5).clip(0, 11)
    for channel in range(2):
        plane = x[1, channel].double().numpy()
        across = np.stack([np.interp(columns, np.arange(12), row) for row in plane])
        expected = np.stack([np.interp(rows, np.arange(8), column) for column in across.T], 1)
        assert abs(cropped[1, channel].numpy() - expected).max() <= 0.5 + 1e-9


def test_crops_have_the_areas_and_aspects_that_were_asked_for() -> None:
    boxes = drawn({"crop": {"scale": [0.2, 0.6], "aspect": [0.8, 1.25]}}, list(range(2000))).boxes
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left + width <= 1 + 1e-12).all()
    area = height * width
    assert 0.2 <= area.min() < 0.21
    assert 0.59 < area.max() <= 0.6
    assert 0.8 - 1e-9 <= (width / height).min() < 0.81
    assert area.mean() == pytest.approx(0.4, abs=0.01)


def test_colours_are_the_exact_map_rounded_once() -> None:
    x, changes = pictures(), drawn(EVERY | {"crop": None, "shift": 0, "turns": None}, list(range(12)))
    for image, (brightness, contrast, saturation, hue), out in zip(
        x.double().numpy(), changes.colours, changed(x, changes).numpy(), strict=True
    ):
        bright = brightness * image
        grey = np.tensordot(LUMA, bright, 1)
        contrasted = contrast * (bright - grey.mean()) + grey.mean()
        y, i, q = np.tensordot(YIQ, contrasted, 1)
        colour = (i + 1j * q) * np.exp(2j * np.pi * hue)
        turned = np.tensordot(np.linalg.inv(YIQ), np.stack([y, colour.real, colour.imag]), 1)
        exact = saturation * turned + (1 - saturation) * np.tensordot(LUMA, turned, 1)
        assert abs(out - exact.clip(0, 255)).max() <= 0.5 + 0.05, "half a level, and 2^-14 of each factor"


def test_grey_stays_grey_and_no_change_is_none() -> None:
    grey = pictures(8, 1).expand(8, 3, 9, 7).contiguous()
    turned = changed(grey, drawn({"jitter": {"hue": 0.5, "saturation": 1.0}}, list(range(8))))
    assert torch.equal(turned, grey)
    one = Changes(colours=np.array([[1.0, 1.0, 1.0, 0.0]] * 12))
    assert torch.equal(changed(pictures(), one), pictures())
    black = changed(pictures(2, 1), Changes(colours=np.array([[0.0, 1, 1, 0], [2.0, 1, 1, 0]])))
    assert int(black[0].max()) == 0
    assert torch.equal(black[1], (2 * pictures(2, 1)[1].int()).clamp(max=255).byte())


def test_a_third_of_a_turn_moves_red_towards_another_primary() -> None:
    red = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    red[:, 0] = 180
    hues = [
        colorsys.rgb_to_hsv(*(image.flatten() / 255.0).tolist())[0]
        for image in changed(red, Changes(colours=np.array([[1, 1, 1, 1 / 3], [1, 1, 1, -1 / 3]]))).double()
    ]
    assert sorted(abs(hue - 0.5) < 0.25 for hue in hues) == [True, True]
    assert abs(hues[0] - hues[1]) > 0.2
