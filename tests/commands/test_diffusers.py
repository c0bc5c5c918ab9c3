"""`export --format diffusers` and `import`: a run as an AutoencoderKL, and back. The names are tested in tests/exchange."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.exchange.test_autoencoder_kl import network_of
from vaescale.commands.export_diffusers import export_diffusers
from vaescale.errors import UserError
from vaescale.exchange import autoencoder_kl
from vaescale.recipe import Recipe
from vaescale.trained import Trained, build_model, open_trained

RESNET = {
    "kind": "resnet",
    "latent_dim": 3,
    "width": 32,
    "multipliers": [1, 1],
    "blocks": 1,
    "norm_epsilon": 1e-6,
}
IDENTITY = {"kind": "gaussian", "sigma": "optimal", "mean": "identity"}


@pytest.fixture
def resnet(recipe_content: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose run AutoencoderKL can say exactly."""
    recipe_content |= {"network": RESNET, "likelihood": IDENTITY}
    recipe_content["posterior"] = {"kind": "diagonal", "bounded": False}
    recipe_content["training"] |= {"steps": 2}
    return recipe_content


def shaken(content: dict[str, Any], folder: Path) -> Trained:
    """A model of a recipe with other weights than the initial ones, as if it were trained."""
    recipe = Recipe.model_validate(content)
    model = build_model(recipe).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.network.parameters():
            value += 0.1 * torch.randn(value.shape, generator=generator)
    return Trained(folder, recipe, model, 7, "ema", "hash")


@pytest.mark.parametrize(
    ("posterior", "likelihood"),
    [
        ({"kind": "diagonal", "bounded": False}, IDENTITY),
        ({"kind": "diagonal", "bounded": False}, {**IDENTITY, "sigma": "predicted"}),
        ({"kind": "diagonal", "bounded": False}, {"kind": "student_t", "mean": "identity"}),
        ({"kind": "fixed", "sigma": [0.5, 0.1, 2.0]}, IDENTITY),
        ({"kind": "isotropic"}, IDENTITY),
    ],
)
def test_the_folder_computes_what_the_run_does(
    resnet, tmp_path: Path, posterior: dict[str, Any], likelihood: dict[str, Any]
) -> None:
    trained = shaken(resnet | {"posterior": posterior, "likelihood": likelihood}, tmp_path)
    export_diffusers(trained, tmp_path / "out", latent_images=0)
    network = network_of(autoencoder_kl.read(tmp_path / "out"))
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        own = trained.model.posterior(x)
        mu, log_sigma = network.encode(x).chunk(2, dim=1)
        torch.testing.assert_close(mu, own.mu, rtol=0, atol=1e-5)
        # A bound that AutoencoderKL does not have: 8 tanh(s / 8) for s.
        raw = 8 * torch.atanh(own.log_sigma / 8) if posterior["kind"] == "isotropic" else own.log_sigma
        torch.testing.assert_close(log_sigma, raw.expand_as(mu), rtol=0, atol=1e-5)
        decoded = trained.model.likelihood.mean(trained.model.network.decode(mu))
        torch.testing.assert_close(network.decode(mu), decoded, rtol=0, atol=1e-5)


def test_there_and_back_is_the_same_run(vaescale, recipe_file, resnet, digits: Path, tmp_path: Path) -> None:
    """Weights and sigma bit for bit; the scaling factor is that of the training images' latents."""
    run, out, back = Path(resnet["run_dir"]), tmp_path / "out", tmp_path / "back"
    assert vaescale("train", recipe_file(resnet)).code == 0
    words = ("--format", "diffusers", "--scaling", "channel", "--json")
    exported = vaescale("export", run, out, *words)
    assert exported.code == 0, exported.err
    assert set(exported.json["largest_differences"].values()) == {0.0}
    imported = vaescale(
        "import", out, back, f"data.train={digits / 'train'}", f"data.val={digits / 'val'}", "--json"
    )
    assert imported.code == 0, imported.err
    one, other = open_trained(run), open_trained(back)
    for name, value in one.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value), name
    assert imported.json["sigma"] == exported.json["sigma"]
    metrics = [vaescale("evaluate", folder, "--json").json["metrics"] for folder in (run, back)]
    assert metrics[0]["neg_elbo_nats"] == pytest.approx(metrics[1]["neg_elbo_nats"], rel=1e-9)
    config = json.loads((out / "config.json").read_text())
    images = torch.cat(_images(one))
    with torch.no_grad():
        q = one.model.posterior(images)
    mean = q.mu.mean((0, 2, 3))
    std = (q.mu.square() + (2 * q.log_sigma).exp()).mean((0, 2, 3)).sub(mean.square()).sqrt()
    torch.testing.assert_close(torch.tensor(config["latents_mean"]), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(config["latents_std"]), std, rtol=1e-4, atol=1e-5)
    assert (config["scaling_factor"], config["shift_factor"]) == (1, None), "pipelines would apply both"
    whole = vaescale("export", run, tmp_path / "whole", "--format", "diffusers", "--json").json
    factors = json.loads((tmp_path / "whole/config.json").read_text())
    assert (factors["latents_mean"], factors["latents_std"]) == (None, None)
    assert whole["shift_factor"] == factors["shift_factor"] == pytest.approx(float(q.mu.mean()), abs=1e-5)
    spread = (q.mu.square() + (2 * q.log_sigma).exp()).mean() - q.mu.mean().square()
    assert factors["scaling_factor"] == pytest.approx(float(spread) ** -0.5, rel=1e-4)
    again = vaescale("import", out, back)
    assert again.code == 2
    assert "already exists" in again.err


