"""What groups of processes exchange: all-to-all of rows, sums, gathers; differentiable, in one place.

Everything goes through a *communicator module*: ``torch.distributed``, or ``deepspeed.comm`` under DeepSpeed's engine,
which have the same functions. Every function that exchanges something says so: "Collective".
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from distmoe.moe.sums import Reducer, Sums
from distmoe.parallel.agreement import Announcement, Operation, check_agreement
from distmoe.parallel.mesh import Mesh

Observe = Callable[[str, int], AbstractContextManager[object]]
"""Called around each exchange with its name (``all-to-all in expert-parallel group``) and the bytes it takes elsewhere.

What stays on this rank does not count. An all-to-all is started and waited for: two calls, the second with 0 bytes. A
sum counts as in a ring of n ranks: ``2 (n - 1) / n`` of the tensor.
"""


def unobserved(what: str, num_bytes: int) -> AbstractContextManager[object]:
    """Takes no notice."""
    del what, num_bytes
    return nullcontext()


class Communicator:
    """One group of processes. A group of one process exchanges nothing and needs no process group.

    Args:
        ranks: Of its processes, ascending.
        rank: This process, one of them.
        name: For messages: ``world``, ``expert-parallel``, ``expert-replicas``.
        group: The process group; None: all processes.
        module: ``torch.distributed`` or ``deepspeed.comm``.
        checked: Compare shapes and counts over the group before each exchange, see ``parallel.checked_exchanges``.
        observe: See :data:`Observe`.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        name: str = "world",
        group: Any = None,
        module: Any = dist,
        checked: bool = False,
        observe: Observe = unobserved,
    ) -> None:
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(rank)
        self.name = name
        self.group = group
        self.module = module
        self.checked = checked
        self.observe = observe

    def __deepcopy__(self, memo: Any) -> "Communicator":
        """A copied model talks to the same processes."""
        del memo
        return self

    def exchange(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        meanwhile: Callable[[], object] | None = None,
    ) -> Tensor:
        """All-to-all of rows with uneven splits. Collective; differentiable, twice as well.

        Args:
            rows: (sum of send, ...) rows for member 0 of the group, then for member 1, ...
            send: Rows for each member; may be 0.
            receive: Rows from each member.
            meanwhile: Called while the rows travel. What autograd does for it in the backward pass then happens while
                the gradients travel.

        Returns:
            (sum of receive, ...) rows from member 0, then from member 1, ...
        """
        if self.size == 1:
            if meanwhile is not None:
                meanwhile()
            return rows
        passage = _Passage(self, tuple(send), tuple(receive))
        # Autograd runs nodes in the opposite order of their creation, so meanwhile is between the two there as well.
        token = _Start.apply(rows, passage)
        if meanwhile is not None:
            meanwhile()
        exchanged: Tensor = _Wait.apply(token, passage)
        return exchanged

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the group, in its dtype. Collective; its gradient is the sum of the members' gradients."""
        total: Tensor = _Sum.apply(tensor, self)
        return total

    def gather(self, rows_T: Tensor) -> Tensor:
        """The rows of all members, in their order; each may have another number. Collective.

        The gradient of a member's rows is the sum of what all members' results pass back to them.
        """
        counts = self.gather_equal(torch.tensor([len(rows_T)], device=rows_T.device)).flatten().tolist()
        rows: Tensor = _Gather.apply(rows_T, self, tuple(counts))
        return rows

    @torch.no_grad()
    def gather_equal(self, tensor: Tensor) -> Tensor:
        """(members, ...): the tensors of all members, which have one shape. Collective; without gradient."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        self._check("all-gather", tensor)
        return self._gathered("all-gather", tensor)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a contiguous tensor in place, without gradient. Collective."""
        if self.size > 1:
            self._check("all-reduce", tensor)
            with self._observed("all-reduce", 2 * (self.size - 1) * tensor.nbytes // self.size):
                self.module.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def exchange_rows(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """As :meth:`exchange`, without gradient."""
        return rows if self.size == 1 else self.start(rows, send, receive)()

    def start(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Callable[[], Tensor]:
        """As :meth:`exchange_rows`, but returns at once: what it returns waits for the rows. Collective."""
        self._check("all-to-all", rows, send, receive)
        rows = rows.contiguous()
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        row_bytes = rows.shape[1:].numel() * rows.itemsize
        with self._observed("all-to-all", (sum(send) - send[self.rank]) * row_bytes):
            work = self.module.all_to_all_single(
                received,
                rows,
                output_split_sizes=list(receive),
                input_split_sizes=list(send),
                group=self.group,
                async_op=True,
            )

        def wait() -> Tensor:
            with self._observed("all-to-all", 0):
                work.wait()
            return received

        return wait

    def _gathered(self, what: str, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty((self.size, *tensor.shape))
        with self._observed(what, (self.size - 1) * tensor.nbytes):
            self.module.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=self.group)
        return gathered

    @torch.no_grad()
    def _check(
        self, operation: Operation, tensor: Tensor, send: Sequence[int] = (), receive: Sequence[int] = ()
    ) -> None:
        if self.checked:
            numbers = Announcement.of(operation, tensor, send, receive).encoded(self.size)
            said = self._gathered("check of exchanges", torch.tensor(numbers, device=tensor.device)).tolist()
            check_agreement(self.name, self.ranks, [Announcement.decoded(one, self.size) for one in said])

    def _observed(self, what: str, num_bytes: int) -> AbstractContextManager[object]:
        return self.observe(f"{what} in {self.name} group", num_bytes)


@dataclass
class _Passage:
    """What the two nodes of an exchange have in common.

    Attributes:
        communicator: Of the exchange.
        send: Rows for each member.
        receive: Rows from each member.
        wait: Of the rows that travel, or in the backward pass of their gradients; None while nothing does.
    """

    communicator: Communicator
    send: tuple[int, ...]
    receive: tuple[int, ...]
    wait: Callable[[], Tensor] | None = None

    def arrived(self) -> Tensor:
        """What has travelled; it is not kept."""
        assert self.wait is not None, "nothing travels"
        wait, self.wait = self.wait, None
        return wait()


class _Start(Function):
    """Rows leave; in the backward pass, gradients arrive. Its result only ties it to :class:`_Wait`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, passage: _Passage) -> Tensor:
        ctx.passage = passage
        passage.wait = passage.communicator.start(rows, passage.send, passage.receive)
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, tie: Tensor) -> tuple[Tensor, None]:
        del tie
        return ctx.passage.arrived(), None


class _Wait(Function):
    """Rows arrive; in the backward pass, gradients leave."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, passage: _Passage) -> Tensor:
        del token
        ctx.passage = passage
        return passage.arrived()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        passage = ctx.passage
        if torch.is_grad_enabled():  # somebody differentiates twice: an exchange that can be
            passage.wait = partial(passage.communicator.exchange, grad, passage.receive, passage.send)
        else:
            passage.wait = passage.communicator.start(grad, passage.receive, passage.send)
        return grad.new_zeros(()), None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, communicator: Communicator) -> Tensor:
        ctx.communicator = communicator
        return communicator.sum_(tensor.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.communicator.sum(grad), None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, rows_T: Tensor, communicator: Communicator, counts: tuple[int, ...]) -> Tensor:
        ctx.communicator, ctx.counts = communicator, counts
        longest = max(counts)
        padded = rows_T.new_zeros((longest, *rows_T.shape[1:]))
        padded[: len(rows_T)] = rows_T
        gathered = communicator.gather_equal(padded)
        return torch.cat([member[:count] for member, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        summed = ctx.communicator.sum(grad)
        start = sum(ctx.counts[: ctx.communicator.rank])
        return summed[start : start + ctx.counts[ctx.communicator.rank]], None, None


class SumReducer(Reducer):
    """The :class:`distmoe.moe.sums.Reducer` over a group.

    A loss that every rank computes alike from these sums, back-propagated on every rank and averaged over ranks, has
    exactly the gradient of the one-process loss: the backward of the sum is the sum.

    Args:
        communicator: Of the group.
    """

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.rank = communicator.rank
        self.world_size = communicator.size

    def __call__(self, sums: Sums) -> Sums:
        """See the protocol. Tensors of one dtype travel together."""
        reduced = dict(sums)
        if self.world_size > 1:
            for dtype in sorted({value.dtype for value in sums.values()}, key=str):
                names = [name for name, value in sums.items() if value.dtype == dtype]
                flat = self.communicator.sum(torch.cat([sums[name].reshape(-1) for name in names]))
                parts = flat.split([sums[name].numel() for name in names])
                reduced |= {name: part.view(sums[name].shape) for name, part in zip(names, parts, strict=True)}
        return reduced

    def gather(self, rows_T: Tensor) -> Tensor:
        """See the protocol."""
        return self.communicator.gather(rows_T) if self.world_size > 1 else rows_T


@dataclass(frozen=True)
class Communicators:
    """The groups of a mesh, as this rank sees them.

    Attributes:
        mesh: Who is where.
        world: All ranks.
        expert_parallel: The ranks that share this copy of the experts.
        expert_replicas: The ranks that hold the same experts.
    """

    mesh: Mesh
    world: Communicator
    expert_parallel: Communicator
    expert_replicas: Communicator

    @staticmethod
    def of(mesh: Mesh, checked: bool = False, observe: Observe = unobserved) -> "Communicators":
        """New groups in ``torch.distributed``, which must be initialised where there are several ranks. Collective."""
        world, experts, replicas = None, None, None
        if mesh.world_size > 1:
            # Every rank makes all groups, in the same order.
            if 1 < mesh.expert_parallel_size < mesh.world_size:
                for first in range(0, mesh.world_size, mesh.expert_parallel_size):
                    ranks = mesh.at(first).expert_parallel_ranks
                    made = dist.new_group(list(ranks))
                    experts = made if mesh.rank in ranks else experts
            if 1 < mesh.num_replicas < mesh.world_size:  # otherwise they are alone, or all
                for first in range(mesh.expert_parallel_size):
                    ranks = mesh.at(first).expert_replica_ranks
                    made = dist.new_group(list(ranks))
                    replicas = made if mesh.rank in ranks else replicas
        return Communicators.over(mesh, world, experts, replicas, dist, checked, observe)

    @staticmethod
    def over(
        mesh: Mesh, world: Any, experts: Any, replicas: Any, module: Any, checked: bool, observe: Observe
    ) -> "Communicators":
        """Of groups that are there already.

        Args:
            mesh: Who is where.
            world: Process group of all ranks; None: the default one.
            experts: Of :attr:`expert_parallel`.
            replicas: Of :attr:`expert_replicas`.
            module: See :class:`Communicator`.
            checked: See :class:`Communicator`.
            observe: See :class:`Communicator`.
        """

        def communicator(ranks: range, name: str, group: Any) -> Communicator:
            return Communicator(ranks, mesh.rank, name, group, module, checked, observe)

        return Communicators(
            mesh,
            communicator(range(mesh.world_size), "world", world),
            communicator(mesh.expert_parallel_ranks, "expert-parallel", experts),
            communicator(mesh.expert_replica_ranks, "expert-replicas", replicas),
        )
