"""Experts spread over real processes against a loop over rows, and against a layer with all experts in one process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distmoe.contracts import Context
from distmoe.moe.convolutions import SingleLayerExperts
from distmoe.moe.dispatch import LocalDispatcher, Placement
from distmoe.moe.experts import MLPExperts, ModuleExperts
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.layer import MoELayer
from distmoe.moe.mixtures import Conv1dMoE, Conv2dMoE, DenseMoE
from distmoe.parallel.collectives import Communicators
from distmoe.parallel.expert_parallel import AllToAllDispatcher, Overlap, expert_placement
from distmoe.parallel.gradients import reduce_gradients
from distmoe.parallel.mesh import Mesh
from tests.distributed.coupled import Case, Pairs, Ranks, differences, values
from tests.distributed.ranks import run_ranks
from tests.oracles import gathered_outputs, grouped_assignments, mixture_output
from tests.unit.moe.gate_forms import FORMS, Form

NUM_EXPERTS = 4  # a multiple of every expert-parallel size


# --- The dispatcher alone


@dataclass
class Problem:
    """What all ranks together have: tokens and assignments, those of a rank by its rows."""

    x: Tensor
    row_ids: Tensor
    expert_ids: Tensor
    weights: Tensor
    factors: Tensor
    towards: Tensor
    towards_gathered: Tensor

    @staticmethod
    def of(
        num_rows: int, row_ids: Tensor, expert_ids: Tensor, token: Sequence[int], weights: Sequence[int]
    ) -> "Problem":
        return Problem(
            values(num_rows, *token),
            row_ids,
            expert_ids,
            values(len(row_ids), *weights, seed=2),
            values(NUM_EXPERTS, seed=3),
            values(num_rows, *token, seed=4),
            values(len(row_ids), *token, seed=5),
        )

    def on(self, rows: range) -> "Problem":
        """Only these rows and their assignments, the rows counted from the first of them."""
        here = (self.row_ids >= rows.start) & (self.row_ids < rows.stop)
        of_rows, of_assignments = slice(rows.start, rows.stop), here.nonzero().squeeze(1)
        return Problem(
            self.x[of_rows],
            self.row_ids[of_assignments] - rows.start,
            self.expert_ids[of_assignments],
            self.weights[of_assignments],
            self.factors,
            self.towards[of_rows],
            self.towards_gathered[of_assignments],
        )


def scaled(factors: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """Expert e multiplies by factors[e] and squares, so that outputs tell expert and row apart."""
    return [lambda x, factor=factor: factor * x + (factor * x).square() for factor in factors.unbind()]


def assigned(kind: str, num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows, in ascending order so that a rank's assignments are neighbours, and experts of the assignments."""
    rows = torch.arange(num_rows)
    if kind == "dense":
        return rows.repeat_interleave(NUM_EXPERTS), torch.arange(NUM_EXPERTS).repeat(num_rows)
    if kind == "top-1":
        return rows, (rows * 3 + 1) % NUM_EXPERTS
    if kind == "top-2":  # the second choice first for some
        return rows.repeat_interleave(2), torch.stack(
            [(rows * rows) % NUM_EXPERTS, (rows * rows + 1 + rows % 3) % NUM_EXPERTS], 1
        ).flatten()
    if kind == "neighbours":  # two experts of one rank, at every size
        return rows.repeat_interleave(2), torch.stack([rows % 2 * 2 + 1, rows % 2 * 2], 1).flatten()
    if kind in ("all to the first", "all to the last"):
        return rows, torch.full_like(rows, 0 if kind == "all to the first" else NUM_EXPERTS - 1)
    if kind == "one expert twice":
        return rows.repeat_interleave(3), torch.tensor([2, 0, 2]).repeat(num_rows)
    if kind == "none":
        return rows[:0], rows[:0]
    generator = torch.Generator().manual_seed(7)  # "any": 0 to 5 a row
    row_ids = rows.repeat_interleave(torch.randint(0, 6, (num_rows,), generator=generator))
    return row_ids, torch.randint(0, NUM_EXPERTS, row_ids.shape, generator=generator)


