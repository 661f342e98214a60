"""Who writes what of tensors that several ranks hold."""

import pytest
import torch

from distmoe.parallel.mesh import Mesh
from distmoe.parallel.shards import LEAST_SHARED_BYTES, Extent, Piece, owned_piece

WORLD = 4


def pieces_of_all(name: str, tensor: torch.Tensor, value: torch.Tensor | None = None) -> list[Piece | None]:
    """What each rank writes of a tensor that all hold."""
    extent = Extent(tensor, tensor.shape, 0, of_expert=False)
    return [owned_piece("weight", name, extent, Mesh(WORLD, rank, 1), value) for rank in range(WORLD)]


def test_large_tensor_is_shared_evenly():
    rows = LEAST_SHARED_BYTES // 4 // 8
    tensor = torch.arange(8.0 * rows).view(rows, 8)
    pieces = pieces_of_all("w", tensor)
    assert [(one.start, one.values.numel()) for one in pieces] == [(rank * 2 * rows, 2 * rows) for rank in range(WORLD)]
    assert torch.equal(torch.cat([one.values for one in pieces]), tensor.flatten())


SMALL = {"just too small": torch.zeros(LEAST_SHARED_BYTES // 4 - 1), "scalar": torch.tensor(3.0), "byte": torch.ones(1)}


@pytest.mark.parametrize("case", SMALL)
def test_small_tensors_are_written_whole_and_every_rank_has_its_turn(case):
    tensor, turns = SMALL[case], [0] * WORLD
    for number in range(200):
        pieces = pieces_of_all(f"blocks.{number}.bias", tensor)
        ((writer, piece),) = [(rank, one) for rank, one in enumerate(pieces) if one is not None]
        assert (piece.start, piece.shape) == (0, tensor.shape)
        assert torch.equal(piece.values, tensor.flatten())
        turns[writer] += 1
    assert min(turns) > 25  # of 50 on average


def test_one_number_for_a_tensor_is_written_once_whichever_rank_begins_with_it():
    tensor = torch.zeros(6, 2)
    for name in ("a", "b", "c", "d", "e"):
        extents = [Extent(tensor, torch.Size([12, 2]), 12 * (rank % 2), of_expert=True) for rank in range(WORLD)]
        pieces = [
            owned_piece("moment:step", name, extent, Mesh(WORLD, rank, 2), torch.tensor(7.0))
            for rank, extent in enumerate(extents)
        ]
        ((rank, piece),) = [(rank, one) for rank, one in enumerate(pieces) if one is not None]
        assert rank in (0, 2)  # which hold the first experts
        assert (piece.shape, piece.start, piece.values.tolist()) == (torch.Size([]), 0, [7.0])


def test_tensor_without_elements_is_written_once():
    pieces = pieces_of_all("w", torch.zeros(0, 3))
    assert [one is not None for one in pieces] == [True, False, False, False]
