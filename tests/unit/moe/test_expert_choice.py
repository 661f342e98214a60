import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.moe.gates.expert_choice import ExpertChoiceGate
from tests.oracles import chosen_by_experts, softmax
from tests.unit.moe.gate_forms import Given, context, pairs, triples

# Odds of two experts for four tokens of one image, then two of the next.
ODDS = torch.tensor([[3.0, 1.0], [1.0, 4.0], [9.0, 1.0], [1.0, 1.0], [1.0, 3.0], [1.0, 7.0]])


def test_every_expert_takes_its_highest_tokens_of_each_image():
    gate = ExpertChoiceGate(Given(), 2, capacity_factor=1.0)
    # Images of three tokens: ceil(1.0 * 3 / 2) = 2 each. Probabilities of expert 0: 0.75 0.2 0.9 and 0.5 0.25 0.125.
    routing = gate.route(ODDS.log(), context(6, rows_per_sample=3))
    assert pairs(routing) == [(2, 0), (0, 0), (1, 1), (0, 1), (3, 0), (4, 0), (5, 1), (4, 1)]
    assert routing.weights_A.tolist() == pytest.approx([0.9, 0.75, 0.8, 0.25, 0.5, 0.25, 0.875, 0.75])
    assert (gate.experts_per_row, routing.num_dropped) == (1.0, 0)


def test_a_last_group_with_fewer_images_has_less_capacity_and_no_place_that_is_none():
    gate = ExpertChoiceGate(Given(), 2, capacity_factor=2.0, group=2)
    # Three images of two tokens: 4 rows of which each expert takes all, then 2, of which it takes all too.
    routing = gate.route(ODDS.log(), context(6, rows_per_sample=2))
    assert sorted(pairs(routing)) == [(row, expert) for row in range(6) for expert in range(2)]


def test_a_token_that_nobody_chooses_gets_nothing():
    gate = ExpertChoiceGate(Given(), 2, capacity_factor=0.5, group="batch")
    routing = gate.route(ODDS.log(), context(6, rows_per_sample=3))
    assert pairs(routing) == [(2, 0), (0, 0), (5, 1), (1, 1)]  # ceil(0.5 * 6 / 2) = 2 each; rows 3 and 4 have none


def test_ties_go_to_the_earlier_token():
    # More than 16 equals: a sort that is not stable reorders them.
    routing = ExpertChoiceGate(Given(), 2, capacity_factor=0.2).route(torch.zeros(40, 2), context(40, 40))
    assert pairs(routing) == [(row, expert) for expert in range(2) for row in range(4)]


@pytest.mark.parametrize("num_rows", [32, 36])  # a capacity of 8, picked one by one, and of 9, sorted
def test_large_and_small_capacities_give_the_same_order(num_rows):
    # Expert 2's logits are 0, 1, 2 in turn; equals are taken in the order of the tokens.
    logits = torch.zeros(2 * num_rows, 4)
    logits[:, 2] = (torch.arange(2 * num_rows) % 3).float()
    routing = ExpertChoiceGate(Given(), 4, capacity_factor=1.0).route(logits, context(2 * num_rows, num_rows))
    expected = []
    for start in (0, num_rows):
        rows = range(start, start + num_rows)
        falling = sorted(rows, key=lambda row: -(row % 3))
        rising = sorted(rows, key=lambda row: row % 3)  # where expert 2 has much, the others have little
        for expert in range(4):
            expected += [(row, expert) for row in (falling if expert == 2 else rising)[: num_rows // 4]]
    assert pairs(routing) == expected


@given(
    num_samples=st.integers(0, 5),
    rows_per_sample=st.integers(1, 5),
    num_experts=st.integers(1, 6),
    capacity_factor=st.sampled_from(["1e-07", "0.3", "0.7", "1", "1.1", "2", "5"]),
    group=st.sampled_from(["image", "batch", 1, 2, 3]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_choices_equal_the_loop(num_samples, rows_per_sample, num_experts, capacity_factor, group, seed):
    capacity_factor = min(capacity_factor, str(num_experts), key=float)
    num_rows = num_samples * rows_per_sample
    generator = torch.Generator().manual_seed(seed)
    # Every token is one of three, so that tokens often tie to the last bit.
    kinds = torch.randn(3, num_experts, generator=generator, dtype=torch.float64)
    logits = kinds[torch.randint(0, 3, (num_rows,), generator=generator)]
    gate = ExpertChoiceGate(Given(), num_experts, capacity_factor=float(capacity_factor), group=group)
    routing = gate.route(logits, context(num_rows, rows_per_sample))
    group_rows = max(num_rows, 1) if group == "batch" else rows_per_sample * (1 if group == "image" else group)
    probs = [softmax(row) for row in logits.tolist()]
    expected = chosen_by_experts(probs, group_rows, capacity_factor)
    assert pairs(routing) == expected
    assert routing.weights_A.tolist() == pytest.approx([probs[row][expert] for row, expert in expected], rel=1e-9)


def test_a_token_that_is_no_number_is_still_one_of_its_group():
    logits = ODDS.log()
    logits[1] = math.nan
    routing = ExpertChoiceGate(Given(), 2, capacity_factor=1.0, group=2).route(logits, context(6, rows_per_sample=2))
    assert len(set(pairs(routing))) == len(pairs(routing)) == 2 * 2 + 2 * 1
    assert [(triple[0], triple[1]) for triple in triples(routing) if math.isnan(triple[2])] == [(1, 0), (1, 1)]


@pytest.mark.parametrize("factor", [0.0, -1.0, 4.1, math.inf, math.nan])
def test_a_capacity_that_is_no_number_of_rows_is_refused(factor):
    with pytest.raises(ValueError, match=rf"capacity_factor \({factor}\) must be above 0 and at most .* \(4\)"):
        ExpertChoiceGate(Given(), 4, capacity_factor=factor)
