"""Trained models back from a run's folder or an exported file, and the export."""

import contextlib
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distmoe.config import RunConfig, config_to_yaml, load_config, parse_config
from distmoe.config.io import merge_overrides, parse_yaml
from distmoe.contracts import Context, DataSpec, UserError
from distmoe.models import build_model
from distmoe.models.protocol import ModelOutput
from distmoe.moe.growing import Origin, Trained, TrainedTensors, exact, grown, mismatches, take_weights, upcycled
from distmoe.parallel.control import Control
from distmoe.training.checkpoint import spec_from_json, spec_to_json
from distmoe.training.run_folder import RunFolder
from distmoe.training.tensor_files import Entry, write_safetensors

logger = logging.getLogger(__name__)

_SAME = "use the configuration it was trained with"


class TrainedModel(nn.Module):
    """A trained network with what is needed to use it.

    Attributes:
        network: The model.
        config: The run it comes from.
        spec: The data it was trained on: input shape, class names.
    """

    def __init__(self, network: nn.Module, config: RunConfig, spec: DataSpec) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.spec = spec

    def forward(self, images: Tensor) -> ModelOutput:
        """(B, C, H, W) uint8 images, as stored and not normalised, to scores and routings."""
        context = Context(self.config.seed, 0, torch.arange(len(images), device=images.device), training=False)
        output: ModelOutput = self.network(images, context)
        return output

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """(B, num_classes) float32 class probabilities."""
        return self(images).scores.float().softmax(-1)  # of log probabilities it gives the probabilities back


