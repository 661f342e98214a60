"""What a mixture is trained for: the likelihood of its class probabilities, or Jacobs' error functions.

An objective is a function of the errors that a token's experts make one by one, ``errors_TK``, and of the logarithms of
their weights (K assignments a token, in the routing's order); only the cooperative one needs the outputs themselves.
The errors are squared distances for real-valued targets (:func:`squared_errors`), or any other, cross-entropies say.
For mixtures of class probabilities :class:`ClassObjective` puts both together.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distmoe import noise
from distmoe.contracts import Context
from distmoe.moe.gates.base import token_counters
from distmoe.moe.routing import Routing, at_least_float32

ErrorName = Literal["cooperative", "competitive", "gaussian_mixture", "root_likelihood", "sampled"]


def log_weights(routing: Routing) -> Tensor:
    """(T, K) log combine weights of each row's K assignments, which must sum to 1 (a mixture).

    Exact for softmax gates, however small a weight; otherwise the logarithm of the weights.

    Raises:
        ValueError: The weights are not one a row and expert, or rows have different numbers of experts.
    """
    if routing.weights_A is None or routing.weights_A.dim() != 1 or routing.mixing is not None:
        raise ValueError("a mixture needs a gate that gives each token one weight an expert")
    per_row = routing.assignments_per_row
    if routing.softmax_weights and routing.logits_TE is not None:
        cells_A = routing.row_ids_A * routing.num_experts + routing.expert_ids_A
        chosen_TK = routing.logits_TE.flatten().index_select(0, cells_A).view(routing.num_rows, per_row)
        return chosen_TK.log_softmax(-1)
    tiny = torch.finfo(routing.weights_A.dtype).tiny
    return routing.weights_A.clamp(min=tiny).log().view(routing.num_rows, per_row)


def mixture_log_probs(log_probs_AC: Tensor, routing: Routing) -> Tensor:
    """(T, C) log probabilities of a mixture of class distributions: ``log sum_e g_e(x) p_e(c|x)``.

    Computed as log-sum-exp of log gate + log probability, so that a confident gate does not underflow.

    Args:
        log_probs_AC: Log class probabilities of each assignment, in assignment order, row by row.
        routing: Of a gate whose weights sum to 1 and that gives each row equally many experts.

    Source: Jacobs et al. 1991, the likelihood of the mixture; here with class probabilities instead of Gaussians.
    """
    log_weights_TK = log_weights(routing)
    log_probs_TKC = at_least_float32(log_probs_AC).view(*log_weights_TK.shape, log_probs_AC.shape[-1])
    return torch.logsumexp(log_weights_TK.unsqueeze(-1) + log_probs_TKC, dim=1)


def negative_log_likelihood(log_probs_TC: Tensor, labels_T: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(T,) cross-entropy of log probabilities with the labels, ``label_smoothing`` of each target spread evenly."""
    picked_T = -log_probs_TC.gather(1, labels_T.unsqueeze(1)).squeeze(1)
    if label_smoothing == 0.0:
        return picked_T
    return (1.0 - label_smoothing) * picked_T - label_smoothing * log_probs_TC.mean(1)


