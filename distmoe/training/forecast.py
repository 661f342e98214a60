"""The cost model asked about a run: each way to spread its experts over hypothetical ranks, and which one to take."""

from collections.abc import Sequence

from distmoe.config import RunConfig, SGDSection
from distmoe.contracts import UserError
from distmoe.training.cost_model import (
    USABLE_MEMORY,
    Layout,
    Machine,
    Prediction,
    Training,
    Workload,
    allowed_sizes,
    predict,
    recommended,
)

_NOTICEABLE = 0.95  # a step that takes this share of another's is called faster


def training_of(config: RunConfig) -> Training:
    """What the cost model has to know of a run."""
    moments = 2
    if isinstance(config.optim, SGDSection):
        moments = 1 if config.optim.momentum else 0
    return Training(
        samples=config.data.batch_size,
        accumulation=config.train.accumulation,
        moments=moments,
        value_bytes=4 if config.train.precision == "fp32" else 2,
        zero_stage=config.parallel.zero_stage,
    )


def check_world(world_size: int, ranks_per_host: int) -> None:
    """Refuses processes that do not fill their hosts; fewer than one host takes are on one.

    Raises:
        UserError: They do not; the message names the options of the command line.
    """
    if world_size % min(ranks_per_host, world_size):
        raise UserError(
            f"--world ({world_size}) must be a multiple of --per-host ({ranks_per_host}), or smaller: every host has "
            "as many processes; change one of the two"
        )


def forecast(
    workload: Workload, training: Training, machine: Machine, world_size: int, ranks_per_host: int
) -> list[Prediction]:
    """One prediction for each allowed expert-parallel size, ascending."""
    return [
        predict(workload, training, Layout(world_size, ranks_per_host, size), machine)
        for size in allowed_sizes(workload, world_size)
    ]


def format_forecast(predictions: Sequence[Prediction], training: Training, machine: Machine) -> list[str]:
    """The predictions as a table, and what to take, with the reason."""
    layout = predictions[0].layout
    hosts = -(-layout.world_size // layout.ranks_per_host)
    rows: list[tuple[str, ...]] = [
        ("EP", "step", "compute", "all-to-all", "gradients", "samples/s", "memory", "weights", "activations", "fits")
    ]
    rows += [_row(prediction, training, machine) for prediction in predictions]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    where = f"{_count(layout.world_size, 'rank')} on {_count(hosts, 'host')}, {machine.name}"
    lines = [
        f"predicted for {where}, ZeRO stage {training.zero_stage}; "
        "memory a rank, weights with gradients and moments; even load, nothing overlaps",
        *("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows),
    ]
    return [*lines, _advice(predictions, machine)]


def _row(prediction: Prediction, training: Training, machine: Machine) -> tuple[str, ...]:
    states = prediction.parameter_bytes + prediction.gradient_bytes + prediction.optimizer_bytes
    return (
        str(prediction.layout.expert_parallel_size),
        _ms(prediction.step_s),
        _ms(prediction.compute_s),
        _ms(prediction.exchange_s),
        _ms(prediction.reduction_s),
        f"{training.samples / prediction.step_s:,.0f}",
        _gib(prediction.memory_bytes),
        _gib(states),
        _gib(prediction.activation_bytes + prediction.buffer_bytes),
        "yes" if prediction.fits(machine) else "no",
    )


def _advice(predictions: Sequence[Prediction], machine: Machine) -> str:
    chosen = recommended(predictions, machine)
    usable = _gib(USABLE_MEMORY * machine.memory_bytes)
    if chosen is None:
        least = min(predictions, key=lambda prediction: prediction.memory_bytes)
        return (
            f"none fits into the {usable} to be used of a device: the least is {_gib(least.memory_bytes)}. More ranks, "
            "parallel.zero_stage=1 or 2, train.accumulation or a smaller data.batch_size need less"
        )
    size = chosen.layout.expert_parallel_size
    advice = (
        f"recommended: parallel.expert_parallel_size={size}, the smallest that fits into the {usable} to be used of a "
        "device. A larger one saves memory, and sums of the experts' gradients, and costs throughput: four times a "
        "step and MoE layer tokens travel, and all ranks wait for the slowest and the fullest"
    )
    fastest = min(predictions, key=lambda prediction: prediction.step_s)
    if fastest.fits(machine) and fastest.step_s < _NOTICEABLE * chosen.step_s:
        advice += (
            f". Here the sums weigh more: under an even load, size {fastest.layout.expert_parallel_size} is predicted "
            f"{chosen.step_s / fastest.step_s:.2f} times as fast; measure both"
        )
    return advice


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
