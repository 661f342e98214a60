"""Sample similarity L_s: how far apart are the samples that one expert gets, and those that two experts get.

With ``s_ee' = sum over tokens t, t' of p(e|t) p(e'|t') d(t, t')``, one term is made of ``sum_e s_ee`` (within) and one
of ``sum_{e != e'} s_ee'`` (between). Neither way to compute them holds an N x N matrix: squared distances come from
sums over tokens, plain distances from the gathered batch, some rows at a time. Both work in float64, so that the
differences of large sums keep 10 digits and more without centring, and give every rank the same numbers.

Letters: N tokens; P points, among which distances are taken (samples or tokens), D their width; C distributions over E
experts that a token has (1 but for per-filter gates).

Source: Krishnamurthy, Watkins and Gaertner 2023 (arXiv:2302.14703).
"""

from typing import Literal

import torch
from torch import Tensor

from distmoe.moe.routing import Routing
from distmoe.moe.sums import Reducer, Sums

Form = Literal["paper", "authors"]
Distance = Literal["pixels", "tokens"]
_CHUNK = 2**22  # distances in memory at once: 32 MiB


def similarity_terms(
    routing: Routing, inputs_B: Tensor | None, reducer: Reducer, form: Form = "paper", distance: Distance = "pixels"
) -> tuple[Tensor, Tensor]:
    """The two terms of L_s, both to be minimised. Collective.

    ``(1/E) sum_e s_ee`` and ``-1/(E^2 - E) sum_{e != e'} s_ee'``, where

    * in the ``paper``, d is the squared Euclidean distance, and both are divided by the N^2 - N pairs of two tokens;
    * in the code of its ``authors``, d is the Euclidean distance divided by the largest one of the batch, the second
      term is divided by N^2, and the first one is not: a weight on it acts N^2 times as strongly as on a mean.

    Args:
        routing: Of this rank's tokens, with probabilities.
        inputs_B: (B, ...) this rank's samples, for the distance ``pixels``.
        reducer: Adds and gathers over ranks.
        form: See above.
        distance: ``pixels``: between samples, bytes divided by 255; a token has its sample's, and two tokens of one
            sample are at distance 0. ``tokens``: between what the gate saw. No gradient reaches either.

    Returns:
        Scalars in the dtype of the probabilities; averages over a token's distributions where it has several. Without
        two tokens both are 0; for one expert the second is.

    Raises:
        ValueError: The routing has no probabilities or no tokens, or the inputs are missing or do not fit.
    """
    probs_TCE = _probs(routing)
    points_P = _points(routing, inputs_B, distance, len(probs_TCE))
    # A point carries what its tokens have: those of one sample are at distance 0 from each other.
    per_point = len(probs_TCE) // max(len(points_P), 1)
    mass_PCE = probs_TCE.double().unflatten(0, (len(points_P), per_point)).sum(1)
    sums: Sums = {"rows": mass_PCE.new_tensor(float(len(probs_TCE)))}
    if form == "paper":
        sums = reducer(sums | moments(points_P, mass_PCE))
        within, overall = squared_distance_sums(sums)
        over_within = over_between = sums["rows"] * (sums["rows"] - 1.0)
    else:
        sums = reducer(sums)
        within, overall = distance_sums(reducer.gather(points_P), reducer.gather(mass_PCE))
        over_within, over_between = torch.ones_like(sums["rows"]), sums["rows"].square()
    num_experts = routing.num_experts
    several = (sums["rows"] > 1.0).double()  # one token alone has rounding errors for a distance to itself
    within_term = several * within / (over_within.clamp(min=1.0) * num_experts)
    pairs_of_experts = max(num_experts * (num_experts - 1), 1)  # one expert has no pair, and equal sums
    between_term = several * (within - overall) / (over_between.clamp(min=1.0) * pairs_of_experts)
    return within_term.to(probs_TCE.dtype), between_term.to(probs_TCE.dtype)


def moments(points_P: Tensor, mass_PCE: Tensor) -> Sums:
    """What squared distances are made of; adds over ranks.

    Returns:
        Float64 ``mass_CE`` (sums of w), ``squares_CE`` (of w |x|^2) and ``vectors_CED`` (of w x).
    """
    points_PD = _coordinates(points_P)
    return {
        "mass_CE": mass_PCE.sum(0),
        "squares_CE": torch.einsum("pce,p->ce", mass_PCE, points_PD.square().sum(1)),
        "vectors_CED": torch.einsum("pce,pd->ced", mass_PCE, points_PD),
    }


