"""Parts of canonical tensors: how weights, moments and buffers are named, whoever holds them.

A *canonical* tensor is that of the one-process model: its name, and its shape with all experts. What a rank holds of
it is always one contiguous range of the flattened tensor: the experts of a stack are its leading axis and a rank's are
neighbours, and what ZeRO leaves of a parameter on a rank is a range by construction. So one rule serves every layout:
write ranges, read ranges.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from distmoe.moe.experts import Experts
from distmoe.parallel.mesh import Mesh

WEIGHT = "weight"
BUFFER = "buffer"
AVERAGE = "average"
MOMENT = "moment:"  # followed by the optimizer's own name: moment:exp_avg

LEAST_SHARED_BYTES = 2**20
"""From this size on, those who hold the same tensor write a part of it each; it pays for one more thing to find."""


@dataclass(frozen=True)
class Piece:
    """A range of one canonical tensor.

    Attributes:
        kind: ``weight``, ``moment:NAME``, ``buffer`` or ``average``.
        name: Canonical name of the parameter or buffer.
        shape: Of the whole tensor.
        start: First element, in the flattened tensor.
        values: (n,) the elements.
    """

    kind: str
    name: str
    shape: torch.Size
    start: int
    values: Tensor


class TensorSource(Protocol):
    """Canonical tensors that can be read in ranges; reading one range does not load the rest."""

    def names(self, kind: str) -> list[str]:
        """Of all tensors of a kind, sorted."""
        ...

    def kinds(self) -> list[str]:
        """Of which there are tensors, sorted."""
        ...

    def shape(self, kind: str, name: str) -> torch.Size:
        """Of the whole tensor; KeyError if there is none."""
        ...

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """(length,) elements from ``start`` on, on the CPU; KeyError if there is no such tensor."""
        ...


@dataclass(frozen=True)
class Extent:
    """Which range of a canonical tensor a local one is.

    Attributes:
        tensor: The local parameter or buffer.
        shape: Of the canonical tensor.
        start: Where the local one begins in it, flattened; it is as long as ``tensor``.
        of_expert: Whether it belongs to an expert: the same on the expert's replicas only.
    """

    tensor: Tensor
    shape: torch.Size
    start: int
    of_expert: bool

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + self.tensor.numel()


def parameter_extents(module: nn.Module, mesh: Mesh) -> dict[str, Extent]:
    """The local parameters by canonical name."""
    return _extents(module, mesh, dict(module.named_parameters()))


def buffer_extents(module: nn.Module, mesh: Mesh) -> dict[str, Extent]:
    """The local buffers by canonical name."""
    return _extents(module, mesh, dict(module.named_buffers()))


def expert_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of all experts, in the model's order."""
    return [parameter for part in module.modules() if isinstance(part, Experts) for parameter in part.parameters()]


def share_of(what: str, values: Tensor, part: int, parts: int) -> range:
    """The elements that one of several holders of the same tensor writes; together, each once.

    Small tensors are left whole, for one holder each.

    Args:
        what: Keys whose turn it is to write a small one.
        values: The tensor.
        part: This holder.
        parts: Number of holders.
    """
    length = values.numel()
    if values.nbytes >= LEAST_SHARED_BYTES:
        return range(length * part // parts, length * (part + 1) // parts)
    return range(length) if zlib.crc32(what.encode()) % parts == part else range(0)


def owned_piece(kind: str, name: str, extent: Extent, mesh: Mesh, values: Tensor | None = None) -> Piece | None:
    """What this rank writes of a tensor that its replicas hold as well; None where that is nothing.

    Args:
        kind: See :class:`Piece`.
        name: Canonical name.
        extent: Of the parameter or buffer.
        mesh: Tells who else holds it.
        values: What to write, shaped as the local tensor; None: the tensor itself. A scalar (a step count, say) stands
            for the whole canonical tensor.
    """
    values = extent.tensor.detach() if values is None else values.detach()
    holders, number = (mesh.num_replicas, mesh.replica) if extent.of_expert else (mesh.world_size, mesh.rank)
    shape, start = extent.shape, extent.start
    if values.dim() == 0 and extent.tensor.dim() > 0:  # one number for the tensor, from whoever holds its beginning
        shape = values.shape
        if start > 0:
            return None
    own = share_of(f"{kind} {name}", values, number, holders)
    if len(own) == 0 and (shape.numel() > 0 or number > 0):  # a tensor without elements has a name all the same
        return None
    return Piece(kind, name, shape, start + own.start, values.reshape(-1)[own.start : own.stop])


def owned_pieces(kind: str, extents: dict[str, Extent], mesh: Mesh) -> Iterator[Piece]:
    """What this rank writes of tensors as they are."""
    for name, extent in extents.items():
        piece = owned_piece(kind, name, extent, mesh)
        if piece is not None:
            yield piece


@torch.no_grad()
def load_extents(source: TensorSource, kind: str, extents: dict[str, Extent]) -> None:
    """Copies into local tensors what they hold of the canonical ones; nothing else is read."""
    for name, extent in extents.items():
        local = extent.tensor
        local.copy_(source.read(kind, name, extent.start, local.numel()).view(local.shape))


def _extents(module: nn.Module, mesh: Mesh, tensors: dict[str, Tensor]) -> dict[str, Extent]:
    stacks: dict[str, Experts] = {}
    inside: set[str] = set()
    for path, part in module.named_modules():
        if isinstance(part, Experts):
            prefix = f"{path}." if path else ""
            stacks |= {f"{prefix}{name}": part for name, _ in part.named_parameters(recurse=False)}
            stacks |= {f"{prefix}{name}": part for name, _ in part.named_buffers(recurse=False)}
            inside.update(name for name in tensors if name.startswith(prefix))
    return {name: _extent(tensor, stacks.get(name), mesh, name in inside) for name, tensor in tensors.items()}


def _extent(tensor: Tensor, stack: Experts | None, mesh: Mesh, of_expert: bool) -> Extent:
    if stack is None:
        return Extent(tensor, tensor.shape, 0, of_expert)
    num_experts = len(stack.expert_ids) * mesh.expert_parallel_size
    per_expert = tensor.shape[1:].numel()
    return Extent(tensor, torch.Size((num_experts, *tensor.shape[1:])), stack.expert_ids.start * per_expert, True)
