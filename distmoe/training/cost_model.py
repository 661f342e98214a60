"""What a training step will cost on given hardware: time and memory of a rank, for each way to spread the experts.

Pure arithmetic, after the alpha-beta model: a message costs a latency and its bytes by a bandwidth. The load is even,
ranks work in lock step, and nothing overlaps, so that times are on the safe side. See :func:`predict`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from distmoe.parallel.mesh import common_divisors

# float32: weights, gradients and moments, with autocast as well.
_WIDE_BYTES = 4
# A value kept for the backward pass is written, read by the next operation, read again backward; its gradient is
# written and read.
_PASSES_OF_ACTIVATIONS = 5
# A weight is read forward and backward, its gradient written.
_PASSES_OF_WEIGHTS = 3
# The backward pass of a product is two products.
_FORWARD_AND_BACKWARD = 3
# Of the memory of a device; the rest is for the allocator, the libraries and what the model leaves out.
USABLE_MEMORY = 0.9


@dataclass(frozen=True)
class Link:
    """How ranks reach each other.

    Attributes:
        bandwidth: Bytes/s that a rank sends, and receives at the same time.
        latency_s: Of one message.
    """

    bandwidth: float
    latency_s: float


@dataclass(frozen=True)
class Machine:
    """The hardware of one rank, as far as software gets out of it.

    Attributes:
        name: For tables.
        flops: Floating-point operations/s in matrix products.
        memory_bandwidth: Bytes/s.
        memory_bytes: Of its device.
        inside: To ranks on the same host.
        between: To ranks on other hosts.
        launch_s: Of one operation, however small, from Python to the device.
    """

    name: str
    flops: float
    memory_bandwidth: float
    memory_bytes: float
    inside: Link
    between: Link
    launch_s: float = 0.0


@dataclass(frozen=True)
class MixtureWork:
    """One MoE layer.

    Attributes:
        num_experts: E.
        tokens: Of one sample.
        k: Experts of a token.
        values_in: Of a token on its way to an expert.
        values_out: Of what an expert says of it.
        expert_parameters: Of one expert.
        expert_flops: Forward pass of one token through one expert.
    """

    num_experts: int
    tokens: float
    k: float
    values_in: int
    values_out: int
    expert_parameters: int
    expert_flops: float


@dataclass(frozen=True)
class Workload:
    """A model.

    Attributes:
        dense_parameters: All but the experts'.
        dense_flops: Forward pass of one sample, the experts aside.
        activation_values: Numbers kept for the backward pass of one sample, the experts' included.
        mixtures: Its MoE layers.
        operations: Launched in one forward pass, of any number of samples.
    """

    dense_parameters: int
    dense_flops: float
    activation_values: float
    mixtures: tuple[MixtureWork, ...] = ()
    operations: int = 0


@dataclass(frozen=True)
class Training:
    """One optimizer step.

    Attributes:
        samples: Of all ranks and micro-batches.
        accumulation: Micro-batches.
        moments: Numbers that the optimizer keeps of a parameter: 2 for AdamW, 1 for momentum, 0 for plain descent.
        value_bytes: Of a number in products and exchanges: 4, or 2 in half precision.
        zero_stage: What is spread over the ranks that hold the same parameter: 0 nothing, 1 moments, 2 gradients too.
        updates: Whether the optimizer's pass over the parameters counts.
    """

    samples: float
    accumulation: int = 1
    moments: int = 2
    value_bytes: int = 4
    zero_stage: int = 0
    updates: bool = True


@dataclass(frozen=True)
class Layout:
    """Who is where; neighbours share a host and a copy of the experts.

    Attributes:
        world_size: Number of ranks.
        ranks_per_host: On one host.
        expert_parallel_size: Ranks that share one copy of the experts.
    """

    world_size: int
    ranks_per_host: int
    expert_parallel_size: int = 1

    @property
    def num_replicas(self) -> int:
        """Copies of the experts."""
        return self.world_size // self.expert_parallel_size

    def peers(self) -> tuple[int, int]:
        """Other ranks that share the experts: on the same host, and on others; for the rank with fewest on its own."""
        size, per_host = self.expert_parallel_size, self.ranks_per_host
        fewest = size
        for first in range(0, min(self.world_size, math.lcm(size, per_host)), size):
            hosts = Counter(rank // per_host for rank in range(first, first + size))
            fewest = min(fewest, *hosts.values())
        return fewest - 1, size - fewest


@dataclass(frozen=True)
class Prediction:
    """Of one rank and one optimizer step.

    Attributes:
        layout: Of what.
        compute_s: Products and passes over memory.
        exchange_s: All-to-all of tokens, forward and backward.
        reduction_s: Sums of gradients over ranks.
        exchanged_bytes: That leave the rank in all-to-all.
        parameter_bytes: Weights.
        gradient_bytes: Gradients.
        optimizer_bytes: Moments, and the copy of the weights that ZeRO keeps of its share.
        activation_bytes: Kept for the backward pass, and the copies of weights in half precision.
        buffer_bytes: Rows on their way in the largest MoE layer.
    """

    layout: Layout
    compute_s: float
    exchange_s: float
    reduction_s: float
    exchanged_bytes: float
    parameter_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    buffer_bytes: float

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.compute_s + self.exchange_s + self.reduction_s

    @property
    def memory_bytes(self) -> float:
        """At the peak."""
        return (
            self.parameter_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.activation_bytes
            + self.buffer_bytes
        )

    def fits(self, machine: Machine) -> bool:
        """Whether a rank's device has room for it."""
        return self.memory_bytes <= USABLE_MEMORY * machine.memory_bytes


