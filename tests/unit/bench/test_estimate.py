import pytest

from distmoe.bench.estimate import Estimate, estimate


@pytest.mark.parametrize(
    ("size", "rank"),
    # Ranks of the exact interval from tables of the sign test: coverage 0.969, 0.961, 0.965 and 0.959.
    [(6, 1), (9, 2), (15, 4), (20, 6)],
)
def test_interval_has_the_ranks_of_the_sign_test(size: int, rank: int):
    values = [float(value) for value in range(size, 0, -1)]
    assert estimate(values) == Estimate(median=(size + 1) / 2, low=float(rank), high=float(size + 1 - rank))


def test_outlier_moves_neither_median_nor_interval():
    assert estimate([1.0] * 14 + [1000.0]) == Estimate(1.0, 1.0, 1.0)


def test_too_few_measurements_are_refused():
    with pytest.raises(ValueError, match="5 measurements"):
        estimate([1.0] * 5)
