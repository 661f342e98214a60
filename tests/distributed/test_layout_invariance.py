"""The same training in any layout: measures (a), (b) and (c) of a covering set; the full product is marked slow.

Every test shows one case in one layout; what it is compared with is computed once, in a single process.
"""

import itertools
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distmoe.moe.gates import GATES
from tests.distributed.layout_cases import (
    FACTORS,
    LAYOUTS,
    WORLDS,
    Case,
    Layout,
    covering_rows,
    possible_cases,
)
from tests.distributed.layout_measures import (
    LIMIT,
    Free,
    Single,
    Wide,
    failures,
    measure,
    measure_single,
    over_ranks,
    references,
)
from tests.distributed.layout_training import NUM_STEPS
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

LIMIT_S = 900.0
# Measure (a) of every so-manieth state, by world size; of every state in the tables. An engine in one process does what
# the reference does; the steps of four processes on few cores take longest.
EVERY = {1: 10, 2: 2, 4: 5}
ROWS = covering_rows()
RUNS = [(row.case, layout) for row in ROWS for layout in row.layouts]
WIDE_CASES = list({row.case.gate: row.case for row in reversed(ROWS)}.values())  # the first of each gate
WIDE_RUNS = [(case, Layout(world, size, "loop")) for case in WIDE_CASES for world, size in ((2, 2), (4, 2), (4, 4))]

Run = tuple[Case, Layout]
Measured = tuple[dict[Run, tuple[Single, Free]], dict[Run, Wide]]


def described(run: Run) -> str:
    return f"{run[1]}: {run[0]}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file with the trainings in one process."""
    file = tmp_path_factory.mktemp("reference") / "references.pt"
    run_ranks(references, 1, [row.case for row in ROWS], WIDE_CASES, file, limit_s=LIMIT_S)
    return file


@pytest.fixture(scope="module")
def measured(reference: Path) -> Measured:
    return measure_all(RUNS, WIDE_RUNS, reference, EVERY, LIMIT_S)


def measure_all(
    runs: list[Run],
    wide_runs: list[Run],
    reference: Path,
    every: dict[int, int],
    limit_s: float,
) -> Measured:
    """All measures, one set of processes for each world size; the worst of all ranks."""
    found: dict[Run, tuple[Single, Free]] = {}
    wide: dict[Run, Wide] = {}
    for world in WORLDS:
        own, own_wide = ([run for run in each if run[1].world == world] for each in (runs, wide_runs))
        ranks = run_ranks(measure, world, own, own_wide, reference, every[world], limit_s=limit_s)
        for run, each in zip(own, zip(*(narrow for narrow, _ in ranks), strict=True), strict=True):
            found[run] = over_ranks([single for single, _ in each], [free for _, free in each])
        for run, each in zip(own_wide, zip(*(one for _, one in ranks), strict=True), strict=True):
            wide[run] = max(each, key=lambda one: one.weight)
    return found, wide


@pytest.mark.parametrize("run", RUNS, ids=described)
def test_a_layout_trains_what_one_process_trains(run, measured):
    """Measures (a) and (c)."""
    assert failures(*measured[0][run]) == []


@pytest.mark.parametrize("run", WIDE_RUNS, ids=described)
def test_in_float64_the_gradient_rule_gives_the_same_weights(run, measured):
    """Measure (b)."""
    worst = measured[1][run]
    assert worst.weight <= 1e-9, f"{worst.worst} is {worst.weight:.1e} off after {NUM_STEPS} steps"


def test_the_covering_set_is_small_and_has_every_pair_of_settings():
    assert len(ROWS) <= 40
    chosen = [row.case for row in ROWS]
    for one, other in itertools.combinations(FACTORS, 2):
        possible = {(getattr(case, one), getattr(case, other)) for case in possible_cases()}
        assert possible - {(getattr(case, one), getattr(case, other)) for case in chosen} == set(), (one, other)
    for name, values in FACTORS.items():
        met = {(getattr(case, name), layout.engine) for case, layout in RUNS}
        assert met == set(itertools.product(values, ("replicas", "zero 0", "zero 1", "zero 2"))), name
        shapes = {(getattr(case, name), layout.world, layout.expert_parallel) for case, layout in RUNS}
        assert len(shapes) == len(values) * 6, name
    assert {case.gate for case, _ in WIDE_RUNS} == set(GATES)


ONCE = Case(model="tutorial", samples="uneven", balanced=False)
ACCUMULATING = [Layout(2, 1, "replicas"), *(Layout(2, 2, f"zero {stage}") for stage in (0, 1, 2))]


def _check_accumulation(file: Path) -> list[Single]:
    reference = torch.load(file, weights_only=False)[ONCE]
    return [measure_single(replace(ONCE, accumulation=2), layout, reference, every=4) for layout in ACCUMULATING]


def test_two_micro_batches_train_what_one_trains_where_losses_are_linear_in_tokens(tmp_path: Path):
    run_ranks(references, 1, [ONCE], [], tmp_path / "references.pt")
    for singles in run_ranks(_check_accumulation, 2, tmp_path / "references.pt"):
        for layout, single in zip(ACCUMULATING, singles, strict=True):
            assert single.loss <= 1e-6, layout
            assert single.norm <= 1e-5, layout
            assert single.gradient <= LIMIT, f"{layout}: {single.worst}"


def full_product() -> list[Run]:
    """Every gate with every k and group in every layout, all else switched on."""
    cases = [
        case
        for case in possible_cases()
        if not (case.lopsided or case.shared)
        and (case.samples, case.optimizer, case.clipping, case.accumulation) == ("uneven", "adamw", True, 2)
        and case.balanced == (case.gate not in ("hash", "uniform"))
    ]
    return list(itertools.product(cases, LAYOUTS))


@pytest.mark.slow
@pytest.mark.parametrize("runs_of", [lambda: RUNS, full_product], ids=["covering_set", "full_product"])
def test_table(runs_of, tmp_path_factory):
    """At every state; writes a table to the log: ``pytest -m slow --log-cli-level=INFO -k covering_set``."""
    runs = runs_of()
    cases = list(dict.fromkeys(case for case, _ in runs))
    file = tmp_path_factory.mktemp("reference") / "references.pt"
    run_ranks(references, 1, cases, [], file, limit_s=7200.0)
    measured, _ = measure_all(runs, [], file, dict.fromkeys(WORLDS, 1), 4 * 7200.0)
    logger = logging.getLogger(__name__)
    logger.info("%d trainings in %d layouts", len(cases), len(LAYOUTS))
    logger.info("layout: worst loss (a), worst gradient (a), loss (c) of the first 3 steps, first changed choice")
    for layout in LAYOUTS:
        own = [found for (_, where), found in measured.items() if where == layout]
        logger.info(
            "%s: %.1e, %.1e, %.1e, %d",
            layout,
            max(single.loss for single, _ in own),
            max(single.gradient for single, _ in own),
            max(max(free.losses[:3]) for _, free in own),
            min(free.first_change for _, free in own),
        )
    broken = {described(run): failures(*found) for run, found in measured.items() if failures(*found)}
    assert broken == {}
