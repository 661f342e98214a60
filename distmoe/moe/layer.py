"""The MoE layer: gate -> dispatch -> experts -> combine."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.dispatch import Dispatcher, LocalDispatcher
from distmoe.moe.experts import Experts
from distmoe.moe.gates.base import Gate
from distmoe.moe.routing import Routing


class MoELayer(nn.Module):
    """A sparse or dense mixture of experts over tokens.

    ``y_t = sum over assignments (t, e) of weight * expert_e(x_t)``. Leading axes of the input are flattened into rows;
    the first one counts samples, so for (B, H, W, D) an image has H x W tokens.

    Args:
        gate: Any gate of :mod:`distmoe.moe.gates`.
        experts: The experts on this rank.
        dispatcher: How tokens reach experts; the default keeps them on this device.
        token_dims: Trailing axes that make up one token: 1 for feature vectors, 3 for whole images.

    Example:
        >>> gate = TopKGate(nn.Linear(64, 8, bias=False), num_experts=8, k=2)
        >>> layer = MoELayer(gate, MLPExperts(range(8), width=64, hidden=256))
        >>> y, routing = layer(torch.randn(4, 49, 64))  # y is (4, 49, 64)
    """

    def __init__(self, gate: Gate, experts: Experts, dispatcher: Dispatcher | None = None, token_dims: int = 1) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.dispatcher = LocalDispatcher(gate.num_experts) if dispatcher is None else dispatcher
        self.token_dims = token_dims

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Routing]:
        """(B, ..., token) to the output, its leading axes and dtype as the input's, and the routing.

        Args:
            x: Tokens; the first axis is the sample.
            context: Keys of the noise. Without one (a layer inside somebody's own model), noise is keyed by a draw
                from torch's generator.
        """
        leading = x.shape[: x.dim() - self.token_dims]
        x_T = x.flatten(0, len(leading) - 1)
        rows_per_sample = leading[1:].numel()
        context = self._own_context(x) if context is None else context
        context = replace(context, rows_per_sample=rows_per_sample)

        routing = self.gate.route(x_T, context)
        rows_R, rows_per_expert_L, plan = self.dispatcher.dispatch(x_T, routing.row_ids_A, routing.expert_ids_A)
        result = self.experts(rows_R, rows_per_expert_L)
        output_R = result[0] if isinstance(result, tuple) else result
        if routing.weights_A is None:
            routing = self.gate.weigh(routing, self.dispatcher.gather(result, plan))
        assert routing.weights_A is not None, "weigh() must give weights"
        y_T = self.dispatcher.combine(output_R, plan, routing.weights_A)
        return y_T.to(x.dtype).unflatten(0, leading), replace(routing, rows_per_sample=rows_per_sample)

    def _own_context(self, x: Tensor) -> Context:
        seed = int(torch.randint(2**31, ())) if self.training else 0
        return Context(seed, 0, torch.arange(len(x), device=x.device), self.training)
