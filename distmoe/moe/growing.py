"""Mixtures that start from trained weights: of a dense network (sparse upcycling), or of a mixture of fewer experts.

Where a tensor starts from is an :class:`Origin`, by name and shape, so that everything is checked before anything is
changed. Names and shapes are those of the whole model also where this rank holds a part of the experts; of the trained
tensors it reads only what it needs. What is drawn is keyed by an expert's global id: every placement starts alike.

Example:
    >>> layer = MoELayer(gate, MLPExperts(range(8), width=64, hidden=256))
    >>> take_weights(upcycled(layer), dense.state_dict())  # dense.fc1: nn.Linear(64, 256), dense.fc2: back to 64
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import EllipsisType
from typing import Protocol

import torch
from torch import Tensor, nn

from distmoe import noise
from distmoe.moe.experts import Experts, MLPExperts, ModuleExperts
from distmoe.moe.gates.attentive import AttentiveGate
from distmoe.moe.gates.base import Gate
from distmoe.moe.gates.cosine import CosineGate, CosineHead
from distmoe.moe.gates.soft import SoftGate
from distmoe.moe.layer import MoELayer


class TrainedTensors(Protocol):
    """The tensors of a trained model, which can be read in parts."""

    def shapes(self) -> Mapping[str, torch.Size]:
        """Of all of them, by name."""
        ...

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """One of them on the CPU: these entries of its first axis, without reading the rest; None: all of it."""
        ...


Trained = Mapping[str, Tensor] | TrainedTensors


@dataclass(frozen=True)
class Origin:
    """What one tensor of a model, or a part of it, starts from.

    Attributes:
        target: Its name in this model.
        source: Name of a tensor of the trained model.
        shape: Shape which that must have.
        take: Copies what belongs here from the rows of it.
        rows: Entries of its first axis that this rank needs; None: all; empty: its experts live on other ranks.
    """

    target: str
    source: str
    shape: torch.Size
    take: Callable[[Tensor], object]
    rows: range | None = None


def exact(model: nn.Module) -> list[Origin]:
    """Every parameter and buffer from the one of the same name and shape."""
    origins = {name: Origin(name, name, own.shape, own.copy_) for name, own in _tensors(model).items()}
    for mixture in _mixtures(model):
        for origin in _experts(mixture, mixture.gate.num_experts):
            origins[origin.target] = origin
    return list(origins.values())


def upcycled(model: nn.Module, noise_std: float = 0.0, seed: int = 0) -> list[Origin]:
    """Every expert from the dense network in the place of its mixture; gates and shared experts stay as they are.

    What stacked MLPs start from has linear layers ``fc1`` and ``fc2`` (weights (H, D) and (D, H), as torch has them);
    what module experts start from is one such module. Its names are those of the place where the :class:`MoELayer`
    stands, or begin with ``network`` where the mixture is the whole model. All other tensors are taken as they are.

    Where the weights of a token sum to 1 and there is no shared expert, the mixture then computes what the dense
    network does; but equal experts give its gate no gradient from the task, until they have grown apart. With noise
    on the copies they have from the start.

    Args:
        model: A model or a layer, with its initial weights.
        noise_std: Standard deviation of normal noise on the matrices and filters of each copy, relative to that of the
            copied entries.
        seed: The run's random seed, which keys the noise beside the tensor's name and the expert's global id.

    Raises:
        ValueError: Experts of another kind.

    Source: Komatsuzaki et al. 2022 (arXiv:2212.05055). Differs: every mixture of the model is upcycled; the
    noise is on in a run unless it is switched off (``model.upcycle_noise``).
    """
    origins = {origin.target: origin for origin in exact(model)}
    copies = []
    for mixture in _mixtures(model):
        own_parts = tuple(f"{mixture.path}{part}." for part in ("gate", "experts", "shared"))
        origins = {name: origin for name, origin in origins.items() if not name.startswith(own_parts)}
        place = mixture.path if isinstance(mixture.layer, MoELayer) else f"{mixture.path}network."
        for index, expert_id in enumerate(mixture.experts.expert_ids):
            for own_name, dense_name, own in _as_dense(mixture.experts, index):
                key = noise.make_key("upcycle", seed, f"{mixture.path}experts", dense_name, expert_id)
                take = partial(_copy_with_noise, own, key, noise_std)
                copies.append(Origin(f"{mixture.path}experts.{own_name}", place + dense_name, own.shape, take))
    return [*origins.values(), *copies]


def grown(model: nn.Module, num_trained: int) -> list[Origin]:
    """The first ``num_trained`` experts of every mixture from those of a smaller one; the others stay as they are.

    So do a gate's outputs (logits, directions, slots): those for the first experts are the trained ones. In a
    balancer's buffers, where only differences count, the other experts start at the mean of the trained ones: at 0,
    beside large totals or biases, an expert would at first get everything, or nothing.

    Args:
        model: A model or a layer, with its initial weights. The outputs of a gate are those of the last layer in its
            network.
        num_trained: Experts of each mixture of the trained model.

    Raises:
        ValueError: The trained model has more experts than this one.
    """
    origins = {origin.target: origin for origin in exact(model)}
    for mixture in _mixtures(model):
        if num_trained > mixture.gate.num_experts:
            raise ValueError(
                f"{num_trained} trained experts are more than the {mixture.gate.num_experts} of this model"
            )
        experts = f"{mixture.path}experts."
        origins = {name: origin for name, origin in origins.items() if not name.startswith(experts)}
        for origin in [*_experts(mixture, num_trained), *_grown_gate(mixture, num_trained)]:
            origins[origin.target] = origin
    return list(origins.values())


def mismatches(origins: list[Origin], tensors: Trained) -> list[str]:
    """What keeps a model from starting from these tensors: missing ones, ones too many, other shapes; sorted."""
    needed = {origin.source: origin.shape for origin in origins}
    given = _as_trained(tensors).shapes()
    problems = [f"{name} is missing" for name in needed.keys() - given.keys()]
    problems += [f"{name} is not in this model" for name in given.keys() - needed.keys()]
    problems += [
        f"{name} has shape {list(given[name])}, this model takes {list(needed[name])}"
        for name in needed.keys() & given.keys()
        if given[name] != needed[name]
    ]
    return sorted(problems)


@torch.no_grad()
def take_weights(origins: list[Origin], tensors: Trained) -> None:
    """Copies trained tensors, or the parts that this rank needs, to where they belong.

    Raises:
        ValueError: They do not fit; nothing was changed.
    """
    problems = mismatches(origins, tensors)
    if problems:
        raise ValueError(f"{len(problems)} of the trained tensors do not fit: {'; '.join(problems[:3])}")
    trained = _as_trained(tensors)
    for origin in origins:
        if origin.rows is None or len(origin.rows) > 0:
            origin.take(trained.read(origin.source, origin.rows))


class FrozenExperts:
    """Keeps the weights of the first experts of every mixture, bit for bit, whatever optimizer moves the others.

    Stacked experts share a parameter, so they cannot be left out of the optimizer. Their part of the gradient is set to
    zero as it comes, before norms and clipping see it, and what weight decay or momentum still do to them is undone.

    Args:
        model: As an engine has prepared it: its parameters are those that are trained.
        num_frozen: Experts 0 to ``num_frozen - 1`` of each mixture.

    Raises:
        ValueError: A mixture has fewer experts, or there is none.
    """

    def __init__(self, model: nn.Module, num_frozen: int) -> None:
        self._parts: list[tuple[nn.Parameter, slice | EllipsisType]] = []
        mixtures = list(_mixtures(model))
        num_experts = min((mixture.gate.num_experts for mixture in mixtures), default=0)
        if num_frozen > num_experts:
            raise ValueError(f"the number of frozen experts ({num_frozen}) must be at most that of all ({num_experts})")
        for mixture in mixtures:
            experts, num_local = mixture.experts, mixture.num_local(num_frozen)
            self._parts += [(stack, slice(num_local)) for stack in experts.parameters(recurse=False) if num_local]
            if isinstance(experts, ModuleExperts):
                for module in list(experts.modules_by_id.values())[:num_local]:
                    self._parts += [(weight, ...) for weight in module.parameters()]
        for parameter, part in self._parts:
            parameter.register_hook(_zeroing(part))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Around an optimizer's step: what it does to the frozen experts is undone."""
        kept = [parameter.detach()[part].clone() for parameter, part in self._parts]
        yield
        with torch.no_grad():
            for (parameter, part), weights in zip(self._parts, kept, strict=True):
                parameter[part].copy_(weights)


