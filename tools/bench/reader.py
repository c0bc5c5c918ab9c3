"""Speed of reading images, as ratios measured side by side in one run.

    python tools/bench/reader.py --images ~/celeba/img_align_celeba      real JPEG crops of 178x218
    python tools/bench/reader.py                                         generated images; the ratios differ slightly

jpeg       speed relative to a bare decode + crop + resize loop on one core: this reader and webdataset's pipeline
encodings  images of 64x64 by encoding: images per second on one core, bytes per image
memory     `cache: memory`: images of 64x64 per second as uint8 and float batches
epochs     resident memory of all processes after each of three epochs
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import simplejpeg
import torch
from PIL import Image

from vaescale.data.config import DataConfig
from vaescale.data.loader import training_batches
from vaescale.data.making.items import Item
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_shards
from vaescale.data.pictures import Encoding, decode, encode, fit
from vaescale.data.plan import Plan
from vaescale.data.reader import open_reader
from vaescale.system.host import keep_freed_pages

CROP, SIZE, BATCH = 148, 64, 128
Run = Callable[[], int]


def main() -> None:
    """Run the named measurements, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of JPEG files of 178x218")
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("parts", nargs="*", default=["jpeg", "encodings", "memory", "epochs"])
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_pages()  # as every verb does
    files = load(arguments.images, arguments.count)
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            PARTS[part](files, Path(folder), arguments.rounds)


def jpeg(files: list[bytes], folder: Path, rounds: int) -> None:
    """Measure JPEG files that are decoded, cropped and resized."""
    items = [Item(f"{number:06d}", content, number % 10) for number, content in enumerate(files)]
    write_shards(items, folder / "jpeg", Making(encoding="keep"))
    urls = sorted(map(str, (folder / "jpeg").glob("*.tar")))
    runs: dict[str, Run] = {
        "bare loop, one core": partial(bare, files),
        "bare loop, Pillow's filter": partial(bare_with_pillow, files),
    }
    for workers in (0, 1, 2):
        runs[f"this reader, {workers} workers"] = partial(ours, folder / "jpeg", workers, crop=CROP)
    for workers in (0, 2):
        for decoder in ("pillow", "simplejpeg"):
            name = f"webdataset, {decoder}, {workers} workers"
            runs[name] = partial(webdataset, urls, decoder, workers)
    print_table("JPEG 178x218, crop 148, to 64x64", measure(runs, rounds), base="bare loop, one core")


def encodings(files: list[bytes], folder: Path, rounds: int) -> None:
    """Measure stored 64x64 images in each encoding."""
    images = small(files)
    items = [Item(f"{number:06d}", image, 0) for number, image in enumerate(images)]
    runs: dict[str, Run] = {}
    sizes = {}
    for encoding in get_args(Encoding):
        sizes[encoding] = statistics.mean(len(encode(image, encoding)) for image in images[:500])
        write_shards(items, folder / encoding, Making(encoding=encoding))
        runs[encoding] = partial(ours, folder / encoding, 0)
    print_table(
        "64x64 on one core",
        measure(runs, rounds),
        base="png",
        notes={k: f"{v:.0f} bytes" for k, v in sizes.items()},
    )


def memory(files: list[bytes], folder: Path, rounds: int) -> None:
    """Measure decoded images that are kept in memory."""
    write_shards(
        [Item(f"{n:06d}", image, 0) for n, image in enumerate(small(files))], folder / "memory", Making()
    )
    reader = open_reader(str(folder / "memory"), config(folder / "memory", cache="memory"))

    def run(to_float: bool, flip: bool) -> int:
        count = 0
        for batch in batches(reader, 5, workers=0, flip=flip):
            count += len(batch.float().div_(255) if to_float else batch)
        return count

    runs = {
        "uint8": lambda: run(False, False),
        "float": lambda: run(True, False),
        "float, mirrored": lambda: run(True, True),
    }
    print_table("cache: memory, 64x64", measure(runs, rounds), base="uint8")


def epochs(files: list[bytes], folder: Path, _: int) -> None:
    """Print the resident memory after each of three epochs."""
    write_shards(
        [Item(f"{n:06d}", content, 0) for n, content in enumerate(files)],
        folder / "epochs",
        Making(encoding="keep"),
    )
    reader = open_reader(str(folder / "epochs"), config(folder / "epochs", crop=CROP))
    steps = len(reader) // BATCH
    sys.stdout.write("resident memory of all processes, 2 workers\n")
    for number, _batch in enumerate(batches(reader, 3, workers=2), start=1):
        if number % steps == 0 or number == steps // 2:
            sys.stdout.write(f"  after {number / steps:.1f} epochs  {resident() / 1e6:8.1f} MB\n")


