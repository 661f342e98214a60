"""The optimizers: torch's own, with weight decay on matrices and filters only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from distmoe.config import AnyOptimizer
from distmoe.moe.experts import Experts

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
}


def build_optimizer(section: AnyOptimizer, model: nn.Module) -> Optimizer:
    """The optimizer that ``optim`` describes, over two groups of parameters: with and without weight decay."""
    settings: dict[str, Any] = section.model_dump(exclude={"name", "weight_decay"})
    decayed, rest = split_by_decay(model)
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return OPTIMIZERS[section.name]([group for group in groups if group["params"]], **settings)


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with two or more axes, and vectors. The expert axis of stacked weights does not count as one."""
    stacked = {
        parameter
        for module in model.modules()
        if isinstance(module, Experts)
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        (decayed if parameter.dim() - (parameter in stacked) >= 2 else rest).append(parameter)
    return decayed, rest
