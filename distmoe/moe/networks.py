"""Small networks on whole tokens: what gates see through, and experts for images."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distmoe.config import AnyNetwork, CNNNetwork, CosineNetwork, MLPNetwork
from distmoe.moe.gates.cosine import CosineHead


class MLP(nn.Module):
    """Linear layers with ReLU between them, on the flattened token.

    Args:
        widths: Of the input, the hidden layers and the output.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(T, ...) to (T, widths[-1])."""
        x = x.flatten(1)
        for number, layer in enumerate(self.layers):
            x = layer(x if number == 0 else F.relu(x))
        return x


class PooledCNN(nn.Module):
    """[3x3 convolution, 2x2 max-pool, ReLU] for each entry of ``channels``, then two linear layers.

    Args:
        input_shape: (C, H, W).
        channels: Output channels of the convolutions.
        hidden: Width between the linear layers.
        num_outputs: Width of the output.
        with_hidden: Give the hidden layer before its ReLU beside the output: what an attentive gate asks for.

    Raises:
        ValueError: The token is no image, or too small for that many pools.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        channels: tuple[int, ...],
        hidden: int,
        num_outputs: int,
        with_hidden: bool = False,
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"a CNN needs tokens of shape (channels, height, width), not {list(input_shape)}")
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
        self.with_hidden = with_hidden

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, C, H, W) to (B, num_outputs), or to that and (B, hidden)."""
        x = x.contiguous(memory_format=torch.channels_last)  # pooling is several times faster that way on a CPU
        for convolution in self.convolutions:
            x = F.relu(F.max_pool2d(convolution(x), 2))  # equal to pooling after ReLU, on a quarter of the values
        hidden = self.fc1(x.flatten(1))
        scores: Tensor = self.fc2(F.relu(hidden))
        return (scores, hidden) if self.with_hidden else scores


def network_factory(section: AnyNetwork, token_shape: tuple[int, ...]) -> Callable[[int], nn.Module]:
    """Makes networks from tokens of one shape to any number of outputs.

    Args:
        section: ``moe.gate.network``.
        token_shape: Of one token: (D,) for feature vectors and positions, (C, H, W) for images and patches.

    Raises:
        ValueError: When called: the token does not fit the network.
    """
    width = math.prod(token_shape)

    def make(num_outputs: int) -> nn.Module:
        if isinstance(section, CNNNetwork):
            return PooledCNN(token_shape, section.channels, section.hidden, num_outputs)
        if isinstance(section, MLPNetwork):
            return MLP((width, *section.hidden, num_outputs))
        if isinstance(section, CosineNetwork):
            return _flat(token_shape, CosineHead(width, num_outputs, section.temperature))
        return _flat(token_shape, nn.Linear(width, num_outputs, bias=False))

    return make


def _flat(token_shape: tuple[int, ...], head: nn.Module) -> nn.Module:
    return head if len(token_shape) == 1 else nn.Sequential(nn.Flatten(), head)
