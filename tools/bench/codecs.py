"""Sizes of a set's images in general lossless formats, to set beside `vaescale compress`: bits per dimension, of images and of one picture.

    python tools/bench/codecs.py data/fashion_mnist/test --size 28 --channels 1

Each image is a file of its own, and the first n^2 images are one square picture. JPEG XL needs `pip install pillow-jxl-plugin`, oxipng
`pip install pyoxipng`; a format whose package is missing is left out. What a format decodes to is compared with the image.
"""

import argparse
import importlib
import io
import math
import sys
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vaescale import noise
from vaescale.data.batch import Request
from vaescale.data.config import DataConfig
from vaescale.data.reader import open_reader
from vaescale.likelihoods.bernoulli import Bernoulli
from vaescale.likelihoods.config import BernoulliConfig

Write = Callable[[Image.Image], bytes]
OXIPNG_LEVEL = 6
OPTIONS: dict[str, tuple[str, dict[str, object]]] = {
    "png": ("PNG", {"optimize": True, "compress_level": 9}),
    "webp": ("WEBP", {"lossless": True, "quality": 100, "method": 6}),
    "jxl": ("JXL", {"lossless": True, "effort": 9}),
    "avif": ("AVIF", {"quality": 100, "subsampling": "4:4:4", "speed": 0}),
}


def main() -> None:
    """Measure each format."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="a folder of shards")
    add("--size", type=int, required=True, help="side of the images")
    add("--channels", type=int, choices=(1, 3), required=True, help="of the images")
    add("--images", type=int, help="the first so many; default: all")
    add("--single", type=int, help="measure files of single images for the first so many; default: all")
    add("--binarize", action="store_true", help="black and white images, drawn as by a run with seed 0")
    add("--codecs", default="png,oxipng,webp,jxl", help="formats; avif too; default: %(default)s")
    arguments = parser.parse_args()
    images = read(arguments.data, arguments.size, arguments.channels, arguments.images)
    if arguments.binarize:
        images = binarized(images)
    for name in arguments.codecs.split(","):
        write = codec(name, is_binary=arguments.binarize)
        if write is None:
            sys.stdout.write(f"{name}: its package is not installed\n")
            continue
        sys.stdout.write(f"{name}: {measure(write, images, arguments.single)}\n")
        sys.stdout.flush()


def read(place: str, size: int, channels: int, number: int | None) -> NDArray[np.uint8]:
    """Images [N, C, H, W]."""
    section = DataConfig(train=place, val=place, image_size=size, channels=channels, global_batch=1)
    reader = open_reader(place, section)
    rows = np.arange(min(len(reader), number or len(reader)))
    images: NDArray[np.uint8] = reader.__getitems__(Request(rows, refill=False)).images.numpy()
    return images


def binarized(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The black and white images that `compress --binarize` codes with seed 0."""
    likelihood = Bernoulli(BernoulliConfig(), image_shape=images.shape[1:])
    stream = noise.Stream(0, 0, torch.arange(len(images)))
    target = likelihood.target(torch.from_numpy(images).float() / 255, stream)
    return (target * 255).to(torch.uint8).numpy()


def codec(name: str, *, is_binary: bool) -> Write | None:
    """The function that writes a format; None where its package is missing."""
    if name == "jxl":
        with suppress(ImportError):
            importlib.import_module("pillow_jxl")  # registers itself
    image_format, options = OPTIONS["png" if name == "oxipng" else name]
    if image_format not in Image.SAVE and image_format not in Image.registered_extensions().values():
        return None

    def write(picture: Image.Image) -> bytes:
        file = io.BytesIO()
        (picture.convert("1") if is_binary and image_format == "PNG" else picture).save(
            file, format=image_format, **options
        )
        return file.getvalue()

    if name != "oxipng":
        return write
    try:
        oxipng = importlib.import_module("oxipng")
    except ImportError:
        return None
    return lambda picture: bytes(
        oxipng.optimize_from_memory(write(picture), level=OXIPNG_LEVEL, strip=oxipng.StripChunks.all())
    )


def measure(write: Write, images: NDArray[np.uint8], single: int | None) -> str:
    """The bits per dimension of files of images and of one picture, in words."""
    few = images[: single or len(images)]
    files = [write(picture(image)) for image in few]
    of_files = 8 * sum(map(len, files)) / few.size
    side = math.isqrt(len(images))
    square = images[: side**2].reshape(side, side, *images.shape[1:]).transpose(2, 0, 3, 1, 4)
    whole = square.reshape(images.shape[1], side * images.shape[2], side * images.shape[3])
    of_picture = write(picture(whole))
    pairs = [*zip(files[:10], few[:10], strict=True), (of_picture, whole)]
    exact = all(np.array_equal(decoded(content, len(image)), image) for content, image in pairs)
    return (
        f"{of_files:.3f} bits per dimension, each of {len(few)} images a file; {8 * len(of_picture) / whole.size:.3f}, {side**2} images "
        f"as one picture; {'exact' if exact else 'not exact'}"
    )


def picture(image: NDArray[np.uint8]) -> Image.Image:
    """A picture from [C, H, W]."""
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))


def decoded(content: bytes, channels: int) -> NDArray[np.uint8]:
    """The image [C, H, W] of a file."""
    with Image.open(io.BytesIO(content)) as opened:
        pixels = np.asarray(opened.convert("L" if channels == 1 else "RGB"))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


if __name__ == "__main__":
    main()
