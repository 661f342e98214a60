"""Training end to end in this process: determinism, resume, signals, results, and the commands around a run."""

import dataclasses
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import distmoe
import distmoe.train as flow
from distmoe import cli
from distmoe.contracts import Batch, UserError
from distmoe.data.index_plan import PlannedBatch
from distmoe.data.loaders import LOADERS, OpenData
from distmoe.data.loaders.protocol import Loader
from distmoe.evaluate import evaluate_run
from distmoe.training.checkpoint import Best, Progress, load_checkpoint
from distmoe.training.loading import load_inference_weights
from distmoe.training.run_folder import RunFolder
from tests.runs import (
    NUM_TEST,
    STEPS_PER_EPOCH,
    all_tensors,
    assert_same_run,
    assert_same_state,
    checkpoint_steps,
    last_checkpoint,
    last_state,
    metrics_lines,
    pieces_of,
    tiny_config,
    write_quadrants,
    write_tiny_config,
)

# The keys of summary.json that other tools read.
SUMMARY_KEYS = {
    "test_accuracy", "best_validation_accuracy", "selected_step", "train_seconds", "first_step_seconds",
    "images_per_second", "data_wait_share", "augment_share", "num_parameters", "num_active_parameters",
    "active_flops_per_image", "steps", "world_size", "expert_parallel_size", "versions",
}  # fmt: skip

Run = Callable[..., RunFolder]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quadrants(tmp_path_factory.mktemp("data") / "quadrants.npz")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands set up logging for a process of their own."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture(autouse=True)
def no_drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heat maps take longer than the rest of a tiny run; the run that everybody looks at draws them."""
    if "trained" not in request.fixturenames:
        monkeypatch.setattr(SummaryWriter, "add_figure", lambda *args, **kwargs: None)


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Run:
    """Trains a tiny run with overrides and gives its folder."""

    def trained(name: str, *overrides: str) -> RunFolder:
        config = tiny_config(data, tmp_path, f"run.name={name}", *overrides)
        flow.train(config)
        return RunFolder.of(config)

    return trained


def command(*arguments: object) -> int:
    """The exit code of a command."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    signal.signal(signal.SIGTERM, before)  # ignored at the end of a launcher's process, which this one is not
    return int(stop.value.code or 0)


# Determinism


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_are_bitwise_equal(run: Run, precision: str):
    overrides = (f"train.precision={precision}", "train.clip_norm=1.0", "moe.loss_weights.z=0.001")
    assert_same_run(run("a", *overrides), run("b", *overrides))


def test_other_seed_is_another_run(run: Run):
    folders = [run(f"seed{seed}", f"seed={seed}", "train.max_steps=2") for seed in (0, 1)]
    losses = [metrics_lines(folder)[0]["loss"] for folder in folders]
    assert losses[0] != losses[1]


def test_loaders_train_the_same_weights(run: Run):
    pytest.importorskip("ffcv")
    # The fingerprint of the data is compared as well: a run may be resumed with the other loader.
    assert_same_run(run("a", "data.loader=resident"), run("b", "data.loader=ffcv"))


# Resume

# Each case ends in the middle of an epoch of 5 (or 5 and a partial) steps, or at the end of one.
RESUMED = {
    "adamw, average, cosine": ["train.ema_decay=0.9", "schedule.name=cosine", "optim.weight_decay=0.1"],
    "sgd, accumulation, partial batch": [
        "optim={name: sgd, lr: 0.05, momentum: 0.9, nesterov: true}",
        "train.accumulation=2",
        "data.validation_size=50",
        "data.drop_last=false",
        "schedule={name: linear, warmup_share: 0.3}",
        "train.log_every_steps=4",
        "moe.loss_weights.z=0.01",
    ],
    "bf16, tutorial": [
        "model={name: tutorial, channels: [4, 4], hidden: 8, gate_channels: [4], gate_hidden: 8}",
        "moe={num_experts: 3, gate: {name: dense}}",
        "train.precision=bf16",
        "train.log_every_steps=3",
        "train.clip_norm=0.5",
        "train.evaluate_every_epochs=2",
    ],
}


