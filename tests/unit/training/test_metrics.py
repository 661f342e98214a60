import json
import math

import pytest
import torch

from distmoe.contracts import UserError
from distmoe.moe.routing import Routing
from distmoe.moe.sums import NoReduction, Sums
from distmoe.training.metrics import Interval, MetricsFile, read_metrics
from distmoe.training.step import StepResult

LINES = [
    {"step": 2, "loss": 2.5},
    {"step": 4, "loss": 1.5},
    {"step": 4, "split": "validation", "accuracy": 0.5},
    {"step": 4, "split": "test", "accuracy": 0.4},
    {"step": 6, "loss": 1.25},
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def test_a_new_file_starts_empty_and_holds_each_line_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as metrics:
        assert path.read_text() == ""
        metrics.write({"step": 1, "loss": 0.1})
        assert path.read_text() == '{"step": 1, "loss": 0.1}\n'  # before it is closed
        metrics.write({"step": 2})
    assert list(read_metrics(path)) == [{"step": 1, "loss": 0.1}, {"step": 2}]


@pytest.mark.parametrize(
    ("resume_step", "evaluated", "kept"),
    [
        (0, True, []),
        (2, True, [0]),
        (3, True, [0]),
        (4, True, [0, 1, 2]),
        (4, False, [0, 1]),
        (9, True, [0, 1, 2, 3, 4]),
    ],
)
def test_a_resume_cuts_what_will_happen_again(path, resume_step, evaluated, kept):
    with MetricsFile(path, resume_step, evaluated) as metrics:
        assert list(read_metrics(path)) == [LINES[index] for index in kept]
        metrics.write({"step": 10})
    assert list(read_metrics(path)) == [*(LINES[index] for index in kept), {"step": 10}]


@pytest.mark.parametrize(
    "torn", ['{"step": 8, "lo', "{", '"text"', '{"loss": 1.0}', '{"step": "x"}', "\x00\x00", "\udcff"]
)
def test_a_torn_last_line_ends_the_file_and_the_next_one_starts_clean(path, torn):
    with path.open("ab") as file:
        file.write(torn.encode(errors="surrogateescape"))
    assert list(read_metrics(path)) == LINES
    with MetricsFile(path, 6) as metrics:
        metrics.write({"step": 8, "loss": 1.0})
    assert path.read_text().splitlines()[-1] == '{"step": 8, "loss": 1.0}'
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 4, 4, 6, 8]


def test_a_file_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written .*another run.dir"):
        MetricsFile(tmp_path / "metrics.jsonl", 0)


def result(
    loss: float, correct: int, samples: int, balance: float, norm: float = 1.0, health: float = 0.0
) -> StepResult:
    """Four rows over two experts, 3 : 1, each token's gate at 3/4."""
    probs = torch.tensor([[0.75, 0.25]] * 3 + [[0.25, 0.75]])
    rows = torch.arange(4)
    routing = Routing(4, 2, rows, probs.argmax(-1), probs.amax(-1), probs.log(), probs)
    return StepResult(
        sums={
            "loss": torch.tensor(loss, dtype=torch.float64),
            "cross_entropy": torch.tensor(0.5 * loss, dtype=torch.float64),  # another objective is minimised
            "correct": torch.tensor(correct, dtype=torch.float64),
            "samples": torch.tensor(samples, dtype=torch.float64),
        },
        auxiliary={"load_balance": torch.tensor(balance)},
        step_samples=samples,
        gradient_norm=torch.tensor(norm),
        health=torch.tensor(health),
        routings={"layer": routing},
    )


def test_an_interval_means_over_samples_and_steps():
    interval = Interval()
    interval.add(result(loss=8.0, correct=2, samples=8, balance=1.0, norm=5.0))
    interval.add(result(loss=1.0, correct=1, samples=2, balance=2.0, norm=3.0))
    numbers, loads = interval.describe({"load_balance": 0.1})
    # 9 / 10 samples; the balance (1 + 2) / 2 with weight 0.1.
    expected = {
        "loss": 0.9 + 0.15,
        "cross_entropy": 0.45,
        "load_balance": 1.5,
        "accuracy": 0.3,
        "gradient_norm": 3.0,
        "layer/load_imbalance": 1.5,
        "layer/dead_experts": 0.0,
        "layer/dropped_share": 0.0,
        "layer/gate_entropy_bits": 0.75 * math.log2(4 / 3) + 0.5,
        "layer/usage_entropy_bits": 0.75 * math.log2(4 / 3) + 0.5,
        "layer/unassigned_share": 0.0,
        # Mean probabilities (3 * 3/4 + 1/4) / 4 = 5/8 and 3/8.
        "layer/load_imbalance_soft": 1.25,
        "layer/dead_experts_soft": 0.0,
        "layer/usage_entropy_soft_bits": 5 / 8 * math.log2(8 / 5) + 3 / 8 * math.log2(8 / 3),
    }
    assert numbers == pytest.approx(expected)
    assert loads["layer"].tolist() == [0.75, 0.25]


class OtherRank(NoReduction):
    """Adds what others have: four times the loss and the samples, and the mirror image of the load."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, sums: Sums) -> Sums:
        self.calls += 1
        others = {name: value.flip(0) if value.dim() else value for name, value in sums.items()}
        return {name: value + (others[name] if "layer\n" in name else 4 * value) for name, value in sums.items()}


def test_sums_of_all_layers_and_of_the_interval_travel_together():
    interval, reducer = Interval(), OtherRank()
    interval.add(result(loss=8.0, correct=2, samples=8, balance=1.0))
    numbers, loads = interval.describe({"load_balance": 0.0}, reducer)
    assert reducer.calls == 1
    assert loads["layer"].tolist() == [0.5, 0.5]
    assert (numbers["layer/load_imbalance"], numbers["loss"], numbers["accuracy"]) == (1.0, 1.0, 0.25)


def test_a_cleared_interval_starts_anew():
    interval = Interval()
    interval.add(result(loss=8.0, correct=2, samples=8, balance=1.0))
    interval.clear()
    interval.add(result(loss=1.0, correct=1, samples=2, balance=2.0))
    numbers, _ = interval.describe({"load_balance": 0.0})
    assert (numbers["loss"], numbers["accuracy"], numbers["load_balance"]) == (0.5, 0.5, 2.0)


def test_an_interval_cut_by_a_resume_gives_the_same_line():
    steps = [result(8.1, 2, 8, 1.1), result(1.7, 1, 2, 2.3), result(3.3, 3, 4, 0.7)]
    straight, first, second = Interval(), Interval(), Interval()
    for step in steps:
        straight.add(step)
    for step in steps[:2]:
        first.add(step)
    second.load(json.loads(json.dumps(first.state())), torch.device("cpu"))
    second.add(steps[2])
    (numbers, _), (expected, _) = (one.describe({"load_balance": 0.1}) for one in (second, straight))
    assert numbers == expected  # bit for bit
    assert second.state() == straight.state()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_step_that_is_not_finite_is_seen_until_the_interval_ends(bad):
    interval = Interval()
    assert interval.finite()
    interval.add(result(1.0, 1, 1, 1.0, health=bad))
    interval.add(result(1.0, 1, 1, 1.0))
    assert not interval.finite()
    interval.clear()
    interval.add(result(1.0, 1, 1, 1.0))
    assert interval.finite()
