"""Initial weights keyed by name: the same for every placement of the experts and every order of construction."""

from torch import nn, random

from distmoe.moe.experts import Experts
from distmoe.noise import make_key


def initialize_parameters(model: nn.Module, seed: int) -> None:
    """Draws all parameters anew, those of a module keyed by (seed, its name), of an expert by (seed, name, global id).

    Modules say how they start in ``reset_parameters``, experts in ``reset_expert``; torch's own generator is used
    inside, seeded for each, and left as it was.
    """
    inside_experts: set[nn.Module] = set()
    with random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                inside_experts.update(module.modules())
                for index, expert_id in enumerate(module.expert_ids):
                    random.manual_seed(_seed(seed, name, expert_id))
                    module.reset_expert(index)
            elif module not in inside_experts and callable(reset := getattr(module, "reset_parameters", None)):
                random.manual_seed(_seed(seed, name))
                reset()


def _seed(*parts: int | str) -> int:
    return make_key("initial", *parts) % 2**63
