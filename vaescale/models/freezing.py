"""Parts of a model that are not trained: `network.freeze`."""

from collections.abc import Collection, Sequence

from torch import nn

from vaescale.errors import UserError
from vaescale.models.vae import VAE

PARTS = ("encoder", "decoder")


def freeze(model: VAE, parts: Sequence[str]) -> None:
    """Take the parameters of parts of the network out of training: no gradient, no optimizer state.

    parts: `encoder`, `decoder`, or names of layers of the network. A layer all of whose parameters are frozen stays in evaluation
    mode: batch normalization uses and keeps its running statistics. Raises UserError for other names, and when nothing is left
    to train.
    """
    if not parts:
        return
    for part in parts:
        names = named(model, part)
        for name, parameter in model.network.named_parameters():
            if name in names:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"network.freeze (={','.join(parts)}) leaves nothing to train; leave a part out")
    model.frozen = tuple(module for module in model.network.modules() if _is_frozen(module))


def named(model: VAE, part: str) -> Collection[str]:
    """The names of the network's parameters in a part. Raises UserError for a part that it does not have."""
    network = model.network
    names = [name for name, _ in network.named_parameters()]
    if part in PARTS:
        return {name for name in names if network.part_of(name) == part}
    within = {name for name in names if name == part or name.startswith(f"{part}.")}
    if not within:
        known = [*PARTS, *dict.fromkeys(name.rpartition(".")[0] or name for name in names)]
        raise UserError(
            f"network.freeze names {part!r}, which the network does not have; known here: {', '.join(known[:12])}"
            + (", ..." if len(known) > 12 else "")
        )
    return within


def _is_frozen(module: nn.Module) -> bool:
    parameters = [*module.parameters()]
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
