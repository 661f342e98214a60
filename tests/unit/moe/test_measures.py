import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.contracts import Context
from distmoe.moe.gates.expert_choice import ExpertChoiceGate
from distmoe.moe.gates.soft import SoftGate
from distmoe.moe.measures import (
    FACTOR_GRID,
    MAX_FACTOR_COLUMNS,
    Cells,
    corrected_information_bits,
    describe_routing,
    entropy_bits,
    factor_cells,
    measure,
    mutual_information_bits,
    routing_sums,
    table_sums,
)
from distmoe.moe.routing import Routing
from distmoe.moe.sums import Sums, add_sums


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


def empty(num_experts: int = 2) -> Routing:
    none = torch.zeros(0, dtype=torch.long)
    return Routing(0, num_experts, none, none, torch.zeros(0), torch.zeros(0, num_experts), torch.zeros(0, num_experts))


def classes(labels: list[int], num_classes: int = 2, name: str = "class") -> dict[str, Cells]:
    return {name: Cells(torch.tensor(labels, dtype=torch.long), num_classes)}


def sums_of(routing: Routing, variables: dict[str, Cells]) -> Sums:
    return {**routing_sums(routing), **table_sums(routing, variables)}


def describe(routing: Routing, labels: list[int] | None = None) -> dict[str, float]:
    return describe_routing(sums_of(routing, {} if labels is None else classes(labels)))


# Numbers from tables


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


def test_correction_of_few_counts():
    # 4 entries, 2 rows and 2 columns occur among 800 counts: (4 - 2 - 2 + 1) / (2 * 800) nats less.
    plain = mutual_information_bits(torch.tensor([[300.0, 100.0], [100.0, 300.0]]))
    corrected = corrected_information_bits(torch.tensor([[300.0, 100.0], [100.0, 300.0]]))
    assert plain - corrected == pytest.approx(1 / (1600 * math.log(2)))
    # An empty row and column do not occur; of a diagonal, (3 - 3 - 3 + 1) / (2 * 30) nats less is more.
    diagonal = torch.zeros(4, 4)
    diagonal[[0, 1, 2], [0, 1, 2]] = 10.0
    assert corrected_information_bits(diagonal) == pytest.approx(math.log2(3) + 2 / (60 * math.log(2)))
    assert corrected_information_bits(torch.ones(2, 2)) == 0.0
    assert corrected_information_bits(torch.zeros(2, 2)) == 0.0


def test_correction_removes_most_of_what_chance_gives():
    plain, corrected = [], []
    for seed in range(50):
        cells = torch.randint(0, 8 * 6, (400,), generator=torch.Generator().manual_seed(seed))
        table = torch.bincount(cells, minlength=48).view(8, 6).double()
        plain.append(mutual_information_bits(table))
        corrected.append(corrected_information_bits(table))
    # Rows and columns are independent: theory gives (8 - 1) (6 - 1) / (2 * 400) nats.
    assert sum(plain) / 50 == pytest.approx(35 / (800 * math.log(2)), rel=0.1)
    assert sum(corrected) / 50 < 0.012


# Load


def test_an_even_gate_has_the_largest_entropies():
    numbers = describe(top_1([[0.25] * 4]))
    assert (numbers["gate_entropy_bits"], numbers["usage_entropy_soft_bits"]) == pytest.approx((2.0, 2.0))
    spread = describe(top_1([[0.97 if e == row % 4 else 0.01 for e in range(4)] for row in range(8)]))
    assert spread["usage_entropy_bits"] == pytest.approx(2.0)
    assert spread["load_imbalance"] == pytest.approx(1.0)
    assert spread["dead_experts"] == 0.0
    # 0.97 * log2(1 / 0.97) + 3 * 0.01 * log2(100), a token's own uncertainty.
    assert spread["gate_entropy_bits"] == pytest.approx(-0.97 * math.log2(0.97) + 0.03 * math.log2(100), rel=1e-5)