class _InMemory:
    """Whole tensors as :class:`TrainedTensors`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: range | None = None) -> Tensor:
        tensor = self._tensors[name]
        return tensor if rows is None else tensor[rows.start : rows.stop]


def _as_trained(tensors: Trained) -> TrainedTensors:
    return _InMemory(tensors) if isinstance(tensors, Mapping) else tensors


def _zeroing(part: slice | EllipsisType) -> Callable[[Tensor], Tensor]:
    def zero(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()  # a hook must leave what it is given as it is
        gradient[part] = 0.0
        return gradient

    return zero


@dataclass(frozen=True)
class _Mixture:
    """A module that holds a gate and experts; ``path`` is what the names of its tensors begin with."""

    path: str
    layer: nn.Module
    gate: Gate
    experts: Experts

    def num_local(self, num_first: int) -> int:
        """How many of this rank's experts are among the ``num_first`` first of all."""
        return min(max(num_first - self.experts.expert_ids.start, 0), len(self.experts.expert_ids))


def _mixtures(model: nn.Module) -> Iterator[_Mixture]:
    for name, layer in model.named_modules():
        gate, experts = getattr(layer, "gate", None), getattr(layer, "experts", None)
        if isinstance(gate, Gate) and isinstance(experts, Experts):
            yield _Mixture(f"{name}." if name else "", layer, gate, experts)


