"""Inception's features, where torch-fidelity and its torchvision can be had: torchmetrics' numbers, and no code from its weights."""

import os
import pickle
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from vaescale.errors import UserError
from vaescale.evaluation.features import WEIGHTS_ONLY, no_code_from_pickles, open_extractor
from vaescale.evaluation.frechet import frechet_distance, moments

try:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    WHY = ""
except Exception as error:  # a torchvision of another torch raises what it likes
    WHY = str(error)
needs_inception = pytest.mark.skipif(bool(WHY), reason=f"torch-fidelity cannot be imported: {WHY}")
HERE = {"image_shape": (1, 16, 16), "device": torch.device("cpu")}


# Harmless, and refused all the same: it is no tensor, and no class that torch takes for one.
NO_TENSOR = {"a": Fraction(1, 2)}


def test_a_full_unpickling_is_refused_where_it_is_asked_for(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv(WEIGHTS_ONLY, raising=False)
    torch.save(NO_TENSOR, tmp_path / "other.pth")
    with no_code_from_pickles(), pytest.raises(pickle.UnpicklingError, match="Fraction"):
        torch.load(tmp_path / "other.pth", weights_only=False)
    assert WEIGHTS_ONLY not in os.environ
    assert torch.load(tmp_path / "other.pth", weights_only=False) == NO_TENSOR, "the refusal has ended"
    monkeypatch.setenv(WEIGHTS_ONLY, "0")
    with no_code_from_pickles():
        assert os.environ[WEIGHTS_ONLY] == "1"
    assert os.environ[WEIGHTS_ONLY] == "0"


@pytest.mark.skipif(not WHY, reason="torch-fidelity can be imported")
def test_what_inception_needs_is_said(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"needs torch-fidelity and torchvision \(torch|cannot be built from"):
        open_extractor(f"inception:{tmp_path}/weights.pth", **HERE)


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


@needs_inception
def test_distances_are_torchmetrics_fid(weights: Path) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, 256, (40, 1, 16, 16), generator=generator, dtype=torch.uint8)
    other = torch.randint(0, 128, (50, 1, 16, 16), generator=generator, dtype=torch.uint8)
    extractor = open_extractor(f"inception:{weights}", **HERE)
    assert "not torch-fidelity's" in extractor.description
    features = [extractor.of(images.float() / 255) for images in (one, other)]
    assert features[0].shape == (40, 2048)
    fid = FrechetInceptionDistance(feature_extractor_weights_path=str(weights))
    fid.set_dtype(torch.float64)
    for images, real in ((one, True), (other, False)):
        fid.update(images.expand(-1, 3, -1, -1), real=real)
    own = frechet_distance(*(moments([part]) for part in features))
    assert own == pytest.approx(float(fid.compute()), rel=1e-4)


@needs_inception
def test_weights_run_no_code(tmp_path: Path) -> None:
    torch.save(NO_TENSOR, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"Inception cannot be built from .* \(UnpicklingError"):
        open_extractor(f"inception:{tmp_path}/other.pth", **HERE)