def dispatcher_case(
    size: int, kind: str, token: Sequence[int] = (3,), weights: Sequence[int] = (), rows: tuple[int, ...] | None = None
) -> Case:
    """Rows, counts, gather, combine and all gradients against loops."""

    def case(ranks: Ranks) -> Pairs:
        ranks = ranks if rows is None else ranks.with_rows(*rows)
        communicators = ranks.communicators[size]
        num_rows = sum(ranks.rows)
        whole = Problem.of(num_rows, *assigned(kind, num_rows), token, weights)
        own = whole.on(range(ranks.own.start, ranks.own.stop))
        placement = expert_placement(communicators)
        dispatcher, local = placement.dispatcher(NUM_EXPERTS), placement.local_experts(NUM_EXPERTS)

        x, w, factors = (one.clone().requires_grad_() for one in (own.x, own.weights, whole.factors))
        rows_R, counts_L, plan = dispatcher.dispatch(x, own.row_ids, own.expert_ids)
        pieces = zip(scaled(factors[local.start : local.stop]), rows_R.split(counts_L.tolist()), strict=True)
        output = torch.cat([expert(piece) for expert, piece in pieces])
        gathered, both = dispatcher.gather((output, torch.stack([output, output * 2], -1)), plan)
        combined = dispatcher.combine(output, plan, w)
        loss = (combined * own.towards).sum() + (gathered * own.towards_gathered).sum()
        (loss + both.sum()).backward()

        y, v, f = (one.clone().requires_grad_() for one in (own.x, own.weights, whole.factors))
        ids = own.row_ids.tolist(), own.expert_ids.tolist()
        expected_gathered = gathered_outputs(y, *ids, scaled(f))
        expected_combined = mixture_output(y, *ids, v, scaled(f))
        expected_loss = (expected_combined * own.towards).sum() + (expected_gathered * own.towards_gathered).sum()
        (expected_loss + expected_gathered.sum() * 3).backward()

        # The experts of a replica see the rows of its ranks, in the order of one process with all of them.
        mesh = communicators.mesh
        edges = torch.tensor([0, *ranks.rows]).cumsum(0)
        seen = whole.on(
            range(int(edges[mesh.expert_parallel_ranks[0]]), int(edges[mesh.expert_parallel_ranks[-1] + 1]))
        )
        order = grouped_assignments(seen.row_ids.tolist(), seen.expert_ids.tolist())
        here = [number for number in order if int(seen.expert_ids[number]) in local]
        of_factors = communicators.world.sum(zeros_for_none(factors)), communicators.world.sum(zeros_for_none(f))
        return {
            "rows": (rows_R, seen.x.index_select(0, seen.row_ids[here])),
            "counts": (counts_L, torch.tensor([seen.expert_ids[here].tolist().count(expert) for expert in local])),
            "gather": (gathered, expected_gathered),
            "gather of a second tensor": (both, torch.stack([expected_gathered, expected_gathered * 2], -1)),
            "combine": (combined, expected_combined),
            "gradient of the tokens": (zeros_for_none(x), zeros_for_none(y)),
            "gradient of the weights": (zeros_for_none(w), zeros_for_none(v)),
            "gradient of the experts": of_factors,
        }

    return case


