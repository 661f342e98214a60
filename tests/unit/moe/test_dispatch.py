import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.moe.dispatch import LocalDispatcher, Placement, counts
from tests.oracles import gathered_outputs, grouped_assignments, mixture_output
from tests.threads import assert_equal_bits_on_two_threads

X = torch.tensor([[10.0, 0.0], [11.0, 1.0], [12.0, 2.0]])
ROWS = torch.tensor([2, 0, 1, 2, 0])
EXPERTS = torch.tensor([1, 3, 1, 0, 1])  # expert 2 gets nothing


def scaled(factors: torch.Tensor) -> list:
    """Expert e multiplies by factors[e] and squares, so that outputs tell expert and row apart."""
    return [lambda x, factor=factor: factor * x + (factor * x).square() for factor in factors.unbind()]


def run(dispatcher, x, row_ids, expert_ids, weights, factors):
    rows, counts, plan = dispatcher.dispatch(x, row_ids, expert_ids)
    outputs = [expert(piece) for expert, piece in zip(scaled(factors), rows.split(counts.tolist()), strict=True)]
    output = torch.cat(outputs)
    return dispatcher.gather(output, plan), dispatcher.combine(output, plan, weights)


def test_rows_are_grouped_by_expert_and_inside_an_expert_by_row():
    rows, counts, _ = LocalDispatcher(4).dispatch(X, ROWS, EXPERTS)
    # Expert 0: row 2. Expert 1: rows 0 1 2. Expert 2: none. Expert 3: row 0.
    assert rows[:, 1].tolist() == [2.0, 0.0, 1.0, 2.0, 0.0]
    assert counts.tolist() == [1, 3, 0, 1]


def test_the_order_of_the_assignments_does_not_change_what_experts_see():
    rows, counts, _ = LocalDispatcher(4).dispatch(X, ROWS, EXPERTS)
    for order in ([4, 3, 2, 1, 0], [1, 4, 0, 3, 2]):
        again, counts_again, _ = LocalDispatcher(4).dispatch(X, ROWS[order], EXPERTS[order])
        assert torch.equal(again, rows)
        assert torch.equal(counts_again, counts)


def test_gather_brings_one_tensor_or_several_back_in_assignment_order():
    dispatcher = LocalDispatcher(4)
    rows, _, plan = dispatcher.dispatch(X, ROWS, EXPERTS)
    assert torch.equal(dispatcher.gather(rows, plan), X[ROWS])
    first, second = dispatcher.gather((rows, rows[:, 0] * 2), plan)
    assert torch.equal(first, X[ROWS])
    assert second.tolist() == [24.0, 20.0, 22.0, 24.0, 20.0]


def test_combine_adds_weighted_outputs_and_gives_zeros_to_a_row_without_one():
    dispatcher = LocalDispatcher(2)
    rows, _, plan = dispatcher.dispatch(X, torch.tensor([2, 0, 2]), torch.tensor([1, 0, 0]))
    combined = dispatcher.combine(rows, plan, torch.tensor([0.5, 2.0, -1.0]))
    # Row 0: 2 * x0. Row 2: (0.5 - 1) * x2.
    assert combined.tolist() == [[20.0, 0.0], [0.0, 0.0], [-6.0, -1.0]]


def test_combine_takes_one_weight_a_channel():
    x = torch.arange(8.0).view(2, 2, 2)  # two tokens of 2 channels x 2 positions
    dispatcher = LocalDispatcher(1)
    rows, _, plan = dispatcher.dispatch(x, torch.tensor([1, 0]), torch.tensor([0, 0]))
    combined = dispatcher.combine(rows, plan, torch.tensor([[1.0, 10.0], [2.0, 0.0]]))
    assert combined.tolist() == [[[0.0, 2.0], [0.0, 0.0]], [[4.0, 5.0], [60.0, 70.0]]]


def test_half_precision_outputs_are_added_in_float32():
    dispatcher = LocalDispatcher(2)
    x = torch.tensor([[256.0]])
    rows, _, plan = dispatcher.dispatch(x.bfloat16(), torch.tensor([0, 0]), torch.tensor([0, 1]))
    combined = dispatcher.combine(rows, plan, torch.tensor([1.0, 1 / 256]))
    # 256 + 1: bfloat16 has 8 bits and would say 256.
    assert combined.tolist() == [[257.0]]


