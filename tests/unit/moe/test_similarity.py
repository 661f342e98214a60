"""The sample-similarity losses against loops over all pairs of tokens and experts, one distance at a time."""

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.config.moe import SimilaritySection
from distmoe.contracts import Context
from distmoe.moe import similarity
from distmoe.moe.gates.dense import DenseGate
from distmoe.moe.losses import SimilarityLoss
from distmoe.moe.sums import no_reduction
from tests.unit.moe.handmade import dense_routing, on_every_rank, routing

FORMS = ["paper", "authors"]


def terms(one, inputs=None, form="paper", distance="pixels"):
    within, between = similarity.similarity_terms(one, inputs, no_reduction, form, distance)
    return float(within.detach()), float(between.detach())


def by_pairs(probs, points, form) -> tuple[float, float]:
    """Both terms, from probabilities [token][expert] and points [token][coordinate]."""
    tokens, experts = range(len(probs)), range(len(probs[0]))
    distances = [[math.dist(points[t], points[u]) for u in tokens] for t in tokens]
    if form == "paper":
        distances = [[distance**2 for distance in row] for row in distances]
        within_divisor = between_divisor = len(probs) ** 2 - len(probs)
    else:
        largest = max(max(row) for row in distances)
        distances = [[distance / largest if largest > 0 else 0.0 for distance in row] for row in distances]
        within_divisor, between_divisor = 1, len(probs) ** 2
    within = between = 0.0
    for t, u in itertools.product(tokens, tokens):
        for e, f in itertools.product(experts, experts):
            product = probs[t][e] * probs[u][f] * distances[t][u]
            if e == f:
                within += product / len(experts)
            else:
                between -= product / (len(experts) ** 2 - len(experts))
    return within / max(within_divisor, 1), between / max(between_divisor, 1)


def test_the_config_names_the_forms_and_distances_there_are():
    fields = SimilaritySection.model_fields
    assert get_args(fields["form"].annotation) == get_args(similarity.Form)
    assert get_args(fields["distance"].annotation) == get_args(similarity.Distance)


def test_the_papers_form_by_hand():
    # Two experts, three points at 0, 1 and 3 on a line; squared distances 1 (0-1), 9 (0-3), 4 (1-3), each pair twice.
    probs, x = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], torch.tensor([[0.0], [1.0], [3.0]])
    # Within: only tokens 0 and 1 share an expert: 2 * 1 / 2 experts / (9 - 3 pairs).
    # Between: 0-2 and 1-2, either way: 2 * (9 + 4) / (2 pairs of experts) / 6.
    assert terms(routing(probs, [[0]] * 3), x) == pytest.approx((1 / 6, -13 / 6))
    # Halves everywhere: each of the 4 pairs of experts has a quarter of 2 * 14: within 2 * 7 / 2 / 6, between the same.
    assert terms(routing([[0.5, 0.5]] * 3, [[0]] * 3), x) == pytest.approx((7 / 6, -7 / 6))


def test_the_authors_form_by_hand():
    probs, x = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], torch.tensor([[0.0], [1.0], [3.0]])
    # Distances over the largest, 3: 1/3, 1, 2/3. Within is a sum over both orders, not divided by the pairs:
    # 2 * (1/3) / 2 experts. Between: 2 * (1 + 2/3) / 2 / 3^2.
    assert terms(routing(probs, [[0]] * 3), x, "authors") == pytest.approx((1 / 3, -5 / 27))


@pytest.mark.parametrize("form", FORMS)
@given(num_tokens=st.integers(2, 7), num_experts=st.integers(2, 4), width=st.integers(1, 5), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_terms_equal_loops_over_pairs(form, num_tokens, num_experts, width, seed):
    generator = torch.Generator().manual_seed(seed)
    one = dense_routing(torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64))
    x = 3.0 + torch.randn(num_tokens, width, generator=generator, dtype=torch.float64)
    expected = by_pairs(one.probs_TE.tolist(), x.tolist(), form)
    assert terms(one, x, form) == pytest.approx(expected, rel=1e-9)
    # The tokens in place of the samples.
    seen = dense_routing(one.logits_TE, tokens_T=x.view(num_tokens, 1, width))
    assert terms(seen, torch.zeros_like(x), form, "tokens") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("form", "offset"), [("paper", 1e3), ("authors", 1e6)])