def zeros_for_none(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def half_precision(size: int, ranks: Ranks) -> Pairs:
    """Outputs in bfloat16 are added in float32, whichever way they travel: 256 + 1 + 2 + 1, not 256."""
    dispatcher = ranks.placement(size).dispatcher(NUM_EXPERTS)
    x = torch.full((3, 2), 256.0).bfloat16().requires_grad_()
    pairs: Pairs = {}
    for experts in ([0, 1, 2, 3], [0, 3]):  # together on a rank, and apart
        row_ids, expert_ids = torch.arange(3).repeat_interleave(len(experts)), torch.tensor(experts * 3)
        rows, _, plan = dispatcher.dispatch(x, row_ids, expert_ids)
        weights = torch.tensor([1.0, 1 / 256, 2 / 256, 1 / 256])[expert_ids].requires_grad_()
        combined = dispatcher.combine(rows, plan, weights)
        total = 256.0 * float(weights.detach()[: len(experts)].sum())
        pairs[f"output of {experts}"] = (combined, torch.full((3, 2), total))
        combined.sum().backward()
        pairs[f"gradient of the weights of {experts}"] = (zeros_for_none(weights), torch.full_like(weights, 512.0))
    return pairs


# --- Layers


def whole_and_ours(
    ranks: Ranks, size: int, make: Callable[[Placement], MoELayer], overlap: Overlap
) -> tuple[MoELayer, MoELayer]:
    """The layer with all experts, and the one with this rank's, of equal weights."""
    torch.manual_seed(0)
    whole = make(Placement()).double()
    ours = make(expert_placement(ranks.communicators[size], overlap)).double()
    theirs = dict(whole.named_parameters())
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(values(parameter.numel(), seed=parameter.numel()).view_as(parameter))
        for name, parameter in ours.named_parameters():
            parameter.copy_(share(ours, name, theirs[name]))
    return whole, ours


def share(ours: MoELayer, name: str, tensor: Tensor) -> Tensor:
    """This rank's part of a tensor of the layer with all experts."""
    stacked = isinstance(ours.experts, MLPExperts | SingleLayerExperts) and name.startswith("experts.")
    ids = ours.experts.expert_ids
    return tensor[ids.start : ids.stop] if stacked else tensor


def layer_case(
    size: int,
    make: Callable[[Placement], MoELayer],
    token: Sequence[int],
    training: bool = True,
    overlap: Overlap = "none",
    run: Callable[..., Any] = lambda layer, *args: layer(*args),
) -> Case:
    """Output and all gradients, against the layer with all experts and the samples of all ranks."""

    def case(ranks: Ranks) -> Pairs:
        whole, ours = whole_and_ours(ranks, size, make, overlap)
        samples, own = sum(ranks.rows), ranks.own
        x, ids = values(samples, *token), torch.arange(samples)
        of_all, of_own = x.clone().requires_grad_(), x[own].clone().requires_grad_()
        expected = whole(of_all, Context(0, 3, ids, training))[0]
        got = run(ours, of_own, Context(0, 3, ids[own], training))[0]
        towards = values(*expected.shape, seed=2)
        (expected * towards).sum().backward()
        (got * towards[own]).sum().mul(len(ranks.rows)).backward()
        reduce_gradients(ours, ranks.communicators[size])
        assert of_all.grad is not None
        pairs = {
            "output": (got, expected[own]),
            "gradient of the input": (zeros_for_none(of_own) / len(ranks.rows), of_all.grad[own]),
        }
        theirs = dict(whole.named_parameters())
        for name, parameter in ours.named_parameters():
            pairs[f"gradient of {name}"] = (zeros_for_none(parameter), share(ours, name, zeros_for_none(theirs[name])))
        return pairs

    return case


def gate_layer(form: Form, placement: Placement) -> MoELayer:
    gate = form.gate(NUM_EXPERTS)
    experts = MLPExperts(placement.local_experts(NUM_EXPERTS), 3, 4, with_hidden=gate.needs_hidden)
    return MoELayer(gate, experts, placement)


def layer_of_modules(placement: Placement) -> MoELayer:
    """Images are tokens, experts are modules: parameters carry the global id."""
    gate = TopKGate(nn.Sequential(nn.Flatten(), nn.Linear(18, NUM_EXPERTS)), NUM_EXPERTS, k=2)
    experts = ModuleExperts(placement.local_experts(NUM_EXPERTS), lambda: nn.Conv2d(2, 3, 3, padding=1))
    return MoELayer(gate, experts, placement, token_dims=3)


def layer_with_shared(placement: Placement, k: int = 2) -> MoELayer:
    shared = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 3))
    experts = MLPExperts(placement.local_experts(NUM_EXPERTS), 3, 4)
    gate = TopKGate(nn.Linear(3, NUM_EXPERTS), NUM_EXPERTS, k)
    return MoELayer(gate, experts, placement, shared=shared)


