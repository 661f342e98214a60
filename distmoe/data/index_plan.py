"""Which sample goes to which rank at which step."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PlannedBatch:
    """One rank's share of one micro-batch.

    Attributes:
        step: Optimizer step within the epoch, from 0.
        micro: Micro-batch within the step, from 0.
        sample_ids: (rows,) int64, of the same length for every planned batch of a plan; padded by repeats at the end.
        num_valid: How many of ``sample_ids`` count, from the front; may be 0.
        step_samples: Valid samples of the whole optimizer step, over ranks and micro-batches.
    """

    step: int
    micro: int
    sample_ids: Tensor
    num_valid: int
    step_samples: int
