"""Labels of arrays that are no class: said with their number, or refused where a person asked for them."""

from pathlib import Path

import numpy as np
import pytest

from vaescale.data.making.sources import open_source
from vaescale.errors import UserError


def test_no_class_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.array([-1, 0, 3, np.nan, 3, -1])
    np.savez(tmp_path / "a.npz", images=np.zeros((6, 8, 8), np.uint8), labels=labels)
    split = open_source(f"arrays:{tmp_path}/a.npz", holdout=0).splits["train"]()
    assert split.class_names == ("0", "3")
    assert [item.label for item in split.items] == [-1, 0, 1, -1, 1, -1]
    assert "3 labels are NaN or -1, which is taken for no class" in capsys.readouterr().err


def test_other_files_of_the_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((6, 8, 8), np.uint8))
    for name in ("a.png", "b.png", "README", ".hidden"):
        (tmp_path / name).touch()
    open_source(f"arrays:{tmp_path}", holdout=0)
    assert f"no arrays in {tmp_path}, left out: 2 .png, 1 without extension" in capsys.readouterr().err
    open_source(f"arrays:{tmp_path}/a.npz", holdout=0)
    assert "left out" not in capsys.readouterr().err


def test_a_column_of_fractions_is_refused_where_it_was_asked_for(tmp_path: Path) -> None:
    latents = np.stack([np.arange(6), np.linspace(0, 1, 6)], axis=1)
    np.savez(tmp_path / "a.npz", images=np.zeros((6, 8, 8), np.uint8), latents=latents)
    split = open_source(f"arrays:{tmp_path}/a.npz", holdout=0, column="label=latents.0").splits["train"]()
    assert len(split.class_names) == 6
    with pytest.raises(UserError, match=r"label=latents.1: this column of .* holds fractions"):
        open_source(f"arrays:{tmp_path}/a.npz", holdout=0, column="label=latents.1").splits["train"]()
