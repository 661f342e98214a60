import math

import pytest
import torch

from distmoe.moe.losses import add_sums
from distmoe.moe.measures import (
    describe_routing,
    entropy_bits,
    label_sums,
    mutual_information_bits,
    routing_sums,
)
from distmoe.moe.routing import Routing


def top_1(probs: list[list[float]], num_dropped: int = 0, rows_per_sample: int = 1) -> Routing:
    probs_TE = torch.tensor(probs)
    expert_ids = probs_TE.argmax(-1)
    # What was refused is counted at expert 0: the measures look at the sum only.
    refused = torch.tensor([num_dropped] + [0] * (probs_TE.shape[1] - 1))
    return Routing(
        num_rows=len(probs),
        num_experts=probs_TE.shape[1],
        row_ids_A=torch.arange(len(probs)),
        expert_ids_A=expert_ids,
        weights_A=probs_TE.amax(-1),
        logits_TE=probs_TE.log(),
        probs_TE=probs_TE,
        rows_per_sample=rows_per_sample,
        wanted_E=torch.bincount(expert_ids, minlength=probs_TE.shape[1]) + refused,
    )


def describe(routing: Routing, labels: list[int] | None = None, num_classes: int = 2) -> dict[str, float]:
    sums = routing_sums(routing)
    if labels is not None:
        sums |= label_sums(routing, torch.tensor(labels), num_classes)
    return describe_routing(sums)


def test_entropy_in_bits():
    assert entropy_bits(torch.tensor([1.0, 1.0, 1.0, 1.0])) == pytest.approx(2.0)
    assert entropy_bits(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(1.5)  # 1/2 * 1 + 2 * 1/4 * 2
    assert entropy_bits(torch.tensor([7.0, 0.0])) == 0.0
    assert entropy_bits(torch.zeros(3)) == 0.0


def test_mutual_information_in_bits():
    # Independent; each row its own column, in two sizes; one column.
    assert mutual_information_bits(torch.tensor([[1.0, 1.0], [1.0, 1.0]])) == pytest.approx(0.0, abs=1e-12)
    assert mutual_information_bits(torch.eye(4)) == pytest.approx(2.0)
    assert mutual_information_bits(torch.tensor([[3.0, 0.0], [0.0, 1.0]])) == pytest.approx(
        -0.75 * math.log2(0.75) + 0.25 * 2
    )
    assert mutual_information_bits(torch.tensor([[5.0], [3.0]])) == pytest.approx(0.0, abs=1e-12)
    # Three quarters right: H(row) = H(column) = 1, joint (3 3 1 1) / 8 -> 2 * 3/8 * log2(8/3) + 2 * 1/8 * 3.
    joint = 0.75 * math.log2(8 / 3) + 0.75
    assert mutual_information_bits(torch.tensor([[3.0, 1.0], [1.0, 3.0]])) == pytest.approx(2 - joint)
    assert mutual_information_bits(torch.zeros(2, 2)) == 0.0


def test_an_even_gate_has_the_largest_entropies():
    numbers = describe(top_1([[0.25] * 4]))
    assert numbers["gate_entropy_bits"] == pytest.approx(2.0)
    spread = describe(top_1([[0.97 if e == row % 4 else 0.01 for e in range(4)] for row in range(8)]))
    assert spread["usage_entropy_bits"] == pytest.approx(2.0)
    assert spread["load_imbalance"] == pytest.approx(1.0)
    assert spread["dead_experts"] == 0.0
    # 0.97 * log2(1 / 0.97) + 3 * 0.01 * log2(100), a token's own uncertainty.
    assert spread["gate_entropy_bits"] == pytest.approx(-0.97 * math.log2(0.97) + 0.03 * math.log2(100), rel=1e-5)


def test_a_collapsed_gate():
    numbers = describe(top_1([[1.0, 0.0, 0.0, 0.0]] * 5))
    assert numbers == {
        "load_imbalance": 4.0,
        "dead_experts": 3.0,
        "usage_entropy_bits": 0.0,
        "dropped_share": 0.0,
        "gate_entropy_bits": 0.0,
    }


def test_loads_by_hand():
    # Loads (3, 1, 0): even is 4/3.
    numbers = describe(top_1([[0.6, 0.4, 0.0]] * 3 + [[0.4, 0.6, 0.0]], num_dropped=1))
    assert numbers["load_imbalance"] == pytest.approx(3 / (4 / 3))
    assert numbers["usage_entropy_bits"] == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert numbers["dead_experts"] == 1.0
    assert numbers["dropped_share"] == pytest.approx(1 / 5)


@pytest.mark.parametrize(("load", "dead"), [(9.0, 1.0), (10.0, 0.0)])
def test_an_expert_below_a_hundredth_of_an_even_load_is_dead(load, dead):
    # The even load is 1000, a hundredth of it 10.
    sums = {"assignments_E": torch.tensor([2000 - load, load]).double(), "dropped": torch.tensor(0.0)}
    assert describe_routing(sums)["dead_experts"] == dead


def test_what_experts_know_of_the_class():
    # Expert = class for the most probable one; the gate itself is only 3/4 sure.
    sure = describe(top_1([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.25, 0.75]]), labels=[0, 0, 1, 1])
    assert sure["class_information_bits"] == pytest.approx(1.0)
    assert sure["class_information_soft_bits"] == pytest.approx(2 - (0.75 * math.log2(8 / 3) + 0.75), rel=1e-5)
    # The same experts for both classes.
    blind = describe(top_1([[0.75, 0.25], [0.25, 0.75], [0.75, 0.25], [0.25, 0.75]]), labels=[0, 0, 1, 1])
    assert blind["class_information_bits"] == pytest.approx(0.0, abs=1e-9)
    assert blind["class_information_soft_bits"] == pytest.approx(0.0, abs=1e-9)


