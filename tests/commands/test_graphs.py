"""`export --format torch_export` and `onnx`: what the files compute is what the model does, for any number of images."""

import io
import json
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.networks.test_every_network import build
from vaescale.commands import graphs
from vaescale.commands.export import FORMATS
from vaescale.commands.graphs import Graph, graphs_of, largest_difference, program_of
from vaescale.errors import UserError
from vaescale.models.vae import VAE
from vaescale.trained import Trained, open_trained


def graphs_of_model(model: VAE) -> dict[str, Graph]:
    return graphs_of(Trained(Path(), None, model.eval(), 0, "raw"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "likelihood"),
    [
        ("linear", {"kind": "discretized_logistic_mixture", "components": 2}),
        ("conv, batch norm", {"kind": "bernoulli", "binarize": "threshold"}),
        pytest.param(
            "resnet, attention",
            {"kind": "gaussian", "sigma": "optimal_per_channel"},
            marks=pytest.mark.slow,
        ),
        pytest.param("ladder, relative", {"kind": "gaussian", "sigma": "predicted"}, marks=pytest.mark.slow),
    ],
)
def test_graphs_compute_what_the_model_does(name: str, likelihood: dict[str, Any]) -> None:
    model = build(name, likelihood)
    made = graphs_of_model(model)
    programs = {name: program_of(graph).module() for name, graph in made.items()}
    for graph, program in zip(made.values(), programs.values(), strict=True):
        assert largest_difference(graph, lambda inputs, run=program: run(*inputs.values())) < 1e-6
    x = torch.rand(3, *model.image_shape)
    target = model.target((255 * x).round().byte(), None)  # type: ignore[arg-type]
    with torch.no_grad():
        mean, log_sigma = programs["encode"]((255 * x).round() / 255)
        posterior = model.joint_posterior(target)
        torch.testing.assert_close(mean.flatten(1), posterior.mu)
        torch.testing.assert_close(log_sigma.flatten(1), posterior.log_sigma)
        torch.testing.assert_close(mean.flatten(1), model.joint_means(target, len(model.group_sizes)))
        decoded = programs["decode"](mean)
        params = model.reconstruct(target)
        torch.testing.assert_close(decoded[0], model.likelihood.mean(params))
        sigma = model.likelihood.deviation(params)
        assert len(decoded) == (1 if sigma is None else 2)
        if sigma is not None:
            torch.testing.assert_close(decoded[1], sigma.float().expand_as(decoded[0]))


def test_the_mean_of_a_target_is_that_of_its_draws() -> None:
    from vaescale import noise

    for likelihood in (
        {"kind": "gaussian", "dequantize": True},
        {"kind": "bernoulli", "binarize": "stochastic"},
    ):
        head = build("conv", likelihood).likelihood
        x = torch.rand(1, 1, 8, 8)
        draws = head.target(x.expand(4000, -1, -1, -1), noise.Stream(0, 0, torch.arange(4000)))
        torch.testing.assert_close(draws.mean(0, keepdim=True), head.expected_target(x), rtol=0, atol=0.05)


def test_a_graph_that_differs_is_refused() -> None:
    graph = graphs_of_model(build("linear"))["decode"]
    with pytest.raises(UserError, match=r"the graph's mean differs by 0\.01"):
        largest_difference(graph, lambda inputs: [value + 0.01 for value in graph.module(**inputs)])
    with pytest.raises(UserError, match="differs by nan"):
        largest_difference(graph, lambda inputs: [value * torch.nan for value in graph.module(**inputs)])
    with pytest.raises(UserError, match="differs by inf"):
        largest_difference(graph, lambda inputs: [value[:1, :, :1] for value in graph.module(**inputs)])


class Unwritable(torch.nn.Module):
    """A graph with an operation that ONNX does not have, or one that depends on values."""

    def __init__(self, *, depends: bool) -> None:
        super().__init__()
        self.depends = depends

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.depends and z.sum() > 0:
            return z
        return torch.special.bessel_j0(z)


def test_a_decoder_that_goes_from_pixel_to_pixel_has_no_graph() -> None:
    model = build("linear", {"kind": "autoregressive_logistic_mixture", "components": 2, "width": 4})
    with pytest.raises(UserError, match=r"needs a decoded mean, .*export --format mlflow takes every kind"):
        graphs_of_model(model)


def test_what_cannot_be_traced_is_answered_with_a_sentence() -> None:
    graph = Graph(Unwritable(depends=True), torch.rand(2, 3), "z", ("mean",))
    with pytest.raises(
        UserError, match=r"^torch\.export cannot trace the graph from z: .*; export --format mlflow"
    ) as caught:
        program_of(graph)
    assert "\n" not in str(caught.value)


