"""Inception's features, where torch-fidelity and its torchvision can be had: torchmetrics' numbers, and no code from its weights."""

from pathlib import Path

import pytest
import torch

from vaescale.errors import UserError
from vaescale.evaluation.features import open_extractor
from vaescale.evaluation.frechet import frechet_distance, moments

try:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
except Exception as error:  # a torchvision of another torch raises what it likes
    pytest.skip(f"torch-fidelity cannot be imported ({error})", allow_module_level=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real network with weights by chance: the real ones are a download."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {}
        )
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_distances_are_torchmetrics_fid(weights: Path) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, 256, (40, 1, 16, 16), generator=generator, dtype=torch.uint8)
    other = torch.randint(0, 128, (50, 1, 16, 16), generator=generator, dtype=torch.uint8)
    extractor = open_extractor(f"inception:{weights}", image_shape=(1, 16, 16), device=torch.device("cpu"))
    assert "not torch-fidelity's" in extractor.words
    features = [extractor.of(images.float() / 255) for images in (one, other)]
    assert features[0].shape == (40, 2048)
    fid = FrechetInceptionDistance(feature_extractor_weights_path=str(weights))
    fid.set_dtype(torch.float64)
    for images, real in ((one, True), (other, False)):
        fid.update(images.expand(-1, 3, -1, -1), real=real)
    own = frechet_distance(*(moments([part]) for part in features))
    assert own == pytest.approx(float(fid.compute()), rel=1e-4)


def test_weights_run_no_code(tmp_path: Path) -> None:
    class Wicked:
        def __reduce__(self):
            return Path.touch, (tmp_path / "pwned",)

    torch.save({"a": Wicked()}, tmp_path / "wicked.pth")
    with pytest.raises(UserError, match="Inception cannot be made of"):
        open_extractor(
            f"inception:{tmp_path}/wicked.pth", image_shape=(3, 16, 16), device=torch.device("cpu")
        )
    assert not (tmp_path / "pwned").exists()
    with (tmp_path / "wicked.pth").open("rb") as file:
        torch.load(file, weights_only=False)
    assert (tmp_path / "pwned").exists(), "the file would have"
