"""The configuration of a run: a tree of frozen, strict pydantic models, read from one YAML file plus overrides.

A run is one printable value. Defaults < YAML file < ``section.field=value`` overrides; an unknown key, a wrong type or
a value out of range is an error; all of them come in one message (:class:`distmoe.contracts.UserError`), and what does
not fit between sections is checked once each section is right. The merged configuration is written into the run's
folder, and that file repeats the run under another name.

Two kinds of choice carry settings of their own: the model, the gate, the optimizer and the schedule are *tagged
unions* on ``name``. To add one, add its class to the module of its section, put it into the union there, and add its
line to the table that builds it (``MODELS``, ``GATES``, ...); a unit test checks that unions and tables agree.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from distmoe.config.base import Section
from distmoe.config.data import AugmentSection, DataName, DataSection, SyntheticSection
from distmoe.config.io import describe_errors, merge_overrides, read_yaml, to_yaml
from distmoe.config.model import AnyModel, ConvNetModel, ModelSection, TutorialCNN, TutorialModel
from distmoe.config.moe import (
    AnyGate,
    AnyNetwork,
    AttentiveGateSection,
    CNNNetwork,
    CosineGateSection,
    CosineNetwork,
    DenseGateSection,
    ExpertChoiceGateSection,
    HashGateSection,
    LinearNetwork,
    LossWeights,
    MLPNetwork,
    MoESection,
    NoisyTopKGateSection,
    SigmoidGateSection,
    SoftGateSection,
    SwitchGateSection,
    TopKGateSection,
    UniformGateSection,
)
from distmoe.config.optim import AdamWSection, AnyOptimizer, OptimSection, ScheduleSection, SGDSection
from distmoe.config.train import ParallelSection, RunSection, TrainSection
from distmoe.contracts import UserError

__all__ = [
    "AdamWSection",
    "AnyGate",
    "AnyModel",
    "AnyNetwork",
    "AnyOptimizer",
    "AttentiveGateSection",
    "AugmentSection",
    "CNNNetwork",
    "ConvNetModel",
    "CosineGateSection",
    "CosineNetwork",
    "DataName",
    "DataSection",
    "DenseGateSection",
    "ExpertChoiceGateSection",
    "HashGateSection",
    "LinearNetwork",
    "LossWeights",
    "MLPNetwork",
    "MoESection",
    "ModelSection",
    "NoisyTopKGateSection",
    "OptimSection",
    "ParallelSection",
    "RunConfig",
    "RunSection",
    "SGDSection",
    "ScheduleSection",
    "Section",
    "SigmoidGateSection",
    "SoftGateSection",
    "SwitchGateSection",
    "SyntheticSection",
    "TopKGateSection",
    "TrainSection",
    "TutorialCNN",
    "TutorialModel",
    "UniformGateSection",
    "config_to_yaml",
    "load_config",
    "parse_config",
]


class RunConfig(Section):
    """One run, whole."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Random seed of weights, order, augmentation and noise."""
    run: RunSection = RunSection()
    """Where the run is kept."""
    data: DataSection = DataSection()
    """What is learned from."""
    model: AnyModel = ConvNetModel()
    """The network."""
    moe: MoESection | None = None
    """The mixture; null for a dense model."""
    optim: AnyOptimizer = AdamWSection()
    """The optimizer."""
    schedule: ScheduleSection = ScheduleSection()
    """The learning rate over the run."""
    train: TrainSection = TrainSection()
    """The loop."""
    parallel: ParallelSection = ParallelSection()
    """Processes."""

    def check_trainable(self) -> None:
        """Refuses settings that are right for evaluating a run, but not for training one.

        Raises:
            UserError: One of them is; the message says which, and what to do.
        """
        gate_problem = self.moe.gate.training_problem() if self.moe is not None else None
        for problem in filter(None, (self.model.training_problem(), gate_problem)):
            raise UserError(problem)

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        problems = list(_cross_checks(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _cross_checks(config: RunConfig) -> list[str]:
    problems = []
    if config.data.batch_size % config.train.accumulation:
        batch_size, accumulation = config.data.batch_size, config.train.accumulation
        problems.append(f"data.batch_size ({batch_size}) must be divisible by train.accumulation ({accumulation})")
    if isinstance(config.model, TutorialModel) and config.moe is None:
        problems.append("model.name tutorial needs a moe section, e.g. moe.num_experts=3 moe.gate.name=dense")
    if isinstance(config.model, TutorialModel) and config.moe is not None:
        problems += [f"model.name tutorial: {problem}" for problem in _mixture_problems(config.moe)]
    if not isinstance(config.model, TutorialModel) and config.moe is not None and config.moe.objective != "likelihood":
        problems.append(
            f"moe.objective {config.moe.objective} is for models that mix class probabilities (tutorial), "
            f"not for model.name {config.model.name}: moe.objective=likelihood"
        )
    if isinstance(config.model, TutorialCNN) and config.moe is not None:
        problems.append("model.name tutorial_cnn is dense: remove the moe section (moe=null)")
    if config.train.select == "best" and config.data.validation_size == 0:
        problems.append(
            "train.select best needs validation data: set data.validation_size above 0 or train.select=last"
        )
    return problems


def _mixture_problems(moe: MoESection) -> list[str]:
    """Why the gate does not give each sample equally many experts with weights that sum to 1."""
    problems = []
    if moe.gate.name in ("switch", "expert_choice", "soft"):
        problems.append(f"moe.gate.name {moe.gate.name} does not mix class probabilities with weights that sum to 1")
    if not getattr(moe.gate, "renormalize", True):
        problems.append("the weights of a mixture of class probabilities must sum to 1: moe.gate.renormalize=true")
    if getattr(moe.gate, "scale", 1.0) != 1.0:
        problems.append("the weights of a mixture of class probabilities must sum to 1: moe.gate.scale=1")
    if moe.gate.name not in ("switch", "expert_choice") and getattr(moe.gate, "capacity_factor", None) is not None:
        problems.append("every sample needs all its experts: moe.gate.capacity_factor=null")
    if moe.shared_hidden:
        problems.append("there is no shared expert in a mixture of class probabilities: moe.shared_hidden=0")
    return problems


def load_config(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> RunConfig:
    """Read a YAML file, apply ``section.field=value`` overrides, check everything.

    Args:
        path: YAML file with a complete run.
        overrides: Dotted keys with values in YAML's notation, e.g. ``"optim.lr=1e-2"`` or ``"moe=null"``.

    Returns:
        The configuration; ``run.name`` is filled in from the file's name where it was left open.

    Raises:
        UserError: The file cannot be read, or a key or value is wrong; the message lists all problems.
    """
    path = Path(path)
    merged = merge_overrides(read_yaml(path), overrides, RunConfig)
    config = parse_config(merged, source=str(path))
    if config.run.name is None:
        return parse_config({**merged, "run": {**merged.get("run", {}), "name": path.stem}}, source=str(path))
    return config


def parse_config(values: dict[str, Any], source: str) -> RunConfig:
    """Check a tree of plain values; ``source`` names it in the error message."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {describe_errors(error, RunConfig)}") from None


def config_to_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that :func:`load_config` reads back to an equal value."""
    return to_yaml(config.model_dump(mode="json"))
