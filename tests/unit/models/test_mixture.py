"""Models that mix class probabilities: what they minimise in training, and what they give in evaluation."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmoe.config import MoESection
from distmoe.contracts import Context
from distmoe.models.mixture import ClassMixture, favourite_predictions
from distmoe.models.protocol import ModelOutput
from distmoe.moe.dispatch import Placement
from distmoe.moe.experts import ModuleExperts
from distmoe.moe.gates import build_gate
from distmoe.moe.objectives import draw_assignments, log_weights
from tests.unit.moe.handmade import dense_routing

B, WIDTH, E, C = 6, 5, 3, 4
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


class WithHidden(nn.Module):
    """A linear classifier that shows its input as a hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(WIDTH, C)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(x), x


def mixture(objective: str = "likelihood", **gate: object) -> ClassMixture:
    """Linear experts and a linear gate on vectors."""
    values = {"num_experts": E, "gate": {"name": "dense", **gate}, "objective": objective}
    section = MoESection.model_validate(values)
    torch.manual_seed(0)
    built = build_gate(section.gate, E, lambda num_outputs: nn.Linear(WIDTH, num_outputs), WIDTH)
    factory = WithHidden if built.needs_hidden else lambda: nn.Linear(WIDTH, C)
    return ClassMixture(built, ModuleExperts(range(E), factory), section, Placement())


def x() -> Tensor:
    return torch.randn(B, WIDTH, generator=torch.Generator().manual_seed(1))


def context(training: bool, step: int = 0) -> Context:
    return Context(0, step, torch.arange(B), training)


def parts(model: ClassMixture, output: ModelOutput) -> tuple[Tensor, Tensor]:
    """Weights (B, E), 0 for experts that were not chosen, and the experts' class probabilities (B, E, C)."""
    routing = output.routings["mixture"]
    weights = torch.zeros(B, E)
    for row, expert, weight in zip(routing.row_ids_A, routing.expert_ids_A, routing.weights_A, strict=True):
        weights[row, expert] = weight.detach()
    scores = [expert(x()) for expert in model.experts.modules_by_id.values()]
    probs = [(one[0] if isinstance(one, tuple) else one).detach().softmax(-1) for one in scores]
    return weights, torch.stack(probs, dim=1)


def losses_by_definition(objective: str, g: Tensor, p: Tensor, smoothing: float) -> Tensor:
    """(B,), or (B, E) for ``sampled``: of each sample, if each of the experts were drawn."""
    t = (1 - smoothing) * F.one_hot(LABELS, C) + smoothing / C
    squared = (t[:, None] - p).square().sum(-1)
    cross_entropies = -(t[:, None] * p.log()).sum(-1)
    mixed = (g[..., None] * p).sum(1)
    return {
        "likelihood": -(t * mixed.log()).sum(-1),
        "cooperative": (t - mixed).square().sum(-1),
        "competitive": (g * squared).sum(-1),
        "gaussian_mixture": -(g * (-squared / 2).exp()).sum(-1).log(),
        "root_likelihood": -(g * (-cross_entropies / 2).exp()).sum(-1).log(),
        "sampled": cross_entropies,
    }[objective]


OBJECTIVES = ["likelihood", "cooperative", "competitive", "gaussian_mixture", "root_likelihood", "sampled"]


def test_every_objective_of_the_config_is_tested_here():
    assert set(OBJECTIVES) == set(MoESection.model_fields["objective"].annotation.__args__)


GATES = [{}, {"name": "topk", "k": 2}, {"name": "attentive", "width": 4}, {"name": "uniform"}]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_minimises_the_objective_and_evaluation_the_cross_entropy(objective, smoothing, gate):
    model = mixture(objective, **gate)
    training, evaluation = model.mix(x(), context(True)), model.mix(x(), context(False))
    g, p = parts(model, training)
    minimised = losses_by_definition(objective, g, p, smoothing)
    if objective == "sampled":
        log_weights_TK = log_weights(training.routings["mixture"])
        drawn = draw_assignments(log_weights_TK, context(True).within("mixture"))
        experts = training.routings["mixture"].expert_ids_A.view(log_weights_TK.shape)
        minimised = minimised[torch.arange(B), experts[torch.arange(B), drawn]]
    entropies = losses_by_definition("likelihood", g, p, smoothing)
    # float32
    torch.testing.assert_close(training.losses(LABELS, smoothing), minimised, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(evaluation.losses(LABELS, smoothing), entropies, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(training.cross_entropies(LABELS, smoothing), entropies, rtol=1e-5, atol=1e-6)
    # Predictions are the mixture's, whatever is minimised.
    torch.testing.assert_close(training.scores.exp(), (g[..., None] * p).sum(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(training.scores, evaluation.scores)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_part_learns_from_every_objective(objective):
    model = mixture(objective)
    model.mix(x(), context(True)).losses(LABELS).sum().backward()
    assert [name for name, value in model.named_parameters() if float(value.grad.abs().sum()) == 0.0] == []


def test_a_sampled_expert_is_drawn_anew_each_step():
    model = mixture("sampled")
    losses = [model.mix(x(), context(True, step)).losses(LABELS).tolist() for step in (0, 0, 1, 2)]
    assert losses[0] == losses[1]
    assert losses[1] != losses[2]
    assert losses[2] != losses[3]


@pytest.mark.parametrize("gate", GATES)
def test_favourite_predictions_are_those_of_the_most_probable_expert(gate):
    model = mixture(**gate)
    output = model.mix(x(), context(False))
    for sample in range(B):
        expert = int(output.routings["mixture"].probs_TE[sample].argmax())
        scores = model.experts.modules_by_id[str(expert)](x()[sample : sample + 1])
        scores = scores[0] if isinstance(scores, tuple) else scores
        assert int(output.favourite_predictions[sample]) == int(scores.argmax())
    assert (output.favourite_predictions.dtype, output.favourite_predictions.requires_grad) == (torch.int64, False)
    assert model.mix(x(), context(True)).favourite_predictions is None


def test_favourites_by_hand():
    # The mixture says class 1 for both; the favourite of sample 0 is expert 1, which says class 0.
    one = dense_routing(torch.tensor([[0.4, 0.6], [0.5, 0.5]]).log())
    probs = torch.tensor([[0.0, 1.0], [0.6, 0.4], [0.1, 0.9], [0.9, 0.1]])
    assert favourite_predictions(probs.log(), one).tolist() == [0, 1]  # among equals the first expert


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_samples_give_no_losses_and_zero_gradients(objective, training):
    model = mixture(objective)
    output = model.mix(x()[:0], dataclasses.replace(context(training), sample_ids=torch.arange(0)))
    losses = output.losses(LABELS[:0])
    assert losses.shape == (0,)
    losses.sum().backward()
    assert [float(value.grad.abs().sum()) for value in model.parameters()] == [0.0] * len(list(model.parameters()))
    if not training:
        assert output.favourite_predictions.tolist() == []


def test_an_objective_takes_the_place_of_the_cross_entropy_and_not_of_the_scores():
    logits = torch.tensor([[2.0, 0.0]])
    plain = ModelOutput(logits=logits)
    other = ModelOutput(logits=logits, objective=lambda labels, smoothing: labels + 10.0 * smoothing)
    label = torch.tensor([1])
    assert other.losses(label, 0.5).tolist() == [6.0]
    assert (
        other.cross_entropies(label).tolist() == plain.losses(label).tolist() == plain.cross_entropies(label).tolist()
    )
    assert other.scores is logits
