from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distmoe.bench import layer as bench
from distmoe.bench.estimate import Estimate
from distmoe.bench.layer_candidates import Candidate, Problem, Shape, build_problem
from distmoe.bench.layer_table import Measured, Skipped, format_lines, missed_floors
from distmoe.bench.memory import peak_bytes
from distmoe.contracts import UserError

CPU = torch.device("cpu")
SETTINGS = bench.Settings(rounds=6, device=CPU, precision="fp32")
LITTLE = Shape(width=16, hidden=8, num_experts=4, k=2, load="skewed", num_tokens=24)


def names(lines: list[Measured | Skipped]) -> list[str]:
    return [line.name for line in lines]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_all_layers_give_the_same_and_are_compared_with_ours(k: int):
    pytest.importorskip("deepspeed")
    lines = bench.measure_layer(replace(LITTLE, k=k), SETTINGS, bench.find_entries())
    assert names(lines) == ["distmoe", "DeepSpeed MoE", "loop over masks", "dense MLP"]
    ours, *others = [line for line in lines if isinstance(line, Measured)]
    assert len(others) == 3
    assert ours.forward_ratio is ours.step_ratio is None
    for line in (ours, *others):
        assert line.step.median < line.forward.median  # the same tokens in more time


def test_ratios_are_speeds_of_ours_by_theirs_inside_a_round():
    seconds = {"distmoe": [(1.0, 2.0)] * 5 + [(3.0, 6.0)], "peer": [(2.0, 8.0)] * 5 + [(6.0, 24.0)]}
    peer_line, ours = (bench._line(name, 100, seconds, 7) for name in ("peer", "distmoe"))
    # The last round was three times slower for both: ratios do not see it.
    assert (peer_line.forward_ratio, peer_line.step_ratio) == (Estimate(2.0, 2.0, 2.0), Estimate(4.0, 4.0, 4.0))
    assert peer_line.forward == Estimate(50.0, 100 / 6, 50.0)
    assert peer_line.step == Estimate(12.5, 100 / 24, 12.5)
    assert (ours.forward_ratio, ours.step_ratio, ours.peak_bytes) == (None, None, 7)


def test_rounds_go_forwards_and_backwards_in_turn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "_MOST_REPEATS", 1)
    problem, called = build_problem(LITTLE, CPU), []

    def candidate(name: str) -> Candidate:
        def forward(x: Tensor) -> Tensor:
            called.append(name)
            return 2 * x

        return Candidate(nn.Identity(), forward)

    seconds = bench._measure({name: candidate(name) for name in "abc"}, problem, SETTINGS)
    assert "".join(called) == "cba" + "abccba" * 3
    assert [len(values) for values in seconds.values()] == [6, 6, 6]  # without the first, which warms up


def test_half_precision_is_measured_by_autocast():
    seen = []

    def watched(problem: Problem) -> Candidate:
        candidate = next(entry for entry in bench.find_entries() if entry.name == "distmoe").build(problem)

        def forward(x: Tensor) -> Tensor:
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return candidate.forward(x)

        return Candidate(candidate.module, forward)

    bench.measure_layer(LITTLE, replace(SETTINGS, precision="bf16"), [bench.Entry("distmoe", watched)])
    assert set(seen) == {(True, torch.bfloat16)}


def test_a_layer_that_computes_something_else_stops_the_measurement():
    def wrong(problem: Problem) -> Candidate:
        module = nn.Linear(LITTLE.width, LITTLE.width)
        return Candidate(module, module)

    entries = [bench.find_entries()[0], bench.Entry("wrong", wrong)]
    with pytest.raises(RuntimeError, match="wrong: its outputs are up to"):
        bench.measure_layer(LITTLE, SETTINGS, entries)
    # Work of another kind is timed without asking.
    lines = bench.measure_layer(LITTLE, SETTINGS, [entries[0], replace(entries[1], is_mixture=False)])
    assert names(lines) == ["distmoe", "wrong"]


def test_a_layer_that_needs_more_memory_than_there_is_becomes_a_line_without_numbers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "_free_bytes", lambda device: 10 * 2**30)
    ours = bench.find_entries()[0]
    entries = [ours, replace(ours, name="big", needed_bytes=lambda shape: 9 * 2**30)]
    lines = bench.measure_layer(LITTLE, SETTINGS, entries)
    assert lines[1:] == [Skipped("big", "out of memory: takes 9.0 GiB or more")]
    entries = [ours, replace(ours, name="fits", needed_bytes=lambda shape: 7 * 2**30)]
    assert isinstance(bench.measure_layer(LITTLE, SETTINGS, entries)[1], Measured)