def test_what_onnx_does_not_have_is_answered_with_a_sentence() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra onnx")
    from vaescale.commands.export_onnx import model_of

    graph = Graph(Unwritable(depends=False), torch.rand(2, 3), "z", ("mean",))
    with pytest.raises(
        UserError, match=r"cannot write the graph from z: .*bessel_j0.*; export --format torch_export"
    ) as caught:
        model_of(graph)
    assert "\n" not in str(caught.value)


def pickles_in(content: bytes) -> list[str]:
    """The members of an archive that are pickles, or archives that have them."""
    archive = zipfile.ZipFile(io.BytesIO(content))
    return [member for member in archive.namelist() if _is_pickle(member, archive.read(member))]


def _is_pickle(name: str, content: bytes) -> bool:
    if zipfile.is_zipfile(io.BytesIO(content)):
        return bool(pickles_in(content))
    try:
        return name.endswith(".pkl") or len([*pickletools.genops(content)]) > 1
    except ValueError:
        return False


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch 2.11
def test_the_files_of_torch_export(vaescale: Callable[..., Any], trained_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = vaescale("export", trained_run, out, "--format", "torch_export", "--json")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in out.iterdir()} == {"encode.pt2", "decode.pt2", "vaescale.json", "README.md"}
    trained = open_trained(trained_run)
    described = json.loads((out / "vaescale.json").read_text())
    assert described["weights_hash"] == trained.weights_hash
    assert described["sigma"] == float(trained.model.likelihood.sigma)  # type: ignore[arg-type]
    assert described["graphs"]["encode"]["outputs"] == {"mean": ["N", 4], "log_sigma": ["N", 4]}
    assert described["graphs"]["decode"]["outputs"]["sigma"] == ["N", 1, 8, 8]
    for name in ("encode", "decode"):
        content = (out / f"{name}.pt2").read_bytes()
        assert pickles_in(content) == []
        archive = zipfile.ZipFile(io.BytesIO(content))
        assert not any(b"vaescale/" in archive.read(member) for member in archive.namelist())
    x = torch.rand(6, 1, 8, 8)
    with torch.no_grad():
        mean, _ = torch.export.load(out / "encode.pt2").module()(x)
        torch.testing.assert_close(mean, trained.model.posterior(x).mu)


def test_a_program_with_its_example_has_a_pickle() -> None:
    """What `pickles_in` looks for is there when torch.export.save gets the example."""
    graph = graphs_of_model(build("linear"))["decode"]
    program = program_of(graph)
    program.example_inputs = ((graph.example,), {})
    stored = io.BytesIO()
    torch.export.save(program, stored)
    assert [Path(name).name for name in pickles_in(stored.getvalue())] == ["model.pt"]


def test_the_files_of_onnx(vaescale: Callable[..., Any], trained_run: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs the extra onnx")
    import onnxruntime

    out = tmp_path / "out"
    outcome = vaescale("export", trained_run, out, "--format", "onnx", "--json")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in out.iterdir()} == {
        "encode.onnx",
        "decode.onnx",
        "vaescale.json",
        "README.md",
    }
    assert max(outcome.json["largest_differences"].values()) < graphs.LARGEST_DIFFERENCE
    for name in ("encode", "decode"):
        assert b"vaescale/" not in (out / f"{name}.onnx").read_bytes()
    model = open_trained(trained_run).model
    for number in (1, 7):
        x = torch.rand(number, 1, 8, 8)
        encode, decode = (onnxruntime.InferenceSession(out / f"{name}.onnx") for name in ("encode", "decode"))
        mean, log_sigma = encode.run(["mean", "log_sigma"], {"images": x.numpy()})
        decoded, sigma = decode.run(["mean", "sigma"], {"z": mean})
        with torch.no_grad():
            q = model.posterior(x)
            params = model.decode(q.mu)
            wanted = (
                q.mu,
                q.log_sigma,
                model.likelihood.mean(params),
                model.likelihood.sigma.float().expand(x.shape),
            )
        for one, other in zip((mean, log_sigma, decoded, sigma), wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=0, atol=1e-4)


def test_onnx_without_its_packages_is_a_sentence(
    vaescale: Callable[..., Any], trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    outcome = vaescale("export", trained_run, tmp_path / "out", "--format", "onnx")
    outcome.assert_refused(2, "onnx is not installed; pip install onnx")
    assert not (tmp_path / "out").exists()


def test_the_formats_of_the_option_are_those_of_the_verb() -> None:
    import argparse

    from vaescale.tools import export as tool

    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    (option,) = (action for action in parser._actions if action.dest == "format")
    assert tuple(option.choices or ()) == tuple(FORMATS)
