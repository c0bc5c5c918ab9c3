"""Images with an EXIF orientation are upright wherever they are decoded, as Pillow's exif_transpose turns them."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from vaescale.commands.make_shards import make_shards
from vaescale.data.config import DataConfig
from vaescale.data.index import INDEX, parse_index
from vaescale.data.making.indexing import index_shards
from vaescale.data.making.items import Item
from vaescale.data.making.storing import Making
from vaescale.data.making.verifying import verify_shards
from vaescale.data.making.writing import write_shards
from vaescale.data.pictures import PictureFault, decode, decode_source, read_header
from vaescale.data.pictures.metadata import jpeg_orientation, stated_orientation, turn
from vaescale.data.reader import open_reader

# Left half black, a red corner: every one of the eight positions differs.
IMAGE = np.zeros((24, 32, 3), np.uint8)
IMAGE[:, 16:] = 255
IMAGE[:6, :6] = (255, 0, 0)
FORMATS = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def saved(name: str, orientation: int = 1, image: np.ndarray = IMAGE) -> bytes:
    buffer = io.BytesIO()
    options = (
        {}
        if orientation == 1
        else {"exif": exif(orientation) if name == "TIFF" else exif(orientation).tobytes()}
    )
    Image.fromarray(image).save(buffer, name, **options, **FORMATS.get(name, {}))
    return buffer.getvalue()


def expected(content: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("name", FORMATS)
def test_all_orientations_are_those_of_pillow(name: str) -> None:
    for orientation in range(1, 9):
        content = saved(name, orientation)
        source = decode_source(content, convert=True)
        assert np.array_equal(source.image, expected(content))
        assert source.turned == (orientation > 1)
        if name != "TIFF":  # which shards do not hold
            assert np.array_equal(decode(content), source.image)
            assert read_header(content).shape == source.image.shape
            assert read_header(content).orientation == orientation
    for orientation in range(2, 9):
        grey = turn(IMAGE[:, :, :1], orientation)
        assert np.array_equal(grey, turn(IMAGE, orientation)[:, :, :1])
        assert grey.flags.c_contiguous


def test_avif_is_turned_too() -> None:
    if "AVIF" not in Image.registered_extensions().values():
        pytest.skip("Pillow has no AVIF here")
    content = saved("AVIF", 6)
    assert decode_source(content, convert=True).image.shape == (32, 24, 3)
    assert np.abs(decode_source(content, convert=True).image.astype(int) - expected(content)).max() < 3


def test_heic_is_turned_once() -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()  # its writer gives the file a rotation, as cameras do, and leaves the tag in EXIF
    source = decode_source(saved("HEIF", 6), convert=True)
    assert source.image.shape == (32, 24, 3)
    assert source.image[0, -1, 0] > 200 > 60 > source.image[0, -1, 1], "the red corner is on the right"


def tags(*entries: tuple[int, int, int, int], order: str = "<", directory: int = 8) -> bytes:
    """EXIF data with one directory of (tag, type, count, value)."""
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", directory)
    rows = [struct.pack(f"{order}HHI", *entry[:3]) for entry in entries]
    values = [struct.pack(f"{order}HH" if entry[1] == 3 else f"{order}I", entry[3], *[0] * (entry[1] == 3)) for entry in entries]  # fmt: skip
    return start + struct.pack(f"{order}H", len(entries)) + b"".join(a + b for a, b in zip(rows, values, strict=True))  # fmt: skip


SIX = (274, 3, 1, 6)
EXIF = {
    "little-endian": (tags(SIX), 6),
    "big-endian": (tags(SIX, order=">"), 6),
    "with the prefix of JPEG": (b"Exif\0\0" + tags(SIX), 6),
    "after others": (tags((256, 4, 1, 5), (271, 2, 1, 0), SIX), 6),
    "a long integer": (tags((274, 4, 1, 6)), 6),
    "empty": (b"", 1),
    "words": (b"orientation: 6", 1),
    "cut in the head": (tags(SIX)[:6], 1),
    "cut in the tag": (tags(SIX)[:-4], 1),
    "nine": (tags((274, 3, 1, 9)), 1),
    "zero": (tags((274, 3, 1, 0)), 1),
    "two values": (tags((274, 3, 2, 6)), 1),
    "text": (tags((274, 2, 1, 6)), 1),
    "directory beyond the end": (tags(SIX, directory=2**32 - 1), 1),
    "more tags than bytes": (tags(SIX)[:8] + b"\xff\xff" + tags((1, 3, 1, 1))[10:], 1),
}


@pytest.mark.parametrize("name", EXIF)
def test_malformed_exif_counts_as_none(name: str) -> None:
    data, orientation = EXIF[name]
    assert (stated_orientation(data) or 1) == orientation
    upright = saved("JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", len(data) + 8) + b"Exif\0\0" + data
    for start in (2, 20):  # at once, and after the JFIF segment
        content = upright[:start] + segment + upright[start:]
        assert jpeg_orientation(content) == (1 if data.startswith(b"Exif") else orientation)
        assert decode(content).shape == read_header(content).shape


def test_no_changed_byte_of_metadata_ends_in_a_crash() -> None:
    random = np.random.default_rng(0)
    for name in ("JPEG", "PNG", "WEBP"):
        content = saved(name, 6)
        start = content.find(b"II*\0") if b"II*\0" in content else content.find(b"MM\0*")
        for place in random.integers(start - 8, start + 26, 60):
            changed = bytearray(content)
            changed[place] ^= 1 << int(random.integers(8))
            try:
                image = decode(bytes(changed))
            except PictureFault:  # the length of a segment, or of a chunk
                continue
            assert image.shape == read_header(bytes(changed)).shape


def test_endless_segments_are_not_followed() -> None:
    content = saved("JPEG")
    many = b"\xff\xe2\0\2" * 5000
    with_exif = content[:2] + many + saved("JPEG", 6)[2:]
    assert jpeg_orientation(with_exif) == 1


def upright(place: Path, **changes) -> dict[str, bool]:
    """By key: whether the black half is on top (turned) or on the left, as it must be."""
    values = {"train": "", "val": "", "image_size": 8, "channels": 3, "global_batch": 1, "crop": "whole"}
    reader = open_reader(str(place), DataConfig(**{**values, **changes}))
    result = {}
    for number in range(len(reader)):
        got = reader[number]
        image = got.images[0, 1]  # green: the corner is not white in it
        turned = got.keys[0].startswith("turned")
        black, white = (image[:3], image[5:]) if turned else (image[:, :3], image[:, 5:])
        result[got.keys[0]] = bool(black.float().mean() < 40 and white.float().mean() > 215)
    return result


def items(name: str) -> list[Item]:
    """Half of them with tag 6, with which the left side comes to the top."""
    return [Item(f"{('plain', 'turned')[i % 2]}{i}", saved(name, (1, 6)[i % 2]), -1) for i in range(4)]


MAKINGS = {
    "keep": Making(encoding="keep"),
    "png": Making(encoding="png"),
    "size": Making(size=8, crop="whole", encoding="npy"),
}


@pytest.mark.parametrize("making", MAKINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_way_in_stores_and_reads_them_upright(tmp_path: Path, name: str, making: str) -> None:
    written = write_shards(items(name), tmp_path, MAKINGS[making])
    assert upright(tmp_path) == dict.fromkeys(("plain0", "turned1", "plain2", "turned3"), True)
    assert all(upright(tmp_path, cache="memory").values())
    assert written.shards.image == ((8, 8, 3) if making == "size" else None)
    kept = making == "keep" and name != "TIFF"
    assert written.remarks["turned when read" if kept else "turned"] == 2
    assert verify_shards(str(tmp_path), deep=True) == (4, [])
    index = parse_index((tmp_path / INDEX).read_bytes(), "")
    assert index.made["pictures"] == written.remarks


def test_tars_indexed_in_place(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for item in items("JPEG"):
            member = tarfile.TarInfo(f"{item.key}.jpg")
            member.size = len(item.content)
            tar.addfile(member, io.BytesIO(item.content))
    written = index_shards(tmp_path)
    assert written.shards.image is None, "24x32 and 32x24"
    assert written.remarks["turned when read"] == 2
    assert all(upright(tmp_path).values())
    index_shards(tmp_path)  # again, over its own index


def test_a_set_in_which_all_are_turned_has_their_upright_shape(tmp_path: Path) -> None:
    turned = [Item(str(i), saved("JPEG", 6), -1) for i in range(3)]
    assert write_shards(turned, tmp_path, Making(encoding="keep")).shards.image == (32, 24, 3)


def with_xmp(name: str, xmp: bytes, orientation: int = 1, *, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    options: dict = {"xmp": xmp, **FORMATS.get(name, {})}
    if name == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=compressed)
        options = {"pnginfo": info}
    if name == "TIFF":
        options = {"tiffinfo": {700: xmp, **({274: orientation} if orientation > 1 else {})}}
    elif orientation > 1:
        options["exif"] = exif(orientation).tobytes()
    Image.fromarray(IMAGE).save(buffer, name, **options)
    return buffer.getvalue()


ATTRIBUTE = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
ELEMENT = b"<tiff:Orientation>6</tiff:Orientation>"


@pytest.mark.parametrize("name", [*FORMATS, "AVIF"])
def test_an_orientation_in_xmp_alone_is_counted_and_not_applied(tmp_path: Path, name: str, capsys) -> None:
    """As OpenCV, libvips and torchvision do; Pillow's exif_transpose, the remedy, applies it."""
    if name == "AVIF" and "AVIF" not in Image.registered_extensions().values():
        pytest.skip("Pillow has no AVIF here")
    for xmp in (ATTRIBUTE, ELEMENT, ATTRIBUTE.replace(b'"6"', b"'6'")):
        source = decode_source(with_xmp(name, xmp), convert=True)
        assert (source.image.shape, source.turned, source.only_xmp) == ((24, 32, 3), False, True)
    upright = decode_source(with_xmp(name, ELEMENT.replace(b"6", b"1")), convert=True)
    assert not upright.only_xmp
    if name != "AVIF":  # whose writer turns the image by EXIF
        both = decode_source(with_xmp(name, ELEMENT.replace(b"6", b"3"), 6), convert=True)
        assert (both.image.shape, both.turned, both.only_xmp) == ((32, 24, 3), True, False), (
            "EXIF comes first"
        )
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / f"1.{name.lower()}"
    path.write_bytes(with_xmp(name, ATTRIBUTE))
    written = make_shards(f"folder:{tmp_path}/in", tmp_path / "out", holdout=0)
    assert written["train"]["image"] == "24x32x3"
    assert "1 of 1 images have an orientation in XMP alone" in capsys.readouterr().err
    with Image.open(path) as picture:
        ImageOps.exif_transpose(picture).save(path)
    again = make_shards(f"folder:{tmp_path}/in", tmp_path / "again", holdout=0)
    assert again["train"]["image"] == "32x24x3"
    assert "XMP" not in capsys.readouterr().err


def test_compressed_and_broken_xmp_of_png() -> None:
    content = with_xmp("PNG", ATTRIBUTE, compressed=True)
    assert b"Orientation" not in content
    assert read_header(content).only_xmp
    broken = content.replace(content[content.index(b"com.adobe.xmp") + 18 :][:20], bytes(20))
    assert not read_header(broken).only_xmp