PARTS = {"jpeg": jpeg, "encodings": encodings, "memory": memory, "epochs": epochs}


def bare(files: list[bytes]) -> int:
    """Decode, crop and resize without files, classes, batches or checks: a lower limit of the work."""
    for content in files:
        fit(simplejpeg.decode_jpeg(content), size=SIZE, crop=CROP, resample="bicubic")
    return len(files)


def bare_with_pillow(files: list[bytes]) -> int:
    """Run `bare` with Pillow's bicubic filter, which most loaders use."""
    for content in files:
        cut = np.ascontiguousarray(simplejpeg.decode_jpeg(content)[35:183, 15:163])
        np.asarray(Image.fromarray(cut).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return len(files)


def ours(folder: Path, workers: int, **changes: Any) -> int:
    """Read one epoch of batches with this reader. Returns the number of images."""
    reader = open_reader(str(folder), config(folder, **changes))
    return sum(len(batch) for batch in batches(reader, 1, workers=workers))


def webdataset(urls: list[str], decoder: str, workers: int) -> int:
    """Run webdataset's pipeline as in its documentation: shuffle buffer, decode, map, batch."""
    import webdataset as wds

    def cut(picture: Any) -> np.ndarray[Any, Any]:
        if decoder == "simplejpeg":
            small: np.ndarray[Any, Any] = fit(
                simplejpeg.decode_jpeg(picture), size=SIZE, crop=CROP, resample="bicubic"
            )
            return small
        box = (15, 35, 163, 183)
        return np.asarray(picture.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC))

    def collate(samples: list[Any]) -> Any:
        return torch.from_numpy(np.stack([image for image, _ in samples]).transpose(0, 3, 1, 2).copy())

    data = wds.WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(1000)
    data = data.decode("pil") if decoder == "pillow" else data
    data = (
        data.to_tuple("jpg", "cls").map_tuple(cut, lambda label: label).batched(BATCH, collation_fn=collate)
    )
    return sum(
        len(batch) for batch in torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers)
    )


def config(folder: Path, **changes: Any) -> DataConfig:
    """Return the data section of a recipe."""
    values = {
        "train": str(folder),
        "val": str(folder),
        "image_size": SIZE,
        "channels": 3,
        "global_batch": BATCH,
    }
    return DataConfig(**{**values, **changes})


def batches(reader: Any, passes: int, *, workers: int, flip: bool = False) -> Iterator[torch.Tensor]:
    """Yield the images of some epochs, batch by batch."""
    plan = Plan(reader.index.shards.samples, BATCH, 0)
    steps = range(passes * plan.steps_per_epoch)
    for (batch,) in training_batches(
        reader, plan, steps=steps, rank=0, world_size=1, accumulation=1, workers=workers, flip=flip
    ):
        yield batch.images


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Measure images per second of each run in each round; the rounds are interleaved."""
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            count = run()
            speeds[name].append(count / (time.perf_counter() - start))
    return speeds


def print_table(
    title: str, speeds: dict[str, list[float]], *, base: str, notes: dict[str, str] | None = None
) -> None:
    """Print medians, and the median of the rounds' ratios to the base."""
    sys.stdout.write(f"{title}\n")
    for name, values in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(values, speeds[base], strict=True))
        note = f"  {notes[name]}" if notes else ""
        sys.stdout.write(f"  {name:<34} {statistics.median(values):9.0f} images/s  {ratio:6.2f}{note}\n")


def load(folder: Path | None, count: int) -> list[bytes]:
    """Return JPEG files from a folder, or generated ones."""
    if folder is not None:
        return [path.read_bytes() for path in sorted(folder.expanduser().glob("*.jpg"))[:count]]
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:218, :178]
    images = []
    for _ in range(count):
        a, b, c = rng.uniform(0.01, 0.3, (3, 3))
        wave = np.sin(y[..., None] * a + x[..., None] * b) + np.cos((x * y)[..., None] * c / 50)
        images.append(np.clip(128 + 50 * wave + rng.normal(0, 4, (218, 178, 3)), 0, 255).astype(np.uint8))
    return [encode(image, "jpg", quality=75) for image in images]


def small(files: list[bytes]) -> list[np.ndarray[Any, Any]]:
    """Decode, crop and resize the images to 64x64."""
    return [fit(decode(content), size=SIZE, crop=CROP, resample="bicubic") for content in files]


def resident() -> int:
    """Return the bytes of this process and its children, each shared page counted once (PSS). Linux."""
    me = os.getpid()
    children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
    total = 0
    for process in (str(me), *children):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total


if __name__ == "__main__":
    main()
