"""The main flow: config -> runtime -> data -> model -> engine -> fit -> test."""

import dataclasses
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from distmoe.config import RunConfig
from distmoe.contracts import UserError
from distmoe.parallel.control import Control
from distmoe.parallel.runtime import open_runtime, process_start_time
from distmoe.parallel.stop_signals import Interrupted
from distmoe.parallel.world import World
from distmoe.training.attempts import Attempts
from distmoe.training.checkpoint import Best, CheckpointFolder, Progress
from distmoe.training.evaluation import Evaluation
from distmoe.training.metrics import MetricsFile
from distmoe.training.profile import Profile
from distmoe.training.progress_bar import ProgressBar
from distmoe.training.run_folder import RunFolder, write_json
from distmoe.training.session import Session, open_session
from distmoe.training.step import MicroBatch, StepResult, train_step
from distmoe.training.tensorboard import TensorBoardLog
from distmoe.training.versions import package_versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """What rank 0 writes besides checkpoints."""

    metrics: MetricsFile
    tensorboard: TensorBoardLog
    bar: ProgressBar


@dataclass(frozen=True)
class Outputs:
    """Where a run writes; ``files`` are rank 0's."""

    folder: RunFolder
    checkpoints: CheckpointFolder
    control: Control
    files: Files | None

    def write(self, action: Callable[[Files], None]) -> None:
        """Writes on rank 0; what goes wrong there stops all ranks. Collective."""

        def on_rank_0() -> None:
            assert self.files is not None, "rank 0 has files"
            action(self.files)

        self.control.on_main(on_rank_0)

    def step_done(self, step: int) -> None:
        """Shows progress."""
        if self.files is not None:
            self.files.bar.update(step)

    def save(self, session: Session) -> Path:
        """Writes a checkpoint; TensorBoard's points up to it are on disk before. Collective."""
        session.runtime.at(f"saving after step {session.progress.step}")
        self.write(lambda files: files.tensorboard.flush())
        session.interval.collect(session.engine.reducer)
        return self.checkpoints.save(session.state(), session.pieces(), self.control)


def train(config: RunConfig, world: World | None = None) -> dict[str, Any] | None:
    """Trains a run, tests it once, and writes its folder. Collective.

    Args:
        config: The run; the same on all ranks.
        world: The processes; None: those of the launcher's environment variables, without any this one alone.

    Returns:
        The content of ``summary.json``, on all ranks, or None where ``train.stop_after_steps`` ended it early.

    Raises:
        UserError: Something in the configuration, the data, the folder or an earlier checkpoint is wrong, or the loss
            is not finite any more.
        Interrupted: A signal to stop came to some rank; the run has saved and can be resumed.
        PeerFailureError: Another rank has failed, and prints why.
        LostRanksError: Other ranks are gone or do not answer.
    """
    folder = RunFolder.of(config)
    world = world if world is not None else World.of_environment()
    attempts = Attempts(folder.path)
    with attempts.ends_noted(world.rank), open_runtime(config, world) as runtime:
        config.check_trainable()
        control = runtime.control
        restart = control.on_main(lambda: attempts.is_restart(runtime.restarts, runtime.launches))
        resume = restart or control.largest([config.run.resume]) > [0.0]  # one host's launcher may be told so alone
        control.on_main(lambda: folder.check_free(resume))
        checkpoints = folder.checkpoints(config.run.keep_checkpoints)
        begin = partial(attempts.begin, control, launches=runtime.launches, restart=restart, retries=config.run.retries)
        with ExitStack() as stack:
            control.on_main(lambda: stack.enter_context(folder.held()))
            if restart:  # from here on, since a process may be killed while it loads
                begin(control.on_main(lambda: max(checkpoints.steps(), default=0)))
            session = stack.enter_context(open_session(config, runtime))
            _start(session, folder, checkpoints, resume)
            summary = control.on_main(folder.read_summary) if session.finished else None
            if summary is not None:
                logger.info("it is finished: test accuracy %.4f", summary["test_accuracy"])
                return summary
            control.on_main(lambda: folder.open(config))
            begin(session.progress.step)
            return _train_and_test(session, folder, checkpoints)


