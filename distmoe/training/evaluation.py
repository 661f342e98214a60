"""Evaluation over a split: accuracy, loss, confusion, and what the experts do."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distmoe.contracts import Batch, Context, DataSpec
from distmoe.models.protocol import Model, ModelOutput
from distmoe.moe.measures import Cells, factor_cells, measure, routing_sums, table_sums
from distmoe.moe.sums import Reducer, Sums, add_sums, reduce_together

_TOTALS = "all layers"  # no layer is called so: names of modules have no spaces


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
            "layers": {name: _describe_layer(sums) for name, sums in self.layers.items()},
        }


def _describe_layer(sums: Sums) -> dict[str, Any]:
    measured = measure(sums)
    tables = {"expert_load": _shares(sums["assignments_E"]).tolist()}
    if "probs_E" in sums:
        tables["expert_probability"] = _shares(sums["probs_E"]).tolist()
    return {
        **{name: one.value for name, one in measured.items()},
        "maxima": {name: one.maximum for name, one in measured.items()},
        **tables,
        "class_by_expert": class_shares(sums).tolist(),
    }


def class_shares(sums: Sums) -> Tensor:
    """(C, E): of the gate's weight on each class, the share each expert has; rows sum to 1."""
    return _shares(sums["class_soft_VE"] if "class_soft_VE" in sums else sums["class_assigned_VE"])


def _shares(weights: Tensor) -> Tensor:
    """Each row divided by its sum; a row of zeros stays."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


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
            add_sums(
                totals, {"loss": output.cross_entropies(batch.labels).double().sum(), "confusion": confusion.double()}
            )
            variables = _variables(batch, output, num_classes)
            for name, routing in output.routings.items():
                add_sums(layers.setdefault(name, {}), {**routing_sums(routing), **table_sums(routing, variables)})
    finally:
        module.train(was_training)
    reduced = reduce_together(reducer, {_TOTALS: totals, **layers})
    totals = reduced.pop(_TOTALS)
    layers = {name: {key: value.cpu() for key, value in sums.items()} for name, sums in reduced.items()}
    confusion_CC = (
        totals["confusion"].long().cpu() if totals else torch.zeros(num_classes, num_classes, dtype=torch.long)
    )
    loss = float(totals["loss"]) / max(int(confusion_CC.sum()), 1) if totals else 0.0
    return Evaluation(loss, confusion_CC, layers)


def _variables(batch: Batch, output: ModelOutput, num_classes: int) -> dict[str, Cells]:
    """What experts may be specialised in: true and predicted classes, and whatever was recorded with the samples."""
    classes = {"class": batch.labels, "predicted_class": output.scores.argmax(-1)}
    favourites = output.favourite_predictions
    if favourites is not None and len(output.routings) == 1:  # of several, it would be known of the top one only
        classes["expert_predicted_class"] = favourites
    return {**{name: Cells(ids_B, num_classes) for name, ids_B in classes.items()}, **factor_cells(batch.factors)}
