import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distmoe.config import DenseGateSection, TopKGateSection
from distmoe.contracts import Context
from distmoe.moe.gates import GATES, build_gate
from distmoe.moe.gates.base import Gate
from distmoe.moe.gates.dense import DenseGate
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.routing import Routing
from tests.oracles import kept_under_capacity, top_k_choices

NUM_EXPERTS = 5
WIDTH = 3

# Every gate in the forms that differ; a gate that is missing here fails the first test.
FORMS: dict[str, list[Callable[[nn.Module], Gate]]] = {
    "dense": [lambda network: DenseGate(network, NUM_EXPERTS)],
    "topk": [
        lambda network: TopKGate(network, NUM_EXPERTS, k=1, renormalize=False),
        lambda network: TopKGate(network, NUM_EXPERTS, k=2),
        lambda network: TopKGate(network, NUM_EXPERTS, k=NUM_EXPERTS, renormalize=False),
    ],
}
ALL_FORMS = [
    pytest.param(form, id=f"{name}-{number}") for name, forms in FORMS.items() for number, form in enumerate(forms)
]


class Given(nn.Module):
    """A gate network whose logits are the tokens themselves."""

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        return x_TE


def context(num_rows: int = 0, rows_per_sample: int = 1) -> Context:
    samples = torch.arange(math.ceil(num_rows / rows_per_sample))
    return Context(seed=0, step=0, sample_ids=samples, training=True, rows_per_sample=rows_per_sample)


def network(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(WIDTH, NUM_EXPERTS)


def tokens(num_rows: int = 12) -> torch.Tensor:
    return torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(1))


def triples(routing: Routing) -> list[tuple[int, int, float]]:
    assert routing.weights_A is not None
    return list(zip(routing.row_ids_A.tolist(), routing.expert_ids_A.tolist(), routing.weights_A.tolist(), strict=True))


def test_the_contract_is_checked_for_every_gate():
    assert FORMS.keys() == GATES.keys()


@pytest.mark.parametrize("form", ALL_FORMS)
def test_ids_are_in_range_and_every_token_has_as_many_different_experts_as_the_gate_says(form):
    gate = form(network())
    routing = gate.route(tokens(), context(12))
    assert set(routing.row_ids_A.tolist()) == set(range(12))
    for row in range(12):
        experts = [expert for one, expert, _ in triples(routing) if one == row]
        assert len(set(experts)) == len(experts) == gate.experts_per_row
        assert set(experts) <= set(range(NUM_EXPERTS))
    assert routing.assignments_per_row == gate.experts_per_row
    assert routing.rows_per_expert().tolist() == [routing.expert_ids_A.tolist().count(e) for e in range(NUM_EXPERTS)]


@pytest.mark.parametrize("form", ALL_FORMS)
def test_logits_and_probabilities_are_those_of_the_network(form):
    net = network().requires_grad_(False)
    routing = form(net).route(tokens(), context(12))
    for row, token in enumerate(tokens()):
        logits = [float(token @ net.weight[e] + net.bias[e]) for e in range(NUM_EXPERTS)]
        total = sum(math.exp(one) for one in logits)
        assert routing.logits_TE[row].tolist() == pytest.approx(logits, abs=1e-5)  # float32
        assert routing.probs_TE[row].tolist() == pytest.approx([math.exp(one) / total for one in logits], abs=1e-6)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_permuted_tokens_give_permuted_assignments(form):
    gate = form(network())
    order = [3, 1, 11, 0, 7, 2, 10, 4, 5, 9, 8, 6]
    straight = triples(gate.route(tokens(), context(12)))
    permuted = triples(gate.route(tokens()[order], context(12)))
    # A row's arithmetic is the same wherever it stands, up to the blocking of the matrix product.
    back = sorted((order[row], expert, weight) for row, expert, weight in permuted)
    for (row, expert, weight), (row_2, expert_2, weight_2) in zip(sorted(straight), back, strict=True):
        assert (row, expert) == (row_2, expert_2)
        assert weight == pytest.approx(weight_2, rel=1e-5)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_the_weights_give_the_gate_a_gradient(form):
    net = network()
    routing = form(net).route(tokens(), context(12))
    # Weights of their own, as outputs of different experts would be: a plain sum of probabilities is constant.
    (routing.weights_A * torch.arange(1.0, 1.0 + len(routing.weights_A))).sum().backward()
    assert float(net.weight.grad.abs().max()) > 1e-3


