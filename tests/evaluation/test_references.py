"""The cache of what features were made of a training set."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vaescale.data.config import DataConfig
from vaescale.evaluation import comparison


def test_each_option_of_the_reader_has_a_name_of_its_own() -> None:
    extractor, reader = SimpleNamespace(identity="a"), SimpleNamespace(index=SimpleNamespace(data_hash="b"))
    sets: list[dict[str, Any]] = [{}, {"crop": "whole"}, {"resample": "box"}, {"image_size": 32}]
    configs = [
        DataConfig(**{"train": "t", "val": "v", "image_size": 64, "channels": 3, "global_batch": 8, **one})
        for one in sets
    ]
    names = {
        comparison.cache_name(cast(Any, extractor), cast(Any, reader), config, of)
        for config in configs
        for of in ([500], ["frames", 3, 8, 500])
    }
    assert len(names) == 2 * len(sets)


def test_a_cache_that_cannot_be_written_costs_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    comparison.keep(tmp_path / "file" / "moments", b"content")
    assert "cannot be written" in capsys.readouterr().err
    comparison.keep(tmp_path / "moments", b"content")
    assert (tmp_path / "moments").read_bytes() == b"content"
