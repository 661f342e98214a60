"""Exchanges between real processes: values, gradients, gradients of gradients, groups, bytes, the checked mode."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmoe.moe.experts import MLPExperts
from distmoe.parallel.agreement import ExchangeMismatchError
from distmoe.parallel.collectives import Communicator, Communicators, SumReducer
from distmoe.parallel.gradients import clip_gradients, global_norm, reduce_gradients
from distmoe.parallel.mesh import Mesh
from tests.distributed.coupled import Case, Pairs, Ranks, differences, values
from tests.distributed.ranks import run_ranks


def count(source: int, target: int) -> int:
    """Rows from rank to rank, as uneven as can be: some send nothing, some receive nothing."""
    return (2 * source + 3 * target) % 4


def splits(ranks: Ranks) -> tuple[list[int], list[int]]:
    members = range(len(ranks.rows))
    return [count(ranks.rank, other) for other in members], [count(other, ranks.rank) for other in members]


def numbered(source: int, target: int) -> Tensor:
    """The rows that go from rank to rank: each says where it is from, where it goes and which one it is."""
    number = torch.arange(count(source, target), dtype=torch.float64).unsqueeze(1)
    return number + torch.tensor([10.0 * source + 100.0 * target, -1.0 - source], dtype=torch.float64)


def rows_of(ranks: Ranks, received: bool) -> Tensor:
    pairs = [(other, ranks.rank) if received else (ranks.rank, other) for other in range(len(ranks.rows))]
    return torch.cat([numbered(*pair) for pair in pairs])


def exchange_case(dtype: torch.dtype) -> Case:
    def case(ranks: Ranks) -> Pairs:
        rows, group = rows_of(ranks, received=False).to(dtype), ranks.world.world
        expected = rows_of(ranks, received=True).to(dtype)
        backwards = rows.T.contiguous().T  # not contiguous
        return {
            "exchange": (group.exchange(rows, *splits(ranks)), expected),
            "exchange of what is not contiguous": (group.exchange(backwards, *splits(ranks)), expected),
            "exchange_rows": (group.exchange_rows(rows, *splits(ranks)), expected),
        }

    return case


def nothing_travels(ranks: Ranks) -> Pairs:
    none, rows = [0] * len(ranks.rows), torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    exchanged = ranks.world.world.exchange(rows, none, none)
    exchanged.sum().backward()
    assert rows.grad is not None
    return {"rows": (exchanged, torch.zeros(0, 3).double()), "gradient": (rows.grad, torch.zeros(0, 3).double())}


def everything_goes_to_the_last(ranks: Ranks) -> Pairs:
    size, last = len(ranks.rows), len(ranks.rows) - 1
    send, receive = [0] * last + [ranks.rank + 1], [0] * size
    if ranks.rank == last:
        receive = [rank + 1 for rank in range(size)]
    rows = torch.full((ranks.rank + 1,), float(ranks.rank)).double()
    expected = torch.cat([torch.full((number,), float(rank)) for rank, number in enumerate(receive)]).double()
    return {"rows": (ranks.world.world.exchange(rows, send, receive), expected)}


def exchange_gradients(ranks: Ranks) -> Pairs:
    """f = sum over all ranks of the square of what arrives, times a weight of the receiver: all by hand."""
    rows = rows_of(ranks, received=False).requires_grad_()
    exchanged = ranks.world.world.exchange(rows, *splits(ranks))
    (gradient,) = torch.autograd.grad((exchanged.square() * (ranks.rank + 1)).sum(), rows, create_graph=True)
    targets = torch.arange(len(ranks.rows)).repeat_interleave(torch.tensor(splits(ranks)[0])).unsqueeze(1)
    weights = (targets + 1).double().expand(-1, 2)
    (second,) = torch.autograd.grad(gradient.pow(3).sum() / 6, rows)
    return {
        "first": (gradient, 2 * weights * rows),
        "second": (second, (2 * weights) ** 3 * rows**2 / 2),
    }


def meanwhile_in_both_directions(ranks: Ranks) -> Pairs:
    """What is done meanwhile lies between start and end of the exchange, forward and backward."""
    events: list[str] = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            events.append("meanwhile")
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            events.append("meanwhile")
            return grad * 2

    @contextmanager
    def observe(what: str, num_bytes: int) -> Iterator[None]:
        events.append(what)
        yield

    group = Communicator(range(len(ranks.rows)), ranks.rank, "little", observe=observe)
    x = rows_of(ranks, received=False).requires_grad_()
    found: list[Tensor] = []
    # First the work of the meanwhile is far from the loss, then it is the first thing autograd meets.
    exchanged = group.exchange(x * 3, *splits(ranks), lambda: found.append(Noted.apply(x)))
    total = exchanged.square().sum() + found[0].sum()
    expected = ["all-to-all in little group", "meanwhile", "all-to-all in little group"]
    forward, events[:] = list(events), []
    total.backward(retain_graph=True)
    assert forward == expected, forward
    assert events == expected, events
    assert x.grad is not None
    first = x.grad.clone()
    total.backward()  # once more through the same nodes
    gradient = 18 * x.detach() + 2
    (second,) = torch.autograd.grad(  # somebody differentiates twice
        torch.autograd.grad(group.exchange(x * 3, *splits(ranks), lambda: None).pow(3).sum(), x, create_graph=True)[
            0
        ].sum(),
        x,
    )
    return {
        "exchange": (exchanged, 3 * rows_of(ranks, received=True)),
        "gradient": (first, gradient),
        "again": (x.grad, 2 * gradient),
        "second": (second, 162 * x.detach()),
    }


def an_exchange_without_gradient(ranks: Ranks) -> Pairs:
    done: list[int] = []
    with torch.no_grad():
        rows = ranks.world.world.exchange(rows_of(ranks, False), *splits(ranks), lambda: done.append(1))
    assert done == [1]
    assert not rows.requires_grad
    return {"rows": (rows, rows_of(ranks, received=True))}


def is_freed(tensor: weakref.ref[Tensor], limit_s: float = 2.0) -> bool:
    """Soon: gloo's own thread may hold it for a moment longer."""
    give_up = time.monotonic() + limit_s
    while tensor() is not None and time.monotonic() < give_up:
        time.sleep(0.001)
    return tensor() is None


