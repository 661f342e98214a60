from collections import Counter
from dataclasses import replace

import pytest
import torch

from distmoe.bench import calibration
from distmoe.bench import scaling as bench
from distmoe.bench.calibration import Probe
from distmoe.bench.estimate import Estimate
from distmoe.bench.scaling import RankResult, summarize
from distmoe.bench.scaling_candidates import Point, Watch, build_problem
from distmoe.bench.scaling_table import DEEPSPEED, OURS, Line, format_point, missed_floors
from distmoe.contracts import UserError
from distmoe.parallel.control import Control
from distmoe.parallel.mesh import Mesh
from distmoe.training.cost_model import Link, Machine

POINT = Point(
    width=8, hidden=16, num_experts=4, k=2, num_tokens=96, world_size=2, expert_parallel_size=2
)  # 48 tokens a rank: each ordered pair of experts four times


def test_every_pair_of_experts_is_chosen_equally_often():
    pairs = Counter(tuple(pair) for pair in POINT.expert_ids().tolist())
    assert set(pairs.values()) == {4}
    assert set(pairs) == {(one, other) for one in range(4) for other in range(4) if one != other}


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_load_is_even_and_no_expert_is_chosen_twice(k: int):
    chosen = replace(POINT, k=k).expert_ids()
    assert torch.bincount(chosen.flatten()).tolist() == [48 * k // 4] * 4
    assert all(len(set(row)) == k for row in chosen.tolist())


@pytest.mark.parametrize(
    ("k", "world", "size", "pairs"),
    [
        (1, 2, 2, 2 * 24),  # half of each rank's tokens have their expert on the other
        (2, 2, 2, 2 * 48 * 5 // 6),  # both experts here: 2 of 12 ordered pairs
        (4, 2, 2, 2 * 48),
        (1, 2, 1, 0),
        (1, 4, 2, 4 * 12),  # two groups of two ranks with 24 tokens each
        (2, 4, 4, 4 * 36),  # an expert a rank; of 24 tokens each first and second choice leaves 3 of 4 times
    ],
)
def test_least_bytes_of_a_step(k: int, world: int, size: int, pairs: int):
    point = replace(POINT, k=k, world_size=world, expert_parallel_size=size)
    assert point.least_bytes() == pairs * 8 * 4 * 4  # D=8 numbers of 4 bytes, there and back, forward and backward


def test_gates_choose_as_planned_and_ranks_have_tokens_of_their_own():
    problems = [build_problem(POINT, Mesh(2, rank, 2)) for rank in range(2)]
    for problem in problems:
        chosen = problem.tokens[:, :4].topk(2).indices
        assert sorted(map(tuple, chosen.tolist())) == sorted(map(tuple, POINT.expert_ids().tolist()))
    assert not torch.equal(problems[0].tokens, problems[1].tokens)


def test_an_expert_has_the_same_weights_wherever_it_lives():
    whole = build_problem(replace(POINT, expert_parallel_size=1), Mesh(2, 0, 1)).weights
    parts = [build_problem(POINT, Mesh(2, rank, 2)).weights for rank in range(2)]
    for number, name in enumerate(whole._fields):
        assert torch.equal(whole[number], torch.cat([part[number] for part in parts])), name
    assert len({tuple(bias.tolist()) for bias in whole[1]}) == 4


def test_a_watch_counts_what_leaves_the_rank_in_exchanges_of_rows():
    watch = Watch()
    with watch("all-to-all in expert-parallel group", 1000):
        pass
    seconds = watch.seconds
    assert seconds > 0
    with watch("all-gather in expert-parallel group", 500):
        pass
    assert watch.seconds > seconds
    seconds = watch.seconds
    with watch("all-reduce in world group", 700):
        pass
    assert (watch.sent_bytes, watch.seconds) == (1000, seconds)


def test_rates_are_work_by_the_median_of_all_samples_but_the_first(monkeypatch: pytest.MonkeyPatch):
    probe = Probe(Control(), rows=10, width=20, hidden=30)
    ticks = iter(range(1000))
    # Products, pointwise, two exchanges; each sample takes a tick from start to end.
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: next(ticks) ** 2)
    for _ in range(4):
        probe.sample()
    machine = probe.machine()
    # Sample n of the products runs from tick 8 n to 8 n + 1, of the pointwise function two later: squares differ.
    assert machine.flops == 3 * 2 * 10 * 20 * 30 / (2 * 16 + 1)
    assert machine.memory_bandwidth == 2 * 4 * 2**20 / (2 * 18 + 1)
    assert (machine.inside.bandwidth, machine.inside.latency_s) == (float("inf"), 0.0)


def test_a_link_is_told_from_two_sizes_of_a_message():
    probe = Probe(Control(), rows=1, width=1, hidden=1)
    probe._control = Control(0, 4)
    probe._seconds = {"products": [9, 1.0], "pointwise": [9, 1.0], "few": [9, 0.03], "many": [9, 0.53]}
    link = probe.machine().inside
    assert link.latency_s == pytest.approx(0.01)  # to one of three
    assert link.bandwidth == pytest.approx(3 / 4 * (4 * 2**20 - 1024) / 0.5)


def rank_result(scale: float, experts: int = 10) -> RankResult:
    return RankResult([scale * second for second in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)], [0.5] * 6, 7.0, experts, 20)