def recomputed(layer: MoELayer, x: Tensor, context: Context) -> Any:
    return checkpoint(layer, x, context, use_reentrant=False)


MIXTURES: dict[str, tuple[Callable[[Placement], MoELayer], tuple[int, ...]]] = {
    "dense mixture": (lambda at: DenseMoE(3, 2, NUM_EXPERTS, gate_activation="softmax", placement=at), (3,)),
    "dense mixture, uniform": (lambda at: DenseMoE(3, 2, NUM_EXPERTS, gate="uniform", placement=at), (2, 3)),
    "convolutions, a weight a filter": (
        lambda at: Conv2dMoE(2, 3, NUM_EXPERTS, 3, 4, gate_activation="softmax", placement=at),
        (2, 4, 4),
    ),
    "convolutions, pooled": (lambda at: Conv2dMoE(2, 3, NUM_EXPERTS, 2, gate="pooled", placement=at), (2, 4, 3)),
    "convolutions, a weight a position": (
        lambda at: Conv1dMoE(2, 3, NUM_EXPERTS, 2, 5, gate="position", gate_activation="softmax", placement=at),
        (2, 5),
    ),
    "modules": (layer_of_modules, (2, 3, 3)),
}
# What couples samples is in test_coupling.py. One form has k = 5, of five experts.
ALONE = {
    name: replace(form, settings={**form.settings, **({"k": NUM_EXPERTS} if form.settings.get("k") == 5 else {})})
    for name, form in FORMS.items()
    if form.alone
}


