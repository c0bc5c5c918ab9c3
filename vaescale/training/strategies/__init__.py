"""How training lies on the devices: whole on each of them, or in parts. The launcher's configuration chooses.

To add one, write its file, a subclass of `Strategy`, add a line to STRATEGIES and a recipes/backends/NAME.yaml.
"""

from vaescale.training.strategies.base import Strategy
from vaescale.training.strategies.fsdp2 import FullyShard
from vaescale.training.strategies.zero import Zero

STRATEGIES: dict[str, type[Strategy]] = {"ddp": Strategy, "zero": Zero, "fsdp2": FullyShard}

__all__ = ["STRATEGIES", "Strategy"]
