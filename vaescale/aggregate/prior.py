"""The prior of the fitted latents in the model, which a mixture replaces."""

import torch

from vaescale import comm
from vaescale.aggregate.latents import ShardLatents
from vaescale.mixtures.points import Points
from vaescale.models.vae import VAE

BATCH = 4096


def prior_nats(model: VAE, val: Points | ShardLatents) -> float:
    """The mean log density in nats of held-out draws under the model's prior of the same latents."""
    total = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        for z, _ in val.parts():
            for batch in torch.split(z, BATCH):
                total += model.prior_log_density(batch).double().sum().cpu()
    return float(comm.all_reduce_sum(total)) / val.count


def replaces(model: VAE, groups: int) -> str:
    """A phrase that names the prior replaced by a mixture of the first `groups` groups."""
    number = len(model.group_sizes)
    if number == 1:
        return "the prior N(0, I) of all latents"
    if groups == number:
        return f"the prior of all {groups} groups, together"
    which = "the top group" if groups == 1 else f"the first {groups} groups, together,"
    return f"the prior of {which} of {number}; the other groups keep theirs"
