import math

import pytest
import torch
from torch import nn

from distmoe.contracts import Batch, DataSpec
from distmoe.models.protocol import ModelOutput
from distmoe.moe.losses import no_reduction
from distmoe.moe.routing import Routing
from distmoe.training.evaluation import class_shares, evaluate

SPEC = DataSpec("little", (1, 1, 2), 3, ("ant", "bee", "cat"), (0.0,), (1.0,))

# Seven samples: label, predicted class, expert.
SAMPLES = [(0, 0, 0), (0, 0, 0), (0, 1, 1), (1, 1, 1), (1, 2, 1), (2, 2, 0), (2, 2, 1)]


class Lookup(nn.Module):
    """Odds of 3 : 1 : 1 for the class in the first pixel, gate odds of 3 : 1 for the expert in the second."""

    def __init__(self) -> None:
        super().__init__()
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
        return ModelOutput(logits=logits, routings={"layer": routing})


def batches(*sizes: int) -> list[Batch]:
    made, start = [], 0
    for size in sizes:
        part = SAMPLES[start : start + size]
        pixels = torch.tensor([[[[wanted, expert]]] for _, wanted, expert in part]).view(size, 1, 1, 2)
        labels = torch.tensor([label for label, *_ in part], dtype=torch.long)
        made.append(Batch(pixels.float(), labels, torch.arange(start, start + size)))
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
    assert sums["assigned_CE"].tolist() == [[2, 1], [0, 2], [1, 1]]
    torch.testing.assert_close(sums["soft_CE"], torch.tensor([[1.75, 1.25], [0.5, 1.5], [1.0, 1.0]]).double())


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


def test_class_shares_fall_back_to_the_assignments_and_leave_an_absent_class_at_zero():
    shares = class_shares({"assigned_CE": torch.tensor([[3.0, 1.0], [0.0, 0.0]])})
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


def test_sums_go_through_the_reducer():
    model = Lookup()
    result = evaluate(
        model, model, batches(7), 3, 0, lambda sums: {name: value + value for name, value in sums.items()}
    )
    # Two ranks with the same samples: twice the counts, the same means.
    assert result.samples == 14
    assert result.loss == pytest.approx(run(7).loss)
    assert result.layers["layer"]["assignments_E"].tolist() == [6, 8]
