"""Images of 16-bit integers, floats and other numbers of channels: written, indexed and read with their exact values."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vaescale.commands.make_shards import index_shards, make_shards
from vaescale.data.batch import Request
from vaescale.data.clipping import refuse_clipping
from vaescale.data.config import DataConfig
from vaescale.data.index import parse_index
from vaescale.data.making.verifying import verify_shards
from vaescale.data.reader import ShardReader, open_reader
from vaescale.errors import DataError, UserError
from vaescale.models.units import mirrored, to_stored, to_unit

GENERATOR = np.random.Generator(np.random.Philox(0))
VALUES: dict[str, np.ndarray] = {
    "int16": GENERATOR.integers(-1024, 3072, (20, 6, 8, 2), np.int16),
    "uint16": GENERATOR.integers(0, 65536, (20, 6, 8, 5), np.uint16),
    "float32": GENERATOR.normal(size=(20, 6, 8, 1)).astype(np.float32),
    "uint8": GENERATOR.integers(0, 256, (20, 6, 8, 4), np.uint8),
}


def written(folder: Path, dtype: str, **options: Any) -> Path:
    np.save(folder / "images.npy", VALUES[dtype])
    out = folder / "shards"
    if dtype != "uint8":
        options["dtype"] = dtype
    make_shards(
        f"arrays:{folder / 'images.npy'}", out, holdout=0, jobs=1, column="image=images:NHWC", **options
    )
    return out / "train"


def reader_of(place: Path, channels: int, **keys: Any) -> ShardReader:
    keys = {"image_size": [6, 8], **keys}
    config = DataConfig(train=str(place), val=str(place), channels=channels, global_batch=4, **keys)
    return open_reader(str(place), config)


def in_order(reader: ShardReader) -> np.ndarray:
    """The images by their keys: a folder is written in another order."""
    fetched = reader.__getitems__(Request(np.arange(len(reader))))
    return fetched.images.numpy()[np.argsort(fetched.keys)]


@pytest.mark.parametrize("dtype", VALUES)
@pytest.mark.parametrize("cache", ["memory", "none"])
def test_values_arrive_as_they_were_stored(dtype: str, cache: str, tmp_path: Path) -> None:
    values = VALUES[dtype]
    place = written(tmp_path, dtype)
    low, high = (0, 255) if dtype == "uint8" else (float(values.min()), float(values.max()))
    index = parse_index((place / "index.json").read_bytes(), str(place))
    assert index.values == (dtype, low, high)
    assert index.image == (6, 8, values.shape[3])
    keys = {"range": [low, high]} if dtype == "float32" else {}
    reader = reader_of(place, values.shape[3], dtype=dtype, cache=cache, **keys)
    flips = np.array([False, True, True])
    fetched = reader.__getitems__(Request(np.array([3, 7, 0]), flips)).images
    expected = values[[3, 7, 0]].transpose(0, 3, 1, 2).copy()
    expected[flips] = expected[flips][..., ::-1]
    assert fetched.numpy().dtype == dtype
    np.testing.assert_array_equal(fetched.numpy(), expected)
    again = reader.__getitems__(Request(np.array([3, 7, 0]))).images.numpy()
    np.testing.assert_array_equal(again, values[[3, 7, 0]].transpose(0, 3, 1, 2))  # the cache is as it was
    x = to_unit(fetched, reader.window)
    assert float(x.min()) >= 0
    assert float(x.max()) <= 1
    np.testing.assert_allclose(
        to_stored(x, reader.window).numpy(), expected, atol=0 if dtype != "float32" else 1e-6
    )
    assert verify_shards(str(place), deep=True)[1] == []


def test_every_integer_of_16_bits_survives_the_way_to_0_to_1_and_back() -> None:
    from vaescale.config import Window

    for window in (Window("uint16", 0, 65535), Window("int16", -32768, 32767), Window("int16", -1000, 2000)):
        values = torch.arange(int(window.low), int(window.high) + 1, dtype=torch.int32)
        stored = values.to(torch.uint16 if window.dtype == "uint16" else torch.int16)
        x = to_unit(stored, window)
        assert torch.equal(to_stored(x, window).to(torch.int32), values)
        levels = x * (values.numel() - 1)
        assert float((levels - levels.round()).abs().max()) < 0.01
    outside = torch.tensor([-32768, -1001, 2001, 32767], dtype=torch.int16)
    assert to_unit(outside, Window("int16", -1000, 2000)).tolist() == [0, 0, 1, 1]


def test_files_of_16_bits_and_floats_are_read_and_mixtures_refused(tmp_path: Path) -> None:
    grey = VALUES["uint16"][..., 0]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(grey[number]).save(folder / f"{number}.png")
    Image.fromarray(grey[3]).save(folder / "3.tif")
    with pytest.raises(DataError, match=r"its values (have 16 bits|are uint16).* --dtype"):
        make_shards(f"folder:{folder}", tmp_path / "eight", jobs=1)
    out = make_shards(f"folder:{folder}", tmp_path / "deep", dtype="uint16", holdout=0, jobs=1)
    assert out["train"]["values"]["dtype"] == "uint16"
    reader = reader_of(tmp_path / "deep" / "train", 1, dtype="uint16")
    np.testing.assert_array_equal(in_order(reader)[:, 0], grey[:4])
    one = tmp_path / "png"
    make_shards(f"folder:{folder}", one, dtype="uint16", encoding="png", holdout=0, jobs=1)
    tars = tmp_path / "tars"
    tars.mkdir()
    (one / "train" / "shard-000000.tar").rename(tars / "a.tar")
    with pytest.raises(DataError, match=r"not uint8.*--dtype"):
        index_shards(tars, jobs=1)
    assert index_shards(tars, dtype="uint16", jobs=1)["index"]["values"]["high"] == float(grey[:4].max())
    np.testing.assert_array_equal(in_order(reader_of(tars, 1, dtype="uint16"))[:, 0], grey[:4])
    floats = tmp_path / "floats"
    floats.mkdir()
    Image.fromarray(VALUES["float32"][0, :, :, 0]).save(floats / "a.tif")
    Image.fromarray(np.full((6, 8), np.nan, np.float32)).save(floats / "b.tif")
    with pytest.raises(DataError, match=r"b.tif: 48 of its 48 values are NaN"):
        make_shards(f"folder:{floats}", tmp_path / "f", dtype="float32", holdout=0, jobs=1)
    with pytest.raises(DataError, match=r"its values are float32, not int16"):
        make_shards(f"folder:{floats}", tmp_path / "g", dtype="int16", holdout=0, jobs=1)
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(folder / "4.png")
    with pytest.raises(DataError, match=r"its values are uint8, not uint16"):
        make_shards(f"folder:{folder}", tmp_path / "mixed", dtype="uint16", holdout=0, jobs=1)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "uint8"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_a_tiff_of_several_channels_is_read(tmp_path: Path, dtype: Any, planes: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "in").mkdir()
    values = np.arange(5 * 6 * 8 * 5).reshape(5, 6, 8, 5).astype(dtype)
    for number, image in enumerate(values):
        image = np.moveaxis(image, 2, 0) if planes == "separate" else image
        options = {"photometric": "minisblack", "planarconfig": planes, "compression": "zlib"}
        tifffile.imwrite(tmp_path / f"in/{number}.tif", np.ascontiguousarray(image), **options)
    make_shards(f"folder:{tmp_path / 'in'}", tmp_path / "out", dtype=dtype, holdout=0, jobs=1)
    window = {"range": (0, 2000)} if dtype == "float32" else {}
    read = in_order(reader_of(tmp_path / "out/train", 5, dtype=dtype, **window))
    np.testing.assert_array_equal(read, values.transpose(0, 3, 1, 2))
    if dtype != "uint8":
        with pytest.raises(DataError, match=f"its values are {dtype}, not "):
            make_shards(
                f"folder:{tmp_path / 'in'}",
                tmp_path / "no",
                dtype="int16" if dtype == "uint16" else "uint16",
                jobs=1,
            )


def test_a_tiff_of_several_channels_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(tmp_path / "in/a.tif")
    with pytest.raises(DataError, match="pip install tifffile"):
        make_shards(f"folder:{tmp_path / 'in'}", tmp_path / "out", dtype="uint16", holdout=0, jobs=1)


def test_an_alpha_channel_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rgba = VALUES["uint8"][0]
    Image.fromarray(rgba).save(folder / "a.png")
    Image.fromarray(rgba[:, :, :3]).save(folder / "b.png")
    with pytest.raises(DataError, match=r"it is transparent; .*--channels 4"):
        make_shards(f"folder:{folder}", tmp_path / "refused", holdout=0, jobs=1)
    make_shards(f"folder:{folder}", tmp_path / "out", channels=4, holdout=0, jobs=1)
    place = tmp_path / "out" / "train"
    images = in_order(reader_of(place, 4)).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(images[0], rgba)
    np.testing.assert_array_equal(images[1, :, :, :3], rgba[:, :, :3])
    assert (images[1, :, :, 3] == 255).all()
    with pytest.raises(DataError, match=r"holds 4 channels, data.channels is 3; set data.channels=4"):
        reader_of(place, 3)
    with pytest.raises(UserError, match="--encoding jpg does not hold 4 channels"):
        make_shards(f"folder:{folder}", tmp_path / "jpg", channels=4, encoding="jpg")
    with pytest.raises(UserError, match="--encoding png does not hold int16"):
        make_shards(f"folder:{folder}", tmp_path / "jpg", dtype="int16", encoding="png")


def test_another_type_or_number_of_channels_than_the_index_states_is_refused(tmp_path: Path) -> None:
    place = written(tmp_path, "int16")
    low, high = VALUES["int16"].min(), VALUES["int16"].max()
    with pytest.raises(
        DataError,
        match=rf"holds int16 from {low} to {high}, data.dtype is uint8; set data.dtype=int16 and data.range=\[{low}, {high}\]",
    ):
        reader_of(place, 2)
    with pytest.raises(DataError, match=r"holds 2 channels, data.channels is 3; set data.channels=2"):
        reader_of(place, 3, dtype="int16")
    with pytest.raises(ValueError, match="range is not given, and float32 has no usual one"):
        reader_of(place, 2, dtype="float32")
    with pytest.raises(ValueError, match=r"range \(=\[0, 70000\]\) exceeds uint16"):
        reader_of(place, 2, dtype="uint16", range=[0, 70000])
    with pytest.raises(ValueError, match="must be whole numbers for int16"):
        reader_of(place, 2, dtype="int16", range=[0, 0.5])


def test_a_range_that_clips_is_counted_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, values = written(tmp_path, "int16"), VALUES["int16"]
    below, above = int((values < -1000).sum()), int((values > 3000).sum())
    with pytest.raises(DataError) as fault:
        refuse_clipping(reader_of(place, 2, dtype="int16", range=[-1000, 3000]))
    assert f"{below + above:,} of {values.size:,} values in 20 images" in str(fault.value)
    assert f"({below:,} below, {above:,} above; the set has {values.min()} to {values.max()})" in str(
        fault.value
    )
    few = np.sort(values.ravel())[1]  # one value is below
    refuse_clipping(reader_of(place, 2, dtype="int16", range=[int(few), 4000]))
    assert "they are clipped" in capsys.readouterr().err
    refuse_clipping(reader_of(place, 2, dtype="int16"))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("resample", ["box", "bicubic"])
def test_deep_images_are_cropped_and_resized_in_their_own_units(resample: str, tmp_path: Path) -> None:
    place = written(tmp_path, "int16")
    reader = reader_of(place, 2, dtype="int16", image_size=3, crop="square", resample=resample)
    images = reader.__getitems__(Request(np.arange(20))).images.numpy()
    assert images.dtype == np.int16
    square = VALUES["int16"][:, :, 1:7].transpose(0, 3, 1, 2).astype(np.float64)
    means = square.reshape(20, 2, 3, 2, 3, 2).mean((3, 5))
    if resample == "box":
        np.testing.assert_array_equal(np.abs(images - means) <= 0.5, np.True_)
    else:
        assert np.corrcoef(images.ravel(), means.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
def test_images_of_every_type_are_mirrored(dtype: torch.dtype) -> None:
    values = torch.tensor([[1, 2, 40_000 if dtype == torch.uint16 else 4]]).to(dtype)
    images = mirrored(values)
    assert images.dtype == dtype
    assert images.numpy().tolist() == values.numpy()[:, ::-1].tolist()
