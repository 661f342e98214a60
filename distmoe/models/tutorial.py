"""The tutorial system: CNN experts and a CNN gate on CIFAR-10, mixing class probabilities; and one expert alone.

Source: A. Helwan, "Showcasing Mixture of Experts on CIFAR-10" (2024). Its readable part says: three simple CNN experts
and a gate network, all see the image, the prediction is the gate-weighted combination. Layer sizes, loss and optimizer
are not known; ours are in ``configs/cifar10_tutorial.yaml``.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmoe.config import MoESection, TutorialCNN, TutorialModel
from distmoe.contracts import Context, DataSpec
from distmoe.models.protocol import ModelOutput, Normalize
from distmoe.moe.dispatch import Placement
from distmoe.moe.experts import ModuleExperts
from distmoe.moe.gates import build_gate
from distmoe.moe.losses import mixture_log_probs
from distmoe.moe.routing import at_least_float32


class PooledCNN(nn.Module):
    """[3x3 convolution, 2x2 max-pool, ReLU] for each entry of ``channels``, then two linear layers.

    Args:
        input_shape: (C, H, W).
        channels: Output channels of the convolutions.
        hidden: Width between the linear layers.
        num_outputs: Width of the output.

    Raises:
        ValueError: The image is too small for that many pools.
    """

    def __init__(self, input_shape: tuple[int, ...], channels: tuple[int, ...], hidden: int, num_outputs: int) -> None:
        super().__init__()
        in_channels, height, width = input_shape
        shrunk = (height >> len(channels)) * (width >> len(channels))
        if shrunk == 0:
            raise ValueError(
                f"{len(channels)} pools leave nothing of a {height}x{width} image: use fewer channels entries"
            )
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in pairwise((in_channels, *channels))
        )
        self.fc1 = nn.Linear(channels[-1] * shrunk, hidden)
        self.fc2 = nn.Linear(hidden, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, num_outputs)."""
        x = x.contiguous(memory_format=torch.channels_last)  # pooling is several times faster that way on a CPU
        for convolution in self.convolutions:
            x = F.relu(F.max_pool2d(convolution(x), 2))  # equal to pooling after ReLU, on a quarter of the values
        scores: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return scores


class TutorialMixture(nn.Module):
    """``p(c|x) = sum_e g_e(x) softmax(expert_e(x))_c`` with CNN experts and a CNN gate."""

    def __init__(
        self, section: TutorialModel, moe: MoESection, spec: DataSpec, normalize: str, placement: Placement
    ) -> None:
        super().__init__()
        num_experts = moe.num_experts
        self.normalize = Normalize(spec, normalize)
        gate_network = PooledCNN(spec.input_shape, section.gate_channels, section.gate_hidden, num_experts)
        self.gate = build_gate(moe.gate, gate_network, num_experts)
        self.experts = ModuleExperts(
            placement.local_experts(num_experts),
            lambda: PooledCNN(spec.input_shape, section.channels, section.hidden, spec.num_classes),
        )
        self.dispatcher = placement.dispatcher(num_experts)

    def forward(self, images: Tensor, context: Context) -> ModelOutput:
        """See :class:`distmoe.models.protocol.Model`."""
        x = self.normalize(images)
        routing = self.gate.route(x, context)
        rows_R, rows_per_expert_L, plan = self.dispatcher.dispatch(x, routing.row_ids_A, routing.expert_ids_A)
        log_probs_R = at_least_float32(self.experts(rows_R, rows_per_expert_L)).log_softmax(-1)
        log_probs = mixture_log_probs(self.dispatcher.gather(log_probs_R, plan), routing)
        return ModelOutput(log_probs=log_probs, routings={"mixture": routing})


class TutorialTwin(nn.Module):
    """One expert's network alone, of any width."""

    def __init__(self, section: TutorialCNN, spec: DataSpec, normalize: str) -> None:
        super().__init__()
        self.normalize = Normalize(spec, normalize)
        self.network = PooledCNN(spec.input_shape, section.channels, section.hidden, spec.num_classes)

    def forward(self, images: Tensor, context: Context) -> ModelOutput:
        """See :class:`distmoe.models.protocol.Model`."""
        del context
        return ModelOutput(logits=self.network(self.normalize(images)))
