import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distmoe.moe.experts import MLPExperts, ModuleExperts
from distmoe.moe.grouped import PRODUCTS

ROWS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def mlp(activation="gelu") -> MLPExperts:
    torch.manual_seed(0)
    experts = MLPExperts(range(4, 7), width=3, hidden=8, activation=activation)
    with torch.no_grad():  # biases start at zero, which would hide a wrong one
        experts.b1.normal_()
        experts.b2.normal_()
    return experts


@pytest.mark.parametrize(("activation", "function"), [("gelu", F.gelu), ("relu", F.relu)])
@pytest.mark.parametrize("counts", [[2, 2, 1], [0, 5, 0], [3, 0, 2], [5, 0, 0]])
def test_each_mlp_works_on_its_rows(activation, function, counts):
    experts = mlp(activation)
    output = experts(ROWS, torch.tensor(counts))
    expected, start = [], 0
    for index, count in enumerate(counts):
        piece = ROWS[start : start + count]
        hidden = function(F.linear(piece, experts.w1[index].T, experts.b1[index]))
        expected.append(F.linear(hidden, experts.w2[index].T, experts.b2[index]))
        start += count
    torch.testing.assert_close(output, torch.cat(expected), rtol=1e-5, atol=1e-6)  # float32, another matrix product


def test_an_expert_without_rows_has_the_gradient_zero():
    experts = mlp()
    experts(ROWS, torch.tensor([3, 0, 2])).square().sum().backward()
    for parameter in (experts.w1, experts.b1, experts.w2, experts.b2):
        # None would be an error here, too: the gradient is of the whole stack.
        assert [bool(parameter.grad[index].abs().sum() > 0) for index in range(3)] == [True, False, True]


def test_no_rows_at_all_give_no_output_and_zero_gradients():
    experts = mlp()
    output = experts(ROWS[:0], torch.zeros(3, dtype=torch.long))
    assert output.tolist() == []
    output.sum().backward()
    assert [float(parameter.grad.abs().sum()) for parameter in experts.parameters()] == [0.0] * 4


@pytest.mark.parametrize("counts", [[2, 2, 2], [2, 3]])
def test_counts_that_do_not_add_up_or_are_of_other_experts_are_an_error(counts):
    with pytest.raises(ValueError, match="there are 3 experts and 5 rows"):
        mlp()(ROWS, torch.tensor(counts))


def test_the_product_is_the_one_that_is_asked_for(monkeypatch):
    used = []
    for name, product in list(PRODUCTS.items()):
        monkeypatch.setitem(
            PRODUCTS, name, lambda *args, name=name, product=product: used.append(name) or product(*args)
        )
    rows, counts = torch.randn(5, 8), torch.tensor([2, 0, 3])
    outputs = []
    for product in ("auto", "loop", "grouped"):
        torch.manual_seed(0)
        outputs.append(MLPExperts(range(3), 8, 16, product=product)(rows, counts))
    assert used == ["loop", "loop", "grouped"]  # on a CPU, auto is the loop
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("product", ["loop", "grouped"])
def test_under_autocast_products_are_in_half_precision_and_gradients_in_the_weights_type(product):
    torch.manual_seed(0)
    experts = MLPExperts(range(2), 8, 16, with_hidden=True, product=product)
    rows = torch.randn(40, 8, requires_grad=True)
    exact = experts(rows, torch.tensor([33, 7]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = experts(rows, torch.tensor([33, 7]))
    assert [output.dtype for output in rounded] == [torch.bfloat16] * 2
    leaves = (rows, *experts.parameters())
    gradients = [
        torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
        for outputs in (exact, rounded)
    ]
    for one, other in zip((*rounded, *gradients[1]), (*exact, *gradients[0]), strict=True):
        # bfloat16 keeps 8 bits: a few roundings are within 2^-6 of the largest entry.
        torch.testing.assert_close(one.float(), other, rtol=0, atol=2.0**-6 * float(other.detach().abs().max()))
    assert {gradient.dtype for gradient in gradients[1]} == {torch.float32}


def test_mlp_experts_start_with_variance_one_over_fan_in_and_zero_biases():
    torch.manual_seed(0)
    experts = MLPExperts(range(2), width=64, hidden=256)
    # 16384 values each: the standard deviation is known to 0.55 %; 3 % is five of those.
    for weight, fan_in in [(experts.w1[0], 64), (experts.w1[1], 64), (experts.w2[0], 256), (experts.w2[1], 256)]:
        assert float(weight.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.03)
    assert float(experts.b1.detach().abs().sum() + experts.b2.detach().abs().sum()) == 0.0
    assert not torch.equal(experts.w1[0], experts.w1[1])


def test_resetting_one_expert_leaves_the_others():
    experts = mlp()
    before = {name: value.detach().clone() for name, value in experts.named_parameters()}
    torch.manual_seed(5)
    experts.reset_expert(1)
    for name, value in experts.named_parameters():
        assert [torch.equal(value[index], before[name][index]) for index in range(3)] == [True, False, True]
    torch.manual_seed(5)
    alone = MLPExperts(range(1), width=3, hidden=8)
    torch.manual_seed(5)
    alone.reset_expert(0)
    assert torch.equal(alone.w1[0], experts.w1[1])  # the draw depends on the generator alone, not on the index
    assert torch.equal(alone.w2[0], experts.w2[1])


def modules(outputs: int = 1) -> ModuleExperts:
    torch.manual_seed(0)
    return ModuleExperts(
        range(4, 7), lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()) if outputs == 1 else TwoOutputs()
    )


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.layer(x)
        return hidden[:, :1], hidden


def test_module_experts_are_named_by_their_global_id():
    assert [name for name, _ in modules().named_parameters()] == [
        f"modules_by_id.{expert}.0.{part}" for expert in (4, 5, 6) for part in ("weight", "bias")
    ]


def test_each_module_works_on_its_rows():
    experts = modules()
    output = experts(ROWS, torch.tensor([1, 0, 4]))
    first, _, last = experts.modules_by_id.values()
    assert torch.equal(output, torch.cat([first(ROWS[:1]), last(ROWS[1:])]))
    output.sum().backward()
    gradients = {name: float(value.grad.abs().sum()) for name, value in experts.named_parameters()}
    assert gradients["modules_by_id.5.0.weight"] == gradients["modules_by_id.5.0.bias"] == 0.0
    assert min(gradients["modules_by_id.4.0.weight"], gradients["modules_by_id.6.0.weight"]) > 0.0


def test_modules_may_give_hidden_states_besides():
    experts = modules(outputs=2)
    output, hidden = experts(ROWS, torch.tensor([2, 3, 0]))
    first, second, _ = experts.modules_by_id.values()
    assert torch.equal(hidden, torch.cat([first.layer(ROWS[:2]), second.layer(ROWS[2:])]))
    assert torch.equal(output, hidden[:, :1])


def test_resetting_one_module_leaves_the_others():
    experts = modules()
    before = {name: value.detach().clone() for name, value in experts.named_parameters()}
    experts.reset_expert(2)
    changed = {name for name, value in experts.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"modules_by_id.6.0.weight", "modules_by_id.6.0.bias"}
