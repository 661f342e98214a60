import math

import pytest
import torch
from torch import nn

from distmoe.config import parse_config
from distmoe.contracts import Batch, DataSpec
from distmoe.evaluate import format_evaluation
from distmoe.models import build_model
from distmoe.models.protocol import ModelOutput
from distmoe.moe.gates import GATES
from distmoe.moe.measures import FACTOR_GRID
from distmoe.moe.routing import Routing
from distmoe.moe.sums import Sums, no_reduction
from distmoe.training.evaluation import class_shares, evaluate
from tests.unit.training import little

SPEC = DataSpec("little", (1, 1, 2), 3, ("ant", "bee", "cat"), (0.0,), (1.0,))

# Seven samples: label, predicted class, expert.
SAMPLES = [(0, 0, 0), (0, 0, 0), (0, 1, 1), (1, 1, 1), (1, 2, 1), (2, 2, 0), (2, 2, 1)]


class Lookup(nn.Module):
    """Odds of 3 : 1 : 1 for the class in the first pixel, gate odds of 3 : 1 for the expert in the second.

    The favourite expert by itself always predicts the class of its number.
    """

    def __init__(self, num_layers: int = 1) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.contexts = []
        self.modes = []

    def forward(self, images, context):
        self.contexts.append(context)
        self.modes.append(self.training)
        wanted, experts = images[:, 0, 0, 0].long(), images[:, 0, 0, 1].long()
        logits = torch.zeros(len(images), 3).scatter(1, wanted[:, None], math.log(3.0))
        gate = torch.zeros(len(images), 2).scatter(1, experts[:, None], math.log(3.0))
        probs = gate.softmax(-1)
        rows = torch.arange(len(images))
        routing = Routing(len(images), 2, rows, experts, probs.amax(-1), gate, probs)
        routings = {"layer" + "s" * number: routing for number in range(self.num_layers)}
        return ModelOutput(logits=logits, routings=routings, favourite_predictions=experts)


def batches(*sizes: int) -> list[Batch]:
    made, start = [], 0
    for size in sizes:
        part = SAMPLES[start : start + size]
        pixels = torch.tensor([[[[wanted, expert]]] for _, wanted, expert in part]).view(size, 1, 1, 2)
        labels = torch.tensor([label for label, *_ in part], dtype=torch.long)
        # Recorded with a sample: twice its expert's number; and its place, down by its label and right by its expert.
        experts = torch.tensor([float(expert) for *_, expert in part])
        factors = {"twice": 2 * experts.view(size, 1), "place": torch.stack([labels.float(), experts], dim=1)}
        made.append(Batch(pixels.float(), labels, torch.arange(start, start + size), factors))
        start += size
    return made


def run(*sizes: int, model: Lookup | None = None):
    model = model or Lookup()
    return evaluate(model, model, batches(*sizes), 3, seed=5, reducer=no_reduction)


@pytest.mark.parametrize("sizes", [(7,), (3, 3, 1), (0, 4, 3, 0)])
def test_every_sample_counts_once_however_the_split_is_cut(sizes):
    result = run(*sizes)
    assert result.confusion_CC.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 2]]
    assert (result.samples, result.accuracy) == (7, 5 / 7)
    assert result.class_accuracy == pytest.approx([2 / 3, 1 / 2, 1.0])
    # The class in the pixel has probability 3/5, another 1/5; the mean over samples, not over batches.
    assert result.loss == pytest.approx(-(5 * math.log(3 / 5) + 2 * math.log(1 / 5)) / 7)
    sums = result.layers["layer"]
    assert sums["assignments_E"].tolist() == [3, 4]
    assert sums["class_favourite_VE"].tolist() == [[2, 1], [0, 2], [1, 1]]
    assert sums["predicted_class_favourite_VE"].tolist() == [[2, 0], [0, 2], [1, 2]]
    assert sums["expert_predicted_class_favourite_VE"].tolist() == [[3, 0], [0, 4], [0, 0]]
    torch.testing.assert_close(sums["class_soft_VE"], torch.tensor([[1.75, 1.25], [0.5, 1.5], [1.0, 1.0]]).double())
    twice = sums["factor_twice_favourite_VE"]
    assert {FACTOR_GRID[row]: twice[row].tolist() for row in twice.sum(1).nonzero().flatten().tolist()} == {
        0.0: [3, 0],
        2.0: [0, 4],
    }
    assert sums["factor_place_favourite_VE"].sum(0).tolist() == [3, 4]


