"""Slow, obvious versions of what the package does fast: Python loops over rows, no index tensors, no tensor sorts.

They are the oracle of every dispatcher and of the top-k gate, so a reader must be able to check them by eye.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]
Choice = tuple[int, int, int]  # row, rank of the choice (0 is the first), expert


def top_k_choices(probs_TE: Sequence[Sequence[float]], k: int) -> list[list[int]]:
    """For each row its k most probable experts, the lower id first among equals."""
    return [sorted(range(len(probs)), key=lambda expert: (-probs[expert], expert))[:k] for probs in probs_TE]


def kept_under_capacity(
    choices_TK: Sequence[Sequence[int]], num_experts: int, group_rows: int, capacity_factor: str
) -> list[Choice]:
    """What fits: in each group all first choices queue before all second choices, each in row order.

    ``capacity_factor`` is decimal text, so that the capacity is computed without rounding.
    """
    kept: list[Choice] = []
    for start in range(0, len(choices_TK), group_rows):
        rows = range(start, min(start + group_rows, len(choices_TK)))
        k = len(choices_TK[start])
        capacity = math.ceil(Fraction(capacity_factor) * k * len(rows) / num_experts)
        taken = [0] * num_experts
        for rank in range(k):
            for row in rows:
                expert = choices_TK[row][rank]
                if taken[expert] < capacity:
                    taken[expert] += 1
                    kept.append((row, rank, expert))
    return sorted(kept)


def grouped_assignments(row_ids: Sequence[int], expert_ids: Sequence[int]) -> list[int]:
    """Numbers of the assignments in the order in which the experts see them: by expert, then row, then number."""
    return sorted(range(len(row_ids)), key=lambda number: (expert_ids[number], row_ids[number], number))


def gathered_outputs(
    x_T: Tensor, row_ids: Sequence[int], expert_ids: Sequence[int], experts: Sequence[Expert]
) -> Tensor:
    """(A, ...): each assignment's row through its expert, one row at a time."""
    outputs = [experts[expert](x_T[row : row + 1]) for row, expert in zip(row_ids, expert_ids, strict=True)]
    return torch.cat(outputs) if outputs else experts[0](x_T[:0])


def mixture_output(
    x_T: Tensor, row_ids: Sequence[int], expert_ids: Sequence[int], weights_A: Tensor, experts: Sequence[Expert]
) -> Tensor:
    """(T, ...): for each row the weighted sum of its experts' outputs, zeros for a row without an assignment."""
    template = experts[0](x_T[:0])
    rows = []
    for row in range(len(x_T)):
        total = template.new_zeros(template.shape[1:])
        for number, (assigned, expert) in enumerate(zip(row_ids, expert_ids, strict=True)):
            if assigned == row:
                weight = weights_A[number]
                output = experts[expert](x_T[row : row + 1])[0]
                total = total + weight.reshape(weight.shape + (1,) * (output.dim() - weight.dim())) * output
        rows.append(total)
    return torch.stack(rows) if rows else template


def mlp_experts(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: Expert) -> list[Expert]:
    """Stacked weights as one function an expert."""

    def one(index: int) -> Expert:
        return lambda x: activation(x @ w1[index] + b1[index]) @ w2[index] + b2[index]

    return [one(index) for index in range(len(w1))]
