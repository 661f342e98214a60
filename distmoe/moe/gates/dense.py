"""Dense softmax gate: every expert sees every token."""

import torch
from torch import Tensor

from distmoe.contracts import Context
from distmoe.moe.gates.base import Gate
from distmoe.moe.routing import Routing


class DenseGate(Gate):
    """``g_e(x) = softmax_e(logits(x))``, all experts assigned to all tokens, row by row.

    Source: Jacobs, Jordan, Nowlan and Hinton 1991, "Adaptive Mixtures of Local Experts".
    """

    def route(self, x_T: Tensor, context: Context) -> Routing:
        """(T, ...) tokens to T x E assignments, row-major."""
        logits_TE = self.logits(x_T)
        probs_TE = logits_TE.softmax(dim=-1)
        num_rows, num_experts = logits_TE.shape
        rows = torch.arange(num_rows, device=x_T.device)
        experts = torch.arange(num_experts, device=x_T.device)
        return Routing(
            num_rows=num_rows,
            num_experts=num_experts,
            row_ids_A=rows.repeat_interleave(num_experts),
            expert_ids_A=experts.repeat(num_rows),
            weights_A=probs_TE.flatten(),
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            rows_per_sample=context.rows_per_sample,
        )
