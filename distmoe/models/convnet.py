"""A fast convolutional network whose stages end with feed-forward layers over their positions, sparse or dense.

The trunk follows the networks of CIFAR-10 speed records (K. Jordan 2024, arXiv:2404.00498): two 3x3 convolutions a
stage, max-pool before the first batch norm, GELU, a global max-pool and a scaled linear head. Differs: an ordinary 3x3
stem instead of a whitening layer computed from data, residual feed-forward layers, ordinary batch norm with weights.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmoe.config import ConvNetModel, LinearNetwork, MoESection
from distmoe.contracts import Context, DataSpec
from distmoe.models.protocol import ModelOutput, Network, Normalize
from distmoe.moe.dispatch import Placement
from distmoe.moe.experts import MLPExperts
from distmoe.moe.gates import build_gate
from distmoe.moe.gates.base import Gate
from distmoe.moe.layer import MoELayer
from distmoe.moe.networks import network_factory
from distmoe.moe.routing import Routing

HEAD_SCALE = 1 / 9  # as in the speed-record networks: keeps the logits small at the start


class DenseFFN(nn.Module):
    """``act(x W1 + b1) W2 + b2``: what one expert is, for every token."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        output: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return output


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that takes any number of rows: zero rows change nothing, and one value a channel does not raise.

    Where a channel has fewer than two values there is no variance to normalise by: the running statistics stand in,
    and stay as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        if self.training and x.numel() < 2 * self.num_features:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class Stage(nn.Module):
    """conv - pool - norm - GELU - conv - norm - GELU: half the height and width, ``width_out`` channels."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
        self.norm1 = BatchNorm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.norm2 = BatchNorm(width_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/2, W/2)."""
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class PositionFFN(nn.Module):
    """``x + ffn(norm(x))`` over the positions of a feature map; the feed-forward layer may be a mixture."""

    def __init__(self, width: int, ffn: DenseFFN | MoELayer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ffn = ffn

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
        """(B, C, H, W) to the same shape, and the routing if the layer is a mixture."""
        tokens = self.norm(x.permute(0, 2, 3, 1))
        result = self.ffn(tokens, context) if isinstance(self.ffn, MoELayer) else self.ffn(tokens)
        output, routing = result if isinstance(result, tuple) else (result, None)
        return x + output.permute(0, 3, 1, 2), routing


class ConvNet(Network):
    """Stem, stages, feed-forward layers over positions, head.

    Args:
        section: Widths and places.
        moe: The mixture of the feed-forward layers; None makes them dense.
        spec: Input shape (C, H, W) and classes.
        normalize: As ``data.normalize``.
        placement: Where the experts live.

    Raises:
        ValueError: The image is too small for the stages.
    """

    def __init__(
        self, section: ConvNetModel, moe: MoESection | None, spec: DataSpec, normalize: str, placement: Placement
    ) -> None:
        super().__init__()
        channels, height, width = spec.input_shape
        if min(height, width) >> len(section.widths) == 0:
            raise ValueError(
                f"{len(section.widths)} stages leave nothing of a {height}x{width} image: fewer model.widths"
            )
        self.normalize = Normalize(spec, normalize)
        self.stem = nn.Conv2d(channels, section.widths[0], 3, padding=1)
        widths = (section.widths[0], *section.widths)
        self.stages = nn.ModuleList(Stage(before, after) for before, after in pairwise(widths))
        self.ffns = nn.ModuleDict(
            {
                str(stage): PositionFFN(widths[stage], _ffn(widths[stage], section.ffn_hidden, moe, placement))
                for stage in sorted(section.ffn_stages)
            }
        )
        self.head = nn.Linear(widths[-1], spec.num_classes, bias=False)

    def gates(self) -> dict[str, Gate]:
        """See :class:`distmoe.models.protocol.Network`."""
        layers = {f"ffns.{stage}": block.ffn for stage, block in self.ffns.items()}
        return {name: layer.gate for name, layer in layers.items() if isinstance(layer, MoELayer)}

    def forward(self, images: Tensor, context: Context) -> ModelOutput:
        """See :class:`distmoe.models.protocol.Model`."""
        x = self.normalize(images).contiguous(memory_format=torch.channels_last)
        x = F.gelu(self.stem(x))
        routings: dict[str, Routing] = {}
        for number, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if str(number) in self.ffns:
                name = f"ffns.{number}"
                x, routing = self.ffns[str(number)](x, context.within(name))
                if routing is not None:
                    routings[name] = routing
        return ModelOutput(logits=self.head(x.amax(dim=(2, 3))) * HEAD_SCALE, routings=routings)


def _ffn(width: int, hidden: int, moe: MoESection | None, placement: Placement) -> DenseFFN | MoELayer:
    if moe is None:
        return DenseFFN(width, hidden)
    network = getattr(moe.gate, "network", None) or LinearNetwork()
    gate = build_gate(moe.gate, moe.num_experts, network_factory(network, (width,)), hidden)
    local = placement.local_experts(moe.num_experts)
    experts = MLPExperts(local, width, hidden, with_hidden=gate.needs_hidden)
    shared = DenseFFN(width, moe.shared_hidden) if moe.shared_hidden else None
    return MoELayer(gate, experts, placement, shared=shared)
