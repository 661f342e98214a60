"""One optimizer step: forward, losses, backward and update over its micro-batches."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmoe.config import RunConfig
from distmoe.contracts import Batch, Context
from distmoe.models.protocol import Model, ModelOutput
from distmoe.moe.gates.base import Gate
from distmoe.moe.growing import FrozenExperts
from distmoe.moe.losses import AuxiliaryLoss, auxiliary_losses
from distmoe.moe.routing import Routing
from distmoe.moe.sums import Sums, add_sums
from distmoe.parallel.engines.protocol import Engine


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds the model at once, and its place in the optimizer step.

    Attributes:
        batch: Augmented, on the device.
        step_samples: Valid samples of the whole step, over ranks and micro-batches.
        micro_samples: Valid samples of this micro-batch, over ranks.
        last: Of its step.
    """

    batch: Batch
    step_samples: int
    micro_samples: int
    last: bool


@dataclass
class StepResult:
    """What happened, on the device, without gradient.

    Attributes:
        sums: Per-rank sums that add over ranks: ``loss`` (what is minimised, of samples), ``cross_entropy`` (the same
            unless the mixture has another objective), both with label smoothing, ``correct``, ``samples``.
        auxiliary: Unweighted auxiliary losses by name, of all ranks.
        step_samples: Valid samples of the step, over ranks.
        gradient_norm: Global norm before clipping.
        health: A scalar that is finite as long as losses and gradients are; fp16 steps with gradients too large for the
            loss scale are skipped by design and do not count.
        routings: Of the last micro-batch, detached.
    """

    sums: dict[str, Tensor]
    auxiliary: dict[str, Tensor]
    step_samples: int
    gradient_norm: Tensor
    health: Tensor
    routings: Mapping[str, Routing] = field(default_factory=dict)


@dataclass(frozen=True)
class Mixtures:
    """What the MoE layers of a model bring into its training.

    Attributes:
        gates: By the name of their routing.
        losses: Auxiliary losses that have a weight.
        frozen: Experts that keep their weights, if there are any.
    """

    gates: Mapping[str, Gate] = field(default_factory=dict)
    losses: Mapping[str, AuxiliaryLoss] = field(default_factory=dict)
    frozen: FrozenExperts | None = None


def nowhere(place: str) -> None:
    """Takes no note of it."""
    del place


def train_step(
    engine: Engine,
    model: Model,
    mixtures: Mixtures,
    config: RunConfig,
    step: int,
    micro_batches: Iterable[MicroBatch],
    at: Callable[[str], None] = nowhere,
) -> StepResult:
    """Runs one optimizer step. Collective: every rank runs the same number of micro-batches.

    The loss is ``mean over the step's samples of the objective (by default the cross-entropy) + sum of weight *
    auxiliary loss``; a micro-batch's auxiliary losses count by its share of the samples. See ``engines/protocol.py``
    for the scaling over ranks. Balancers of gates are updated once, after the optimizer.

    Args:
        engine: Owns the optimizer.
        model: What the engine's ``prepare`` returned.
        mixtures: Of that model.
        config: The run.
        step: Optimizer step from the start of training.
        micro_batches: In order; the last one has ``last`` set.
        at: Told what goes on: ``data``, ``forward``, ``backward``, ``update``.
    """
    weights: dict[str, float] = config.moe.loss_weights.model_dump() if config.moe is not None else {}
    sums: dict[str, Tensor] = {}
    auxiliary: dict[str, Tensor] = {}
    routings: Mapping[str, Routing] = {}
    balanced = {name: gate.balancer for name, gate in mixtures.gates.items() if gate.balancer is not None}
    loads: dict[str, Sums] = {name: {} for name in balanced}
    step_samples = 0
    at("data")
    for micro in micro_batches:
        at("forward")
        batch, labels, step_samples = micro.batch, micro.batch.labels, micro.step_samples
        context = Context(config.seed, step, batch.sample_ids, training=True)
        with engine.micro_batch(micro.last):
            output = model(batch.images, context)
            losses = output.losses(labels, config.train.label_smoothing)
            parts = auxiliary_losses(output.routings, mixtures.losses, batch.images, engine.reducer)
            share = micro.micro_samples / micro.step_samples
            loss = losses.sum() * (engine.world_size / micro.step_samples)
            for name, part in parts.items():
                loss = loss + part * (weights[name] * share)
            at("backward")
            engine.backward(loss)
        add_sums(sums, _sample_sums(output, losses, labels, config.train.label_smoothing))
        add_sums(auxiliary, {name: part.detach() * share for name, part in parts.items()})
        routings = {name: routing.detach() for name, routing in output.routings.items()}
        for name, balancer in balanced.items():
            add_sums(loads[name], balancer.sums(routings[name]))
        at("data")
    at("update")
    with mixtures.frozen.unchanged() if mixtures.frozen is not None else nullcontext():
        gradient_norm = engine.step()
    if balanced:
        reduced = engine.reducer({f"{name} {key}": value for name in balanced for key, value in loads[name].items()})
        for name, balancer in balanced.items():
            balancer.update({key: reduced[f"{name} {key}"] for key in loads[name]})
    checked = [sums["loss"], *auxiliary.values()] + [gradient_norm] * (config.train.precision != "fp16")
    return StepResult(sums, auxiliary, step_samples, gradient_norm, torch.stack(checked).sum(), routings)


@torch.no_grad()
def _sample_sums(output: ModelOutput, losses: Tensor, labels: Tensor, label_smoothing: float) -> Sums:
    entropies = losses if output.objective is None else output.cross_entropies(labels, label_smoothing)
    return {
        "loss": losses.double().sum(),
        "cross_entropy": entropies.double().sum(),
        "correct": (output.scores.argmax(-1) == labels).double().sum(),
        "samples": losses.new_tensor(float(len(labels)), dtype=torch.float64),
    }