def test_without_deepspeed_the_others_are_measured(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(bench.importlib, "import_module", absent)
    assert [entry.name for entry in bench.find_entries()] == ["distmoe", "loop over masks", "dense MLP"]


def test_deepspeed_takes_what_its_padded_rows_take():
    module = pytest.importorskip("distmoe.bench.layer_deepspeed")
    # 4 experts padded to the 24 tokens that one gets; 3 x 16 + 4 x 8 floats a row.
    assert module.deepspeed_bytes(LITTLE) == 4 * 24 * (3 * 16 + 4 * 8) * 4


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (Shape(16, 8, num_experts=3, k=2, load="balanced", num_tokens=6), [4, 4, 4]),
        (Shape(16, 8, num_experts=5, k=1, load="balanced", num_tokens=10), [2, 2, 2, 2, 2]),
        (Shape(16, 8, num_experts=3, k=1, load="skewed", num_tokens=8), [4, 2, 2]),
        (Shape(16, 8, num_experts=5, k=2, load="skewed", num_tokens=8), [8, 2, 2, 2, 2]),
        (Shape(16, 8, num_experts=4, k=3, load="skewed", num_tokens=6), [6, 4, 4, 4]),
    ],
)
def test_experts_get_the_load_that_is_asked_for(shape: Shape, expected: list[int]):
    expert_ids = shape.expert_ids()
    assert torch.bincount(expert_ids.flatten()).tolist() == expected
    assert all(len(set(row)) == shape.k for row in expert_ids.tolist())  # a token asks each of them once
    assert shape.most_rows == max(expected)
    assert shape.rows_per_expert == sum(expected) / shape.num_experts
    assert shape.padding == max(expected) * len(expected) / sum(expected)
    # The tokens' logits say so, with room between the chosen and between the chosen and the others.
    problem = build_problem(shape, CPU)
    logits = (problem.tokens @ problem.gate_weight.T).detach().sort(dim=-1, descending=True)
    assert torch.bincount(logits.indices[:, : shape.k].flatten()).tolist() == expected
    gaps = logits.values[:, :-1] - logits.values[:, 1:]
    assert float(gaps[:, : shape.k].min()) > 0.3


def test_tokens_are_so_many_that_experts_get_the_rows_that_are_asked_for():
    shape = bench.choose_shape(192, 8, 2, "balanced", None, 100, CPU)
    assert (shape.num_tokens, shape.hidden) == (400, 768)
    assert bench.choose_shape(1024, 8, 2, "balanced", None, None, CPU).hidden == 1024
    assert bench.choose_shape(192, 8, 2, "balanced", 99, None, CPU) == Shape(192, 99, 8, 2, "balanced", 1024)


def test_on_a_cpu_there_are_fewer_tokens_where_padding_makes_them_many():
    # 64 experts padded to half of the tokens: at 256 rows an expert, 64 x 8,192 rows x 12 x 192 x 768 = 9.3e11
    # operations a step, more than 2.1e11; at 32 rows 1.2e11.
    skewed = ("skewed", None, None)
    assert bench.choose_shape(192, 64, 1, *skewed, CPU).rows_per_expert == 32
    # 64 x 256 rows x 12 x 1,024 x 1,024 = 2.06e11.
    assert bench.choose_shape(1024, 64, 2, "balanced", None, None, CPU).rows_per_expert == 256
    assert bench.choose_shape(192, 64, 1, *skewed, torch.device("cuda")).rows_per_expert == 256
    assert bench.choose_shape(192, 64, 1, "skewed", None, 128, CPU).rows_per_expert == 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 5}, "5 rounds are too few"),
        ({"loads": ["heavy"]}, "load heavy of 4 experts: must be balanced, or skewed"),
        ({"loads": ["skewed"], "experts": [1], "ks": [1]}, "load skewed of 1 experts"),
        ({"ks": [5]}, "k 5, experts 4, width 8: must not fall"),
        ({"experts": [9]}, "k 1, experts 9, width 8: must not fall"),
        ({"hidden": 0}, "hidden 0: must be 1 or more"),
        ({"device": "tpu"}, "device tpu: must be cpu"),
        ({"precision": "fp8"}, "precision fp8: must be fp32 or bf16 here"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict, message: str):
    arguments = {"widths": [8], "experts": [4], "ks": [1], "loads": ["balanced"], "device": "cpu", **changes}
    with pytest.raises(UserError, match=message):
        list(bench.bench_layer(**arguments))


