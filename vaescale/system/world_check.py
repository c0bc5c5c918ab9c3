"""Whether the processes that an environment and options describe can exist. A contradiction is one sentence with the remedy."""

from vaescale.errors import UserError
from vaescale.system.world import MOST_PORT, UNKNOWN, World

MOST_NODES = 100_000


def refuse_incomplete(world: World) -> None:
    """Raise UserError if the world lacks this node's number or the first node's address, or a number or address is impossible."""
    _refuse_impossible(world)
    if world.rank is not None:
        if world.address is None and not world.joined:
            raise UserError(
                f"{world.source} started {world.size} processes on several nodes and does not tell the address of the one with "
                "rank 0: set MASTER_ADDR (`mpirun -x MASTER_ADDR=HOST` or `mpirun -genv MASTER_ADDR HOST`), or pass --address HOST"
            )
        return
    if world.node == UNKNOWN:
        raise UserError(
            f"there are {world.nodes} nodes, and no variable tells which one this is: set PET_NODE_RANK, or pass --node N"
        )
    if not 0 <= world.node < world.nodes:
        raise UserError(
            f"the number of this node (={world.node}) must be below the number of nodes (={world.nodes})"
        )
    if world.nodes > 1 and not world.address and not world.srun:
        raise UserError(
            f"there are {world.nodes} nodes, and no variable tells the address of node 0: set PET_MASTER_ADDR, or pass "
            "--address HOST"
        )


def _refuse_impossible(world: World) -> None:
    """Raise UserError for numbers that contradict each other, and for an address that is none."""
    if world.nodes > MOST_NODES:
        raise UserError(f"{world.source}: the number of nodes (={world.nodes}) must be at most {MOST_NODES}")
    if world.rank is not None and world.size is not None and world.rank >= world.size:
        raise UserError(
            f"{world.source}: the rank (={world.rank}) must be below the number of ranks (={world.size})"
        )
    if not world.joined and world.local_rank >= world.local_size:
        raise UserError(
            f"{world.source}: the rank on this node (={world.local_rank}) must be below their number (={world.local_size})"
        )
    if not 1 <= world.port <= MOST_PORT:
        raise UserError(f"{world.source}: the port (={world.port}) must be from 1 to {MOST_PORT}")
    # One colon comes before a port, several belong to an address of IPv6.
    if world.address and (set(world.address) & set(" []/") or world.address.count(":") == 1):
        raise UserError(
            f"{world.source}: the address of the first node (={world.address!r}) must be a name or an address alone: pass the "
            "port with MASTER_PORT or --port, and an address of IPv6 without brackets"
        )
