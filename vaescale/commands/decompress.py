"""Decode a file of `compress` to pictures, with their keys and labels."""

import csv
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vaescale import comm
from vaescale.commands import file_mixture
from vaescale.commands.signature import NonNegative, checked
from vaescale.compression.bits_back import Codec, Condition
from vaescale.compression.chunks import decode_chunk
from vaescale.compression.container import Names, Reader
from vaescale.compression.determinism import Fingerprint, refuse_other_arithmetic
from vaescale.compression.pixels import WHITE
from vaescale.errors import DataError, UserError
from vaescale.system import heartbeat
from vaescale.system.console import Progress, say
from vaescale.trained import Trained, open_trained
from vaescale.training import launch


@checked
def decompress(
    file: Path, folder: Path, *, run: Path | None = None, chunks: Sequence[NonNegative] = ()
) -> dict[str, Any]:
    """Decode a file to FOLDER/SPLIT/CLASS/NAME.png, with the keys and labels in FOLDER/labels.csv, and with the vectors of a run that takes
    such in FOLDER/vectors.csv, as make-shards reads it.

    run: the run that the file was made with, by default the relative path in the file. chunks: only these. Images of neither one nor three
    channels are .npy files.

    A damaged chunk is left out and named in the result. Raises UserError where this machine or this run would decode other images, before
    anything is written; DataError for a file that is none.
    """
    with launch.joined(), comm.together(lambda: Reader(file)) as reader:
        header = comm.together(lambda: _Header.of(reader))
        comm.on_main(lambda: _refuse_filled(folder))
        wanted = sorted(set(chunks)) or list(range(len(reader.records)))
        if wanted and max(wanted) >= len(reader.records):
            raise UserError(
                f"--chunk (={max(wanted)}) is not in {file}, which has {len(reader.records)} chunks"
            )
        place = run or _usual_run(header, file)
        trained = open_trained(place, weights=header.weights, which=str(header.step), device="cpu")
        codec = comm.together(lambda: _open_codec(trained, header, file))
        trained.announce(f"decompress {file} with")
        begun = time.monotonic()
        mine = comm.together(lambda: list(_decode(codec, header, reader, folder, wanted)))
        seconds = time.monotonic() - begun
        outcomes = sorted(one for share in comm.gather_object(mine) for one in share)
        comm.on_main(lambda: _join_tables(folder))
        images = sum(number for _, number, _ in outcomes)
        return {
            "file": str(file),
            "run": str(trained.folder),
            "folder": str(folder),
            "images": images,
            "chunks": len(wanted),
            "is_whole": reader.is_whole,
            "damaged": {str(number): fault for number, _, fault in outcomes if fault},
            "images_per_second": images / max(seconds, 1e-9),
        }


