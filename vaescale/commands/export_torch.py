"""Write a run's encoder and decoder as `encode.pt2` and `decode.pt2`, which `torch.export.load` opens without vaescale."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vaescale.commands.graphs import describe, graphs_of, largest_difference, program_of
from vaescale.trained import Trained


def export_torch(trained: Trained, out: Path) -> dict[str, Any]:
    """Write both programs and vaescale.json to OUT, once what the files compute is what the model does. Returns what is shown."""
    from torch import export

    graphs = graphs_of(trained)
    programs = {name: program_of(graph) for name, graph in graphs.items()}
    differences = {
        name: largest_difference(graphs[name], _values(program.module()))
        for name, program in programs.items()
    }
    out.mkdir(parents=True)
    files = {name: f"{name}.pt2" for name in programs}
    for name, program in programs.items():
        export.save(program, out / files[name])
    return describe(trained, out, graphs=graphs, files=files, differences=differences)


def _values(module: nn.Module) -> Callable[[dict[str, Tensor]], Any]:
    """A function from a graph's inputs by name, which are in its order, to its outputs."""
    return lambda inputs: module(*inputs.values())