def test_a_collapsed_gate():
    numbers = describe(top_1([[1.0, 0.0, 0.0, 0.0]] * 5), labels=[0, 1, 0, 1, 1])
    assert numbers == {
        "load_imbalance": 4.0,
        "dead_experts": 3.0,
        "usage_entropy_bits": 0.0,
        "dropped_share": 0.0,
        "unassigned_share": 0.0,
        "load_imbalance_soft": 4.0,
        "dead_experts_soft": 3.0,
        "usage_entropy_soft_bits": 0.0,
        "gate_entropy_bits": 0.0,
        "class_information_bits": 0.0,
        "class_information_corrected_bits": 0.0,
        "class_information_soft_bits": 0.0,
    }


def test_a_dense_gate_that_has_collapsed_shows_it_in_its_probabilities_only():
    one = top_1([[0.75, 0.25, 0.0, 0.0]] * 2)
    dense = replace(
        one,
        row_ids_A=torch.arange(2).repeat_interleave(4),
        expert_ids_A=torch.arange(4).repeat(2),
        weights_A=torch.ones(8),
        wanted_E=None,
    )
    numbers = describe(dense)
    assert (numbers["load_imbalance"], numbers["dead_experts"], numbers["usage_entropy_bits"]) == (1.0, 0.0, 2.0)
    assert (numbers["load_imbalance_soft"], numbers["dead_experts_soft"]) == (3.0, 2.0)
    assert numbers["usage_entropy_soft_bits"] == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)


def test_usage_is_the_entropy_of_the_mean_and_the_gates_the_mean_of_the_entropies():
    # Mean (1/2, 1/2): 1 bit; each token for itself -0.9 log2 0.9 - 0.1 log2 0.1 = 0.469 bits.
    numbers = describe(top_1([[0.9, 0.1], [0.1, 0.9]]))
    assert numbers["usage_entropy_soft_bits"] == pytest.approx(1.0)
    assert numbers["gate_entropy_bits"] == pytest.approx(0.468996, abs=1e-5)


def test_loads_by_hand():
    # Loads (3, 1, 0): even is 4/3.
    numbers = describe(top_1([[0.6, 0.4, 0.0]] * 3 + [[0.4, 0.6, 0.0]], num_dropped=1))
    assert numbers["load_imbalance"] == pytest.approx(3 / (4 / 3))
    assert numbers["usage_entropy_bits"] == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert numbers["dead_experts"] == 1.0
    assert numbers["dropped_share"] == pytest.approx(1 / 5)


def test_tokens_without_any_expert_are_counted_once():
    # Of four tokens, two choices each: token 0 keeps both, token 2 one, tokens 1 and 3 none.
    kept = replace(
        top_1([[0.6, 0.4]] * 4),
        row_ids_A=torch.tensor([0, 0, 2]),
        expert_ids_A=torch.tensor([0, 1, 0]),
        weights_A=torch.ones(3),
        wanted_E=torch.tensor([4, 4]),
    )
    numbers = describe(kept)
    assert numbers["unassigned_share"] == 2 / 4
    assert numbers["dropped_share"] == 5 / 8
    assert numbers["load_imbalance"] == pytest.approx(2 / 1.5)


@pytest.mark.parametrize("key", ["assignments_E", "probs_E"])
@pytest.mark.parametrize(("load", "dead"), [(9.0, 1.0), (10.0, 0.0)])
def test_an_expert_below_a_hundredth_of_an_even_load_is_dead(key, load, dead):
    # The even load is 1000, a hundredth of it 10.
    sums = {**routing_sums(top_1([[0.5, 0.5]])), key: torch.tensor([2000 - load, load]).double()}
    assert describe_routing(sums)["dead_experts" if key == "assignments_E" else "dead_experts_soft"] == dead


# What experts know


