"""Analytic gradients against finite differences, in double precision, of everything that is differentiable."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call

from distmoe.contracts import Context
from distmoe.moe.gates import GATES
from distmoe.moe.gates.cosine import CosineHead
from tests.unit.moe.gate_forms import FORMS_WITH_NETWORK, Form, tokens

NUM_EXPERTS, WIDTH, HIDDEN, SAMPLES, ROWS = 5, 2, 1, 2, 2


def of(form: Form) -> Context:
    return Context(0, 0, torch.arange(SAMPLES), form.trained, rows_per_sample=ROWS)


def as_function(
    module: nn.Module, call: Callable[..., tuple[torch.Tensor, ...]]
) -> tuple[Callable, list[torch.Tensor]]:
    """``call`` as a function of x and of the module's parameters, and these."""
    names = [name for name, _ in module.named_parameters()]

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return call(x)

    called = Called()

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return functional_call(called, {f"module.{name}": one for name, one in zip(names, parameters, strict=True)}, x)

    return function, [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]


@pytest.mark.parametrize("form", FORMS_WITH_NETWORK)
def test_weights_logits_probabilities_and_load_of_a_gate(form):
    torch.manual_seed(0)
    gate = form.gate(NUM_EXPERTS, WIDTH, HIDDEN).double()
    hidden = tokens(SAMPLES * ROWS * NUM_EXPERTS, HIDDEN, seed=4, dtype=torch.float64)

    def routed(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        routing = gate.route(x, of(form))
        routing = gate.weigh(routing, hidden) if gate.needs_hidden else routing
        mixing = (routing.mixing.into_GNS, routing.mixing.out_of_GNS) if routing.mixing else ()
        outputs = (routing.weights_A, routing.logits_TE, routing.probs_TE, routing.load_TE, *mixing)
        return tuple(one for one in outputs if one is not None and one.requires_grad)

    function, parameters = as_function(gate, routed)
    x = tokens(SAMPLES * ROWS, WIDTH, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_hidden_states_of_an_attentive_gate():
    torch.manual_seed(0)
    gate = Form("attentive", {"width": 3}).gate(NUM_EXPERTS, WIDTH, HIDDEN).double()
    x = tokens(3, WIDTH, dtype=torch.float64)

    def weighed(hidden_A: torch.Tensor) -> torch.Tensor:
        routing = gate.route(x, Context(0, 0, torch.arange(3), True))
        return gate.weigh(routing, hidden_A).weights_A

    hidden_A = tokens(3 * NUM_EXPERTS, HIDDEN, seed=4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(weighed, (hidden_A,))


def test_cosine_head():
    torch.manual_seed(0)
    head = CosineHead(3, 4, temperature=0.5).double()
    function, parameters = as_function(head, lambda x: (head(x),))
    assert torch.autograd.gradcheck(function, (tokens(4, 3, dtype=torch.float64).requires_grad_(), *parameters))


@pytest.mark.parametrize("name", sorted(GATES))
def test_the_whole_layer(name):
    form = Form(name, {"attentive": {"width": 2}, "cosine": {"projection": 2}}.get(name, {}))
    layer = form.layer(3, WIDTH, HIDDEN).double()
    function, parameters = as_function(layer, lambda x: (layer(x, of(form))[0],))
    x = tokens(SAMPLES, ROWS, WIDTH, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *parameters))
