"""A little run that the tests of this folder share: its data, its model, its engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from distmoe.config import RunConfig, config_to_yaml, parse_config
from distmoe.contracts import Batch, DataSpec
from distmoe.models import build_model
from distmoe.models.protocol import Model, Network
from distmoe.moe.losses import build_losses
from distmoe.parallel.engines.replicas import ReplicasEngine
from distmoe.parallel.mesh import Mesh
from distmoe.parallel.shards import BUFFER, Piece, buffer_extents, owned_pieces
from distmoe.training.checkpoint import Best, Progress, TrainingState
from distmoe.training.ema import WeightAverage
from distmoe.training.optim import build_optimizer
from distmoe.training.schedule import build_schedule
from distmoe.training.step import MicroBatch, Mixtures, StepResult, train_step

SPEC = DataSpec("little", (3, 8, 8), 4, ("ant", "bee", "cat", "dog"), (120.0,) * 3, (60.0,) * 3)
TOTAL_STEPS = 6
SPARSE = {
    "model": {"name": "convnet", "widths": [4], "ffn_stages": [1], "ffn_hidden": 6},
    "moe": {"num_experts": 3, "loss_weights": {"load_balance": 0.5, "z": 0.25}},
}
# Without batch norm and auxiliary losses: the loss is a plain mean over samples.
MIXTURE = {
    "model": {"name": "tutorial", "channels": [4], "hidden": 6, "gate_channels": [2], "gate_hidden": 3},
    "moe": {"num_experts": 3, "gate": {"name": "dense"}},
}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
ADAMW = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}


def run_config(base: dict[str, Any] = SPARSE, **sections: Any) -> RunConfig:
    return parse_config({**base, "optim": SGD, **sections}, "test")


def batch(start: int, count: int) -> Batch:
    """Samples start..start + count of an endless random set: the same wherever they are cut."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (64,), generator=generator)
    rows = slice(start, start + count)
    return Batch(images[rows], labels[rows], torch.arange(64)[rows])


def step_of(start: int, *counts: int) -> list[MicroBatch]:
    """One optimizer step whose micro-batches hold that many samples, from sample ``start`` on."""
    micro_batches, total = [], sum(counts)
    for number, count in enumerate(counts, start=1):
        micro_batches.append(MicroBatch(batch(start, count), total, count, last=number == len(counts)))
        start += count
    return micro_batches


def mixtures_of(config: RunConfig, model: Network) -> Mixtures:
    """As a session makes them."""
    return Mixtures(model.gates(), build_losses(config.moe) if config.moe is not None else {})


class Trainer:
    """A model and its engine, as a session holds them."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.module: Network = build_model(config, SPEC)
        self.mixtures = mixtures_of(config, self.module)
        self.engine = ReplicasEngine(config, Mesh(), torch.device("cpu"))
        self.model: Model = self.engine.prepare(
            self.module,
            lambda module: build_optimizer(config.optim, module),
            lambda optimizer, done: build_schedule(config.schedule, optimizer, TOTAL_STEPS, done),
        )

    def train(self, steps: range, *counts: int) -> list[StepResult]:
        """Steps of eight samples, cut into these micro-batches."""
        counts = counts or (8,)
        return [
            train_step(self.engine, self.model, self.mixtures, self.config, step, step_of(8 * step, *counts))
            for step in steps
        ]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    def state(self, step: int, best: Best | None = None) -> TrainingState:
        return TrainingState(
            progress=Progress(step=step, epoch=1, epoch_step=step),
            best=best,
            scaler={"scale": 2.0},
            fingerprint="f" * 64,
            spec=SPEC,
            config_yaml=config_to_yaml(self.config),
            interval={"steps": 1.0, "sums:loss": 0.1},
        )

    def pieces(self, average: WeightAverage | None = None) -> Iterator[Piece]:
        """What a session gives a checkpoint."""
        yield from self.engine.pieces()
        yield from owned_pieces(BUFFER, buffer_extents(self.module, Mesh()), Mesh())
        if average is not None:
            yield from average.pieces()


@contextmanager
def trainer(config: RunConfig) -> Iterator[Trainer]:
    made = Trainer(config)
    try:
        yield made
    finally:
        made.engine.close()
