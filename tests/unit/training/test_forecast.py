from dataclasses import replace

import pytest

from distmoe.config import parse_config
from distmoe.contracts import UserError
from distmoe.training.cost_model import Link, Machine, MixtureWork, Training, Workload
from distmoe.training.devices import machine_of
from distmoe.training.forecast import check_world, forecast, format_forecast, training_of

MACHINE = Machine("a machine", 1e6, 1e9, 2**40, inside=Link(1e6, 0.01), between=Link(1e5, 0.01))
MIXTURE = MixtureWork(4, tokens=3, k=1, values_in=5, values_out=5, expert_parameters=1000, expert_flops=2000)
WORKLOAD = Workload(dense_parameters=100, dense_flops=1000, activation_values=50, mixtures=(MIXTURE,))
TRAINING = Training(samples=40)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, Training(samples=64, moments=2)),
        ({"optim": {"name": "sgd"}}, Training(samples=64, moments=1)),
        ({"optim": {"name": "sgd", "momentum": 0.0}}, Training(samples=64, moments=0)),
        ({"train": {"precision": "bf16", "accumulation": 2}}, Training(samples=64, accumulation=2, value_bytes=2)),
        ({"parallel": {"zero_stage": 2}}, Training(samples=64, zero_stage=2)),
    ],
)
def test_what_a_configuration_asks_for(sections: dict, expected: Training):
    assert training_of(parse_config({"data": {"batch_size": 64}, **sections}, "test")) == expected


def test_ranks_must_fill_their_hosts():
    with pytest.raises(UserError, match=r"--world \(12\) must be a multiple of --per-host \(8\), or smaller"):
        check_world(12, 8)


def test_less_than_a_host_is_allowed():
    check_world(2, 8)
    check_world(16, 8)


def test_a_device_that_nobody_knows():
    with pytest.raises(UserError, match=r"device t4: must be h100 or a100, .*--measure"):
        machine_of("t4", "fp32")


def test_a_device_in_half_precision():
    machine = machine_of("a100", "bf16")
    assert machine.flops == pytest.approx(0.4 * 312e12)
    assert machine.between.bandwidth == pytest.approx(0.7 * 25e9)
    assert machine_of("a100", "fp32").flops == pytest.approx(0.4 * 19.5e12)


def advice(memory_bytes: float, machine: Machine = MACHINE) -> tuple[list[str], str]:
    machine = replace(machine, memory_bytes=memory_bytes)
    _, titles, *rows, said = format_forecast(forecast(WORKLOAD, TRAINING, machine, 8, 4), TRAINING, machine)
    assert titles.split() == [
        *("EP", "step", "compute", "all-to-all", "gradients", "samples/s", "memory", "weights", "activations", "fits")
    ]
    return rows, said


def test_the_table_has_a_line_for_each_size_and_says_what_fits():
    predictions = forecast(WORKLOAD, TRAINING, MACHINE, 8, 4)
    assert [one.layout.expert_parallel_size for one in predictions] == [1, 2, 4]
    between = (predictions[0].memory_bytes + predictions[1].memory_bytes) / 2
    rows, said = advice(between / 0.9)
    assert [(row.split()[0], row.split()[-1]) for row in rows] == [("1", "no"), ("2", "yes"), ("4", "yes")]
    assert f"{1e3 * predictions[1].step_s:,.2f} ms" in rows[1]
    assert "recommended: parallel.expert_parallel_size=2, the smallest that fits" in said


def test_where_sums_of_gradients_weigh_more_than_tokens_it_says_so():
    fast = replace(MACHINE, inside=Link(1e9, 0.0), between=Link(1e9, 0.0))
    slow_messages = replace(MACHINE, inside=Link(1e9, 1.0), between=Link(1e9, 0.0))
    assert "size 4 is predicted" in advice(2**40, replace(fast, between=Link(1e4, 0.0)))[1]
    assert "is predicted" not in advice(2**40, slow_messages)[1]


def test_where_none_fits_it_says_how_much_is_needed():
    least = forecast(WORKLOAD, TRAINING, MACHINE, 8, 4)[-1].memory_bytes
    said = advice(1024)[1]
    assert said.startswith("none fits into the 0.00 GiB")
    assert f"the least is {least / 2**30:,.2f} GiB" in said
