"""One optimizer step: forward, losses, backward and update over its micro-batches."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distmoe.config import RunConfig
from distmoe.contracts import Batch, Context
from distmoe.models.protocol import Model
from distmoe.moe.losses import add_sums, auxiliary_losses
from distmoe.moe.routing import Routing
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
        sums: Per-rank sums that add over ranks: ``loss`` (of samples, with label smoothing), ``correct``, ``samples``.
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


def train_step(
    engine: Engine, model: Model, config: RunConfig, step: int, micro_batches: Iterable[MicroBatch]
) -> StepResult:
    """Runs one optimizer step. Collective: every rank runs the same number of micro-batches.

    The loss is ``mean over the step's samples of the cross-entropy + sum of weight * auxiliary loss``; a micro-batch's
    auxiliary losses count by its share of the samples. See ``engines/protocol.py`` for the scaling over ranks.

    Args:
        engine: Owns the optimizer.
        model: What the engine's ``prepare`` returned.
        config: The run.
        step: Optimizer step from the start of training.
        micro_batches: In order; the last one has ``last`` set.
    """
    weights: dict[str, float] = config.moe.loss_weights.model_dump() if config.moe is not None else {}
    sums: dict[str, Tensor] = {}
    auxiliary: dict[str, Tensor] = {}
    routings: Mapping[str, Routing] = {}
    step_samples = 0
    for micro in micro_batches:
        batch, labels, step_samples = micro.batch, micro.batch.labels, micro.step_samples
        context = Context(config.seed, step, batch.sample_ids, training=True)
        with engine.micro_batch(micro.last):
            output = model(batch.images, context)
            losses = output.losses(labels, config.train.label_smoothing)
            parts = auxiliary_losses(output.routings, weights, engine.reducer)
            share = micro.micro_samples / micro.step_samples
            loss = losses.sum() * (engine.world_size / micro.step_samples)
            for name, part in parts.items():
                loss = loss + part * (weights[name] * share)
            engine.backward(loss)
        add_sums(sums, _sample_sums(output.scores, losses, labels))
        add_sums(auxiliary, {name: part.detach() * share for name, part in parts.items()})
        routings = {name: routing.detach() for name, routing in output.routings.items()}
    gradient_norm = engine.step()
    checked = [sums["loss"], *auxiliary.values()] + [gradient_norm] * (config.train.precision != "fp16")
    return StepResult(sums, auxiliary, step_samples, gradient_norm, torch.stack(checked).sum(), routings)


def _sample_sums(scores: Tensor, losses: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {
        "loss": losses.detach().double().sum(),
        "correct": (scores.detach().argmax(-1) == labels).double().sum(),
        "samples": losses.new_tensor(float(len(labels)), dtype=torch.float64),
    }
