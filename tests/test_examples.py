"""The examples of the documentation run: here for a few steps, where their packages are installed."""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from vaescale.commands.encode import encode
from vaescale.commands.fit_gmm import fit_gmm

EXAMPLE = Path(__file__).parents[1] / "docs/examples/latent_flow.py"


def test_the_flow_example_is_valid_python_that_imports_what_exists() -> None:
    """Without diffusers, too: its own modules are imported, and the names that it takes of them exist."""
    tree = ast.parse(EXAMPLE.read_text())
    names = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    own = [node for node in names if str(node.module).startswith("vaescale")]
    assert len(own) > 5
    for node in own:
        module = importlib.import_module(str(node.module))
        for alias in node.names:
            is_module = (
                importlib.util.find_spec(f"{node.module}.{alias.name}")
                if hasattr(module, "__path__")
                else None
            )
            assert is_module or hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of diffusers' own imports
def test_the_flow_example_runs(
    tmp_path: Path, recipe_content: dict[str, Any], recipe_file, vaescale, capfd, monkeypatch
) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    content = recipe_content | {
        "network": {"kind": "resnet", "latent_dim": 2, "width": 4, "multipliers": [1, 2], "blocks": 1}
    }
    assert vaescale("train", recipe_file(content)).code == 0
    run = Path(content["run_dir"])
    encode(run, splits=["train"], dtype="bf16", flip="both", standardize="channel")
    fit_gmm(run, components=[1])
    latents = run / "latents/train-bf16-both-channel"
    few = "SEED, BATCH, WIDTH, LR, HEUN_STEPS, JUDGED = 0, 64, 8, 2e-3, 2, 20"
    source, changes = re.subn(r"^SEED, BATCH.*$", few, EXAMPLE.read_text(), flags=re.MULTILINE)
    assert changes == 1
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(run), str(latents), "3", "pixels"])
    exec(compile(source, EXAMPLE, "exec"), {"__name__": "__main__"})  # noqa: S102
    assert capfd.readouterr().out.count("Frechet distance") == 2
    assert (run / "figures/latent_flow.png").stat().st_size > 1000
