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
