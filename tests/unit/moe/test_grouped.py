"""The products of stacked MLPs: each against plain operations, one expert at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from distmoe.moe import grouped
from distmoe.moe.grouped import PRODUCTS, Weights, _spans, fastest, fastest_product, grouped_mlp, loop_mlp
from tests.threads import assert_equal_bits_on_two_threads

WIDTH, HIDDEN = 8, 16  # multiples of 16 bytes in every type, as grouped_mm wants them
FUNCTIONS = {"relu": F.relu, "gelu": F.gelu}


def problem(counts, dtype=torch.float64, seed=0):
    """Rows, weights, and gradients to come back with, for outputs and for hidden layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(WIDTH, HIDDEN), (HIDDEN,), (HIDDEN, WIDTH), (WIDTH,)]

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = draw(sum(counts), WIDTH).requires_grad_()
    weights = Weights(*(draw(len(counts), *shape).requires_grad_() for shape in shapes))
    return rows, weights, draw(sum(counts), WIDTH), draw(sum(counts), HIDDEN)


def by_the_loop(rows, counts, weights, activation):
    """Outputs and hidden layers by plain operations on each expert's rows."""
    outputs, befores = [], []
    for x, w1, b1, w2, b2 in zip(rows.split(list(counts)), *weights, strict=True):
        befores.append(x @ w1 + b1)
        outputs.append(FUNCTIONS[activation](befores[-1]) @ w2 + b2)
    return torch.cat(outputs), torch.cat(befores)


