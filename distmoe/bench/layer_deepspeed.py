"""DeepSpeed's MoE layer as a candidate of ``bench layer``."""

from deepspeed.moe.layer import MoE
from torch import nn

from distmoe.bench.layer_candidates import Candidate, Problem, Shape, gate_network, separate_experts


def deepspeed_moe(problem: Problem) -> Candidate:
    """:func:`dropless_moe` on one process."""
    layer = dropless_moe(problem)
    return Candidate(layer, lambda x: layer(x)[0])


def dropless_moe(problem: Problem, expert_parallel_size: int = 1) -> MoE:
    """``deepspeed.moe.layer.MoE``: dropless, without noise, with the problem's weights of this rank's experts."""
    shape = problem.shape
    layer = MoE(
        shape.width,
        expert=nn.Identity(),  # copied for each expert; the copies are replaced below
        num_experts=shape.num_experts,
        ep_size=expert_parallel_size,
        k=shape.k,
        min_capacity=0,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    layer.deepspeed_moe.gate.wg = gate_network(problem)
    layer.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(separate_experts(problem))
    return layer


def deepspeed_bytes(shape: Shape) -> int:
    """Bytes that a step will take at least: DeepSpeed pads every expert to the rows of the fullest one.

    Three tensors of the padded rows' width and four of their hidden width, in float32: what goes into the experts, what
    comes out, its concatenation; the hidden layer before and after its activation, and their gradients.
    """
    padded_rows = shape.num_experts * shape.most_rows
    return 4 * padded_rows * (3 * shape.width + 4 * shape.hidden)
