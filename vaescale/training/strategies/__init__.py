"""Training layouts: the whole model on each device, or a partitioned one. The launcher's configuration selects one.

To add one, write a file with a subclass of `Strategy`, and add a line to STRATEGIES and a recipes/backends/NAME.yaml.
"""

from vaescale.training.strategies.base import Strategy
from vaescale.training.strategies.fsdp2 import FullyShard
from vaescale.training.strategies.zero import Zero

STRATEGIES: dict[str, type[Strategy]] = {"ddp": Strategy, "zero": Zero, "fsdp2": FullyShard}

__all__ = ["STRATEGIES", "Strategy"]
