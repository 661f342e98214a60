"""The configuration of a run: a tree of frozen, strict pydantic models, read from one YAML file plus overrides.

A run is one printable value. Defaults < YAML file < ``section.field=value`` overrides; an unknown key, a wrong type or
a value out of range is an error, and all errors come in one message (:class:`distmoe.contracts.UserError`). The merged
configuration is written into the run's folder, and that file repeats the run.

Two kinds of choice carry settings of their own: the model, the gate, the optimizer and the schedule are *tagged
unions* on ``name``. To add one, add its class here, put it into the union, and add its line to the table that builds
it (``MODELS``, ``GATES``, ...); a unit test checks that unions and tables agree.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from distmoe.config_io import describe_errors, merge_overrides, read_yaml, to_yaml
from distmoe.contracts import UserError

NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
# YAML has lists only; the config holds tuples so that it stays hashable and frozen.
_AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Widths = Annotated[tuple[PositiveInt, ...], Field(min_length=1), _AsTuple]


class Section(BaseModel):
    """A part of the configuration: frozen, strict about types, refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class RunSection(Section):
    """Where the run is kept."""

    dir: Annotated[str, Field(min_length=1)] = "runs"
    """Folder of all runs."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] | None = None
    """Folder of this run inside ``run.dir``; default: the name of the config file."""
    resume: bool = False
    """Continue from the newest whole checkpoint in the run's folder (from step 0 if there is none)."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay; the best one on validation always does."""


class AugmentSection(Section):
    """Training-time augmentation, on the device; a value of null means the data set's own default."""

    flip: Literal["none", "random", "alternating"] | None = None
    """Mirror left-right: never, by a coin each epoch, or a coin in the first epoch and in turn afterwards."""
    crop_padding: NonNegativeInt | None = None
    """Pad by this many pixels (mirrored) and cut a random window of the original size; 0 is off."""
    cutout: NonNegativeInt | None = None
    """Side in pixels of a square at a random place that is painted with the mean colour; 0 is off."""


class SyntheticSection(Section):
    """The built-in procedural set: shape x texture at random places and scales, 32x32 colour, 10 classes."""

    difficulty: Share = 0.5
    """0 is easy, 1 is hard: contrast falls, noise and clutter grow."""
    train_size: PositiveInt = 20_000
    """Number of training samples."""
    test_size: PositiveInt = 4_000
    """Number of test samples."""


DataName = Literal[
    "cifar10", "cifar100", "mnist", "fashionmnist", "translated_mnist", "synthetic", "arrays"
]


class DataSection(Section):
    """What is learned from, and how it is fed."""

    name: DataName = "synthetic"
    """Data set."""
    root: Annotated[str, Field(min_length=1)] = ".data"
    """Folder with the original files, in torchvision's layout."""
    prepared_dir: Annotated[str, Field(min_length=1)] | None = None
    """Folder of the prepared ``.beton`` files; default: ``data.root``."""
    path: Annotated[str, Field(min_length=1)] | None = None
    """The ``.npz`` file of data set ``arrays``: ``inputs``, ``labels``, optional factor columns; see docs/data.md."""
    loader: Literal["ffcv", "resident"] = "ffcv"
    """``ffcv`` reads ``.beton`` files; ``resident`` keeps the whole set in memory and needs no extra package."""
    batch_size: PositiveInt = 256
    """Samples of one optimizer step, over all ranks and micro-batches."""
    eval_batch_size: PositiveInt = 500
    """Samples of one evaluation batch, over all ranks."""
    validation_size: NonNegativeInt = 5_000
    """Samples cut from the training set for validation, the same ones for every seed; 0: no validation."""
    drop_last: bool = True
    """Leave out the last, partial batch of a training epoch."""
    normalize: Literal["standard", "unit", "none"] = "standard"
    """Of the model's input: (x - mean) / std of the training set, x / 255, or x."""
    augment: AugmentSection = AugmentSection()
    """Training-time augmentation."""
    synthetic: SyntheticSection = SyntheticSection()
    """Settings of data set ``synthetic``."""

    @model_validator(mode="after")
    def _check(self) -> "DataSection":
        if self.name == "arrays" and self.path is None:
            raise ValueError("data.path must name the .npz file when data.name is arrays")
        if self.name != "arrays" and self.path is not None:
            raise ValueError(f"data.path is only read by data.name=arrays, not {self.name}: remove it")
        return self