def _start(session: Session, folder: RunFolder, checkpoints: CheckpointFolder, resume: bool) -> None:
    """Goes on from the newest whole checkpoint, or starts from the configuration's weights."""
    session.runtime.at("loading a checkpoint")
    checkpoint = checkpoints.newest(set_aside=True, control=session.runtime.control) if resume else None
    if checkpoint is not None:
        session.restore(checkpoint)
        session.interval.keep_on_main(session.runtime.rank)
        logger.info("resuming %s from step %d of %d", folder.path, session.progress.step, session.total_steps)
        before = checkpoint.state.layout
        if before and before != session.layout:
            logger.info("resumed in another layout: %s; was %s", _named(session.layout), _named(before))
        return
    if resume:
        logger.info("no whole checkpoint in %s: starting at step 0", checkpoints.root)
    if session.config.model.init_from is not None:
        session.start_from_weights(session.config.model.init_from)


def _train_and_test(session: Session, folder: RunFolder, checkpoints: CheckpointFolder) -> dict[str, Any] | None:
    control = session.runtime.control
    _log_start(session, folder)
    with ExitStack() as stack:
        opened: list[Files] = []
        control.on_main(lambda: opened.append(_open_files(session, folder, stack)))
        outputs = Outputs(folder, checkpoints, control, opened[0] if opened else None)
        session.clock.start()
        with session.runtime.stop.saving():
            completed = fit(session, outputs)
        if not completed:
            logger.info("stopped after %d steps, as train.stop_after_steps says", session.progress.step)
            return None
        return _test(session, outputs, _summary(session))


def _open_files(session: Session, folder: RunFolder, stack: ExitStack) -> Files:
    progress = session.progress
    return Files(
        metrics=stack.enter_context(MetricsFile(folder.metrics_file, progress.step, progress.evaluated)),
        tensorboard=stack.enter_context(TensorBoardLog(folder.tensorboard, progress.step)),
        bar=stack.enter_context(ProgressBar(session.total_steps, progress.step)),
    )


def fit(session: Session, outputs: Outputs) -> bool:
    """Trains from the session's progress to the end, epoch by epoch. Collective.

    Returns:
        False where ``train.stop_after_steps`` ended it before.
    """
    profiled = session.config.train.profile_steps if session.runtime.control.is_main else None
    with Profile(profiled, outputs.folder.path) as profile:
        while not session.finished:
            if not _train_epoch(session, outputs, profile):
                return False
            _end_epoch(session, outputs)
            _interrupt(_agreed(session, outputs, diverged=False), outputs.save(session))
    return True


def _train_epoch(session: Session, outputs: Outputs, profile: Profile) -> bool:
    """The rest of the current epoch, or of the run; False where the run is to stop early."""
    config, clock, epoch = session.config, session.clock, session.progress.epoch
    planned = session.plan.epoch(epoch, session.progress.epoch_step)
    remaining = (session.total_steps - session.progress.step) * config.train.accumulation
    session.runtime.at(f"step {session.progress.step + 1}, data")
    with session.feed.training_steps(planned[:remaining], epoch) as steps:
        for micro_batches in steps:
            started = time.perf_counter()
            result = _step(session, micro_batches)
            if _log_due(session):  # otherwise a GPU works on while the clock is read
                session.runtime.synchronize()
            clock.step_s += time.perf_counter() - started
            clock.samples += result.step_samples
            if clock.first_step_s is None:
                clock.first_step_s = time.time() - process_start_time()
            profile.step()
            outputs.step_done(session.progress.step)
            if _after_step(session, outputs):
                return False
    return True


def _step(session: Session, micro_batches: Iterator[MicroBatch]) -> StepResult:
    """One optimizer step and what is counted of it."""
    step, runtime = session.progress.step, session.runtime

    def at(phase: str) -> None:
        runtime.at(f"step {step + 1}, {phase}")

    result = train_step(session.engine, session.model, session.mixtures, session.config, step, micro_batches, at)
    if session.average is not None:
        session.average.update(step)
    session.progress = _advanced(session)
    session.interval.add(result)
    return result