@pytest.mark.parametrize("case", RESUMED)
def test_stopped_and_resumed_is_undisturbed(run: Run, data: Path, tmp_path: Path, case: str):
    overrides = [*RESUMED[case], "train.max_steps=10"]
    whole = run("whole", *overrides)
    parts = run("parts", *overrides, "train.stop_after_steps=3")
    assert checkpoint_steps(parts) == [3]
    assert parts.read_summary() is None
    for stop in ("train.stop_after_steps=5", "train.stop_after_steps=6", "train.stop_after_steps=null"):
        run("parts", *overrides, stop, "run.resume=true")
    assert_same_run(parts, whole)


def test_stopped_before_an_evaluation_makes_it_later(run: Run):
    parts = run("parts", f"train.stop_after_steps={STEPS_PER_EPOCH}")
    assert last_state(parts).progress == Progress(STEPS_PER_EPOCH, 0, STEPS_PER_EPOCH, evaluated=False)
    assert [line for line in metrics_lines(parts) if "split" in line] == []
    run("parts", "run.resume=true")
    lines = metrics_lines(parts)
    splits = [(line["step"], line["split"]) for line in lines if "split" in line]
    assert splits == [(5, "validation"), (10, "validation"), (10, "test")]
    assert [line["step"] for line in lines if "split" not in line] == list(range(1, 11))


def test_resumes_from_any_checkpoint(run: Run, tmp_path: Path):
    """A process that died at any moment leaves one of these folders, with metrics beyond its checkpoint."""
    overrides = ("train.checkpoint_every_steps=1", "train.ema_decay=0.9", "train.log_every_steps=2")
    whole = run("whole", *overrides)
    assert checkpoint_steps(whole) == list(range(1, 11))
    for step in (0, 4, 5, 7, 10):  # 5: evaluated; 10: only the test is left to do
        died = RunFolder(tmp_path / f"died{step}")
        shutil.copytree(whole.path, died.path)
        died.summary_file.unlink()
        for later in range(step + 1, 11):
            shutil.rmtree(died.checkpoints().path(later))
        run(died.path.name, *overrides, "run.resume=true")
        assert_same_run(died, whole)


def test_evaluation_made_twice_is_written_once(run: Run, tmp_path: Path):
    # Saved before the evaluation of step 5, resumed, evaluated, died before the next checkpoint was there.
    pending = run("pending", "train.stop_after_steps=5")
    saved = tmp_path / "saved"
    shutil.copytree(pending.checkpoints().root, saved)
    run("pending", "train.stop_after_steps=6", "run.resume=true")
    assert sum("split" in line for line in metrics_lines(pending)) == 1
    shutil.rmtree(pending.checkpoints().root)
    shutil.copytree(saved, pending.checkpoints().root)
    run("pending", "run.resume=true")
    assert_same_run(pending, run("whole"))


def test_damaged_checkpoints_are_passed_over(run: Run, caplog: pytest.LogCaptureFixture):
    overrides = ("train.checkpoint_every_steps=2", "run.keep_checkpoints=1", "train.max_steps=9", "data.batch_size=16")
    whole = run("whole", *overrides)
    parts = run("parts", *overrides, "train.stop_after_steps=6", "run.keep_checkpoints=3")
    root = parts.checkpoints().root
    assert checkpoint_steps(parts) == [2, 4, 6]
    tensors = root / "step-6" / "tensors-00001-of-00001.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])  # truncated
    shutil.copytree(root / "step-4", root / ".writing-step-8")  # left behind by a process that died while saving
    (root / ".writing-step-8" / "checksums.json").unlink()
    run("parts", *overrides, "run.resume=true")
    assert f"step-6: {tensors.name} is damaged" in caplog.text
    assert sorted(path.name for path in root.iterdir()) == ["damaged-step-6", "step-9"]
    assert_same_run(parts, whole)


