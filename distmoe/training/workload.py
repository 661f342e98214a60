"""What a model asks of its hardware, measured on the model itself: the input of the cost model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from distmoe.contracts import DataSpec
from distmoe.moe.dispatch import Dispatcher, Meanwhile, Tensors
from distmoe.training.cost import mixtures_of, random_images
from distmoe.training.cost_model import MixtureWork, Workload


def measure_workload(model: nn.Module, spec: DataSpec, num_images: int = 8) -> Workload:
    """Runs random images forward and notes what is computed, what is kept for the backward pass, what is dispatched.

    Args:
        model: Holding all experts; its mode is left as it was.
        spec: Shape of an image.
        num_images: Averaged over.

    Raises:
        ValueError: A gate and its experts are not children of the same module.
    """
    images, context = random_images(spec, num_images, next(model.parameters()).device)
    layers = list(mixtures_of(model))
    was_training = model.training
    model.eval()
    kept = _Kept(model)
    with (
        _recorded([path for path, _, _ in layers], model) as notes,
        saved_tensors_hooks(kept, lambda tensor: tensor),
        FlopCounterMode(display=False) as counter,
        _Launches() as launches,
    ):
        model(images, context)
    model.train(was_training)
    by_module, root = counter.get_flop_counts(), type(model).__name__
    mixtures = []
    for path, gate, experts in layers:
        note = notes[path]
        name = next(name for name, child in model.get_submodule(path).named_children() if child is experts)
        flops = sum(by_module.get(".".join(filter(None, (root, path, name))), {}).values())
        parameters = sum(parameter.numel() for parameter in experts.parameters()) // gate.num_experts
        mixtures.append(
            MixtureWork(
                num_experts=gate.num_experts,
                tokens=note.rows / num_images,
                k=note.assignments / note.rows,
                values_in=note.values_in,
                values_out=note.values_out,
                expert_parameters=parameters,
                expert_flops=flops / note.assignments,
            )
        )
    all_parameters = sum(parameter.numel() for parameter in model.parameters())
    of_experts = sum(one.num_experts * one.expert_parameters for one in mixtures)
    in_experts = sum(one.tokens * one.k * one.expert_flops for one in mixtures)
    return Workload(
        dense_parameters=all_parameters - of_experts,
        dense_flops=counter.get_total_flops() / num_images - in_experts,
        activation_values=kept.num_bytes / torch.float32.itemsize / num_images,
        mixtures=tuple(mixtures),
        operations=launches.count,
    )


class _Recorder:
    """A dispatcher that notes what it is given, and leaves the work to another."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.rows = self.assignments = self.values_in = self.values_out = 0

    def dispatch(
        self, x_T: Tensor, row_ids_A: Tensor, expert_ids_A: Tensor, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        self.rows, self.assignments = len(row_ids_A.unique()), len(row_ids_A)
        self.values_in = x_T.shape[1:].numel()
        return self.dispatcher.dispatch(x_T, row_ids_A, expert_ids_A, meanwhile)

    def gather(self, outputs: Tensors, plan: Any) -> Tensors:
        self.values_out += sum(
            output.shape[1:].numel() for output in (outputs if isinstance(outputs, tuple) else [outputs])
        )
        return self.dispatcher.gather(outputs, plan)

    def combine(self, outputs: Tensor, plan: Any, weights_A: Tensor) -> Tensor:
        self.values_out += outputs.shape[1:].numel()
        return self.dispatcher.combine(outputs, plan, weights_A)


@contextmanager
def _recorded(paths: list[str], model: nn.Module) -> Iterator[dict[str, _Recorder]]:
    """The recorders of these modules, in place while inside."""
    modules: dict[str, Any] = {path: model.get_submodule(path) for path in paths}
    recorders = {path: _Recorder(module.dispatcher) for path, module in modules.items()}
    for path, recorder in recorders.items():
        modules[path].dispatcher = recorder
    try:
        yield recorders
    finally:
        for path, recorder in recorders.items():
            modules[path].dispatcher = recorder.dispatcher


class _Launches(TorchDispatchMode):
    """Counts the operations that do something: views aside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class _Kept:
    """Adds up the memory that autograd keeps, every tensor's once, parameters aside."""

    def __init__(self, model: nn.Module) -> None:
        self.num_bytes = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self._alive: list[Tensor] = []  # an address must not be used again while it counts as known

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self._alive.append(tensor)
            self.num_bytes += storage.nbytes()
        return tensor