def test_what_experts_know_of_the_class():
    # Expert = class for the most probable one; the gate itself is only 3/4 sure.
    sure = describe(top_1([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75], [0.25, 0.75]]), labels=[0, 0, 1, 1])
    assert sure["class_information_bits"] == pytest.approx(1.0)
    assert sure["class_information_soft_bits"] == pytest.approx(2 - (0.75 * math.log2(8 / 3) + 0.75), rel=1e-5)
    # The same experts for both classes.
    blind = describe(top_1([[0.75, 0.25], [0.25, 0.75], [0.75, 0.25], [0.25, 0.75]]), labels=[0, 0, 1, 1])
    assert blind["class_information_bits"] == pytest.approx(0.0, abs=1e-9)
    assert blind["class_information_soft_bits"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("num_experts", "num_classes", "published"),
    [(5, 10, 2.322), (20, 100, 4.322), (12, 10, 3.322)],  # Krishnamurthy's two; and more experts than classes
)
def test_perfect_specialisation_reaches_the_maximum(num_experts, num_classes, published):
    # As many samples an expert and class as make both even: each class at one expert, or each expert at one class.
    rows = [number for number in range(num_experts * num_classes) for _ in range(2)]
    fewest = min(num_experts, num_classes)
    probs = torch.zeros(len(rows), num_experts)
    probs[range(len(rows)), [row % fewest for row in rows]] = 1.0
    labels = torch.tensor([row % fewest for row in rows])
    found = measure(sums_of(top_1(probs.tolist()), {"class": Cells(labels, num_classes)}))
    for name in ("class_information_bits", "class_information_soft_bits", "class_information_corrected_bits"):
        assert found[name].value == pytest.approx(found[name].maximum, abs=1e-9)
        assert found[name].maximum == pytest.approx(published, abs=5e-4)


def test_every_number_has_its_maximum():
    # Three experts, two classes, a factor that takes two of its many values.
    variables = {**classes([0, 1, 1, 0]), **factor_cells({"size": torch.tensor([[3.0], [4.0], [3.0], [3.0]])})}
    found = measure(sums_of(top_1([[0.5, 0.25, 0.25]] * 4), variables))
    bits = math.log2(3)
    assert {name: one.maximum for name, one in found.items()} == {
        "load_imbalance": 3.0,
        "dead_experts": 2.0,
        "usage_entropy_bits": bits,
        "dropped_share": 1.0,
        "unassigned_share": 1.0,
        "load_imbalance_soft": 3.0,
        "dead_experts_soft": 2.0,
        "usage_entropy_soft_bits": bits,
        "gate_entropy_bits": bits,
        "class_information_bits": 1.0,
        "class_information_corrected_bits": 1.0,
        "class_information_soft_bits": 1.0,
        "factor_size_information_bits": 1.0,
        "factor_size_information_corrected_bits": 1.0,
        "factor_size_information_soft_bits": 1.0,
    }


def test_tables_of_values_by_expert():
    routing = top_1([[0.75, 0.25], [0.125, 0.875], [0.5, 0.5], [0.25, 0.75]], rows_per_sample=2)
    # Two samples of two tokens: rows 0 1 have class 2, rows 2 3 have class 0.
    sums = table_sums(routing, classes([2, 0], 3))
    assert {key: table.tolist() for key, table in sums.items()} == {
        "class_favourite_VE": [[1, 1], [0, 0], [1, 1]],
        "class_soft_VE": [[0.75, 1.25], [0, 0], [0.875, 1.125]],
    }


def test_two_choices_count_once_as_favourite():
    both = replace(
        top_1([[0.6, 0.3, 0.1]]), row_ids_A=torch.tensor([0, 0]), expert_ids_A=torch.tensor([0, 1]), wanted_E=None
    )
    assert table_sums(both, classes([1]))["class_favourite_VE"].tolist() == [[0, 0, 0], [1, 0, 0]]
    assert routing_sums(both)["assignments_E"].tolist() == [1, 1, 0]