def _tensors(module: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers by name, without gradient; they share memory with the module's."""
    tensors = {**dict(module.named_parameters(recurse=recurse)), **dict(module.named_buffers(recurse=recurse))}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _as_dense(experts: Experts, index: int) -> list[tuple[str, str, Tensor]]:
    """The tensors of one local expert: own name, name in a dense network, and values, shaped as there; see _tensors."""
    if isinstance(experts, MLPExperts):
        dense_names = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}
        return [(own, dense_names[own], stack[index].t()) for own, stack in _tensors(experts).items()]
    if isinstance(experts, ModuleExperts):
        expert_id, module = list(experts.modules_by_id.items())[index]
        return [(f"modules_by_id.{expert_id}.{name}", name, tensor) for name, tensor in _tensors(module).items()]
    raise ValueError(f"{type(experts).__name__} cannot start from a dense network: only MLPExperts and ModuleExperts")


def _copy_with_noise(own: Tensor, key: int, noise_std: float, dense: Tensor) -> None:
    """Matrices and filters get noise, vectors none."""
    own.copy_(dense)
    if noise_std > 0 and dense.dim() >= 2:
        draws = noise.normal(key, torch.arange(dense.numel(), device=dense.device)).view(dense.shape)
        own.add_((draws * (noise_std * dense.float().std(correction=0))).to(own))


def _experts(mixture: _Mixture, num_trained: int) -> Iterator[Origin]:
    """The first ``num_trained`` experts, each from itself: of this rank's what they need, of the others' only names."""
    path, experts = f"{mixture.path}experts", mixture.experts
    ids = experts.expert_ids[: mixture.num_local(num_trained)]
    for name, stack in _tensors(experts, recurse=False).items():
        shape = torch.Size((num_trained, *stack.shape[1:]))
        yield Origin(f"{path}.{name}", f"{path}.{name}", shape, stack[: len(ids)].copy_, ids)
    if isinstance(experts, ModuleExperts):
        like = _tensors(next(iter(experts.modules_by_id.values())))
        for expert_id in range(num_trained):
            local = expert_id in experts.expert_ids
            tensors = _tensors(experts.modules_by_id[str(expert_id)]) if local else like
            for short, tensor in tensors.items():
                name = f"{path}.modules_by_id.{expert_id}.{short}"
                yield Origin(name, name, tensor.shape, tensor.copy_, None if local else range(0))


def _grown_gate(mixture: _Mixture, num_trained: int) -> Iterator[Origin]:
    """Of the gate, what there is for each expert: the outputs of its last layer, and the buffers of its balancer."""
    path, gate = f"{mixture.path}gate", mixture.gate
    # Slots of an expert are side by side; where another gate has several outputs an expert, the experts are.
    places = (1, gate.num_experts, -1) if isinstance(gate, SoftGate) else (-1, gate.num_experts, 1)
    axes = _expert_axes(gate)
    for name, weight in gate.named_parameters(path):
        if weight in axes:
            axis = axes[weight]
            shape = list(weight.shape)
            shape[axis] = shape[axis] // gate.num_experts * num_trained
            own = weight.detach().unflatten(axis, places).narrow(axis + 1, 0, num_trained)
            yield Origin(name, name, torch.Size(shape), partial(_copy_outputs, own, axis))
    if gate.balancer is not None:
        for name, buffer in gate.balancer.named_buffers(f"{path}.balancer"):
            yield Origin(name, name, torch.Size((num_trained,)), partial(_copy_balance, buffer))


def _expert_axes(gate: Gate) -> dict[nn.Parameter, int]:
    """The parameters of a gate with an axis for the experts, and which one that is."""
    if gate.network is None or isinstance(gate, AttentiveGate):
        return {}
    layers = [layer for layer in gate.network.modules() if next(layer.parameters(recurse=False), None) is not None]
    last = gate.head if isinstance(gate, CosineGate) else layers[-1]
    if isinstance(last, CosineHead):
        return {last.directions: 1}
    return dict.fromkeys(last.parameters(recurse=False), 0)


def _copy_outputs(own: Tensor, axis: int, trained: Tensor) -> None:
    own.copy_(trained.unflatten(axis, own.shape[axis : axis + 3]))


def _copy_balance(own_E: Tensor, trained_E: Tensor) -> None:
    own_E.fill_(float(trained_E.mean()))
    own_E[: len(trained_E)].copy_(trained_E)
