"""The order of frames that the classifier of videos learns to tell."""

import torch

from vaescale import noise
from vaescale.perceptual.video_classifier import permuted


def test_permuted_sequences_are_never_in_order() -> None:
    """Of three frames, one draw in six of all orders would be the true one."""
    frames = torch.arange(3.0).expand(600, 3)
    order = permuted(frames, noise.Stream(0, 0, torch.arange(600)))
    assert (order != frames).any(1).all()
    assert {tuple(row) for row in order.tolist()} == {
        (0.0, 2.0, 1.0),
        (1.0, 0.0, 2.0),
        (1.0, 2.0, 0.0),
        (2.0, 0.0, 1.0),
        (2.0, 1.0, 0.0),
    }