def test_each_filter_of_a_gate_of_filters_counts():
    # Two samples, two filters: the filters of sample 0 prefer experts 0 and 1, those of sample 1 expert 1 both.
    probs_TCE = torch.tensor([[[0.75, 0.25], [0.0, 1.0]], [[0.25, 0.75], [0.5, 0.5]]])
    filters = Routing(
        num_rows=2,
        num_experts=2,
        row_ids_A=torch.tensor([0, 0, 1, 1]),
        expert_ids_A=torch.tensor([0, 1, 0, 1]),
        weights_A=probs_TCE.transpose(1, 2).reshape(4, 2),
        logits_TE=probs_TCE.log(),
        probs_TE=probs_TCE,
    )
    sums = sums_of(filters, classes([1, 0]))
    assert sums["class_favourite_VE"].tolist() == [[1, 1], [1, 1]]
    assert sums["class_soft_VE"].tolist() == [[0.75, 1.25], [0.75, 1.25]]
    assert (sums["tokens"], sums["distributions"]) == (2, 4)
    # H(3/4) = 0.8113 twice, 0 and 1: over four distributions.
    assert describe_routing(sums)["gate_entropy_bits"] == pytest.approx((2 * 0.811278 + 0 + 1) / 4, abs=1e-6)


def test_soft_moe_is_measured_by_its_tokens():
    # Two samples of three tokens; logits log 3 : 1 for expert 0 or 1, the two slots of an expert alike.
    gate = SoftGate(torch.nn.Identity(), num_experts=2, slots_per_expert=2)
    preferred = [0, 0, 1, 1, 1, 1]
    x_TS = torch.tensor([[math.log(3.0) * (slot // 2 == one) for slot in range(4)] for one in preferred])
    routing = gate.route(x_TS, Context(0, 0, torch.arange(2), training=False, rows_per_sample=3))
    assert routing.num_rows == 8  # slots
    sums = sums_of(routing, classes([1, 0]))
    assert (sums["tokens"], sums["unassigned"], sums["assignments_E"].tolist()) == (6, 0, [4, 4])
    assert sums["class_favourite_VE"].tolist() == [[0, 3], [2, 1]]
    torch.testing.assert_close(sums["class_soft_VE"], torch.tensor([[0.75, 2.25], [1.75, 1.25]]).double())
    assert describe_routing(sums)["gate_entropy_bits"] == pytest.approx(0.811278, abs=1e-6)


def test_tokens_that_no_expert_chooses():
    # Capacity 1 * 4 / 2: expert 0 takes tokens 2 and 3, expert 1 tokens 0 and 1. With half of it, each takes one.
    gate = ExpertChoiceGate(torch.nn.Identity(), num_experts=2, capacity_factor=1.0)
    gate_logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    routing = gate.route(gate_logits, Context(0, 0, torch.arange(1), training=False, rows_per_sample=4))
    assert describe(routing)["unassigned_share"] == 0.0
    gate.capacity_factor = 0.5
    halved = gate.route(gate_logits, Context(0, 0, torch.arange(1), training=False, rows_per_sample=4))
    assert describe(halved)["unassigned_share"] == 0.5


def test_a_gate_without_probabilities_has_tables_of_its_assignments():
    bare = replace(
        top_1([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.25, 0.75]], rows_per_sample=2), probs_TE=None, logits_TE=None
    )
    sums = sums_of(bare, classes([1, 0]))
    assert sums["class_assigned_VE"].tolist() == [[0, 2], [2, 0]]
    assert sorted(describe_routing(sums)) == [
        "dead_experts",
        "dropped_share",
        "load_imbalance",
        "unassigned_share",
        "usage_entropy_bits",
    ]


def test_no_rows_are_described_without_dividing_by_zero():
    variables = {**classes([]), **factor_cells({"place": torch.zeros(0, 2), "size": torch.zeros(0)})}
    found = measure(sums_of(empty(), variables))
    assert {name: one.value for name, one in found.items()} == dict.fromkeys(found, 0.0)
    assert found["factor_size_information_bits"].maximum == 0.0
    bare = replace(empty(), probs_TE=None, logits_TE=None)
    assert table_sums(bare, classes([]))["class_assigned_VE"].tolist() == [[0, 0], [0, 0]]


# Factors


def test_a_factor_counts_at_the_nearest_value_of_the_grid():
    values = [-4.0, 4.0, 0.0, 31.0, 0.3, 0.07, -0.9, 1.4, 1.6, 2.5, -2.5, 37.0, 180.0, -1e9, 2000.0]
    nearest = [-4.0, 4.0, 0.0, 31.0, 0.25, 0.125, -0.875, 1.0, 2.0, 2.0, -3.0, 40.0, 192.0, -1024.0, 1024.0]
    cells = factor_cells({"one": torch.tensor(values)})["factor_one"]
    assert [FACTOR_GRID[cell] for cell in cells.ids_B.tolist()] == nearest
    assert cells.num_values == len(FACTOR_GRID) == 119


def test_whole_numbers_up_to_32_are_told_apart():
    cells = factor_cells({"category": torch.arange(-32, 33)})["factor_category"]
    assert len(set(cells.ids_B.tolist())) == 65


def test_two_columns_are_one_variable():
    # The expert is the parity of down + right: each column alone tells nothing of it.
    places = torch.cartesian_prod(torch.arange(-4.0, 4.0), torch.arange(-4.0, 4.0))
    probs = [[1.0, 0.0] if int(down + right) % 2 == 0 else [0.0, 1.0] for down, right in places.tolist()]
    routing, cells = top_1(probs), factor_cells({"place": places, "down": places[:, 0]})
    numbers = describe_routing(sums_of(routing, cells))
    assert numbers["factor_place_information_bits"] == pytest.approx(1.0)
    assert numbers["factor_down_information_bits"] == pytest.approx(0.0, abs=1e-9)
    first = [divmod(cell, len(FACTOR_GRID)) for cell in cells["factor_place"].ids_B.tolist()]
    assert [(FACTOR_GRID[down], FACTOR_GRID[right]) for down, right in first] == [tuple(one) for one in places.tolist()]


def test_more_columns_are_variables_of_their_own_up_to_a_limit():
    three = factor_cells({"pose": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])})
    found = {name: [FACTOR_GRID[cell] for cell in cells.ids_B.tolist()] for name, cells in three.items()}
    assert found == {"factor_pose_0": [1.0, 4.0], "factor_pose_1": [2.0, 5.0], "factor_pose_2": [3.0, 6.0]}
    assert len(factor_cells({"pose": torch.zeros(2, MAX_FACTOR_COLUMNS)})) == MAX_FACTOR_COLUMNS
    assert factor_cells({"embedding": torch.zeros(2, MAX_FACTOR_COLUMNS + 1)}) == {}


# Against loops


def entropy_by_loop(counts: "Counter[object]") -> float:
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values() if count > 0)


