"""Links in a folder of images: followed, counted, and never in a circle."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vaescale.data.making.sources import open_source


def test_links_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / name / "a.png")
    (tmp_path / "ant/broken.png").symlink_to("nowhere.png")
    (tmp_path / "ant/file.png").symlink_to("a.png")
    (tmp_path / "cat").symlink_to("bee")
    (tmp_path / "bee/loop").symlink_to("..")
    split = open_source(f"folder:{tmp_path}", holdout=0).splits["train"]()
    assert split.number == 4
    assert split.class_names == ("ant", "bee", "cat")
    said = capsys.readouterr().err
    assert "1 links to folders are followed" in said
    assert "1 links to files that do not exist" in said
    assert "links to a folder above" in said