def _images(trained: Trained) -> list[torch.Tensor]:
    from vaescale.models.vae import to_unit
    from vaescale.trained import in_order, open_split

    return [to_unit(batch.images[batch.mask]) for batch in in_order(open_split(trained.recipe, "train"))]


def test_a_run_begins_from_the_folder(vaescale, recipe_file, resnet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trained = shaken(resnet, tmp_path)
    export_diffusers(trained, out, latent_images=0)
    resnet["network"] = {**RESNET, "norm_groups": 32, "freeze": "encoder"}
    outcome = vaescale("train", recipe_file(resnet | {"init_from": str(out)}))
    assert outcome.code == 0, outcome.err
    assert "an AutoencoderKL" in outcome.err
    assert "the recipe differs" not in outcome.err
    own = open_trained(Path(resnet["run_dir"])).model
    for name, value in trained.model.network.encoder.state_dict().items():
        assert torch.equal(own.network.encoder.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": {"kind": "conv", "latent_dim": 4, "widths": [8]}}, "network.kind is 'conv'"),
        (
            {"likelihood": {"kind": "gaussian"}},
            "likelihood.mean .*sigmoid.* does not; train the decoder for it",
        ),
        ({"likelihood": {"kind": "bernoulli"}}, "likelihood.kind .*bernoulli"),
        ({"network": {**RESNET, "multipliers": [2, 2]}}, "multipliers begins with 2"),
        (
            {"network": {**RESNET, "width": 48, "multipliers": [1, 2]}},
            "has 16 groups of channels and other norms 32",
        ),
        ({"network": {**RESNET, "standardize": {"mean": 0.3, "sigma": 0.2}}}, "standardize.mean is 0.3"),
    ],
)
def test_what_diffusers_cannot_say_is_refused(
    resnet, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        export_diffusers(shaken(resnet | changes, tmp_path), tmp_path / "out", latent_images=0)
    assert not (tmp_path / "out").exists()


def test_a_scale_alone_is_in_the_first_layer(resnet, tmp_path: Path) -> None:
    network = {**RESNET, "standardize": {"mean": 0.5, "sigma": 0.25}}
    trained = shaken(resnet | {"network": network}, tmp_path)
    export_diffusers(trained, tmp_path / "out", latent_images=0)
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        mu, _ = network_of(autoencoder_kl.read(tmp_path / "out")).encode(x).chunk(2, dim=1)
        torch.testing.assert_close(mu, trained.model.posterior(x).mu, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("likelihood.mean=sigmoid",), "give a likelihood with `mean: identity`"),
        (
            ("likelihood.kind=bernoulli",),
            "unknown key likelihood.sigma|give a likelihood with `mean: identity`",
        ),
        (("likelihood.sigma=predicted",), "takes more for each value"),
    ],
)
def test_a_likelihood_without_a_head_is_refused(
    vaescale, resnet, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    import re

    export_diffusers(shaken(resnet, tmp_path), tmp_path / "out", latent_images=0)
    refused = vaescale("import", tmp_path / "out", tmp_path / "back", *words)
    assert refused.code == 2
    assert re.search(said, refused.err), refused.err
    assert not (tmp_path / "back").exists()