def test_tables_of_classes_against_experts():
    routing = top_1([[0.75, 0.25], [0.125, 0.875], [0.5, 0.5], [0.25, 0.75]], rows_per_sample=2)
    # Two samples of two tokens: rows 0 1 have class 2, rows 2 3 have class 0.
    sums = label_sums(routing, torch.tensor([2, 0]), 3)
    assert sums["assigned_CE"].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert sums["favourite_CE"].tolist() == [[1, 1], [0, 0], [1, 1]]
    assert sums["soft_CE"].tolist() == [[0.75, 1.25], [0, 0], [0.875, 1.125]]


def test_two_choices_count_twice_in_the_assignments_but_once_as_favourite():
    one = top_1([[0.6, 0.3, 0.1]])
    both = type(one)(**{**vars(one), "row_ids_A": torch.tensor([0, 0]), "expert_ids_A": torch.tensor([0, 1])})
    sums = label_sums(both, torch.tensor([1]), 2)
    assert sums["assigned_CE"].tolist() == [[0, 0, 0], [1, 1, 0]]
    assert sums["favourite_CE"].tolist() == [[0, 0, 0], [1, 0, 0]]


def test_sums_of_parts_are_the_sums_of_the_whole():
    probs, labels = [[0.75, 0.25], [0.125, 0.875], [0.5, 0.5], [0.25, 0.75]], [0, 1, 1, 1]
    totals: dict[str, torch.Tensor] = {}
    for rows in (slice(0, 1), slice(1, 1), slice(1, 4)):
        part = top_1(probs[rows]) if probs[rows] else empty()
        add_sums(totals, {**routing_sums(part), **label_sums(part, torch.tensor(labels[rows], dtype=torch.long), 2)})
    assert describe_routing(totals) == pytest.approx(describe(top_1(probs), labels))


def empty() -> Routing:
    none = torch.zeros(0, dtype=torch.long)
    return Routing(0, 2, none, none, torch.zeros(0), torch.zeros(0, 2), torch.zeros(0, 2))


def test_no_rows_are_described_without_dividing_by_zero():
    numbers = describe_routing(routing_sums(empty()))
    assert numbers["gate_entropy_bits"] == numbers["usage_entropy_bits"] == numbers["dropped_share"] == 0.0


def test_a_gate_without_probabilities_has_no_gate_entropy():
    one = top_1([[0.75, 0.25]])
    bare = type(one)(**{**vars(one), "probs_TE": None})
    numbers = describe(bare, labels=[0])
    assert sorted(numbers) == ["dead_experts", "dropped_share", "load_imbalance", "usage_entropy_bits"]
