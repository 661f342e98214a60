import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe import noise
from distmoe.moe.gates.noisy import NoisyTopKGate, chance_of_choice
from tests.oracles import chances_of_choice, softmax, top_k_choices
from tests.unit.moe.gate_forms import Given, context, tokens, triples


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def by_the_loop(outputs: list[list[float]], num_experts: int, sigmas: list[list[float]], of) -> list[list[float]]:
    """Noisy logits, each with its own scalar draw."""
    key = noise.make_key("gate noise", of.seed, of.step, of.path)
    noisy = []
    for row, logits in enumerate(outputs):
        sample = int(of.sample_ids[row // of.rows_per_sample])
        counters = [[sample, row % of.rows_per_sample, expert] for expert in range(num_experts)]
        draws = [float(noise.normal(key, *map(torch.tensor, counter))) for counter in counters]
        noisy.append([logits[e] + draws[e] * sigmas[row][e] for e in range(num_experts)])
    return noisy


@pytest.mark.parametrize("noise_std", [None, 0.5])
def test_the_highest_noisy_logits_are_chosen_and_weighted_by_their_softmax(noise_std):
    gate = NoisyTopKGate(Given(), 4, k=2, noise_std=noise_std)
    x = tokens(6, 8 if noise_std is None else 4, dtype=torch.float64)
    of = context(6, rows_per_sample=3, seed=2, step=7, path="layer", sample_ids=torch.tensor([9, 5]))
    routing = gate.route(x, of)
    rows = x.tolist()
    sigmas = [[softplus(one) + 1e-6 for one in row[4:]] if noise_std is None else [0.5] * 4 for row in rows]
    noisy = by_the_loop(rows, 4, sigmas, of)
    chosen = top_k_choices(noisy, 2)
    assert chosen != top_k_choices([row[:4] for row in rows], 2)  # the noise does matter here
    expected = [
        (row, expert, weight)
        for row, experts in enumerate(chosen)
        for expert, weight in zip(experts, softmax([noisy[row][e] for e in experts]), strict=True)
    ]
    assert [triple[:2] for triple in triples(routing)] == [triple[:2] for triple in expected]
    assert routing.weights_A.tolist() == pytest.approx([weight for *_, weight in expected], rel=1e-9)
    for row in range(6):
        assert routing.logits_TE[row].tolist() == pytest.approx(noisy[row], rel=1e-9)
        assert routing.probs_TE[row].tolist() == pytest.approx(softmax(noisy[row]), rel=1e-9)
        chances = chances_of_choice(rows[row][:4], noisy[row], sigmas[row], 2)
        assert routing.load_TE[row].tolist() == pytest.approx(chances, rel=1e-9)


def test_the_load_of_a_token_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    noisy = torch.tensor([[1.5, 1.7, -1.0]], dtype=torch.float64)
    # k = 1: expert 0 has to beat 1.7, expert 1 to beat 1.5, expert 2 to beat 1.7.
    sigma = torch.tensor([[1.0, 0.5, 2.0]], dtype=torch.float64)
    top_1 = chance_of_choice(logits, noisy, sigma, 1)
    # Phi(0.3), Phi(-1), Phi(-0.85), from a table of the normal distribution.
    assert top_1[0].tolist() == pytest.approx([0.61791, 0.15866, 0.19766], abs=1e-5)
    # k = 2: expert 0 has to beat the second of 1.7 and -1, expert 1 that of 1.5 and -1, expert 2 that of 1.5 and 1.7.
    top_2 = chance_of_choice(logits, noisy, sigma, 2)
    # Phi(3), Phi(4), Phi(-0.75).
    assert top_2[0].tolist() == pytest.approx([0.99865, 0.99997, 0.22663], abs=1e-5)
    assert chance_of_choice(logits, noisy, sigma, 3)[0].tolist() == [1.0] * 3


@given(num_experts=st.integers(1, 6), k=st.integers(1, 6), seed=st.integers(0, 99), tied=st.booleans())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_the_load_is_the_chance_to_beat_the_kth_of_the_others(num_experts, k, seed, tied):
    k = min(k, num_experts)
    generator = torch.Generator().manual_seed(seed)
    logits, noisy, sigma = torch.randn(3, 4, num_experts, generator=generator, dtype=torch.float64)
    noisy = noisy.round() if tied else noisy
    sigma = sigma.abs() + 0.1
    expected = [chances_of_choice(*row, k) for row in zip(logits.tolist(), noisy.tolist(), sigma.tolist(), strict=True)]
    chances = chance_of_choice(logits, noisy, sigma, k)
    torch.testing.assert_close(chances, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_load_is_how_often_an_expert_is_chosen_over_fresh_noise_on_it_alone(k):
    logits, sigma = torch.tensor([0.6, 0.2, -0.4, 0.0]), torch.tensor([0.5, 1.0, 1.5, 0.8])
    noisy = torch.tensor([0.9, -0.3, 0.4, 0.1])
    chances = chance_of_choice(logits[None], noisy[None], sigma[None], k)[0]
    draws = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    for expert in range(4):
        again = noisy.repeat(20000, 1)
        again[:, expert] = logits[expert] + draws * sigma[expert]
        chosen = sum(expert in choice for choice in again.topk(k).indices.tolist())
        # Four standard errors of 20000 trials are at most 0.015.
        assert chosen / 20000 == pytest.approx(float(chances[expert]), abs=0.015)


def test_evaluation_is_without_noise_and_load():
    x = tokens(5, 8, dtype=torch.float64)
    routing = NoisyTopKGate(Given(), 4).route(x, context(5, training=False))
    assert torch.equal(routing.logits_TE, x[:, :4])
    assert routing.load_TE is None
    expected = top_k_choices(x[:, :4].tolist(), 2)
    assert routing.expert_ids_A.view(5, 2).tolist() == expected


def test_a_sigma_far_below_zero_gives_no_infinite_load_or_gradient():
    x = torch.tensor([[1.0, 0.5, 0.0, -300.0, -300.0, -300.0]], requires_grad=True)
    routing = NoisyTopKGate(Given(), 3).route(x, context(1))
    # Without noise the choice is certain.
    assert routing.load_TE.tolist() == [[1.0, 1.0, 0.0]]
    routing.load_TE.square().sum().backward()
    assert bool(x.grad.isfinite().all())


def test_settings_that_make_no_sense_are_refused():
    for noise_std in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"noise_std \({noise_std}\) must be above 0"):
            NoisyTopKGate(Given(), 4, noise_std=noise_std)
    with pytest.raises(ValueError, match="use k >= 2"):
        NoisyTopKGate(Given(), 4, k=1, noise_std=1.0).route(tokens(2, 4), context(2))
    one = NoisyTopKGate(Given(), 4, k=1, noise_std=1.0).route(tokens(2, 4), context(2, training=False))
    assert one.weights_A.tolist() == [1.0, 1.0]