def squared_distance_sums(sums: Sums) -> tuple[Tensor, Tensor]:
    """``sum_e s_ee`` and ``sum_{e, e'} s_ee'`` for squared distances, from :func:`moments`; scalars, means over C.

    ``sum_{p, q} w_p w_q |x_p - x_q|^2 = 2 (S Q - |M|^2)`` with S, Q and M the sums of mass, squares and vectors: of one
    expert for the first, of all experts together for the second.
    """
    mass_CE, squares_CE, vectors_CED = sums["mass_CE"], sums["squares_CE"], sums["vectors_CED"]
    within_CE = mass_CE * squares_CE - vectors_CED.square().sum(-1)
    overall_C = mass_CE.sum(-1) * squares_CE.sum(-1) - vectors_CED.sum(1).square().sum(-1)
    return 2.0 * within_CE.sum(-1).mean(), 2.0 * overall_C.mean()


def distance_sums(points_P: Tensor, mass_PCE: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_e s_ee`` and ``sum_{e, e'} s_ee'`` for distances over the largest distance; scalars, means over C.

    Takes about ``2 P^2 (D + C E)`` operations. The gradient reaches the mass.
    """
    distant_PCE = _distances_times(_coordinates(points_P), mass_PCE.detach().flatten(1)).view_as(mass_PCE)

    def quadratic(mass: Tensor, distant: Tensor) -> Tensor:
        # The matrix of distances is symmetric, so w' D w has the gradient 2 D w; and D w is a constant here.
        product = (mass * distant).sum()
        return (2.0 * product - product.detach()) / mass_PCE.shape[1]

    return quadratic(mass_PCE, distant_PCE), quadratic(mass_PCE.sum(-1), distant_PCE.sum(-1))


@torch.no_grad()
def _distances_times(points_PD: Tensor, mass_PK: Tensor) -> Tensor:
    """(P, K): the matrix of distances, over its largest entry, times ``mass_PK``; some rows of the matrix at a time."""
    if len(points_PD) == 0:
        return mass_PK
    points_PD = points_PD - points_PD.mean(0)  # squares cancel less
    squares_P = points_PD.square().sum(1)
    largest, products = squares_P.new_zeros(()), []
    rows = max(_CHUNK // len(points_PD), 1)
    for start in range(0, len(points_PD), rows):
        here = slice(start, start + rows)
        squares_RP = squares_P[here].unsqueeze(1) + squares_P
        distances_RP = squares_RP.addmm_(points_PD[here], points_PD.T, alpha=-2.0).clamp_(min=0.0).sqrt_()
        distances_RP.diagonal(start).zero_()  # the root of a rounding error is no longer a small one
        largest = torch.maximum(largest, distances_RP.max())
        products.append(distances_RP @ mass_PK)
    return torch.cat(products) / largest.clamp(min=torch.finfo(largest.dtype).tiny)


def _coordinates(points_P: Tensor) -> Tensor:
    """(P, ...) to (P, D) float64; bytes become shares of their range."""
    coordinates_PD = points_P.flatten(1).double()
    return coordinates_PD / 255.0 if points_P.dtype == torch.uint8 else coordinates_PD


def _points(routing: Routing, inputs_B: Tensor | None, distance: Distance, num_tokens: int) -> Tensor:
    """(P, ...): what distances are taken between, in the order of the tokens."""
    if distance == "tokens":
        if routing.tokens_T is None:
            raise ValueError("the similarity of tokens needs a routing made in training, which keeps the tokens")
        return routing.tokens_T.detach()
    if inputs_B is None:
        raise ValueError("the similarity of pixels needs the samples, not only their routing")
    if len(inputs_B) * routing.rows_per_sample != num_tokens:
        raise ValueError(f"{num_tokens} tokens are not {routing.rows_per_sample} for each of {len(inputs_B)} samples")
    return inputs_B.detach()


def _probs(routing: Routing) -> Tensor:
    """(T, C, E), C = 1 for gates with one distribution a token."""
    if routing.probs_TE is None:
        raise ValueError("the similarity losses need a gate with probabilities")
    return routing.probs_TE.unsqueeze(1) if routing.probs_TE.dim() == 2 else routing.probs_TE.flatten(1, -2)