def arrived_rows_are_not_kept(ranks: Ranks) -> Pairs:
    """Neither until the backward pass, nor their gradients after it: they are most of what a layer holds."""
    kept: list[weakref.ref[Tensor]] = []
    x = rows_of(ranks, received=False).requires_grad_()
    x_twice = x * 2
    x_twice.register_hook(lambda grad: kept.append(weakref.ref(grad)))
    exchanged = ranks.world.world.exchange(x_twice, *splits(ranks))
    kept.append(weakref.ref(exchanged))
    total = exchanged.sum()  # which needs only their shape
    del exchanged
    assert is_freed(kept[0])
    total.backward()
    assert is_freed(kept[1])
    assert x.grad is not None
    return {"gradient": (x.grad, torch.full_like(x, 2.0))}


def sums(ranks: Ranks) -> Pairs:
    """y = sum over ranks of x_r; each rank's loss is w_r y^2: the gradient of x_r is 2 y times the sum of all w."""
    size = len(ranks.rows)
    x = torch.tensor([[1.0, 2.0, 3.0]] * 2, dtype=torch.float64) + ranks.rank
    leaf = x.T.requires_grad_()  # not contiguous
    total = ranks.world.world.sum(leaf)
    expected = x.T * size + sum(range(size)) - size * ranks.rank
    (gradient,) = torch.autograd.grad((total.square() * (ranks.rank + 1)).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((gradient * (ranks.rank + 2)).sum(), leaf)
    weights, towards = sum(range(1, size + 1)), sum(range(2, size + 2))
    return {
        "sum": (total, expected),
        "first": (gradient, 2 * weights * expected),
        "second": (second, torch.full_like(expected, 2.0 * weights * towards)),
        "whole numbers": (
            ranks.world.world.sum(torch.tensor([ranks.rank, 2**40])),
            torch.tensor([size * (size - 1) // 2, size * 2**40]),
        ),
        "in place": (ranks.world.world.sum_(torch.tensor(2.0)), torch.tensor(2.0 * size)),
        "of nothing": (ranks.world.world.sum(torch.zeros(0, 2)), torch.zeros(0, 2)),
    }


def gathers(ranks: Ranks) -> Pairs:
    """Unequal numbers of rows, none among them; each rank's loss is w_r times the squares of all rows."""
    group, all_rows = ranks.world.world, values(sum(ranks.rows), 3)
    leaf = all_rows[ranks.own].requires_grad_()
    gathered = group.gather(leaf)
    (gradient,) = torch.autograd.grad((gathered.square() * (ranks.rank + 1)).sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad((gradient * (ranks.rank + 2)).sum(), leaf)
    weights = sum(range(1, len(ranks.rows) + 1))
    images = (torch.arange(sum(ranks.rows) * 2) % 256).to(torch.uint8).view(-1, 2)
    members = torch.arange(len(ranks.rows))
    return {
        "rows": (gathered, all_rows),
        "first": (gradient, 2 * weights * all_rows[ranks.own]),
        "second": (second, torch.full_like(leaf, 2.0 * weights * (ranks.rank + 2))),
        "images": (group.gather(images[ranks.own]), images),
        "flags": (group.gather((images > 7)[ranks.own]), images > 7),
        "none at all": (group.gather(torch.zeros(0, 3)), torch.zeros(0, 3)),
        "equal": (
            group.gather_equal(torch.tensor([[ranks.rank], [7]])),
            torch.stack([members, torch.full_like(members, 7)], 1).unsqueeze(2),
        ),
    }


def reducer(ranks: Ranks) -> Pairs:
    size = len(ranks.rows)
    given = {
        "double": torch.tensor(2.0**-40, dtype=torch.float64) + ranks.rank,
        "float": torch.full((2, 3), 1.5),
        "count": torch.tensor([ranks.rank, 1]),
        "other float": torch.tensor([0.25, 4.0]) * (ranks.rank + 1),
        "none": torch.zeros(0),
    }
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    reduced = ranks.reducer({**given, "leaf": leaf * (ranks.rank + 1)})
    (reduced.pop("leaf") * torch.tensor([3.0, 5.0])).sum().backward()
    assert leaf.grad is not None
    below = size * (size - 1) // 2
    expected = {
        "double": torch.tensor(size * 2.0**-40 + below, dtype=torch.float64),
        "float": torch.full((2, 3), 1.5 * size),
        "count": torch.tensor([below, size]),
        "other float": torch.tensor([0.25, 4.0]) * (below + size),
        "none": torch.zeros(0),
    }
    assert list(reduced) == list(expected)
    # Every rank's loss is the same function of the sums: its gradient arrives once from each rank.
    gradient = torch.tensor([3.0, 5.0]) * size * (ranks.rank + 1)
    assert (ranks.reducer.rank, ranks.reducer.world_size) == (ranks.rank, size)
    return {name: (reduced[name], expected[name]) for name in expected} | {
        "gradient": (leaf.grad, gradient),
        "gather": (ranks.reducer.gather(torch.tensor([ranks.rank])), torch.arange(size)),
    }


def groups(ranks: Ranks) -> Pairs:
    """Each group sums over its own members, whose numbers are powers of two."""
    pairs: Pairs = {}
    for communicators in ranks.communicators.values():
        mesh = communicators.mesh
        for group, members in (
            (communicators.world, range(mesh.world_size)),
            (communicators.expert_parallel, mesh.expert_parallel_ranks),
            (communicators.expert_replicas, mesh.expert_replica_ranks),
        ):
            name = f"{group.name} at size {mesh.expert_parallel_size}"
            assert group.ranks == tuple(members), name
            total = torch.tensor(sum(2**rank for rank in members))
            pairs[name] = (group.sum_(torch.tensor(2**ranks.rank)), total)
            pairs[f"{name}, gathered"] = (group.gather(torch.tensor([ranks.rank])), torch.tensor(list(members)))
    return pairs


def the_gradient_rule(ranks: Ranks) -> Pairs:
    """A linear model and four experts whose gradients are set by hand, in every way of spreading experts."""
    size, pairs = len(ranks.rows), {}
    for communicators in ranks.communicators.values():
        mesh = communicators.mesh
        model = nn.ModuleDict({"dense": nn.Linear(2, 1), "experts": MLPExperts(mesh.local_experts(4), 2, 3)})
        model["dense"].bias.requires_grad_(False)
        # Dense: rank r has gradient r + 1. Experts: e + 1 for expert e, from each replica.
        model["dense"].weight.grad = torch.full((1, 2), float(ranks.rank + 1))
        for name, parameter in model["experts"].named_parameters():
            if name != "b2":  # which is left to be None
                parameter.grad = torch.ones_like(parameter)
                for place, expert in enumerate(mesh.local_experts(4)):
                    parameter.grad[place] *= expert + 1
        reduce_gradients(model, communicators)
        share = mesh.num_replicas / size
        # w1 and b1 and w2 have 6 + 3 + 6 entries an expert, of 1, 2, 3, 4 times the share.
        norm = (2 * ((size + 1) / 2) ** 2 + 15 * 30 * share**2) ** 0.5
        experts = torch.tensor([expert + 1.0 for expert in mesh.local_experts(4)]) * share
        at = f" at size {mesh.expert_parallel_size}"
        pairs |= {
            f"dense{at}": (model["dense"].weight.grad.clone(), torch.full((1, 2), (size + 1) / 2)),
            f"experts{at}": (model["experts"].w1.grad[:, 0, 0].clone(), experts),
            f"without a gradient{at}": (model["experts"].b2.grad, torch.zeros(len(experts), 2)),
            f"norm{at}": (global_norm(model, communicators), torch.tensor(norm, dtype=torch.float64)),
        }
        for limit, factor in ((None, 1.0), (norm * 2, 1.0), (norm / 4, 0.25)):
            before = clip_gradients(model, communicators, limit)
            pairs[f"norm before clipping at {limit}{at}"] = (before, torch.tensor(norm, dtype=torch.float64))
            pairs[f"clipped at {limit}{at}"] = (model["experts"].w1.grad[:, 0, 0].clone(), experts * factor)
        assert model["dense"].bias.grad is None
    return pairs


def observed(ranks: Ranks) -> Pairs:
    """Names and bytes that leave this rank, of each kind of exchange."""
    size, seen = len(ranks.rows), []

    @contextmanager
    def observe(what: str, num_bytes: int) -> Iterator[None]:
        seen.append((what, num_bytes))
        yield

    group = Communicators.of(Mesh(size, ranks.rank, size), observe=observe).expert_parallel
    rows = rows_of(ranks, received=False)
    group.exchange(rows, *splits(ranks))
    group.gather_equal(torch.zeros(3, dtype=torch.int32))
    group.sum_(torch.zeros(size, 2))
    away = len(rows) - count(ranks.rank, ranks.rank)
    expected = [
        ("all-to-all", away * 2 * 8),
        ("all-to-all", 0),
        ("all-gather", (size - 1) * 12),
        ("all-reduce", (size - 1) * 16),
    ]
    assert seen == [(f"{name} in expert-parallel group", number) for name, number in expected], seen
    return {}


CASES: dict[str, Case] = {
    **{
        f"exchange of {dtype}": exchange_case(dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.uint8)
    },
    "nothing travels": nothing_travels,
    "everything goes to the last": everything_goes_to_the_last,
    "gradients of an exchange": exchange_gradients,
    "meanwhile": meanwhile_in_both_directions,
    "an exchange without gradient": an_exchange_without_gradient,
    "arrived rows are not kept": arrived_rows_are_not_kept,
    "sums": sums,
    "gathers": gathers,
    "reducer": reducer,
    "groups": groups,
    "the gradient rule": the_gradient_rule,
    "observed": observed,
}


# --- Checked mode: the same answer on every rank, and the ranks can go on


def sends_another_operation(group: Communicator) -> None:
    group.sum_(torch.zeros(1)) if group.rank else group.gather_equal(torch.zeros(1))


def sends_another_dtype(group: Communicator) -> None:
    group.sum(torch.zeros(2, dtype=torch.float64 if group.rank else torch.float32))


def sends_another_shape(group: Communicator) -> None:
    group.gather_equal(torch.zeros(2 + group.rank % 2))


def sends_rows_of_another_shape(group: Communicator) -> None:
    ones = [1] * group.size
    group.exchange(torch.zeros(group.size, 4 if group.rank else 5), ones, ones)


def sends_more_than_expected(group: Communicator) -> None:
    send = [1] * group.size
    send[0] += group.rank == 1
    group.exchange(torch.zeros(sum(send)), send, [1] * group.size)


def sends_fewer_rows_than_it_says(group: Communicator) -> None:
    ones = [1] * group.size
    group.exchange(torch.zeros(group.size - (group.rank == 1)), ones, ones)


def gathers_rows_of_another_shape(group: Communicator) -> None:
    group.gather(torch.zeros(2, 3 + group.rank % 2))


MISMATCHES: dict[Callable[[Communicator], None], str] = {
    sends_another_operation: "rank 0: all-gather of float32, shape [1]; {others}: all-reduce of float32, shape [1]",
    sends_another_dtype: "rank 0: all-reduce of float32, shape [2]; {others}: all-reduce of float64, shape [2]",
    sends_another_shape: "{even}: all-gather of float32, shape [2]; {odd}: all-gather of float32, shape [3]",
    sends_rows_of_another_shape: (
        "rank 0: all-to-all of float32, rows of shape [5]; {others}: all-to-all of float32, rows of shape [4]"
    ),
    sends_more_than_expected: "rank 1 sends 2 rows to rank 0, which expects 1",
    sends_fewer_rows_than_it_says: "rank 1 has {fewer} rows and sends {size}",
    gathers_rows_of_another_shape: (
        "{even}: all-gather of float32, shape [2, 3]; {odd}: all-gather of float32, shape [2, 4]"
    ),
}
NAMES = {
    2: {"others": "rank 1", "even": "rank 0", "odd": "rank 1", "fewer": 1, "size": 2},
    4: {"others": "ranks 1, 2, 3", "even": "ranks 0, 2", "odd": "ranks 1, 3", "fewer": 3, "size": 4},
}


def what_checks_say() -> dict[str, str]:
    size = dist.get_world_size()
    group = Communicators.of(Mesh(size, dist.get_rank()), checked=True).world
    said = {}
    for mismatch in MISMATCHES:
        try:
            mismatch(group)
        except ExchangeMismatchError as error:
            said[mismatch.__name__] = str(error)
    return said


def checked_and_right() -> dict[str, list[str]]:
    """All the cases above, once more with checks."""
    ranks = Ranks.here()
    for communicators in ranks.communicators.values():
        for group in (communicators.world, communicators.expert_parallel, communicators.expert_replicas):
            group.checked = True
    return differences({name: case for name, case in CASES.items() if name != "observed"}, ranks)


def everything() -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, str]]:
    return differences(CASES), checked_and_right(), what_checks_say()


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def found(request):
    return run_ranks(everything, request.param)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("checked", [False, True], ids=["", "checked"])
def test_exchanges_are_right(found, name, checked):
    wrong = {rank: each[checked][name] for rank, each in enumerate(found) if each[checked].get(name)}
    assert not wrong, "\n".join(f"rank {rank}: {one}" for rank, all_ in wrong.items() for one in all_)


@pytest.mark.parametrize("mismatch", MISMATCHES, ids=lambda mismatch: mismatch.__name__)
def test_checks_tell_every_rank_who_differs(found, mismatch):
    message = MISMATCHES[mismatch].format(**NAMES[len(found)])
    expected = f"ranks of the world group do not agree on their next exchange: {message}"
    assert [said.get(mismatch.__name__) for *_, said in found] == [expected] * len(found)


def test_the_only_rank_exchanges_nothing():
    group = Communicators.of(Mesh()).world
    rows, done = torch.tensor([[1.0, 2.0]], requires_grad=True), []
    assert group.exchange(rows, [1], [1], lambda: done.append(1)) is rows
    assert done == [1]
    assert group.exchange_rows(rows, [1], [1]) is rows
    assert torch.equal(group.sum(rows), rows)
    assert torch.equal(group.gather(rows), rows)
    assert torch.equal(group.gather_equal(rows), rows.unsqueeze(0))
    assert SumReducer(group)({"a": rows})["a"] is rows
