import dataclasses
import hashlib
import json
import logging
import shutil

import pytest
import torch

from distmoe.contracts import UserError
from distmoe.parallel.engines.protocol import ParameterState
from distmoe.training import checkpoint
from distmoe.training.checkpoint import (
    Best,
    CheckpointFolder,
    Progress,
    TrainingState,
    load_checkpoint,
    spec_from_json,
    spec_to_json,
)
from tests.unit.training.little import ADAMW, SGD, SPEC, run_config, trainer


def little_state(step: int, best: Best | None = None) -> TrainingState:
    """A state without a model; its one weight is the step."""
    weight = torch.full((2, 3), float(step))
    return TrainingState(
        progress=Progress(step, 2, 1),
        parameters={
            "layer.weight": ParameterState(weight, {"exp_avg": weight + 0.1, "step": torch.tensor(float(step))})
        },
        buffers={"norm.count": torch.tensor(7)},
        average={"layer.weight": weight + 0.5},
        best=best,
        scaler={},
        fingerprint="abc",
        spec=SPEC,
        config_yaml="seed: 0\n",
    )


FILES = [
    "average.safetensors", "buffers.safetensors", "checksums.json", "config.yaml", "moments.safetensors",
    "state.json", "weights.safetensors",
]  # fmt: skip


def assert_same(one: TrainingState, other: TrainingState) -> None:
    for field in ("progress", "best", "scaler", "fingerprint", "spec", "config_yaml", "interval"):
        assert getattr(one, field) == getattr(other, field), field
    assert one.parameters.keys() == other.parameters.keys()
    for name, state in one.parameters.items():
        assert torch.equal(state.weight, other.parameters[name].weight), name
        assert state.moments.keys() == other.parameters[name].moments.keys()
        assert all(torch.equal(value, other.parameters[name].moments[key]) for key, value in state.moments.items()), (
            name
        )
    for field in ("buffers", "average"):
        mine, theirs = getattr(one, field) or {}, getattr(other, field) or {}
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) and value.dtype == theirs[key].dtype for key, value in mine.items())


@pytest.mark.parametrize("optim", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(tmp_path, optim):
    config = run_config(optim=optim, schedule={"name": "cosine", "warmup_share": 0.5})
    with trainer(config) as straight:
        straight.train(range(2))
        best = Best(step=1, accuracy=0.1 + 0.2)
        state = straight.state(2, best, average={name: w + 1 for name, w in straight.module.named_parameters()})
        saved = load_checkpoint(CheckpointFolder(tmp_path / "checkpoints", keep=2).save(state))
        assert_same(saved, state)
        moments = {"momentum_buffer"} if optim is SGD else {"exp_avg", "exp_avg_sq", "step"}
        assert all(set(one.moments) == moments for one in saved.parameters.values())
        straight_results = straight.train(range(2, 5))
        expected, expected_moments = straight.weights(), straight.engine.parameter_states()
    with trainer(config) as resumed:
        for name, buffer in resumed.module.named_buffers():
            buffer.copy_(saved.buffers[name])
        resumed.engine.load_parameter_states(saved.parameters, 2)
        resumed_results = resumed.train(range(2, 5))
        assert all(torch.equal(value, expected[name]) for name, value in resumed.weights().items())
        for name, one in resumed.engine.parameter_states().items():
            assert all(torch.equal(value, expected_moments[name].moments[key]) for key, value in one.moments.items())
    for one, other in zip(resumed_results, straight_results, strict=True):
        assert torch.equal(one.gradient_norm, other.gradient_norm)
        assert torch.equal(one.sums["loss"], other.sums["loss"])
    # The saved state was not the one that training went on with.
    assert_same(load_checkpoint(tmp_path / "checkpoints" / "step-2"), saved)


def test_a_state_without_average_best_or_moments_comes_back_as_such(tmp_path):
    bare = dataclasses.replace(
        little_state(0), average=None, parameters={"w": ParameterState(torch.ones(2))}, buffers={}
    )
    loaded = load_checkpoint(CheckpointFolder(tmp_path, 1).save(bare))
    assert_same(loaded, bare)
    assert (loaded.average, loaded.best, loaded.parameters["w"].moments) == (None, None, {})


def test_inference_takes_the_averaged_weights_where_there_are_any():
    state = little_state(3)
    assert state.inference_weights()["layer.weight"][0, 0] == 3.5
    assert state.inference_weights()["norm.count"] == 7
    assert dataclasses.replace(state, average=None).inference_weights()["layer.weight"][0, 0] == 3.0


def test_the_files_are_those_the_other_tests_damage(tmp_path):
    folder = CheckpointFolder(tmp_path, 1).save(little_state(1))
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_one_flipped_byte_in_any_file_is_detected(tmp_path, name, flip):
    folder = CheckpointFolder(tmp_path, 1).save(little_state(1))
    content = (folder / name).read_bytes()
    for place in sorted({0, len(content) // 3, len(content) // 2, len(content) - 1}):
        damaged = bytearray(content)
        damaged[place] ^= flip
        (folder / name).write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"checkpoint .*step-1: .*(is damaged|cannot be read|is missing).*use another"
        ):
            load_checkpoint(folder)
    (folder / name).write_bytes(content)
    assert_same(load_checkpoint(folder), little_state(1))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", ["none", "half", "nothing in it"])
def test_missing_and_truncated_files_are_detected(tmp_path, name, left):
    folder = CheckpointFolder(tmp_path, 1).save(little_state(1))
    content = (folder / name).read_bytes()
    if left == "none":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content[: len(content) // 2] if left == "half" else b"")
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder)
    assert "step-1" in str(caught.value)
    if left == "none":
        assert f"{name} is missing" in str(caught.value)
    elif name != "checksums.json":
        assert f"{name} is damaged" in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"state.json": 1}', '{"../other": "x"}'])
def test_a_list_of_checksums_that_is_something_else_is_refused(tmp_path, content):
    folder = CheckpointFolder(tmp_path, 1).save(little_state(1))
    (folder / "checksums.json").write_text(content)
    with pytest.raises(UserError, match="step-1"):
        load_checkpoint(folder)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    folder = CheckpointFolder(tmp_path, 1).save(little_state(1))
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"format {checkpoint.FORMAT + 1}, this version reads {checkpoint.FORMAT}"):
        load_checkpoint(folder)