def _advanced(session: Session) -> Progress:
    """The progress one step further; the last step of an epoch, and of the run, is followed by an evaluation."""
    step, epoch_step = session.progress.step + 1, session.progress.epoch_step + 1
    evaluation_due = epoch_step == session.plan.num_steps or step == session.total_steps
    return Progress(step, session.progress.epoch, epoch_step, evaluated=not evaluation_due)


def _end_epoch(session: Session, outputs: Outputs) -> None:
    """Validates where it is due; after the last step of an epoch the next one begins."""
    progress = session.progress
    every = session.config.train.evaluate_every_epochs
    if progress.step == session.total_steps or (progress.epoch + 1) % every == 0:
        _validate(session, outputs)
    session.progress = replace(progress, evaluated=True)
    if progress.epoch_step == session.plan.num_steps:
        session.progress = Progress(progress.step, progress.epoch + 1, 0)


def _log_due(session: Session) -> bool:
    step = session.progress.step
    return step % session.config.train.log_every_steps == 0 or step == session.total_steps


def _after_step(session: Session, outputs: Outputs) -> bool:
    """Checks, logs and saves where it is due; whether ``train.stop_after_steps`` is reached. Collective."""
    section, step = session.config.train, session.progress.step
    session.runtime.at(f"step {step}, checks and log")
    log_due, evaluation_due = _log_due(session), not session.progress.evaluated
    save_due = section.checkpoint_every_steps is not None and step % section.checkpoint_every_steps == 0
    stop_due = section.stop_after_steps is not None and section.stop_after_steps <= step < session.total_steps
    weights_due = save_due or evaluation_due or stop_due
    looked_at = log_due or weights_due or session.runtime.device.type == "cpu"
    signal_number = _agreed(session, outputs, looked_at and _diverged(session, weights_due))
    if log_due:
        _log(session, outputs)
    if signal_number and not weights_due:
        _agreed(session, outputs, _diverged(session, weights=True))
    if signal_number or stop_due or (save_due and not evaluation_due):  # the evaluation comes first, and saves
        _interrupt(signal_number, outputs.save(session))
    return stop_due


def _log(session: Session, outputs: Outputs) -> None:
    """Writes the numbers of the interval, of all ranks; times are those of the slowest. Collective."""
    config, interval, reducer, step = session.config, session.interval, session.engine.reducer, session.progress.step
    weights = config.moe.loss_weights.model_dump() if config.moe else {}
    rates = session.clock.rates_since_last()
    described, loads = interval.describe(weights, reducer)
    numbers = {
        "step": step,
        "epoch": session.progress.epoch,
        **described,
        "lr": session.engine.learning_rate(),
        **_of_slowest(session, rates),
    }

    def write(files: Files) -> None:
        files.metrics.write(numbers)
        files.tensorboard.training(numbers, loads, step)
        files.bar.log(numbers)

    outputs.write(write)
    interval.clear()


def _of_slowest(session: Session, rates: dict[str, float]) -> dict[str, float]:
    """The worst over ranks: the lowest rate, the largest shares. Collective."""
    signs = [-1.0 if name == "images_per_second" else 1.0 for name in rates]
    worst = session.runtime.control.largest([sign * rate for sign, rate in zip(signs, rates.values(), strict=True)])
    return {name: sign * value for name, sign, value in zip(rates, signs, worst, strict=True)}


def _agreed(session: Session, outputs: Outputs, diverged: bool) -> int:
    """The signal that some rank got, or 0, on all ranks; stops a run that some rank finds diverged. Collective."""
    numbers = session.runtime.control.largest([session.runtime.stop.number or 0, diverged])
    if numbers[1]:
        saved = outputs.checkpoints.steps()
        kept = (
            f"the last good checkpoint is {outputs.checkpoints.path(saved[-1])}"
            if saved
            else "there is no checkpoint yet"
        )
        raise UserError(
            f"training diverged: loss, gradient or weights are not finite at step {session.progress.step}; {kept}. "
            "Lower optim.lr, set train.clip_norm, or use train.precision=fp32"
        )
    return int(numbers[0])