def predict(workload: Workload, training: Training, layout: Layout, machine: Machine) -> Prediction:
    """Time and memory of a rank.

    Compute: three times the forward pass's operations by the machine's rate, and the bytes of weights, moments and
    activations by its memory bandwidth; or the launches of as many operations, where that takes longer. All-to-all:
    dispatch and combine, forward and backward, of what leaves the rank, see :func:`exchange_bytes`; ranks on the same
    host and on others are reached at the same time. Gradients: a ring all-reduce of the dense ones over all ranks, of
    the experts' over their replicas; ZeRO's reduce-scatter and all-gather move as much.

    Raises:
        ValueError: The layout cannot be.
    """
    size, world = layout.expert_parallel_size, layout.world_size
    if world % size or any(mixture.num_experts % size for mixture in workload.mixtures):
        raise ValueError(f"expert-parallel size {size} does not divide {world} ranks and the experts")
    samples = training.samples / world  # of a rank
    experts = sum(mixture.num_experts * mixture.expert_parameters for mixture in workload.mixtures) / size
    holders = ((workload.dense_parameters, world), (experts, layout.num_replicas))
    parameters = sum(count for count, _ in holders)
    optimized = sum(count / (ranks if training.zero_stage else 1) for count, ranks in holders)
    graded = sum(count / (ranks if training.zero_stage == 2 else 1) for count, ranks in holders)

    flops = workload.dense_flops + sum(one.tokens * one.k * one.expert_flops for one in workload.mixtures)
    kept_values = workload.activation_values * samples
    traffic = _PASSES_OF_ACTIVATIONS * training.value_bytes * kept_values
    traffic += _PASSES_OF_WEIGHTS * _WIDE_BYTES * parameters * training.accumulation
    if training.updates:  # reads weights, gradients and moments, writes weights and moments
        traffic += (3 + 2 * training.moments) * _WIDE_BYTES * optimized
    compute_s = _FORWARD_AND_BACKWARD * flops * samples / machine.flops + traffic / machine.memory_bandwidth
    launches_s = _FORWARD_AND_BACKWARD * training.accumulation * workload.operations * machine.launch_s

    exchange_s, exchanged, in_flight = 0.0, 0.0, 0.0
    for mixture in workload.mixtures:
        tokens = mixture.tokens * samples / training.accumulation
        there, back = exchange_bytes(mixture, tokens, size, training.value_bytes)
        counts = 8.0 * (mixture.num_experts + size) * (size - 1)
        messages = [counts, there, back, there, back]  # the counts, then rows forward and backward
        exchange_s += training.accumulation * sum(all_to_all_s(each, layout, machine) for each in messages)
        exchanged += training.accumulation * sum(messages)
        in_flight = max(in_flight, 2 * (there + back))  # sent and received
    # All ranks, and the replicas of an expert as well, reach from the first host to the last.
    link = machine.inside if world <= layout.ranks_per_host else machine.between
    reduction_s = sum(all_reduce_s(_WIDE_BYTES * count, ranks, link) for count, ranks in holders)
    half_copies = training.value_bytes * parameters if training.value_bytes < _WIDE_BYTES else 0.0
    return Prediction(
        layout=layout,
        compute_s=max(compute_s, launches_s),
        exchange_s=exchange_s,
        reduction_s=reduction_s,
        exchanged_bytes=exchanged,
        parameter_bytes=_WIDE_BYTES * parameters,
        gradient_bytes=_WIDE_BYTES * graded,
        optimizer_bytes=_WIDE_BYTES * optimized * (training.moments + (training.zero_stage > 0)),
        activation_bytes=training.value_bytes * kept_values / training.accumulation + half_copies,
        buffer_bytes=in_flight,
    )


