"""What a spread layer is as an object: it can be copied."""

import copy

import torch
from torch import nn

from distmoe.moe.experts import MLPExperts
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.layer import MoELayer
from distmoe.parallel.collectives import Communicator, Communicators
from distmoe.parallel.expert_parallel import AllToAllDispatcher, expert_placement
from distmoe.parallel.mesh import Mesh


def test_a_copied_layer_has_weights_of_its_own_and_talks_to_the_same_processes():
    communicators = Communicators.over(Mesh(2, 1, 2), None, None, None, None, False, lambda what, size: None)
    placement = expert_placement(communicators)
    gate = TopKGate(nn.Linear(3, 4), 4, k=2)
    layer = MoELayer(gate, MLPExperts(placement.local_experts(4), 3, 5), placement)
    copied = copy.deepcopy(layer)
    assert isinstance(copied.dispatcher, AllToAllDispatcher)
    assert copied.dispatcher.group is communicators.expert_parallel
    assert copied.gate.reducer.communicator is communicators.world
    with torch.no_grad():
        layer.experts.w1.zero_()
    assert bool((copied.experts.w1 != 0).all())


def test_a_group_of_one_needs_no_processes():
    alone = Communicator([3], 3)
    rows = torch.arange(4.0)
    assert alone.exchange(rows, [4], [4]).tolist() == rows.tolist()
    assert alone.gather(rows).tolist() == rows.tolist()
