import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe import noise
from distmoe.moe.gates.hashed import HashGate
from distmoe.moe.gates.noisy import NoisyTopKGate
from distmoe.moe.gates.token_choice import largest
from distmoe.moe.gates.topk import SwitchGate, TopKGate
from distmoe.moe.objectives import log_weights
from tests.oracles import kept_under_capacity, softmax, top_k_choices
from tests.unit.moe.gate_forms import Given, context, pairs, tokens, triples

LOG_ODDS = torch.tensor([[1.0, 5.0, 2.0, 2.0], [4.0, 1.0, 3.0, 2.0]]).log()  # sums of odds: 10 and 10


def test_top_k_weights_are_the_probabilities_of_the_chosen():
    routing = TopKGate(Given(), 4, k=2, renormalize=False).route(LOG_ODDS, context(2))
    rows, experts, weights = zip(*triples(routing), strict=True)
    assert (rows, experts) == ((0, 0, 1, 1), (1, 2, 0, 2))
    assert weights == pytest.approx((0.5, 0.2, 0.4, 0.3))


def test_renormalised_top_k_weights_add_up_to_one():
    routing = TopKGate(Given(), 4, k=2).route(LOG_ODDS, context(2))
    assert [weight for *_, weight in triples(routing)] == pytest.approx([5 / 7, 2 / 7, 4 / 7, 3 / 7])


def test_ties_go_to_the_lower_expert_id():
    routing = TopKGate(Given(), 4, k=2).route(torch.tensor([[1.0, 1, 1, 1], [0, 2, 1, 1], [0, 0, 2, 0]]), context(3))
    assert routing.expert_ids_A.tolist() == [0, 1, 1, 2, 2, 0]


@pytest.mark.parametrize("k", [3, 9])  # picked one by one, and sorted
def test_ties_go_to_the_lower_expert_id_among_many_experts(k):
    # Beyond 16 entries a sort that is not stable reorders equals.
    routing = TopKGate(Given(), 64, k=k).route(torch.zeros(5, 64), context(5))
    assert routing.expert_ids_A.tolist() == list(range(k)) * 5


def test_experts_are_told_apart_where_the_softmax_has_rounded_them_to_zero():
    # e^-200 and e^-150 are 0 in float32, yet expert 2 is the second choice, and its log weight is known exactly.
    routing = TopKGate(Given(), 3, k=2).route(torch.tensor([[0.0, -200.0, -150.0]]), context(1))
    assert triples(routing) == [(0, 0, 1.0), (0, 2, 0.0)]
    assert log_weights(routing).tolist() == [[0.0, -150.0]]


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("k", [3, 9])
def test_no_expert_is_chosen_twice_whatever_the_scores(k):
    rows = torch.full((5, 12), -INF)
    rows[1, 7] = 0.0
    rows[2, 4] = NAN
    rows[3] = NAN
    rows[4] = torch.tensor([INF, -INF, NAN] * 4)
    first = [chosen[:3] for chosen in largest(rows, k).tolist()]
    assert first == [[0, 1, 2], [7, 0, 1], [4, 0, 1], [0, 1, 2], [2, 5, 8]]
    assert [len(set(chosen)) for chosen in largest(rows, k).tolist()] == [k] * 5


