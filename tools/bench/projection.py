"""A model of a data-parallel training step on many devices, from counts and a few constants. Used by `scaling.py`.

    step = forward + backward + the part of the gradients' exchange that the backward pass does not hide + small exchanges

Gradients are exchanged in buckets, one after the other, each as soon as the backward pass has filled it. An all-reduce is a
reduce-scatter in each node, an all-reduce between the nodes of what each device holds, and a gather in each node.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

BUCKET_ELEMENTS = 1 << 12  # an exchange of more values is one of gradients
SHARE = 0.95  # of the speed without an exchange, that a step should reach


class Link(NamedTuple):
    """What connects devices. latency: seconds of one message; speed: bytes a second, of each device in each direction."""

    latency: float
    speed: float


class Cluster(NamedTuple):
    """Nodes of `per_node` devices: the link of two devices in a node, and of two nodes, for each device."""

    per_node: int
    inside: Link
    between: Link


class Exchanges(NamedTuple):
    """What a step exchanges: the bytes of each bucket of gradients in order, and the number of small sums."""

    buckets: tuple[int, ...]
    small: int

    @classmethod
    def of(cls, elements: Sequence[int], *, element_bytes: int = 4) -> "Exchanges":
        """From the number of values in each all-reduce of a step, in order."""
        buckets = tuple(number * element_bytes for number in elements if number > BUCKET_ELEMENTS)
        return cls(buckets, len(elements) - len(buckets))


class Compute(NamedTuple):
    """Seconds of a step on one device, and of its backward pass."""

    step: float
    backward: float


def all_reduce_seconds(size: float, devices: int, cluster: Cluster) -> float:
    """The time in which `devices` sum `size` bytes."""
    inside = min(devices, cluster.per_node)
    nodes = math.ceil(devices / cluster.per_node)
    steps = 2 * math.ceil(math.log2(inside)), 2 * math.ceil(math.log2(nodes))  # of a tree, there and back
    latency = steps[0] * cluster.inside.latency + steps[1] * cluster.between.latency
    shares = 2 * (inside - 1) / inside / cluster.inside.speed
    shares += 2 * (nodes - 1) / nodes / inside / cluster.between.speed
    return latency + size * shares


def step_seconds(compute: Compute, exchanges: Exchanges, devices: int, cluster: Cluster) -> float:
    """The time of a step."""
    if devices == 1:
        return compute.step
    filled, free, whole = 0, 0.0, sum(exchanges.buckets)
    for size in exchanges.buckets:
        filled += size
        free = max(free, compute.backward * filled / whole) + all_reduce_seconds(size, devices, cluster)
    hidden = max(0.0, free - compute.backward)
    return compute.step + hidden + exchanges.small * all_reduce_seconds(8, devices, cluster)


def least_step(exchanges: Exchanges, devices: int, cluster: Cluster, *, backward: float = 2 / 3) -> float:
    """The shortest step in seconds, without exchange, that reaches SHARE of its speed. backward: its share of the step."""
    low, high = 1e-6, 1e4
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        reached = middle / step_seconds(Compute(middle, backward * middle), exchanges, devices, cluster)
        low, high = (low, middle) if reached >= SHARE else (middle, high)
    return high
