import pytest
import torch
from torch import nn

from distmoe.parallel.shards import WEIGHT, Piece
from distmoe.training.checkpoint import CheckpointFolder, Progress, TrainingState, load_checkpoint
from distmoe.training.ema import WeightAverage
from tests.unit.training.little import SPEC

STATE = TrainingState(Progress(), None, {}, "abc", SPEC, "seed: 0\n")


def linear(weight: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, weight)
    return model


def weights(model: nn.Linear) -> Piece:
    return Piece(WEIGHT, "weight", model.weight.shape, 0, model.weight.detach().flatten())


def put(model: nn.Linear, weight: float) -> None:
    nn.init.constant_(model.weight, weight)


def current(average: WeightAverage) -> float:
    return float(tensors(average)["weight"])


def tensors(average: WeightAverage) -> dict[str, torch.Tensor]:
    """Copies of what it writes into a checkpoint."""
    return {piece.name: piece.values.clone().view(piece.shape) for piece in average.pieces()}


def test_the_average_by_hand():
    model = linear(1.0)
    average = WeightAverage(model, decay=0.15)
    put(model, 2.0)
    average.update(0)  # decay min(0.15, 1/10): 0.1 * 1 + 0.9 * 2
    assert current(average) == pytest.approx(1.9)
    put(model, 4.0)
    average.update(1)  # decay min(0.15, 2/11) = 0.15: 0.15 * 1.9 + 0.85 * 4
    assert current(average) == pytest.approx(3.685)


def test_late_steps_use_the_full_decay():
    model = linear(0.0)
    average = WeightAverage(model, decay=0.99)
    put(model, 1.0)
    average.update(10_000)
    assert current(average) == pytest.approx(0.01, rel=1e-5)


def test_the_average_stands_in_for_the_weights_and_leaves_again():
    model = linear(1.0)
    average = WeightAverage(model, decay=0.9)
    put(model, 3.0)
    with average.swapped_in():
        assert float(model.weight.detach()) == 1.0
    assert (float(model.weight.detach()), current(average)) == (3.0, 1.0)
    with pytest.raises(KeyError), average.swapped_in():
        raise KeyError
    assert (float(model.weight.detach()), current(average)) == (3.0, 1.0)


def test_it_goes_on_from_what_it_saved(tmp_path):
    model = linear(1.0)
    average = WeightAverage(model, decay=0.5)
    put(model, 2.0)
    average.update(50)
    folder = CheckpointFolder(tmp_path, 1).save(STATE, [*average.pieces(), weights(model)])
    put(model, 5.0)
    average.update(51)

    restored = linear(9.0)
    other = WeightAverage(restored, decay=0.5)
    other.load(load_checkpoint(folder).tensors)
    put(restored, 5.0)
    other.update(51)
    assert current(other) == current(average) == 3.25  # (1.5 + 5) / 2


def test_without_saved_averages_it_goes_on_from_the_saved_weights(tmp_path):
    model = linear(1.0)
    average = WeightAverage(model, decay=0.5)
    average.load(load_checkpoint(CheckpointFolder(tmp_path, 1).save(STATE, [weights(linear(7.0))])).tensors)
    assert (current(average), float(model.weight.detach())) == (7.0, 1.0)


def test_buffers_are_not_averaged():
    average = WeightAverage(nn.BatchNorm1d(2), decay=0.5)
    assert sorted(tensors(average)) == ["bias", "weight"]
