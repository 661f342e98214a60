"""The experts of one layer: stacked MLPs, or any module.

Every local expert is called in every forward pass, with zero rows if need be, so that its gradient is zero and never
None: momentum and weight decay then act alike in every layout. An expert is known by its global id, in its initial
values and in its parameter names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from distmoe.moe.grouped import PRODUCTS, Activation, Product, Weights, fastest_product


class Experts(nn.Module, ABC):
    """The experts of one layer that live on this rank.

    Args:
        expert_ids: Global ids of the local experts, contiguous.
    """

    def __init__(self, expert_ids: range) -> None:
        super().__init__()
        self.expert_ids = expert_ids

    @abstractmethod
    def forward(self, rows_R: Tensor, rows_per_expert_L: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Outputs (R, ...) of rows grouped by expert, or (outputs, hidden states).

        Args:
            rows_R: (R, ...) the rows of expert 0, then of expert 1, ...
            rows_per_expert_L: (L,) int64 on the CPU.
        """

    @abstractmethod
    def reset_expert(self, index: int) -> None:
        """Draws the initial values of local expert ``index`` from torch's generator, which the caller has seeded."""


class MLPExperts(Experts):
    """Two-layer MLPs with stacked weights: ``y = act(x W1_e + b1_e) W2_e + b2_e``.

    Weights have a leading expert axis: ``w1`` (L, D, H), ``b1`` (L, H), ``w2`` (L, H, D), ``b2`` (L, D).

    Args:
        expert_ids: Global ids of the local experts.
        width: D.
        hidden: H.
        activation: Between the two layers.
        with_hidden: Give the hidden layer before its activation beside the output: what an attentive gate asks for.
        product: ``loop``: one matrix product an expert; ``grouped``: one for all of them, by torch's ``grouped_mm``;
            ``auto``: the faster one, see :func:`distmoe.moe.grouped.fastest_product`.

    Raises:
        ValueError: In the forward pass: counts of other experts, or that do not add up to R.
    """

    def __init__(
        self,
        expert_ids: range,
        width: int,
        hidden: int,
        activation: Activation = "gelu",
        with_hidden: bool = False,
        product: Product | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(expert_ids)
        self.with_hidden = with_hidden
        num_local = len(expert_ids)
        self.activation: Activation = activation
        self.product: Product | Literal["auto"] = product
        self.w1 = nn.Parameter(torch.empty(num_local, width, hidden))
        self.b1 = nn.Parameter(torch.empty(num_local, hidden))
        self.w2 = nn.Parameter(torch.empty(num_local, hidden, width))
        self.b2 = nn.Parameter(torch.empty(num_local, width))
        for index in range(num_local):
            self.reset_expert(index)

    def forward(self, rows_R: Tensor, rows_per_expert_L: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(R, D) to (R, D), or to that and (R, H)."""
        # Cast the stacks once: autocast would cast each expert's slice of them, forward and backward.
        weights = Weights(*(_autocast(weight) for weight in (self.w1, self.b1, self.w2, self.b2)))
        product = fastest_product(weights.w1_LDH) if self.product == "auto" else self.product
        return PRODUCTS[product](
            _autocast(rows_R), rows_per_expert_L.tolist(), weights, self.activation, self.with_hidden
        )

    @torch.no_grad()
    def reset_expert(self, index: int) -> None:
        """LeCun-normal weights (variance 1 / fan-in), zero biases; see :class:`Experts`."""
        for weight in (self.w1[index], self.w2[index]):
            nn.init.normal_(weight, std=weight.shape[0] ** -0.5)
        self.b1[index].zero_()
        self.b2[index].zero_()


class ModuleExperts(Experts):
    """Any module as an expert; parameter names carry the global id: ``modules_by_id.3.conv.weight``.

    Args:
        expert_ids: Global ids of the local experts.
        factory: Makes one expert, a module from (rows, ...) to one tensor or (output, hidden). Its submodules have
            ``reset_parameters`` where they have parameters, as torch's own do.
    """

    def __init__(self, expert_ids: range, factory: Callable[[], nn.Module]) -> None:
        super().__init__(expert_ids)
        self.modules_by_id = nn.ModuleDict({str(expert_id): factory() for expert_id in expert_ids})

    def forward(self, rows_R: Tensor, rows_per_expert_L: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Each expert on its rows."""
        pieces = rows_R.split(rows_per_expert_L.tolist())
        outputs = [expert(piece) for expert, piece in zip(self.modules_by_id.values(), pieces, strict=True)]
        if isinstance(outputs[0], tuple):
            return torch.cat([output[0] for output in outputs]), torch.cat([output[1] for output in outputs])
        return torch.cat(outputs)

    def reset_expert(self, index: int) -> None:
        """See :class:`Experts`."""
        for module in list(self.modules_by_id.values())[index].modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()


def _autocast(x: Tensor) -> Tensor:
    """In the type that matrix products run in here; autocast leaves float64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
