"""What a model costs: parameters, active parameters, multiply-add work of one image."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distmoe.contracts import Context, DataSpec
from distmoe.models.protocol import Model
from distmoe.moe.experts import Experts
from distmoe.moe.gates.base import Gate


@dataclass(frozen=True)
class Cost:
    """Of one model.

    Attributes:
        num_parameters: All of them, over all ranks.
        num_active_parameters: Those that work on one token: of the experts' parameters the share k / E of the experts
            that a token reaches (all of them for dense gates and Soft MoE, an average for expert choice), and all
            others, a shared expert's too.
        active_flops_per_image: Floating-point operations of matrix products and convolutions in one forward pass of
            one image (two for a multiply-add), as executed: only the experts an image is sent to.
    """

    num_parameters: int
    num_active_parameters: int
    active_flops_per_image: int


def measure_cost(model: nn.Module, spec: DataSpec, num_images: int = 8) -> Cost:
    """Counts parameters, and the work of a forward pass over random images by torch's counter of dispatched operations.

    Args:
        model: On any device, holding all experts; its mode is left as it was.
        spec: Shape of an image.
        num_images: Averaged over, as k experts of E may be of different size in general.

    Raises:
        ValueError: A gate and its experts are not children of the same module.
    """
    device = next(model.parameters()).device
    images = torch.randint(0, 256, (num_images, *spec.input_shape), generator=torch.Generator().manual_seed(0))
    context = Context(0, 0, torch.arange(num_images, device=device), training=False)
    was_training = model.training
    model.eval()
    called: Model = model
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        called(images.to(device, torch.uint8), context)
    model.train(was_training)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Cost(total, total - _inactive_parameters(model), counter.get_total_flops() // num_images)


def _inactive_parameters(model: nn.Module) -> int:
    """Parameters of experts that one token does not see; a gate and its experts are children of one module."""
    inactive = 0.0
    for module in model.modules():
        gates = [child for child in module.children() if isinstance(child, Gate)]
        experts = [child for child in module.children() if isinstance(child, Experts)]
        if len(gates) != len(experts):
            raise ValueError(
                f"{type(module).__name__} has {len(gates)} gates and {len(experts)} experts among its children: a gate "
                "stands beside the experts it serves, or what is active cannot be told"
            )
        for gate, group in zip(gates, experts, strict=True):
            count = sum(parameter.numel() for parameter in group.parameters())
            inactive += count * (1.0 - gate.experts_per_row / gate.num_experts)
    return round(inactive)
