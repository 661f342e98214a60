"""Routings written by hand, and ranks played one after the other in one process."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distmoe.moe.routing import Routing
from distmoe.moe.sums import Reducer, Sums


def routing(
    probs: Sequence[Sequence[float]] | Tensor,
    experts: Sequence[Sequence[int]],
    logits: Tensor | None = None,
    **others: object,
) -> Routing:
    """Row t goes to the experts ``experts[t]``; logits are log probabilities unless given."""
    probs_TE = torch.as_tensor(probs)
    row_ids = [row for row, chosen in enumerate(experts) for _ in chosen]
    expert_ids = [expert for chosen in experts for expert in chosen]
    return Routing(
        num_rows=len(experts),
        num_experts=probs_TE.shape[-1],
        row_ids_A=torch.tensor(row_ids, dtype=torch.long),
        expert_ids_A=torch.tensor(expert_ids, dtype=torch.long),
        weights_A=torch.ones(len(row_ids)),
        logits_TE=probs_TE.log() if logits is None else logits,
        probs_TE=probs_TE,
        **others,  # type: ignore[arg-type]
    )


def dense_routing(logits: Tensor, **others: object) -> Routing:
    """All experts for every row, weighted by the softmax of ``logits`` (T, E) or (T, C, E)."""
    num_rows, num_experts = logits.shape[0], logits.shape[-1]
    probs = logits.softmax(-1)
    one = routing(probs, [list(range(num_experts))] * num_rows, logits, **others)
    weights_A = probs.flatten() if logits.dim() == 2 else probs.transpose(1, 2).flatten(0, 1)
    return Routing(**{**vars(one), "weights_A": weights_A, "softmax_weights": logits.dim() == 2})


class _Listener:
    """Remembers what one rank contributes, in the order of its calls."""

    def __init__(self) -> None:
        self.contributions: list[Sums | Tensor] = []

    def __call__(self, sums: Sums) -> Sums:
        self.contributions.append({name: value.detach() for name, value in sums.items()})
        return sums

    def gather(self, rows_T: Tensor) -> Tensor:
        self.contributions.append(rows_T.detach())
        return rows_T


class _Rank:
    """One rank's view: its own share with its gradient, the others' as they were heard."""

    def __init__(self, before: Sequence[_Listener], after: Sequence[_Listener]) -> None:
        self.before, self.after = before, after
        self.call = 0

    def __call__(self, sums: Sums) -> Sums:
        others = [listener.contributions[self.call] for listener in [*self.before, *self.after]]
        self.call += 1
        return {name: sum((other[name] for other in others), start=value) for name, value in sums.items()}

    def gather(self, rows_T: Tensor) -> Tensor:
        before, after = ([each.contributions[self.call] for each in side] for side in (self.before, self.after))
        self.call += 1
        return torch.cat([*before, rows_T, *after])


def on_every_rank(compute: Callable[[int, Reducer], Tensor], num_ranks: int) -> list[Tensor]:
    """What each rank gets from ``compute(rank, reducer)``, which calls the reducer equally often on every rank.

    Two rounds: what ranks contribute must not depend on what they hear, as it does not for a single collective.
    """
    listeners = [_Listener() for _ in range(num_ranks)]
    for rank, listener in enumerate(listeners):
        compute(rank, listener)
    return [compute(rank, _Rank(listeners[:rank], listeners[rank + 1 :])) for rank in range(num_ranks)]
