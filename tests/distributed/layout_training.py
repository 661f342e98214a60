"""A small training in any layout, step by step, under the real engines or in a plain loop in float64."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmoe.config import RunConfig
from distmoe.contracts import Batch, Context
from distmoe.data.index_plan import IndexPlan
from distmoe.models import build_model
from distmoe.models.convnet import PositionFFN
from distmoe.models.protocol import Model, ModelOutput, Network
from distmoe.moe.gates.cosine import CosineGate
from distmoe.moe.growing import FrozenExperts
from distmoe.moe.losses import build_losses
from distmoe.parallel.batch_norm import share_batch_statistics
from distmoe.parallel.collectives import Communicators, SumReducer
from distmoe.parallel.engines import build_engine
from distmoe.parallel.engines.protocol import BuildOptimizer, BuildSchedule, Engine
from distmoe.parallel.expert_parallel import expert_placement
from distmoe.parallel.gradients import clip_gradients, reduce_gradients
from distmoe.parallel.mesh import Mesh
from distmoe.parallel.shards import BUFFER, WEIGHT, TensorSource, buffer_extents, load_extents, parameter_extents
from distmoe.training.optim import build_optimizer
from distmoe.training.schedule import build_schedule
from distmoe.training.step import MicroBatch, Mixtures, StepResult, train_step
from tests.distributed.layout_cases import BATCH_SIZE, LAST_SIZES, SPEC, Case, Layout

NUM_STEPS = 20
Tensors = dict[str, Tensor]


class Memory:
    """Whole tensors as a :class:`distmoe.parallel.shards.TensorSource`."""

    def __init__(self, tensors: dict[str, Tensors]) -> None:
        self.tensors = tensors

    def kinds(self) -> list[str]:
        return sorted(self.tensors)

    def names(self, kind: str) -> list[str]:
        return sorted(self.tensors.get(kind, {}))

    def shape(self, kind: str, name: str) -> torch.Size:
        return self.tensors[kind][name].shape

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        return self.tensors[kind][name].reshape(-1)[start : start + length]


class LoopEngine:
    """The gradient rule in a plain loop; everything in float64."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.world_size = mesh.world_size
        self.communicators = Communicators.of(mesh)
        self.reducer = SumReducer(self.communicators.world)
        self.placement = expert_placement(self.communicators)
        self._clip_norm = config.train.clip_norm

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer, build_schedule: BuildSchedule) -> Model:
        self._module = model.double()
        self._optimizer = build_optimizer(model)
        del build_schedule  # constant
        return model

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        del last
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> Tensor:
        reduce_gradients(self._module, self.communicators)
        norm = clip_gradients(self._module, self.communicators, self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def load(self, source: TensorSource, steps_done: int) -> None:
        """Of weights only."""
        del steps_done
        load_extents(source, WEIGHT, parameter_extents(self._module, self.communicators.mesh))

    def close(self) -> None:
        self._optimizer.zero_grad()


class Watched:
    """A model that remembers which tokens went to which experts."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._choices: list[Tensor] = []
        self.loads: list[Tensor] = []

    def __call__(self, images: Tensor, context: Context) -> ModelOutput:
        output = self._model(images, context)
        for routing in output.routings.values():
            if routing.mixing is None:  # slots go to experts by their number alone
                rows, per_sample = routing.row_ids_A, routing.rows_per_sample
                samples = context.sample_ids.index_select(0, rows // per_sample)
                choices = rows % per_sample * routing.num_experts + routing.expert_ids_A
                self._choices.append((samples * CHOICES_OF_A_SAMPLE + choices).sort().values)
                self.loads.append(routing.demand_per_expert().clone())
        return output

    def take(self) -> list[Tensor]:
        """The choices since the last time: of each routing, sorted numbers of (sample, position, expert)."""
        choices, self._choices = self._choices, []
        return choices


CHOICES_OF_A_SAMPLE = 2**20  # more than a sample has


def micro_batches(case: Case, mesh: Mesh) -> list[list[MicroBatch]]:
    """What this rank is fed, step by step: the plan of the training loop, over epochs of two steps."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 * BATCH_SIZE, *SPEC.input_shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, SPEC.num_classes, (2 * BATCH_SIZE,), generator=generator)
    steps: list[list[MicroBatch]] = []
    while len(steps) < NUM_STEPS:
        last_sizes = LAST_SIZES[case.samples]
        ids = torch.arange(BATCH_SIZE + last_sizes[len(steps) // 2 % len(last_sizes)])
        plan = IndexPlan(ids, BATCH_SIZE, case.accumulation, mesh.world_size, mesh.rank, drop_last=False)
        for planned in plan.epoch(len(steps) // 2):
            if planned.micro == 0:
                steps.append([])
            own = planned.sample_ids[: planned.num_valid]
            last = planned.micro == case.accumulation - 1
            steps[-1].append(
                MicroBatch(Batch(images[own], labels[own], own), planned.step_samples, planned.micro_samples, last)
            )
    return steps


class Training:
    """A case in a layout, on this rank. Collective.

    Attributes:
        extents: Of the local parameters.
        steps: What it is fed.
    """

    def __init__(self, case: Case, layout: Layout, **sections: dict[str, Any]) -> None:
        assert dist.get_world_size() == layout.world
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # as the runtime does
        self.case = case
        self.config = case.config(layout, **sections)
        mesh = Mesh(layout.world, dist.get_rank(), layout.expert_parallel)
        self.engine: Any = (
            LoopEngine(self.config, mesh)
            if layout.engine == "loop"
            else build_engine(self.config, mesh, torch.device("cpu"))
        )
        self.module: Network = build_model(self.config, SPEC, self.engine.placement)
        if case.lopsided:
            steer(self.module)
        share_batch_statistics(self.module, self.engine.communicators)
        self.model = Watched(
            self.engine.prepare(
                self.module,
                lambda module: build_optimizer(self.config.optim, module),
                lambda optimizer, done: build_schedule(self.config.schedule, optimizer, NUM_STEPS, done),
            )
        )
        moe = self.config.moe
        assert moe is not None
        self.mixtures = Mixtures(self.module.gates(), build_losses(moe))
        self.mesh = mesh
        self.extents = parameter_extents(self.module, mesh)
        self.steps = micro_batches(case, mesh)

    def step(self, number: int) -> "Step":
        """Takes optimizer step ``number``. Collective."""
        result = train_step(self.engine, self.model, self.mixtures, self.config, number, self.steps[number])
        return Step.of(result, self.model.take(), self.engine)

    def context(self, number: int, batch: Batch) -> Context:
        """Of a forward pass in training."""
        return Context(self.config.seed, number, batch.sample_ids, training=True)

    def freeze(self, num_frozen: int) -> None:
        """The first experts keep their weights from now on."""
        self.mixtures = replace(self.mixtures, frozen=FrozenExperts(self.module, num_frozen))

    def weights(self) -> Tensors:
        """Copies of the local parameters, flat."""
        return {name: extent.tensor.detach().flatten().clone() for name, extent in self.extents.items()}

    def state(self) -> dict[str, Tensors]:
        """Copies of all weights and buffers, of the only process."""
        buffers = buffer_extents(self.module, self.mesh)
        return {
            kind: {name: extent.tensor.detach().clone() for name, extent in extents.items()}
            for kind, extents in ((WEIGHT, self.extents), (BUFFER, buffers))
        }

    def load(self, state: dict[str, Tensors], steps_done: int) -> None:
        """Takes over a state."""
        source = Memory(state)
        self.engine.load(source, steps_done)
        load_extents(source, BUFFER, buffer_extents(self.module, self.mesh))


@contextmanager
def training(case: Case, layout: Layout, **sections: dict[str, Any]) -> Iterator[Training]:
    made = Training(case, layout, **sections)
    try:
        yield made
    finally:
        made.engine.close()


@torch.no_grad()
def steer(module: nn.Module) -> None:
    """Makes every token choose expert 0 first and the last expert never: all tokens have a part in common."""
    for block in module.modules():
        if not isinstance(block, PositionFFN):
            continue
        block.norm.weight.fill_(0.3)
        block.norm.bias.fill_(3.0)
        gate = block.ffn.gate
        if isinstance(gate, CosineGate):
            common = gate.network.weight.sum(1)
            gate.head.directions -= torch.outer(common, common @ gate.head.directions) / common.square().sum()
            gate.head.directions[:, 0] = common
            gate.head.directions[:, -1] = -common
            continue
        weight = gate.network.weight
        weight -= weight.mean(1, keepdim=True)
        weight[0] += 0.4
        weight[gate.num_experts - 1] -= 0.5


@dataclass(frozen=True)
class Step:
    """What one step said, over all ranks; and the choices of this rank's tokens."""

    loss: float
    auxiliary: dict[str, float]
    norm: float
    choices: list[Tensor]

    @staticmethod
    def of(result: StepResult, choices: list[Tensor], engine: Engine) -> "Step":
        """Collective."""
        loss = engine.communicators.world.sum_(result.sums["loss"].clone()) / result.step_samples
        auxiliary = {name: float(value) for name, value in result.auxiliary.items()}
        return Step(float(loss), auxiliary, float(result.gradient_norm), choices)
