"""DeepSpeed's MoE layer as a candidate of ``bench scaling``."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from distmoe.bench.layer_candidates import Problem
from distmoe.bench.layer_deepspeed import dropless_moe
from distmoe.bench.scaling_candidates import Candidate, Watch
from distmoe.parallel.mesh import Mesh


def deepspeed_moe(problem: Problem, mesh: Mesh, watch: Watch) -> Candidate:
    """``deepspeed.moe.layer.MoE`` with its experts spread over the mesh. Collective."""
    layer = dropless_moe(problem, mesh.expert_parallel_size)
    gate, experts = layer.deepspeed_moe.gate.wg, list(layer.deepspeed_moe.experts.deepspeed_experts)
    if mesh.expert_parallel_size > 1:
        _open_communication()
        with redirect_stdout(io.StringIO()):  # it prints that it makes a group
            layer.set_deepspeed_parallelism()

    def forward(x: Tensor) -> Tensor:
        output: Tensor = layer(x)[0]
        return output

    def first_weights() -> Tensor:
        return torch.stack([expert[0].weight.grad.T for expert in experts])

    parameters = [parameter for expert in experts for parameter in expert.parameters()]
    return Candidate(layer, forward, parameters, first_weights, gate.weight, watch)


@contextmanager
def watched(watch: Watch, size: int) -> Iterator[None]:
    """Inside, DeepSpeed's exchanges are noted in ``watch``: the rows, and the agreement on their number.

    Of the rows, which are padded to equally many for each of the ``size`` ranks of a group, one share stays here.
    """
    originals = {"all_to_all_single": comm.all_to_all_single, "all_reduce": comm.all_reduce}

    def noted(name: str) -> Callable[..., Any]:
        what = "all-to-all" if name == "all_to_all_single" else "all-reduce"

        def exchange(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            with watch(f"{what} in expert-parallel group", tensor.nbytes * (size - 1) // size):
                return originals[name](tensor, *args, **kwargs)

        return exchange

    for name in originals:
        setattr(comm, name, noted(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(comm, name, original)


def _open_communication() -> None:
    """Lets DeepSpeed use the process group that is there."""
    if not comm.is_initialized():
        # It would compile an all-reduce over shared memory, for which nothing here has a use.
        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is not None:
            deepspeed.ops.__compatible_ops__[builder.NAME] = False
        comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
