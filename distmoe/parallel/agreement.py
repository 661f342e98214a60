"""The checked mode of exchanges: before each one, every rank says what it is about to do, and all compare.

Without it, gloo takes what does not fit for what does, or ends the process; NCCL waits. See
``parallel.checked_exchanges``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

Operation = Literal["all-to-all", "all-gather", "all-reduce"]

_OPERATIONS: tuple[Operation, ...] = get_args(Operation)
_DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_AXES = 8  # of a shape, as many as are compared


class ExchangeMismatchError(RuntimeError):
    """Ranks do not agree on what they exchange next."""


@dataclass(frozen=True)
class Announcement:
    """What one rank is about to do.

    Attributes:
        operation: Which exchange.
        dtype: Of its tensor.
        num_rows: Size of the first axis; -1: it has none.
        trailing: Sizes of the other axes, the first eight of them.
        send: Of an all-to-all, rows for each member of the group.
        receive: Rows that it expects from each.
    """

    operation: Operation
    dtype: torch.dtype
    num_rows: int
    trailing: tuple[int, ...]
    send: tuple[int, ...] = ()
    receive: tuple[int, ...] = ()

    @classmethod
    def of(cls, operation: Operation, tensor: Tensor, send: Sequence[int], receive: Sequence[int]) -> Self:
        """For an exchange of this tensor."""
        num_rows, *trailing = tensor.shape if tensor.dim() else (-1,)
        return cls(operation, tensor.dtype, num_rows, tuple(trailing[:_AXES]), tuple(send), tuple(receive))

    def encoded(self, group_size: int) -> list[int]:
        """As integers, equally many whatever is announced."""
        kind = [_OPERATIONS.index(self.operation), _DTYPES.index(self.dtype), self.num_rows]
        splits = [*_filled(self.send, group_size), *_filled(self.receive, group_size)]
        return kind + _filled(self.trailing, _AXES) + splits

    @classmethod
    def decoded(cls, numbers: Sequence[int], group_size: int) -> Self:
        """What :meth:`encoded` has made integers of."""
        operation, dtype, num_rows, *rest = numbers
        trailing, send, receive = rest[:_AXES], rest[_AXES:-group_size], rest[-group_size:]
        return cls(
            _OPERATIONS[operation], _DTYPES[dtype], num_rows, _unfilled(trailing), _unfilled(send), _unfilled(receive)
        )

    def __str__(self) -> str:
        """``all-to-all of float32, rows of shape [4]``, or the whole shape where there are no splits."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.operation == "all-to-all":
            return f"{self.operation} of {dtype}, rows of shape {list(self.trailing)}"
        return f"{self.operation} of {dtype}, shape {[self.num_rows, *self.trailing] if self.num_rows >= 0 else []}"


def check_agreement(group: str, ranks: Sequence[int], announced: Sequence[Announcement]) -> None:
    """Compares what the members of a group are about to do; all of them come to the same result.

    Args:
        group: Name of the group.
        ranks: Its members.
        announced: By each of them.

    Raises:
        ExchangeMismatchError: They do not fit; the message says who announces what.
    """
    members = list(zip(ranks, announced, strict=True))
    kinds = {str(one): [rank for rank, other in members if str(other) == str(one)] for one in announced}
    wrong = [f"{_names(of_kind)}: {kind}" for kind, of_kind in kinds.items()] if len(kinds) > 1 else []
    if not wrong and announced[0].operation == "all-to-all":
        wrong += [
            f"rank {rank} has {one.num_rows} rows and sends {sum(one.send)}"
            for rank, one in members
            if one.num_rows != sum(one.send)
        ]
        wrong += [
            f"rank {source} sends {sent} rows to rank {target}, which expects {expected}"
            for place, (source, one) in enumerate(members)
            for (target, other), sent in zip(members, one.send, strict=True)
            if (expected := other.receive[place]) != sent
        ]
    if wrong:
        raise ExchangeMismatchError(
            f"ranks of the {group} group do not agree on their next exchange: {'; '.join(wrong)}"
        )


def _names(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _filled(sizes: Sequence[int], length: int) -> list[int]:
    return [*sizes, *[-1] * (length - len(sizes))]


def _unfilled(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for size in sizes if size >= 0)