def test_the_newest_whole_one_is_taken_with_a_warning_for_each_damaged_one(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path, keep=10)
    for step in (5, 9, 10, 100):
        folder.save(little_state(step))
    assert folder.steps() == [5, 9, 10, 100]  # by number, not by text
    assert folder.newest().progress.step == 100
    (folder.path(100) / "weights.safetensors").write_bytes(b"no")
    (folder.path(10) / "state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert_same(folder.newest(), little_state(9))
    assert ["step-100" in message or "step-10:" in message for message in caplog.messages] == [True, True]
    for step in (5, 9):
        shutil.rmtree(folder.path(step))
    assert folder.newest() is None
    assert CheckpointFolder(tmp_path / "none", 1).newest() is None


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 6):
        folder.save(little_state(step, Best(1, 0.9) if step < 4 else Best(4, 0.95)))
        if step == 3:
            assert folder.steps() == [1, 2, 3]
    assert folder.steps() == [4, 5]
    folder.save(little_state(6, Best(4, 0.95)))
    folder.save(little_state(7, Best(4, 0.95)))
    assert folder.steps() == [4, 6, 7]
    for step in folder.steps():
        assert load_checkpoint(folder.path(step)).progress.step == step


def test_a_run_that_goes_on_from_before_damaged_ones_keeps_what_it_saves(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (10, 20, 30):
        folder.save(little_state(step, Best(10, 0.5)))
    for step in (20, 30):
        (folder.path(step) / "weights.safetensors").write_bytes(b"no")
    assert folder.newest(set_aside=True).progress.step == 10
    folder.save(little_state(15, Best(10, 0.5)))
    assert folder.steps() == [10, 15]
    assert folder.newest().progress.step == 15
    aside = sorted(path.name for path in tmp_path.glob("damaged-*"))
    assert aside == ["damaged-step-20", "damaged-step-30"]  # still there to be looked at


def test_looking_at_a_run_renames_nothing(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(little_state(10))
    (folder.path(10) / "weights.safetensors").write_bytes(b"no")
    assert folder.newest() is None
    assert folder.steps() == [10]


def test_another_format_is_refused_and_not_passed_over(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(little_state(10))
    folder.save(little_state(20))
    values = json.loads((folder.path(20) / "state.json").read_text())
    (folder.path(20) / "state.json").write_text(json.dumps({**values, "format": 99}))
    checksums = json.loads((folder.path(20) / "checksums.json").read_text())
    digest = hashlib.sha256((folder.path(20) / "state.json").read_bytes()).hexdigest()
    (folder.path(20) / "checksums.json").write_text(json.dumps({**checksums, "state.json": digest}))
    # Going on from step 10 would throw step 20 away, which a newer version could read.
    with pytest.raises(UserError, match="step-20: format 99, this version reads 1"):
        folder.newest(set_aside=True)


def test_a_replacement_cut_off_between_its_two_renames_is_put_back(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(little_state(10))
    folder.path(10).rename(tmp_path / ".replaced-step-10")
    assert folder.newest(set_aside=True).progress.step == 10


def test_saving_a_step_again_replaces_it(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(little_state(3))
    (folder.path(3) / "weights.safetensors").write_bytes(b"no")
    folder.save(little_state(3, Best(3, 0.75)))
    assert folder.newest().best == Best(3, 0.75)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_save_that_was_cut_off_is_never_taken_for_a_checkpoint(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=3)
    folder.save(little_state(1))

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    for place in ("_checksum", "_flush"):  # before the list of checksums is written, and before the rename
        monkeypatch.setattr(checkpoint, place, killed)
        with pytest.raises(Killed):
            folder.save(little_state(2))
        monkeypatch.undo()
        assert len(list(tmp_path.iterdir())) == 2  # something was left
        assert folder.steps() == [1]
        assert folder.newest().progress.step == 1
    folder.save(little_state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_a_full_disk_is_a_clear_error_and_leaves_the_older_ones(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(little_state(1))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step-2: cannot be written \(No space left on device\); free space"):
        folder.save(little_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert folder.newest().progress.step == 1


def test_the_description_of_the_data_survives_json():
    assert spec_from_json(json.loads(json.dumps(spec_to_json(SPEC)))) == SPEC