@pytest.mark.parametrize("form", ALL_FORMS)
def test_logits_are_float32_under_autocast_and_equal_to_those_without(form):
    gate = form(network())
    plain = gate.route(tokens(), context(12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = gate.route(tokens(), context(12))
        from_half = gate.route(tokens().bfloat16(), context(12))
    assert torch.equal(routing.logits_TE, plain.logits_TE)
    assert torch.equal(routing.weights_A, plain.weights_A)
    assert from_half.logits_TE.dtype == torch.float32
    expected = gate.route(tokens().bfloat16().float(), context(12))
    assert torch.equal(from_half.logits_TE, expected.logits_TE)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_float64_gate_computes_in_float64(form):
    net = network().double().requires_grad_(False)
    x = tokens().double() + 1e-12
    routing = form(net).route(x, context(12))
    assert torch.equal(routing.logits_TE, net(x))


@pytest.mark.parametrize("form", ALL_FORMS)
def test_evaluation_is_deterministic_and_does_not_touch_torchs_generator(form):
    gate = form(network()).eval()
    state = torch.get_rng_state()
    first = triples(gate.route(tokens(), context(12)))
    assert triples(gate.route(tokens(), context(12))) == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("form", ALL_FORMS)
def test_no_token_gives_no_assignment(form):
    routing = form(network()).route(tokens(0), context(0))
    assert triples(routing) == []
    assert routing.rows_per_expert().tolist() == [0] * NUM_EXPERTS


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_network_of_another_width_is_refused(form):
    with pytest.raises(ValueError, match=r"gives \(12, 2\), not \(12, 5\)"):
        form(nn.Linear(WIDTH, 2)).route(tokens(), context(12))


def test_dense_assigns_all_experts_row_by_row_with_the_softmax():
    # Odds 1 : 3 and 1 : 1.
    routing = DenseGate(Given(), 2).route(torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]]), context(2))
    rows, experts, weights = zip(*triples(routing), strict=True)
    assert (rows, experts) == ((0, 0, 1, 1), (0, 1, 0, 1))
    assert weights == pytest.approx((0.25, 0.75, 0.5, 0.5))


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


def test_ties_go_to_the_lower_expert_id_among_many_experts():
    # Beyond 16 entries a sort that is not stable reorders equals.
    routing = TopKGate(Given(), 64, k=3).route(torch.zeros(5, 64), context(5))
    assert routing.expert_ids_A.tolist() == [0, 1, 2] * 5


def preferring(*choices: tuple[int, int]) -> torch.Tensor:
    """Logits of three experts with these first and second choices."""
    logits = torch.zeros(len(choices), 3)
    for row, (first, second) in enumerate(choices):
        logits[row, first], logits[row, second] = 2.0, 1.0
    return logits


# Two images of three tokens. Capacity is ceil(1.0 * 2 * 3 / 3) = 2 in a group of one image.
TWO_IMAGES = preferring((0, 1), (1, 0), (0, 1), (2, 0), (2, 1), (2, 0))


def kept(routing: Routing) -> list[tuple[int, int]]:
    return [(row, expert) for row, expert, _ in triples(routing)]


def test_first_choices_come_before_second_choices_in_each_image():
    gate = TopKGate(Given(), 3, k=2, capacity_factor=1.0, group="image")
    routing = gate.route(TWO_IMAGES, context(6, rows_per_sample=3))
    # Image 1: expert 0 takes the first choices of rows 0 and 2 and is full, so row 1's second choice, which comes
    # earlier in row order, is dropped. Expert 1 takes row 1's first choice, then row 0's second; row 2's is dropped.
    # Image 2: expert 2 is full after rows 3 and 4 and drops row 5's first choice. Second choices: row 3 and row 5
    # fill expert 0, row 4 goes to expert 1.
    assert kept(routing) == [(0, 0), (0, 1), (1, 1), (2, 0), (3, 2), (3, 0), (4, 2), (4, 1), (5, 0)]
    assert routing.num_dropped == 3
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
    assert kept(routing) == [
        (0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1), (3, 2), (3, 0), (4, 2), (4, 1), (5, 2),
    ]  # fmt: skip
    assert routing.num_dropped == 1


