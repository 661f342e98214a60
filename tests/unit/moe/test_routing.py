import pytest
import torch

from distmoe.moe.routing import Routing, at_least_float32
from tests.unit.moe.gate_forms import FORMS, NUM_EXPERTS, WIDTH, context, tokens


def routing(rows: list[int], experts: list[int], num_rows: int, **other) -> Routing:
    return Routing(num_rows, 3, torch.tensor(rows), torch.tensor(experts), None, None, None, **other)


def test_assignments_of_a_row_are_counted_where_all_rows_have_equally_many():
    assert routing([0, 0, 1, 1], [0, 1, 2, 0], 2).assignments_per_row == 2
    assert routing([], [], 0).assignments_per_row == 0
    assert routing([], [], 4).assignments_per_row == 0  # all dropped
    with pytest.raises(ValueError, match="3 assignments are not equally many for each of 2 rows"):
        _ = routing([0, 0, 1], [0, 1, 2], 2).assignments_per_row


def test_demand_is_what_was_wanted_and_load_what_was_got():
    dropless = routing([0, 0, 1, 1], [0, 1, 0, 2], 2)
    assert dropless.demand_per_expert().tolist() == dropless.rows_per_expert().tolist() == [2, 1, 1]
    assert dropless.num_dropped == 0
    capped = routing([0, 0, 1, 1], [0, 1, 0, 2], 2, wanted_E=torch.tensor([2, 4, 1]))
    assert (capped.demand_per_expert().tolist(), capped.rows_per_expert().tolist()) == ([2, 4, 1], [2, 1, 1])
    assert capped.num_dropped == 3


def test_one_row_for_each_distribution_over_experts():
    logits_TCE = tokens(4, 2, 3)
    per_filter = Routing(4, 3, torch.zeros(0), torch.zeros(0), None, logits_TCE, logits_TCE.softmax(-1))
    assert torch.equal(per_filter.flat_logits[5], logits_TCE[2, 1])
    assert torch.equal(per_filter.flat_probs[5], logits_TCE[2, 1].softmax(-1))
    per_token = Routing(4, 3, torch.zeros(0), torch.zeros(0), None, logits_TCE[:, 0], None)
    assert torch.equal(per_token.flat_logits, logits_TCE[:, 0])
    assert per_token.flat_probs is None


@pytest.mark.parametrize("name", ["noisy_topk", "soft", "attentive"])
def test_detached_it_keeps_values_and_loses_gradients_and_tokens(name):
    _, live = FORMS[name].layer()(tokens(4, 3, WIDTH).requires_grad_(), context(4))
    dead = live.detach()
    for field in ("weights_A", "logits_TE", "probs_TE", "load_TE"):
        before, after = getattr(live, field), getattr(dead, field)
        assert (before is None) == (after is None)
        assert before is None or (torch.equal(before, after) and not after.requires_grad)
    assert live.logits_TE.requires_grad
    assert live.tokens_T.shape == (12, WIDTH)
    assert not live.tokens_T.requires_grad
    assert dead.tokens_T is None
    assert dead.rows_per_expert().tolist() == live.rows_per_expert().tolist() != [0] * NUM_EXPERTS


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.uint8, torch.float32),
        (torch.float32, torch.float32), (torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_narrow_values_become_float32_and_wide_ones_stay(given, expected):
    x = torch.tensor([0, 1, 200]).to(given)
    assert at_least_float32(x).dtype == expected
    assert at_least_float32(x).tolist() == [0, 1, 200]
