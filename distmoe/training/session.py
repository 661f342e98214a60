"""One training run, put together: data, model, engine, plans; and its state as a checkpoint sees it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distmoe.config import RunConfig, config_to_yaml, parse_config
from distmoe.config.io import parse_yaml
from distmoe.contracts import UserError
from distmoe.data.augment import Augmenter
from distmoe.data.index_plan import IndexPlan, split_validation
from distmoe.data.loaders import OpenData, open_data
from distmoe.models import build_model
from distmoe.models.protocol import Model, Network
from distmoe.moe.groups import Group, check_groups
from distmoe.moe.growing import FrozenExperts
from distmoe.moe.losses import build_losses
from distmoe.parallel.batch_norm import share_batch_statistics
from distmoe.parallel.engines import build_engine, choose_engine
from distmoe.parallel.engines.protocol import Engine
from distmoe.parallel.mesh import Mesh
from distmoe.parallel.runtime import Runtime
from distmoe.parallel.shards import BUFFER, WEIGHT, Piece, buffer_extents, load_extents, owned_pieces
from distmoe.training.checkpoint import Best, Checkpoint, Progress, TrainingState
from distmoe.training.clock import Clock
from distmoe.training.cost import Cost, measure_cost
from distmoe.training.ema import WeightAverage
from distmoe.training.evaluation import Evaluation, evaluate
from distmoe.training.feed import Feed
from distmoe.training.loading import check_fits, load_inference_weights, start_from
from distmoe.training.metrics import Interval
from distmoe.training.optim import build_optimizer
from distmoe.training.schedule import build_schedule
from distmoe.training.step import Mixtures
from distmoe.training.tensor_files import ModelTensors

logger = logging.getLogger(__name__)


@dataclass
class Session:
    """Everything the loop needs. Made by :func:`open_session`.

    Attributes:
        config: The run.
        runtime: The process.
        data: The open data set.
        module: The model itself.
        model: What to call: the module as the engine prepared it.
        mixtures: Gates, auxiliary losses and frozen experts of its MoE layers.
        cost: Parameters and work of the model.
        engine: Owns the optimizer.
        average: Averaged weights, if the run keeps them.
        plan: Of training.
        evaluation_plans: Of ``validation`` (may be empty) and ``test``.
        feed: Of training.
        clock: Its times.
        total_steps: Optimizer steps of the whole run.
        progress: Where the run is.
        best: Best validation result so far.
        interval: Of the metrics line to come.
    """

    config: RunConfig
    runtime: Runtime
    data: OpenData
    module: nn.Module
    model: Model
    mixtures: Mixtures
    cost: Cost
    engine: Engine
    average: WeightAverage | None
    plan: IndexPlan
    evaluation_plans: dict[str, IndexPlan]
    augmenter: Augmenter
    feed: Feed
    clock: Clock
    total_steps: int
    progress: Progress
    best: Best | None = None
    interval: Interval = field(default_factory=Interval)

    @property
    def finished(self) -> bool:
        """Whether all steps and the last evaluation are done."""
        return self.progress.step == self.total_steps and self.progress.evaluated

    @property
    def layout(self) -> dict[str, Any]:
        """How the model is spread: ``world_size``, ``expert_parallel_size``, ``engine``, ``zero_stage``."""
        mesh = self.runtime.mesh
        return {
            "world_size": mesh.world_size,
            "expert_parallel_size": mesh.expert_parallel_size,
            "engine": choose_engine(self.config, mesh),
            "zero_stage": self.config.parallel.zero_stage,
        }

    def state(self) -> TrainingState:
        """Everything a checkpoint holds besides tensors."""
        return TrainingState(
            progress=self.progress,
            best=self.best,
            scaler=self.engine.scaler_state(),
            fingerprint=self.data.fingerprint,
            spec=self.data.spec,
            config_yaml=config_to_yaml(self.config),
            interval=self.interval.state(),
            times=self.clock.state(),
            layout=self.layout,
        )

    def pieces(self) -> Iterator[Piece]:
        """The tensors this rank writes into a checkpoint, as they are until the next step."""
        mesh = self.runtime.mesh
        yield from self.engine.pieces()
        yield from owned_pieces(BUFFER, buffer_extents(self.module, mesh), mesh)
        if self.average is not None:
            yield from self.average.pieces()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint, of any layout.

        Raises:
            UserError: It is of other data, another model or another optimizer.
        """
        state, source = checkpoint.state, checkpoint.tensors
        self._check_resumable(state)
        check_fits(self.module, ModelTensors(source, WEIGHT), f"checkpoint of step {state.progress.step}")
        self.engine.load(source, state.progress.step)
        self.engine.load_scaler_state(state.scaler)
        load_extents(source, BUFFER, buffer_extents(self.module, self.runtime.mesh))
        if self.average is not None:
            self.average.load(source)
        self.progress, self.best = state.progress, state.best
        self.interval.load(state.interval, self.runtime.device)
        if state.times:
            self.clock.load(state.times)

    def _check_resumable(self, state: TrainingState) -> None:
        self.check_same_data(state)
        if state.progress.step > self.total_steps:
            raise UserError(
                f"the checkpoint of step {state.progress.step} is beyond this run's {self.total_steps} steps: "
                "set train.epochs or train.max_steps to at least as many, or start a new run"
            )
        if state.progress.epoch_step > self.plan.num_steps:
            raise UserError(
                f"the checkpoint of step {state.progress.step} lies {state.progress.epoch_step} steps into its epoch, "
                f"which has only {self.plan.num_steps} with data.batch_size={self.config.data.batch_size}: resume with "
                "the data section it was trained with, or start a new run"
            )
        trained_with = parse_config(parse_yaml(state.config_yaml, "checkpoint"), "checkpoint").optim.name
        if trained_with != self.config.optim.name:
            raise UserError(
                f"the checkpoint of step {state.progress.step} holds the moments of {trained_with}, which optim.name "
                f"({self.config.optim.name}) cannot use: resume with optim.name={trained_with}, or start a new run "
                "from its weights with model.init_from"
            )

    def check_same_data(self, state: TrainingState) -> None:
        """Refuses a checkpoint of other data: its test samples may be among those it was trained on.

        Raises:
            UserError: The fingerprints differ.
        """
        if state.fingerprint != self.data.fingerprint:
            raise UserError(
                f"the checkpoint of step {state.progress.step} was trained on other data than data.name="
                f"{self.config.data.name} now holds (fingerprints {state.fingerprint[:12]} and "
                f"{self.data.fingerprint[:12]}): restore the data or start a new run"
            )

    def start_from_weights(self, source: str) -> None:
        """Takes the weights of another run, or of an exported file, for the initial ones, as ``model.init_mode`` says.

        Collective.

        Raises:
            UserError: There are none, or they do not fit.
        """
        start_from(self.module, self.config, source, self.runtime.control)
        self.engine.adopt_weights()
        if self.average is not None:
            self.average.restart()

    def evaluate(self, split: str) -> Evaluation:
        """Evaluates the weights as they are now, averaged where the run averages."""
        with self.average.swapped_in() if self.average else nullcontext():
            return self.evaluate_current(split)

    def evaluate_current(self, split: str) -> Evaluation:
        """Evaluates the model's own weights on ``validation`` or ``test``."""
        loader = self.data.loaders["test" if split == "test" else "train"]
        feed = Feed(loader, self.augmenter, self.runtime.device)
        batches = feed.evaluation_batches(self.evaluation_plans[split].epoch(0))
        num_classes = self.data.spec.num_classes
        return evaluate(self.model, self.module, batches, num_classes, self.config.seed, self.engine.reducer)

    def select(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint's trained weights into the model, for a final evaluation."""
        step = checkpoint.state.progress.step
        load_inference_weights(self.module, checkpoint.trained(), f"checkpoint of step {step}")


@contextmanager
def open_session(config: RunConfig, runtime: Runtime) -> Iterator[Session]:
    """Opens data, model and engine, and closes them whatever happens. Collective.

    Raises:
        UserError: Anything in the configuration does not fit the data or the machine.
    """
    runtime.at("opening the data")
    data = open_data(config.data)
    try:
        train_ids, validation_ids = split_validation(data.num_samples["train"], config.data.validation_size)
        mesh = runtime.mesh
        plan = IndexPlan(
            train_ids,
            config.data.batch_size,
            accumulation=config.train.accumulation,
            world_size=mesh.world_size,
            rank=mesh.rank,
            seed=config.seed,
            drop_last=config.data.drop_last,
        )
        evaluation_plans = {
            "validation": _evaluation_plan(validation_ids, config, mesh),
            "test": _evaluation_plan(torch.arange(data.num_samples["test"]), config, mesh),
        }
        _check_groups(config, plan, evaluation_plans)
        runtime.wait_for_all("opening the data")  # some host may have prepared it: no exchange could wait for that
        runtime.at("building the model")
        engine = build_engine(config, mesh, runtime.device, runtime.observe)
    except BaseException:
        data.close()
        raise
    try:
        runtime.limit_exchanges()  # again below: the engine makes more groups
        module = build_model(config, data.spec, engine.placement)
        share_batch_statistics(module, engine.communicators)
        total_steps = config.train.max_steps or config.train.epochs * plan.num_steps
        # Before the engine adds autocast, under which rows are padded.
        cost = measure_cost(module, data.spec, reducer=engine.reducer)
        model = engine.prepare(
            module,
            lambda prepared: build_optimizer(config.optim, prepared),
            lambda optimizer, steps_done: build_schedule(config.schedule, optimizer, total_steps, steps_done),
        )
        runtime.limit_exchanges()
        augmenter = Augmenter(config.data, data.spec, config.seed)
        feed = Feed(data.loaders["train"], augmenter, runtime.device)
        yield Session(
            config=config,
            runtime=runtime,
            data=data,
            module=module,
            model=model,
            mixtures=_mixtures(config, module),
            cost=cost,
            engine=engine,
            average=WeightAverage(module, config.train.ema_decay, mesh) if config.train.ema_decay else None,
            plan=plan,
            evaluation_plans=evaluation_plans,
            augmenter=augmenter,
            feed=feed,
            clock=Clock(feed),
            total_steps=total_steps,
            progress=Progress(),
        )
    finally:
        engine.close()
        data.close()


def _mixtures(config: RunConfig, module: Network) -> Mixtures:
    try:
        frozen = FrozenExperts(module, config.model.freeze_experts) if config.model.freeze_experts else None
    except ValueError as error:
        raise UserError(f"model.freeze_experts: {error}") from None
    return Mixtures(module.gates(), build_losses(config.moe) if config.moe else {}, frozen)


def _evaluation_plan(sample_ids: Tensor, config: RunConfig, mesh: Mesh) -> IndexPlan:
    return IndexPlan(
        sample_ids,
        config.data.eval_batch_size,
        world_size=mesh.world_size,
        rank=mesh.rank,
        shuffle=False,
        drop_last=False,
    )


def _check_groups(config: RunConfig, plan: IndexPlan, evaluation_plans: dict[str, IndexPlan]) -> None:
    """Refuses routing groups of several images that would straddle ranks, in training or in evaluation."""
    group: Group = getattr(config.moe.gate, "group", "image") if config.moe is not None else "image"
    evaluated = [("eval_batch_size", one) for one in evaluation_plans.values() if one.num_samples > 0]
    for setting, one in [("batch_size", plan), *evaluated]:
        try:
            check_groups(group, one.rows, one.world_size)
        except ValueError as error:
            raise UserError(f"moe.gate.{error}; or change data.{setting} ({one.batch_size})") from None