def test_no_rows_come_and_go():
    dispatcher = LocalDispatcher(3)
    none = torch.zeros(0, dtype=torch.long)
    rows, counts, plan = dispatcher.dispatch(torch.zeros(0, 2), none, none)
    assert counts.tolist() == [0, 0, 0]
    assert dispatcher.combine(rows, plan, torch.zeros(0)).tolist() == []
    assert dispatcher.gather(rows, plan).tolist() == []


def test_nothing_is_done_meanwhile_where_nothing_travels():
    def meanwhile() -> None:
        raise AssertionError("it was called")

    rows, _, _ = LocalDispatcher(4).dispatch(X, ROWS, EXPERTS, meanwhile)
    assert rows[:, 1].tolist() == [2.0, 0.0, 1.0, 2.0, 0.0]


def test_counts_say_how_often_each_id_occurs():
    assert counts(torch.tensor([2, 0, 2, 2]), 5).tolist() == [1, 0, 3, 0, 0]
    assert counts(torch.tensor([], dtype=torch.long), 2).tolist() == [0, 0]


def test_one_expert_may_get_everything():
    rows, counts, _ = LocalDispatcher(3).dispatch(X, torch.tensor([2, 1, 0]), torch.tensor([2, 2, 2]))
    assert counts.tolist() == [0, 0, 3]
    assert torch.equal(rows, X)


@given(
    num_rows=st.integers(0, 6),
    num_experts=st.integers(1, 5),
    num_assignments=st.integers(0, 12),
    shape=st.sampled_from([(), (3,), (2, 2)]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_outputs_and_gradients_equal_the_loop(num_rows, num_experts, num_assignments, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    num_assignments = num_assignments if num_rows else 0
    x = torch.randn(num_rows, *shape, generator=generator, dtype=torch.float64)
    row_ids = torch.randint(0, max(num_rows, 1), (num_assignments,), generator=generator)
    expert_ids = torch.randint(0, num_experts, (num_assignments,), generator=generator)
    weights = torch.randn(num_assignments, generator=generator, dtype=torch.float64)
    factors = torch.randn(num_experts, generator=generator, dtype=torch.float64)
    towards = torch.randn(num_rows, *shape, generator=generator, dtype=torch.float64)

    rows, _, _ = LocalDispatcher(num_experts).dispatch(x, row_ids, expert_ids)
    expected_rows = [x[row_ids[number]] for number in grouped_assignments(row_ids.tolist(), expert_ids.tolist())]
    assert torch.equal(rows, torch.stack(expected_rows) if expected_rows else x[:0])

    def with_gradients(compute):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, weights, factors)]
        gathered, combined = compute(*leaves)
        ((combined * towards).sum() + gathered.sum()).backward()
        return gathered, combined, *(leaf.grad for leaf in leaves)

    def fast(x, weights, factors):
        return run(LocalDispatcher(num_experts), x, row_ids, expert_ids, weights, factors)

    def slow(x, weights, factors):
        ids = row_ids.tolist(), expert_ids.tolist()
        experts = scaled(factors)
        return gathered_outputs(x, *ids, experts), mixture_output(x, *ids, weights, experts)

    for ours, expected in zip(with_gradients(fast), with_gradients(slow), strict=True):
        if expected is None:  # the loop never touched the leaf
            assert float(ours.abs().sum()) == 0.0
        else:
            # float64: only the order of a few summands differs.
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_gradients_and_their_gradients_are_those_of_finite_differences():
    x, weights = X.double().requires_grad_(), torch.tensor([0.3, -1.0, 2.0, 0.1, 0.7]).double().requires_grad_()
    factors = torch.tensor([0.1, 0.2, 0.3, 0.4]).double().requires_grad_()

    def compute(x, weights, factors):
        return run(LocalDispatcher(4), x, ROWS, EXPERTS, weights, factors)

    assert torch.autograd.gradcheck(compute, (x, weights, factors))
    assert torch.autograd.gradgradcheck(compute, (x, weights, factors))


def test_gradients_of_gradients_are_those_of_finite_differences():
    x, weights = X.double().requires_grad_(), torch.tensor([0.3, -1.0, 2.0, 0.1, 0.7]).double().requires_grad_()
    factors = torch.tensor([0.1, 0.2, 0.3, 0.4]).double().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda *leaves: run(LocalDispatcher(4), leaves[0], ROWS, EXPERTS, *leaves[1:])[1], (x, weights, factors)
    )


