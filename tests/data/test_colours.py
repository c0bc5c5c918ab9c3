"""Colours of files: ICC profiles, transparency, and grey images, as they are written to shards and said."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from vaescale.commands.make_shards import make_shards
from vaescale.data.config import DataConfig
from vaescale.data.making.items import Item
from vaescale.data.making.remarks import sentences
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.data.pictures import PictureFault, decode, decode_source
from vaescale.data.pictures.colour import flatten, parse_colour, profile_kind
from vaescale.data.reader import open_reader
from vaescale.errors import DataError, UserError

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (12, 10, 3), dtype=np.uint8)
GREY = COLOUR[:, :, 0]
FLAT = np.full((16, 16, 3), (60, 200, 90), np.uint8)


def saved(image: Image.Image | np.ndarray, name: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, name, **options)
    return buffer.getvalue()


def profile(space: bytes, name: str, gamma: float, primaries: tuple[tuple[float, ...], ...] = ()) -> bytes:
    """An ICC profile of version 2 with one gamma: grey, or RGB by its primaries (X, Y, Z at D50)."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    text = name.encode() + b"\0"
    entries = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249),
    }
    if primaries:
        for letter, primary in zip((b"r", b"g", b"b"), primaries, strict=True):
            entries |= {letter + b"XYZ": b"XYZ \0\0\0\0" + fixed(*primary), letter + b"TRC": curve}
    else:
        entries[b"kTRC"] = curve
    table, body, start = struct.pack(">I", len(entries)), b"", 132 + 12 * len(entries)
    for tag, value in entries.items():
        table += tag + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"mntr", space, b"XYZ ")
    return head + bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249) + bytes(48) + table + body


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Adobe RGB (1998), annex C, adapted to D50.
WIDE = profile(b"RGB ", "wide", 2.2, ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)))  # fmt: skip
# sRGB's primaries at D50.
NEARLY = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
LINEAR = profile(b"GRAY", "linear", 1.0)
BROKEN = b"not a profile" * 20


def test_kinds_of_profiles() -> None:
    assert profile_kind(SRGB, "RGB") == profile_kind(SRGB, "L") == "srgb"
    name = "sRGB".encode("utf-16-be")
    assert name in SRGB
    assert profile_kind(SRGB.replace(name, "some".encode("utf-16-be")), "RGB") == "srgb", "by its values"
    assert profile_kind(profile(b"RGB ", "sRGB by name", 2.2, NEARLY), "RGB") == "srgb"
    assert profile_kind(profile(b"RGB ", "plain", 1.8, NEARLY), "RGB") == "other"
    assert profile_kind(WIDE, "RGB") == "other"
    assert profile_kind(LINEAR, "L") == "other"
    for broken, mode in ((BROKEN, "RGB"), (b"", "RGB"), (None, "L"), (SRGB[:200], "RGB"), (LINEAR, "RGB")):
        assert profile_kind(broken, mode) == "broken"
    assert profile_kind(SRGB, "CMYK") == "broken", "a profile of another space"


