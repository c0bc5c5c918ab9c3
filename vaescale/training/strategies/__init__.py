"""Training layouts: the whole model on each device, or a partitioned one. The launcher's configuration selects one.

To add one, write a file with a subclass of `Strategy`, and add a line to STRATEGIES and a recipes/backends/NAME.yaml.
"""

from vaescale.config import import_named
from vaescale.training.strategies.base import Strategy

# By name, because torch's FSDP alone takes 0.6 s to import.
STRATEGIES = {
    "ddp": "vaescale.training.strategies.base.Strategy",
    "zero": "vaescale.training.strategies.zero.Zero",
    "fsdp2": "vaescale.training.strategies.fsdp2.FullyShard",
}

__all__ = ["STRATEGIES", "Strategy", "strategy_class"]


def strategy_class(key: str) -> type[Strategy]:
    """Import the class of a key of STRATEGIES."""
    strategy: type[Strategy] = import_named(STRATEGIES[key])
    return strategy
