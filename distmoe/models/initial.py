"""Initial weights keyed by name: the same for every placement of the experts and every order of construction."""

import torch
from torch import nn, random

from distmoe.moe.experts import Experts
from distmoe.noise import make_key


def initialize_parameters(model: nn.Module, seed: int) -> None:
    """Draws all parameters anew, those of a module keyed by (seed, its name), of an expert by (seed, name, global id).

    Modules say how they start in ``reset_parameters``, experts in ``reset_expert``; torch's own generator is used
    inside, seeded for each, and left as it was.

    Raises:
        ValueError: A parameter belongs to a module that says neither: its values would depend on how it was made.
    """
    inside_experts: set[nn.Module] = set()
    left_over = {parameter: name for name, parameter in model.named_parameters()}
    with random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                inside_experts.update(module.modules())
                owned = module.parameters()
                for index, expert_id in enumerate(module.expert_ids):
                    torch.default_generator.manual_seed(_seed(seed, name, expert_id))
                    module.reset_expert(index)
            elif module not in inside_experts and callable(reset := getattr(module, "reset_parameters", None)):
                torch.default_generator.manual_seed(_seed(seed, name))
                reset()
                owned = module.parameters(recurse=False)
            else:
                continue
            for parameter in owned:
                left_over.pop(parameter, None)
    if left_over:
        raise ValueError(f"give the module of {min(left_over.values())} a reset_parameters() that draws its values")


def _seed(*parts: int | str) -> int:
    return make_key("initial", *parts) % 2**63
