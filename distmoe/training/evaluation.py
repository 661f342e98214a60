"""Evaluation over a split: accuracy, loss, confusion, and what the experts do."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distmoe.contracts import Batch, Context, DataSpec
from distmoe.models.protocol import Model
from distmoe.moe.losses import Reducer, Sums, add_sums
from distmoe.moe.measures import describe_routing, label_sums, routing_sums


@dataclass(frozen=True)
class Evaluation:
    """Results over all samples of a split, each counted once.

    Attributes:
        loss: Mean cross-entropy, without label smoothing.
        confusion_CC: (C, C) int64 counts: true class by predicted class.
        layers: Sums of each MoE layer's routings, see :mod:`distmoe.moe.measures`.
    """

    loss: float
    confusion_CC: Tensor
    layers: dict[str, Sums]

    @property
    def samples(self) -> int:
        """How many samples were seen."""
        return int(self.confusion_CC.sum())

    @property
    def accuracy(self) -> float:
        """Share of samples whose most probable class is the true one."""
        return float(self.confusion_CC.diagonal().sum()) / max(self.samples, 1)

    @property
    def class_accuracy(self) -> list[float]:
        """Of each class; 0 for a class without samples."""
        per_class = self.confusion_CC.diagonal() / self.confusion_CC.sum(1).clamp(min=1)
        return [float(share) for share in per_class]

    def describe(self, spec: DataSpec) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "accuracy": self.accuracy,
            "loss": self.loss,
            "samples": self.samples,
            "class_accuracy": dict(zip(spec.class_names, self.class_accuracy, strict=True)),
            "confusion": self.confusion_CC.tolist(),
            "layers": {
                name: {
                    **describe_routing(sums),
                    "expert_load": (sums["assignments_E"] / sums["assignments_E"].sum().clamp(min=1)).tolist(),
                    "class_by_expert": class_shares(sums).tolist(),
                }
                for name, sums in self.layers.items()
            },
        }


def class_shares(sums: Sums) -> Tensor:
    """(C, E): of the gate's weight on each class, the share each expert has; rows sum to 1."""
    table_CE = sums.get("soft_CE", sums["assigned_CE"])
    return table_CE / table_CE.sum(1, keepdim=True).clamp(min=torch.finfo(table_CE.dtype).tiny)


@torch.no_grad()
def evaluate(
    model: Model, module: nn.Module, batches: Iterable[Batch], num_classes: int, seed: int, reducer: Reducer
) -> Evaluation:
    """Runs the model over batches on its device, without noise. Collective: every rank runs equally many batches.

    Args:
        model: What to call.
        module: The module behind it, to switch to evaluation and back.
        batches: On the device, normalisation aside as the model wants them; may be empty.
        num_classes: C.
        seed: The run's seed, part of the context.
        reducer: Adds sums over ranks.
    """
    was_training = module.training
    module.eval()
    totals: Sums = {}
    layers: dict[str, Sums] = {}
    try:
        for batch in batches:
            output = model(batch.images, Context(seed, 0, batch.sample_ids, training=False))
            cells = batch.labels * num_classes + output.scores.argmax(-1)
            confusion = torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)
            add_sums(totals, {"loss": output.losses(batch.labels).double().sum(), "confusion": confusion.double()})
            for name, routing in output.routings.items():
                sums = {**routing_sums(routing), **label_sums(routing, batch.labels, num_classes)}
                add_sums(layers.setdefault(name, {}), sums)
    finally:
        module.train(was_training)
    totals = reducer(totals)
    layers = {name: {key: value.cpu() for key, value in reducer(sums).items()} for name, sums in layers.items()}
    confusion_CC = (
        totals["confusion"].long().cpu() if totals else torch.zeros(num_classes, num_classes, dtype=torch.long)
    )
    loss = float(totals["loss"]) / max(int(confusion_CC.sum()), 1) if totals else 0.0
    return Evaluation(loss, confusion_CC, layers)
