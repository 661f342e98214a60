"""Attentive gate: asks every expert first, then weighs them by how their hidden states answer the gate's query."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from distmoe.contracts import Context
from distmoe.moe.gates.base import Gate, every_expert
from distmoe.moe.gates.token_choice import largest
from distmoe.moe.routing import Routing, at_least_float32


class AttentiveGate(Gate):
    """``p(e|x) = softmax_e(Q(x) . K_e(x) / sqrt(h))`` with ``Q = G(x) W_q`` and ``K_e = H_e(x) W_k``.

    G is the gate's network, H_e the hidden state of expert e. All experts run on all tokens: the gate learns what each
    expert makes of an input, at the cost of a dense mixture.

    Args:
        network: Maps tokens to (T, h).
        num_experts: E.
        width: h, width of query and key.
        hidden: Width of the experts' hidden states; the source has it equal to h.
        k: In evaluation, the k best answers only, renormalised; None: all.

    Raises:
        ValueError: k out of range, or set in training; hidden states of another width.

    Source: Krishnamurthy, Watkins and Gaertner 2023 (arXiv:2302.14703), as in the authors' code.
    """

    needs_hidden = True

    def __init__(
        self, network: nn.Module, num_experts: int, width: int = 32, hidden: int | None = None, k: int | None = None
    ) -> None:
        super().__init__(network, num_experts)
        if k is not None and not 1 <= k <= num_experts:
            raise ValueError(f"k ({k}) must be between 1 and the number of experts ({num_experts})")
        self.width = width
        self.k = k
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width if hidden is None else hidden, width, bias=False)

    @property
    def num_outputs(self) -> int:
        """The width of query and key."""
        return self.width

    def route(self, x_T: Tensor, context: Context) -> Routing:
        """(T, ...) tokens to T x E assignments, with queries in place of weights."""
        if context.training and self.k is not None:
            raise ValueError("an attentive gate trains all its experts: k is for evaluation")
        hidden_Th = self.logits(x_T)
        with torch.autocast(x_T.device.type, enabled=False):
            query_Th: Tensor = self.query(hidden_Th)
        row_ids_A, expert_ids_A = every_expert(len(x_T), self.num_experts, x_T.device)
        return Routing(
            num_rows=len(x_T),
            num_experts=self.num_experts,
            row_ids_A=row_ids_A,
            expert_ids_A=expert_ids_A,
            weights_A=None,
            logits_TE=None,
            probs_TE=None,
            rows_per_sample=context.rows_per_sample,
            tokens_T=self.kept_tokens(x_T, context),
            queries_T=query_Th,
        )

    def weigh(self, routing: Routing, hidden_A: Tensor) -> Routing:
        """The routing with logits, probabilities and weights, from the hidden states (A, hidden)."""
        query_Th = routing.queries_T
        assert query_Th is not None, "this routing has been weighed"
        hidden_A = at_least_float32(hidden_A)
        if hidden_A.shape[1:] != (self.key.in_features,):
            raise ValueError(f"hidden states of shape {tuple(hidden_A.shape)}, not (A, {self.key.in_features})")
        with torch.autocast(hidden_A.device.type, enabled=False):
            keys_TEh = self.key(hidden_A).unflatten(0, (routing.num_rows, self.num_experts))
            logits_TE = torch.einsum("th,teh->te", query_Th, keys_TEh) / math.sqrt(self.width)
        probs_TE = logits_TE.softmax(dim=-1)
        weights_TE = probs_TE
        if self.k is not None:
            kept_TE = torch.zeros_like(probs_TE).scatter(1, largest(probs_TE.detach(), self.k), 1.0)
            weights_TE = probs_TE * kept_TE
            weights_TE = weights_TE / weights_TE.sum(dim=-1, keepdim=True)
        return replace(
            routing,
            weights_A=weights_TE.flatten(),
            logits_TE=logits_TE,
            probs_TE=probs_TE,
            softmax_weights=self.k is None,
            queries_T=None,
        )