def test_a_last_group_with_fewer_images_has_less_capacity():
    gate = TopKGate(Given(), 2, k=1, renormalize=False, capacity_factor=1.0, group=2)
    logits = torch.tensor([[1.0, 0.0]] * 6)
    # Three images of two tokens in groups of two images: 4 rows with capacity 2, then 2 rows with capacity 1.
    assert kept(gate.route(logits, context(6, rows_per_sample=2))) == [(0, 0), (1, 0), (4, 0)]


def test_nothing_is_dropped_where_capacity_suffices():
    gate = TopKGate(Given(), 3, k=2, capacity_factor=3.0)
    plain = TopKGate(Given(), 3, k=2)
    roomy = gate.route(TWO_IMAGES, context(6, rows_per_sample=3))
    assert triples(roomy) == triples(plain.route(TWO_IMAGES, context(6, rows_per_sample=3)))
    assert roomy.num_dropped == 0


@given(
    num_samples=st.integers(0, 4),
    rows_per_sample=st.integers(1, 4),
    num_experts=st.integers(1, 6),
    k=st.integers(1, 6),
    capacity_factor=st.sampled_from(["0.3", "0.5", "1", "1.1", "1.25", "2"]),
    group=st.sampled_from(["image", "batch", 1, 2, 3]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_top_k_and_capacity_equal_the_loop(num_samples, rows_per_sample, num_experts, k, capacity_factor, group, seed):
    k = min(k, num_experts)
    num_rows = num_samples * rows_per_sample
    # Whole numbers: ties are common.
    logits = torch.randint(0, 3, (num_rows, num_experts), generator=torch.Generator().manual_seed(seed)).float()
    gate = TopKGate(Given(), num_experts, k, renormalize=False, capacity_factor=float(capacity_factor), group=group)
    routing = gate.route(logits, context(num_rows, rows_per_sample))
    choices = top_k_choices(logits.tolist(), k)
    group_rows = max(num_rows, 1) if group == "batch" else rows_per_sample * (1 if group == "image" else group)
    expected = kept_under_capacity(choices, num_experts, group_rows, capacity_factor)
    assert kept(routing) == [(row, expert) for row, _, expert in expected]
    assert routing.num_dropped == num_rows * k - len(expected)
    assert routing.weights_A.tolist() == pytest.approx(
        [float(logits[row].double().softmax(-1)[expert]) for row, _, expert in expected], abs=1e-6
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
            assert kept(gate.route(logits, context(num_rows))) == [(row, 0) for row, *_ in expected]


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=rf"k \({k}\) must be between 1 and the number of experts \(4\)"):
        TopKGate(Given(), 4, k=k)


def test_one_renormalised_expert_is_for_evaluation_only():
    gate = TopKGate(Given(), 4, k=1, renormalize=True)
    with pytest.raises(ValueError, match="renormalize=False"):
        gate.route(LOG_ODDS, replace(context(2), training=True))
    routing = gate.route(LOG_ODDS, replace(context(2), training=False))
    assert routing.weights_A is not None
    assert routing.weights_A.tolist() == [1.0, 1.0]  # p / p: fewer experts of a model trained with a larger k


def test_gates_are_built_as_their_section_says():
    section = TopKGateSection(k=3, renormalize=False, capacity_factor=1.5, group=4)
    gate = build_gate(section, Given(), 6)
    assert isinstance(gate, TopKGate)
    assert (gate.num_experts, gate.k, gate.renormalize, gate.capacity_factor, gate.group) == (6, 3, False, 1.5, 4)
    assert gate.experts_per_row == 3.0
    assert build_gate(DenseGateSection(), Given(), 6).experts_per_row == 6.0