@given(
    num_rows=st.integers(0, 6), num_experts=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
@settings(deadline=None, max_examples=60, derandomize=True)
def test_the_largest_are_those_of_the_loop_ties_and_infinities_included(num_rows, num_experts, k, seed, dtype):
    k = min(k, num_experts)
    scores = torch.randint(-2, 3, (num_rows, num_experts), generator=torch.Generator().manual_seed(seed)).to(dtype)
    scores[scores == -2] = -INF
    scores[scores == 2] = INF
    assert largest(scores, k).tolist() == top_k_choices(scores.tolist(), k)


def preferring(*choices: tuple[int, int]) -> torch.Tensor:
    """Logits of three experts with these first and second choices."""
    logits = torch.zeros(len(choices), 3)
    for row, (first, second) in enumerate(choices):
        logits[row, first], logits[row, second] = 2.0, 1.0
    return logits


# Two images of three tokens. Capacity is ceil(1.0 * 2 * 3 / 3) = 2 in a group of one image.
TWO_IMAGES = preferring((0, 1), (1, 0), (0, 1), (2, 0), (2, 1), (2, 0))


def test_first_choices_come_before_second_choices_in_each_image():
    gate = TopKGate(Given(), 3, k=2, capacity_factor=1.0, group="image")
    routing = gate.route(TWO_IMAGES, context(6, rows_per_sample=3))
    # Image 1: expert 0 takes the first choices of rows 0 and 2 and is full, so row 1's second choice, which comes
    # earlier in row order, is dropped. Expert 1 takes row 1's first choice, then row 0's second; row 2's is dropped.
    # Image 2: expert 2 is full after rows 3 and 4 and drops row 5's first choice. Second choices: row 3 and row 5
    # fill expert 0, row 4 goes to expert 1.
    assert pairs(routing) == [(0, 0), (0, 1), (1, 1), (2, 0), (3, 2), (3, 0), (4, 2), (4, 1), (5, 0)]
    assert routing.num_dropped == 3
    assert routing.demand_per_expert().tolist() == [5, 4, 3]
    # What stays keeps its weight: e^2 / (e^2 + e^1) and e^1 / (e^2 + e^1).
    first, second = math.e / (math.e + 1), 1 / (math.e + 1)
    expected = [first, second, first, first, first, second, first, second, second]
    assert [weight for *_, weight in triples(routing)] == pytest.approx(expected)


@pytest.mark.parametrize("group", ["batch", 2])
def test_a_group_of_both_images_shares_its_capacity(group):
    gate = TopKGate(Given(), 3, k=2, capacity_factor=1.0, group=group)
    routing = gate.route(TWO_IMAGES, context(6, rows_per_sample=3))
    # Capacity ceil(1.0 * 2 * 6 / 3) = 4. First choices: expert 0 has rows 0 2, expert 1 row 1, expert 2 rows 3 4 5.
    # Second choices: expert 0 takes rows 1 3 and is full before row 5; expert 1 takes rows 0 2 4.
    assert pairs(routing) == [
        (0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1), (3, 2), (3, 0), (4, 2), (4, 1), (5, 2),
    ]  # fmt: skip
    assert routing.num_dropped == 1


def test_a_last_group_with_fewer_images_has_less_capacity():
    gate = TopKGate(Given(), 2, k=1, renormalize=False, capacity_factor=1.0, group=2)
    logits = torch.tensor([[1.0, 0.0]] * 6)
    # Three images of two tokens in groups of two images: 4 rows with capacity 2, then 2 rows with capacity 1.
    assert pairs(gate.route(logits, context(6, rows_per_sample=2))) == [(0, 0), (1, 0), (4, 0)]


def test_the_surest_token_is_served_first():
    # Experts 0 and 1; capacity ceil(0.5 * 2 * 4 / 2) = 2. Logits differ by 1, 4, 2, 3 towards expert 0, so the most
    # probable first choices are those of rows 1, 3, 2, 0; the offsets of whole rows, row 0's the largest, say nothing.
    logits = torch.tensor([[101.0, 100.0], [4.0, 0.0], [-3.0, -5.0], [13.0, 10.0]])
    ranked = TopKGate(Given(), 2, k=2, capacity_factor=0.5, priority="score")
    assert pairs(ranked.route(logits, context(4, 4))) == [(1, 0), (1, 1), (3, 0), (3, 1)]
    in_order = TopKGate(Given(), 2, k=2, capacity_factor=0.5, priority="position")
    assert pairs(in_order.route(logits, context(4, 4))) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_noisy_gate_serves_by_probability_too_and_not_by_the_size_of_its_logits():
    logits = torch.tensor([[101.0, 100.0, 0.0], [4.0, 0.0, 0.0], [-3.0, -5.0, -9.0], [13.0, 10.0, 0.0]])
    gate = NoisyTopKGate(Given(), 3, k=2, noise_std=1e-3, capacity_factor=0.5, priority="score")
    # Capacity ceil(0.5 * 2 * 4 / 3) = 2; noise of a thousandth changes no order.
    routing = gate.route(logits, context(4, 4))
    assert [pair for pair in pairs(routing) if pair[1] == 0] == [(1, 0), (3, 0)]


def test_tokens_that_are_equally_sure_are_served_in_order():
    # More than 16 equals: a sort that is not stable reorders them.
    gate = TopKGate(Given(), 2, k=1, renormalize=False, capacity_factor=0.2, priority="score")
    logits = torch.tensor([[1.0, 0.0]]).repeat(40, 1)
    assert pairs(gate.route(logits, context(40, 40))) == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_nothing_is_dropped_where_capacity_suffices():
    gate = TopKGate(Given(), 3, k=2, capacity_factor=3.0, priority="score")
    plain = TopKGate(Given(), 3, k=2)
    roomy = gate.route(TWO_IMAGES, context(6, rows_per_sample=3))
    assert triples(roomy) == triples(plain.route(TWO_IMAGES, context(6, rows_per_sample=3)))
    assert roomy.num_dropped == 0


@given(
    num_samples=st.integers(0, 4),
    rows_per_sample=st.integers(1, 5),
    num_experts=st.integers(1, 6),
    k=st.integers(1, 6),
    capacity_factor=st.sampled_from(["1e-07", "0.3", "0.5", "1", "1.1", "1.25", "2"]),
    group=st.sampled_from(["image", "batch", 1, 2, 3]),
    priority=st.sampled_from(["position", "score"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=150, derandomize=True)
def test_top_k_and_capacity_equal_the_loop(
    num_samples, rows_per_sample, num_experts, k, capacity_factor, group, priority, seed
):
    k = min(k, num_experts)
    num_rows = num_samples * rows_per_sample
    generator = torch.Generator().manual_seed(seed)
    if priority == "position":  # whole numbers: experts often tie
        logits = torch.randint(0, 3, (num_rows, num_experts), generator=generator).double()
    else:  # every token is one of three: tokens often tie, and to the last bit
        kinds = torch.randn(3, num_experts, generator=generator, dtype=torch.float64)
        logits = kinds[torch.randint(0, 3, (num_rows,), generator=generator)]
    gate = TopKGate(
        Given(), num_experts, k, renormalize=False, capacity_factor=float(capacity_factor), group=group,
        priority=priority,
    )  # fmt: skip
    routing = gate.route(logits, context(num_rows, rows_per_sample))
    choices = top_k_choices(logits.tolist(), k)
    group_rows = max(num_rows, 1) if group == "batch" else rows_per_sample * (1 if group == "image" else group)
    surest = [max(softmax(row)) for row in logits.tolist()]
    expected = kept_under_capacity(
        choices, num_experts, group_rows, capacity_factor, surest if priority == "score" else None
    )
    assert pairs(routing) == [(row, expert) for row, _, expert in expected]
    assert routing.num_dropped == num_rows * k - len(expected)
    assert routing.weights_A.tolist() == pytest.approx(
        [softmax(logits[row].tolist())[expert] for row, _, expert in expected], abs=1e-12
    )


@pytest.mark.parametrize("num_experts", range(1, 33))
def test_capacity_is_not_rounded_up_by_a_rounding_error(num_experts):
    # All tokens want expert 0, so it keeps exactly its capacity. Exact products must not get one row more.
    for capacity_factor in ("0.7", "1", "1.1", "1.2", "1.25"):
        for num_rows in range(num_experts, 4 * num_experts + 1, num_experts):
            gate = TopKGate(
                Given(), num_experts, 1, renormalize=False, capacity_factor=float(capacity_factor), group="batch"
            )
            logits = torch.zeros(num_rows, num_experts)
            expected = kept_under_capacity([[0]] * num_rows, num_experts, num_rows, capacity_factor)
            assert pairs(gate.route(logits, context(num_rows))) == [(row, 0) for row, *_ in expected]


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=rf"k \({k}\) must be between 1 and the number of experts \(4\)"):
        TopKGate(Given(), 4, k=k)


@pytest.mark.parametrize("factor", [0.0, -1.0, INF, NAN])
def test_a_capacity_that_is_no_number_of_rows_is_refused(factor):
    with pytest.raises(ValueError, match=rf"capacity_factor \({factor}\) must be above 0 and finite"):
        TopKGate(Given(), 4, k=2, capacity_factor=factor)


def test_one_renormalised_expert_is_for_evaluation_only():
    gate = TopKGate(Given(), 4, k=1, renormalize=True)
    with pytest.raises(ValueError, match="renormalize=False"):
        gate.route(LOG_ODDS, context(2))
    routing = gate.route(LOG_ODDS, context(2, training=False))
    assert triples(routing) == [(0, 1, 1.0), (1, 0, 1.0)]  # p / p: fewer experts of a model trained with a larger k


class Keeper(Given):
    """Remembers what the gate has shown it."""

    def forward(self, x_T: torch.Tensor) -> torch.Tensor:
        self.seen = x_T
        return super().forward(x_T)


def jitter_of(gate: SwitchGate, x: torch.Tensor, of) -> torch.Tensor:
    """What each value has been multiplied by."""
    gate.route(x, of)
    return gate.network.seen / x


def test_switch_sends_a_token_to_its_most_probable_expert_with_that_probability():
    routing = SwitchGate(Given(), 4).route(LOG_ODDS, context(2, training=False))
    assert [(row, expert) for row, expert, _ in triples(routing)] == [(0, 1), (1, 0)]
    assert routing.weights_A.tolist() == pytest.approx([0.5, 0.4])


def test_jitter_multiplies_every_value_by_a_draw_of_its_own_within_the_bounds():
    gate, x = SwitchGate(Keeper(), 50, jitter=0.2), 1.0 + tokens(2 * 20, 50).abs()
    of = context(40, rows_per_sample=20, seed=3, step=5, path="layer")
    factors = jitter_of(gate, x, of)
    key = noise.make_key("jitter", 3, 5, "layer")
    one = [torch.tensor(value) for value in (1, 7, 30)]  # sample 1, its position 7, value 30
    expected = 1.0 + 0.2 * (2.0 * float(noise.uniform(key, *one)) - 1.0)
    assert float(factors[27, 30]) == pytest.approx(expected, rel=1e-6)
    assert 0.8 - 1e-6 <= float(factors.min()) < 0.801  # the extremes of 2000 draws from an interval of 0.4
    assert 1.199 < float(factors.max()) <= 1.2 + 1e-6
    assert len(set(factors.flatten().tolist())) > 1900  # hardly two alike
    # Mean 1 and variance 0.4^2 / 12, within four standard errors of 2000 draws.
    assert float(factors.mean()) == pytest.approx(1.0, abs=4 * math.sqrt(0.16 / 12 / 2000))
    assert float(factors.var()) == pytest.approx(0.16 / 12, rel=0.1)


def test_jitter_follows_the_token_into_any_batch_and_changes_with_seed_step_and_layer():
    gate, x = SwitchGate(Keeper(), 6, jitter=0.2), 1.0 + tokens(4, 6).abs()
    of = context(4, rows_per_sample=2, path="layer")
    factors = jitter_of(gate, x, of)
    second = jitter_of(gate, x[2:], context(2, 2, path="layer", sample_ids=torch.tensor([1])))
    torch.testing.assert_close(second, factors[2:], rtol=1e-6, atol=0)
    for change in ({"seed": 1}, {"step": 1}, {"path": "other"}):
        assert not torch.allclose(jitter_of(gate, x, context(4, 2, **{"path": "layer", **change})), factors)
    assert torch.equal(jitter_of(gate, x, context(4, 2, training=False)), torch.ones(4, 6))


def test_jitter_out_of_range_is_refused():
    for jitter in (-0.1, 1.0, NAN):
        with pytest.raises(ValueError, match=rf"jitter \({jitter}\) must be at least 0 and below 1"):
            SwitchGate(Given(), 4, jitter=jitter)


def test_a_token_is_hashed_to_the_experts_with_its_highest_hashes():
    gate = HashGate(5, k=2)
    of = context(6, rows_per_sample=3, sample_ids=torch.tensor([11, 4]), path="layer")
    routing = gate.route(tokens(6, 3), of)
    key = noise.make_key("hash gate", "layer")
    hashes = [
        [float(noise.uniform(key, *map(torch.tensor, (sample, position, expert)))) for expert in range(5)]
        for sample in (11, 4)
        for position in range(3)
    ]
    expected = top_k_choices(hashes, 2)
    assert triples(routing) == [(row, expert, 0.5) for row in range(6) for expert in expected[row]]
    assert routing.probs_TE.tolist() == [[0.5 * (e in expected[row]) for e in range(5)] for row in range(6)]


@pytest.mark.parametrize(("by", "distinct"), [("sample", "rows of a sample"), ("position", "samples")])
def test_a_hash_by_sample_or_by_position_looks_at_nothing_else(by, distinct):
    routing = HashGate(1000, by=by).route(torch.zeros(12, 1), context(12, rows_per_sample=4))
    chosen = routing.expert_ids_A.view(3, 4)
    same = chosen if by == "sample" else chosen.T
    assert [len(set(row)) for row in same.tolist()] == [1] * len(same)
    assert len(set(same[:, 0].tolist())) == len(same)  # of 1000 experts, hardly two alike


def test_hashes_do_not_change_with_seed_step_training_or_the_token_itself():
    gate = HashGate(7, k=3)
    first = pairs(gate.route(tokens(6, 2), context(6, 2)))
    assert pairs(gate.route(tokens(6, 2, seed=5), context(6, 2, training=False, seed=9, step=4))) == first
    assert pairs(gate.route(tokens(6, 2), context(6, 2, path="other"))) != first


@pytest.mark.parametrize("by", ["token", "sample", "position"])
def test_hashing_spreads_tokens_evenly(by):
    rows_per_sample = {"token": 8, "sample": 1, "position": 4000}[by]
    of = context(4000, rows_per_sample)
    routing = HashGate(8, by=by).route(torch.zeros(4000, 1), of)
    chi_square = sum((count - 500) ** 2 / 500 for count in routing.rows_per_expert().tolist())
    assert chi_square < 24.3  # 7 degrees of freedom: exceeded by chance once in a thousand
    second = HashGate(8, k=2, by=by).route(torch.zeros(4000, 1), of).expert_ids_A.view(4000, 2)
    table = torch.bincount(second[:, 0] * 8 + second[:, 1], minlength=64).view(8, 8)
    assert table.diagonal().tolist() == [0] * 8
    chi_square = sum((count - 4000 / 56) ** 2 / (4000 / 56) for count in table.flatten().tolist() if count)
    assert chi_square < 93.2  # 55 degrees of freedom, once in a thousand