def test_damaged_checkpoint_does_not_displace_the_next_one(run: Run):
    # Kept is one checkpoint: it must be the one just written, not the damaged one with the higher number.
    overrides = ("train.checkpoint_every_steps=2", "run.keep_checkpoints=2")
    parts = run("parts", *overrides, "train.stop_after_steps=4")
    (parts.checkpoints().path(4) / "state.json").unlink()
    run("parts", "run.keep_checkpoints=1", "train.stop_after_steps=3", "run.resume=true")
    assert checkpoint_steps(parts) == [3]


def test_folder_in_use_is_refused(run: Run):
    folder = run("run", "train.max_steps=1")
    before = sorted(path.name for path in folder.path.rglob("*"))
    with pytest.raises(UserError, match=r"is not empty: continue that run with run\.resume=true"):
        run("run", "train.max_steps=1")
    assert sorted(path.name for path in folder.path.rglob("*")) == before


def test_finished_run_stays_as_it_is(run: Run, data: Path, tmp_path: Path):
    folder = run("run", "train.max_steps=2")
    before = folder.summary_file.read_bytes(), folder.metrics_file.read_bytes()
    run("run", "train.max_steps=2", "run.resume=true")
    assert (folder.summary_file.read_bytes(), folder.metrics_file.read_bytes()) == before


def test_restart_by_a_launcher_resumes(run: Run, monkeypatch: pytest.MonkeyPatch):
    parts = run("parts", "train.stop_after_steps=4")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run("parts")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert_same_run(parts, run("whole"))


def test_run_on_other_data_is_not_resumed(run: Run):
    run("run", "train.stop_after_steps=2")
    other = "data={name: synthetic, loader: resident, validation_size: 20, synthetic: {train_size: 100, test_size: 20}}"
    with pytest.raises(UserError, match="was trained on other data"):
        run("run", "run.resume=true", other, "data.batch_size=32")


def test_run_in_the_folder_of_a_running_one_is_refused(run: Run, tmp_path: Path):
    run("run", "train.stop_after_steps=2")
    with (
        RunFolder(tmp_path / "run").held(),
        pytest.raises(UserError, match="another process trains in it"),
    ):
        run("run", "run.resume=true")


def test_work_of_an_image_does_not_depend_on_the_precision(run: Run):
    """Autocast on a CPU pads the experts' rows, which is no work on an image."""
    costs = [summary_of(run(name, f"train.precision={name}", "train.max_steps=1")) for name in ("fp32", "bf16")]
    assert costs[0]["active_flops_per_image"] == costs[1]["active_flops_per_image"]


def test_times_go_on_from_the_checkpoint(run: Run):
    parts = run("parts", "train.stop_after_steps=5")
    before = last_state(parts).times
    run("parts", "run.resume=true")
    after, summary = last_state(parts).times, summary_of(parts)
    assert before["samples"] == 5 * 32
    assert after["samples"] == 10 * 32
    assert after["train_s"] > before["train_s"] > 0
    assert after["first_step_s"] == before["first_step_s"] == summary["first_step_seconds"]
    assert summary["images_per_second"] == pytest.approx(after["samples"] / after["step_s"])


def test_run_made_longer_in_the_middle_of_an_epoch_takes_its_remaining_steps(run: Run):
    run("run", "train.max_steps=3", "schedule.name=constant")
    longer = run("run", "train.max_steps=7", "run.resume=true", "schedule.name=constant")
    assert last_state(longer).progress == Progress(7, epoch=1, epoch_step=2)
    whole = run("whole", "train.max_steps=7", "schedule.name=constant")
    assert_same_state(last_checkpoint(longer), last_checkpoint(whole))


def test_damaged_best_checkpoint_does_not_keep_a_run_from_its_end(run: Run, monkeypatch: pytest.MonkeyPatch):
    folder = run("run", "train.stop_after_steps=5")
    saved = last_checkpoint(folder)
    best = dataclasses.replace(saved.state, best=Best(1, 1.0))  # of a step whose checkpoint is gone
    folder.checkpoints(keep=9).save(best, pieces_of(all_tensors(saved)))
    run("run", "run.resume=true")
    assert summary_of(folder)["selected_step"] == 10


