"""The linear VAE against the closed form of what it must find: probabilistic PCA."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from vaescale.evaluation.likelihood import evaluate
from vaescale.networks.config import LinearConfig
from vaescale.networks.linear import LinearNetwork
from vaescale.trained import in_order, open_split, open_trained

ROOT = Path(__file__).parents[2]
DRAWS = 8


def test_shapes() -> None:
    network = LinearNetwork(
        LinearConfig(latent_dim=5), image_size=(6, 6), channels=3, encoder_out=10, out_channels=9
    )
    assert network.encode(torch.rand(2, 3, 6, 6)).shape == (2, 10)
    assert network.decode(torch.randn(2, 5)).shape == (2, 9, 6, 6)


def test_it_is_linear_and_its_posterior_variance_is_one_for_all() -> None:
    network = LinearNetwork(
        LinearConfig(latent_dim=2), image_size=(4, 4), channels=1, encoder_out=4, out_channels=1
    )
    a, b = torch.rand(2, 1, 1, 4, 4)
    both, apart = network.encode((a + b) / 2), (network.encode(a) + network.encode(b)) / 2
    torch.testing.assert_close(both, apart)
    assert torch.equal(network.encode(a)[:, 2:], network.encode(b)[:, 2:])


@pytest.mark.slow
def test_training_finds_probabilistic_pca(vaescale, digits: Path, tmp_path: Path) -> None:
    """recipes/digits/linear.yaml in fewer steps, with the optimal sigma and with a shared one. Tipping & Bishop 1999: the
    likelihood is exact. Lucas et al. 2019: the ELBO of the linear VAE has it as its only maximum.
    """
    noise_variances = []
    for sigma, steps in (("optimal", 2000), ("shared", 3000)):
        run = tmp_path / sigma
        keys = [f"data.{split}={digits / split}" for split in ("train", "val")]
        keys += [f"run_dir={run}", f"likelihood.sigma={sigma}", "tracking.mlflow=null"]
        keys += [f"training.{key}={steps}" for key in ("steps", "evaluate_every", "checkpoint_every")]
        outcome = vaescale("train", ROOT / "recipes/digits/linear.yaml", *keys)
        assert outcome.code == 0, outcome.err
        trained = open_trained(run, weights="raw")
        reader = open_split(trained.recipe, "train")
        # One draw of z an image is noisy: the mean of several evaluations has an error of 0.03 nats.
        metrics = [evaluate(trained.model, in_order(reader), seed=seed) for seed in range(DRAWS)]
        bound = -np.mean([one["neg_elbo_nats"] for one in metrics])
        images = np.concatenate([batch.images[batch.mask].numpy() for batch in in_order(reader)])
        pixels = images.reshape(len(images), -1) / 255
        exact = PCA(16).fit(pixels)
        assert bound == pytest.approx(exact.score(pixels), rel=0.005)
        noise_variances.append(metrics[0]["sigma"] ** 2)
        assert noise_variances[-1] == pytest.approx(exact.noise_variance_, rel=0.01)
    assert noise_variances[0] == pytest.approx(noise_variances[1], rel=0.01)
