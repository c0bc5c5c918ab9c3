"""A metric from outside the package: how sharp reconstructions are beside the images."""

from torch import Tensor

from vaescale.evaluation.reconstruction import Metric


def sharpness(x: Tensor, means: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels, of the reconstruction over the image's, [B]."""
    own, reference = ((image[..., 1:] - image[..., :-1]).abs().flatten(1).mean(1) for image in (means, x))
    return own / reference.clamp_min(1e-6)


SHARPNESS = Metric(
    "mean absolute difference of neighbouring pixels, over the image's", sharpness, more_is_better=True
)