def test_only_the_tensors_of_the_selected_checkpoint_are_verified(run: Run, caplog: pytest.LogCaptureFixture):
    folder = run("run", "train.stop_after_steps=5")
    saved = last_checkpoint(folder)
    checkpoints = folder.checkpoints(keep=9)
    for step, best in ((6, Best(5, 0.5)), (7, Best(7, 0.6))):
        state = dataclasses.replace(saved.state, progress=Progress(step), best=best)
        checkpoints.save(state, pieces_of(all_tensors(saved)))
        (tensors,) = checkpoints.path(step).glob("tensors-*")
        tensors.write_bytes(b"no")
        caplog.clear()
        # Damage of the newest does not show where it only tells which one is the best.
        assert folder.selected("best").state.progress.step == 5
        assert len(caplog.messages) == (step == 7)
    assert folder.selected("last").state.progress.step == 5
    assert [message.partition(": ")[0][-6:] for message in caplog.messages[-2:]] == ["step-7", "step-6"]


def test_another_layout_is_no_change_to_be_warned_of(run: Run, caplog: pytest.LogCaptureFixture):
    folder = run("run", "train.stop_after_steps=2")
    saved = last_checkpoint(folder)
    alone = {"world_size": 1, "expert_parallel_size": 1, "engine": "replicas", "zero_stage": 0}
    assert saved.state.layout == alone
    spread = {"world_size": 8, "expert_parallel_size": 4, "engine": "deepspeed", "zero_stage": 1}
    state = dataclasses.replace(saved.state, layout=spread)
    folder.checkpoints().save(state, pieces_of(all_tensors(saved)))
    changed = ("parallel.backend=replicas", "optim.lr=0.02", "train.stop_after_steps=3")
    with caplog.at_level(logging.INFO):
        run("run", "run.resume=true", *changed)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "resumed with another optim.lr: 0.02, was 0.01"
    ]
    (line,) = [message for message in caplog.messages if "another layout" in message]
    assert line == (
        "resumed in another layout: 1 process, engine replicas, expert-parallel size 1, ZeRO stage 0; "
        "was 8 processes, engine deepspeed, expert-parallel size 4, ZeRO stage 1"
    )
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run("run", "run.resume=true", "train.stop_after_steps=4")
    assert [message for message in caplog.messages if "another layout:" in message] == []


def test_weights_to_start_from_are_not_needed_to_resume(run: Run, tmp_path: Path):
    source = run("source", "train.max_steps=1")
    run("fine", f"model.init_from={source.path}", "train.stop_after_steps=2")
    shutil.rmtree(source.path)
    fine = run("fine", f"model.init_from={source.path}", "run.resume=true")
    assert summary_of(fine)["steps"] == 10


def test_evaluation_on_other_data_is_refused(run: Run, data: Path, tmp_path: Path):
    own = tmp_path / "own.npz"
    shutil.copy(data, own)
    folder = run("run", f"data.path={own}", "train.max_steps=1")
    with np.load(data) as arrays:
        np.savez(own, **{**arrays, "test_inputs": arrays["test_inputs"][::-1]})
    with pytest.raises(UserError, match="was trained on other data"):
        evaluate_run(folder.path, [])


def test_launchers_variables_change_nothing(run: Run, monkeypatch: pytest.MonkeyPatch):
    alone = run("alone")
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    for name, value in {**launched, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert_same_run(run("launched"), alone)
    assert not torch.distributed.is_initialized()
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "4"


# Signals


def signals_in_step(monkeypatch: pytest.MonkeyPatch, step: int, *signals: int) -> None:
    """This process gets the signals in the middle of optimizer step ``step`` (from 0)."""
    real_step = flow.train_step

    def train_step(engine: Any, model: Any, mixtures: Any, config: Any, number: int, *rest: Any) -> Any:
        if number == step:
            for one in signals:
                os.kill(os.getpid(), one)
        return real_step(engine, model, mixtures, config, number, *rest)

    monkeypatch.setattr(flow, "train_step", train_step)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_signal_saves_and_stops(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
):
    path = write_tiny_config(data, tmp_path, "run.name=stopped")
    before = signal.getsignal(signal.SIGINT)  # in a background job it is ignored
    with monkeypatch.context() as patched:
        signals_in_step(patched, 6, number)
        assert command("train", path) == code
    stopped = RunFolder(tmp_path / "stopped")
    assert last_state(stopped).progress == Progress(step=7, epoch=1, epoch_step=2)  # the step was finished
    assert signal.getsignal(signal.SIGINT) is before
    run("stopped", "run.resume=true")
    assert_same_run(stopped, run("whole"))


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_second_interrupt_stops_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int):
    path = write_tiny_config(data, tmp_path, "run.name=stopped")
    signals_in_step(monkeypatch, 6, first, signal.SIGINT)
    assert command("train", path) == 130
    assert checkpoint_steps(RunFolder(tmp_path / "stopped")) == [5]  # nothing was saved after the epoch


