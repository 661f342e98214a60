"""Expert parallelism: experts spread over ranks, tokens sent to them and back by all-to-all.

Letters as in ``moe/``: T tokens on this rank, A assignments, R rows received by this rank's experts, E experts in all,
L on this rank. And U *pairs* (token, rank) that this rank sends: a token whose k experts live on one rank travels there
once, and once back, whatever k is; V pairs that it receives.

One way there, of T = 3 tokens to E = 4 experts on 2 ranks, k = 2 (this is rank 0; rank 1 does the same)::

    assignments     token 0 -> 0, 2     token 1 -> 0, 1     token 2 -> 2, 3
    pairs           (0, rank 0) (1, rank 0) | (0, rank 1) (2, rank 1)      4 rows travel instead of 6
    after exchange  rows of the pairs from rank 0, from rank 1, ...
    rows            of expert 0 from rank 0, from rank 1; of expert 1 from rank 0, ...
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distmoe.moe.dispatch import (
    Dispatcher,
    LocalDispatcher,
    Meanwhile,
    Placement,
    RowMap,
    Tensors,
    counts,
    expert_order,
    inverse,
)
from distmoe.moe.sums import Reducer, no_reduction
from distmoe.parallel.collectives import Communicator, Communicators, SumReducer

Overlap = Literal["none", "shared"]
"""What runs while tokens travel."""


@dataclass(frozen=True)
class AllToAllPlan:
    """The way back of :class:`AllToAllDispatcher`: integers only.

    Attributes:
        order_A: Assignment of each place when they are sorted by expert, then token: the order in which they are sent.
        row_ids_A: Token of each of these places.
        sent: From tokens to the pairs that this rank sends.
        received: From the pairs that it receives to its experts' rows.
        order_R: Of each of the experts' rows, its place among the assignments as they arrived: by source rank.
        pairs_out: Pairs sent to each rank.
        pairs_in: Pairs received from each rank.
        assignments_out: Assignments of this rank's tokens to each rank's experts.
        assignments_in: Assignments of each rank's tokens to this rank's experts.
        num_pairs: Of the whole group, those aside that stay on their rank.
        num_assignments: Likewise.
    """

    order_A: Tensor
    row_ids_A: Tensor
    sent: RowMap
    received: RowMap
    order_R: Tensor
    pairs_out: tuple[int, ...]
    pairs_in: tuple[int, ...]
    assignments_out: tuple[int, ...]
    assignments_in: tuple[int, ...]
    num_pairs: int
    num_assignments: int


class AllToAllDispatcher:
    """Experts spread evenly over the ranks of a group, in order. See :class:`distmoe.moe.dispatch.Dispatcher`.

    Counts are exchanged first, then rows, with uneven splits: nothing is padded, and a rank may have no token, no
    assignment or no row. Collective: every rank of the group calls each method, in the same order, forward and
    backward. Outputs and gradients equal those of :class:`distmoe.moe.dispatch.LocalDispatcher` up to the order of
    summation; an expert sees the same rows in the same order as there, if ranks hold consecutive tokens.

    Args:
        num_experts: E.
        group: The ranks that share one copy of the experts.
        overlap: Whether ``meanwhile`` is called while the rows travel to the experts (``shared``) or not at all
            (``none``). What autograd does for ``meanwhile`` then runs while gradients travel back. On a CPU, where the
            same cores do both, it was measured to be no faster.

    Raises:
        ValueError: E is not a multiple of the group's size.
    """

    def __init__(self, num_experts: int, group: Communicator, overlap: Overlap = "none") -> None:
        if num_experts % group.size:
            raise ValueError(f"{num_experts} experts cannot be spread evenly over {group.size} ranks")
        self.num_experts = num_experts
        self.group = group
        self.overlap = overlap
        self.num_local = num_experts // group.size

    def dispatch(
        self, x_T: Tensor, row_ids_A: Tensor, expert_ids_A: Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor, AllToAllPlan]:
        """See the protocol; the rows of an expert are in the order of their source ranks, then of tokens."""
        plan, rows_per_expert_L = self._plan(len(x_T), row_ids_A, expert_ids_A)
        meanwhile = meanwhile if self.overlap == "shared" else None
        x_V = self.group.exchange(plan.sent.take(x_T), plan.pairs_out, plan.pairs_in, meanwhile)
        return plan.received.take(x_V), rows_per_expert_L, plan

    def gather(self, outputs: Tensors, plan: AllToAllPlan) -> Tensors:
        """See the protocol."""
        if isinstance(outputs, tuple):
            return tuple(self._back(output, plan) for output in outputs)
        return self._back(outputs, plan)

    def combine(self, outputs: Tensor, plan: AllToAllPlan, weights_A: Tensor) -> Tensor:
        """See the protocol.

        Where fewer bytes travel so, the weights are sent after the rows, and what a rank's experts say of one token is
        added up before it is sent back.
        """
        weights_A = weights_A.index_select(0, plan.order_A)
        dtype = torch.promote_types(outputs.dtype, weights_A.dtype)
        apart_bytes = plan.num_assignments * outputs.itemsize * outputs.shape[1:].numel()
        added_bytes = plan.num_pairs * dtype.itemsize * outputs.shape[1:].numel()
        weights_bytes = plan.num_assignments * weights_A.itemsize * weights_A.shape[1:].numel()
        if added_bytes + weights_bytes >= apart_bytes:
            return RowMap.of(plan.row_ids_A, plan.sent.num_rows).add(self._sent_back(outputs, plan), weights_A)
        weights = self.group.exchange(weights_A, plan.assignments_out, plan.assignments_in)
        partial_V = plan.received.add(outputs, weights.index_select(0, plan.order_R))
        return plan.sent.add(self.group.exchange(partial_V, plan.pairs_in, plan.pairs_out))

    def _back(self, outputs: Tensor, plan: AllToAllPlan) -> Tensor:
        """Outputs (R, ...) in assignment order (A, ...)."""
        return self._sent_back(outputs, plan).index_select(0, inverse(plan.order_A))

    def _sent_back(self, outputs: Tensor, plan: AllToAllPlan) -> Tensor:
        """Outputs (R, ...) on the tokens' own rank, in the order of ``plan.row_ids_A``."""
        arrived = outputs.index_select(0, inverse(plan.order_R))
        return self.group.exchange(arrived, plan.assignments_in, plan.assignments_out)

    @torch.no_grad()
    def _plan(self, num_rows: int, row_ids_A: Tensor, expert_ids_A: Tensor) -> tuple[AllToAllPlan, Tensor]:
        """The plan, and the rows of each local expert, (L,) on the CPU. Waits for a GPU once, for the counts."""
        order_A = expert_order(row_ids_A, expert_ids_A, num_rows)
        row_ids_A, expert_ids_A = row_ids_A.index_select(0, order_A), expert_ids_A.index_select(0, order_A)
        ranks_A = torch.div(expert_ids_A, self.num_local, rounding_mode="floor")
        # Pairs are numbered by (rank, token); pair_A is the one that each assignment travels with.
        keys_A, by_pair_A = (ranks_A * num_rows + row_ids_A).sort(stable=True)
        begins_A = torch.ones_like(keys_A)
        begins_A[1:] = keys_A[1:] != keys_A[:-1]
        pair_A = torch.empty_like(keys_A).scatter_(0, by_pair_A, begins_A.cumsum(0) - 1)
        pairs_N = keys_A.new_zeros(self.group.size).scatter_add_(0, ranks_A.index_select(0, by_pair_A), begins_A)

        counts_NC = self.group.gather_equal(torch.cat([counts(expert_ids_A, self.num_experts), pairs_N]))
        assigned_NNL, pairs_NN = self._by_rank(counts_NC.cpu())  # sync: splits must be on the host
        me, assigned_NN = self.group.rank, assigned_NNL.sum(-1)
        assignments_out, assignments_in = _splits(assigned_NN[me]), _splits(assigned_NN[:, me])
        pairs_out, pairs_in = _splits(pairs_NN[me]), _splits(pairs_NN[:, me])

        on_device_NNL, on_device_NN = self._by_rank(counts_NC)
        arriving_NL, num_arriving = on_device_NNL[:, me], sum(assignments_in)
        order_R = _by_expert(arriving_NL, num_arriving)
        if torch.equal(pairs_NN, assigned_NN):  # no token has two experts on one rank: pairs are assignments
            sent_rows_U, pair_R = row_ids_A, order_R
        else:
            sent_rows_U = row_ids_A.new_zeros(sum(pairs_out)).scatter_(0, pair_A, row_ids_A)
            within_A = pair_A - _starts(on_device_NN[me]).index_select(0, ranks_A)  # among the pairs for that rank
            within = self.group.exchange_rows(within_A.int(), assignments_out, assignments_in)
            starts = _starts(on_device_NN[:, me]).repeat_interleave(arriving_NL.sum(1), output_size=num_arriving)
            pair_R = (starts + within).index_select(0, order_R)
        plan = AllToAllPlan(
            order_A,
            row_ids_A,
            sent=RowMap.of(sent_rows_U, num_rows),
            received=RowMap.of(pair_R, sum(pairs_in)),
            order_R=order_R,
            pairs_out=pairs_out,
            pairs_in=pairs_in,
            assignments_out=assignments_out,
            assignments_in=assignments_in,
            num_pairs=_leaving(pairs_NN),
            num_assignments=_leaving(assigned_NN),
        )
        return plan, assigned_NNL[:, me].sum(0)

    def _by_rank(self, counts_NC: Tensor) -> tuple[Tensor, Tensor]:
        """What all N ranks have counted: (N, N, L) assignments from rank to rank and expert, (N, N) pairs by rank."""
        assigned_NE, pairs_NN = counts_NC.split([self.num_experts, self.group.size], dim=1)
        return assigned_NE.unflatten(1, (self.group.size, self.num_local)), pairs_NN


