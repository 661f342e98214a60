"""The MoE layer: gate -> dispatch -> experts -> combine."""

from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.dispatch import Placement
from distmoe.moe.experts import Experts
from distmoe.moe.gates.base import Gate
from distmoe.moe.routing import Routing


class MoELayer(nn.Module):
    """A sparse or dense mixture of experts over tokens.

    ``y_t = shared(x_t) + sum over assignments (t, e) of weight * expert_e(x_t)``; with a gate that mixes tokens into
    slots, the experts work on slots instead. Leading axes of the input are flattened into rows; the first one counts
    samples, so for (B, H, W, D) an image has H x W tokens.

    Args:
        gate: Any gate of :mod:`distmoe.moe.gates`.
        experts: The experts on this rank.
        placement: Which experts are here, and how tokens reach all of them; None: all of them are here.
        token_dims: Trailing axes that make up one token: 1 for feature vectors, 3 for whole images.
        shared: An expert that works on every token beside the chosen ones (DeepSeek-AI 2024, arXiv:2401.06066), a
            module from (T, ...) to what the experts give; or None.

    Raises:
        ValueError: Other experts than those of the placement. In the forward pass: an attentive gate with experts that
            show no hidden state; an input without an axis before the token's; a context of other samples.

    Example:
        >>> gate = TopKGate(nn.Linear(64, 8, bias=False), num_experts=8, k=2)
        >>> layer = MoELayer(gate, MLPExperts(range(8), width=64, hidden=256))
        >>> y, routing = layer(torch.randn(4, 49, 64))  # y is (4, 49, 64)
    """

    def __init__(
        self,
        gate: Gate,
        experts: Experts,
        placement: Placement | None = None,
        token_dims: int = 1,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__()
        placement = placement or Placement()
        here = placement.local_experts(gate.num_experts)
        if list(experts.expert_ids) != list(here):
            raise ValueError(
                f"experts {list(experts.expert_ids)} for a gate that chooses among {gate.num_experts}, of which "
                f"{list(here)} must be here"
            )
        self.gate = gate
        self.experts = experts
        self.dispatcher = placement.dispatcher(gate.num_experts)
        gate.reducer = placement.reducer
        self.token_dims = token_dims
        self.shared = shared

    def forward(self, x: Tensor, context: Context | None = None) -> tuple[Tensor, Routing]:
        """(B, ..., token) to the output, its leading axes and dtype as the input's, and the routing.

        Args:
            x: Tokens; the first axis is the sample.
            context: Keys of the noise. Without one (a layer inside somebody's own model), a noisy gate's is keyed by a
                draw from torch's generator, and samples are known by their place in the batch.
        """
        leading = x.shape[: max(x.dim() - self.token_dims, 0)]
        if not leading:
            raise ValueError(f"an input of shape {list(x.shape)} has no axis before the {self.token_dims} of a token")
        x_T = x.flatten(0, len(leading) - 1)
        rows_per_sample = leading[1:].numel()
        context = self._own_context(x) if context is None else context
        if len(context.sample_ids) != len(x):
            raise ValueError(f"the context is of {len(context.sample_ids)} samples, the input has {len(x)}")
        context = replace(context, rows_per_sample=rows_per_sample)

        routing = self.gate.route(x_T, context)
        rows = x_T if routing.mixing is None else routing.mixing.to_slots(x_T)
        shared = None if self.shared is None else cache(partial(self.shared, x_T))  # computed when first asked for
        rows_R, rows_per_expert_L, plan = self.dispatcher.dispatch(
            rows, routing.row_ids_A, routing.expert_ids_A, shared
        )
        result = self.experts(rows_R, rows_per_expert_L)
        output_R = result[0] if isinstance(result, tuple) else result
        if self.gate.needs_hidden:
            if not isinstance(result, tuple):
                raise ValueError("an attentive gate needs experts that give (output, hidden state)")
            routing = self.gate.weigh(routing, self.dispatcher.gather(result[1], plan))
        assert routing.weights_A is not None, "weigh() must give weights"
        y_T = self.dispatcher.combine(output_R, plan, routing.weights_A)
        if routing.mixing is not None:
            y_T = routing.mixing.from_slots(y_T)
        if shared is not None:
            y_T = y_T + shared()
        return y_T.to(x.dtype).unflatten(0, leading), replace(routing, rows_per_sample=rows_per_sample)

    def _own_context(self, x: Tensor) -> Context:
        seed = int(torch.randint(2**31, ())) if self.training and self.gate.noisy else 0
        return Context(seed, 0, torch.arange(len(x), device=x.device), self.training)
