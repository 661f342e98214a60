"""The whole model in each process, on Hugging Face Accelerate: device, autocast, loss scaling, clipping."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from distmoe.config import RunConfig
from distmoe.models.protocol import Model
from distmoe.moe.sums import no_reduction
from distmoe.parallel.engines.protocol import BuildOptimizer, BuildSchedule, ParameterState
from distmoe.parallel.runtime import without_launcher_variables

_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class ReplicasEngine:
    """See :class:`distmoe.parallel.engines.protocol.Engine`.

    Args:
        config: Its precision and clipping are used.
        device: CPU or a CUDA device.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        precision = _PRECISIONS[config.train.precision]
        with without_launcher_variables():
            self._accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
        self._clip_norm = config.train.clip_norm
        self.world_size: int = self._accelerator.num_processes
        self.reducer = no_reduction

    def prepare(self, model: nn.Module, build_optimizer: BuildOptimizer, build_schedule: BuildSchedule) -> Model:
        """See the protocol."""
        self._build_schedule = build_schedule
        self._module = model.to(self._accelerator.device)
        self._optimizer = build_optimizer(self._module)
        self._schedule = build_schedule(self._optimizer, 0)
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

    def parameter_states(self) -> dict[str, ParameterState]:
        """See the protocol."""
        return {
            name: ParameterState(
                weight=parameter.detach().float().cpu(),
                moments={
                    key: value.detach().float().cpu()
                    for key, value in self._optimizer.state.get(parameter, {}).items()
                    if isinstance(value, Tensor)
                },
            )
            for name, parameter in self._module.named_parameters()
        }

    @torch.no_grad()
    def load_parameter_states(self, states: Mapping[str, ParameterState], steps_done: int) -> None:
        """See the protocol."""
        for name, parameter in self._module.named_parameters():
            parameter.copy_(states[name].weight)
            moments = states[name].moments
            # The step count stays on the CPU, as torch's optimizers keep it.
            self._optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                for key, value in moments.items()
            }
        self._schedule = self._build_schedule(self._optimizer, steps_done)

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
