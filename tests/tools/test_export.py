"""Exported runs: opened like runs, never trained, in the form of today and in that of earlier versions."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from vaescale.commands.export import export, write_run
from vaescale.errors import UserError
from vaescale.runs import checkpoint
from vaescale.trained import Trained, open_trained


def as_earlier_versions_wrote_it(exported: Path) -> None:
    """Give the checkpoint a file of no optimizer tensors, and its manifest no word of the export."""
    (folder,) = (exported / "checkpoints").iterdir()
    save_file({}, folder / "optimizer.safetensors")
    content = (folder / "optimizer.safetensors").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("exported") is True
    manifest["files"]["optimizer.safetensors"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("earlier", [False, True])
def test_an_exported_run_is_opened_and_never_trained(
    vaescale: Callable[..., object], run: Path, tmp_path: Path, earlier: bool
) -> None:
    trained = open_trained(run)
    exported = tmp_path / "exported"
    write_run(trained, exported)
    (folder,) = (exported / "checkpoints").iterdir()
    assert {path.name for path in folder.iterdir()} == {"manifest.json", "model.safetensors", "state.json"}
    if earlier:
        as_earlier_versions_wrote_it(exported)
    opened = open_trained(exported)
    assert opened.identity == trained.identity
    assert opened.weights == "ema"
    for name, value in trained.model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], value)
    before = (exported / "recipe.yaml").read_bytes()
    for steps in (12, 24):
        outcome = vaescale(
            "train", exported / "recipe.yaml", f"run_dir={exported}", f"training.steps={steps}"
        )
        outcome.assert_refused(2, "is an exported run", "choose another run_dir")
    assert (exported / "recipe.yaml").read_bytes() == before
    assert not (exported / "metrics.jsonl").exists()


@pytest.mark.filterwarnings("ignore")  # MLflow warns of itself
@pytest.mark.parametrize("earlier", ["vaescale.serving", "vaescale.commands.export"])
def test_a_model_of_earlier_versions_is_loaded_by_mlflow(
    vaescale: Callable[..., object], run: Path, tmp_path: Path, earlier: str
) -> None:
    import mlflow

    assert vaescale("export", run, tmp_path / "out", "--weights", "raw").code == 0
    as_earlier_versions_wrote_it(tmp_path / "out" / "data" / "run")
    description = tmp_path / "out" / "MLmodel"
    assert "loader_module: vaescale.commands.served" in description.read_text()
    description.write_text(description.read_text().replace("vaescale.commands.served", earlier))
    images = np.zeros((2, 1, 8, 8), np.uint8)
    trained: Trained = open_trained(run, weights="raw")
    with torch.no_grad():
        expected = trained.model.posterior(trained.model.target(torch.from_numpy(images), None)).mu
    latents = mlflow.pyfunc.load_model(str(tmp_path / "out")).predict(images, params={"mode": "encode"})
    np.testing.assert_allclose(latents, expected, atol=1e-6)


def test_only_an_exported_checkpoint_needs_no_optimizer(tmp_path: Path) -> None:
    tensors = {"model": {"w": torch.ones(3)}}
    state = {checkpoint.EXPORTED: "raw"}
    for exported in (True, False):
        folder = tmp_path / str(exported)
        keep = checkpoint.Keep(1)
        written = checkpoint.write(folder, 1, tensors, state, keep=keep, exported=exported)
        fault = checkpoint.verify(written.folder)
        assert fault == (None if exported else "the manifest lacks optimizer.safetensors")
        assert checkpoint.is_exported(folder)
    assert not checkpoint.is_exported(tmp_path)


def test_a_run_that_its_store_never_got_is_not_logged(run: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["tracking"] = {"mlflow": f"sqlite:///{tmp_path}/mlflow.db"}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "mlflow.json").write_text('{"status": "FINISHED", "status_sent": false}')
    with pytest.raises(UserError, match="no MLflow store"):
        export(run, tmp_path / "exported", log=True)
