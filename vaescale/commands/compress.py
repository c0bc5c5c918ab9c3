"""Compress the images of a source with a trained run to one file, without loss."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vaescale import comm, noise
from vaescale.commands import file_mixture
from vaescale.commands.file_mixture import CodedPrior
from vaescale.commands.make_shards import parse_crop
from vaescale.commands.signature import Count, checked
from vaescale.commands.source_images import Choice, ImageSet, open_images
from vaescale.compression.bits_back import Codec, Condition
from vaescale.compression.chunks import Coding, decode_chunk, encode_chunk
from vaescale.compression.container import (
    MOST_CHUNK_VALUES,
    Chunk,
    Names,
    Record,
    pack_chunk,
    pack_header,
    pack_table,
    part_bytes,
)
from vaescale.compression.determinism import Fingerprint, fingerprint, versions
from vaescale.compression.pixels import WHITE
from vaescale.data.batch import Batch
from vaescale.data.config import Crop, Filter
from vaescale.errors import DataError, UserError
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.gaussian import Mixture
from vaescale.system import heartbeat
from vaescale.system.console import Progress, say
from vaescale.system.files import replacing
from vaescale.system.secrets import redact
from vaescale.trained import Trained, Weights, Which, open_trained, refuse_unfit_vectors
from vaescale.training import launch

CHUNK_IMAGES, CHUNK_VALUES = 4096, 1 << 24  # the default size of a chunk: what is reached first
VECTOR_VALUES = (
    8  # a number of a vector counts as so many values of an image, since its text takes six bytes or less
)
LatentBits = Literal[4, 6, 8, 10, 12, 14, 16]


class Options(NamedTuple):
    """How to compress: see `compress`."""

    binarize: bool
    check: bool
    chunk_images: int
    group: int | None


class Part(NamedTuple):
    """One chunk that this rank wrote to its own file: its order (set, number in the set, rank), place and numbers."""

    order: tuple[int, int, int]
    record: Record
    bytes: dict[str, int]
    bits: float
    initial_bytes: int
    first_images: int


@checked
def compress(
    run: Path,
    source: str,
    out: Path,
    *,
    split: str | None = None,
    limit: Count | None = None,
    crop: Crop | str | None = None,
    resample: Filter | None = None,
    binarize: bool = False,
    check: bool = False,
    check_each: bool = False,
    chunk_images: Count | None = None,
    latent_bits: LatentBits | None = None,
    prior: CodedPrior = "standard",
    weights: Weights = "ema",
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Compress every image of a source of make-shards, of shards or of a folder of pictures without loss, at the run's size.

    split, limit, crop, resample: as in `score`. binarize: code the black and white images that a bernoulli run makes of grey ones.
    check: decode each chunk again and compare. check_each: a checksum for each image even where that takes more than 0.2% of
    the file. chunk_images: number of images of a chunk. latent_bits: a latent has 2^latent_bits bins, by default 2^12, in
    a ladder 2^10. prior: `gmm` codes the latents of a flat run under its mixture of fit-gmm, of which RUN/compression keeps a copy, in place of
    N(0, I). checkpoint: see `Which`.

    Returns the sizes in bytes by part, and the images per second. Raises UserError for a run whose images have no code, for images that
    it cannot code, and for a file that exists; DataError for images that cannot be read.
    """
    choice = Choice(split, limit, parse_crop(crop), resample)
    with launch.joined():
        comm.on_main(lambda: _refuse_existing(out))
        trained = open_trained(run, weights=weights, which=checkpoint, device="cpu")
        # Read once: another fit may replace it meanwhile.
        mixture = comm.on_main(lambda: file_mixture.chosen(trained) if prior == "gmm" else None)
        codec = comm.together(lambda: Codec(trained.model, latent_bits=latent_bits, mixture=mixture))
        trained.announce(f"compress {redact(source)} with")
        sets = open_images(trained, source, choice)
        values = trained.model.likelihood.dimensions + VECTOR_VALUES * codec.vector_size
        size = chunk_images or max(1, min(CHUNK_IMAGES, CHUNK_VALUES // values))
        if size * values > MOST_CHUNK_VALUES:
            raise UserError(
                f"--chunk-images (={size}) makes chunks of more than {MOST_CHUNK_VALUES} values; give at most "
                f"{MOST_CHUNK_VALUES // values}"
            )
        for images in sets:
            if images.reader is not None:
                refuse_unfit_vectors(trained, images.reader)
        options = Options(binarize, check, size, 1 if check_each else None)
        mark = comm.together(lambda: fingerprint(codec))
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f".{out.name}.rank{comm.rank()}")
        try:
            begun = time.monotonic()
            parts = comm.together(lambda: list(_encode(codec, trained, sets, part, options)))
            seconds = time.monotonic() - begun
            every = [(rank, one) for rank, share in enumerate(comm.gather_object(parts)) for one in share]
            header = _header(trained, codec, mark, sets, binarize, sum(one.record.images for _, one in every))
            header |= {} if mixture is None else {"mixture": _described(mixture)}
            if mixture is not None:  # before the file, which is lost without it
                comm.on_main(lambda: file_mixture.keep(trained, mixture))
            result = comm.on_main(lambda: _join(out, header, every))
        finally:
            part.unlink(missing_ok=True)
        return {
            "run": str(trained.folder),
            "step": trained.step,
            "weights": trained.weights,
            "source": redact(source),
            "prior": "standard" if mixture is None else f"mixture of {len(mixture.weights)}",
            **result,
            "images_per_second": result["images"] / max(seconds, 1e-9),
            "checked": check,
            "sizing": {each.split or "all": each.sizing for each in sets},
        }


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists; delete it, or choose another name")


def _encode(
    codec: Codec, trained: Trained, sets: list[ImageSet], path: Path, options: Options
) -> Iterator[Part]:
    """Write this rank's chunks to its file."""
    total, ranks = sum(images.number or 0 for images in sets), comm.world_size()
    done = 0
    with (
        path.open("wb") as file,
        Progress("compress", total, unit="images", shown=comm.is_main()) as progress,
    ):

        def show(number: int) -> None:
            nonlocal done
            done += number
            heartbeat.beat("compressing")
            progress.update(min(done * ranks, total) if total else done * ranks)

        for order, images in enumerate(sets):
            for number, (levels, names) in enumerate(_chunks(codec, trained, images, options)):
                condition = np.array(names.labels) if names.vectors is None else names.vectors
                coding = encode_chunk(codec, levels, condition=condition, group=options.group, progress=show)
                if options.check:
                    _check(codec, coding, levels, condition)
                content = pack_chunk(Chunk(coding, names))
                record = Record(file.tell(), len(content), len(levels))
                file.write(content)
                assert coding.lengths is not None
                yield Part(
                    (order, number, comm.rank()),
                    record,
                    part_bytes(content),
                    float(coding.lengths.total.sum()),
                    4 * coding.initial_words,
                    coding.first_images,
                )


def _check(codec: Codec, coding: Coding, levels: NDArray[np.uint8], condition: Condition) -> None:
    """Decode a chunk, and raise DataError unless it holds the images."""
    try:
        right = np.array_equal(decode_chunk(codec, coding, condition=condition), levels)
    except DataError as error:
        raise DataError(f"a chunk does not decode on this machine ({error}); no file is written") from None
    assert right, "the checksums agree and the images do not"


def _chunks(
    codec: Codec, trained: Trained, images: ImageSet, options: Options
) -> Iterator[tuple[NDArray[np.uint8], Names]]:
    """This rank's images in chunks, with their names."""
    waiting: list[_Image] = []
    skipped = 0
    for batch in images.batches():
        skipped += len(batch.faults)
        levels = _levels(codec, trained, batch, options.binarize)
        rows = torch.nonzero(batch.mask).flatten().tolist()
        vectors = _vectors(codec, batch)
        waiting += [
            _Image(
                levels[row],
                batch.keys[row],
                int(batch.labels[row]),
                int(batch.slots[row]),
                None if vectors is None else vectors[row],
            )
            for row in rows
        ]
        while len(waiting) >= options.chunk_images:
            yield _joined(waiting[: options.chunk_images], images.split)
            del waiting[: options.chunk_images]
    if waiting:
        yield _joined(waiting, images.split)
    if skipped:
        say(f"{skipped} images of {images.split or 'the source'} cannot be used and are left out")


class _Image(NamedTuple):
    """One image with what is kept of it."""

    levels: NDArray[np.uint8]
    key: str
    label: int
    slot: int
    vector: NDArray[np.float32] | None


def _joined(images: list[_Image], split: str) -> tuple[NDArray[np.uint8], Names]:
    levels, keys, labels, slots, vectors = zip(*images, strict=True)
    of_run = None if vectors[0] is None else np.stack(vectors)
    return np.stack(levels), Names(split, keys, labels, slots, of_run)


def _vectors(codec: Codec, batch: Batch) -> NDArray[np.float32] | None:
    """The vectors [B, V] of a batch; None where the run takes none. Raises UserError for images without."""
    if not codec.vector_size:
        return None
    if batch.vectors is None:
        raise UserError(
            f"this run takes a vector of {codec.vector_size} numbers with each image, and these images have none; give shards that have "
            "them, which make-shards --vectors writes"
        )
    return batch.vectors.numpy()


def _levels(codec: Codec, trained: Trained, batch: Batch, binarize: bool) -> NDArray[np.uint8]:
    """The levels of a batch's images, uint8 [B, C, H, W]. Raises UserError for grey images of a run of black and white ones."""
    if batch.images.dtype != torch.uint8:
        raise UserError(f"images of {batch.images.dtype} cannot be compressed yet; give 8-bit images")
    if codec.pixels.levels > 2:
        if binarize:
            raise UserError("--binarize is for runs with likelihood.kind bernoulli; leave it out")
        return batch.images.numpy()
    if binarize:
        target = trained.model.target(batch.images, noise.Stream(trained.recipe.seed, 0, batch.slots))
        return target.to(torch.uint8).numpy()
    images = batch.images.numpy()
    grey = ((images != 0) & (images != WHITE)).any(axis=(1, 2, 3)) & batch.mask.numpy()
    if grey.any():
        key = batch.keys[int(grey.argmax())]
        raise UserError(
            f"image {key} has grey values, and a bernoulli run codes black and white; --binarize codes what the run makes of it, and "
            "a run with discretized_logistic_mixture codes grey values"
        )
    return images // WHITE


def _header(
    trained: Trained, codec: Codec, mark: Fingerprint, sets: list[ImageSet], binarize: bool, images: int
) -> dict[str, Any]:
    return {
        "format": "vaescale-images",
        "run": str(trained.folder),
        **{name: value for name, value in trained.identity.items() if name != "recipe_hash"},
        "image_shape": list(codec.image_shape),
        "levels": codec.pixels.levels,
        "binarized": binarize,
        "images": images,
        "latent_bits": codec.latent_bits,
        "class_names": {images.split: list(images.class_names) for images in sets if images.class_names},
        "written_with": versions(),
        "pattern": mark._asdict(),
    }


def _described(mixture: Mixture) -> dict[str, Any]:
    return {
        "components": len(mixture.weights),
        "covariance": mixture.kind,
        "sha256": mixture_files.sha256(mixture),
    }


def _join(out: Path, header: dict[str, Any], every: list[tuple[int, Part]]) -> dict[str, Any]:
    """Write the file from the chunks of all ranks, in the order of the source as far as a chunk is of one rank. Returns its sizes."""
    if not every:
        raise DataError("no image can be used; give a source that has images")
    every = sorted(every, key=lambda one: one[1].order)
    start = pack_header(header)
    sizes, records = Counter[str](header=len(start)), list[Record]()
    with replacing(out) as temporary, temporary.open("wb") as file:
        file.write(start)
        for rank, part in every:
            with out.with_name(f".{out.name}.rank{rank}").open("rb") as source:
                source.seek(part.record.offset)
                records.append(Record(file.tell(), part.record.bytes, part.record.images))
                file.write(source.read(part.record.bytes))
            sizes.update(part.bytes)
        table = pack_table(records, file.tell())
        file.write(table)
    sizes["table"] = len(table)
    images, values = header["images"], header["images"] * int(np.prod(header["image_shape"]))
    size, bits = sum(sizes.values()), sum(part.bits for _, part in every)
    first = sum(part.first_images for _, part in every)
    coded = images - first
    return {
        "out": str(out),
        "images": images,
        "chunks": len(every),
        "bytes": size,
        "bytes_of": {**sizes, "initial_bits": sum(part.initial_bytes for _, part in every)},
        "bits_per_dim": {
            "file": 8 * size / values,
            "without_names": 8 * (size - sizes["names"]) / values,
            "net_code": bits / values * images / coded,
        },
        "net_code_nats": bits * float(np.log(2)) / coded,
        "first_images": first,
    }