class ModelSection(Section):
    """What all models share."""

    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Start from the weights of a run's folder or an exported .safetensors file, instead of fresh ones."""


class TutorialModel(ModelSection):
    """CNN experts and a CNN gate on the image; the mixture of the experts' class probabilities."""

    name: Literal["tutorial"] = "tutorial"
    """Model."""
    channels: Widths = (32, 64)
    """Channels of an expert's convolutions; a 2x2 max-pool follows each."""
    hidden: PositiveInt = 128
    """Width of an expert's hidden layer."""
    gate_channels: Widths = (16, 32)
    """Channels of the gate's convolutions."""
    gate_hidden: PositiveInt = 32
    """Width of the gate's hidden layer."""


class TutorialCNN(ModelSection):
    """One expert of the tutorial model alone, of any width: its dense twins."""

    name: Literal["tutorial_cnn"] = "tutorial_cnn"
    """Model."""
    channels: Widths = (32, 64)
    """Channels of the convolutions; a 2x2 max-pool follows each."""
    hidden: PositiveInt = 128
    """Width of the hidden layer."""


class ConvNetModel(ModelSection):
    """A fast convolutional network with feed-forward layers over spatial tokens; sparse where ``moe`` is given."""

    name: Literal["convnet"] = "convnet"
    """Model."""
    widths: Widths = (32, 64, 128)
    """Channels of the three stages, each half the height and width of the one before."""
    ffn_stages: Annotated[tuple[PositiveInt, ...], _AsTuple] = (2, 3)
    """Stages (from 1) that end with a feed-forward layer over their positions."""
    ffn_hidden: PositiveInt = 128
    """Hidden width of one expert, or of the dense feed-forward layer where there is no ``moe`` section."""

    @model_validator(mode="after")
    def _check(self) -> "ConvNetModel":
        if any(stage > len(self.widths) for stage in self.ffn_stages) or len(set(self.ffn_stages)) < len(self.ffn_stages):
            raise ValueError(f"model.ffn_stages {list(self.ffn_stages)} must be different stages of 1..{len(self.widths)}")
        return self


AnyModel = Annotated[TutorialModel | TutorialCNN | ConvNetModel, Field(discriminator="name")]


class DenseGateSection(Section):
    """Softmax over all experts: every expert sees every token."""

    name: Literal["dense"] = "dense"
    """Gate."""


class TopKGateSection(Section):
    """Every token goes to its k most probable experts."""

    name: Literal["topk"] = "topk"
    """Gate."""
    k: PositiveInt = 2
    """Experts a token."""
    renormalize: bool = True
    """Divide the chosen probabilities by their sum. Refused for k=1, where the gate would get no task gradient."""
    capacity_factor: PositiveFloat | None = None
    """Rows an expert takes from a routing group, as a multiple of the even share; null: dropless."""
    group: Literal["image", "batch"] | PositiveInt = "image"
    """Routing group inside which capacity acts: one image, that many images, or the micro-batch."""

    @model_validator(mode="after")
    def _check(self) -> "TopKGateSection":
        if self.k == 1 and self.renormalize:
            raise ValueError(
                "moe.gate.renormalize must be false for moe.gate.k=1: the one weight would always be 1, "
                "and the gate would get no gradient from the task"
            )
        return self


AnyGate = Annotated[DenseGateSection | TopKGateSection, Field(discriminator="name")]


class LossWeights(Section):
    """Weights of the auxiliary losses, applied in one place, the training step. 0 is off."""

    load_balance: NonNegativeFloat = 0.0
    """Switch/GShard load balance: share of assignments times mean probability."""
    importance: NonNegativeFloat = 0.0
    """Squared coefficient of variation of the summed probabilities."""
    z: NonNegativeFloat = 0.0
    """Mean squared log-sum-exp of the gate's logits."""


class MoESection(Section):
    """The mixture: how many experts, which gate, which auxiliary losses."""

    num_experts: PositiveInt = 8
    """Experts of each layer."""
    gate: AnyGate = TopKGateSection()
    """Gate of each layer."""
    loss_weights: LossWeights = LossWeights()
    """Weights of the auxiliary losses."""

    @model_validator(mode="after")
    def _check(self) -> "MoESection":
        if isinstance(self.gate, TopKGateSection) and self.gate.k > self.num_experts:
            raise ValueError(f"moe.gate.k ({self.gate.k}) must be at most moe.num_experts ({self.num_experts})")
        return self