def information_by_loop(pairs: list[tuple[int, int, float]]) -> float:
    """Of (value, expert, weight)."""
    values, experts, joint = Counter[object](), Counter[object](), Counter[object]()
    for value, expert, weight in pairs:
        values[value] += weight
        experts[expert] += weight
        joint[value, expert] += weight
    return entropy_by_loop(values) + entropy_by_loop(experts) - entropy_by_loop(joint)


@st.composite
def samples(draw: st.DrawFn) -> tuple[list[list[float]], list[int], int]:
    """Probabilities of tokens, labels of samples, tokens a sample."""
    num_experts, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    labels = draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    weights = st.lists(st.integers(0, 8), min_size=num_experts, max_size=num_experts).filter(any)
    rows = draw(st.lists(weights, min_size=len(labels) * tokens, max_size=len(labels) * tokens))
    return [[one / sum(row) for one in row] for row in rows], labels, tokens


@settings(deadline=None, derandomize=True, max_examples=60)
@given(samples())
def test_numbers_agree_with_loops_over_tokens(drawn):
    probs, labels, tokens = drawn
    labels_T = [label for label in labels for _ in range(tokens)]
    found = measure(sums_of(top_1(probs, rows_per_sample=tokens), classes(labels, 4)))
    favourites = [max(range(len(row)), key=lambda expert: (row[expert], -expert)) for row in probs]
    num_experts = len(probs[0])
    mean = Counter({expert: sum(row[expert] for row in probs) for expert in range(num_experts)})
    load = Counter(favourites)
    expected = {
        "load_imbalance": max(load.values()) * num_experts / len(probs),
        "dead_experts": float(num_experts - len(load)),
        "usage_entropy_bits": entropy_by_loop(load),
        "load_imbalance_soft": max(mean.values()) * num_experts / len(probs),
        "usage_entropy_soft_bits": entropy_by_loop(mean),
        "gate_entropy_bits": sum(entropy_by_loop(Counter(dict(enumerate(row)))) for row in probs) / len(probs),
        "class_information_bits": information_by_loop(list(zip(labels_T, favourites, [1.0] * len(probs), strict=True))),
        "class_information_soft_bits": information_by_loop(
            [
                (label, expert, row[expert])
                for label, row in zip(labels_T, probs, strict=True)
                for expert in range(num_experts)
            ]
        ),
    }
    assert {name: found[name].value for name in expected} == pytest.approx(expected, abs=1e-6)
    assert all(-1e-9 <= one.value <= one.maximum + 1e-6 for one in found.values())