def test_outputs_in_half_precision_are_kept_as_they_are_for_the_backward_pass():
    dispatcher = LocalDispatcher(4)
    rows, _, plan = dispatcher.dispatch(X.bfloat16(), ROWS, EXPERTS)
    outputs, weights = rows.detach().requires_grad_(), torch.rand(5).requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        combined = dispatcher.combine(outputs, plan, weights)
    assert [one.dtype for one in kept if one.dim() == 2] == [torch.bfloat16]
    combined.sum().backward()
    assert combined.dtype == torch.float32
    order = plan.order_A
    assert torch.equal(outputs.grad, weights.detach()[order, None].expand(5, 2).bfloat16())
    # The sum over the two values of each row, exact in bfloat16.
    assert torch.equal(weights.grad, X[ROWS].sum(1))


def test_two_threads_give_the_same_bits_every_time():
    generator = torch.Generator().manual_seed(0)
    num_rows, num_experts, width = 2000, 4, 32
    x = torch.randn(num_rows, width, generator=generator)
    row_ids = torch.arange(num_rows).repeat_interleave(3)
    expert_ids = torch.randint(0, num_experts, row_ids.shape, generator=generator)
    weights = torch.randn(len(row_ids), generator=generator)
    factors = torch.randn(num_experts, generator=generator)

    def once():
        leaf = x.clone().requires_grad_()
        gathered, combined = run(LocalDispatcher(num_experts), leaf, row_ids, expert_ids, weights, factors)
        (combined.sum() + gathered.square().sum()).backward()
        return combined.detach(), leaf.grad

    assert_equal_bits_on_two_threads(once)


def test_the_default_placement_holds_all_experts_here():
    placement = Placement()
    assert placement.local_experts(4) == range(4)
    assert placement.dispatcher(4).dispatch(X, ROWS, EXPERTS)[1].tolist() == [1, 3, 0, 1]


@pytest.mark.parametrize("repeats", [2, 3])
def test_a_row_sent_to_one_expert_several_times_keeps_its_weights_apart(repeats):
    dispatcher = LocalDispatcher(1)
    row_ids = torch.zeros(repeats, dtype=torch.long)
    rows, _, plan = dispatcher.dispatch(X[:1], row_ids, row_ids)
    outputs = rows * torch.arange(1.0, 1.0 + repeats)[:, None]
    weights = 10.0 ** torch.arange(repeats)
    # 10 * (1 * 1 + 2 * 10 + 3 * 100), as far as there are repeats.
    assert dispatcher.combine(outputs, plan, weights)[0, 0] == sum(10.0 * (i + 1) * 10**i for i in range(repeats))


def test_weights_a_channel_have_the_gradients_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    dispatcher = LocalDispatcher(4)
    plan = dispatcher.dispatch(X, ROWS, EXPERTS)[2]
    assert torch.autograd.gradcheck(lambda *leaves: dispatcher.combine(leaves[0], plan, leaves[1]), (outputs, weights))


def test_outputs_that_are_not_contiguous_and_frozen_weights_are_combined():
    dispatcher = LocalDispatcher(4)
    plan = dispatcher.dispatch(X, ROWS, EXPERTS)[2]
    outputs = torch.randn(2, 5, requires_grad=True)
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    combined = dispatcher.combine(outputs.T, plan, weights)
    # Places: expert 0 has row 2, expert 1 rows 0, 1, 2, expert 3 row 0; their weights are 4, 8, 2, 0.5, 1.
    x = outputs.T
    torch.testing.assert_close(combined, torch.stack([8 * x[1] + x[4], 2 * x[2], 4 * x[0] + 0.5 * x[3]]))
    combined[1:].sum().backward()
    assert outputs.grad.tolist() == [[4.0, 0.0, 2.0, 0.5, 0.0]] * 2
