import itertools
import math
from dataclasses import replace

import pytest

from distmoe.training.cost_model import (
    Layout,
    Link,
    Machine,
    MixtureWork,
    Training,
    Workload,
    all_reduce_s,
    all_to_all_s,
    allowed_sizes,
    exchange_bytes,
    predict,
    ranks_reached,
    recommended,
)

MACHINE = Machine("m", 1e6, 1e4, 1e5, inside=Link(1000.0, 0.01), between=Link(100.0, 0.1))
MIXTURE = MixtureWork(num_experts=4, tokens=3, k=1, values_in=5, values_out=5, expert_parameters=40, expert_flops=80)
WORKLOAD = Workload(dense_parameters=100, dense_flops=1000, activation_values=50, mixtures=(MIXTURE,))


@pytest.mark.parametrize("num_experts", [4, 8])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_ranks_reached_is_the_mean_over_all_choices_of_experts(num_experts: int, size: int, k: int):
    local = num_experts // size
    choices = list(itertools.combinations(range(num_experts), k))
    # Seen from rank 0; by symmetry from any.
    others = [len({expert // local for expert in choice} - {0}) for choice in choices]
    assert ranks_reached(num_experts, k, size) == pytest.approx(sum(others) / len(choices))


def test_a_broken_k_lies_between_its_neighbours():
    # Two experts a rank on 2 ranks: one choice reaches the other rank with 1/2, two miss it with 1/6.
    assert ranks_reached(4, 1.25, 2) == pytest.approx(0.75 * 1 / 2 + 0.25 * 5 / 6)


@pytest.mark.parametrize(
    ("k", "value_bytes", "there", "back"),
    [
        # 12 tokens on 2 ranks, 4 experts. k=1: half of them leave. k=2: 5/6; of the 24 assignments half leave.
        (1, 4, 6 * 5 * 4, 6 * 7 * 4),
        (2, 4, 10 * 5 * 4, 10 * 7 * 4),
        (1, 2, 6 * 5 * 2, 6 * 7 * 2),  # each output in half precision, not the sum in float32
        (2, 2, 10 * 5 * 2, 12 * 7 * 2),
        (4, 2, 12 * 5 * 2, 12 * 7 * 4),  # all four: one sum in float32 is as much as two outputs in half precision
    ],
)
def test_bytes_of_an_exchange(k: int, value_bytes: int, there: float, back: float):
    mixture = replace(MIXTURE, k=k, values_out=7)
    assert exchange_bytes(mixture, 12, 2, value_bytes) == pytest.approx((there, back))
    assert exchange_bytes(mixture, 12, 1, value_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("world", "per_host", "size", "peers"),
    [
        (8, 8, 4, (3, 0)),
        (8, 2, 1, (0, 0)),
        (8, 2, 2, (1, 0)),
        (8, 2, 8, (1, 6)),
        (12, 4, 3, (0, 2)),  # ranks 3, 4 and 5 lie on two hosts, rank 3 alone on its own
        (4096, 8, 1024, (7, 1016)),
    ],
)
def test_peers_on_the_same_host_and_on_others(world: int, per_host: int, size: int, peers: tuple[int, int]):
    assert Layout(world, per_host, size).peers() == peers


def test_an_all_to_all_takes_as_long_as_the_slower_kind_of_link():
    assert all_to_all_s(600, Layout(4, 4, 4), MACHINE) == pytest.approx(3 * 0.01 + 600 / 1000)
    # 200 bytes to the one beside, 400 to the two on the other host.
    assert all_to_all_s(600, Layout(4, 2, 4), MACHINE) == pytest.approx(2 * 0.1 + 400 / 100)
    # One of seven is far.
    near = replace(MACHINE, between=Link(1e9, 0.0))
    assert all_to_all_s(600, Layout(4, 2, 4), near) == pytest.approx(0.01 + 200 / 1000)
    assert all_to_all_s(600, Layout(4, 2, 1), MACHINE) == 0


def test_an_all_reduce_sends_a_ring_of_bytes_and_a_tree_of_messages():
    # Each of 5 ranks sends 2 * 4/5 of the bytes; a tree of 5 has 3 levels, up and down.
    assert all_reduce_s(1000, 5, Link(100.0, 0.1)) == pytest.approx(16 + 0.6)
    assert all_reduce_s(1000, 1, Link(100.0, 0.1)) == 0
    assert all_reduce_s(0, 5, Link(100.0, 0.1)) == 0


def test_time_of_a_step_by_hand():
    found = predict(WORKLOAD, Training(samples=40, accumulation=2, moments=2), Layout(4, 2, 2), MACHINE)
    # 10 samples a rank: 1000 + 3 tokens * 80 operations, forward and twice backward.
    flops_s = 3 * 10 * 1240 / 1e6
    # 100 dense and 2 experts' 80 parameters. 50 values a sample, five passes; the weights three times a micro-batch;
    # an update reads weight, gradient and 2 moments and writes all but the gradient.
    traffic_s = 4 * (5 * 50 * 10 + 3 * 2 * 180 + 7 * 180) / 1e4
    assert found.compute_s == pytest.approx(flops_s + traffic_s)
    # A micro-batch: 5 samples of 3 tokens, half of which have their expert on the other rank of the pair.
    rows_bytes, count_bytes = 7.5 * 5 * 4, 8 * (4 + 2)
    assert found.exchange_s == pytest.approx(2 * (5 * 0.01 + (4 * rows_bytes + count_bytes) / 1000))
    assert found.exchanged_bytes == pytest.approx(2 * (4 * rows_bytes + count_bytes))
    # Dense over 4 ranks, experts over 2 replicas, both from host to host.
    assert found.reduction_s == pytest.approx(2 * 3 / 4 * 400 / 100 + 4 * 0.1 + 320 / 100 + 2 * 0.1)
    assert found.step_s == pytest.approx(found.compute_s + found.exchange_s + found.reduction_s)
    assert found.buffer_bytes == pytest.approx(4 * rows_bytes)
    inside = predict(WORKLOAD, Training(samples=40), Layout(4, 4, 2), MACHINE)
    assert inside.reduction_s == pytest.approx(2 * 3 / 4 * 400 / 1000 + 4 * 0.01 + 320 / 1000 + 2 * 0.01)


def test_launches_bound_a_small_model():
    workload, training = replace(WORKLOAD, operations=100), Training(samples=40, accumulation=2)
    quick, slow = (replace(MACHINE, launch_s=launch_s) for launch_s in (1e-9, 0.5))
    layout = Layout(4, 4, 2)
    assert predict(workload, training, layout, quick) == predict(WORKLOAD, training, layout, MACHINE)
    assert predict(workload, training, layout, slow).compute_s == pytest.approx(3 * 2 * 100 * 0.5)


@pytest.mark.parametrize(
    ("size", "stage", "weights", "gradients", "moments"),
    [
        # 100 dense parameters, 160 of experts; 4 ranks. ZeRO keeps a copy of its share of the weights.
        (1, 0, 260, 260, 2 * 260),
        (2, 0, 180, 180, 2 * 180),
        (4, 0, 140, 140, 2 * 140),
        (1, 1, 260, 260, 3 * 65),
        (2, 1, 180, 180, 3 * (25 + 40)),
        (4, 1, 140, 140, 3 * (25 + 40)),
        (2, 2, 180, 25 + 40, 3 * (25 + 40)),
    ],
)
def test_memory_of_weights_and_what_belongs_to_them(size: int, stage: int, weights: int, gradients: int, moments: int):
    found = predict(WORKLOAD, Training(samples=40, zero_stage=stage), Layout(4, 4, size), MACHINE)
    assert found.parameter_bytes == 4 * weights
    assert found.gradient_bytes == 4 * gradients
    assert found.optimizer_bytes == pytest.approx(4 * moments)
    assert found.activation_bytes == 4 * 50 * 10
    parts = 4 * (weights + gradients + moments) + 4 * 50 * 10 + found.buffer_bytes
    assert found.memory_bytes == pytest.approx(parts)


def test_half_precision_halves_activations_and_keeps_copies_of_weights():
    found = predict(WORKLOAD, Training(samples=40, accumulation=2, value_bytes=2), Layout(4, 4, 2), MACHINE)
    assert found.activation_bytes == 2 * 50 * 5 + 2 * 180
    assert found.parameter_bytes == 4 * 180


def test_of_those_that_fit_the_smallest_is_recommended():
    predictions = [predict(WORKLOAD, Training(samples=40), Layout(4, 4, size), MACHINE) for size in (4, 2, 1)]
    needed = {one.layout.expert_parallel_size: one.memory_bytes for one in predictions}

    def advised(usable: float) -> int | None:
        chosen = recommended(predictions, replace(MACHINE, memory_bytes=usable / 0.9))
        return chosen and chosen.layout.expert_parallel_size

    assert needed[4] < needed[2] < needed[1]
    assert advised(needed[1] + 1) == 1
    assert advised(needed[2] + 1) == 2
    assert advised(needed[4] + 1) == 4
    assert advised(needed[4] - 1) is None


def test_allowed_sizes_divide_ranks_and_every_layers_experts():
    other = replace(MIXTURE, num_experts=6)
    assert allowed_sizes(WORKLOAD, 8) == [1, 2, 4]
    assert allowed_sizes(replace(WORKLOAD, mixtures=(MIXTURE, other)), 8) == [1, 2]
    assert allowed_sizes(replace(WORKLOAD, mixtures=()), 8) == [1]


@pytest.mark.parametrize(("world", "size"), [(4, 3), (8, 8)])
def test_a_size_that_does_not_divide_is_refused(world: int, size: int):
    with pytest.raises(ValueError, match="does not divide"):
        predict(WORKLOAD, Training(samples=40), Layout(world, 8, size), MACHINE)


def test_thousands_of_ranks():
    mixture = replace(MIXTURE, num_experts=2048, expert_parameters=10**6)
    workload = replace(WORKLOAD, mixtures=(mixture,))
    found = predict(workload, Training(samples=10**6), Layout(4096, 8, 2048), MACHINE)
    assert found.parameter_bytes == 4 * (100 + 10**6)  # an expert a rank
    assert math.isclose(found.reduction_s, 2 * 4095 / 4096 * 4 + 24 * 0.1 + 4e6 / 100 + 2 * 0.1)
