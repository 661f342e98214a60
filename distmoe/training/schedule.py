"""Learning rate as a function of the optimizer step, so that a position in the run is one number."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distmoe.config import ScheduleSection


def learning_rate_factor(section: ScheduleSection, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at ``step`` (from 0) of ``total_steps``.

    The warm-up rises linearly over ``round(warmup_share * total_steps)`` steps, the first of them at 1 / that many.
    Afterwards the decay goes from 1 towards ``final_share``, which the step after the last one would have.
    """
    warmup_steps = round(section.warmup_share * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if section.name == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    remaining = 1.0 - progress if section.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.final_share + (1.0 - section.final_share) * remaining


def build_schedule(section: ScheduleSection, optimizer: Optimizer, total_steps: int, steps_done: int = 0) -> LambdaLR:
    """Torch's scheduler over :func:`learning_rate_factor`, with ``steps_done`` steps behind it."""
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, lambda step: learning_rate_factor(section, step, total_steps), last_epoch=steps_done - 1)
