import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from distmoe.contracts import Context
from distmoe.moe.experts import MLPExperts, ModuleExperts
from distmoe.moe.gates.base import Gate
from distmoe.moe.gates.dense import DenseGate
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.layer import MoELayer
from tests.oracles import mixture_output, mlp_experts, top_k_choices

WIDTH, HIDDEN = 3, 4


def context(num_samples: int, training: bool = True) -> Context:
    return Context(seed=0, step=0, sample_ids=torch.arange(num_samples), training=training)


def layer(num_experts: int, k: int | None, seed: int = 0) -> MoELayer:
    torch.manual_seed(seed)
    network = nn.Linear(WIDTH, num_experts)
    gate = DenseGate(network, num_experts) if k is None else TopKGate(network, num_experts, k, renormalize=k > 1)
    experts = MLPExperts(range(num_experts), WIDTH, HIDDEN)
    nn.init.normal_(experts.b1)
    nn.init.normal_(experts.b2)
    return MoELayer(gate, experts)


def by_the_loop(moe: MoELayer, x_TD: torch.Tensor, k: int | None) -> torch.Tensor:
    """The same layer by loops over rows: softmax, top-k, weights, experts, sum."""
    probs = moe.gate.network(x_TD).softmax(-1)
    num_experts = moe.gate.num_experts
    choices = [list(range(num_experts))] * len(x_TD) if k is None else top_k_choices(probs.tolist(), k)
    rows, chosen, weights = [], [], []
    for row, experts in enumerate(choices):
        total = sum(probs[row, expert] for expert in experts) if k is not None and k > 1 else 1.0
        rows += [row] * len(experts)
        chosen += experts
        weights += [probs[row, expert] / total for expert in experts]
    experts = moe.experts
    functions = mlp_experts(experts.w1, experts.b1, experts.w2, experts.b2, F.gelu)
    return mixture_output(x_TD, rows, chosen, torch.stack(weights) if weights else x_TD.new_zeros(0), functions)


@given(
    shape=st.sampled_from([(6,), (0,), (2, 3), (1, 5), (2, 2, 3), (0, 2, 2), (1, 1, 1)]),
    num_experts=st.integers(1, 5),
    k=st.sampled_from([None, 1, 2, 5]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50, derandomize=True)
def test_outputs_and_gradients_equal_the_loop_for_any_number_of_axes(shape, num_experts, k, seed):
    k = None if k is None else min(k, num_experts)
    if k == 1 == num_experts:
        k = None
    moe = layer(num_experts, k, seed).double()
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    towards = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)

    def with_gradients(compute):
        leaf = x.clone().requires_grad_()
        y = compute(leaf)
        moe.zero_grad()
        (y * towards).sum().backward()
        # The loop leaves no gradient where it touched nothing; ours must be zero there.
        return y, *(
            torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in (leaf, *moe.parameters())
        )

    ours = with_gradients(lambda leaf: moe(leaf, context(shape[0]))[0])
    expected = with_gradients(lambda leaf: by_the_loop(moe, leaf.reshape(-1, WIDTH), k).reshape(x.shape))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)  # float64: the order of summation


@pytest.mark.parametrize(("shape", "rows_per_sample"), [((4,), 1), ((4, 5), 5), ((4, 2, 3), 6)])
def test_the_routing_says_how_many_tokens_a_sample_has(shape, rows_per_sample):
    _, routing = layer(3, 2)(torch.randn(*shape, WIDTH), context(4))
    assert (routing.num_rows, routing.rows_per_sample) == (4 * rows_per_sample, rows_per_sample)


def test_capacity_acts_inside_an_image_of_a_feature_map():
    class TokensAreLogits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    gate = TopKGate(TokensAreLogits(), 2, k=1, renormalize=False, capacity_factor=1.0, group="image")
    moe = MoELayer(gate, ModuleExperts(range(2), nn.Identity))
    x = torch.tensor([1.0, 0.0]).expand(3, 2, 2, 2)  # three images of 2 x 2 tokens, all for expert 0
    y, routing = moe(x, context(3))
    # Capacity 1.0 * 1 * 4 / 2 = 2: the first two tokens of each image, which are its first row of pixels.
    assert routing.row_ids_A.tolist() == [0, 1, 4, 5, 8, 9]
    assert [bool(token.abs().sum() > 0) for token in y.reshape(12, 2)] == [True, True, False, False] * 3