def test_the_table_grows_line_by_line_and_ends_with_the_floors():
    lines = list(bench.bench_layer([16], [4], [1, 2], ["balanced"], rounds=6, rows_per_expert=8, device="cpu"))
    titles = next(number for number, line in enumerate(lines) if line.startswith("D "))
    assert [line.split()[:6] for line in lines[titles + 1 : titles + 3]] == [
        ["16", "64", "4", "1", "balanced", "32"]
    ] * 2
    assert any(line.split()[:6] == ["16", "64", "4", "2", "balanced", "16"] for line in lines)
    assert sum(line.startswith("\nfloors missed: ") for line in lines) == 1


SPEED = Estimate(12_345.6, 12_000.0, 13_000.0)
OURS = Measured("distmoe", SPEED, SPEED, None, None, 1_572_864)


def peer(name: str, forward: Estimate, step: Estimate) -> Measured:
    return Measured(name, SPEED, SPEED, forward, step, 2 * 2**20)


def test_a_line_shows_shape_speeds_ratios_and_memory():
    shape = Shape(192, 768, 8, 2, "skewed", 2_048)
    lines = [OURS, peer("dense MLP", Estimate(0.5, 0.25, 1.0), Estimate(2.0, 1.5, 3.0)), Skipped("big", "too big")]
    about = "192 768 8 2 skewed 2,048 512 4.0 x"
    speed = "12,346 (12,000 to 13,000)"
    assert [" ".join(line.split()) for line in format_lines(shape, lines)] == [
        f"{about} distmoe {speed} 1 {speed} 1 2",
        f"{about} dense MLP {speed} 0.5 (0.25 to 1) {speed} 2 (1.5 to 3) 2",
        f"{about} big too big",
    ]


GOOD = Estimate(5.0, 4.0, 6.0)
EVEN = Shape(192, 768, 8, 2, "balanced", 1_024)  # 256 rows an expert
SKEWED = Shape(192, 768, 8, 2, "skewed", 1_024)  # padded to 4 times the rows


@pytest.mark.parametrize(
    ("shape", "name", "ratio", "missed"),
    [
        (EVEN, "DeepSpeed MoE", Estimate(0.9, 0.8, 0.97), None),
        (EVEN, "DeepSpeed MoE", Estimate(0.9, 0.8, 0.96), "0.9 (0.8 to 0.96) x DeepSpeed MoE, interval below 0.97"),
        (SKEWED, "DeepSpeed MoE", Estimate(3.0, 2.0, 4.0), None),
        (SKEWED, "DeepSpeed MoE", Estimate(2.9, 2.0, 4.0), "2.9 (2 to 4) x DeepSpeed MoE, below 3.0"),
        (EVEN, "dense MLP", Estimate(0.95, 0.9, 1.0), None),
        (EVEN, "dense MLP", Estimate(0.94, 0.9, 1.0), "0.94 (0.9 to 1) x dense MLP, below 0.95"),
        (replace(EVEN, num_tokens=1_020), "dense MLP", Estimate(0.5, 0.5, 0.5), None),  # 255 rows an expert
        (SKEWED, "dense MLP", Estimate(0.5, 0.4, 0.6), "0.5 (0.4 to 0.6) x dense MLP, below 0.95"),  # 256 on average
        (EVEN, "loop over masks", Estimate(0.1, 0.1, 0.1), None),
    ],
)
def test_floors_hold_for_forward_and_for_both(shape, name, ratio, missed):
    for what, line in (("forward", peer(name, ratio, GOOD)), ("forward + backward", peer(name, GOOD, ratio))):
        found = missed_floors(shape, [OURS, line, Skipped(name, "out of memory")])
        assert found == ([] if missed is None else [f"D=192 E=8 k=2 {shape.load}, {what}: {missed}"])


def test_memory_is_counted_until_its_last_reference_goes_and_not_what_was_there_before():
    there = torch.zeros(1_000, requires_grad=True)

    def run() -> None:
        first = there.detach() + 1  # 4,000 bytes; the view of what was there counts nothing
        second = first + 1  # 8,000
        del first  # 4,000
        third = torch.cat([second, second])  # 12,000
        del second, third  # 0
        torch.zeros(2_000)  # 8,000

    assert peak_bytes(run, CPU) == 12_000


def test_memory_of_a_backward_pass_is_counted():
    x = torch.zeros(1_000, requires_grad=True)

    def run() -> None:
        x.exp().sum().backward()

    # The exponential (4,000) and its sum (4); coming back the gradient of the sum (4), spread without a copy, and the
    # product with the exponential (4,000). The sum's gradient may or may not outlive it.
    assert peak_bytes(run, CPU) in range(8_000, 8_013)
