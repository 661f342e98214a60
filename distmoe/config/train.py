"""``run``, ``train`` and ``parallel``: where a run is kept, its loop, its processes."""

from typing import Annotated, Literal

from pydantic import Field

from distmoe.config.base import PathText, PositiveFloat, PositiveInt, Section


class RunSection(Section):
    """Where the run is kept."""

    dir: PathText = "runs"
    """Folder of all runs."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] | None = None
    """Folder of this run inside ``run.dir``; default: the name of the config file."""
    resume: bool = False
    """Continue from the newest whole checkpoint in the run's folder (from step 0 if there is none)."""
    retries: Annotated[int, Field(ge=0, le=1_000_000)] = 3
    """How often a launcher may start the run again from one and the same step; then it stops with the first failure."""
    keep_checkpoints: PositiveInt = 2
    """How many of the newest checkpoints stay; the best one on validation always does."""


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
    """Steps between two checkpoints, besides those after each epoch."""
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
    num_threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    """CPU threads of torch; null: as many as this process may use. Part of what makes two runs equal bit for bit."""


class ParallelSection(Section):
    """How the run is spread over processes."""

    backend: Literal["auto", "replicas", "deepspeed"] = "auto"
    """Engine: ``replicas`` holds the whole model in each process; ``deepspeed`` spreads experts and optimizer state."""
    expert_parallel_size: PositiveInt | Literal["auto"] = "auto"
    """Processes that share one copy of the experts; it must divide the number of processes and of experts."""
    zero_stage: Annotated[int, Field(ge=0, le=2)] = 0
    """What DeepSpeed's ZeRO spreads over processes: 0 nothing, 1 optimizer state, 2 gradients as well."""
    checked_exchanges: bool = False
    """Compare shapes and counts over ranks before each exchange: slower, for finding out why ranks do not agree."""
    overlap: Literal["none", "shared"] = "none"
    """What runs while tokens travel: nothing, or the shared expert, which on a CPU was measured to be no faster."""
    timeout_s: PositiveFloat = 300.0
    """Seconds after which a process that waits for another gives up."""