@pytest.mark.parametrize(
    ("first", "second", "environment", "code"),
    [
        (signal.SIGINT, signal.SIGTERM, {}, 130),  # deepspeed ends its processes when it is interrupted itself
        (signal.SIGTERM, signal.SIGTERM, {}, 143),
        (signal.SIGUSR1, signal.SIGTERM, {}, 138),
        # Ctrl-C reaches all processes of a terminal, and torchrun passes on what it gets.
        (signal.SIGINT, signal.SIGINT, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, 130),
    ],
)
def test_what_a_launcher_passes_on_changes_nothing(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: int,
    second: int,
    environment: dict[str, str],
    code: int,
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = write_tiny_config(data, tmp_path, "run.name=stopped")
    signals_in_step(monkeypatch, 6, first, second)
    assert command("train", path) == code
    assert checkpoint_steps(RunFolder(tmp_path / "stopped")) == [5, 7]  # the step was finished and saved


def test_signal_during_an_evaluation_stops_after_its_epoch(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_tiny_config(data, tmp_path, "run.name=stopped")
    real = flow.Session.evaluate

    def evaluate(session: flow.Session, split: str) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(session, split)

    with monkeypatch.context() as patched:
        patched.setattr(flow.Session, "evaluate", evaluate)
        assert command("train", path) == 143
    stopped = RunFolder(tmp_path / "stopped")
    assert last_state(stopped).progress == Progress(step=5, epoch=1, epoch_step=0)
    run("stopped", "run.resume=true")
    assert_same_run(stopped, run("whole"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_outside_training_stops_at_once(
    trained: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int, code: int
):
    def evaluate_current(session: flow.Session, split: str) -> Any:
        os.kill(os.getpid(), number)
        raise AssertionError("went on after the signal")

    monkeypatch.setattr(flow.Session, "evaluate_current", evaluate_current)
    assert command("evaluate", trained.path) == code


# Divergence


def test_divergence_names_step_and_checkpoint(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = ("optim={name: sgd, lr: 1.0e+18}", "train.checkpoint_every_steps=1", "run.keep_checkpoints=1")
    assert command("train", write_tiny_config(data, tmp_path, *overrides)) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    folder = RunFolder(tmp_path / "run")
    (good,) = checkpoint_steps(folder)
    assert f"not finite at step {good + 1}; the last good checkpoint is {folder.checkpoints().path(good)}" in message
    tensors = all_tensors(last_checkpoint(folder))
    assert [name for name, tensor in tensors.items() if not tensor.isfinite().all()] == []
    assert metrics_lines(folder)[-1]["step"] == good


@pytest.mark.parametrize(("step", "every"), [(3, "3"), (STEPS_PER_EPOCH, "null")])
def test_infinite_weights_are_not_saved(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, every: str
):
    # The loss and the gradient were finite, the update was not.
    real_step = flow.train_step

    def train_step(engine: Any, model: Any, mixtures: Any, config: Any, number: int, *rest: Any) -> Any:
        result = real_step(engine, model, mixtures, config, number, *rest)
        if number + 1 == step:
            next(model.parameters()).data[0] = float("inf")
        return result

    monkeypatch.setattr(flow, "train_step", train_step)
    with pytest.raises(UserError, match=f"not finite at step {step}; there is no checkpoint yet"):
        run("run", f"train.checkpoint_every_steps={every}")
    assert checkpoint_steps(RunFolder(tmp_path / "run")) == []


# The test set, and which checkpoint it is for


class SpyLoader:
    """Counts what is read from a loader."""

    def __init__(self, loader: Loader):
        self.loader = loader
        self.sample_ids: list[int] = []

    def batches(self, planned: Sequence[PlannedBatch]) -> Iterator[Batch]:
        for batch in self.loader.batches(planned):
            self.sample_ids += batch.sample_ids.tolist()
            yield batch

    def close(self) -> None:
        self.loader.close()


def test_training_touches_the_test_set_once(run: Run, monkeypatch: pytest.MonkeyPatch):
    spies: dict[str, SpyLoader] = {}

    def open_spied(section: Any) -> OpenData:
        opened = open_resident(section)
        spies.update({name: SpyLoader(loader) for name, loader in opened.loaders.items()})
        opened.loaders = dict(spies)  # type: ignore[arg-type]
        return opened

    open_resident = LOADERS["resident"]
    monkeypatch.setitem(LOADERS, "resident", open_spied)
    run("run", "train.stop_after_steps=7")
    assert spies["test"].sample_ids == []
    run("run", "run.resume=true")
    assert sorted(spies["test"].sample_ids) == list(range(NUM_TEST))
    # Step 8 to 10 of 32 samples, and one validation of 40.
    assert len(spies["train"].sample_ids) == 3 * 32 + 40


@pytest.mark.parametrize("select", ["best", "last"])
def test_selected_checkpoint_is_tested(run: Run, select: str):
    # The learning rate rises to where every step throws the weights about: the last epoch is not the best.
    folder = run(
        "run", f"train.select={select}", "optim={name: sgd, lr: 1.0}", "schedule={name: constant, warmup_share: 1.0}",
        "train.epochs=8", "run.keep_checkpoints=1",
    )  # fmt: skip
    curve = {line["step"]: line["accuracy"] for line in metrics_lines(folder) if line.get("split") == "validation"}
    best_step = max(curve, key=lambda step: (curve[step], -step))  # the first of equals
    assert best_step < 40
    assert curve[best_step] > curve[40]
    assert checkpoint_steps(folder) == [best_step, 40]
    summary = folder.read_summary()
    assert summary is not None
    assert summary["best_validation_accuracy"] == curve[best_step]
    assert summary["selected_step"] == (best_step if select == "best" else 40)
    tested = [line for line in metrics_lines(folder) if line.get("split") == "test"]
    assert [line["accuracy"] for line in tested] == [summary["test_accuracy"]]
    # By hand: the selected checkpoint's weights on the test images.
    model = distmoe.load_model(folder.path)
    selected = load_checkpoint(folder.checkpoints().path(summary["selected_step"]))
    load_inference_weights(model.network, selected.trained(), "checkpoint")
    images, labels = held_out(Path(model.config.data.path or ""))
    assert accuracy(model.predict(images), labels) == summary["test_accuracy"]


def held_out(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["test_inputs"]).permute(0, 3, 1, 2), torch.from_numpy(arrays["test_labels"])


def accuracy(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    return float((probabilities.argmax(-1) == labels).sum()) / len(labels)


# One trained run, and everything that is done with it


@pytest.fixture(scope="module")
def trained(data: Path, runs: Path) -> RunFolder:
    """A run of 12 epochs that has been stopped and resumed, with a profile."""
    overrides = ["run.name=trained", "train.epochs=12", "train.log_every_steps=7", "train.ema_decay=0.9"]
    overrides += ["optim.lr=0.02", "train.clip_norm=1.0", "train.evaluate_every_epochs=4"]
    flow.train(tiny_config(data, runs, *overrides, "train.stop_after_steps=12", "train.profile_steps=2"))
    flow.train(tiny_config(data, runs, *overrides, "run.resume=true"))
    return RunFolder(runs / "trained")


def summary_of(folder: RunFolder) -> dict[str, Any]:
    summary = folder.read_summary()
    assert summary is not None
    return summary


def test_model_learns_and_uses_its_experts(trained: RunFolder):
    assert summary_of(trained)["test_accuracy"] >= 0.9  # chance is 0.25
    evaluation = json.loads((trained.path / "evaluation.json").read_text())
    assert list(evaluation["layers"]) == ["ffns.2"]
    layer = evaluation["layers"]["ffns.2"]
    # Even use of 4 experts is 2 bits and a load of 0.25 each.
    assert layer["usage_entropy_bits"] > 1.5
    assert min(layer["expert_load"]) > 0.03
    assert layer["dead_experts"] == 0
    assert layer["gate_entropy_bits"] < 2.0
    np.testing.assert_allclose(np.sum(layer["class_by_expert"], axis=1), 1.0, atol=1e-9)  # float64 shares


def test_evaluation_file_is_consistent(trained: RunFolder):
    evaluation = json.loads((trained.path / "evaluation.json").read_text())
    confusion = np.array(evaluation["confusion"])
    assert evaluation["samples"] == confusion.sum() == NUM_TEST
    assert evaluation["accuracy"] == confusion.trace() / NUM_TEST == summary_of(trained)["test_accuracy"]
    shares = confusion.diagonal() / confusion.sum(axis=1)
    # Stored as float32 shares.
    np.testing.assert_allclose(list(evaluation["class_accuracy"].values()), shares, rtol=1e-6)
    assert list(evaluation["class_accuracy"]) == ["0", "1", "2", "3"]


def test_summary_is_complete_and_sensible(trained: RunFolder):
    summary = summary_of(trained)
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == 60
    assert summary["images_per_second"] > 0
    assert 0 <= summary["augment_share"] <= summary["data_wait_share"] <= 1
    assert summary["first_step_seconds"] > 0
    assert 0 < summary["train_seconds"] < 60
    assert (summary["world_size"], summary["expert_parallel_size"]) == (1, 1)
    # An expert is 8 x 8 + 8 + 8 x 8 + 8 = 144 weights; of 4 experts a token sees 2.
    assert summary["num_parameters"] - summary["num_active_parameters"] == 2 * 144
    assert summary["active_flops_per_image"] > 0
    assert summary["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_tensorboard_shows_the_metrics(trained: RunFolder):
    events = EventAccumulator(str(trained.tensorboard), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    shown = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if "/load/" not in tag
    }
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, trained.metrics_file.read_text().splitlines()):
        prefix = line.get("split", "train")
        for name, value in line.items():
            if name not in ("step", "epoch", "split"):
                tag = name if "/" in name else f"{prefix}/{name}"
                expected.setdefault(tag, []).append((line["step"], float(np.float32(value))))
    assert shown == expected
    assert [step for step, _ in shown["train/loss"]] == [*range(7, 60, 7), 60]
    assert len(events.Scalars("ffns.2/load/expert_3")) == len(shown["train/loss"])
    assert len(events.Images("ffns.2/class_by_expert_validation")) == 3
    assert len(events.Images("ffns.2/class_by_expert_test")) == 1


def test_profile_is_written(trained: RunFolder):
    trace = json.loads((trained.path / "profile" / "trace.json").read_text())
    assert any(event.get("name") == "aten::convolution" for event in trace["traceEvents"])
    assert "aten::" in (trained.path / "profile" / "operators.txt").read_text()


def test_profile_of_a_run_too_short_is_missed(run: Run, caplog: pytest.LogCaptureFixture):
    folder = run("run", "train.max_steps=3", "train.profile_steps=2")
    assert not (folder.path / "profile").exists()
    assert "no profile written" in caplog.text


def test_config_of_the_run_repeats_it(trained: RunFolder):
    arguments = ["run.name=repeated", "run.resume=false"]
    assert command("train", trained.config_file, *arguments) == 0
    assert_same_run(RunFolder(trained.path.parent / "repeated"), trained)


def test_evaluate_gives_the_accuracy_of_the_run(trained: RunFolder, capsys: pytest.CaptureFixture[str]):
    evaluation = (trained.path / "evaluation.json").read_text()
    assert command("evaluate", trained.path) == 0
    assert f"test accuracy {summary_of(trained)['test_accuracy']:.4f} (60 samples" in capsys.readouterr().out
    again = json.loads((trained.path / "evaluation.json").read_text())
    assert {key: again[key] for key in json.loads(evaluation)} == json.loads(evaluation)


def test_evaluate_with_fewer_experts(trained: RunFolder, capsys: pytest.CaptureFixture[str]):
    evaluation = (trained.path / "evaluation.json").read_text()
    assert command("evaluate", trained.path, "moe.gate.k=1") == 0
    text = capsys.readouterr().out
    assert "layer ffns.2" in text
    assert (trained.path / "evaluation.json").read_text() == evaluation  # of the run as it was trained


def test_export_and_load(trained: RunFolder, data: Path, tmp_path: Path):
    target = tmp_path / "model.safetensors"
    assert command("export", trained.path, target) == 0
    images, labels = held_out(data)
    model = distmoe.load_model(target)
    probabilities = model.predict(images)
    assert accuracy(probabilities, labels) == summary_of(trained)["test_accuracy"]
    assert torch.equal(probabilities, distmoe.load_model(trained.path).predict(images))
    # Sums of four float32 probabilities.
    torch.testing.assert_close(probabilities.sum(1), torch.ones(NUM_TEST), rtol=0, atol=1e-6)
    assert model.spec.class_names == ("0", "1", "2", "3")


def test_start_from_trained_weights(trained: RunFolder, run: Run):
    folder = run("fine", f"model.init_from={trained.path}", "train.max_steps=1", "optim.lr=1e-9")
    start = load_checkpoint(trained.checkpoints().path(summary_of(trained)["selected_step"])).trained()
    ours = {name: value for name, value in all_tensors(last_checkpoint(folder)).items() if name.startswith("weight ")}
    # One step of AdamW changes a weight by the learning rate, 1e-9.
    torch.testing.assert_close(ours, {name: start.read(name.removeprefix("weight ")) for name in ours})


def test_plan_says_what_a_run_does(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_tiny_config(data, tmp_path)
    assert command("plan", path, "train.accumulation=2") == 0
    text = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in text.split("\n\n")[0].splitlines())
    values = {name: value.strip() for name, value in rows.items()}
    assert values["steps of the run"] == "10"
    assert values["training samples"] == "160"
    assert values["micro-batch on each rank"] == "16"
    assert list(tmp_path.iterdir()) == [path]  # nothing was written


REFUSED_PLANS = {
    "a device and this machine": (
        ("--device", "a100", "--measure"),
        "--device (a100) and --measure exclude each other",
    ),
    "hosts of different size": (("--world", 12, "--measure"), "--world (12) must be a multiple of --per-host (8)"),
}


@pytest.mark.parametrize("case", REFUSED_PLANS)
def test_plan_refuses_options_that_do_not_go_together(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options, message = REFUSED_PLANS[case]
    assert command("plan", tmp_path / "not read.yaml", *options) == 2
    assert capsys.readouterr().err.startswith(f"distmoe: error: {message}")


def commands(group: Any, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield names, group
    for name, child in getattr(group, "commands", {}).items():
        yield from commands(child, (*names, name))


@pytest.mark.parametrize(
    ("names", "one"),
    [pytest.param(*found, id=" ".join(found[0])) for found in commands(typer.main.get_command(cli.app))],
)
def test_help_explains_every_argument(names: tuple[str, ...], one: Any, capsys: pytest.CaptureFixture[str]):
    assert one.help
    assert [parameter.name for parameter in one.params if not getattr(parameter, "help", None)] == []
    assert command(*names, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for parameter in one.params:
        assert parameter.help.split()[0] in shown
    for name, child in getattr(one, "commands", {}).items():
        assert name in shown
        assert child.help


def test_state_of_two_steps_differs(run: Run):
    """The comparisons above can fail."""
    folder = run("run", "train.max_steps=2", "train.checkpoint_every_steps=1")
    with pytest.raises(AssertionError):
        assert_same_state(*(load_checkpoint(folder.checkpoints().path(step)) for step in (1, 2)))
