"""An animated GIF has each step of time, of the greys that were given."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaescale import figures
from vaescale.figures.animation import MILLISECONDS
from vaescale.figures.config import Scale, View


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_frames_are_kept(tmp_path: Path, channels: int) -> None:
    still = np.full((5, channels, 64, 64), 0.2, np.float32)
    moving = still.copy()
    moving[3:] = 0.6
    path = tmp_path / "clip.gif"
    view = View(channels, tuple(range(channels)))
    figures.animation(path, [[("truth", still), ("future", moving)]] * 2, given=2, view=view)
    with Image.open(path) as clip:
        assert clip.n_frames == 5
        shown = []
        for time in range(5):
            clip.seek(time)
            assert clip.info["duration"] == (4 * MILLISECONDS if time == 4 else MILLISECONDS)
            pixels = np.asarray(clip.convert("RGB"))
            shown.append([pixels[60, 30, 0], pixels[60, 95, 0], pixels[130, 30, 2]])
    assert np.abs(np.array(shown, int) - np.array([[51, 51, 51]] * 3 + [[51, 153, 51]] * 2)).max() <= 2


def test_rows_of_a_scale_have_its_colours_and_its_bar(tmp_path: Path) -> None:
    grey, level = np.full((3, 1, 64, 64), 0.5, np.float32), np.full((3, 1, 64, 64), 0.2, np.float32)
    level[0] = np.nan
    scale = Scale("sigma", 0.4, "sigma, of values in [0, 1]")
    middle = scale.of(np.full((1, 1, 1, 1), 0.2, np.float32)).flatten()
    sizes = {}
    for name, given in (("with", scale), ("without", None)):
        level = level if given else np.nan_to_num(level)
        clips = [[("truth", grey), ("sigma", level)]]
        path = figures.animation(tmp_path / f"{name}.gif", clips, given=1, scale=given)[0]
        with Image.open(path) as clip:
            sizes[name] = clip.height
            seen = []
            for time in range(3):
                clip.seek(time)
                seen.append(np.asarray(clip.convert("RGB"))[50, [30, 95]] / 255)
        if given:
            assert np.abs(seen[0][1] - 1).max() < 0.01, "white where there is none"
            assert all(np.abs(one[1] - middle).max() < 0.05 for one in seen[1:])
        assert all(np.abs(one[0] - 0.5).max() < 0.02 for one in seen)
    assert sizes["with"] > sizes["without"] + 20
    heights = []
    for given in (scale, None):
        figures.image_strips(tmp_path / "strip.png", clips[0], title="t", scale=given)
        with Image.open(tmp_path / "strip.png") as strip:
            heights.append(strip.height)
    assert heights[0] > heights[1] + 40, "a bar below"


def test_an_mp4_has_every_frame_in_even_sides(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    from vaescale.data.videos import frames_of_video

    clip = np.zeros((6, 3, 65, 67), np.float32)
    clip[3:, 0] = 1.0
    gif, mp4 = figures.animation(tmp_path / "clip.gif", [[("red", clip)]], given=2, view=View(3, (0, 1, 2)))
    frames = frames_of_video(mp4.read_bytes(), most_bytes=1 << 26)
    with Image.open(gif) as animated:
        width, height = animated.size
    assert frames.shape == (6, 3, height + height % 2, width + width % 2)
    assert width % 2, "of a side that H.264 does not take"
    red = frames[:, :, 50, 30].astype(int)
    assert np.abs(red - np.array([[0, 0, 0]] * 3 + [[255, 0, 0]] * 3)).max() < 12