def linear(values: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1: sRGB values in [0, 1] to light."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize(("name", "options"), [("PNG", {}), ("JPEG", {"quality": 100, "subsampling": 0}), ("WEBP", {"lossless": True}), ("TIFF", {})])  # fmt: skip
def test_profiles_are_converted(name: str, options: dict) -> None:
    """Against the definition: light of the file's primaries is light of sRGB's."""
    muted = np.full((16, 16, 3), (120, 140, 110), np.uint8)
    source = decode_source(saved(muted, name, icc_profile=WIDE, **options), convert=True)
    assert source.profile == "other"
    wide = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
    srgb = np.array(NEARLY).T
    light = np.linalg.solve(srgb, wide @ (np.array([120, 140, 110]) / 255) ** 2.2)
    assert np.abs(linear(source.image[0, 0] / 255) - light).max() < 0.006
    unconverted = decode_source(saved(muted, name, icc_profile=WIDE, **options), convert=False)
    assert unconverted.profile is None
    assert np.abs(unconverted.image.astype(int) - muted).max() <= 2


def test_grey_profiles_leave_grey() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    for name in ("PNG", "TIFF"):
        source = decode_source(saved(ramp, name, icc_profile=LINEAR), convert=True)
        assert source.image.shape == (4, 256, 1)
        assert np.abs(linear(source.image[0, :, 0] / 255) - ramp[0] / 255).max() < 0.006
    grey_jpeg = saved(ramp, "JPEG", quality=95, icc_profile=WIDE)
    assert decode_source(grey_jpeg, convert=True).image.shape == (4, 256, 1)


def test_srgb_and_broken_profiles_change_nothing() -> None:
    for name in ("PNG", "JPEG", "WEBP"):
        for picture in (COLOUR, GREY):
            plain = decode_source(saved(picture, name), convert=True)
            assert plain.profile is None
            for kind, embedded in (("srgb", SRGB), ("broken", BROKEN)):
                source = decode_source(saved(picture, name, icc_profile=embedded), convert=True)
                assert source.profile == kind
                assert np.array_equal(source.image, plain.image)
    cmyk = Image.fromarray(FLAT).convert("CMYK")
    source = decode_source(saved(cmyk, "JPEG", icc_profile=BROKEN), convert=True)
    assert source.profile == "broken"
    assert np.array_equal(source.image, decode(saved(cmyk, "JPEG")))


def cmyk_profile() -> bytes:
    """A profile by which CMYK is grey: L* = 100 (1 - K) (1 - (C + M + Y) / 3), as a table of its 16 corners."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(16, 4)
    lightness = 255 * (1 - corners[:, 3]) * (1 - corners[:, :3].mean(1))
    table = np.stack([lightness, np.full(16, 128), np.full(16, 128)], 1).round().astype(np.uint8)
    identity = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1\0\0\0\0\4\3\2\0" + identity + bytes(range(256)) * 4 + table.tobytes() + bytes(range(256)) * 3
    content = bytearray(profile(b"CMYK", "press", 1.0))
    body = len(content)
    content += lut
    content[132 + 36 : 132 + 48] = struct.pack(">4sII", b"A2B0", body, len(lut))  # in place of the grey curve
    content[:4], content[12:16], content[20:24] = struct.pack(">I", len(content)), b"prtr", b"Lab "
    return bytes(content)


def test_cmyk_is_converted_by_its_profile() -> None:
    values = np.array([(0, 0, 0, 0), (255, 0, 0, 0), (255, 255, 255, 0), (0, 0, 0, 255)], np.uint8)
    planes = values.repeat(64, 0).reshape(16, 16, 4).transpose(2, 0, 1)
    picture = Image.merge("CMYK", [Image.fromarray(np.ascontiguousarray(plane)) for plane in planes])
    for name, options in (("TIFF", {}), ("JPEG", {"quality": 100, "subsampling": 0})):
        source = decode_source(saved(picture, name, icc_profile=cmyk_profile(), **options), convert=True)
        assert source.profile == "other"
        rows = source.image[2::4, 8].astype(int)
        assert np.abs(rows - rows[:, :1]).max() <= 2, "neutral"
        assert np.abs(rows[:, 0] - [255, 162, 0, 0]).max() <= 3, "L* of 100, 66.7, 0 and 0"


def rgba(alpha: int = 128) -> np.ndarray:
    return np.dstack([FLAT, np.full((16, 16), alpha, np.uint8)])


TRANSPARENT = {
    "RGBA": saved(rgba()),
    "LA": saved(Image.fromarray(rgba()).convert("LA")),
    "palette": saved(Image.fromarray(FLAT).quantize(4), transparency=0),
    "tRNS": saved(FLAT, transparency=(60, 200, 90)),
    "grey tRNS": saved(FLAT[:, :, 0], transparency=60),
    "WebP": saved(rgba(), "WEBP", lossless=True),
    "TIFF": saved(rgba(), "TIFF"),
    "GIF": saved(Image.fromarray(FLAT).quantize(4), "GIF", transparency=0),
}


@pytest.mark.parametrize("name", TRANSPARENT)
@pytest.mark.parametrize("colour", ["white", "#102030"])
def test_transparent_images_are_put_on_a_colour(name: str, colour: str) -> None:
    content = TRANSPARENT[name]
    with pytest.raises(PictureFault, match="--flatten white"):
        decode_source(content, convert=True)
    source = decode_source(content, convert=True, colour=parse_colour(colour))
    assert source.flattened
    over = Image.open(io.BytesIO(content)).convert("RGBA")
    expected = np.asarray(Image.alpha_composite(Image.new("RGBA", over.size, colour), over).convert("RGB"))
    assert source.image.shape[2] == (1 if (colour == "white" and "grey" in name) or (name == "LA" and colour == "white") else 3)  # fmt: skip
    assert np.abs(source.image.astype(int) - expected).max() <= 1


def test_flattening_is_exact() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(256).reshape(256, 256, 1)
    alpha = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    weight = alpha / 255
    exact = np.floor(values[:, :, 0] * weight + 7 * (1 - weight) + 0.5 - 1e-9)
    assert np.array_equal(flatten(values, alpha, (7, 7, 7))[:, :, 0], exact)


def test_opaque_images_are_not_touched_by_flatten() -> None:
    content = saved(rgba(255))
    assert not decode_source(content, convert=True, colour=(0, 0, 0)).flattened


def test_flatten_in_shards_that_are_kept(tmp_path: Path) -> None:
    """Opaque files stay as they are; transparent ones become PNG, converted and flattened."""
    opaque = saved(FLAT, "WEBP", lossless=True)
    clear = saved(rgba(0), "WEBP", lossless=True, icc_profile=WIDE)
    making = Making(encoding="keep", flatten="#ffffff")
    written = write_shards([Item("a", opaque, -1), Item("b", clear, -1)], tmp_path, making)
    assert {"flattened": 1, "profile converted": 1}.items() <= written.remarks.items()
    assert opaque in (tmp_path / "shard-000000.tar").read_bytes()
    reader = open_reader(
        str(tmp_path), DataConfig(train="", val="", image_size=16, channels=3, global_batch=1)
    )
    assert np.unique(reader[1].images.numpy()).tolist() == [255]


def test_hashes_of_older_shards_stay() -> None:
    """The note of a shard contains this hash: shards written before --flatten are continued."""
    making = Making(size=8, crop="square")
    old = (
        "Making(size=8, crop='square', resample='bicubic', channels=None, encoding='npy', quality=95, "
        "shard_samples=1000, shard_bytes=None, skip_broken=False)"
    )
    assert repr(making) == old
    assert repr(making._replace(flatten="#ffffff")) == old[:-1] + ", flatten='#ffffff')"
    assert "flatten" not in making.words()


@pytest.mark.parametrize("colour", ["no colour", "#12", "rgba(1, 2, 3, 0.5)", "#11223344"])
def test_flatten_refuses_what_is_no_opaque_colour(tmp_path: Path, colour: str) -> None:
    with pytest.raises(UserError, match=r"--flatten .*such as white, or #rrggbb"):
        make_shards("digits", tmp_path, flatten=colour)


def folder(path: Path, files: dict[str, bytes]) -> str:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return f"folder:{path}"


EQUAL = np.repeat(GREY[:, :, None], 3, axis=2)
MIXED = {"a.png": saved(GREY), "b.png": saved(COLOUR), "c.png": saved(EQUAL)}


def read(place: Path, **changes) -> np.ndarray:
    values = {"train": "", "val": "", "image_size": 8, "channels": 3, "global_batch": 1}
    reader = open_reader(str(place), DataConfig(**{**values, **changes}))
    return np.concatenate([reader[number].images.numpy() for number in range(len(reader))])


def test_grey_among_colour_is_said_and_its_remedies_work(tmp_path: Path, capsys) -> None:
    source = folder(tmp_path / "in", MIXED)
    make_shards(source, tmp_path / "mixed", size=8, holdout=0.0)
    said = capsys.readouterr().err
    assert (
        "1 of 3 images have 1 channel, the others 3, 1 of which are grey by value; write them again" in said
    )
    with pytest.raises(DataError, match="several sizes or channels"):
        read(tmp_path / "mixed" / "train")
    assert read(tmp_path / "mixed" / "train", crop="square").shape == (3, 3, 8, 8)
    for channels in (1, 3):
        make_shards(source, tmp_path / f"{channels}", size=8, channels=channels, holdout=0.0)
        assert read(tmp_path / f"{channels}" / "train", channels=channels).shape == (3, channels, 8, 8)
    assert "again" not in capsys.readouterr().err


def test_grey_stored_as_colour_is_said_and_stored_as_grey(tmp_path: Path, capsys) -> None:
    files = {"a.png": saved(EQUAL), "b.png": saved(Image.fromarray(EQUAL).quantize(256))}
    source = folder(tmp_path / "in", files)
    make_shards(source, tmp_path / "three", holdout=0.0)
    assert (
        "all 2 images are grey by value, with 3 equal channels; write them again" in capsys.readouterr().err
    )
    with pytest.raises(DataError, match="again to another folder with --channels 1"):
        read(tmp_path / "three" / "train", channels=1, crop="whole")
    make_shards(source, tmp_path / "one", channels=1, size=12, crop="whole", holdout=0.0)
    capsys.readouterr()
    assert read(tmp_path / "one" / "train", image_size=12, channels=1).shape == (2, 1, 12, 12)
    assert capsys.readouterr().err == ""
    assert read(tmp_path / "one" / "train", image_size=12, channels=3).shape == (2, 3, 12, 12)


def test_profiles_of_kept_files_are_said_and_converted_by_the_remedy(tmp_path: Path, capsys) -> None:
    files = {
        "a.png": saved(FLAT, icc_profile=WIDE),
        "b.png": saved(FLAT, icc_profile=SRGB),
        "c.png": saved(FLAT),
    }
    source = folder(tmp_path / "in", files)
    make_shards(source, tmp_path / "kept", holdout=0.0)
    said = capsys.readouterr().err
    assert "1 of 3 images have an ICC profile other than sRGB, which reading ignores; write" in said
    assert "--encoding png" in said
    make_shards(source, tmp_path / "written", encoding="png", holdout=0.0)
    assert "1 of 3 images were converted from their ICC profile to sRGB" in capsys.readouterr().err
    changed = [
        (read(tmp_path / name / "train", image_size=16) != FLAT.transpose(2, 0, 1)).any((1, 2, 3)).sum()
        for name in ("kept", "written")
    ]
    assert changed == [0, 1]


def test_nothing_is_said_of_usual_images(tmp_path: Path) -> None:
    written = write_shards([Item("a", saved(COLOUR), -1), Item("b", saved(EQUAL), -1)], tmp_path)
    assert sentences(written.remarks) == []
    assert "pictures" not in written.shards.made


def test_arrays_are_images_where_there_are_no_others(tmp_path: Path, capsys) -> None:
    arrays = {}
    for name, values in (("a", GREY), ("b", GREY[:, :, None])):
        buffer = io.BytesIO()
        np.save(buffer, values)
        arrays[f"{name}.npy"] = buffer.getvalue()
    result = make_shards(folder(tmp_path / "in", arrays), tmp_path / "out", holdout=0.0)
    assert result["train"]["image"] == "12x10x1"
    result = make_shards(folder(tmp_path / "both", arrays | MIXED), tmp_path / "images", holdout=0.0)
    assert result["train"]["samples"] == 3
    assert "left out: 2 .npy" in capsys.readouterr().err
