"""The main flow: config -> runtime -> data -> model -> engine -> fit -> test."""

import dataclasses
import importlib.metadata
import logging
import platform
import signal
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distmoe.config import RunConfig
from distmoe.contracts import UserError
from distmoe.parallel.runtime import open_runtime, process_start_time
from distmoe.training.checkpoint import Best, CheckpointFolder, Progress
from distmoe.training.metrics import MetricsFile
from distmoe.training.profile import Profile
from distmoe.training.progress_bar import ProgressBar
from distmoe.training.run_folder import RunFolder, write_json
from distmoe.training.session import Session, open_session
from distmoe.training.step import train_step
from distmoe.training.tensorboard import TensorBoardLog

logger = logging.getLogger(__name__)

PACKAGES = ("distmoe", "torch", "torchvision", "accelerate", "ffcv", "deepspeed", "numpy")


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop by a signal, and has saved.

    Attributes:
        signal_number: SIGINT or SIGTERM.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


@dataclass(frozen=True)
class Outputs:
    """Where a run writes."""

    folder: RunFolder
    checkpoints: CheckpointFolder
    metrics: MetricsFile
    tensorboard: TensorBoardLog
    bar: ProgressBar

    def save(self, session: Session) -> Path:
        """Writes a checkpoint; TensorBoard's points up to it are on disk before."""
        self.tensorboard.flush()
        return self.checkpoints.save(session.state())


def train(config: RunConfig) -> dict[str, Any] | None:
    """Trains a run, tests it once, and writes its folder.

    Returns:
        The content of ``summary.json``, or None where ``train.stop_after_steps`` ended it early.

    Raises:
        UserError: Something in the configuration, the data, the folder or an earlier checkpoint is wrong, or the loss
            is not finite any more.
        Interrupted: SIGINT or SIGTERM came; the run has saved and can be resumed.
    """
    config.check_trainable()
    folder = RunFolder.of(config)
    with open_runtime(config) as runtime:
        resume = config.run.resume or runtime.restarts > 0
        folder.check_free(resume)
        with open_session(config, runtime) as session:
            checkpoints = folder.checkpoints(config.run.keep_checkpoints)
            with folder.held():
                _start(session, folder, checkpoints, resume)
                if session.finished and (summary := folder.read_summary()) is not None:
                    logger.info("it is finished: test accuracy %.4f", summary["test_accuracy"])
                    return summary
                return _train_and_test(session, folder, checkpoints)


def _start(session: Session, folder: RunFolder, checkpoints: CheckpointFolder, resume: bool) -> None:
    """Goes on from the newest whole checkpoint, or starts from the configuration's weights."""
    state = checkpoints.newest(set_aside=True) if resume else None
    if state is not None:
        session.restore(state)
        logger.info("resuming %s from step %d of %d", folder.path, state.progress.step, session.total_steps)
        return
    if resume:
        logger.info("no whole checkpoint in %s: starting at step 0", checkpoints.root)
    if session.config.model.init_from is not None:
        session.start_from_weights(session.config.model.init_from)


def _train_and_test(session: Session, folder: RunFolder, checkpoints: CheckpointFolder) -> dict[str, Any] | None:
    progress = session.progress
    folder.open(session.config)
    _log_start(session, folder)
    with ExitStack() as stack:
        outputs = Outputs(
            folder=folder,
            checkpoints=checkpoints,
            metrics=stack.enter_context(MetricsFile(folder.metrics_file, progress.step, progress.evaluated)),
            tensorboard=stack.enter_context(TensorBoardLog(folder.tensorboard, progress.step)),
            bar=stack.enter_context(ProgressBar(session.total_steps, progress.step)),
        )
        session.clock.start()
        with session.runtime.saving_on_signal():
            completed = fit(session, outputs)
        if not completed:
            logger.info("stopped after %d steps, as train.stop_after_steps says", session.progress.step)
            return None
        return _test(session, outputs, _summary(session))


def fit(session: Session, outputs: Outputs) -> bool:
    """Trains from the session's progress to the end, epoch by epoch.

    Returns:
        False where ``train.stop_after_steps`` ended it before.
    """
    with Profile(session.config.train.profile_steps, outputs.folder.path) as profile:
        while not session.finished:
            if not _train_epoch(session, outputs, profile):
                return False
            _end_epoch(session, outputs)
            _interrupt_if_signalled(session, outputs.save(session))
    return True


def _train_epoch(session: Session, outputs: Outputs, profile: Profile) -> bool:
    """The rest of the current epoch, or of the run; False where the run is to stop early."""
    config, clock, epoch = session.config, session.clock, session.progress.epoch
    planned = session.plan.epoch(epoch, session.progress.epoch_step)
    remaining = (session.total_steps - session.progress.step) * config.train.accumulation
    with session.feed.training_steps(planned[:remaining], epoch) as steps:
        for micro_batches in steps:
            started = time.perf_counter()
            step = session.progress.step
            result = train_step(session.engine, session.model, session.mixtures, config, step, micro_batches)
            if session.average is not None:
                session.average.update(step)
            session.progress = _advanced(session)
            session.interval.add(result)
            if _log_due(session):  # otherwise a GPU works on while the clock is read
                session.runtime.synchronize()
            clock.step_s += time.perf_counter() - started
            clock.samples += result.step_samples
            if clock.first_step_s is None:
                clock.first_step_s = time.time() - process_start_time()
            profile.step()
            outputs.bar.update(session.progress.step)
            _after_step(session, outputs)
            if _asked_to_stop(session, outputs):
                return False
    return True


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