def load_model(source: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> TrainedModel:
    """A trained model in evaluation mode, on the CPU.

    Args:
        source: The folder of a run (the checkpoint that was selected for its test is taken) or an exported
            ``.safetensors`` file.
        overrides: Changes of its configuration, e.g. ``["moe.gate.k=4"]`` for more experts a token.

    Raises:
        UserError: There is no trained model there, it is damaged, or an override does not fit its weights.
    """
    config, spec, weights = _open(Path(source), overrides, Control())
    network = build_model(config, spec)
    load_inference_weights(network, weights, str(source))
    return TrainedModel(network, config, spec).eval()


def export_model(run: str | Path, target: str | Path) -> Path:
    """Writes one file that holds the trained model of a run: weights, configuration and data description.

    Raises:
        UserError: The run has no trained model, or the file cannot be written.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise UserError(f"export to {target}: the name must end in .safetensors")
    folder = RunFolder.existing(run)
    config = load_config(folder.config_file)
    checkpoint = folder.selected(config.train.select)
    weights, spec = checkpoint.trained(), checkpoint.state.spec
    metadata = {"config": config_to_yaml(config), "spec": json.dumps(spec_to_json(spec))}
    entries = [
        Entry(name, weights.dtype(name), shape, partial(weights.read, name)) for name, shape in weights.shapes().items()
    ]
    temporary = target.with_name(target.name + ".tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(temporary, entries, metadata)
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(
            f"export to {target}: cannot be written ({error}); free space or choose another folder"
        ) from None
    return target


def load_inference_weights(module: nn.Module, weights: Trained, source: str) -> None:
    """Copies weights and buffers into a model by name; of experts those that it holds.

    Raises:
        UserError: A name is missing or too many, or a shape differs; the message lists the first of them.
    """
    _take(exact(module), weights, source, _SAME)


def check_fits(module: nn.Module, weights: Trained, source: str) -> None:
    """Raises what :func:`load_inference_weights` would, and reads nothing."""
    _check(exact(module), weights, source, _SAME)


def start_from(module: nn.Module, config: RunConfig, source: str | Path, control: Control | None = None) -> None:
    """Takes the initial weights of a model from a trained one, in the way of ``model.init_mode``. Collective.

    Args:
        module: With the fresh initial weights of ``config``, some of which it may keep.
        config: Its ``model.init_mode``, ``init_skip`` and ``upcycle_noise`` are used, and the random seed.
        source: A run's folder or an exported file; each rank reads of it what its part of the model needs.
        control: Of all ranks; None: there is one.

    Raises:
        UserError: There is no trained model, or it does not fit; the model is unchanged.
    """
    trained, _, weights = _open(Path(source), (), control or Control())
    place = f"model.init_from {source}"
    origins = _origins(module, config, trained, place)
    skipped = config.model.init_skip
    names = {origin.target for origin in exact(module)} | weights.shapes().keys()
    for prefix in skipped:
        if not any(_below(name, (prefix,)) for name in names):
            raise UserError(f"model.init_skip {prefix}: no tensor of this model or of {source} begins with it")
    origins = [one for one in origins if not (_below(one.source, skipped) or _below(one.target, skipped))]
    kept = _Without(weights, skipped)
    _take(origins, kept, place, _remedy(config, trained))
    logger.info("%s, %s: %d tensors taken", place, config.model.init_mode, len(kept.shapes()))


def _origins(module: nn.Module, config: RunConfig, trained: RunConfig, place: str) -> list[Origin]:
    mode = config.model.init_mode
    if mode == "exact":
        return exact(module)
    if config.moe is None:
        raise UserError(
            f"model.init_mode {mode} is for a model with experts: give a moe section, or use model.init_mode=exact"
        )
    if mode == "upcycle":
        if trained.moe is not None:
            raise UserError(f"{place}: is no dense model, which alone can be upcycled: use model.init_mode=grow")
        return upcycled(module, config.model.upcycle_noise, config.seed)
    if trained.moe is None:
        raise UserError(f"{place}: is a dense model, which cannot grow: use model.init_mode=upcycle")
    if trained.moe.num_experts > config.moe.num_experts:
        raise UserError(
            f"{place}: has {trained.moe.num_experts} experts, more than moe.num_experts ({config.moe.num_experts}): "
            "a model grows to as many or more"
        )
    return grown(module, trained.moe.num_experts)


def _remedy(config: RunConfig, trained: RunConfig) -> str:
    """What to do where the tensors do not fit."""
    before, now = trained.moe, config.moe
    if config.model.init_mode == "exact" and now is not None and before is None:
        return "use model.init_mode=upcycle to make experts of a dense model"
    if config.model.init_mode == "exact" and now and before and now.num_experts > before.num_experts:
        return "use model.init_mode=grow to add experts"
    return f"{_SAME}, or name in model.init_skip what is to start fresh"


def _below(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a tensor is one of these, or inside one of these modules."""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


class _Without:
    """Trained tensors but for some."""

    def __init__(self, tensors: TrainedTensors, prefixes: tuple[str, ...]) -> None:
        self._shapes = {name: shape for name, shape in tensors.shapes().items() if not _below(name, prefixes)}
        self.read = tensors.read

    def shapes(self) -> dict[str, torch.Size]:
        return self._shapes


class _ExportedFile:
    """The tensors of a file that :func:`export_model` wrote, see :class:`distmoe.moe.growing.TrainedTensors`."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def shapes(self) -> dict[str, torch.Size]:
        return self._shapes

    def read(self, name: str, rows: range | None = None) -> Tensor:
        tensor: Tensor
        tensor = self._file.get_tensor(name) if rows is None else self._file.get_slice(name)[rows.start : rows.stop]
        return tensor


def _take(origins: list[Origin], weights: Trained, source: str, remedy: str) -> None:
    _check(origins, weights, source, remedy)
    take_weights(origins, weights)


def _check(origins: list[Origin], weights: Trained, source: str, remedy: str) -> None:
    problems = mismatches(origins, weights)
    if problems:
        shown = "; ".join(problem if len(problem) <= 200 else f"{problem[:197]}..." for problem in problems[:3])
        raise UserError(
            f"{source}: {len(problems)} of its tensors do not fit model.name and its settings: {shown}; {remedy}"
        )


def _open(
    source: Path, overrides: tuple[str, ...] | list[str], control: Control
) -> tuple[RunConfig, DataSpec, TrainedTensors]:
    """Of a run's folder or an exported file: configuration, data description and tensors. Collective."""
    if not control.on_main(source.is_dir):
        opened: list[tuple[RunConfig, DataSpec, TrainedTensors]] = []
        control.together(lambda: opened.append(_exported(source, overrides)))  # an open file cannot be sent around
        return opened[0]
    folder = RunFolder(source)
    config = control.on_main(lambda: load_config(RunFolder.existing(source).config_file, overrides))
    checkpoint = folder.selected(config.train.select, control=control)
    return config, checkpoint.state.spec, checkpoint.trained()


def _exported(source: Path, overrides: tuple[str, ...] | list[str]) -> tuple[RunConfig, DataSpec, TrainedTensors]:
    if not source.is_file():
        raise UserError(f"model {source}: no such folder or file; give a run's folder or an exported .safetensors file")
    try:
        file: Any = safe_open(source, framework="pt")
        metadata = file.metadata() or {}
        values = parse_yaml(metadata["config"], str(source))
        if not isinstance(values, dict):
            raise TypeError("its configuration has no sections")
        spec = spec_from_json(json.loads(metadata["spec"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"model {source}: not a whole file written by `distmoe export` ({error}); export the run again"
        ) from None
    return parse_config(merge_overrides(values, overrides, RunConfig), str(source)), spec, _ExportedFile(file)