class OptimSection(Section):
    """What all optimizers share."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of matrices and filters; biases, norms and other vectors are left alone."""


class SGDSection(OptimSection):
    """Stochastic gradient descent; weight decay is added to the gradient."""

    name: Literal["sgd"] = "sgd"
    """Optimizer."""
    momentum: Momentum = 0.9
    """Momentum."""
    nesterov: bool = False
    """Nesterov's form of momentum."""

    @model_validator(mode="after")
    def _check(self) -> "SGDSection":
        if self.nesterov and self.momentum == 0:
            raise ValueError("optim.nesterov needs optim.momentum above 0")
        return self


class AdamWSection(OptimSection):
    """AdamW: decoupled weight decay; with weight decay 0 it is Adam."""

    name: Literal["adamw"] = "adamw"
    """Optimizer."""
    betas: Annotated[tuple[Momentum, Momentum], _AsTuple] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""


AnyOptimizer = Annotated[SGDSection | AdamWSection, Field(discriminator="name")]


class ScheduleSection(Section):
    """Learning rate over the run: linear warm-up, then constant, cosine or linear decay to ``final_share`` of the peak."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up."""
    warmup_share: Share = 0.0
    """Share of all steps that the warm-up takes."""
    final_share: Share = 0.0
    """Learning rate at the last step, as a share of the peak; not used by ``constant``."""


class TrainSection(Section):
    """The loop."""

    epochs: PositiveInt = 5
    """Passes over the training set."""
    max_steps: PositiveInt | None = None
    """Length of the run in optimizer steps, instead of ``train.epochs``; the schedule follows it."""
    stop_after_steps: PositiveInt | None = None
    """Save and stop when this many steps are done, the schedule untouched, as an interruption would."""
    log_every_steps: PositiveInt = 20
    """Steps between two lines of metrics."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between two checkpoints, besides those after each evaluation."""
    evaluate_every_epochs: PositiveInt = 1
    """Epochs between two evaluations on the validation set."""
    select: Literal["best", "last"] = "best"
    """Which checkpoint is tested at the end: the best on validation or the last."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast over fp32 parameters; the gate stays in float32. fp16 needs CUDA."""
    clip_norm: PositiveFloat | None = None
    """Clip the global gradient norm to this; null: off."""
    accumulation: PositiveInt = 1
    """Micro-batches of one optimizer step; ``data.batch_size`` is cut into that many."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread evenly over all classes."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the weights with this decay a step, and evaluate it; null: off."""
    profile_steps: PositiveInt | None = None
    """Write a torch profile of that many steps, after five warm-up steps, into the run's folder."""
    num_threads: PositiveInt | None = None
    """CPU threads of torch; null: as many as this process may use. Part of what makes two runs equal bit for bit."""


class ParallelSection(Section):
    """How the run is spread over processes."""

    backend: Literal["auto", "replicas"] = "auto"
    """Engine: ``replicas`` holds the whole model in each process."""
    expert_parallel_size: PositiveInt | Literal["auto"] = "auto"
    """Processes that share one copy of the experts; it must divide the number of processes and of experts."""
    timeout_s: PositiveFloat = 300.0
    """Seconds after which a process that waits for another gives up."""


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

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        problems = list(_cross_checks(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _cross_checks(config: RunConfig) -> list[str]:
    problems = []
    if config.data.batch_size % config.train.accumulation:
        problems.append(
            f"data.batch_size ({config.data.batch_size}) must be divisible by train.accumulation ({config.train.accumulation})"
        )
    if isinstance(config.model, TutorialModel) and config.moe is None:
        problems.append("model.name tutorial needs a moe section, e.g. moe.num_experts=3 moe.gate.name=dense")
    if isinstance(config.model, TutorialModel) and config.moe is not None and config.moe.gate.name != "dense":
        problems.append("model.name tutorial mixes the class probabilities of all experts: moe.gate.name must be dense")
    if isinstance(config.model, TutorialCNN) and config.moe is not None:
        problems.append("model.name tutorial_cnn is dense: remove the moe section (moe=null)")
    if config.train.select == "best" and config.data.validation_size == 0:
        problems.append("train.select best needs validation data: set data.validation_size above 0 or train.select=last")
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
    merged = merge_overrides(read_yaml(path), overrides)
    config = parse_config(merged, source=str(path))
    if config.run.name is None:
        named = parse_config({**merged, "run": {**merged.get("run", {}), "name": path.stem}}, source=str(path))
        return named
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