def gradients_of_gradients(size: int, overlap: Overlap, ranks: Ranks) -> Pairs:
    """A penalty on the gradient of the input, as in one process."""

    def penalty(layer: MoELayer, x: Tensor, samples: slice) -> tuple[Tensor, Tensor]:
        leaf = x[samples].clone().requires_grad_()
        output = layer(leaf, Context(0, 0, torch.arange(len(x))[samples], True))[0]
        (gradient,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        return gradient, zeros_for_none(leaf)

    whole, ours = whole_and_ours(ranks, size, layer_with_shared, overlap)
    x = values(sum(ranks.rows), 3)
    first, second = penalty(whole, x, slice(0, len(x)))
    got_first, got_second = penalty(ours, x, ranks.own)
    reduce_gradients(ours, ranks.communicators[size])
    theirs = dict(whole.named_parameters())
    return {
        "first": (got_first, first[ranks.own]),
        "second": (got_second, second[ranks.own]),
        **{
            f"gradient of {name}": (
                zeros_for_none(one) * len(ranks.rows),
                share(ours, name, zeros_for_none(theirs[name])),
            )
            for name, one in ours.named_parameters()
        },
    }


def two_micro_batches_in_flight(size: int, ranks: Ranks) -> Pairs:
    """Backward in the order of the forwards, not in the opposite one: a plan belongs to its forward."""
    whole, ours = whole_and_ours(ranks, size, layer_with_shared, "shared")
    x = [values(sum(ranks.rows), 3, seed=seed) for seed in (1, 2)]
    pairs: Pairs = {}
    found: list[list[Tensor]] = []
    for layer, own in ((whole, slice(0, len(x[0]))), (ours, ranks.own)):
        leaves = [one[own].clone().requires_grad_() for one in x]
        outputs = [layer(leaf, Context(0, 0, torch.arange(len(x[0]))[own], True))[0] for leaf in leaves]
        for output in outputs:
            output.square().sum().backward()
        found.append([zeros_for_none(leaf)[slice(None) if layer is ours else ranks.own] for leaf in leaves])
    for number, (expected, got) in enumerate(zip(*found, strict=True)):
        pairs[f"gradient of input {number}"] = (got, expected)
    return pairs


def equal_bits(size: int, ranks: Ranks) -> Pairs:
    """In float32: two runs, and runs with and without overlap, down to the last bit."""
    pairs: Pairs = {}
    for k in (1, 2, NUM_EXPERTS):
        results: list[list[Tensor]] = []
        for overlap in ("none", "none", "shared"):
            torch.manual_seed(0)
            make = partial(layer_with_shared, k=k) if k > 1 else layer_of_uniform_top_1
            layer = make(expert_placement(ranks.communicators[size], overlap))
            x = (
                values(40 * len(ranks.rows), 3, dtype=torch.float32)[ranks.rank :: len(ranks.rows)]
                .clone()
                .requires_grad_()
            )
            output = layer(x)[0]
            output.square().sum().backward()
            results.append([output, *(zeros_for_none(one) for one in (x, *layer.parameters()))])
        for number, other in enumerate(results[1:]):
            for place, (one, first) in enumerate(zip(other, results[0], strict=True)):
                pairs[f"k {k}, run {number + 1}, tensor {place}"] = (
                    one.detach().view(torch.int32),
                    first.detach().view(torch.int32),
                )
    return pairs


def layer_of_uniform_top_1(placement: Placement) -> MoELayer:
    layer = layer_with_shared(placement)
    layer.gate = TopKGate(nn.Linear(3, NUM_EXPERTS), NUM_EXPERTS, 1, renormalize=False)
    return layer


def bytes_that_travel(size: int, ranks: Ranks) -> Pairs:
    """A token goes once to each other rank that has an expert for it, and comes back once: counted by hand."""
    seen: list[tuple[str, int]] = []

    @contextmanager
    def observe(what: str, num_bytes: int) -> Iterator[None]:
        if num_bytes:
            seen.append((what.split(" ")[0], num_bytes))
        yield

    world = len(ranks.rows)
    communicators = Communicators.of(Mesh(world, ranks.rank, size), observe=observe)
    dispatcher, group = AllToAllDispatcher(NUM_EXPERTS, communicators.expert_parallel), communicators.expert_parallel
    width, tokens, others, local = 16, 6, size - 1, NUM_EXPERTS // size
    counts_bytes = others * (NUM_EXPERTS + size) * 8

    def sent(kind: str, weight: Sequence[int] = ()) -> list[int]:
        """Bytes of each exchange, forward and backward."""
        row_ids, expert_ids = assigned(kind, tokens)
        if kind == "elsewhere":
            row_ids, expert_ids = torch.arange(tokens), torch.full((tokens,), (group.rank + 1) % size * local)
        seen.clear()
        x = torch.zeros(tokens, width, requires_grad=True)
        rows, _, plan = dispatcher.dispatch(x, row_ids, expert_ids)
        assert seen[0] == ("all-gather", counts_bytes), seen
        combined = dispatcher.combine(rows, plan, torch.zeros(len(row_ids), *weight, requires_grad=True))
        combined.sum().backward()
        assert all(what == "all-to-all" for what, _ in seen[1:]), seen
        return [number for _, number in seen[1:]]

    row, away = width * 4, tokens * others
    # Each token to each other rank: its row, an int32 for each of its experts; weights; sums back. Then gradients.
    index, weights = away * local * 4, away * local * 4
    dense = [away * row, weights, away * row]
    pairs = {
        "dense": (sent("dense"), ([index] if local > 1 else []) + (dense if local > 1 else [away * row] * 2)),
        "elsewhere": (sent("elsewhere"), [tokens * row, tokens * row]),
    }
    for name, (got, forward) in pairs.items():
        gradients = forward[1:] if name == "dense" and local > 1 else forward
        expected = forward + gradients[::-1]
        assert got == expected, (name, got, expected)
    # A weight for each value: they would be as many bytes as the outputs, which therefore come back one by one.
    if local > 1:
        each = away * local * row
        assert sent("dense", (width,)) == [index, away * row, each, each, away * row], seen
    return {}


SITUATIONS: dict[str, Callable[[int], Case]] = {
    **{
        f"{kind} of tokens of shape {list(token)}": partial(dispatcher_case, kind=kind, token=token)
        for kind in ("dense", "top-2", "any")
        for token in ((), (3,), (2, 2))
    },
    **{
        kind: partial(dispatcher_case, kind=kind)
        for kind in ("top-1", "neighbours", "all to the first", "all to the last", "one expert twice", "none")
    },
    **{
        f"{kind} with a weight a {what}": partial(dispatcher_case, kind=kind, token=token, weights=weights)
        for kind in ("dense", "top-2", "any")
        for what, token, weights in (("channel", (2, 3), (2,)), ("position", (2, 3), (1, 3)), ("value", (2,), (2,)))
    },
    **{
        f"{kind}, rows {rows}": partial(dispatcher_case, kind=kind, rows=rows)
        for kind in ("dense", "any")
        for rows in ((0, 0), (0, 5), (5, 0), (1, 9))
    },
    "bfloat16": lambda size: partial(half_precision, size),
    **{
        f"layer, {name}": partial(layer_case, make=partial(gate_layer, form), token=(2, 3), training=form.trained)
        for name, form in ALONE.items()
    },
    **{name: partial(layer_case, make=make, token=token) for name, (make, token) in MIXTURES.items()},
    **{
        f"shared expert, overlap {overlap}": partial(layer_case, make=layer_with_shared, token=(2, 3), overlap=overlap)
        for overlap in ("none", "shared")
    },
    "recomputed": partial(layer_case, make=layer_with_shared, token=(3,), overlap="shared", run=recomputed),
    **{
        f"gradients of gradients, overlap {overlap}": lambda size, overlap=overlap: partial(
            gradients_of_gradients, size, overlap
        )
        for overlap in ("none", "shared")
    },
    "two micro-batches in flight": lambda size: partial(two_micro_batches_in_flight, size),
    "equal bits": lambda size: partial(equal_bits, size),
    "bytes": lambda size: partial(bytes_that_travel, size),
}
SIZES = {2: (2,), 4: (2, 4)}  # expert-parallel sizes by world


def all_differences(world_size: int) -> dict[int, dict[str, list[str]]]:
    return {size: differences({name: make(size) for name, make in SITUATIONS.items()}) for size in SIZES[world_size]}


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def found(request):
    return run_ranks(all_differences, request.param, request.param)


@pytest.mark.parametrize("name", SITUATIONS)
def test_spread_experts_give_what_one_process_gives(found, name):
    wrong = [
        f"rank {rank}, experts over {size}: {one}"
        for rank, sizes in enumerate(found)
        for size, each in sizes.items()
        for one in each[name]
    ]
    assert not wrong, "\n".join(wrong)


def test_experts_that_cannot_be_spread_evenly_are_refused():
    group = Communicators.over(Mesh(4, 1, 4), None, None, None, None, False, lambda what, size: None).expert_parallel
    with pytest.raises(ValueError, match=r"^6 experts cannot be spread evenly over 4 ranks$"):
        AllToAllDispatcher(6, group)


def test_one_rank_keeps_its_experts():
    placement = expert_placement(Communicators.of(Mesh()))
    assert isinstance(placement.dispatcher(3), LocalDispatcher)
    assert placement.local_experts(3) == range(3)
