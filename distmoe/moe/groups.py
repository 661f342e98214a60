"""Routing groups: the tokens among which capacity, priority, expert choice and Soft MoE act.

A group is cut in sample order from the micro-batch, so that it is the same in every layout: the tokens of one image, of
N images, or of the whole micro-batch. The last group may have fewer tokens.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distmoe.contracts import Context
from distmoe.moe.sums import Reducer

Group = Literal["image", "batch"] | int


@dataclass(frozen=True)
class RoutingGroups:
    """T rows as G groups of N, the last one filled up where T is not a multiple.

    Attributes:
        num_rows: T.
        group_rows: N, rows of a full group.
    """

    num_rows: int
    group_rows: int

    @classmethod
    def of(cls, num_rows: int, context: Context, group: Group) -> "RoutingGroups":
        """The groups that ``moe.gate.group`` means for this many rows.

        Args:
            num_rows: T.
            context: Its ``rows_per_sample`` is the size of an image.
            group: ``image``, a number of images, or ``batch``.

        Raises:
            ValueError: See :func:`check_group`.
        """
        check_group(group)
        if group == "batch":
            return cls(num_rows, max(num_rows, 1))
        images = 1 if group == "image" else group
        return cls(num_rows, max(context.rows_per_sample * images, 1))

    @property
    def num_groups(self) -> int:
        """G; 0 without rows."""
        return -(-self.num_rows // self.group_rows)

    def capacities(self, factor: float, k: int, num_experts: int, device: torch.device) -> Tensor:
        """(G,) int64 rows that an expert takes from each group, see :func:`expert_capacity`."""
        full = expert_capacity(factor, k, self.group_rows, num_experts)
        capacities_G = torch.full((self.num_groups,), full, dtype=torch.long, device=device)
        rest = self.num_rows % self.group_rows
        if rest:
            capacities_G[-1] = expert_capacity(factor, k, rest, num_experts)
        return capacities_G

    def ids(self, device: torch.device) -> Tensor:
        """(T,) int64 group of each row."""
        return torch.arange(self.num_rows, device=device) // self.group_rows

    def fold(self, x_T: Tensor, fill: float = 0.0) -> Tensor:
        """(T, ...) to (G, N, ...), missing rows of the last group filled with ``fill``."""
        missing = self.num_groups * self.group_rows - self.num_rows
        if missing:
            x_T = F.pad(x_T, (0, 0) * (x_T.dim() - 1) + (0, missing), value=fill)
        return x_T.reshape(self.num_groups, self.group_rows, *x_T.shape[1:])

    def unfold(self, x_GN: Tensor) -> Tensor:
        """(G, N, ...) back to (T, ...)."""
        return x_GN.flatten(0, 1)[: self.num_rows]


@dataclass(frozen=True)
class SharedRows:
    """The rows that routing groups are cut from: this rank's, or with the group ``batch`` those of all ranks.

    Attributes:
        groups: Of all these rows.
        own: This rank's among them.
        across_ranks: Whether they are those of several ranks.
        reducer: Over the ranks.
    """

    groups: RoutingGroups
    own: range
    across_ranks: bool
    reducer: Reducer

    @classmethod
    def of(cls, num_rows: int, context: Context, group: Group, reducer: Reducer, device: torch.device) -> "SharedRows":
        """The rows of ``moe.gate.group``. With ``batch`` collective: ranks may have unequal numbers of rows, or none.

        Args:
            num_rows: T, of this rank.
            context: See :meth:`RoutingGroups.of`.
            group: As there. Groups of images must not reach over ranks, see :func:`check_groups`.
            reducer: Over the ranks whose tokens make up a micro-batch.
            device: That the reducer works on.

        Raises:
            ValueError: See :func:`check_group`.
        """
        if group != "batch" or reducer.world_size == 1:
            return cls(RoutingGroups.of(num_rows, context, group), range(num_rows), False, reducer)
        rows_R = torch.zeros(reducer.world_size, dtype=torch.long, device=device)
        rows_R[reducer.rank] = num_rows
        rows = reducer({"rows_R": rows_R})["rows_R"].tolist()
        start = sum(rows[: reducer.rank])
        return cls(RoutingGroups.of(sum(rows), context, group), range(start, start + num_rows), True, reducer)

    def gather(self, values_T: Tensor) -> Tensor:
        """The values of all rows from those of this rank's. Collective where there are several ranks."""
        return self.reducer.gather(values_T) if self.across_ranks else values_T

    def share(self, values: Tensor) -> Tensor:
        """This rank's of the values of all rows."""
        return values[self.own.start : self.own.stop]


def check_groups(group: Group, samples_per_rank: int, world_size: int) -> None:
    """Refuses groups of images that would reach over several ranks.

    Args:
        group: As ``moe.gate.group``.
        samples_per_rank: Samples of each rank in a whole micro-batch.
        world_size: Number of ranks.

    Raises:
        ValueError: See :func:`check_group`; a number of images that does not divide a rank's.
    """
    check_group(group)
    if isinstance(group, int) and world_size > 1 and samples_per_rank % group:
        allowed = [number for number in range(1, samples_per_rank + 1) if samples_per_rank % number == 0]
        raise ValueError(
            f"group ({group}) must divide the {samples_per_rank} images that each of {world_size} processes has of a "
            f"micro-batch: set it to {', '.join(map(str, allowed))}, image or batch"
        )


def check_group(group: Group) -> None:
    """Refuses what is no :data:`Group`.

    Raises:
        ValueError: Another name, a number of images below 1.
    """
    if group in ("image", "batch"):
        return
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise ValueError(f"group ({group!r}) must be image, batch, or a number of images of 1 or more")


def expert_capacity(factor: float, k: int, group_rows: int, num_experts: int) -> int:
    """``ceil(factor * k * n / E)``: rows an expert takes from a group of n, of which it sees none twice.

    Without rounding, the factor read as the decimal that it is written as: in float32, 1/7 * 7 can come out above 1,
    and its ceiling is 2.

    Args:
        factor: As a multiple of the even share; above 0 and finite.
        k: Choices of each row.
        group_rows: n.
        num_experts: E.
    """
    return min(math.ceil(Fraction(str(factor)) * k * group_rows / num_experts), group_rows)
