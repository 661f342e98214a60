"""The gradient rule, written out: what every engine must do between backward and update.

Each rank has back-propagated ``world_size * (sum of its sample losses) / N``. Dense parameters: the mean over all ranks
is the gradient of the global mean. Expert parameters: the backward of the all-to-all has already summed over the ranks
that share the experts, so: the sum over the replicas, divided by the world. Use it in a loop of your own::

    loss.backward()
    reduce_gradients(model, communicators)
    clip_gradients(model, communicators, max_norm=1.0)
    optimizer.step()
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distmoe.parallel.collectives import Communicators
from distmoe.parallel.shards import expert_parameters


@torch.no_grad()
def reduce_gradients(
    model: nn.Module, communicators: Communicators, experts: Iterable[nn.Parameter] | None = None
) -> None:
    """Turns each rank's gradients into those of the global mean. Collective: once for each group and dtype.

    A parameter without a gradient gets zeros: on another rank it may have one.

    Args:
        model: Holds this rank's experts.
        communicators: Of the mesh.
        experts: Parameters of experts that are no :class:`distmoe.moe.experts.Experts`; None: of those.
    """
    dense, of_experts = _split(model, experts)
    for parameters, group in ((dense, communicators.world), (of_experts, communicators.expert_replicas)):
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            by_dtype.setdefault(parameter.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            if group.size > 1:
                flat = group.sum_(torch.cat([gradient.reshape(-1) for gradient in gradients]))
                for gradient, part in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
                    gradient.copy_(part.view_as(gradient))
            for gradient in gradients:
                gradient.div_(communicators.mesh.world_size)


@torch.no_grad()
def global_norm(model: nn.Module, communicators: Communicators) -> Tensor:
    """The norm of the whole model's gradient, every expert counted once. Collective, after :func:`reduce_gradients`."""
    dense, experts = _split(model)
    return (_squares(dense) + communicators.expert_parallel.sum_(_squares(experts))).sqrt()


@torch.no_grad()
def clip_gradients(model: nn.Module, communicators: Communicators, max_norm: float | None) -> Tensor:
    """Scales the gradients down where their global norm is above ``max_norm``. Collective.

    Returns:
        The norm before.
    """
    norm = global_norm(model, communicators)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def _split(
    model: nn.Module, experts: Iterable[nn.Parameter] | None = None
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters of the dense part and of the experts."""
    of_experts = set(expert_parameters(model) if experts is None else experts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [one for one in trained if one not in of_experts], [one for one in trained if one in of_experts]


def _squares(parameters: list[nn.Parameter]) -> Tensor:
    """Sum of squared gradients in float64: order and number of the parts do not show."""
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device if parameters else "cpu")
    for parameter in parameters:
        if parameter.grad is not None:
            total += parameter.grad.double().square().sum()
    return total
