"""Who is where: data-parallel and expert-parallel ranks.

``rank = replica * expert_parallel_size + expert_rank``: the ranks that share one copy of the experts are neighbours, so
that they lie on one host and the all-to-all stays inside it. Every rank has samples of its own; dense parameters are
the same on all ranks, an expert's on the ranks with the same ``expert_rank``.

    world 4, expert-parallel size 2, 8 experts:      rank      0      1      2      3
                                                     replica   0      0      1      1
                                                     experts   0-3    4-7    0-3    4-7

Nothing here talks to another process: everything is checked before any group of processes is made.
"""

import math
from dataclasses import dataclass
from typing import Literal

from distmoe.contracts import UserError


@dataclass(frozen=True)
class Mesh:
    """The place of one rank among all; by default the only one.

    Attributes:
        world_size: Number of ranks.
        rank: This one.
        expert_parallel_size: Ranks that share one copy of the experts; divides the world.

    Raises:
        ValueError: A size below 1, a rank outside the world, a size that does not divide the world.
    """

    world_size: int = 1
    rank: int = 0
    expert_parallel_size: int = 1

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not in a world of {self.world_size}")
        if self.expert_parallel_size < 1 or self.world_size % self.expert_parallel_size:
            raise ValueError(
                f"the expert-parallel size ({self.expert_parallel_size}) must be one of "
                f"{divisors(self.world_size)}, the divisors of the {self.world_size} processes"
            )

    @property
    def expert_rank(self) -> int:
        """Which part of the experts this rank holds."""
        return self.rank % self.expert_parallel_size

    @property
    def replica(self) -> int:
        """Which copy of the experts it is a part of."""
        return self.rank // self.expert_parallel_size

    @property
    def num_replicas(self) -> int:
        """Copies of the experts."""
        return self.world_size // self.expert_parallel_size

    @property
    def expert_parallel_ranks(self) -> range:
        """The ranks that share this copy of the experts, this one among them."""
        first = self.replica * self.expert_parallel_size
        return range(first, first + self.expert_parallel_size)

    @property
    def expert_replica_ranks(self) -> range:
        """The ranks that hold the same experts as this one."""
        return range(self.expert_rank, self.world_size, self.expert_parallel_size)

    def local_experts(self, num_experts: int) -> range:
        """Global ids of this rank's experts.

        Raises:
            ValueError: The experts cannot be spread evenly.
        """
        share, rest = divmod(num_experts, self.expert_parallel_size)
        if rest:
            raise ValueError(
                f"{num_experts} experts cannot be spread evenly over {self.expert_parallel_size} ranks: allowed are "
                f"{common_divisors(self.world_size, num_experts)}"
            )
        return range(self.expert_rank * share, (self.expert_rank + 1) * share)

    def at(self, rank: int) -> "Mesh":
        """The place of another rank."""
        return Mesh(self.world_size, rank, self.expert_parallel_size)


def choose_mesh(
    world_size: int,
    rank: int,
    ranks_per_host: int,
    expert_parallel_size: int | Literal["auto"],
    num_experts: int | None,
) -> Mesh:
    """The mesh that ``parallel.expert_parallel_size`` asks for.

    Args:
        world_size: Number of ranks.
        rank: This one.
        ranks_per_host: Ranks on one host; all hosts have as many.
        expert_parallel_size: ``auto``: the largest size that divides the experts and the ranks of a host, so that the
            all-to-all stays inside it.
        num_experts: E of the configuration; None: a dense model.

    Raises:
        UserError: The size does not divide the world and the experts; the message lists what is allowed.
    """
    if expert_parallel_size == "auto":
        inside_host = math.gcd(world_size, ranks_per_host)
        return Mesh(world_size, rank, math.gcd(inside_host, num_experts) if num_experts else 1)
    if num_experts is None and expert_parallel_size > 1:
        raise UserError(
            f"parallel.expert_parallel_size ({expert_parallel_size}) must be 1 or auto for a model without experts"
        )
    allowed = common_divisors(world_size, num_experts or world_size)
    if expert_parallel_size not in allowed:
        raise UserError(
            f"parallel.expert_parallel_size ({expert_parallel_size}) must divide the number of processes "
            f"({world_size})" + (f" and moe.num_experts ({num_experts})" if num_experts else "") + ": set it to "
            f"{' or '.join(map(str, allowed))}, or auto"
        )
    return Mesh(world_size, rank, expert_parallel_size)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]


def common_divisors(one: int, other: int) -> list[int]:
    """What divides both, ascending."""
    return divisors(math.gcd(one, other))
