"""Slow, obvious versions of what the package does fast: Python loops over rows, no index tensors, no tensor sorts.

They are the oracle of every gate and dispatcher, so a reader must be able to check them by eye. Capacity factors are
decimal text, so that capacities are computed without rounding.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]
Choice = tuple[int, int, int]  # row, rank of the choice (0 is the first), expert


def softmax(values: Sequence[float]) -> list[float]:
    """exp(v) over the sum of all of them."""
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def sigmoid(value: float) -> float:
    """1 / (1 + exp(-v)), without overflow."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def normal_cdf(value: float) -> float:
    """The chance that a standard normal draw is below the value."""
    return 0.5 * math.erfc(-value / math.sqrt(2))


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    """Inner product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the angle between two vectors; 0 if one of them is zero."""
    lengths = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / lengths if lengths else 0.0


def top_k_choices(scores_TE: Sequence[Sequence[float]], k: int) -> list[list[int]]:
    """For each row its k highest experts, highest first, the lower id first among equals."""
    return [sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))[:k] for scores in scores_TE]


def groups_of_rows(num_rows: int, group_rows: int) -> list[range]:
    """Rows cut into groups in order; the last may be smaller."""
    return [range(start, min(start + group_rows, num_rows)) for start in range(0, num_rows, group_rows)]


def capacity(factor: str, k: int, group_rows: int, num_experts: int) -> int:
    """Rows an expert takes from a group: the even share times the factor, rounded up, none of them twice."""
    return min(math.ceil(Fraction(factor) * k * group_rows / num_experts), group_rows)


def kept_under_capacity(
    choices_TK: Sequence[Sequence[int]],
    num_experts: int,
    group_rows: int,
    capacity_factor: str,
    priorities_T: Sequence[float] | None = None,
) -> list[Choice]:
    """What fits: in each group all first choices queue before all second choices, each in row order.

    With priorities, rows of a group queue in their order, the highest first and the earlier first among equals.
    """
    kept: list[Choice] = []
    for rows in groups_of_rows(len(choices_TK), group_rows):
        k = len(choices_TK[rows[0]])
        queue = list(rows) if priorities_T is None else sorted(rows, key=lambda row: (-priorities_T[row], row))
        taken = [0] * num_experts
        for rank in range(k):
            for row in queue:
                expert = choices_TK[row][rank]
                if taken[expert] < capacity(capacity_factor, k, len(rows), num_experts):
                    taken[expert] += 1
                    kept.append((row, rank, expert))
    return sorted(kept)


def chosen_by_experts(
    scores_TE: Sequence[Sequence[float]], group_rows: int, capacity_factor: str
) -> list[tuple[int, int]]:
    """(row, expert) by group, expert, score: each expert takes the rows it scores highest, the earlier among equals."""
    chosen = []
    for rows in groups_of_rows(len(scores_TE), group_rows):
        num_experts = len(scores_TE[rows[0]])
        for expert in range(num_experts):
            ranked = sorted(rows, key=lambda row: (-scores_TE[row][expert], row))
            chosen += [(row, expert) for row in ranked[: capacity(capacity_factor, 1, len(rows), num_experts)]]
    return chosen


def chances_of_choice(
    logits_E: Sequence[float], noisy_E: Sequence[float], sigmas_E: Sequence[float], k: int
) -> list[float]:
    """For each expert the chance to be among the k highest if its own noise were drawn again, and no other's."""
    chances = []
    for expert, (logit, sigma) in enumerate(zip(logits_E, sigmas_E, strict=True)):
        others = sorted((noisy_E[other] for other in range(len(noisy_E)) if other != expert), reverse=True)
        # It is chosen unless k others are above it.
        chances.append(1.0 if len(others) < k else normal_cdf((logit - others[k - 1]) / sigma))
    return chances


def slot_weights(logits_TS: Sequence[Sequence[float]], group_rows: int) -> tuple[list[list[float]], list[list[float]]]:
    """Soft MoE's two matrices, (T, S) each: softmax over the rows of a group, softmax over the slots."""
    into_TS = []
    for rows in groups_of_rows(len(logits_TS), group_rows):
        columns_SN = [softmax([logits_TS[row][slot] for row in rows]) for slot in range(len(logits_TS[rows[0]]))]
        into_TS += [[column[place] for column in columns_SN] for place in range(len(rows))]
    return into_TS, [softmax(logits) for logits in logits_TS]


def soft_mixture_output(x_TD: Tensor, logits_TS: Tensor, group_rows: int, experts: Sequence[Expert]) -> Tensor:
    """(T, D) of Soft MoE, slot by slot and row by row; each expert has equally many slots, side by side."""
    num_slots = logits_TS.shape[1]
    outputs = [torch.zeros_like(x) for x in x_TD]
    for rows in groups_of_rows(len(x_TD), group_rows):
        for slot in range(num_slots):
            total = sum(logits_TS[row, slot].exp() for row in rows)
            content = sum(logits_TS[row, slot].exp() / total * x_TD[row] for row in rows)
            answer = experts[slot * len(experts) // num_slots](content.unsqueeze(0))[0]
            for row in rows:
                outputs[row] = outputs[row] + logits_TS[row, slot].exp() / logits_TS[row].exp().sum() * answer
    return torch.stack(outputs) if outputs else x_TD


def attentive_weights(query_h: Sequence[float], keys_Eh: Sequence[Sequence[float]]) -> list[float]:
    """(E,): softmax of the query's inner products with the experts' keys, over the root of their width."""
    return softmax([dot(query_h, key_h) / math.sqrt(len(query_h)) for key_h in keys_Eh])


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
