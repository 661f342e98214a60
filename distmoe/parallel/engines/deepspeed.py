"""Experts and optimizer state spread over processes, on DeepSpeed: ZeRO 0, 1, 2, its groups and its communication.

What DeepSpeed is trusted with, and what not: it reduces gradients (dense ones over all ranks, experts' over their
replicas), partitions optimizer state and clips under ZeRO 1 and 2. Autocast, loss scaling and, without ZeRO, clipping
are ours: its norm at stage 0 takes each rank's experts for the same ones, and its autocast reduces gradients in half
precision.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm as deepspeed_comm
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.optim import Optimizer

from distmoe.config import RunConfig
from distmoe.contracts import Context
from distmoe.models.protocol import Model, ModelOutput
from distmoe.parallel.collectives import Communicators, Observe, SumReducer, unobserved
from distmoe.parallel.engines.launcher_variables import world_variables
from distmoe.parallel.engines.loss_scale import LossScale
from distmoe.parallel.engines.moments import STEP, load_whole_moments, moment_kinds, whole_moments
from distmoe.parallel.engines.protocol import BuildOptimizer, BuildSchedule
from distmoe.parallel.expert_parallel import expert_placement
from distmoe.parallel.gradients import clip_gradients
from distmoe.parallel.mesh import Mesh
from distmoe.parallel.shards import (
    MOMENT,
    WEIGHT,
    Extent,
    Piece,
    TensorSource,
    expert_parameters,
    owned_pieces,
    parameter_extents,
)

_LARGEST_BUCKET = 500_000_000  # DeepSpeed's default
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DeepSpeedEngine:
    """See :class:`distmoe.parallel.engines.protocol.Engine`.

    Args:
        config: Its precision, clipping, accumulation and ``parallel`` section are used.
        mesh: Who is where.
        device: Of this rank.
        observe: See :data:`distmoe.parallel.collectives.Observe`.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, device: torch.device, observe: Observe = unobserved) -> None:
        self._config = config
        self._device = device
        self._scale = LossScale(enabled=config.train.precision == "fp16")
        self.world_size = mesh.world_size
        self._opened = _open_deepspeed(device, config.parallel.timeout_s)
        self.communicators = _communicators(mesh, config.parallel.checked_exchanges, observe)
        self.reducer = SumReducer(self.communicators.world)
        self.placement = expert_placement(self.communicators, config.parallel.overlap)

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer, build_schedule: BuildSchedule) -> Model:
        """See the protocol."""
        self._build_schedule = build_schedule
        self._module = model.to(self._device)
        mesh = self.communicators.mesh
        sharded = mesh.expert_parallel_size > 1
        if sharded:
            for parameter in expert_parameters(model):
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = _group_name(mesh)  # type: ignore[attr-defined]
        optimizer = build_optimizer(model)
        if sharded:
            _split_groups(optimizer, set(expert_parameters(model)), _group_name(mesh))
        self._optimizer = optimizer
        wrapped = _Wrapped(model, _AUTOCAST.get(self._config.train.precision), mesh if sharded else None)
        with world_variables(mesh, self._device), _scalars_kept_back(model):
            self._engine, *_ = deepspeed.initialize(
                model=wrapped, optimizer=optimizer, config=self._settings(), dist_init_required=False
            )
        self._zero = self._engine.optimizer if self._config.parallel.zero_stage else None
        self._schedule = build_schedule(optimizer, 0)
        called: Model = self._engine
        return called

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """See the protocol."""
        self._engine.set_gradient_accumulation_boundary(last)
        if self._zero is not None and self._scale.enabled:
            self._zero.override_loss_scale(self._scale.value)
        yield

    def backward(self, loss: Tensor) -> None:
        """See the protocol."""
        if self._zero is None:
            loss = loss * self._scale.value
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        """See the protocol."""
        norm = self._update() if self._zero is not None else self._clip_and_update()
        if self._scale.enabled:  # otherwise a GPU need not be waited for
            self._scale.update(finite=bool(norm.isfinite()))
        self._schedule.step()
        return norm

    def learning_rate(self) -> float:
        """See the protocol."""
        return float(self._optimizer.param_groups[0]["lr"])

    def pieces(self) -> Iterator[Piece]:
        """See the protocol."""
        extents, mesh = parameter_extents(self._module, self.communicators.mesh), self.communicators.mesh
        yield from owned_pieces(WEIGHT, extents, mesh)
        for name, extent in extents.items():
            if self._zero is not None:
                yield from self._partitioned_moments(name, extent)
            else:
                yield from whole_moments(self._optimizer, name, extent, mesh)

    @torch.no_grad()
    def load(self, source: TensorSource, steps_done: int) -> None:
        """See the protocol."""
        extents = parameter_extents(self._module, self.communicators.mesh)
        for name, extent in extents.items():
            values = source.read(WEIGHT, name, extent.start, extent.tensor.numel())
            extent.tensor.copy_(values.view(extent.tensor.shape))
        self.adopt_weights()
        for name, extent in extents.items():
            if self._zero is not None:
                self._load_partitioned_moments(source, name, extent)
            else:
                load_whole_moments(self._optimizer, source, name, extent)
        self._schedule = self._build_schedule(self._optimizer, steps_done)

    def adopt_weights(self) -> None:
        """See the protocol."""
        if self._zero is not None:
            self._zero.refresh_fp32_params()

    def scaler_state(self) -> dict[str, float]:
        """See the protocol."""
        return self._scale.state()

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """See the protocol."""
        self._scale.load(state)

    def close(self) -> None:
        """See the protocol."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.destroy()
            del self._engine
        if self._opened:
            dist.destroy_process_group()
            self._opened = False

    def _update(self) -> Tensor:
        """One step of ZeRO, which clips by the true global norm itself and skips a step that is not finite."""
        assert self._zero is not None
        self._engine.step()
        return torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self._device)

    def _clip_and_update(self) -> Tensor:
        if self._scale.enabled:
            gradients = [one.grad for one in self._module.parameters() if one.grad is not None]
            torch._foreach_div_(gradients, self._scale.value)
        norm = clip_gradients(self._module, self.communicators, self._config.train.clip_norm)
        if self._scale.enabled and not bool(norm.isfinite()):
            self._engine.zero_grad()
        else:
            self._engine.step()
        return norm

    def _settings(self) -> dict[str, Any]:
        """DeepSpeed's configuration. What is not written would have another default: it clips at 1.0, say."""
        accumulation, stage = self._config.train.accumulation, self._config.parallel.zero_stage
        return {
            "train_batch_size": self.world_size * accumulation,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": (self._config.train.clip_norm or 0.0) if stage else 0.0,
            "zero_optimization": {
                "stage": stage,
                "contiguous_gradients": True,
                "reduce_scatter": True,
                "reduce_bucket_size": self._bucket_size(),
                "overlap_comm": False,
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31 - 1,
        }

    def _bucket_size(self) -> int:
        """Elements of the buffer that ZeRO allocates for gradients in each step: 2 GB, were it left to DeepSpeed."""
        return max(min(sum(parameter.numel() for parameter in self._module.parameters()), _LARGEST_BUCKET), 1)

    def _partition(self, extent: Extent) -> tuple[Tensor, Any] | None:
        """This rank's flat float32 partition with a part of the parameter, and where that part is; None without one."""
        fragment = getattr(extent.tensor, "_hp_mapping", None)
        if self._zero is None or fragment is None:
            return None
        return self._zero.single_partition_of_fp32_groups[fragment.param_group_index], fragment

    def _partitioned_moments(self, name: str, extent: Extent) -> Iterator[Piece]:
        found = self._partition(extent)
        if found is None:
            return
        flat, fragment = found
        start = extent.start + fragment.lp_fragment_address.start
        for key, value in self._optimizer.state.get(flat, {}).items():
            if value.shape == flat.shape:
                address = fragment.hp_fragment_address
                yield Piece(MOMENT + key, name, extent.shape, start, value.narrow(0, address.start, address.numel))
            elif start == 0:
                yield Piece(MOMENT + key, name, value.shape, 0, value.reshape(1))

    def _load_partitioned_moments(self, source: TensorSource, name: str, extent: Extent) -> None:
        found = self._partition(extent)
        if found is None:
            return
        flat, fragment = found
        own, address = fragment.lp_fragment_address, fragment.hp_fragment_address
        state = self._optimizer.state[flat]
        for kind in moment_kinds(source, name):
            key = kind.removeprefix(MOMENT)
            if key == STEP:
                state[key] = source.read(kind, name, 0, 1).view(())
                continue
            if key not in state:
                state[key] = torch.zeros_like(flat)
            values = source.read(kind, name, extent.start + own.start, own.numel)
            state[key].narrow(0, address.start, address.numel).copy_(values)


class _Wrapped(nn.Module):
    """What DeepSpeed holds: the model in autocast, and beside it the mark by which it knows that there are experts.

    Args:
        model: The model.
        autocast: Type of matrix products; None: float32.
        mesh: Where experts are sharded.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None, mesh: Mesh | None) -> None:
        super().__init__()
        self.model = model
        self.mark = _ExpertMark(mesh) if mesh is not None else None
        self._autocast = autocast

    def forward(self, images: Tensor, context: Context) -> ModelOutput:
        with torch.autocast(images.device.type, self._autocast, enabled=self._autocast is not None):
            output: ModelOutput = self.model(images, context)
        return output


class _ExpertMark(MoE):
    """DeepSpeed looks for an instance of its own layer; this one computes nothing and has no parameters.

    Args:
        mesh: Who is where.
    """

    def __init__(self, mesh: Mesh) -> None:
        nn.Module.__init__(self)
        self.ep_size = mesh.expert_parallel_size
        self.num_experts = mesh.expert_parallel_size
        self.num_local_experts = 1
        self.expert_group_name = _group_name(mesh)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups are there already."""


@contextmanager
def _scalars_kept_back(model: nn.Module) -> Iterator[None]:
    """Inside, DeepSpeed does not broadcast parameters without axes: it fails on them. They are equal on all ranks."""
    scalars = [parameter for parameter in model.parameters() if parameter.dim() == 0]
    for parameter in scalars:
        parameter.ds_optim_param = True  # type: ignore[attr-defined]  # its mark of what differs from rank to rank
    yield
    for parameter in scalars:
        del parameter.ds_optim_param  # type: ignore[attr-defined]


def _split_groups(optimizer: Optimizer, experts: set[nn.Parameter], name: str) -> None:
    """Splits each group of parameters in two, experts in one that says so, as DeepSpeed wants it."""
    split: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        dense = [parameter for parameter in group["params"] if parameter not in experts]
        sharded = [parameter for parameter in group["params"] if parameter in experts]
        split += [{**group, "params": dense, "name": "dense"}] if dense else []
        split += [{**group, "params": sharded, "name": name, "moe": True}] if sharded else []
    optimizer.param_groups[:] = split


def _group_name(mesh: Mesh) -> str:
    return f"ep_size_{mesh.expert_parallel_size}"  # DeepSpeed's name for it


def _open_deepspeed(device: torch.device, timeout_s: float) -> bool:
    """Lets DeepSpeed use torch's process group; of one process if there is none, which is then opened: True."""
    opened = not dist.is_initialized()
    if opened:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=timeout_s))
    _forget_former_world()
    if not deepspeed_comm.is_initialized():
        # On a CPU it would compile an all-reduce over shared memory of its own, for a minute, with a compiler.
        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is not None:
            deepspeed.ops.__compatible_ops__[builder.NAME] = False
        # It knows the optimizers of its own; torch's are compared with one process in every layout.
        deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
        # torch 2.14 has another name for a function that ZeRO calls.
        warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
        deepspeed.init_distributed(dist_init_required=False, timeout=timedelta(seconds=timeout_s))
        deepspeed.comm.comm.cdb.of_world = dist.group.WORLD
    return opened


def _forget_former_world() -> None:
    """DeepSpeed keeps its groups in module variables, also those of a process group that has been closed since."""
    backend = deepspeed.comm.comm.cdb
    if backend is None or getattr(backend, "of_world", None) is dist.group.WORLD:
        return
    deepspeed.comm.comm.cdb = None
    groups._WORLD_GROUP = None
    for kept in (groups._get_expert_parallel_group_dict(), groups._get_expert_data_parallel_group_dict()):
        kept.clear()


def _communicators(mesh: Mesh, checked: bool, observe: Observe) -> Communicators:
    name, size = _group_name(mesh), mesh.expert_parallel_size
    if mesh.world_size == 1 or size == 1:
        return Communicators.over(mesh, None, None, None, deepspeed_comm, checked, observe)
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)
    return Communicators.over(
        mesh,
        None,
        groups._get_expert_parallel_group(name),
        groups._get_expert_data_parallel_group(name),
        deepspeed_comm,
        checked,
        observe,
    )


ENGINE = DeepSpeedEngine