def ranks_reached(num_experts: int, k: float, size: int) -> float:
    """Expected number of *other* ranks that hold some of a token's k distinct experts, each as likely as any.

    A rank with L = E / size of them has none with probability C(E - L, k) / C(E, k). A broken k, as of expert choice,
    is between its neighbours.
    """
    low = math.floor(k)
    if k != low:
        above = ranks_reached(num_experts, low + 1, size)
        return (low + 1 - k) * ranks_reached(num_experts, low, size) + (k - low) * above
    missed = math.comb(num_experts - num_experts // size, low) / math.comb(num_experts, low)
    return (size - 1) * (1.0 - missed)


def exchange_bytes(mixture: MixtureWork, tokens: float, size: int, value_bytes: int) -> tuple[float, float]:
    """Bytes that leave a rank on the way to the experts, and on the way back.

    A token travels once to each rank. On the way back, either what a rank's experts say of it is added up and travels
    once, in float32, or each expert's output travels: the dispatcher takes what is less.
    """
    pairs = tokens * ranks_reached(mixture.num_experts, mixture.k, size)
    assignments = tokens * mixture.k * (size - 1) / size
    back = mixture.values_out * min(pairs * _WIDE_BYTES, assignments * value_bytes)
    return mixture.values_in * pairs * value_bytes, back


def all_to_all_s(num_bytes: float, layout: Layout, machine: Machine) -> float:
    """Seconds until a rank has sent that many bytes, evenly, to the others that share its experts."""
    near, far = layout.peers()
    if near + far == 0:
        return 0.0
    each = num_bytes / (near + far)
    return max(
        near * (machine.inside.latency_s + each / machine.inside.bandwidth),
        far * (machine.between.latency_s + each / machine.between.bandwidth),
    )


def all_reduce_s(num_bytes: float, ranks: int, link: Link) -> float:
    """Seconds of a sum over ranks: the bytes of a ring, the messages of a tree up and down, as libraries choose."""
    if ranks == 1 or num_bytes == 0:
        return 0.0
    return 2 * (ranks - 1) / ranks * num_bytes / link.bandwidth + 2 * math.ceil(math.log2(ranks)) * link.latency_s


def allowed_sizes(workload: Workload, world_size: int) -> list[int]:
    """Expert-parallel sizes that divide the ranks and the experts of every layer, ascending; of a dense model: 1."""
    experts = [mixture.num_experts for mixture in workload.mixtures]
    return common_divisors(world_size, math.gcd(*experts)) if experts else [1]


def recommended(predictions: Sequence[Prediction], machine: Machine) -> Prediction | None:
    """The one with the smallest expert-parallel size that fits; None if none does."""
    fitting = [prediction for prediction in predictions if prediction.fits(machine)]
    return min(fitting, key=lambda prediction: prediction.layout.expert_parallel_size, default=None)