def test_plain_values_for_the_file():
    values = run(4, 3).describe(SPEC)
    assert values["class_accuracy"] == pytest.approx({"ant": 2 / 3, "bee": 1 / 2, "cat": 1.0})
    assert values["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 0, 2]]
    layer = values["layers"]["layer"]
    assert layer["expert_load"] == pytest.approx([3 / 7, 4 / 7])
    assert layer["class_by_expert"] == [
        pytest.approx([1.75 / 3, 1.25 / 3]),
        pytest.approx([0.25, 0.75]),
        pytest.approx([0.5, 0.5]),
    ]
    assert layer["gate_entropy_bits"] == pytest.approx(0.75 * math.log2(4 / 3) + 0.5)
    assert layer["load_imbalance"] == pytest.approx(4 / 3.5)
    # Mean probabilities (3 * 3/4 + 4 * 1/4) / 7 and the rest.
    assert layer["expert_probability"] == pytest.approx([3.25 / 7, 3.75 / 7])
    # What the favourite expert predicts is the expert, and so are the factors: all that the load leaves to know.
    whole = 3 / 7 * math.log2(7 / 3) + 4 / 7 * math.log2(7 / 4)
    for name in ("expert_predicted_class", "factor_twice", "factor_place"):
        assert layer[f"{name}_information_bits"] == pytest.approx(whole)
    # Predictions 0 and 1 come from one expert, prediction 2 from both, 1 : 2.
    thirds = math.log2(3) - 2 / 3
    assert layer["predicted_class_information_bits"] == pytest.approx(whole - 3 / 7 * thirds)
    # Of the true classes, class 0 has experts 2 : 1, class 1 one only, class 2 both alike.
    assert layer["class_information_bits"] == pytest.approx(whole - 3 / 7 * thirds - 2 / 7)


def test_every_number_of_a_layer_has_its_maximum_beside_it():
    layer = run(4, 3).describe(SPEC)["layers"]["layer"]
    maxima = layer["maxima"]
    assert maxima.keys() == {name for name, value in layer.items() if isinstance(value, float)}
    assert (maxima["load_imbalance"], maxima["gate_entropy_bits"], maxima["class_information_bits"]) == (2.0, 1.0, 1.0)


def test_text_of_an_evaluation_names_each_maximum():
    result = run(4, 3)
    text = format_evaluation(result, {"step": 12, **result.describe(SPEC)}, SPEC).splitlines()
    assert text[0] == "test accuracy 0.7143 (7 samples, checkpoint of step 12)"
    assert "  ant  0.6667" in text
    start = text.index("layer layer")
    shown = {line.split()[0]: line.split()[1:] for line in text[start + 1 : text.index("", start)]}
    assert shown["gate_entropy_bits"] == ["0.8113", "of", "1.0000"]
    assert shown["load_imbalance"] == ["1.1429", "of", "2.0000"]
    assert shown.keys() == result.describe(SPEC)["layers"]["layer"]["maxima"].keys()
    assert text[-3:] == ["  ant   0.58  0.42", "  bee   0.25  0.75", "  cat   0.50  0.50"]


def test_what_the_favourite_expert_predicts_is_not_asked_of_two_layers():
    sums = run(7, model=Lookup(num_layers=2)).layers
    assert sums.keys() == {"layer", "layers"}
    assert "expert_predicted_class_favourite_VE" not in sums["layer"].keys() | sums["layers"].keys()
    assert torch.equal(sums["layer"]["class_favourite_VE"], sums["layers"]["class_favourite_VE"])


def test_class_shares_fall_back_to_the_assignments_and_leave_an_absent_class_at_zero():
    shares = class_shares({"class_assigned_VE": torch.tensor([[3.0, 1.0], [0.0, 0.0]])})
    assert shares.tolist() == [[0.75, 0.25], [0.0, 0.0]]


def test_nothing_to_evaluate():
    result = run()
    assert (result.samples, result.accuracy, result.loss, result.layers) == (0, 0.0, 0.0, {})
    assert result.class_accuracy == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_runs_in_evaluation_mode_and_goes_back(training):
    model = Lookup().train(training)
    run(4, 3, model=model)
    assert model.modes == [False, False]
    assert model.training is training
    assert [(one.seed, one.training, one.sample_ids.tolist()) for one in model.contexts] == [
        (5, False, [0, 1, 2, 3]),
        (5, False, [4, 5, 6]),
    ]


def test_the_mode_goes_back_after_an_error_too():
    model = Lookup().train()

    def broken():
        yield batches(3)[0]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        evaluate(model, model, broken(), 3, 0, no_reduction)
    assert model.training


@pytest.mark.parametrize("name", sorted(GATES))
def test_every_gate_is_measured_on_all_its_tokens(name):
    model = {"name": "convnet", "widths": [4], "ffn_stages": [1], "ffn_hidden": 6}
    moe = {"num_experts": 3, "gate": {"name": name}}
    net = build_model(parse_config({"model": model, "moe": moe}, "test"), little.SPEC)
    result = evaluate(net, net, [little.batch(0, 5), little.batch(5, 0), little.batch(5, 3)], 4, 0, no_reduction)
    sums = result.layers["ffns.1"]
    # Eight images of 8 x 8 pixels, pooled once.
    assert sums["tokens"] == 8 * 16
    labels = torch.bincount(little.batch(0, 8).labels, minlength=4) * 16.0
    for table in ("class_favourite_VE", "class_soft_VE"):
        torch.testing.assert_close(sums[table].sum(1), labels.double())
    layer = result.describe(little.SPEC)["layers"]["ffns.1"]
    assert all(-1e-6 <= layer[key] <= maximum + 1e-6 for key, maximum in layer["maxima"].items())
    assert sum(layer["expert_probability"]) == pytest.approx(1.0)
    # Only where experts choose may a token go without.
    assert layer["unassigned_share"] == 0.0 or name == "expert_choice"


class TwoRanks:
    """As if another rank had the same samples."""

    calls = 0

    def __call__(self, sums: Sums) -> Sums:
        self.calls += 1
        return {name: value + value for name, value in sums.items()}

    def gather(self, rows_T: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows_T, rows_T])


def test_sums_go_through_the_reducer():
    model = Lookup()
    reducer = TwoRanks()
    result = evaluate(model, model, batches(7), 3, 0, reducer)
    assert reducer.calls == 1
    # Twice the counts, the same means.
    assert result.samples == 14
    alone = run(7)
    assert result.loss == pytest.approx(alone.loss)
    doubled = result.layers["layer"]
    assert doubled["assignments_E"].tolist() == [6, 8]
    assert doubled["factor_place_favourite_VE"].sum() == 14
    numbers, once = (one.describe(SPEC)["layers"]["layer"] for one in (result, alone))
    assert numbers["factor_place_information_bits"] == pytest.approx(once["factor_place_information_bits"])
