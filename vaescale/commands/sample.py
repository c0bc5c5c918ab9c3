"""Sample from a trained run: pictures of many samples, WebDataset shards, or pictures at chosen latents.

Sample number i does not depend on the number of samples or of processes; each process makes its share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from vaescale import comm, figures, noise
from vaescale.aggregate import code_prior
from vaescale.aggregate.class_choice import ClassChoice
from vaescale.aggregate.sampling import (
    Decoding,
    Prior,
    from_latents,
    image_of,
    parse_decoding,
    refuse_misfit,
)
from vaescale.aggregate.second_stage import SecondStage
from vaescale.aggregate.vector_choice import VectorChoice
from vaescale.commands.chosen_latents import draw_between, draw_classes, map_latents, refine_samples
from vaescale.commands.chosen_latents import interpolate as draw_lines
from vaescale.commands.chosen_vectors import vector_choice
from vaescale.commands.futures import FUTURES, draw_futures, refuse_for_futures
from vaescale.commands.second_stage import open_second_stage
from vaescale.commands.signature import Count, NonNegative, PositiveReal, Temperature, checked
from vaescale.conditions.config import VectorCondition
from vaescale.conditions.embedding import NONE
from vaescale.data.making.indexing import Made
from vaescale.data.making.items import Item, members_of
from vaescale.data.making.storing import Making
from vaescale.data.making.writing import write_index, write_part
from vaescale.errors import UserError
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.by_class import FOLDER, load_by_class
from vaescale.mixtures.gaussian import Mixture
from vaescale.models.sequence_model import SequenceModel
from vaescale.models.units import to_stored
from vaescale.runs import class_table
from vaescale.runs import folder as run_folder
from vaescale.runs.tracking import push
from vaescale.system.console import Progress, say
from vaescale.trained import Trained, Which, number_of_classes, open_trained, refuse_codes, refuse_condition
from vaescale.training import launch as backends
from vaescale.training.summary import went_wrong

COUNT, TEMPERATURE, REFINE_RATE = 64, 1.0, 0.02  # defaults
SHOWN = 256  # samples of each kind in a picture
MOST_SHOWN = 100 * SHOWN
SHARD_SAMPLES, BATCH = 1000, 250
OF_SAMPLES = ("prior", "components", "decode", "temperature", "count")
UNUSED = {
    "map": OF_SAMPLES,
    "interpolate": (*OF_SAMPLES, "class", "vector"),
    "refine": ("decode", "class", "vector"),
    "between": (*OF_SAMPLES, "class"),
}


@dataclass(frozen=True)
class Draws:
    """The number of samples, the factor of the standard deviations, and the seed."""

    count: int
    temperature: float
    seed: int


@checked
def sample(
    run: Path,
    *,
    prior: Literal["standard", "gmm", "autoregressive"] | Path | None = None,
    components: Count | None = None,
    decode: str | None = None,
    temperature: Temperature | None = None,
    count: Count | None = None,
    seed: NonNegative = 0,
    shards: Path | None = None,
    interpolate: Annotated[Sequence[tuple[NonNegative, NonNegative]], Field(min_length=1)] | None = None,
    refine: Annotated[int, Field(ge=1, le=100_000)] | None = None,
    refine_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None,
    refine_rate: PositiveReal | None = None,
    map_side: Annotated[int, Field(ge=2, le=64)] | None = None,
    class_name: str | None = None,
    vector: Any = None,
    between: Annotated[Sequence[tuple[str, str]], Field(min_length=1)] | None = None,
    checkpoint: Which = "last",
) -> dict[str, Any]:
    """Write pictures to RUN/figures, or samples to the folder `shards`. Returns a description of the samples, the paths, and
    notes: sentences on what went wrong in training.

    prior: `standard` (the model's prior), `gmm` (the mixture), `autoregressive` (over codes, see fit-prior), or the folder of a run that
    was trained on this run's latents; by default all that the run has. components: number of components, to use a
    mixture that fit-gmm compared instead of the chosen one. decode: mean, ancestral or offset:ALPHA, by default mean and
    ancestral. These arguments replace the samples by other pictures: interpolate, pairs of numbers of held-out images;
    refine, number of steps of descent on log sigma(z), with refine_weight of -log p(z) and refine_rate; map_side, the side of
    a grid over the plane of two latents. Raises UserError for options that contradict each other. checkpoint: see `Which`.

    class_name: of a conditional run, or of one with mixtures of classes (fit-gmm --per-class): a name, a number or `none`; by default
    samples have classes by their frequencies, and a further picture has a row for each class. between: pairs of classes, for pictures of
    the way from one to the other at fixed z. vector: of a run that is given vectors: `none`, numbers such as "1,0,0.5", an array [V] or
    [M, V] or a .npy file of one, of which sample i takes row i modulo M; by default the vectors of the held-out images. `between` has numbers
    of these rows. Of a run of sequences, count is the number of futures of each context (see `futures.py`), and
    the other arguments but seed do not apply.
    """
    given: dict[str, Any] = {
        "shards": shards,
        "interpolate": interpolate,
        "refine": refine,
        "map": map_side,
        "between": between,
    }
    given |= {
        "prior": prior,
        "components": components,
        "decode": decode,
        "temperature": temperature,
        "count": count,
        "class": class_name,
        "vector": vector,
    }
    given |= {"refine-weight": refine_weight, "refine-rate": refine_rate}
    draws = Draws(
        COUNT if count is None else count, TEMPERATURE if temperature is None else temperature, seed
    )
    _refuse_contradictions({name: value for name, value in given.items() if value is not None}, draws)
    with backends.joined():
        trained = open_trained(run, which=checkpoint, of_sequences=True)
        trained.announce("sample")
        if isinstance(trained.model, SequenceModel):
            refuse_for_futures([name for name, value in given.items() if value is not None])
            result = comm.on_main(lambda: draw_futures(trained, number=count or FUTURES, seed=seed))
            return {"run": str(trained.folder), "step": trained.step, "weights": trained.weights, **result}
        pictures = {name for name in ("interpolate", "refine") if given[name] is not None}
        _refuse_of_codes(trained, pictures, draws, prior)
        choice = comm.on_main(lambda: choice_of(trained, class_name, vector))
        if between:
            result = comm.on_main(lambda: draw_between(trained, between, choice, seed=seed))
        elif map_side is not None:
            result = comm.on_main(lambda: map_latents(trained, choice, map_side, seed=seed))
        elif interpolate:
            result = comm.on_main(lambda: draw_lines(trained, interpolate, seed=seed))
        elif refine is not None:
            refuse_condition(trained, "--refine", "leave it out")
            result = comm.on_main(
                lambda: refine_samples(
                    trained,
                    None if prior == "standard" else _mixture(trained, components, needed=prior == "gmm"),
                    steps=refine,
                    rate=REFINE_RATE if refine_rate is None else refine_rate,
                    weight=refine_weight or 0.0,
                    **asdict(draws),
                )
            )
        else:
            result = _samples(trained, prior, components, decode, shards, draws=draws, choice=choice)
        rows = comm.on_main(lambda: run_folder.read_metrics(trained.folder))
    of_run = {"run": str(trained.folder), "step": trained.step, "weights": trained.weights}
    return {**of_run, **result, "notes": went_wrong(rows, trained.recipe.likelihood)}


def choice_of(trained: Trained, word: str | None, vector: Any = None) -> ClassChoice | VectorChoice | None:
    """The classes of samples that `--class WORD` asks for, or their vectors; None for a run that knows neither. Raises UserError."""
    condition = trained.model.condition
    if isinstance(condition, VectorCondition):
        if word is not None:
            raise UserError(
                f"--class {word} has no meaning: {trained.folder} is given {condition.words}; give --vector"
            )
        return vector_choice(trained, vector)
    if vector is not None:
        raise UserError(
            f"--vector has no meaning: {trained.folder} is given no vectors (condition.kind=vector); leave it out"
        )
    by_class = trained.folder / "gmm" / FOLDER
    if condition is None and not by_class.is_dir():
        if word is not None:
            raise UserError(
                f"--class {word} needs a conditional run, or mixtures of classes, and {trained.folder} has neither; train with the "
                "section condition, or run `vaescale fit-gmm RUN --per-class`"
            )
        return None
    table = class_table.read(trained.folder, number_of_classes(trained))
    if word != "none":
        return ClassChoice(table, None if word is None else table.number_of(word))
    if condition is None or not condition.dropout:
        raise UserError(
            f"--class none needs a run whose classes were hidden at times, and condition.dropout of {trained.folder} is 0; give a class"
        )
    return ClassChoice(table, NONE)


def draw_pages(
    trained: Trained,
    sources: Mapping[str, Prior],
    decodings: Sequence[Decoding],
    *,
    draws: Draws,
    choice: ClassChoice | VectorChoice | None = None,
) -> list[str]:
    """Draw RUN/figures/samples.png, and samples-002.png and so on for more samples than a picture shows.

    sources: distributions of z by name; choice: the samples' classes. All ranks call it. Returns the paths.
    """
    device = next(trained.model.parameters()).device
    folder, starts = trained.folder / "figures", range(0, draws.count, SHOWN)
    paths = [
        folder / f"samples{f'-{page:03d}' if page > 1 else ''}.png" for page in range(1, len(starts) + 1)
    ]

    def draw_share() -> None:
        share = range(comm.rank(), len(starts), comm.world_size())
        with Progress(
            "sample", len(share), unit="pictures", shown=comm.is_main() and len(share) > 1
        ) as progress:
            for done, page in enumerate(share, start=1):
                slots = torch.arange(starts[page], min(starts[page] + SHOWN, draws.count), device=device)
                numbers = "" if len(starts) == 1 else f" {slots[0]} to {slots[-1]}"
                stream = noise.Stream(draws.seed, 0, slots)
                panels = _panels(trained, sources, decodings, stream, draws, choice)
                what = f"samples{numbers}{f', {choice.text}' if choice else ''}"
                view = trained.recipe.view
                figures.sample_panels(paths[page], panels, title=trained.title(what), view=view)
                progress.update(done)

    def delete_earlier() -> None:
        for path in folder.glob("samples-[0-9]*.png"):
            path.unlink()

    comm.on_main(delete_earlier)
    comm.together(draw_share)
    comm.on_main(lambda: push(trained.folder, trained.recipe.tracking))
    return [str(path) for path in paths]


def write_shards(
    trained: Trained,
    prior: Prior,
    decoding: Decoding,
    folder: Path,
    origin: dict[str, Any],
    *,
    draws: Draws,
    choice: ClassChoice | VectorChoice | None = None,
) -> dict[str, Any]:
    """Write samples as shards to an empty or missing folder. All ranks call it.

    origin: the description of the samples for the index. The bytes of a shard do not depend on the
    number of processes.
    """
    starts = range(0, draws.count, SHARD_SAMPLES)
    share = range(comm.rank(), len(starts), comm.world_size())

    def write_share() -> dict[int, Made]:
        written = {}
        with Progress("sample", len(share), unit="shards", shown=comm.is_main()) as progress:
            for number in share:
                stop = min(draws.count, starts[number] + SHARD_SAMPLES)
                items = _items(trained, prior, decoding, range(starts[number], stop), draws, choice)
                written[number] = write_part(items, folder, number, Making(dtype=trained.model.window.dtype))
                progress.update(len(written))
        return written

    comm.on_main(lambda: _refuse_full(folder))
    by_number: dict[int, Made] = {}
    for written in comm.gather_object(comm.together(write_share)):
        by_number |= written
    ordered = [by_number[number] for number in sorted(by_number)]
    if (dtype := trained.model.window.dtype) != "uint8":
        origin = {**origin, "dtype": dtype}
    data_hash = comm.on_main(lambda: write_index(folder, ordered, origin).data_hash)
    return {"shards": str(folder), "samples": draws.count, "data_hash": data_hash}


def _samples(
    trained: Trained,
    prior: str | Path | None,
    components: int | None,
    decode: str | None,
    shards: Path | None,
    *,
    draws: Draws,
    choice: ClassChoice | VectorChoice | None,
) -> dict[str, Any]:
    decodings = [parse_decoding(name) for name in ([decode] if decode else ["mean", "ancestral"])]
    sources = sources_of(trained, prior, components)
    drawn = {
        "priors": list(sources),
        "components": [len(source.weights) for source in sources.values() if isinstance(source, Mixture)],
        "temperature": draws.temperature,
        "count": draws.count,
        "seed": draws.seed,
        **_chosen(choice),
    }
    if shards is None:
        paths = draw_pages(trained, sources, decodings, draws=draws, choice=choice)
        if isinstance(choice, ClassChoice) and choice.chosen is None:
            paths += comm.on_main(
                lambda: draw_classes(trained, sources, choice, temperature=draws.temperature, seed=draws.seed)
            )
        return {**drawn, "decode": [decoding.text for decoding in decodings], "figures": paths}
    if len(sources) * len(decodings) != 1:
        raise UserError("--shards writes one kind of samples; give --prior and --decode")
    ((name, source),) = sources.items()
    origin = {
        "source": f"samples of {trained.recipe.name}",
        "step": trained.step,
        "prior": name,
        "components": len(source.weights) if isinstance(source, Mixture) else 0,
        **({"second_stage": source.identity} if isinstance(source, SecondStage) else {}),
        "decode": decode,
        "temperature": draws.temperature,
        "seed": draws.seed,
        **_chosen(choice),
    }
    index = write_shards(trained, source, decodings[0], shards, origin, draws=draws, choice=choice)
    return {**drawn, "decode": decode, **index}


def _chosen(choice: ClassChoice | VectorChoice | None) -> dict[str, str]:
    """The samples' classes or vectors in words."""
    if choice is None:
        return {}
    return {"class" if isinstance(choice, ClassChoice) else "vector": choice.text}


def sources_of(trained: Trained, prior: str | Path | None, components: int | None) -> dict[str, Prior]:
    """The distributions of z by name. Prints a message when the run has no mixture."""
    if isinstance(prior, Path):
        return {"second stage": open_second_stage(prior, trained)}
    if trained.model.num_codes:
        return _sources_of_codes(trained, prior)
    if prior == "autoregressive":
        raise UserError(
            f"--prior autoregressive is over codes, and {trained.folder} has a Gaussian q(z|x); take --prior standard or gmm"
        )
    sources: dict[str, Prior] = {} if prior == "gmm" else {"prior": None}
    by_class = trained.folder / "gmm" / FOLDER
    if prior != "standard" and components is None and by_class.is_dir():
        classes = len(class_table.read(trained.folder, None).names)
        mixtures = load_by_class(by_class.parent, classes, **trained.identity)
        refuse_misfit(mixtures, trained.model, trained.folder)
        return {**sources, "mixtures of the classes": mixtures}
    if prior != "standard":
        mixture = _mixture(trained, components, needed=prior == "gmm")
        if mixture is not None:
            sources["mixture"] = mixture
        elif comm.is_main() and not isinstance(trained.model.condition, VectorCondition):
            how = " --per-class" if trained.model.condition else ""
            say(
                f"no mixture in {trained.folder}; run `vaescale fit-gmm {trained.folder}{how}` to add its samples"
            )
    return sources


def _sources_of_codes(trained: Trained, prior: str | None) -> dict[str, Prior]:
    """The distributions of codes by name: uniform, and the autoregressive prior, if the run has one or is asked for it."""
    if prior == "gmm":
        refuse_codes(trained, "--prior gmm", "take --prior standard or autoregressive")
    sources: dict[str, Prior] = {} if prior == "autoregressive" else {"uniform codes": None}
    found = None
    if prior == "autoregressive":
        found = code_prior.load(trained.folder, trained.model, trained.identity)
    elif prior is None:
        found = code_prior.of_weights(trained.folder, trained.model, trained.identity)
        if found is None and comm.is_main():
            say(f"run `vaescale fit-prior {trained.folder}` to add samples of a prior over codes")
    return sources if found is None else {**sources, "autoregressive prior": found}


def _mixture(trained: Trained, components: int | None, *, needed: bool) -> Mixture | None:
    """The chosen mixture of a run, or the compared one with `components`; None when it is missing and not needed."""
    folder = trained.folder / "gmm"
    expected: dict[str, Any] = trained.identity
    if components is not None:
        others = mixture_files.compared(folder)
        if others and components not in others:
            raise UserError(
                f"there is no mixture of {components} components; choose from {', '.join(map(str, others))}"
            )
        expected = {**expected, "components": components}
        folder = folder / f"components-{components}" if others else folder
    if not needed and components is None and not folder.is_dir():
        return None
    mixture = mixture_files.load(folder, **expected)
    refuse_misfit(mixture, trained.model, trained.folder)
    return mixture


def _panels(
    trained: Trained,
    sources: Mapping[str, Prior],
    decodings: Sequence[Decoding],
    stream: noise.Stream,
    draws: Draws,
    choice: ClassChoice | VectorChoice | None,
) -> list[tuple[str, Any]]:
    """A panel of images and its title for each source and decoding."""
    temperature = "" if draws.temperature == 1 else f" at temperature {draws.temperature:g}"
    panels = []
    for name, prior in sources.items():
        source = f"mixture of {len(prior.weights)}" if isinstance(prior, Mixture) else name
        params = from_latents(trained.model, prior, stream, draws.temperature, choice=choice)
        for decoding in decodings:
            names = {"mean": "decoder mean", "offset": f"mean + {decoding.alpha:g} sigma"}
            images = image_of(trained.model.likelihood, params, decoding, stream)
            title = f"{source}{temperature}, {names.get(decoding.name, decoding.name)}"
            panels.append((title, images.cpu().numpy()))
    return panels


def _items(
    trained: Trained,
    prior: Prior,
    decoding: Decoding,
    numbers: range,
    draws: Draws,
    choice: ClassChoice | VectorChoice | None,
) -> list[Item]:
    """The samples with these numbers, rounded to stored values, as items of a shard, with their classes or vectors if they have any."""
    items = []
    device = next(trained.model.parameters()).device
    for slots in torch.split(torch.arange(numbers.start, numbers.stop, device=device), BATCH):
        stream = noise.Stream(draws.seed, 0, slots)
        params = from_latents(trained.model, prior, stream, draws.temperature, choice=choice)
        labels = choice.of(stream).tolist() if isinstance(choice, ClassChoice) else [-1] * len(slots)
        vectors = choice.of(stream).cpu().numpy() if isinstance(choice, VectorChoice) else None
        images = image_of(trained.model.likelihood, params, decoding, stream)
        levels = to_stored(images, trained.model.window).permute(0, 2, 3, 1).cpu().contiguous().numpy()
        items += [
            Item(f"{slot:09d}", level, label, members_of(vectors, row))
            for row, (slot, level, label) in enumerate(zip(slots.tolist(), levels, labels, strict=True))
        ]
    return items


def _refuse_contradictions(given: Mapping[str, Any], draws: Draws) -> None:
    """Raise UserError for options that contradict each other. given: options by name on the command line, None if absent."""
    kinds = [name for name in ("shards", "interpolate", "refine", "map", "between") if name in given]
    if len(kinds) > 1:
        raise UserError(f"--{kinds[0]} and --{kinds[1]} exclude each other; give one of them")
    for name in UNUSED.get(kinds[0], ()) if kinds else ():
        if name in given:
            raise UserError(f"--{name} does not apply with --{kinds[0]}; leave it out")
    for name in ("refine-weight", "refine-rate"):
        if name in given and "refine" not in given:
            raise UserError(f"--{name} applies only to --refine; give --refine too")
    if given.get("prior", "gmm") != "gmm" and "components" in given:
        raise UserError(
            f"--components chooses a mixture, which --prior {given['prior']} does not use; leave one out"
        )
    if isinstance(given.get("prior"), Path) and "refine" in given:
        raise UserError(
            f"--refine needs a density of z, which --prior {given['prior']} has not; give --prior standard or gmm"
        )
    if "shards" not in given and draws.count > MOST_SHOWN:
        raise UserError(
            f"--count (={draws.count}) is too many for pictures, at most {MOST_SHOWN}; give --shards OUT"
        )
    if "refine" in given and draws.count > SHOWN:
        raise UserError(f"--count (={draws.count}) must be at most {SHOWN} with --refine")


def _refuse_of_codes(trained: Trained, pictures: set[str], draws: Draws, prior: str | Path | None) -> None:
    """Raise UserError for what a run with codes in place of Gaussian latents does not have."""
    for name in pictures:
        refuse_codes(trained, f"--{name}", "leave it out")
    if trained.model.num_codes and draws.temperature != 1 and prior != "autoregressive":
        raise UserError(
            f"--temperature (={draws.temperature:g}) has no meaning for uniform codes; give --prior autoregressive too, or leave it out"
        )


def _refuse_full(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; delete it or choose another folder for --shards")
