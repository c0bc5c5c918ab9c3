"""Encoder and decoder of a run as graphs without code: `torch.export`ed programs that take any number of images.

    encode   images [N, C, H, W] in [0, 1]  ->  mean, log_sigma of q(z|x), [N, *latent_shape]; of a ladder [N, Z]
    decode   z like the mean                ->  mean E[x|z] [N, C, H, W] and, where the likelihood has one, its sigma of that shape

A run of another depth than 8 bits: images are stored values of its type, and mean and sigma of `decode` are in their units. Of a
conditional run, both take y: int64 [N], the class of each image, -1 for none where classes were hidden in training; or float32 [N, V], its
vector, NaN for none.

Of a ladder, z holds the latents of all groups: the posterior of each group is given the means of the groups above, and decoding such
means draws nothing. Graphs hold no source of `vaescale.noise`, so that targets with noise are encoded at the mean of their noise.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from vaescale.conditions.config import ClassCondition, ConditionConfig, VectorCondition
from vaescale.config import DECODED_MEAN, Window
from vaescale.errors import UserError
from vaescale.models.units import to_stored, to_unit
from vaescale.models.vae import VAE
from vaescale.runs import class_table
from vaescale.system.files import strict_json, write_whole
from vaescale.trained import Trained, refuse_codes

DESCRIPTION = "vaescale.json"
LARGEST_DIFFERENCE = 1e-4  # of a graph's values from the model's
KEEP = "export --format mlflow keeps the model as it is"
TRACED, CHECKED = 2, (1, 5)  # numbers of images


class Graph(NamedTuple):
    """A module, an example of its input [TRACED, ...], the names of input and outputs, and the window of the images. condition:
    of a conditional model, whose second input is y.
    """

    module: nn.Module
    example: Tensor
    takes: str
    gives: tuple[str, ...]
    window: Window = Window()
    condition: ConditionConfig | None = None

    def inputs(self, example: Tensor) -> dict[str, Tensor]:
        """The inputs by name, with y from the first class on, or with vectors of all kinds."""
        if isinstance(self.condition, ClassCondition):
            return {self.takes: example, "y": torch.arange(len(example)) % self.condition.classes}
        if isinstance(self.condition, VectorCondition):
            values = torch.arange(len(example) * self.condition.size).remainder(7) / 7
            return {self.takes: example, "y": values.view(len(example), -1)}
        return {self.takes: example}


class Encode(nn.Module):
    """From images to the moments of q(z|x)."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model, self.is_flat = model, len(model.group_sizes) == 1

    def forward(self, images: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map images [N, C, H, W] in [0, 1], or stored values of another depth, and classes or vectors y, to mean and log sigma."""
        if self.model.window != Window():
            images = to_unit(images, self.model.window)
        x, model = self.model.likelihood.expected_target(images), self.model.given(y)
        mu, log_sigma = model.posterior(x) if self.is_flat else model.joint_posterior(x)
        # Outputs of their own: two names for one tensor, or for a constant, are no graph of ONNX.
        return mu.float().clone(), log_sigma.float().expand_as(mu).clone()


class Decode(nn.Module):
    """From latents to the moments of p(x|z)."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """Map z, and classes or vectors y, to the mean and, where there is one, the standard deviation, [N, C, H, W] each."""
        params = self.model.given(y).decode(z.flatten(1), None)  # type: ignore[arg-type]  # nothing is drawn
        mean, sigma = self.model.likelihood.mean(params).float(), self.model.likelihood.deviation(params)
        window = self.model.window
        if window != Window():
            mean = window.low + (window.high - window.low) * mean
            sigma = None if sigma is None else (window.high - window.low) * sigma
        return (mean.clone(),) if sigma is None else (mean.clone(), sigma.float().expand_as(mean).clone())


def graphs_of(trained: Trained) -> dict[str, Graph]:
    """`encode` and `decode` of a run, on the CPU."""
    refuse_codes(
        trained, "this format", "export --format mlflow takes every kind, and the prior of fit-prior with it"
    )
    config = trained.model.likelihood.config
    if DECODED_MEAN not in config.offers():
        raise UserError(
            f"this format needs a decoded mean, and likelihood.kind {config.kind!r} goes from pixel to pixel; export "
            "--format mlflow takes every kind"
        )
    model = copy.deepcopy(trained.model).cpu().float().eval()
    if hasattr(model.network, "checkpointing"):
        model.network.checkpointing = False  # of use in a backward pass only
    latents = model.latent_shape if len(model.group_sizes) == 1 else (sum(model.group_sizes),)
    generator = torch.Generator().manual_seed(0)
    images = _random_images(model.image_shape, TRACED, model.window, generator)
    z = torch.randn(TRACED, *latents, generator=generator)
    decode = Graph(Decode(model), z, "z", (), model.window, model.condition)
    with torch.no_grad():
        moments = len(decode.module(**decode.inputs(z)))
    return {
        "encode": Graph(
            Encode(model), images, "images", ("mean", "log_sigma"), model.window, model.condition
        ),
        "decode": decode._replace(gives=("mean", "sigma")[:moments]),
    }


def program_of(graph: Graph) -> ExportedProgram:
    """The graph of a module for any number of images, without its example and without the paths of its source files."""
    from torch import export  # imported here because it takes a second

    with torch.no_grad(), answered(f"torch.export cannot trace the graph from {graph.takes}", KEEP):
        inputs, batch = graph.inputs(graph.example), export.Dim("batch")
        shapes = tuple({0: batch} for _ in inputs)
        program = export.export(graph.module, (*inputs.values(),), dynamic_shapes=shapes, strict=False)
    program.example_inputs = None  # torch.export.save would pickle it
    for module in program.graph_module.modules():  # a region with another autocast is a graph of its own
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _random_images(shape: tuple[int, ...], number: int, window: Window, generator: torch.Generator) -> Tensor:
    """Images as a graph takes them: in [0, 1], or stored values of another depth."""
    x = torch.rand(number, *shape, generator=generator)
    return x if window == Window() else to_stored(x, window)


@contextmanager
def answered(failure: str, remedy: str) -> Iterator[None]:
    """Raise UserError with a failure, its innermost cause and a remedy for whatever an exporter raises: each step has its own types."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next(
            (line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__
        )
        raise UserError(f"{failure}: {reason.rstrip('.')}; {remedy}") from error


@torch.no_grad()
def largest_difference(graph: Graph, values: Any) -> float:
    """The largest difference of what a graph computes from what its module does, for one and for several images.

    values: a function from the inputs by name to the outputs. Raises UserError for more than LARGEST_DIFFERENCE.
    """
    generator = torch.Generator().manual_seed(1)
    window, largest = graph.window, 0.0
    # Images of another depth come out of `decode` in stored units, of which the window has many.
    unit = window.high - window.low if graph.takes == "z" and window != Window() else 1.0
    for number in CHECKED:
        if graph.takes == "images":
            x = _random_images(graph.example.shape[1:], number, window, generator)
        else:
            x = torch.randn(number, *graph.example.shape[1:], generator=generator)
        inputs = graph.inputs(x)
        for name, own, other in zip(graph.gives, graph.module(**inputs), values(inputs), strict=True):
            difference = float((own - other).abs().max()) / unit if own.shape == other.shape else torch.inf
            largest = max(largest, difference)
            if not difference <= LARGEST_DIFFERENCE:
                raise UserError(
                    f"the graph's {name} differs by {difference:.2g} from the model's, more than {LARGEST_DIFFERENCE:g}; {KEEP}"
                )
    return largest


def describe(
    trained: Trained,
    out: Path,
    *,
    graphs: dict[str, Graph],
    files: dict[str, str],
    differences: dict[str, float],
) -> dict[str, Any]:
    """Write vaescale.json beside the graphs: the recipe, hashes, and what each input and output means. Returns what is shown."""
    model = trained.model
    sigma, eight = model.likelihood.sigma, model.window == Window()
    scale = "the scale of [0, 1]" if eight else "the units of the stored values"
    meanings = {
        "images": ("float32 in [0, 1]" if eight else f"stored values, {model.window.text()}")
        + _of_noise(model),
        **({"y": _of_condition(trained)} if model.condition else {}),
        "log_sigma": "natural logarithm of the standard deviation of q(z|x)",
        "z": "latents: the encoder's mean, a draw mean + exp(log_sigma) * normal noise, or for new images a draw of the prior"
        + ("" if len(model.group_sizes) == 1 else ", whose groups below the first depend on those above"),
        "sigma": f"standard deviation of p(x|z) for each value, in {scale}",
    }
    described = {
        name: {
            "file": files[name],
            "input": {taken: ["N", *value.shape[1:]] for taken, value in graph.inputs(graph.example).items()},
            "outputs": {
                output: ["N", *value.shape[1:]]
                for output, value in zip(
                    graph.gives, graph.module(**graph.inputs(graph.example)), strict=True
                )
            },
            "mean": "the mean of q(z|x)" if name == "encode" else f"E[x|z], in {scale}",
        }
        for name, graph in graphs.items()
    }
    content = {
        "format": "vaescale-graphs",
        "version": 1,
        "run": trained.recipe.name,
        **trained.identity,
        "recipe": trained.recipe.public(),
        "graphs": described,
        "meanings": meanings,
        "group_sizes": list(model.group_sizes),
        "sigma": None if sigma is None else float(sigma),
        "largest_differences": differences,
        "torch": torch.__version__,
    }
    write_whole(out / DESCRIPTION, strict_json(content, indent=2).encode())
    return {name: content[name] for name in ("run", "step", "weights", "sigma", "largest_differences")}


def _of_condition(trained: Trained) -> str:
    condition = trained.model.condition
    if isinstance(condition, VectorCondition):
        none = "; NaN: none" if condition.dropout else ""
        return (
            f"float32, the {condition.size} values of each image's {condition.member}, not standardized{none}"
        )
    assert isinstance(condition, ClassCondition)
    names = class_table.read(trained.folder, condition.classes).names
    none = "; -1: none" if condition.dropout else ""
    return (
        f"int64, the class of each image from 0 to {condition.classes - 1}: {', '.join(names[:1000])}{none}"
    )


def _of_noise(model: VAE) -> str:
    config = model.likelihood.config
    if getattr(config, "dequantize", False):
        levels = model.likelihood.levels or 0
        return (
            f"; the graph adds the mean of the uniform noise of training, ({levels - 1} x + 1/2) / {levels}"
        )
    if binarize := getattr(config, "binarize", None):
        threshold = "; the graph sets values above 1/2 to 1 and others to 0"
        return (
            threshold
            if binarize == "threshold"
            else "; in training binarized by a draw, which the graph does not do"
        )
    return ""