def expert_placement(communicators: Communicators, overlap: Overlap = "none") -> Placement:
    """Experts spread over the expert-parallel ranks, for :func:`distmoe.models.build_model` and mixture layers.

    Args:
        communicators: Of the mesh.
        overlap: Whether a layer's shared expert runs while tokens travel, see :class:`AllToAllDispatcher`; the numbers
            are the same, bit for bit.

    Example:
        >>> placement = expert_placement(Communicators.of(Mesh(world_size, rank, expert_parallel_size=2)))
        >>> experts = MLPExperts(placement.local_experts(8), width=64, hidden=256)
        >>> layer = MoELayer(gate, experts, placement)
    """
    group, mesh = communicators.expert_parallel, communicators.mesh

    def dispatcher(num_experts: int) -> Dispatcher:
        return LocalDispatcher(num_experts) if group.size == 1 else AllToAllDispatcher(num_experts, group, overlap)

    reducer: Reducer = SumReducer(communicators.world) if mesh.world_size > 1 else no_reduction
    return Placement(mesh.local_experts, dispatcher, reducer)


def _splits(counts_N: Tensor) -> tuple[int, ...]:
    return tuple(counts_N.tolist())


def _starts(counts_N: Tensor) -> Tensor:
    return counts_N.cumsum(0) - counts_N


def _leaving(counts_NN: Tensor) -> int:
    """What goes from one rank to another one."""
    return int(counts_NN.sum() - counts_NN.trace())


def _by_expert(arriving_NL: Tensor, num_rows: int) -> Tensor:
    """(R,) the order that brings rows sorted by (source rank, expert) into that of (expert, source rank)."""
    num_ranks, num_local = arriving_NL.shape
    places_LN = torch.arange(num_ranks * num_local, device=arriving_NL.device).view(num_local, num_ranks)
    places_R = places_LN.T.flatten().repeat_interleave(arriving_NL.flatten(), output_size=num_rows)
    return places_R.argsort(stable=True)
