"""An animated GIF has each step of time, of the greys that were given."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaescale import figures
from vaescale.figures.animation import MILLISECONDS
from vaescale.figures.config import View


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