@settings(deadline=None, derandomize=True, max_examples=40)
@given(samples(), st.randoms(use_true_random=False))
def test_sums_of_parts_in_any_order_are_the_sums_of_the_whole(drawn, random):
    probs, labels, tokens = drawn
    order = list(range(len(labels)))
    random.shuffle(order)
    cut = random.randint(0, len(order))
    totals: Sums = {}
    for part in (order[:cut], order[cut:]):
        rows = [probs[sample * tokens + token] for sample in part for token in range(tokens)]
        routing = top_1(rows, rows_per_sample=tokens) if rows else empty(len(probs[0]))
        places = torch.tensor([[labels[sample] - 2.0, labels[sample] / 4] for sample in part]).view(-1, 2)
        add_sums(totals, sums_of(routing, classes([labels[s] for s in part], 4) | factor_cells({"place": places})))
    places = torch.tensor([[label - 2.0, label / 4] for label in labels])
    whole = sums_of(top_1(probs, rows_per_sample=tokens), classes(labels, 4) | factor_cells({"place": places}))
    assert totals.keys() == whole.keys()
    for name, total in totals.items():
        torch.testing.assert_close(total, whole[name], rtol=1e-6, atol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(samples(), st.randoms(use_true_random=False))
def test_numbers_do_not_depend_on_the_names_of_experts_and_classes(drawn, random):
    probs, labels, tokens = drawn
    experts, names = list(range(len(probs[0]))), list(range(4))
    random.shuffle(experts)
    random.shuffle(names)
    # Favourites among equals go by expert id, so that their names matter: keep to tokens with one favourite.
    sure = [[one + (expert == row.index(max(row))) for expert, one in enumerate(row)] for row in probs]
    sure = [[one / sum(row) for one in row] for row in sure]
    renamed = [[row[expert] for expert in experts] for row in sure]
    before = describe_routing(sums_of(top_1(sure, rows_per_sample=tokens), classes(labels, 4)))
    after = describe_routing(
        sums_of(top_1(renamed, rows_per_sample=tokens), classes([names[label] for label in labels], 4))
    )
    assert after == pytest.approx(before, abs=1e-6)
