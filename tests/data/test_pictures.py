"""Decoding against Pillow and the original values; what would lose something silently is a fault with a name."""

import base64
import io
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageFile

from vaescale.data.pictures import (
    FILTERS,
    PictureFault,
    Resizer,
    decode,
    decode_source,
    decoder,
    encode,
    fit,
    read_header,
    to_channels,
)
from vaescale.data.pictures import header as header_module
from vaescale.data.pictures.containers import box_bits, jxl_header

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (12, 10, 3), dtype=np.uint8)
GREY = COLOUR[:, :, :1]


def smooth(height: int, width: int) -> np.ndarray:
    """What JPEG is made for."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2).astype(np.uint8)


def saved(picture: Image.Image, name: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, name, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int = 8) -> bytes:
    """A PNG's signature and header, and nothing else."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


@pytest.mark.parametrize("image", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("encoding", ["npy", "png", "webp"])
def test_lossless_encodings_come_back(image, encoding) -> None:
    content = encode(image, encoding)
    expected = np.repeat(image, 3, 2) if encoding == "webp" and image.shape[2] == 1 else image
    assert np.array_equal(decode(content), expected)
    assert read_header(content)[:4] == (encoding, *expected.shape)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_decoded_as_exactly_as_pillow_does(channels: int) -> None:
    image = smooth(218, 178)[:, :, :channels]
    content = encode(image, "jpg", quality=95)
    reference = np.asarray(Image.open(io.BytesIO(content))).reshape(image.shape)
    assert np.array_equal(decode(content), reference)
    assert np.abs(decode(content).astype(int) - image).max() < 16
    assert read_header(content)[:4] == ("jpg", *image.shape)


CONVERTED = {
    "palette": (saved(Image.fromarray(COLOUR).quantize(16), "PNG"), Image.fromarray(COLOUR).quantize(16).convert("RGB")),
    "bilevel": (saved(Image.fromarray(GREY[:, :, 0]).convert("1"), "PNG"), Image.fromarray(GREY[:, :, 0]).convert("1").convert("L")),
    "opaque alpha": (saved(Image.fromarray(COLOUR).convert("RGBA"), "PNG"), Image.fromarray(COLOUR)),
    "opaque grey alpha": (saved(Image.fromarray(GREY[:, :, 0]).convert("LA"), "PNG"), Image.fromarray(GREY[:, :, 0])),
    "grey": (saved(Image.fromarray(GREY[:, :, 0]), "PNG"), Image.fromarray(GREY[:, :, 0])),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_what_loses_nothing_is_converted(name: str) -> None:
    content, expected = CONVERTED[name]
    reference = np.asarray(expected)
    decoded = decode(content)
    assert np.array_equal(decoded, reference if reference.ndim == 3 else reference[:, :, None])
    assert read_header(content).shape == decoded.shape


def test_cmyk_becomes_rgb_as_pillow_does() -> None:
    content = saved(Image.fromarray(smooth(32, 32)).convert("CMYK"), "JPEG")
    assert np.array_equal(decode(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


def _with_chunk(name: bytes) -> bytes:
    """A PNG with an empty chunk and a right checksum before its end, on which Pillow raises an IndexError."""
    whole = encode(COLOUR, "png")
    return whole[:-12] + struct.pack(">I", 0) + name + struct.pack(">I", zlib.crc32(name)) + whole[-12:]


def _transparent() -> Image.Image:
    rgba = np.dstack([COLOUR, np.full((12, 10), 200, np.uint8)])
    return Image.fromarray(rgba)


JPEG = encode(smooth(64, 64), "jpg")
BROKEN = {
    "empty": (b"", "format"),
    "words": (b"hello, world", "format"),
    "png with an empty profile": (_with_chunk(b"iCCP"), "damaged"),
    "gif": (saved(Image.fromarray(COLOUR), "GIF"), "format"),
    "pickle": (b"\x80\x04\x95", "format"),
    "riff": (b"RIFF\x00\x00\x00\x00WAVEfmt ", "format"),
    "cut jpeg": (JPEG[: len(JPEG) // 2], "damaged"),
    "jpeg header alone": (JPEG[:20], "damaged"),
    "cut png": (encode(COLOUR, "png")[:-40], "damaged"),
    "cut webp": (encode(COLOUR, "webp")[:-40], "damaged"),
    "png header alone": (png(12, 10), "damaged"),
    "png header cut": (png(12, 10)[:20], "damaged"),
    "cut npy": (encode(COLOUR, "npy")[:-1], "damaged"),
    "long npy": (encode(COLOUR, "npy") + b"x", "damaged"),
    "npy header cut": (encode(COLOUR, "npy")[:30], "damaged"),
    "float npy": (encode(COLOUR.astype(np.float32), "npy"), "depth"),
    "double npy": (encode(COLOUR.astype(np.float64), "npy"), "shape"),
    "seventeen channels": (encode(np.zeros((2, 2, 17), np.uint8), "npy"), "shape"),
    "16 bits": (saved(Image.fromarray(GREY[:, :, 0].astype(np.uint16)), "PNG"), "depth"),
    "16 bits a channel": (png(12, 10, depth=16), "depth"),
    "transparent": (saved(_transparent(), "PNG"), "transparency"),
    "transparent webp": (saved(_transparent(), "WEBP", lossless=True), "transparency"),
    "animation": (saved(Image.fromarray(COLOUR), "PNG", save_all=True, append_images=[Image.fromarray(COLOUR[::-1])]), "format"),
    "png of 81 megapixels": (png(9000, 9000), "pixels"),
    "huge png": (png(2**31 - 1, 2**31 - 1), "pixels"),
    "no height": (png(10, 0), "pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_and_strange_images_are_faults(name: str) -> None:
    content, reason = BROKEN[name]
    with pytest.raises(PictureFault) as caught:
        decode(content)
    assert caught.value.reason == reason, caught.value


def test_an_object_array_is_not_unpickled() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([[["a plain word"]]], dtype=object), allow_pickle=True)
    with pytest.raises(PictureFault) as caught:
        decode(buffer.getvalue())
    assert caught.value.reason == "shape"


@pytest.mark.parametrize("encoding", ["jpg", "png", "webp", "npy"])
def test_too_many_pixels_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """A sound image beyond a small bound stands for 81 megapixels in 236 kB, which pass Pillow's own check."""
    content = encode(COLOUR, encoding)
    assert decode(content).shape == COLOUR.shape
    monkeypatch.setattr(header_module, "MAX_PIXELS", 12 * 10 - 1)
    for module, name in (
        (Image.Image, "load"),
        (ImageFile.ImageFile, "load"),
        (simplejpeg, "decode_jpeg"),
        (np, "frombuffer"),
        (np, "load"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it is decoded"))
    with pytest.raises(PictureFault, match="12x10 pixels; at most 119 are read"):
        decode(content)


def test_no_flipped_byte_ends_otherwise_than_in_an_image_or_a_fault() -> None:
    for content in (JPEG, encode(COLOUR, "png"), encode(COLOUR, "webp"), encode(COLOUR, "npy")):
        for place in RANDOM.integers(0, len(content), 150):
            changed = bytearray(content)
            changed[place] ^= 1 << int(place) % 8
            try:
                image = decode(bytes(changed))
            except PictureFault:
                continue
            assert image.dtype == np.uint8
            assert image.ndim == 3


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(("crop", "box"), [(148, (15, 35, 163, 183)), ("square", (0, 20, 178, 198)), ("whole", (0, 0, 178, 218))])  # fmt: skip
def test_fit_is_pillow_s_crop_and_resize(crop, box, resample) -> None:
    image = smooth(218, 178)
    fitted = fit(image, size=64, crop=crop, resample=resample)
    expected = np.asarray(Image.fromarray(image).crop(box).resize((64, 64), FILTERS[resample]))
    assert np.abs(fitted.astype(int) - expected).max() <= (resample in ("bilinear", "bicubic"))
    assert (fitted != expected).mean() < 0.01
    grey = fit(image[:, :, :1], size=64, crop=crop, resample=resample)
    assert np.array_equal(grey, fitted[:, :, :1])


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((48, 96), (0, 64, 178, 153)),
        ((96, 48), (34, 0, 143, 218)),
        ((218, 178), (0, 0, 178, 218)),
        (64, (0, 20, 178, 198)),
    ],
)
def test_the_largest_part_with_the_aspect_of_the_size(size, box, resample) -> None:
    image = smooth(218, 178)
    height, width = (size, size) if isinstance(size, int) else size
    expected = np.asarray(Image.fromarray(image).crop(box).resize((width, height), FILTERS[resample]))
    fitted = fit(image, size=size, crop="aspect", resample=resample)
    assert fitted.shape == (height, width, 3)
    assert np.abs(fitted.astype(int) - expected).max() <= (resample in ("bilinear", "bicubic"))


def test_fit_leaves_what_fits() -> None:
    image = smooth(64, 64)
    for crop in (None, "square", "whole", 64):
        assert np.array_equal(fit(image, size=64, crop=crop, resample="bicubic"), image)
    assert np.array_equal(fit(smooth(80, 64), size=64, crop="square", resample="box"), smooth(80, 64)[8:72])


@pytest.mark.parametrize("crop", [None, 65])
def test_fit_refuses_what_does_not_fit(crop) -> None:
    with pytest.raises(PictureFault, match="64x64 pixels"):
        fit(smooth(64, 64), size=32, crop=crop, resample="box")


def test_the_box_filter_is_the_mean_of_areas() -> None:
    image = RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    means = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(fit(image, size=16, crop="whole", resample="box") - means).max() <= 1


def test_channels() -> None:
    assert np.array_equal(to_channels(GREY, 3), np.repeat(GREY, 3, 2))
    assert np.array_equal(to_channels(np.repeat(GREY, 3, 2), 1), GREY)
    with pytest.raises(PictureFault, match="colour image in a grey set"):
        to_channels(COLOUR, 1)
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    assert np.abs(to_channels(COLOUR, 1, grey_from_colour=True)[:, :, 0] - luma).max() <= 1


@pytest.mark.parametrize("name", ["BMP", "TIFF", "GIF", "PPM"])
def test_other_formats_are_read_to_be_written_anew(name: str) -> None:
    picture = Image.fromarray(GREY[:, :, 0])
    assert np.array_equal(decode_source(saved(picture, name), convert=True).image[:, :, :1], GREY)


def _pages(name: str) -> bytes:
    more = [Image.fromarray(COLOUR[::-1]), Image.fromarray(COLOUR[:, ::-1])]
    return saved(Image.fromarray(COLOUR), name, save_all=True, append_images=more)


def tiff(values: np.ndarray) -> bytes:
    """A TIFF of uint16 RGB values, which Pillow reads but does not write."""
    data, entries, start = values.astype("<u2").tobytes(), b"", 8
    directory = start + len(data)
    after = directory + 2 + 12 * 10 + 4
    for tag, kind, count, value in (
        *((256, 3, 1, values.shape[1]), (257, 3, 1, values.shape[0]), (258, 3, 3, after), (259, 3, 1, 1)),
        *((262, 3, 1, 2), (273, 4, 1, start), (277, 3, 1, 3), (278, 3, 1, values.shape[0])),
        *((279, 4, 1, len(data)), (284, 3, 1, 1)),
    ):
        entries += struct.pack("<HHII", tag, kind, count, value)
    ifd = struct.pack("<H", 10) + entries + struct.pack("<IHHH", 0, 16, 16, 16)
    return b"II*\0" + struct.pack("<I", directory) + data + ifd


DEEP = np.arange(120, dtype=np.uint16).reshape(12, 10) * 500
UNUSABLE = {
    "empty": (b"", "format", r"it is empty \(0 bytes\)"),
    "zeros": (bytes(300), "format", "it is 300 zeros"),
    "HTML": (b"\n<!DOCTYPE html>", "format", "it is an HTML page"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1", "format", "Git LFS pointer.*git lfs pull"),
    "PDF": (b"%PDF-1.7", "format", "it is a PDF document"),
    "video": (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "format", "it is a video"),
    "cut BMP": (saved(Image.fromarray(COLOUR), "BMP")[:9], "damaged", "header cannot be read"),
    "3 pages": (_pages("TIFF"), "format", "it has 3 pages; save the one that you want"),
    "frames": (_pages("GIF"), "format", "it is an animation of 3 frames; save the one that you want"),
    "16-bit PNG": (saved(Image.fromarray(DEEP), "PNG"), "depth", "are uint16, not uint8; keep them with --dtype uint16, or scale it to 0 to 255"),
    "16-bit TIFF": (saved(Image.fromarray(DEEP), "TIFF"), "depth", "have 16 bits; .*scale it to 0 to 255"),
    "16-bit RGB TIFF": (tiff(np.dstack([DEEP] * 3)), "depth", "have 16 bits"),
    "16-bit PGM": (b"P5 10 12 65535\n" + DEEP.astype(">u2").tobytes(), "depth", "have 16 bits"),
    "16-bit PPM": (b"P6 10 12 65535\n" + np.dstack([DEEP] * 3).astype(">u2").tobytes(), "depth", "have 16 bits"),
    "float TIFF": (saved(Image.fromarray(DEEP.astype(np.float32)), "TIFF"), "depth", "are floating-point numbers"),
    "int32 TIFF": (saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), "depth", "are 32-bit integers"),
    "LAB TIFF": (saved(Image.fromarray(COLOUR).convert("LAB"), "TIFF"), "depth", "colours are LAB; save it as RGB"),
    "float npy": (encode(COLOUR.astype(np.float32), "npy"), "depth", "are float32, not uint8; keep them with --dtype float32"),
    "channels first": (encode(COLOUR.transpose(2, 0, 1).copy(), "npy"), "shape", r"npy array uint8 \[3, 12, 10\]; .*\[H, W, 3\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_the_true_reason_is_named(name: str) -> None:
    content, reason, message = UNUSABLE[name]
    with pytest.raises(PictureFault, match=message) as caught:
        decode_source(content, convert=True)
    assert caught.value.reason == reason


def test_the_remedies_of_unusable_files_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page as a file of its own; 16 bits scaled as the page says; an array with channels last."""
    pages = Image.open(io.BytesIO(UNUSABLE["3 pages"][0]))
    pages.seek(1)
    page = decode_source(saved(pages.copy(), "PNG"), convert=True).image
    assert np.array_equal(page, COLOUR[::-1])
    text = (Path(__file__).parents[2] / "docs/your_own_images.md").read_text()
    (program,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "deep.tif" in block)
    (tmp_path / "deep.tif").write_bytes(UNUSABLE["16-bit TIFF"][0])
    monkeypatch.chdir(tmp_path)
    exec(program, {})  # noqa: S102  # as the page has it
    scaled = decode((tmp_path / "deep.png").read_bytes())[:, :, 0]
    assert np.abs(scaled - DEEP / 257).max() <= 0.5
    assert np.array_equal(decode(encode(COLOUR, "npy")), COLOUR)
    for flat in (GREY, GREY[:, :, 0]):
        assert np.array_equal(decode(encode(flat, "npy")), GREY)


def test_more_modes_are_read() -> None:
    for mode, expected in (("1", 1), ("L", 1), ("P", 3), ("CMYK", 3), ("YCbCr", 3)):
        picture = Image.fromarray(smooth(12, 10)).convert(mode)
        options = {"compression": "jpeg"} if mode == "YCbCr" else {}
        assert decode_source(saved(picture, "TIFF", **options), convert=True).image.shape == (
            12,
            10,
            expected,
        )


def test_avif() -> None:
    if "AVIF" not in Image.registered_extensions().values():
        pytest.skip("Pillow has no AVIF here")
    image = decode_source(saved(Image.fromarray(smooth(64, 64)), "AVIF", quality=100), convert=True).image
    assert np.abs(image.astype(int) - smooth(64, 64)).mean() < 4
    with pytest.raises(PictureFault, match="AVIF image; shards hold JPEG"):
        read_header(saved(Image.fromarray(COLOUR), "AVIF"))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
JXL = b"\xff\x0a\xc5\x40\x24\x08\0\x01\0\0\0\0"


@pytest.mark.parametrize(
    ("content", "module", "package"),
    [(HEIC, "pillow_heif", "pillow-heif"), (JXL, "pillow_jxl.JpegXLImagePlugin", "pillow-jxl-plugin")],
)
def test_the_package_that_reads_a_format_is_named(monkeypatch, content, module, package) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PictureFault, match=f"image; `pip install {package}` reads it"):
        decode_source(content, convert=True)


def test_heic() -> None:
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(Image.fromarray(smooth(64, 48))).save(buffer, quality=100)
    image = decode_source(buffer.getvalue(), convert=True).image
    assert np.abs(image.astype(int) - smooth(64, 48)).mean() < 4


def test_jpeg_xl() -> None:
    pytest.importorskip("pillow_jxl")
    for height, width in ((12, 10), (64, 48), (8, 8), (100, 77), (1, 600), (90, 160)):
        content = saved(Image.fromarray(smooth(height, width)), "JXL", lossless=True)
        assert jxl_header(content) == (height, width, 8)
        assert np.array_equal(decode_source(content, convert=True).image, smooth(height, width))


def test_a_jpeg_xl_is_measured_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size header by hand: bits from the lowest, 9,000 x 9,000 as 18-bit numbers less one, without a ratio."""
    bits, value = "", 8999
    for number, count in ((0, 1), (2, 2), (value, 18), (0, 3), (2, 2), (value, 18)):
        bits = format(number, f"0{count}b") + bits
    content = b"\xff\x0a" + int(bits, 2).to_bytes(16, "little")
    assert jxl_header(content)[:2] == (9000, 9000)
    monkeypatch.setattr(decoder, "open_foreign", lambda _: pytest.fail("it is decoded"))
    with pytest.raises(PictureFault, match="9000x9000 pixels"):
        decode_source(content, convert=True)


# 16x16 test pictures of ffmpeg 7.0: `-f lavfi -i testsrc=size=16x16 -frames:v 1` with `-pix_fmt yuv420p10le -c:v libaom-av1
# -still-picture 1` and `-pix_fmt rgb48le -c:v libjxl -distance 0`.
AVIF_10_BITS = base64.b64decode(
    "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUIAAAD5bWV0YQAAAAAAAAAvaGRscgAAAAAAAAAAcGljdAAAAAAAAAAA"
    "AAAAAFBpY3R1cmVIYW5kbGVyAAAAAA5waXRtAAAAAAABAAAAHmlsb2MAAAAARAAAAQABAAAAAQAAASEAAACeAAAAKGlpbmYA"
    "AAAAAAEAAAAaaW5mZQIAAAAAAQAAYXYwMUNvbG9yAAAAAGppcHJwAAAAS2lwY28AAAAUaXNwZQAAAAAAAAAQAAAAEAAAABBw"
    "aXhpAAAAAAMKCgoAAAAMYXYxQ4EATAAAAAATY29scm5jbHgAAgACAAIAAAAAF2lwbWEAAAAAAAAAAQABBAECgwQAAACmbWRh"
    "dAoGGAz/24CAMpMBGAAAIAEFG+4EwtfylMDaulkO1E3cLBmcmu3ZQrbQPLdP/rO8jy0bFPy60zP1kJqSxjXvmnV13lqFe3rj"
    "d3dbOwHEEp68+bw5WoDJvofCEW4iCnh3CmI/PDUkkS85KWA+slTgnGH5WeVfv5ExcXbYecKQelk23l5Oq7zV8fLOgjX+N+ZH"
    "S5yG0nq1DKvnh0QpJDMw"
)
JXL_16_BITS = base64.b64decode(
    "AAAADEpYTCANCocKAAAAFGZ0eXBqeGwgAAAAAGp4bCAAAAAJanhsbAoAAADbanhsY/8KQ/ADCQgAAQAcA0sYk46DgwkAE7It"
    "3B2jbCsGw0B4gbAAbFcdTQz8+3G/i78G/znu7zhABsAB4E+k3e/u8H3Cn7q/vF/qUrgHd+E+BEAEYDpogfZri/+KgHsD5Lio"
    "9zkA0/3eu30POW90D4I/uXZXFfT3CH6Gv49/gD9v/27/sKuAf4A/fz/p9iVACkABAM8WNcAQ4GyvA2AA1AKEY7/9ve8KrNfY"
    "A4BQSE0bWzzOpV4uSNbOOorquSDhchA4keKFWfgAQMQd/3ln4uOk9AEQ3wA="
)


def test_avif_of_more_than_8_bits_is_refused_and_the_remedy_works(tmp_path: Path) -> None:
    if "AVIF" not in Image.registered_extensions().values():
        pytest.skip("Pillow has no AVIF here")
    assert box_bits(AVIF_10_BITS) == 10
    twelve = bytearray(AVIF_10_BITS)
    twelve[twelve.index(b"av1C") + 6] |= 0x20
    twelve[twelve.index(b"pixi") + 9 : twelve.index(b"pixi") + 12] = b"\x0c" * 3
    assert box_bits(bytes(twelve)) == 12
    assert box_bits(AVIF_10_BITS.replace(b"pixi", b"free")) == 10, "by av1C alone"
    assert box_bits(AVIF_10_BITS.replace(b"ipma", b"free")) == 10, "by any image"
    assert box_bits(saved(Image.fromarray(smooth(16, 16)), "AVIF")) == 8
    with pytest.raises(PictureFault, match="have 10 bits; shards hold 8 bits") as caught:
        decode_source(AVIF_10_BITS, convert=True)
    assert caught.value.reason == "depth"
    (tmp_path / "deep.avif").write_bytes(AVIF_10_BITS)
    Image.open(tmp_path / "deep.avif").convert("RGB").save(tmp_path / "deep.png")
    assert decode_source((tmp_path / "deep.png").read_bytes(), convert=True).image.shape == (16, 16, 3)


def test_boxes_that_end_early_tell_nothing() -> None:
    for end in range(len(AVIF_10_BITS)):
        assert box_bits(AVIF_10_BITS[:end]) in (8, 10)
    random = np.random.default_rng(0)
    for place in random.integers(0, 320, 300):
        changed = bytearray(AVIF_10_BITS)
        changed[place] ^= 1 << int(random.integers(8))
        assert box_bits(bytes(changed)) >= 8


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_heic_of_more_than_8_bits_is_refused(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    heif = pytest.importorskip("pillow_heif")
    monkeypatch.setattr(heif.options, "SAVE_HDR_TO_12_BIT", bits == 12)
    values = smooth(64, 48)
    deep = heif.from_bytes("RGB;16", (48, 64), (values.astype(np.uint16) << 8).tobytes())
    image = deep if bits > 8 else heif.from_pillow(Image.fromarray(values))
    buffer = io.BytesIO()
    image.save(buffer, format="HEIF")
    assert box_bits(buffer.getvalue()) == bits
    if bits == 8:
        assert decode_source(buffer.getvalue(), convert=True).image.shape == values.shape
        return
    with pytest.raises(PictureFault, match=f"have {bits} bits; shards hold 8 bits"):
        decode_source(buffer.getvalue(), convert=True)


def test_jpeg_xl_of_more_than_8_bits_is_refused() -> None:
    assert jxl_header(JXL_16_BITS) == (16, 16, 16)
    with pytest.raises(PictureFault, match="have 16 bits; shards hold 8 bits"):
        decode_source(JXL_16_BITS, convert=True)


def bits_of(*fields: tuple[int, int]) -> bytes:
    """Fields of (value, number of bits), from the lowest bit on."""
    text = "".join(reversed([format(value, f"0{count}b") for value, count in fields]))
    return int(text, 2).to_bytes(40, "little")


EIGHT = ((1, 1), (0, 5), (1, 3))  # a size of 8x8
NO_EXTRA = ((0, 1), (0, 1))
JXL_BITS = {
    "defaults": ((*EIGHT, (1, 1)), 8),
    "10": ((*EIGHT, *NO_EXTRA, (0, 1), (1, 2)), 10),
    "12": ((*EIGHT, *NO_EXTRA, (0, 1), (2, 2)), 12),
    "16": ((*EIGHT, *NO_EXTRA, (0, 1), (3, 2), (15, 6)), 16),
    "floats": ((*EIGHT, *NO_EXTRA, (1, 1), (0, 2)), 32),
    "half floats": ((*EIGHT, *NO_EXTRA, (1, 1), (1, 2)), 16),
    "after an orientation and an intrinsic size": (
        (*EIGHT, (0, 1), (1, 1), (5, 3), (1, 1), *EIGHT, (0, 1), (0, 1), (0, 1), (1, 2)),
        10,
    ),
}


@pytest.mark.parametrize("name", JXL_BITS)
def test_bits_of_jpeg_xl(name: str) -> None:
    """ISO/IEC 18181-1, image metadata and bit depth."""
    fields, bits = JXL_BITS[name]
    assert jxl_header(b"\xff\x0a" + bits_of(*fields)) == (8, 8, bits)


@pytest.mark.parametrize("resample", list(FILTERS))
def test_parts_that_are_resized_at_once_have_the_values_of_one(resample: str) -> None:
    rng = np.random.default_rng(0)
    sizes = [*[(40, 30)] * 20, (16, 12), *[(50, 20)] * 3, *[(40, 30)] * 2]
    parts = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    places = rng.permutation(len(parts))
    images = np.zeros((len(parts), 3, 16, 12), np.uint8)
    resizer = Resizer(images, resample)
    for place, part in zip(places.tolist(), parts, strict=True):
        spent = part.copy()
        resizer.add(place, spent)
        spent[:] = 0  # what was added may be used again
    resizer.flush()
    for place, part in zip(places.tolist(), parts, strict=True):
        alone = fit(part, size=(16, 12), crop="whole", resample=resample)
        assert np.array_equal(images[place], alone.transpose(2, 0, 1))
