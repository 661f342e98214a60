from typing import Any

import pytest
import torch

from distmoe.parallel.agreement import Announcement, ExchangeMismatchError, check_agreement


def rows(operation: Any = "all-to-all", dtype=torch.float32, shape=(3, 4), send=(), receive=()) -> Announcement:
    return Announcement.of(operation, torch.empty(shape, dtype=dtype), send, receive)


@pytest.mark.parametrize(
    "announced",
    [
        rows(send=(3, 0), receive=(0, 7)),
        rows(shape=(0,), send=(0, 0), receive=(0, 0)),
        rows("all-reduce", torch.bfloat16, shape=()),
        rows("all-gather", torch.uint8, shape=(0, 2, 5)),
        rows("all-gather", torch.bool, shape=(1, 2, 3, 4, 5, 6, 7, 8, 9)),
    ],
)
def test_what_is_announced_arrives_as_equally_many_integers(announced: Announcement):
    numbers = announced.encoded(2)
    assert len(numbers) == 15
    assert Announcement.decoded(numbers, 2) == announced


TWO = [rows(shape=(3, 4), send=(1, 2), receive=(1, 5)), rows(shape=(9, 4), send=(5, 4), receive=(2, 4))]


def test_ranks_that_agree_go_on():
    check_agreement("expert-parallel", [4, 5], TWO)
    check_agreement("world", [0, 1], [rows("all-reduce"), rows("all-reduce")])


# by what differs: what three ranks announce, and what is said
DISAGREEMENTS = {
    "the operation": (
        [rows("all-reduce"), rows("all-gather"), rows("all-reduce")],
        "ranks 1, 3: all-reduce of float32, shape [3, 4]; rank 2: all-gather of float32, shape [3, 4]",
    ),
    "the dtype": (
        [rows("all-gather"), rows("all-gather"), rows("all-gather", torch.float64)],
        "ranks 1, 2: all-gather of float32, shape [3, 4]; rank 3: all-gather of float64, shape [3, 4]",
    ),
    "the shape of a sum": (
        [rows("all-reduce", shape=(2,)), rows("all-reduce", shape=()), rows("all-reduce", shape=(3,))],
        "rank 1: all-reduce of float32, shape [2]; rank 2: all-reduce of float32, shape []; "
        "rank 3: all-reduce of float32, shape [3]",
    ),
    "the shape of rows": (
        [
            rows(shape=(3, 4), send=(1, 1, 1), receive=(1, 1, 1)),
            rows(shape=(3, 5), send=(1, 1, 1), receive=(1, 1, 1)),
            rows(shape=(3, 4), send=(1, 1, 1), receive=(1, 1, 1)),
        ],
        "ranks 1, 3: all-to-all of float32, rows of shape [4]; rank 2: all-to-all of float32, rows of shape [5]",
    ),
    "the counts": (
        [
            rows(send=(1, 2, 0), receive=(1, 0, 1)),
            rows(send=(1, 1, 1), receive=(2, 1, 1)),
            rows(send=(1, 1, 1), receive=(1, 1, 1)),
        ],
        "rank 1 sends 0 rows to rank 3, which expects 1; rank 2 sends 1 rows to rank 1, which expects 0",
    ),
    "rows and counts": (
        [
            rows(send=(1, 1, 1), receive=(1, 1, 1)),
            rows(shape=(5, 4), send=(1, 1, 1), receive=(1, 1, 1)),
            rows(send=(1, 1, 1), receive=(1, 1, 1)),
        ],
        "rank 2 has 5 rows and sends 3",
    ),
}


@pytest.mark.parametrize("what", list(DISAGREEMENTS))
def test_ranks_that_disagree_are_told_who_announces_what(what: str):
    announced, message = DISAGREEMENTS[what]
    with pytest.raises(ExchangeMismatchError) as caught:
        check_agreement("expert-parallel", [1, 2, 3], announced)
    assert str(caught.value) == f"ranks of the expert-parallel group do not agree on their next exchange: {message}"