def test_distances_survive_an_offset_of_the_points(form, offset):
    one = dense_routing(torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    x = torch.rand(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # The paper's squares lose 6 of float64's 16 digits that way (float32 would lose all it has); the gathered points
    # of the authors' form are centred, and lose no more than the offset itself costs.
    assert terms(one, x + offset, form) == pytest.approx(terms(one, x, form), rel=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_shares_of_their_range(form):
    one = dense_routing(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    images = torch.randint(0, 256, (5, 3, 2, 2), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    points = [[value / 255 for value in image.flatten().tolist()] for image in images]
    assert terms(one, images, form) == pytest.approx(by_pairs(one.probs_TE.tolist(), points, form), rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_has_the_image_of_its_sample(form):
    one = dense_routing(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), rows_per_sample=2)
    images = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    repeated = [images[token // 2].tolist() for token in range(6)]
    assert terms(one, images, form) == pytest.approx(by_pairs(one.probs_TE.tolist(), repeated, form), rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_of_several_distributions_a_token_the_mean_counts(form):
    logits = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    each = [by_pairs(logits[:, c].softmax(-1).tolist(), x.tolist(), form) for c in range(2)]
    expected = [(first + second) / 2 for first, second in zip(*each, strict=True)]
    assert terms(dense_routing(logits), x, form) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_one_expert_has_no_other(form):
    one = routing(torch.ones(4, 1), [[0]] * 4)
    x = torch.tensor([[0.0], [1.0], [1.0], [2.0]])
    # Pairs at distances 1, 1, 2, 0, 1, 1, each twice: 2 * 8 / 12 squared; 2 * (6 / 2) as a sum of distances over 2.
    assert terms(one, x, form) == pytest.approx({"paper": (16 / 12, 0.0), "authors": (6.0, 0.0)}[form])
    assert terms(one, x, form)[1] == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_one_token_is_alone_and_equal_ones_are_alike(form):
    for number in range(20):  # not one of them at a rounding error's distance from itself
        x = torch.randn(1, 7, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        assert terms(dense_routing(x[:, :3]), x, form) == (0.0, 0.0)
    equal = torch.full((3, 2), 0.1, dtype=torch.float64)
    assert terms(routing([[0.3, 0.7]] * 3, [[0]] * 3), equal, form) == pytest.approx((0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_is_one_of_the_terms(form):
    one = dense_routing(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), tokens_T=torch.eye(4))
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    for distance in ("pixels", "tokens"):
        losses = [SimilarityLoss(pairs, form, distance).value(one, x) for pairs in ("within", "between")]
        assert tuple(float(loss) for loss in losses) == terms(one, x, form, distance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("distance", ["pixels", "tokens"])
def test_gradients_reach_the_gate_and_not_the_points(form, distance):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, generator=generator, dtype=torch.float64)

    def of(logits):
        one = dense_routing(logits, tokens_T=x)
        return torch.stack(similarity.similarity_terms(one, x, no_reduction, form, distance))

    assert torch.autograd.gradcheck(of, (logits,))
    moved = x.clone().requires_grad_()
    within, between = similarity.similarity_terms(dense_routing(logits), moved, no_reduction, form, "pixels")
    (within + between).backward()
    assert moved.grad is None


@pytest.mark.parametrize("form", FORMS)
@given(first=st.integers(0, 6), second=st.integers(0, 6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=15, derandomize=True)
def test_ranks_together_have_the_terms_and_gradients_of_one(form, first, second, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    images = torch.randint(0, 256, (6, 5), generator=generator, dtype=torch.uint8)
    cuts = sorted((first, second))
    parts = [slice(0, cuts[0]), slice(cuts[0], cuts[1]), slice(cuts[1], 6)]
    shares = [logits[rows].clone().requires_grad_() for rows in parts]
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def weighted(logits, inputs, reducer):
        both = similarity.similarity_terms(dense_routing(logits), inputs, reducer, form, "pixels")
        return (torch.stack(both) * weights).sum()

    whole = logits.clone().requires_grad_()
    expected = weighted(whole, images, no_reduction)
    expected.backward()
    values = on_every_rank(lambda rank, reducer: weighted(shares[rank], images[parts[rank]], reducer), 3)
    for value, share, rows in zip(values, shares, parts, strict=True):
        assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-11, abs=1e-12)
        # A rank's own loss has the gradient of its own share.
        value.backward()
        torch.testing.assert_close(share.grad, whole.grad[rows], rtol=1e-9, atol=1e-12)


def test_distances_are_taken_some_rows_at_a_time(monkeypatch):
    one = dense_routing(torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = by_pairs(one.probs_TE.tolist(), x.tolist(), "authors")
    for in_memory in (1, 14, 20, 49, 50):  # one row, two, two and a rest, all, more than there are
        monkeypatch.setattr(similarity, "_CHUNK", in_memory)
        assert terms(one, x, "authors") == pytest.approx(expected, rel=1e-9)


def test_minimising_the_terms_sends_like_samples_to_one_expert():
    # Two clouds far apart, a gate that starts next to even.
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(8, 2, generator=generator) - 4, torch.randn(8, 2, generator=generator) + 4])
    logits = (0.1 * torch.randn(16, 2, generator=generator)).requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=0.5)
    within, between = SimilarityLoss("within"), SimilarityLoss("between")
    for _ in range(200):
        optimizer.zero_grad()
        (within.value(dense_routing(logits), x) + 0.1 * between.value(dense_routing(logits), x)).backward()
        optimizer.step()
    favourites = logits.argmax(-1).tolist()
    assert favourites == [favourites[0]] * 8 + [1 - favourites[0]] * 8


def test_what_is_missing_is_said():
    one = dense_routing(torch.zeros(4, 2), rows_per_sample=2)
    with pytest.raises(ValueError, match="needs the samples"):
        terms(one)
    with pytest.raises(ValueError, match="4 tokens are not 2 for each of 3 samples"):
        terms(one, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="needs a routing made in training, which keeps the tokens"):
        terms(one, distance="tokens")


def test_the_gate_keeps_what_it_saw_for_the_distance_between_tokens():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    gate = DenseGate(torch.nn.Linear(3, 2), 2)
    one = gate.route(x, Context(0, 0, torch.arange(5), training=True))
    expected = by_pairs(one.probs_TE.tolist(), x.tolist(), "paper")
    assert terms(one, None, "paper", "tokens") == pytest.approx(expected, rel=1e-5)
