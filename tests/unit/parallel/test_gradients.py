"""The gradient rule without other processes: groups that say what was summed."""

import torch
from torch import Tensor, nn

from distmoe.parallel.collectives import Communicator, Communicators
from distmoe.parallel.gradients import reduce_gradients
from distmoe.parallel.mesh import Mesh


class Times(Communicator):
    """Sums as if all members had this one's values, and notes what travels."""

    def __init__(self, ranks: range) -> None:
        super().__init__(ranks, 0)
        self.travelled: list[tuple[torch.dtype, int]] = []

    def sum_(self, tensor: Tensor) -> Tensor:
        self.travelled.append((tensor.dtype, tensor.numel()))
        return tensor.mul_(self.size)


def test_gradients_of_a_group_and_a_dtype_travel_together_and_come_back_each_in_its_place():
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 2, bias=False, dtype=torch.float64), nn.Linear(1, 2)])
    first, half, expert = model
    for start, parameter in ((0, first.weight), (6, first.bias), (8, half.weight), (12, expert.weight)):
        values = torch.arange(start, start + parameter.numel(), dtype=parameter.dtype)
        parameter.grad = values.view(parameter.shape[::-1]).t() if parameter.dim() == 2 else values
    # Eight ranks, four replicas of the expert, whose bias has no gradient.
    world, replicas = Times(range(8)), Times(range(0, 8, 2))
    groups = Communicators(Mesh(8, 0, 2), world, Times(range(2)), replicas)
    reduce_gradients(model, groups, experts=expert.parameters())
    assert world.travelled == [(torch.float32, 8), (torch.float64, 4)]
    assert replicas.travelled == [(torch.float32, 4)]
    # 8 / 8 for what all hold, 4 / 8 for the expert.
    assert first.weight.grad.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert first.bias.grad.tolist() == [6, 7]
    assert half.weight.grad.tolist() == [[8, 10], [9, 11]]
    assert expert.weight.grad.tolist() == [[6.0], [6.5]]
    assert expert.bias.grad.tolist() == [0, 0]


def test_nothing_travels_in_a_group_of_one():
    model = nn.Linear(2, 1)
    world, replicas = Times(range(2)), Times(range(1))
    model.weight.grad, model.bias.grad = torch.tensor([[4.0, 6.0]]), torch.tensor([2.0])
    reduce_gradients(model, Communicators(Mesh(2, 0, 2), world, Times(range(2)), replicas), experts=[model.weight])
    assert (model.weight.grad.tolist(), model.bias.grad.tolist()) == ([[2.0, 3.0]], [2.0])
    assert replicas.travelled == []