def test_whole_images_can_be_tokens():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * 4 * 4, 3))
    experts = ModuleExperts(range(3), lambda: nn.Conv2d(2, 2, 3, padding=1))
    moe = MoELayer(TopKGate(network, 3, k=2), experts, token_dims=3)
    x = torch.randn(5, 2, 4, 4)
    y, routing = moe(x, context(5))
    probs = network(x).softmax(-1)
    choices = top_k_choices(probs.tolist(), 2)
    for row, (first, second) in enumerate(choices):
        modules = list(experts.modules_by_id.values())
        odds = probs[row, first], probs[row, second]
        expected = (odds[0] * modules[first](x[row : row + 1]) + odds[1] * modules[second](x[row : row + 1]))[0]
        torch.testing.assert_close(y[row], expected / sum(odds), rtol=1e-4, atol=1e-5)  # float32 convolutions
    assert (routing.num_rows, routing.rows_per_sample) == (5, 1)


def test_without_a_context_it_gives_the_same():
    moe, x = layer(3, 2), torch.randn(4, 5, WIDTH)
    assert torch.equal(moe(x)[0], moe(x, context(4))[0])
    assert moe(x)[1].rows_per_sample == 5


class ContextKeeper(DenseGate):
    """Remembers what it was given."""

    def route(self, x_T, context):
        self.seen = context
        return super().route(x_T, context)


def test_without_a_context_noise_is_keyed_by_torchs_generator_in_training_only():
    gate = ContextKeeper(nn.Linear(WIDTH, 2), 2)
    moe = MoELayer(gate, MLPExperts(range(2), WIDTH, HIDDEN))
    x = torch.randn(4, WIDTH)
    seeds = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        moe(x)
        seeds.append(gate.seen.seed)
    assert seeds[0] == seeds[1] != seeds[2]
    assert gate.seen.training
    moe.eval()
    state = torch.get_rng_state()
    moe(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not gate.seen.training
    assert gate.seen.sample_ids.tolist() == [0, 1, 2, 3]


def test_the_output_has_the_inputs_dtype_and_is_close_in_bfloat16():
    moe, x = layer(3, 2), torch.randn(6, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = moe(x, context(6))
        y_half, _ = moe(x.bfloat16(), context(6))
    assert (y.dtype, y_half.dtype) == (torch.float32, torch.bfloat16)
    # bfloat16 keeps 8 bits: two matrix products of a few terms of size about 1 are off by up to a few times 2^-8.
    torch.testing.assert_close(y, moe(x, context(6))[0], rtol=0.03, atol=0.03)


class AttentiveGate(Gate):
    """Weighs by what the experts' hidden states say: the mean of the hidden state itself."""

    def route(self, x_T, context):
        routing = DenseGate(self.network, self.num_experts).route(x_T, context)
        return type(routing)(**{**vars(routing), "weights_A": None})

    def weigh(self, routing, gathered_A):
        _, hidden = gathered_A
        return type(routing)(**{**vars(routing), "weights_A": hidden.mean(-1)})


def test_a_gate_may_weigh_after_the_experts():
    class WithHidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            hidden = self.layer(x)
            return 2 * hidden, hidden

    torch.manual_seed(0)
    experts = ModuleExperts(range(2), WithHidden)
    y, routing = MoELayer(AttentiveGate(nn.Linear(WIDTH, 2), 2), experts)(x := torch.randn(4, WIDTH), context(4))
    hidden = [module.layer(x) for module in experts.modules_by_id.values()]
    expected = sum(2 * one * one.mean(-1, keepdim=True) for one in hidden)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)  # float32
    torch.testing.assert_close(routing.weights_A.view(4, 2)[:, 1], hidden[1].mean(-1), rtol=1e-5, atol=1e-6)


def test_two_threads_give_the_same_bits_every_time():
    torch.manual_seed(0)
    moe = MoELayer(TopKGate(nn.Linear(64, 4), 4, k=2), MLPExperts(range(4), 64, 64))
    x = torch.randn(8, 64, 64)

    def once() -> list[torch.Tensor]:
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        y, _ = moe(leaf, context(16))
        y.square().sum().backward()
        return [y.detach(), leaf.grad, *(parameter.grad.clone() for parameter in moe.parameters())]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = once()
        for _ in range(3):
            assert all(torch.equal(one, other) for one, other in zip(first, once(), strict=True))
    finally:
        torch.set_num_threads(threads)