def _refuse_filled(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; give a new folder")


class _Header(NamedTuple):
    """What decoding needs of a header."""

    run: str
    step: int
    weights: str
    weights_hash: str
    image_shape: tuple[int, int, int]
    levels: int
    latent_bits: int
    class_names: dict[str, list[str]]
    written_with: str
    mark: Fingerprint
    mixture: str | None
    """The sha256 of the mixture; None: the prior is N(0, I)."""

    @classmethod
    def of(cls, reader: Reader) -> "_Header":
        """The header of an open file. Raises DataError where something is missing or makes no sense."""
        content = reader.header
        try:
            shape, latent_bits = content["image_shape"], content["latent_bits"]
            channels, height, width = (int(size) for size in shape)
            names = {
                str(split): [str(name) for name in of_split]
                for split, of_split in content["class_names"].items()
            }
            mark = Fingerprint(str(content["pattern"]["outputs"]), str(content["pattern"]["words"]))
            header = cls(
                str(content["run"]),
                int(content["step"]),
                str(content["weights"]),
                str(content["weights_hash"]),
                (channels, height, width),
                int(content["levels"]),
                int(latent_bits),
                names,
                str(content["written_with"])[:200],
                mark,
                str(content["mixture"]["sha256"]) if "mixture" in content else None,
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
            raise DataError(
                f"the header of {reader.path} is invalid ({type(error).__name__}: {error})"
            ) from None
        if header.mixture is not None and not re.fullmatch("[0-9a-f]{64}", header.mixture):
            raise DataError(f"the header of {reader.path} has no sha256 of its mixture")
        if header.step < 0 or not (4 <= header.latent_bits <= 16 and header.latent_bits % 2 == 0):
            raise DataError(
                f"the header of {reader.path} has latent_bits {header.latent_bits} and step {header.step}"
            )
        return header


def _usual_run(header: _Header, file: Path) -> Path:
    """The run that a file names, if that is a relative path which stays below the working directory."""
    run = Path(header.run)
    if run.is_absolute() or ".." in run.parts:
        raise UserError(f"{file} was made with a run outside of this folder; give it: --run RUN")
    return run


def _open_codec(trained: Trained, header: _Header, file: Path) -> Codec:
    """The codec of a file. Raises UserError where the run, its weights or this machine's arithmetic are others."""
    if trained.weights_hash != header.weights_hash:
        raise UserError(
            f"{trained.folder} has other weights than {file} was made with (sha256 {trained.weights_hash[:12]}, not "
            f"{header.weights_hash[:12]!r}); give the run with these weights: --run RUN"
        )
    mixture = None if header.mixture is None else file_mixture.find(trained, header.mixture, file)
    codec = Codec(trained.model, latent_bits=header.latent_bits, mixture=mixture)
    if codec.image_shape != header.image_shape or codec.pixels.levels != header.levels:
        raise DataError(f"the header of {file} is of other images than its run")
    refuse_other_arithmetic(codec, header.mark, written_with=header.written_with)
    return codec


def _decode(
    codec: Codec, header: _Header, reader: Reader, folder: Path, wanted: list[int]
) -> Iterator[tuple[int, int, str]]:
    """Decode this rank's chunks. Yields each one's number, its images, and what is wrong with it."""
    mine = wanted[comm.rank() :: comm.world_size()]
    total = sum(reader.records[number].images for number in mine)
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    with (
        (folder / f"labels.{comm.rank()}.csv").open("w", newline="", errors="backslashreplace") as file,
        Progress("decompress", total, unit="images", shown=comm.is_main()) as progress,
    ):
        table = csv.writer(file)

        def show(number: int) -> None:
            nonlocal done
            done += number
            heartbeat.beat("decompressing")
            progress.update(done)

        for number in mine:
            try:
                chunk = reader.chunk(number, codec.image_shape, groups=codec.groups)
                if max(chunk.coding.batches) > codec.batch:
                    raise DataError(
                        f"it has batches of {max(chunk.coding.batches)} images; at most {codec.batch} are coded at once"
                    )
                condition = _condition(codec, chunk.names)
                levels = decode_chunk(codec, chunk.coding, condition=condition, progress=show)
            except UserError as error:
                say(f"chunk {number} of {reader.path} is damaged and left out: {error}")
                yield number, 0, str(error)
                continue
            images = levels * WHITE if header.levels == 2 else levels
            rows = list(_write_images(images, chunk.names, header.class_names, folder))
            table.writerows(rows)
            if chunk.names.vectors is not None:
                _write_vectors([row[0] for row in rows], chunk.names.vectors, folder)
            yield number, len(levels), ""


def _condition(codec: Codec, names: Names) -> Condition:
    """The condition of a chunk's images. Raises DataError where it is no vector that the run takes."""
    if not codec.vector_size:
        return np.array(names.labels)
    if names.vectors is None or names.vectors.shape[1] != codec.vector_size:
        raise DataError(f"it has no vectors of {codec.vector_size} numbers, which its run takes")
    return names.vectors


def _write_vectors(files: list[str], vectors: NDArray[np.float32], folder: Path) -> None:
    """Append the vectors of images to this rank's table. The row of an image without one is nan, which make-shards reads as such."""
    with (folder / f"vectors.{comm.rank()}.csv").open("a", newline="") as file:
        csv.writer(file).writerows(
            [name, *vector.astype(str)] for name, vector in zip(files, vectors, strict=True)
        )


def _write_images(
    images: NDArray[np.uint8], names: Names, class_names: dict[str, list[str]], folder: Path
) -> Iterator[tuple[str, str, int, str, str, int]]:
    """Write images. Yields a row of the table for each: file, key, label, class, split, number in the source."""
    of_split = class_names.get(names.split, [])
    for image, key, label, slot in zip(images, names.keys, names.labels, names.slots, strict=True):
        name = of_split[label] if 0 <= label < len(of_split) else str(label) if label >= 0 else ""
        inside = folder.joinpath(*(file_name(part) for part in (names.split, name) if part))
        inside.mkdir(parents=True, exist_ok=True)
        path = _write_new(inside, file_name(Path(key).name), slot, image)
        yield path.relative_to(folder).as_posix(), key, label, name, names.split, slot


def _write_new(folder: Path, name: str, slot: int, image: NDArray[np.uint8]) -> Path:
    """Write an image [C, H, W] under a name that is not taken."""
    channels = len(image)
    ending = ".png" if channels in (1, 3) else ".npy"
    name = re.sub(r"\.(png|jpe?g|webp|bmp|gif|tiff?|npy)$", "", name, flags=re.IGNORECASE)
    for candidate in (name, f"{name}-{slot}", *(f"{name}-{slot}-{number}" for number in range(1000))):
        path = folder / (candidate + ending)
        try:
            with path.open("xb") as file:
                if ending == ".npy":
                    np.save(file, image, allow_pickle=False)
                else:
                    pixels = image[0] if channels == 1 else image.transpose(1, 2, 0)
                    Image.fromarray(pixels).save(file, format="PNG")
            return path
        except FileExistsError:
            continue
    raise DataError(f"{folder} has a thousand images called {name}")


def file_name(text: str) -> str:
    """A file's name from any text: letters, digits, dots, dashes and underscores, without a dot in front, at most 100 characters."""
    name = re.sub(r"[^\w.-]", "_", text, flags=re.ASCII)[-100:].lstrip(".")
    return name or "_"


def _join_tables(folder: Path) -> None:
    """Join the tables of all ranks to labels.csv and, if there are vectors, vectors.csv."""
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerow(("file", "key", "label", "class", "split", "number"))
        _join_shares([folder / f"labels.{rank}.csv" for rank in range(comm.world_size())], file)
    with_vectors = [folder / f"vectors.{rank}.csv" for rank in range(comm.world_size())]
    with_vectors = [path for path in with_vectors if path.exists()]  # a rank may have had no chunk
    if with_vectors:
        with (folder / "vectors.csv").open("w", newline="") as file:
            _join_shares(with_vectors, file)


def _join_shares(shares: list[Path], file: TextIO) -> None:
    """Append the tables of the ranks, and delete them. Raises DataError where one is missing."""
    for path in shares:
        try:
            with path.open(newline="") as share:
                shutil.copyfileobj(share, file)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}), so the labels of its images are lost; give a folder that all processes share, "
                "and decompress again"
            ) from None
        path.unlink()
