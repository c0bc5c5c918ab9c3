"""Begin from other weights, and train a part of a network only."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.training.test_strategies import make, step
from vaescale.commands.initial_weights import begin, prepare
from vaescale.errors import UserError
from vaescale.models.freezing import freeze
from vaescale.recipe import Recipe
from vaescale.trained import build_model, open_trained
from vaescale.training.memory import estimate

PREDICTED = {"kind": "gaussian", "sigma": "predicted"}


@pytest.fixture
def from_run(recipe_content: dict[str, Any], trained_run: Path) -> Callable[..., Recipe]:
    """The tiny recipe that begins from the trained tiny run, with changes: from_run(network={...}, init_from={...})."""

    def changed(**sections: Any) -> Recipe:
        content = {**recipe_content, "init_from": {"path": str(trained_run)}}
        for name, values in sections.items():
            content[name] = values if "kind" in values else {**content[name], **values}
        return Recipe.model_validate(content)

    return changed


def test_all_is_the_run_s_own_model(from_run, trained_run: Path) -> None:
    recipe = from_run()
    model, source = build_model(recipe), open_trained(trained_run).model
    beginning = begin(model, recipe)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert "nothing left there; nothing new" in beginning.sentence
    (saved,) = (trained_run / "checkpoints").glob("step-*12")
    assert (
        beginning.sha256
        == json.loads((saved / "manifest.json").read_text())["files"]["ema.safetensors"]["sha256"]
    )


def test_a_run_that_begins_from_an_export_has_its_loss(
    vaescale, recipe_file, recipe_content, trained_run: Path, tmp_path: Path
) -> None:
    """At a learning rate of almost 0, the held-out numbers after a step are the export's, but for those of the running sigma."""
    exported = tmp_path / "model"
    assert vaescale("export", trained_run, exported).code == 0
    before = vaescale("evaluate", exported / "data" / "run", "--json").json
    recipe_content |= {"init_from": str(exported)}
    recipe_content["optimizer"] |= {"lr": 1e-12}
    recipe_content["training"] |= {"steps": 1}
    outcome = vaescale("train", recipe_file(recipe_content), "--json")
    assert outcome.code == 0, outcome.err
    assert "begins from" in outcome.err
    assert "of 12 steps" not in outcome.err
    after = vaescale("evaluate", recipe_content["run_dir"], "--json").json
    assert after["metrics"]["log_px_nats"] != before["metrics"]["log_px_nats"], "sigma has seen a batch more"
    for name in ("kl_nats", "mse", "reconstruction_mse"):
        assert after["metrics"][name] == pytest.approx(before["metrics"][name], rel=1e-6), name


def test_another_likelihood_has_a_new_head(from_run, trained_run: Path) -> None:
    recipe = from_run(likelihood=PREDICTED)
    model, fresh = build_model(recipe), build_model(recipe)
    beginning = begin(model, recipe)
    head = f"network.{model.network.head_name}"
    new = {name for name, value in model.state_dict().items() if torch.equal(value, fresh.state_dict()[name])}
    assert {f"{head}.weight", f"{head}.bias"} <= new
    assert "network.encoder.0.0.weight" not in new
    assert f"{head}.weight" in beginning.sentence.split(";")[2]


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_alone_is_taken(from_run, trained_run: Path, part: str) -> None:
    recipe = from_run(init_from={"take": part})
    model, fresh, source = build_model(recipe), build_model(recipe), open_trained(trained_run).model
    begin(model, recipe)
    for name, value in model.state_dict().items():
        other = source if name.startswith(f"network.{part}.") else fresh
        assert torch.equal(value, other.state_dict()[name]), name


