import math

import pytest
import torch

from distmoe.moe.gates.cosine import CosineGate, CosineHead
from tests.oracles import cosine, softmax, top_k_choices
from tests.unit.moe.gate_forms import Given, context, tokens


def test_logits_are_cosines_over_the_temperature_by_hand():
    head = CosineHead(2, 3, temperature=0.5)
    with torch.no_grad():
        head.directions.copy_(torch.tensor([[7.0, 0.0, -1.0], [0.0, 0.1, -1.0]]))  # east, north, south-west
    # (3, 4) has the cosines 3/5, 4/5 and -7 / (5 sqrt 2), whatever the lengths.
    logits = head(torch.tensor([[3.0, 4.0], [0.03, 0.04]]))
    for row in logits.tolist():
        assert row == pytest.approx([1.2, 1.6, -2 * 7 / (5 * math.sqrt(2))])


def test_the_gate_chooses_the_nearest_directions():
    torch.manual_seed(0)
    gate = CosineGate(Given(), 5, k=2, projection=3, temperature=0.3).double()
    x = tokens(6, 3, dtype=torch.float64)
    routing = gate.route(x, context(6))
    directions = gate.head.directions.T.tolist()
    logits = [[cosine(token, direction) / 0.3 for direction in directions] for token in x.tolist()]
    choices = top_k_choices(logits, 2)
    assert routing.expert_ids_A.view(6, 2).tolist() == choices
    for row in range(6):
        assert routing.logits_TE[row].tolist() == pytest.approx(logits[row], rel=1e-6)
        chosen = softmax([logits[row][expert] for expert in choices[row]])
        assert routing.weights_A.view(6, 2)[row].tolist() == pytest.approx(chosen, rel=1e-6)


def test_the_temperature_is_learned_and_stays_at_a_hundredth_or_above():
    head = CosineHead(2, 2, temperature=0.02)
    with torch.no_grad():
        head.directions.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 0.0]])
    assert head(x).tolist() == [[pytest.approx(50.0), 0.0]]
    head(x).sum().backward()
    assert float(head.log_scale.grad) == pytest.approx(50.0)  # d exp(s) / d s
    with torch.no_grad():
        head.log_scale.fill_(math.log(1000.0))
    assert head(x).tolist() == [[pytest.approx(100.0), 0.0]]


def test_a_token_of_zeros_prefers_nobody_and_gives_no_gradient():
    torch.manual_seed(0)
    head = CosineHead(3, 4, temperature=0.1)
    x = torch.zeros(2, 3, requires_grad=True)
    logits = head(x)
    assert logits.tolist() == [[0.0] * 4] * 2
    (logits * tokens(2, 4)).sum().backward()
    # Divided by a length of zero it would be infinite, by one of 1e-12, as F.normalize does, of the order of 1e13.
    assert x.grad.tolist() == [[0.0] * 3] * 2
    assert float(head.directions.grad.abs().max()) == 0.0


def test_a_temperature_out_of_range_is_refused():
    for temperature in (0.009, 0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"temperature \({temperature}\) must be at least 0.01"):
            CosineGate(Given(), 4, temperature=temperature)


def test_initial_directions_differ_from_each_other():
    torch.manual_seed(0)
    head = CosineHead(16, 8)
    cosines = [[cosine(a, b) for b in head.directions.T.tolist()] for a in head.directions.T.tolist()]
    assert max(cosines[a][b] for a in range(8) for b in range(8) if a != b) < 0.9
    # Standard deviation 0.01: the mean square of 128 draws is within a third of 1e-4.
    assert float(head.directions.detach().square().mean()) == pytest.approx(1e-4, rel=0.35)
