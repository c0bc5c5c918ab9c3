"""Write a run's encoder and decoder as `encode.onnx` and `decode.onnx`, for ONNX Runtime and what else reads ONNX."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaescale.commands.graphs import Graph, answered, describe, graphs_of, largest_difference, program_of
from vaescale.system.files import write_whole
from vaescale.trained import Trained

REMEDY = "export --format torch_export writes the same graph, and --format mlflow keeps the model as it is"


def export_onnx(trained: Trained, out: Path) -> dict[str, Any]:
    """Write both graphs and vaescale.json to OUT, once ONNX Runtime computes from them what the model does. Returns what is shown.

    Needs the packages onnx, onnxscript and onnxruntime.
    """
    import onnx  # noqa: F401  # in the order in which they are asked for
    import onnxruntime
    import onnxscript  # noqa: F401

    graphs = graphs_of(trained)
    contents = {name: model_of(graph) for name, graph in graphs.items()}
    differences = {}
    for name, graph in graphs.items():
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        with answered(f"ONNX Runtime does not open the graph of {name}", REMEDY):
            session = onnxruntime.InferenceSession(
                contents[name], options, providers=["CPUExecutionProvider"]
            )

        def values(inputs: dict[str, Tensor], session: Any = session, graph: Graph = graph) -> list[Tensor]:
            arrays = {name: value.numpy() for name, value in inputs.items()}
            return [torch.from_numpy(value) for value in session.run(list(graph.gives), arrays)]

        differences[name] = largest_difference(graph, values)
    out.mkdir(parents=True)
    files = {name: f"{name}.onnx" for name in contents}
    for name, content in contents.items():
        write_whole(out / files[name], content)
    return describe(trained, out, graphs=graphs, files=files, differences=differences)


def model_of(graph: Graph) -> bytes:
    """The model in ONNX's format, without the exporter's notes on source files. Raises UserError for what ONNX cannot say."""
    program = program_of(graph)
    with answered(f"torch's ONNX exporter cannot write the graph from {graph.takes}", REMEDY), _quiet():
        written = torch.onnx.export(
            program,
            args=(),
            kwargs=graph.inputs(graph.example),
            dynamo=True,
            input_names=[*graph.inputs(graph.example)],
            output_names=list(graph.gives),
            verbose=False,
        )
    assert written is not None
    model = written.model_proto
    for noted in (
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
        *model.functions,
    ):
        del noted.metadata_props[:]
    del model.graph.metadata_props[:]
    with answered(f"the graph from {graph.takes} does not fit into one ONNX file", REMEDY):
        content: bytes = model.SerializeToString()
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's messages on packages that no graph here uses, and its dependencies' warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