def test_a_step_takes_as_long_as_the_slowest_rank_and_bytes_add_up():
    results = {OURS: [rank_result(1.0, 30), rank_result(0.5)], DEEPSPEED: [rank_result(1.0), rank_result(2.0)]}
    ours, theirs = summarize(POINT, results)
    assert (ours.step, theirs.step) == (Estimate(3.5, 1.0, 6.0), Estimate(7.0, 2.0, 12.0))
    assert (ours.ratio, theirs.ratio) == (None, Estimate(2.0, 2.0, 2.0))
    assert ours.exchange_share == Estimate((0.5 / 3 + 0.5 / 4) / 2, 0.5 / 6, 0.5)
    assert (ours.sent_bytes, ours.bytes_ratio) == (14.0, 14.0 / POINT.least_bytes())
    assert (ours.expert_bytes, ours.peak_bytes) == (30, 20)


EXPERTS = 2 * 4 * 2 * (8 * 16 + 16 + 16 * 8 + 8)  # gradients too; two experts


def line(name: str, ratio: Estimate | None, expert_bytes: int = EXPERTS) -> Line:
    return Line(name, Estimate(0.01, 0.008, 0.02), ratio, Estimate(0.1, 0.1, 0.1), 0.0, None, expert_bytes, 0)


@pytest.mark.parametrize(
    ("ratio", "expert_bytes", "missed"),
    [
        (Estimate(0.9, 0.8, 0.97), EXPERTS, []),
        (Estimate(0.9, 0.8, 0.96), EXPERTS, ["0.900 (0.800 to 0.960) x DeepSpeed MoE, interval below 0.97"]),
        (Estimate(1, 1, 1), 2 * EXPERTS, [f"{2 * EXPERTS:,} bytes of experts on a rank, not the {EXPERTS:,} of its"]),
    ],
)
def test_missed_floors(ratio: Estimate, expert_bytes: int, missed: list[str]):
    found = missed_floors(POINT, [line(OURS, None, expert_bytes), line(DEEPSPEED, ratio)])
    assert [text.startswith(f"ranks=2 EP=2 k=2: {said}") for text, said in zip(found, missed, strict=True)] == [
        True
    ] * len(missed)


def test_the_prediction_stands_beside_ours_with_its_error():
    machine = Machine(
        "m", flops=1e9, memory_bandwidth=1e9, memory_bytes=1e9, inside=Link(1e6, 1e-4), between=Link(1, 1)
    )
    prediction = bench.predicted(POINT, machine)
    # 48 tokens a rank: the gate 2 * 4 * 8, two experts of 4 * 8 * 16; forward and twice backward.
    flops = 3 * 48 * (64 + 2 * 4 * 8 * 16)
    # x; two rows and outputs of 8, two hidden layers of 16 before and after; weights of the gate and two experts.
    traffic = 4 * (5 * 48 * (8 + 2 * (2 * 8 + 2 * 16)) + 3 * (32 + 2 * 280))
    assert prediction.compute_s == pytest.approx((flops + traffic) / 1e9)
    exchanged = 4 * 40 * 8 * 4 + 8 * (4 + 2)  # 5 of 6 tokens have an expert elsewhere
    assert prediction.exchange_s == pytest.approx(5e-4 + exchanged / 1e6)
    assert prediction.reduction_s == pytest.approx(32 * 4 / 1e6 + 2e-4)  # the gate alone has replicas
    ours, theirs = format_point(POINT, [line(OURS, None), line(DEEPSPEED, Estimate(1, 1, 1))], prediction)
    assert ours.endswith(f"{1e3 * prediction.step_s:.1f} ({prediction.step_s / 0.01 - 1:+.0%})")
    assert "predicted" not in theirs
    assert theirs.endswith("0.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width 0: must be 1 or more"),
        ({"expert_parallel_size": 0}, "expert-parallel 0: must be 1 or more"),
        ({"num_tokens": 0}, "tokens 0: must be 1 or more"),
        ({"world_size": 3, "num_tokens": 12}, "expert-parallel 2: must divide the 3 processes and the 4 experts"),
        ({"num_experts": 3}, "expert-parallel 2: must divide the 2 processes and the 3 experts"),
        ({"k": 5}, "k 5, experts 4, width 8: must not fall"),
        ({"num_experts": 16}, "k 2, experts 16, width 8: must not fall"),
        ({"num_tokens": 92}, "tokens 92: must be a multiple of 8, processes times experts"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict, message: str):
    assert bench.check_point(POINT) is POINT
    with pytest.raises(UserError, match=message):
        bench.check_point(replace(POINT, **change))


def test_too_few_rounds_are_refused_before_anything_starts():
    with pytest.raises(UserError, match="5 rounds are too few"):
        next(bench.bench_scaling(8, 16, 4, [1], 96, [1], None, rounds=5))


def test_layers_that_differ_are_not_timed():
    one = [torch.ones(3)] * 4
    bench._check_agreement([torch.ones(3) + 5e-5] * 4, one)
    with pytest.raises(RuntimeError, match=r"DeepSpeed MoE: its experts' values are up to 0.01"):
        bench._check_agreement([*one[:2], torch.tensor([1.0, 1.01, 1.0]), one[3]], one)
