"""What `vaescale sample` makes of samples: pictures with many of them, or WebDataset shards; each process makes its share.

Sample number i is the same whatever the count is, and on any number of processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vaescale import comm, figures, noise
from vaescale.aggregate.sampling import Decoding, from_latents, image_of
from vaescale.data.making.items import Item
from vaescale.data.making.writing import Making, write_index, write_part
from vaescale.errors import UserError
from vaescale.mixtures.gaussian import Mixture
from vaescale.runs.tracking import push
from vaescale.system.console import Progress
from vaescale.trained import Trained

SHOWN = 256  # samples of each kind in a picture
SHARD_SAMPLES, BATCH = 1000, 250


@dataclass(frozen=True)
class Draws:
    """How many, at which temperature, of which seed."""

    count: int
    temperature: float
    seed: int


def draw_pages(
    trained: Trained, sources: Mapping[str, Mixture | None], decodings: Sequence[Decoding], *, draws: Draws
) -> list[str]:
    """RUN/figures/samples.png, and samples-002.png and so on for more than a picture takes. sources: None is the model's prior."""
    device = next(trained.model.parameters()).device
    at = "" if draws.temperature == 1 else f" at temperature {draws.temperature:g}"
    folder, starts = trained.folder / "figures", range(0, draws.count, SHOWN)
    paths = [
        folder / (f"samples-{page:03d}.png" if page > 1 else "samples.png")
        for page in range(1, len(starts) + 1)
    ]

    def draw(page: int) -> None:
        slots = torch.arange(starts[page], min(starts[page] + SHOWN, draws.count), device=device)
        stream = noise.Stream(draws.seed, 0, slots)
        panels = []
        for name, mixture in sources.items():
            params = from_latents(trained.model, mixture, stream, draws.temperature)
            for decoding in decodings:
                words = {"mean": "decoder mean", "offset": f"mean + {decoding.alpha:g} sigma"}
                images = image_of(trained.model.likelihood, params, decoding, stream)
                of = name if mixture is None else f"mixture of {len(mixture.weights)}"
                panels.append((f"{of}{at}, {words.get(decoding.name, decoding.name)}", images.cpu().numpy()))
        which = "" if len(starts) == 1 else f" {slots[0]} to {slots[-1]}"
        figures.sample_panels(paths[page], panels, title=trained.title(f"samples{which}"))

    def draw_own() -> None:
        own = range(comm.rank(), len(starts), comm.world_size())
        with Progress("sample", len(own), shown=comm.is_main() and len(own) > 1) as progress:
            for done, page in enumerate(own, start=1):
                draw(page)
                progress.update(done, "pictures")

    def forget_earlier() -> None:
        for old in folder.glob("samples-[0-9]*.png"):
            old.unlink()

    comm.on_main(forget_earlier)
    comm.together(draw_own)
    comm.on_main(lambda: push(trained.folder, trained.recipe.tracking))
    return [str(path) for path in paths]


def write_shards(
    trained: Trained,
    mixture: Mixture | None,
    decoding: Decoding,
    folder: Path,
    made: dict[str, Any],
    *,
    draws: Draws,
) -> dict[str, Any]:
    """To a folder that is empty or not there. A shard's bytes do not depend on the number of processes. made: words for the index."""
    starts = range(0, draws.count, SHARD_SAMPLES)
    own = range(comm.rank(), len(starts), comm.world_size())
    device = next(trained.model.parameters()).device

    def shard(number: int) -> Any:
        items = []
        stop = min(draws.count, starts[number] + SHARD_SAMPLES)
        for slots in torch.split(torch.arange(starts[number], stop, device=device), BATCH):
            stream = noise.Stream(draws.seed, 0, slots)
            params = from_latents(trained.model, mixture, stream, draws.temperature)
            images = image_of(trained.model.likelihood, params, decoding, stream)
            levels = (255 * images.float().clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            items += [
                Item(f"{slot:09d}", level, -1) for slot, level in zip(slots.tolist(), levels, strict=True)
            ]
        return write_part(items, folder, number, Making())

    def write() -> dict[int, Any]:
        done = {}
        with Progress("sample", len(own), shown=comm.is_main()) as progress:
            for number in own:
                done[number] = shard(number)
                progress.update(len(done), "shards")
        return done

    comm.on_main(lambda: _refuse_full(folder))
    everything: dict[int, Any] = {}
    for part in comm.gather_object(comm.together(write)):
        everything |= part
    ordered = [everything[number] for number in sorted(everything)]
    written = comm.on_main(lambda: write_index(folder, ordered, made).data_hash)
    return {"shards": str(folder), "samples": draws.count, "data_hash": written}


def _refuse_full(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; delete it or choose another folder for --shards")
