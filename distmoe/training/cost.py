"""What a model costs: parameters, active parameters, multiply-add work of one image."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distmoe.contracts import Context, DataSpec
from distmoe.models.protocol import Model
from distmoe.moe.experts import Experts
from distmoe.moe.gates.base import Gate
from distmoe.moe.sums import Reducer, no_reduction


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


def measure_cost(model: nn.Module, spec: DataSpec, num_images: int = 8, reducer: Reducer = no_reduction) -> Cost:
    """Counts parameters, and the work of a forward pass over random images by torch's counter of dispatched operations.

    The same numbers whether all experts are here or spread over ranks: rank 0 feeds the images, the others none, and
    each counts what its experts do for them. Collective over the ranks of ``reducer``.

    Args:
        model: On any device, holding this rank's experts; its mode is left as it was.
        spec: Shape of an image.
        num_images: Averaged over, as k experts of E may be of different size in general.
        reducer: Adds over all ranks; the default is for a model that is whole.

    Raises:
        ValueError: A gate and its experts are not children of the same module.
    """
    device = next(model.parameters()).device
    images, context = random_images(spec, num_images if reducer.rank == 0 else 0, device)
    was_training = model.training
    model.eval()
    called: Model = model
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        called(images, context)
        flops = reducer({"flops": torch.tensor(counter.get_total_flops(), device=device)})["flops"]
    model.train(was_training)
    total, inactive = sum(parameter.numel() for parameter in model.parameters()), 0.0
    for _, gate, experts in mixtures_of(model):
        here = sum(parameter.numel() for parameter in experts.parameters())
        everywhere = here * gate.num_experts // len(experts.expert_ids)
        total += everywhere - here
        inactive += everywhere * (1.0 - gate.experts_per_row / gate.num_experts)
    return Cost(total, total - round(inactive), int(flops) // num_images)


def random_images(spec: DataSpec, num_images: int, device: torch.device) -> tuple[Tensor, Context]:
    """(num_images, ...) uint8 that are the same each time, and the context of an evaluation."""
    images = torch.randint(0, 256, (num_images, *spec.input_shape), generator=torch.Generator().manual_seed(0))
    context = Context(0, 0, torch.arange(num_images, device=device), training=False)
    return images.to(device, torch.uint8), context


def mixtures_of(model: nn.Module) -> Iterator[tuple[str, Gate, Experts]]:
    """Path, gate and experts of each module that has them as its children.

    Raises:
        ValueError: A gate without experts beside it, or the other way round.
    """
    for path, module in model.named_modules():
        gates = [child for child in module.children() if isinstance(child, Gate)]
        groups = [child for child in module.children() if isinstance(child, Experts)]
        if len(gates) != len(groups):
            raise ValueError(
                f"{type(module).__name__} has {len(gates)} gates and {len(groups)} experts among its children: a gate "
                "stands beside the experts it serves, or what is active cannot be told"
            )
        for gate, experts in zip(gates, groups, strict=True):
            yield path, gate, experts
