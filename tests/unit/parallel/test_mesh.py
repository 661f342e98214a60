import re

import pytest

from distmoe.contracts import UserError
from distmoe.parallel.mesh import Mesh, choose_mesh, common_divisors, divisors

# world, expert-parallel size -> by rank: expert rank, replica, ranks of its replica, ranks with its experts, which of 8
TABLES = {
    (1, 1): [(0, 0, [0], [0], [0, 1, 2, 3, 4, 5, 6, 7])],
    (2, 1): [
        (0, 0, [0], [0, 1], [0, 1, 2, 3, 4, 5, 6, 7]),
        (0, 1, [1], [0, 1], [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
    (4, 2): [
        (0, 0, [0, 1], [0, 2], [0, 1, 2, 3]),
        (1, 0, [0, 1], [1, 3], [4, 5, 6, 7]),
        (0, 1, [2, 3], [0, 2], [0, 1, 2, 3]),
        (1, 1, [2, 3], [1, 3], [4, 5, 6, 7]),
    ],
    (4, 4): [
        (0, 0, [0, 1, 2, 3], [0], [0, 1]),
        (1, 0, [0, 1, 2, 3], [1], [2, 3]),
        (2, 0, [0, 1, 2, 3], [2], [4, 5]),
        (3, 0, [0, 1, 2, 3], [3], [6, 7]),
    ],
    (6, 2): [
        (0, 0, [0, 1], [0, 2, 4], [0, 1, 2, 3]),
        (1, 0, [0, 1], [1, 3, 5], [4, 5, 6, 7]),
        (0, 1, [2, 3], [0, 2, 4], [0, 1, 2, 3]),
        (1, 1, [2, 3], [1, 3, 5], [4, 5, 6, 7]),
        (0, 2, [4, 5], [0, 2, 4], [0, 1, 2, 3]),
        (1, 2, [4, 5], [1, 3, 5], [4, 5, 6, 7]),
    ],
}


@pytest.mark.parametrize(("world_size", "size"), list(TABLES))
def test_who_is_where(world_size: int, size: int):
    for rank, (expert_rank, replica, neighbours, replicas, experts) in enumerate(TABLES[world_size, size]):
        mesh = Mesh(world_size, rank, size)
        assert (mesh.expert_rank, mesh.replica, mesh.num_replicas) == (expert_rank, replica, world_size // size)
        assert list(mesh.expert_parallel_ranks) == neighbours
        assert list(mesh.expert_replica_ranks) == replicas
        assert list(mesh.local_experts(8)) == experts
        assert Mesh(world_size, 0, size).at(rank) == mesh


def test_the_default_is_one_process_with_everything():
    assert list(Mesh().local_experts(3)) == [0, 1, 2]


BAD_MESHES = {
    (0, 0, 1): "rank 0 is not in a world of 0",
    (4, 4, 1): "rank 4 is not in a world of 4",
    (4, -1, 1): "rank -1 is not in a world of 4",
    (6, 0, 4): "the expert-parallel size (4) must be one of [1, 2, 3, 6], the divisors of the 6 processes",
    (4, 0, 0): "the expert-parallel size (0) must be one of [1, 2, 4], the divisors of the 4 processes",
    (4, 0, 8): "the expert-parallel size (8) must be one of [1, 2, 4], the divisors of the 4 processes",
}


@pytest.mark.parametrize("sizes", list(BAD_MESHES))
def test_a_mesh_that_cannot_be_is_refused(sizes: tuple[int, int, int]):
    with pytest.raises(ValueError, match=f"^{re.escape(BAD_MESHES[sizes])}$"):
        Mesh(*sizes)


def test_experts_that_cannot_be_spread_evenly_are_refused():
    with pytest.raises(ValueError, match=r"^6 experts cannot be spread evenly over 4 ranks: allowed are \[1, 2\]$"):
        Mesh(4, 0, 4).local_experts(6)


# world, ranks of a host, size, experts -> expert-parallel size
CHOICES = {
    (1, 1, "auto", 8): 1,
    (4, 4, "auto", 8): 4,
    (4, 4, "auto", 6): 2,
    (4, 4, "auto", 5): 1,
    (16, 8, "auto", 64): 8,  # the 64 experts would go over both hosts
    (6, 4, "auto", 12): 2,  # hosts of 4 and 2: groups of 2 lie inside one
    (12, 6, "auto", 8): 2,
    (4, 4, "auto", None): 1,
    (4, 4, 1, None): 1,
    (4, 4, 1, 8): 1,
    (4, 4, 2, 8): 2,
    (16, 8, 16, 64): 16,  # said so, it may leave a host
}


@pytest.mark.parametrize("given", list(CHOICES))
def test_the_chosen_size(given: tuple):
    world_size, ranks_per_host, size, num_experts = given
    last = world_size - 1
    assert choose_mesh(world_size, last, ranks_per_host, size, num_experts) == Mesh(world_size, last, CHOICES[given])


BAD_CHOICES = {
    (4, 2, None): "parallel.expert_parallel_size (2) must be 1 or auto for a model without experts",
    (4, 3, 8): (
        "parallel.expert_parallel_size (3) must divide the number of processes (4) and moe.num_experts (8): "
        "set it to 1 or 2 or 4, or auto"
    ),
    (4, 4, 6): (
        "parallel.expert_parallel_size (4) must divide the number of processes (4) and moe.num_experts (6): "
        "set it to 1 or 2, or auto"
    ),
    (1, 2, 8): (
        "parallel.expert_parallel_size (2) must divide the number of processes (1) and moe.num_experts (8): "
        "set it to 1, or auto"
    ),
}


@pytest.mark.parametrize("given", list(BAD_CHOICES))
def test_a_size_that_does_not_fit_is_an_error_that_lists_what_does(given: tuple):
    world_size, size, num_experts = given
    with pytest.raises(UserError, match=f"^{re.escape(BAD_CHOICES[given])}$"):
        choose_mesh(world_size, 0, world_size, size, num_experts)


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert common_divisors(12, 8) == [1, 2, 4]
