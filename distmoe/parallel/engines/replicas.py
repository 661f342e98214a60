"""The whole model in each process, on Hugging Face Accelerate: device, autocast, loss scaling, DDP."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from distmoe.config import RunConfig
from distmoe.models.protocol import Model
from distmoe.parallel.collectives import Communicators, Observe, SumReducer, unobserved
from distmoe.parallel.engines.launcher_variables import without_launcher_variables, world_variables
from distmoe.parallel.engines.moments import load_whole_moments, whole_moments
from distmoe.parallel.engines.protocol import BuildOptimizer, BuildSchedule
from distmoe.parallel.expert_parallel import expert_placement
from distmoe.parallel.mesh import Mesh
from distmoe.parallel.shards import WEIGHT, Piece, TensorSource, owned_pieces, parameter_extents

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class ReplicasEngine:
    """See :class:`distmoe.parallel.engines.protocol.Engine`.

    Args:
        config: Its precision and clipping are used.
        mesh: Who is where; every rank holds all experts.
        device: CPU or a CUDA device.
        observe: See :data:`distmoe.parallel.collectives.Observe`.

    Raises:
        ValueError: A mesh that spreads experts.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, device: torch.device, observe: Observe = unobserved) -> None:
        if mesh.expert_parallel_size > 1:
            raise ValueError("replicas hold all experts: the expert-parallel size must be 1")
        precision = _PRECISIONS[config.train.precision]
        threads = torch.get_num_threads()
        with world_variables(mesh, device) if mesh.world_size > 1 else without_launcher_variables():
            self._accelerator = Accelerator(
                cpu=device.type == "cpu",
                mixed_precision=precision,
                # Buffers are equal on all ranks by construction: see distmoe/parallel/batch_norm.py. Where DDP looks
                # for unused parameters (there are none) it keeps its buckets; otherwise it rearranges them after the
                # first step of a process, and a resumed run would sum in another order.
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)],
            )
        torch.set_num_threads(threads)
        self._clip_norm = config.train.clip_norm
        self.world_size = mesh.world_size
        self.communicators = Communicators.of(mesh, config.parallel.checked_exchanges, observe)
        self.reducer = SumReducer(self.communicators.world)
        self.placement = expert_placement(self.communicators, config.parallel.overlap)

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer, build_schedule: BuildSchedule) -> Model:
        """See the protocol."""
        self._build_schedule = build_schedule
        self._module = model.to(self._accelerator.device)
        self._optimizer = build_optimizer(self._module)
        self._schedule = build_schedule(self._optimizer, 0)
        with warnings.catch_warnings():  # torch 2.14 calls broadcast_buffers otherwise, and Accelerate does not yet
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            prepared, self._prepared_optimizer = self._accelerator.prepare(self._module, self._optimizer)
        self._called: Model = prepared
        return self._called

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """See the protocol; only the last backward of a step exchanges gradients."""
        if last:
            yield
        else:
            with self._accelerator.no_sync(self._called):
                yield

    def backward(self, loss: Tensor) -> None:
        """See the protocol."""
        self._accelerator.backward(loss)

    def step(self) -> Tensor:
        """See the protocol."""
        self._accelerator.unscale_gradients()
        gradients = [parameter.grad for parameter in self._module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._module.parameters(), self._clip_norm, norm)
        self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad()
        self._schedule.step()
        return norm

    def learning_rate(self) -> float:
        """See the protocol."""
        return float(self._optimizer.param_groups[0]["lr"])

    def pieces(self) -> Iterator[Piece]:
        """See the protocol."""
        mesh = self.communicators.mesh
        extents = parameter_extents(self._module, mesh)
        yield from owned_pieces(WEIGHT, extents, mesh)
        for name, extent in extents.items():
            yield from whole_moments(self._optimizer, name, extent, mesh)

    @torch.no_grad()
    def load(self, source: TensorSource, steps_done: int) -> None:
        """See the protocol."""
        for name, extent in parameter_extents(self._module, self.communicators.mesh).items():
            values = source.read(WEIGHT, name, extent.start, extent.tensor.numel())
            extent.tensor.copy_(values.view(extent.tensor.shape))
            load_whole_moments(self._optimizer, source, name, extent)
        self._schedule = self._build_schedule(self._optimizer, steps_done)

    def adopt_weights(self) -> None:
        """See the protocol; the optimizer works on the model's own weights."""

    def scaler_state(self) -> dict[str, float]:
        """See the protocol."""
        scaler = self._accelerator.scaler
        return {} if scaler is None else dict(scaler.state_dict())

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """See the protocol."""
        if self._accelerator.scaler is not None and state:
            self._accelerator.scaler.load_state_dict(dict(state))

    def close(self) -> None:
        """See the protocol. Accelerate keeps its settings in process-wide state, which is cleared for the next run."""
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


ENGINE = ReplicasEngine