# float64 differs by the order of summation only; float32, which is all that grouped_mm takes, by rounding of sums of up
# to 25 terms of size about 10.
@pytest.mark.parametrize(
    ("product", "dtype", "tolerance"), [("loop", torch.float64, 1e-12), ("grouped", torch.float32, 1e-4)]
)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    activation=st.sampled_from(sorted(FUNCTIONS)),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_everything_is_as_from_each_expert_alone(product, dtype, tolerance, counts, activation, seed):
    rows, weights, towards, towards_hidden = problem(counts, dtype, seed)
    leaves = (rows, *weights)
    ours = PRODUCTS[product](rows, counts, weights, activation, with_hidden=True)
    expected = by_the_loop(rows, counts, weights, activation)
    found = [*ours, *torch.autograd.grad(ours, leaves, (towards, towards_hidden))]
    wanted = [*expected, *torch.autograd.grad(expected, leaves, (towards, towards_hidden))]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_without_a_gradient_the_loop_gives_the_same(activation):
    counts = [3, 0, 2]
    rows, weights, _, _ = problem(counts)
    outputs, hidden = by_the_loop(rows, counts, weights, activation)
    with torch.no_grad():
        torch.testing.assert_close(loop_mlp(rows, counts, weights, activation), outputs, rtol=1e-12, atol=1e-12)
        both = loop_mlp(rows, counts, weights, activation, with_hidden=True)
    torch.testing.assert_close(both, (outputs, hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [0, 1])
def test_outputs_alone_or_hidden_layers_alone_may_be_used(used):
    counts = [2, 0, 3]
    rows, weights, *towards = problem(counts)
    ours = loop_mlp(rows, counts, weights, "gelu", with_hidden=True)[used]
    expected = by_the_loop(rows, counts, weights, "gelu")[used]
    found = torch.autograd.grad(ours, (rows, *weights), towards[used])
    wanted = torch.autograd.grad(expected, (rows, *weights), towards[used], allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["rows", "weights"])
def test_what_is_frozen_may_get_no_gradient(frozen):
    counts = [2, 3]
    rows, weights, towards, _ = problem(counts)
    if frozen == "rows":
        rows = rows.detach()
    else:
        weights = Weights(*(weight.detach() for weight in weights))
    leaves = weights if frozen == "rows" else (rows,)
    ours = torch.autograd.grad(loop_mlp(rows, counts, weights, "gelu"), leaves, towards)
    expected = torch.autograd.grad(by_the_loop(rows, counts, weights, "gelu")[0], leaves, towards)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_gradients_and_their_gradients_are_those_of_finite_differences():
    counts = [1, 0, 1]
    rows, weights, _, _ = problem(counts)

    def run(rows, *weights):
        return loop_mlp(rows, counts, Weights(*weights), "gelu", with_hidden=True)

    assert torch.autograd.gradcheck(run, (rows, *weights))
    assert torch.autograd.gradgradcheck(run, (rows, *weights))


@pytest.mark.parametrize("product", PRODUCTS)
def test_an_expanded_gradient_is_taken(product):
    counts = [2, 1]
    rows, weights, _, _ = problem(counts, torch.float32)
    ours = PRODUCTS[product](rows, counts, weights, "relu", True)
    expected = by_the_loop(rows, counts, weights, "relu")
    for one, other in zip(ours, expected, strict=True):
        (found,) = torch.autograd.grad(one.sum(), (rows,), retain_graph=True)
        (wanted,) = torch.autograd.grad(other.sum(), (rows,), retain_graph=True)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.parametrize("frozen", ["rows", "weights"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    counts = [2, 0, 3]
    rows, weights, towards, _ = problem(counts, torch.float32)
    every = torch.autograd.grad(loop_mlp(rows, counts, weights, "gelu"), (rows, *weights), towards)
    inputs = [rows.detach().requires_grad_(frozen != "rows")]
    inputs += [weight.detach().requires_grad_(frozen != "weights") for weight in weights]
    loop_mlp(inputs[0], counts, type(weights)(*inputs[1:]), "gelu").backward(towards)
    for one, expected in zip(inputs, every, strict=True):
        assert (one.grad is None) == (not one.requires_grad)
        assert one.grad is None or torch.equal(one.grad, expected)


def test_infinite_rows_of_one_expert_do_not_reach_the_weights_of_another():
    counts = [33, 40]
    rows, weights, towards, _ = problem(counts, torch.bfloat16)
    rows = rows.detach().clone()
    rows[33:] = torch.inf
    towards[33:] = 0.0
    found = torch.autograd.grad(loop_mlp(rows, counts, weights, "relu"), weights, towards)
    assert all(bool(gradient[0].isfinite().all()) for gradient in found)


def test_timing_the_products_leaves_the_callers_generator_and_mode_alone(monkeypatch):
    def first_of(run):
        run()  # builds a graph, also in inference mode
        return 0.0

    monkeypatch.setattr(grouped, "_cuda_seconds", first_of)
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert grouped._timed.__wrapped__("cpu", torch.device("cpu"), torch.float32, 2, 8, 16) == "loop"
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("counts", [[33, 1, 0, 70], [31, 32, 0], [0, 0], [700, 513]])
def test_rows_that_are_padded_in_half_precision_change_nothing(counts):
    rows, weights, towards, towards_hidden = problem(counts, torch.bfloat16)
    ours = loop_mlp(rows, counts, weights, "gelu", with_hidden=True)
    found = [*ours, *torch.autograd.grad(ours, (rows, *weights), (towards, towards_hidden))]
    exact = [tensor.detach().float().requires_grad_() for tensor in (rows, *weights)]
    expected = by_the_loop(exact[0], counts, exact[1:], "gelu")
    wanted = [*expected, *torch.autograd.grad(expected, exact, (towards.float(), towards_hidden.float()))]
    for one, other in zip(found, [one.detach() for one in wanted], strict=True):
        # bfloat16 keeps 8 bits and the hidden layer is rounded twice: 2^-6 of the largest entry is two such steps.
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one.float(), other, rtol=0, atol=2.0**-6 * scale)


def test_half_precision_on_a_cpu_multiplies_few_different_numbers_of_rows():
    def padded(dtype, counts):
        rows = torch.zeros(sum(counts), 1, dtype=dtype)
        return [end - start for start, _, end in _spans(rows, counts)]

    assert padded(torch.bfloat16, [0, 1, 32, 33, 512, 513, 1000]) == [0, 32, 32, 64, 512, 576, 1024]
    assert padded(torch.float32, [0, 1, 33, 513]) == [0, 1, 33, 513]
    # 8 between 512 and 1024, and so on: a few of a thousand.
    assert len({padded(torch.float16, [count])[0] for count in range(1, 1025)}) <= 25


@pytest.mark.parametrize("grad", [True, False])
def test_the_flop_counter_sees_every_product(grad):
    counts = [2, 0, 3]
    rows, weights, _, _ = problem(counts)
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        loop_mlp(rows, counts, weights, "gelu")
    # Two operations a multiply-add, two layers, 5 rows.
    assert counter.get_total_flops() == 2 * 2 * 5 * WIDTH * HIDDEN


def test_two_threads_give_the_same_bits_every_time():
    counts = [700, 0, 37, 1300]
    rows, weights, towards, _ = problem(counts, torch.float32)

    def once():
        outputs = loop_mlp(rows, counts, weights, "gelu")
        return outputs, *torch.autograd.grad(outputs, (rows, *weights), towards)

    assert_equal_bits_on_two_threads(once)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("counts", [[2, 2, 2], [2, 3], [1, 1, 1, 2]])
def test_counts_that_do_not_add_up_or_are_of_other_experts_are_an_error(product, counts):
    rows, weights, _, _ = problem([2, 1, 2])
    with pytest.raises(
        ValueError, match=f"{len(counts)} experts with {sum(counts)} rows, but there are 3 experts and 5"
    ):
        PRODUCTS[product](rows, counts, weights, "relu")


def test_the_fastest_product_is_the_one_with_the_fewest_seconds():
    seconds = {"loop": 2.0, "grouped": 1.0}
    ran = []

    def candidate(name):
        return lambda: ran.append(name)

    def measure(run):
        run()
        return seconds[ran[-1]]

    candidates = {name: candidate(name) for name in seconds}
    assert fastest(candidates, measure) == "grouped"
    assert ran == ["loop", "grouped"]
    seconds["loop"] = 1.0
    assert fastest(candidates, measure) == "loop"  # the first among equals


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_on_a_cpu_the_product_is_not_chosen_by_the_clock(dtype, monkeypatch):
    monkeypatch.setattr("distmoe.moe.grouped._timed", lambda *_: pytest.fail("timed"))
    assert fastest_product(torch.empty(2, 8, 8, dtype=dtype)) == "loop"


def test_what_a_kernel_leaves_in_the_gradient_of_an_expert_without_rows_is_cleared(monkeypatch):
    real = F.grouped_mm

    def leaves_something(x, weight, offs):
        return real(x, weight, offs=offs) + (weight[1] - weight[1].detach()).sum()

    monkeypatch.setattr(F, "grouped_mm", leaves_something)
    counts = [2, 0, 3]
    rows, weights, towards, _ = problem(counts, torch.float32)
    for grad in torch.autograd.grad(grouped_mlp(rows, counts, weights, "gelu"), weights, towards):
        assert [bool(grad[expert].any()) for expert in range(3)] == [True, False, True]


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 8), (torch.float32, 6)])
def test_what_grouped_mm_does_not_take_is_refused(dtype, width):
    weights = Weights(*(torch.zeros(1, *shape, dtype=dtype) for shape in [(width, 8), (8,), (8, width), (width,)]))
    with pytest.raises(ValueError, match=rf"widths {width} and 8 in torch.{dtype}".replace("torch.torch", "torch")):
        grouped_mlp(torch.zeros(2, width, dtype=dtype), [2], weights, "relu")