def _after_step(session: Session, outputs: Outputs) -> None:
    """Checks, logs and saves where it is due."""
    section, step, interval = session.config.train, session.progress.step, session.interval
    log_due, evaluation_due = _log_due(session), not session.progress.evaluated
    save_due = section.checkpoint_every_steps is not None and step % section.checkpoint_every_steps == 0
    if log_due or save_due or evaluation_due or session.runtime.device.type == "cpu":
        _check_finite(session, outputs, weights=save_due or evaluation_due)
    if log_due:
        weights = session.config.moe.loss_weights.model_dump() if session.config.moe else {}
        numbers = {
            "step": step,
            "epoch": session.progress.epoch,
            **interval.describe(weights),
            "lr": session.engine.learning_rate(),
            **session.clock.rates_since_last(),
        }
        outputs.metrics.write(numbers)
        outputs.tensorboard.training(numbers, interval.expert_loads(), step)
        outputs.bar.log(numbers)
        interval.clear()
    if save_due and not evaluation_due:  # the evaluation comes first, and saves
        outputs.save(session)


def _asked_to_stop(session: Session, outputs: Outputs) -> bool:
    """Saves and stops where a signal came or ``train.stop_after_steps`` is reached."""
    step, limit = session.progress.step, session.config.train.stop_after_steps
    if session.runtime.stop_signal is None and (limit is None or step < limit or step == session.total_steps):
        return False
    _check_finite(session, outputs, weights=True)
    _interrupt_if_signalled(session, outputs.save(session))
    return True


def _interrupt_if_signalled(session: Session, saved: Path) -> None:
    signal_number = session.runtime.stop_signal
    if signal_number is not None:
        logger.info("saved %s; go on with run.resume=true", saved)
        raise Interrupted(signal_number)


def _check_finite(session: Session, outputs: Outputs, weights: bool) -> None:
    """Stops a run that has diverged; ``weights`` are looked at before they are saved or evaluated.

    The last update may have spoiled them although the loss before it was finite.
    """
    if not session.interval.finite() or (weights and not _weights_finite(session)):
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


def _weights_finite(session: Session) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in session.module.parameters())


def _validate(session: Session, outputs: Outputs) -> None:
    """Evaluates on the validation set and keeps count of the best."""
    if session.evaluation_plans["validation"].num_samples == 0:
        return
    result = session.evaluate("validation")
    step = session.progress.step
    if session.best is None or result.accuracy > session.best.accuracy:
        session.best = Best(step, result.accuracy)
    _record(session, outputs, "validation", result)


def _record(session: Session, outputs: Outputs, split: str, result: Any) -> None:
    step, epoch = session.progress.step, session.progress.epoch
    line = {"step": step, "epoch": epoch, "split": split, "accuracy": result.accuracy, "loss": result.loss}
    outputs.metrics.write(line)
    outputs.tensorboard.evaluation(split, result, session.data.spec, step)
    outputs.bar.log(line)


def _test(session: Session, outputs: Outputs, summary: dict[str, Any]) -> dict[str, Any]:
    """Puts the selected weights in and touches the test set, once."""
    state = outputs.folder.selected(session.config.train.select, fall_back=True)
    session.select(state)
    result = session.evaluate_current("test")
    _record(session, outputs, "test", result)
    summary = {"test_accuracy": result.accuracy, "selected_step": state.progress.step, **summary}
    write_json(outputs.folder.path / "evaluation.json", result.describe(session.data.spec))
    outputs.folder.write_summary(summary)
    return summary


def _summary(session: Session) -> dict[str, Any]:
    return {
        "best_validation_accuracy": session.best.accuracy if session.best else None,
        "train_seconds": session.clock.train_s(),
        "first_step_seconds": session.clock.first_step_s,
        **session.clock.rates(),
        **dataclasses.asdict(session.cost),
        "steps": session.progress.step,
        "seed": session.config.seed,
        "world_size": session.runtime.world_size,
        "expert_parallel_size": session.runtime.expert_parallel_size,
        "num_threads": session.runtime.num_threads,
        "device": str(session.runtime.device),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _log_start(session: Session, folder: RunFolder) -> None:
    config, spec, cost = session.config, session.data.spec, session.cost
    logger.info(
        "%s: %s on %s, %s parameters (%s active), %d steps, %s, %s, %d threads",
        folder.path, config.model.name, spec.name, f"{cost.num_parameters:,}", f"{cost.num_active_parameters:,}",
        session.total_steps, session.runtime.device, config.train.precision, session.runtime.num_threads,
    )  # fmt: skip
