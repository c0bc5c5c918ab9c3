"""Kernel distance and overlap against brute force and torchmetrics; the Frechet distance against torchmetrics."""

import pytest
import torch
from torch import Tensor, nn

from vaescale.evaluation import quality
from vaescale.evaluation.frechet import frechet_distance, moments
from vaescale.evaluation.quality import Overlap, kernel_distance, overlap


def points(seed: int, count: int, size: int = 6, *, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


class Known(nn.Module):
    """For torchmetrics: images that are their own features."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


@pytest.mark.filterwarnings("ignore")  # torchmetrics warns of the memory that KID takes
def test_distances_are_those_of_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    images, samples = points(0, 300), points(1, 200, scale=1.3) + 0.2
    fid = FrechetInceptionDistance(Known(), input_img_size=(6, 1, 1)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(Known(), subsets=1, subset_size=200)
    for metric, real, fake in ((fid, images, samples), (kid, images[:200], samples)):
        metric.update(real.view(-1, 6, 1, 1), real=True)
        metric.update(fake.view(-1, 6, 1, 1), real=False)
    assert frechet_distance(moments([images]), moments([samples])) == pytest.approx(
        float(fid.compute()), rel=1e-4
    )
    assert kernel_distance(images[:200], samples) == pytest.approx(float(kid.compute()[0]), rel=1e-4)


def test_overlap_is_brute_force_s(monkeypatch: pytest.MonkeyPatch) -> None:
    images, samples = points(0, 60, 2), points(1, 50, 2) + 1.3
    distance = torch.cdist(images.double(), samples.double())

    def radius(of: Tensor, number: int) -> float:
        others = torch.cat([of[:number], of[number + 1 :]]).double()
        return float((others - of[number].double()).norm(dim=1).sort().values[4])

    reach = [radius(images, number) for number in range(60)]
    reach_back = [radius(samples, number) for number in range(50)]
    held = [[float(distance[i, j]) <= reach[i] for i in range(60)] for j in range(50)]
    wanted = Overlap(
        precision=sum(any(row) for row in held) / 50,
        recall=sum(any(float(distance[i, j]) <= reach_back[j] for j in range(50)) for i in range(60)) / 60,
        density=sum(map(sum, held)) / 5 / 50,
        coverage=sum(any(held[j][i] for j in range(50)) for i in range(60)) / 60,
    )
    for block in (7, 2000):
        monkeypatch.setattr(quality, "BLOCK", block)
        assert overlap(images, samples) == pytest.approx(wanted)
    assert 0 < wanted.precision < 1
    assert 0 < wanted.recall < 1


def test_the_same_distribution_is_near_and_another_is_far() -> None:
    images, same, far = points(0, 500), points(1, 500), points(2, 500) + 3
    assert abs(kernel_distance(images, same)) < 0.05 < kernel_distance(images, far)
    near, away = overlap(images, same), overlap(images, far)
    assert min(near) > 0.8
    assert max(away) < 0.1


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    images, samples = points(0, 30), points(1, 20)
    whole = kernel_distance(images, samples)
    monkeypatch.setattr(quality, "BLOCK", 7)
    assert kernel_distance(images, samples) == pytest.approx(whole, rel=1e-12)


def test_a_sample_at_the_edge_of_a_ball_is_within() -> None:
    """Kynkaanniemi et al. 2019, eq. 2. Of corners of a square, all distances are ties."""
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    beside = corners + torch.tensor([2.0, 0.0])
    found = overlap(corners, beside, neighbours=1)
    assert (found.precision, found.recall) == (0.5, 0.5), "with < it would be 0"
    assert (found.density, found.coverage) == (0.5, 0.5)
