import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.moe.groups import RoutingGroups, check_groups, expert_capacity
from tests.oracles import groups_of_rows
from tests.unit.moe.gate_forms import context, tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("group", "group_rows", "sizes"),
    [
        ("image", 3, [3, 3, 3, 3, 3]),
        (1, 3, [3, 3, 3, 3, 3]),
        (2, 6, [6, 6, 3]),
        (7, 21, [15]),
        ("batch", 15, [15]),
    ],
)
def test_groups_are_cut_in_sample_order(group, group_rows, sizes):
    groups = RoutingGroups.of(15, context(15, rows_per_sample=3), group)
    assert (groups.group_rows, groups.num_groups) == (group_rows, len(sizes))
    assert groups.ids(CPU).tolist() == [number for number, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("group", ["image", 2, "batch"])
def test_no_rows_are_no_groups(group):
    groups = RoutingGroups.of(0, context(0, rows_per_sample=3), group)
    assert (groups.num_groups, groups.ids(CPU).tolist()) == (0, [])
    assert groups.capacities(1.25, 2, 4, CPU).tolist() == []
    folded = groups.fold(torch.zeros(0, 4), fill=-1.0)
    assert folded.shape == (0, groups.group_rows, 4)
    assert groups.unfold(folded).shape == (0, 4)


@given(
    num_rows=st.integers(0, 12),
    group_rows=st.integers(1, 5),
    trailing=st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 3)]),
    strided=st.booleans(),
)
@settings(deadline=None, max_examples=80, derandomize=True)
def test_folding_fills_up_the_last_group_and_unfolding_takes_the_filling_away(num_rows, group_rows, trailing, strided):
    groups = RoutingGroups(num_rows, group_rows)
    x = tokens(num_rows, *trailing, 2)[..., 0] if strided else tokens(num_rows, *trailing)
    folded = groups.fold(x, fill=-7.0)
    expected = [[x[row] for row in rows] for rows in groups_of_rows(num_rows, group_rows)]
    assert len(folded) == len(expected)
    for group, rows in zip(folded, expected, strict=True):
        filling = [torch.full(trailing, -7.0)] * (group_rows - len(rows))
        assert torch.equal(group, torch.stack(rows + filling))
    assert torch.equal(groups.unfold(folded), x)


def test_what_is_no_group_is_refused():
    for group in (0, -1, "images", 1.5, True, None):
        with pytest.raises(ValueError, match=rf"group \({group!r}\) must be image, batch, or a number of images"):
            RoutingGroups.of(4, context(4), group)


@pytest.mark.parametrize(
    ("group", "samples_per_rank", "world_size"),
    [("image", 7, 4), ("batch", 7, 4), (1, 7, 4), (7, 7, 4), (4, 12, 2), (5, 12, 1), (100, 12, 1)],
)
def test_groups_that_lie_on_one_rank_each_are_fine(group, samples_per_rank, world_size):
    check_groups(group, samples_per_rank, world_size)


@pytest.mark.parametrize(
    ("group", "samples_per_rank", "world_size", "allowed"),
    [(5, 12, 2, "1, 2, 3, 4, 6, 12"), (24, 12, 2, "1, 2, 3, 4, 6, 12"), (2, 7, 4, "1, 7")],
)
def test_groups_over_several_ranks_are_refused_with_what_is_allowed(group, samples_per_rank, world_size, allowed):
    expected = (
        rf"^group \({group}\) must divide the {samples_per_rank} images that each of {world_size} processes has of a "
        rf"micro-batch: set it to {allowed}, image or batch$"
    )
    with pytest.raises(ValueError, match=expected):
        check_groups(group, samples_per_rank, world_size)


def test_what_is_no_group_is_none_over_ranks_either():
    with pytest.raises(ValueError, match=r"group \(0\) must be image, batch, or a number of images"):
        check_groups(0, 4, 2)


@pytest.mark.parametrize(
    ("factor", "k", "rows", "num_experts", "expected"),
    [
        (1.0, 1, 8, 4, 2),
        (1.25, 2, 8, 4, 5),
        (1.1, 1, 10, 4, 3),  # 2.75
        (0.1, 1, 10, 4, 1),  # a quarter of a row
        (1e-7, 1, 10, 4, 1),
        (1e300, 1, 10, 4, 10),  # no row twice
        (4.0, 2, 10, 4, 10),
        (1.1, 3, 10, 3, 10),  # 11 are more than there are
        (1.1, 1, 10, 1, 10),
        (0.7, 1, 10, 7, 1),  # exactly 1: in floating point 0.7 * 10 / 7 may be above it
        (1, 2, 6, 3, 4),
        (1.1, 1, 50, 5, 11),  # exactly 11: in floating point 1.1 * 50 / 5 is above it
        (1.1, 2, 25, 5, 11),
    ],
)
def test_capacity_is_the_even_share_times_the_factor_rounded_up(factor, k, rows, num_experts, expected):
    assert expert_capacity(factor, k, rows, num_experts) == expected


@pytest.mark.parametrize(
    ("num_rows", "group_rows", "expected"),
    [(150, 50, [11, 11, 11]), (125, 50, [11, 11, 6]), (101, 50, [11, 11, 1]), (30, 50, [7]), (0, 50, [])],
)
def test_every_group_has_the_capacity_of_its_rows(num_rows, group_rows, expected):
    # 1.1 / 5 of 50, 25, 1 and 30 rows: 11, 5.5, 0.22 and 6.6, rounded up.
    capacities = RoutingGroups(num_rows, group_rows).capacities(1.1, 1, 5, CPU)
    assert (capacities.tolist(), capacities.dtype) == (expected, torch.int64)


@given(num_rows=st.integers(0, 40), group_rows=st.integers(1, 9), k=st.integers(1, 3), num_experts=st.integers(1, 7))
@settings(deadline=None, max_examples=80, derandomize=True)
def test_capacities_are_those_of_each_group_alone(num_rows, group_rows, k, num_experts):
    sizes = [len(rows) for rows in groups_of_rows(num_rows, group_rows)]
    expected = [min(math.ceil(Fraction(7 * k * size, 10 * num_experts)), size) for size in sizes]
    assert RoutingGroups(num_rows, group_rows).capacities(0.7, k, num_experts, CPU).tolist() == expected


@given(hundredths=st.integers(1, 500), k=st.integers(1, 8), rows=st.integers(1, 300), num_experts=st.integers(1, 64))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_capacity_reads_the_factor_as_the_decimal_it_is_written_as(hundredths, k, rows, num_experts):
    share = Fraction(hundredths * k * rows, 100 * num_experts)
    assert expert_capacity(hundredths / 100, k, rows, num_experts) == min(math.ceil(share), rows)