def _interrupt(signal_number: int, saved: Path) -> None:
    """Ends a run that has been told to stop, now that it is saved."""
    if signal_number:
        logger.info("saved %s; go on with run.resume=true", saved)
        raise Interrupted(signal_number)


def _diverged(session: Session, weights: bool) -> bool:
    """Whether something is not finite on this rank; ``weights`` are looked at before they are saved or evaluated.

    The last update may have spoiled them although the loss before it was finite.
    """
    return not session.interval.finite() or (weights and not _weights_finite(session))


def _weights_finite(session: Session) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in session.module.parameters())


def _validate(session: Session, outputs: Outputs) -> None:
    """Evaluates on the validation set and keeps count of the best."""
    if session.evaluation_plans["validation"].num_samples == 0:
        return
    session.runtime.at(f"validation after step {session.progress.step}")
    result = session.evaluate("validation")
    step = session.progress.step
    if session.best is None or result.accuracy > session.best.accuracy:
        session.best = Best(step, result.accuracy)
    _record(session, outputs, "validation", result)


def _record(session: Session, outputs: Outputs, split: str, result: Evaluation) -> None:
    step, epoch = session.progress.step, session.progress.epoch
    line = {"step": step, "epoch": epoch, "split": split, "accuracy": result.accuracy, "loss": result.loss}

    def write(files: Files) -> None:
        files.metrics.write(line)
        files.tensorboard.evaluation(split, result, session.data.spec, step)
        files.bar.log(line)

    outputs.write(write)


def _test(session: Session, outputs: Outputs, summary: dict[str, Any]) -> dict[str, Any]:
    """Puts the selected weights in and touches the test set, once."""
    session.runtime.at("the test")
    checkpoint = outputs.folder.selected(session.config.train.select, fall_back=True, control=outputs.control)
    session.select(checkpoint)
    result = session.evaluate_current("test")
    _record(session, outputs, "test", result)
    summary = {"test_accuracy": result.accuracy, "selected_step": checkpoint.state.progress.step, **summary}

    def write(files: Files) -> None:
        del files
        write_json(outputs.folder.path / "evaluation.json", result.describe(session.data.spec))
        outputs.folder.write_summary(summary)

    outputs.write(write)
    return summary


def _summary(session: Session) -> dict[str, Any]:
    """What is known before the test; of times, those of the slowest rank. Collective."""
    times = [session.clock.train_s(), session.clock.first_step_s or 0.0]
    train_s, first_step_s = session.runtime.control.largest(times)
    versions = {package: version for package, version in package_versions().items() if version is not None}
    return {
        "best_validation_accuracy": session.best.accuracy if session.best else None,
        "train_seconds": train_s,
        "first_step_seconds": first_step_s or None,
        **_of_slowest(session, session.clock.rates()),
        **dataclasses.asdict(session.cost),
        "steps": session.progress.step,
        "seed": session.config.seed,
        **session.layout,
        "num_threads": session.runtime.num_threads,
        "device": str(session.runtime.device),
        "versions": {"python": platform.python_version(), **versions},
    }


def _named(layout: Mapping[str, Any]) -> str:
    processes = "1 process" if layout["world_size"] == 1 else f"{layout['world_size']} processes"
    return "{}, engine {engine}, expert-parallel size {expert_parallel_size}, ZeRO stage {zero_stage}".format(
        processes, **layout
    )


def _log_start(session: Session, folder: RunFolder) -> None:
    config, spec, cost = session.config, session.data.spec, session.cost
    if session.runtime.world_size > 1:
        logger.info("%s", _named(session.layout))
    logger.info(
        "%s: %s on %s, %s parameters (%s active), %d steps, %s, %s, %d threads",
        folder.path, config.model.name, spec.name, f"{cost.num_parameters:,}", f"{cost.num_active_parameters:,}",
        session.total_steps, session.runtime.device, config.train.precision, session.runtime.num_threads,
    )  # fmt: skip
