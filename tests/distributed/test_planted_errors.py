"""A test of the tests: an error planted in a layout breaks the very promises that measures (a) and (c) check."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmoe.models import initial
from distmoe.moe.sums import no_reduction
from distmoe.parallel import collectives
from distmoe.parallel.collectives import Communicators
from distmoe.parallel.engines import deepspeed
from distmoe.parallel.shards import expert_parameters
from tests.distributed import layout_training
from tests.distributed.layout_cases import Case, Layout
from tests.distributed.layout_measures import (
    Reference,
    failures,
    measure_free,
    measure_single,
    over_ranks,
    references,
)
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

CASE = Case(samples="uneven")
LAYOUT = Layout(2, 2, "zero 0")

Plant = Callable[[], AbstractContextManager[object]]


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, value)
        yield


def expert_gradients_scaled() -> AbstractContextManager[object]:
    """By 1 / EP."""
    build = layout_training.build_model

    def build_scaled(*args: Any) -> Any:
        model = build(*args)
        for parameter in expert_parameters(model):
            parameter.register_hook(lambda gradient: gradient / LAYOUT.expert_parallel)
        return model

    return changed(layout_training, "build_model", build_scaled)


def clipped_by_local_norm() -> AbstractContextManager[object]:
    def clip(model: nn.Module, communicators: Communicators, max_norm: float) -> Tensor:
        del communicators
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    return changed(deepspeed, "clip_gradients", clip)


def balance_of_local_batch() -> AbstractContextManager[object]:
    build = layout_training.build_engine

    def build_local(*args: Any) -> Any:
        engine = build(*args)
        engine.reducer = no_reduction
        return engine

    return changed(layout_training, "build_engine", build_local)


def experts_by_local_id() -> AbstractContextManager[object]:
    seed, num_local = initial._seed, 2

    def by_local_id(*parts: Any) -> int:
        return seed(*parts[:2], *(expert_id % num_local for expert_id in parts[2:]))

    return changed(initial, "_seed", by_local_id)


def statistics_of_one_rank() -> AbstractContextManager[object]:
    return changed(layout_training, "share_batch_statistics", lambda module, communicators: module)


def sum_passes_gradients_through() -> AbstractContextManager[object]:
    return changed(collectives._Sum, "backward", staticmethod(lambda ctx, grad: (grad, None)))


# What is planted, and by which promise it is noticed.
PLANTS: dict[str, tuple[Plant, str]] = {
    "nothing": (nullcontext, ""),
    "expert gradients scaled by 1 / EP": (expert_gradients_scaled, "(a) gradient"),
    "clipping by the local norm": (clipped_by_local_norm, "(a) gradient"),
    "balance loss of the local batch": (balance_of_local_batch, "(a) loss"),
    "experts initialised by local id": (experts_by_local_id, "(c) loss"),
    "batch statistics of one rank": (statistics_of_one_rank, "(a) loss"),
    "identity as the backward of a sum": (sum_passes_gradients_through, "(a) gradient"),
}


def _check_plants(file: Path) -> dict[str, Any]:
    reference: Reference = torch.load(file, weights_only=False)[CASE]
    found = {}
    for name, (plant, _) in PLANTS.items():
        with plant():
            found[name] = (measure_single(CASE, LAYOUT, reference), measure_free(CASE, LAYOUT, reference))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The promises that are not kept, by what is planted."""
    file = tmp_path_factory.mktemp("reference") / "references.pt"
    run_ranks(references, 1, [CASE], [], file)
    ranks = run_ranks(_check_plants, LAYOUT.world, file)
    return {
        name: failures(*over_ranks([each[name][0] for each in ranks], [each[name][1] for each in ranks]))
        for name in PLANTS
    }


@pytest.mark.parametrize("name", [name for name in PLANTS if name != "nothing"])
def test_a_planted_error_is_noticed(name, found):
    assert [failure for failure in found[name] if failure.startswith(PLANTS[name][1])] != [], found[name]


def test_without_one_nothing_is_noticed(found):
    assert found["nothing"] == []
