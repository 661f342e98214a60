"""Which sample goes to which rank at which step: pure, seeded, the same for every layout, resumable.

One permutation an epoch is cut into global batches (one an optimizer step), each of them into micro-batches, each of
those into contiguous rank slices. World size, rank and accumulation only decide who sees a sample, never which samples
a step is made of, so (epoch, step) is all that a resume needs.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distmoe import noise
from distmoe.contracts import UserError


@dataclass(frozen=True)
class PlannedBatch:
    """One rank's share of one micro-batch.

    Attributes:
        step: Optimizer step within the epoch, from 0.
        micro: Micro-batch within the step, from 0.
        sample_ids: (rows,) int64, of the same length for every planned batch of a plan; padded by repeats at the end.
        num_valid: How many of ``sample_ids`` count, from the front; may be 0.
        step_samples: Valid samples of the whole optimizer step, over ranks and micro-batches.
        micro_samples: Valid samples of this micro-batch, over ranks.
    """

    step: int
    micro: int
    sample_ids: Tensor
    num_valid: int
    step_samples: int
    micro_samples: int


def split_validation(num_samples: int, validation_size: int) -> tuple[Tensor, Tensor]:
    """Cuts a validation set out of the training samples, the same one for every run and random seed.

    Args:
        num_samples: Number of samples of the training split.
        validation_size: How many of them to set aside.

    Returns:
        Sample ids to train on and sample ids to validate on, both int64 and ascending.

    Raises:
        UserError: Nothing would be left to train on.
    """
    if not 0 <= validation_size < num_samples:
        raise UserError(
            f"data.validation_size is {validation_size}, but the training set has {num_samples} samples: "
            f"it must be from 0 to {num_samples - 1}"
        )
    order = noise.permutation(noise.make_key("validation split"), num_samples)
    return order[validation_size:].sort().values, order[:validation_size].sort().values


@dataclass(frozen=True)
class IndexPlan:
    """The batches of one rank, epoch by epoch.

    Attributes:
        sample_ids: (N,) int64, the samples the plan goes over; may be empty where ``drop_last`` is off.
        batch_size: Samples of one optimizer step, over all ranks and micro-batches.
        accumulation: Micro-batches of a step.
        world_size: Number of ranks.
        rank: This rank.
        seed: Random seed of the order.
        shuffle: Whether each epoch goes over the samples in an order of its own, or in the given one.
        drop_last: Whether the last batch is left out where it is smaller than ``batch_size``.
    """

    sample_ids: Tensor
    batch_size: int
    accumulation: int = 1
    world_size: int = 1
    rank: int = 0
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True

    def __post_init__(self) -> None:
        """Refuses what cannot be planned.

        Raises:
            UserError: ``drop_last`` leaves no batch at all.
            ValueError: A size below 1, a rank outside the world, or sample ids that are not a row of int64.
        """
        if min(self.batch_size, self.accumulation, self.world_size) < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"batch_size {self.batch_size}, accumulation {self.accumulation} and world_size {self.world_size} "
                f"must be at least 1, and rank {self.rank} below world_size"
            )
        if self.sample_ids.dtype != torch.int64 or self.sample_ids.ndim != 1:
            raise ValueError(
                f"sample_ids must be (N,) int64, not {tuple(self.sample_ids.shape)} {self.sample_ids.dtype}"
            )
        if self.drop_last and self.batch_size > self.num_samples:
            raise UserError(
                f"data.batch_size is {self.batch_size}, but there are only {self.num_samples} samples and "
                f"data.drop_last leaves out the last, partial batch, so none is left: "
                f"set data.batch_size to {self.num_samples} or less, or data.drop_last=false"
            )

    @property
    def num_samples(self) -> int:
        """Number of samples the plan goes over."""
        return len(self.sample_ids)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of one epoch."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def rows(self) -> int:
        """Length of every rank slice, padding included."""
        largest = math.ceil(min(self.batch_size, self.num_samples) / self.accumulation)
        return math.ceil(largest / self.world_size)

    def epoch(self, epoch: int, first_step: int = 0) -> list[PlannedBatch]:
        """This rank's batches of one epoch, ``accumulation`` for each step, as many as every other rank's.

        Args:
            epoch: Epoch, from 0.
            first_step: Step of the epoch to begin with: a resumed run asks for the tail.
        """
        if not 0 <= first_step <= self.num_steps:
            raise ValueError(f"first_step {first_step} is outside 0..{self.num_steps}, the steps of an epoch")
        order = self._order(epoch)
        planned = []
        for step in range(first_step, self.num_steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            planned += [self._slice(batch, step, micro) for micro in range(self.accumulation)]
        return planned

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return self.sample_ids
        return self.sample_ids[noise.permutation(noise.make_key(self.seed, "order", epoch), self.num_samples)]

    def _slice(self, batch: Tensor, step: int, micro: int) -> PlannedBatch:
        # A partial batch is spread evenly over its micro-batches, so that none has next to no samples for its
        # batch statistics. Over ranks it is not: fixed offsets keep routing groups of n images on one rank.
        start, end = (number * len(batch) // self.accumulation for number in (micro, micro + 1))
        first = start + self.rank * self.rows
        last = min(end, first + self.rows)
        valid = batch[first:last]
        padding = batch[:1].expand(self.rows - len(valid))
        return PlannedBatch(step, micro, torch.cat([valid, padding]), len(valid), len(batch), end - start)