def test_raw_weights_a_checkpoint_and_a_file(from_run, trained_run: Path, tmp_path: Path) -> None:
    (saved,) = (trained_run / "checkpoints").glob("step-*12")
    raw = load_file(saved / "model.safetensors")
    save_file(raw, tmp_path / "own.safetensors")
    for path, weights in ((trained_run, "raw"), (saved, "raw"), (tmp_path / "own.safetensors", "ema")):
        recipe = from_run(init_from={"path": str(path), "weights": weights})
        model = build_model(recipe)
        begin(model, recipe)
        for name, value in model.network.state_dict().items():
            assert torch.equal(value, raw[f"network.{name}"]), (path, name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": {"latent_dim": 5}}, "as .* needs .*; take the network section and image size"),
        ({"network": {"widths": [8]}}, "as .* needs|lacks network|which the recipe's network does not have"),
        ({"network": {"kind": "linear", "latent_dim": 4}}, "lacks network"),
        ({"init_from": {"path": "nowhere"}}, "does not exist; name a run folder"),
        ({"init_from": {"path": "."}}, "holds no weights that vaescale knows"),
    ],
)
def test_what_does_not_fit_is_refused(from_run, change: dict[str, Any], words: str) -> None:
    recipe = from_run(**change)
    model = build_model(recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=words):
        begin(model, recipe)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_damaged_sources_are_refused(from_run, trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(trained_run, run)
    (saved,) = (run / "checkpoints").glob("step-*12")
    (saved / "ema.safetensors").write_bytes(b"no tensors")
    (tmp_path / "own.safetensors").write_bytes(b"no tensors")
    (tmp_path / "own.bin").write_bytes(b"\x80\x02a pickle")
    refused = {
        saved: "is not sound",
        tmp_path / "own.safetensors": "no sound",
        tmp_path / "own.bin": "no weights",
    }
    for path, words in refused.items():
        recipe = from_run(init_from={"path": str(path)})
        with pytest.raises(UserError, match=words):
            begin(build_model(recipe), recipe)


def test_a_run_goes_on_without_its_source(
    vaescale, recipe_file, recipe_content, trained_run, tmp_path
) -> None:
    """What a run began from is its own from the first checkpoint on, and is remembered."""
    source = tmp_path / "source"
    shutil.copytree(trained_run, source)
    recipe_content |= {"init_from": str(source)}
    recipe_content["training"] |= {"steps": 6}
    recipe = recipe_file(recipe_content)
    assert vaescale("train", recipe).code == 0
    tags = json.loads(Path(recipe_content["run_dir"], "run.json").read_text())
    assert len(tags["init_weights_hash"]) == 64
    shutil.rmtree(source)
    outcome = vaescale("train", recipe, "training.steps=8", "--allow-changes")
    assert outcome.code == 0, outcome.err
    again = json.loads(Path(recipe_content["run_dir"], "run.json").read_text())
    assert again["init_weights_hash"] == tags["init_weights_hash"]
    assert "begins from" not in outcome.err


def test_a_killed_first_save_is_no_checkpoint(from_run, trained_run: Path, tmp_path: Path) -> None:
    """A start that was killed in its first save begins from the source again, and not from random weights."""
    recipe = from_run()
    (tmp_path / "checkpoints/step-000000006.tmp-7").mkdir(parents=True)
    (tmp_path / "run.json").write_text(json.dumps({"init_weights_hash": "0" * 64}))
    model, source = build_model(recipe), open_trained(trained_run).model
    _, sentence = prepare(model, recipe, tmp_path)
    assert sentence is not None
    assert all(torch.equal(source.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_new_head_is_not_frozen(from_run, tmp_path: Path) -> None:
    recipe = from_run(likelihood=PREDICTED, network={"freeze": "decoder"})
    with pytest.raises(UserError, match=r"would keep .* at random.*network\.freeze=decoder\.0"):
        prepare(build_model(recipe), recipe, tmp_path)


@pytest.mark.parametrize(
    ("part", "words"),
    [("enc", "does not have; known here: encoder, decoder"), ("encoder,decoder", "nothing to train")],
)
def test_freezing_nothing_or_everything_is_refused(from_run, part: str, words: str) -> None:
    recipe = from_run(network={"freeze": part})
    with pytest.raises(UserError, match=words):
        freeze(build_model(recipe), recipe.network.freeze)


def test_an_unfrozen_recipe_has_the_hash_that_it_had(from_run, recipe_content) -> None:
    plain = Recipe.model_validate(recipe_content)
    frozen = from_run(network={"freeze": "encoder"})
    assert Recipe.model_validate({**recipe_content, "init_from": None}).hash == plain.hash
    assert len({plain.hash, from_run().hash, frozen.hash}) == 3
    elsewhere = from_run(init_from={"path": "another"})
    assert elsewhere.hash == from_run().hash, "a path is no identity; run.json has the weights' sha256"


def test_what_is_frozen_has_no_state_and_keeps_its_statistics(recipe_content) -> None:
    recipe_content["network"] |= {"norm": "batch", "freeze": "encoder"}
    recipe = Recipe.model_validate(recipe_content)
    trained, whole = (build_model(recipe) for _ in range(2))
    freeze(trained, recipe.network.freeze)
    sizes = [estimate(model, images=1, averages=1, precision="fp32") for model in (trained, whole)]
    encoder = sum(p.numel() for p in trained.network.encoder.parameters())
    for name, copies in {"gradients": 1, "optimizer": 2, "ema": 1, "weights": 0}.items():
        assert sizes[1][name] - sizes[0][name] == 4 * copies * encoder, name
    strategy = make(recipe, ema_decay=0.9, model=trained)
    held = [
        value
        for state in strategy.optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    assert sum(4 * value.numel() for value in held) == sizes[0]["optimizer"] + sizes[0]["ema"]
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    trained.train()
    assert [module.training for module in trained.network.children()] == [False, True]
    trained.network.decode(trained.network.encode(torch.rand(4, 1, 8, 8))[:, : recipe.network.latent_dim])
    step(strategy, 0)
    for name, value in trained.state_dict().items():
        changes = name.startswith("network.decoder")
        assert torch.equal(before[name], value) != changes, name


def test_every_network_has_an_encoder_a_decoder_and_a_head(recipe_content) -> None:
    for network in (
        {"kind": "conv", "latent_dim": 4, "widths": [8]},
        {"kind": "resnet", "latent_dim": 2, "width": 32, "multipliers": [1, 1], "blocks": 1},
        {"kind": "linear", "latent_dim": 4},
        {"kind": "ladder", "latent_dim": 2, "width": 8},
    ):
        model = build_model(Recipe.model_validate({**recipe_content, "network": network}))
        names = [name for name, _ in model.network.named_parameters()]
        parts = {model.network.part_of(name) for name in names}
        assert parts == {"encoder", "decoder"}
        head: nn.Module = model.network.get_submodule(model.network.head_name)
        wide = build_model(
            Recipe.model_validate({**recipe_content, "network": network, "likelihood": PREDICTED})
        )
        others = dict(wide.network.named_parameters())
        differing = {n for n, p in model.network.named_parameters() if others[n].shape != p.shape}
        assert differing == {f"{model.network.head_name}.{name}" for name, _ in head.named_parameters()}


def test_another_image_size_fits_where_the_network_allows(from_run, tmp_path: Path) -> None:
    network = {"kind": "resnet", "latent_dim": 2, "width": 32, "multipliers": [1, 1], "blocks": 1}
    small = build_model(from_run(network=network))
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    recipe = from_run(
        network=network, data={"image_size": 16}, init_from={"path": str(tmp_path / "small.safetensors")}
    )
    model = build_model(recipe)
    begin(model, recipe)
    for name, value in small.network.state_dict().items():
        assert torch.equal(model.network.state_dict()[name], value)