def classification_losses(logits_TC: Tensor, labels_T: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """(T,) softmax cross-entropy in float32 or wider."""
    return F.cross_entropy(at_least_float32(logits_TC), labels_T, reduction="none", label_smoothing=label_smoothing)


def squared_errors(outputs_A: Tensor, routing: Routing, targets_T: Tensor) -> Tensor:
    """(T, K) ``|d - o|^2`` of each assignment.

    Args:
        outputs_A: (A, ...) real-valued outputs in assignment order, row by row.
        routing: Of a gate that gives each row equally many experts.
        targets_T: (T, ...) d.
    """
    outputs_TKD = at_least_float32(outputs_A).flatten(1).unflatten(0, (routing.num_rows, routing.assignments_per_row))
    return (targets_T.flatten(1).unsqueeze(1) - outputs_TKD).square().sum(-1)


def cooperative_error(outputs_A: Tensor, routing: Routing, targets_T: Tensor) -> Tensor:
    """(T,) ``|d - sum_e g_e o_e|^2``: experts together make up for each other's residuals.

    Args:
        outputs_A: As for :func:`squared_errors`.
        routing: Of a mixture, see :func:`log_weights`.
        targets_T: As there.

    Source: Jacobs et al. 1991, eq. 1.
    """
    weights_TK = log_weights(routing).exp()
    outputs_TKD = at_least_float32(outputs_A).flatten(1).unflatten(0, weights_TK.shape)
    return (targets_T.flatten(1) - (weights_TK.unsqueeze(-1) * outputs_TKD).sum(1)).square().sum(-1)


def competitive_error(errors_TK: Tensor, log_weights_TK: Tensor) -> Tensor:
    """(T,) ``sum_e g_e error_e``: the expected error of one expert drawn by the gate.

    Source: Jacobs et al. 1991, eq. 2.
    """
    return (log_weights_TK.exp() * errors_TK).sum(-1)


def gaussian_mixture_error(errors_TK: Tensor, log_weights_TK: Tensor) -> Tensor:
    """(T,) ``-log sum_e g_e exp(-error_e / 2)``: an expert learns in proportion to its posterior ``h_e``.

    With squared distances this is the negative log likelihood of a mixture of Gaussians of variance 1, less a constant;
    with cross-entropies ``exp(-error / 2)`` is the square root of the probability of the class.

    Source: Jacobs et al. 1991, eq. 3; with cross-entropies the "stochastic model" in the code of Krishnamurthy et al.
    2023.
    """
    return -torch.logsumexp(log_weights_TK - 0.5 * errors_TK, dim=-1)


def sampled_error(errors_TK: Tensor, log_weights_TK: Tensor, drawn_T: Tensor) -> Tensor:
    """(T,) the error of the one expert that was drawn for each token.

    Its expert is trained on it as it is. The gate gets the score function's gradient, ``(error_drawn - b) * d log
    g_drawn``, with the gate's own expectation ``b = sum_e g_e error_e`` for a baseline: it is known, as all experts
    have run, depends neither on the draw nor on other tokens, and so leaves the mean over draws as it is, which
    is exactly the gradient of :func:`competitive_error`.

    Args:
        errors_TK: Of each assignment.
        log_weights_TK: See :func:`log_weights`.
        drawn_T: (T,) int64 which of a token's K assignments, see :func:`draw_assignments`.

    Source: Jacobs et al. 1991, the stochastic selector behind eq. 2; gradient: Williams 1992 (REINFORCE).
    """
    drawn_T1 = drawn_T.unsqueeze(1)
    error_T = errors_TK.gather(1, drawn_T1).squeeze(1)
    log_weight_T = log_weights_TK.gather(1, drawn_T1).squeeze(1)
    advantage_T = error_T.detach() - competitive_error(errors_TK, log_weights_TK).detach()
    return error_T + advantage_T * (log_weight_T - log_weight_T.detach())  # the second term has the value 0


@torch.no_grad()
def draw_assignments(log_weights_TK: Tensor, context: Context) -> Tensor:
    """(T,) int64: one of each token's K assignments, drawn with their weights for probabilities.

    Keyed by seed, step, path, sample and position (:mod:`distmoe.noise`): the same draw in every layout.
    """
    key = noise.make_key("sampled expert", context.seed, context.step, context.path)
    uniform_T = noise.uniform(key, *token_counters(context, log_weights_TK.device)).double()
    # In float64 u * total stays below the total, so an expert of weight 0 is never drawn, not even as the last.
    reached_TK = log_weights_TK.double().exp().cumsum(-1)
    return (reached_TK <= uniform_T.unsqueeze(1) * reached_TK[:, -1:]).sum(-1)


@dataclass(frozen=True)
class ClassObjective:
    """What a mixture of class probabilities is trained for instead of its likelihood, of one forward pass.

    With one-hot targets t (label smoothing spread over them), expert e's class probabilities ``p_e`` and its own
    cross-entropy ``CE_e``:

    * ``cooperative``: ``|t - sum_e g_e p_e|^2``;
    * ``competitive``: ``sum_e g_e |t - p_e|^2``;
    * ``gaussian_mixture``: ``-log sum_e g_e exp(-|t - p_e|^2 / 2)``;
    * ``root_likelihood``: ``-log sum_e g_e exp(-CE_e / 2)``, in which an expert's chance of the class enters by its
      square root;
    * ``sampled``: CE_e of one expert drawn by the gate. The others run all the same, for the mixture that is reported.

    The sources of the last two predict with the most probable expert alone: evaluate with ``moe.gate.k=1``.

    Attributes:
        name: Which of them.
        log_probs_AC: Log class probabilities of each assignment, in assignment order.
        routing: Of a mixture, see :func:`log_weights`.
        context: Keys of the draw.
    """

    name: ErrorName
    log_probs_AC: Tensor
    routing: Routing
    context: Context

    def __call__(self, labels_T: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """(T,) float32 or wider, for labels (T,) int64."""
        routing, log_probs_AC = self.routing, at_least_float32(self.log_probs_AC)
        log_weights_TK = log_weights(routing)
        if self.name in ("root_likelihood", "sampled"):
            labels_A = labels_T.repeat_interleave(routing.assignments_per_row)
            errors_TK = negative_log_likelihood(log_probs_AC, labels_A, label_smoothing).view_as(log_weights_TK)
            if self.name == "root_likelihood":
                return gaussian_mixture_error(errors_TK, log_weights_TK)
            return sampled_error(errors_TK, log_weights_TK, draw_assignments(log_weights_TK, self.context))
        targets_TC = smoothed_targets(labels_T, log_probs_AC.shape[-1], label_smoothing, log_probs_AC.dtype)
        if self.name == "cooperative":
            return cooperative_error(log_probs_AC.exp(), routing, targets_TC)
        errors_TK = squared_errors(log_probs_AC.exp(), routing, targets_TC)
        error = competitive_error if self.name == "competitive" else gaussian_mixture_error
        return error(errors_TK, log_weights_TK)


def smoothed_targets(
    labels_T: Tensor, num_classes: int, label_smoothing: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(T, C): one-hot, ``label_smoothing`` of each target spread evenly over all classes."""
    return F.one_hot(labels_T, num_classes).to(dtype) * (1.0 - label_smoothing) + label_smoothing / num_classes
