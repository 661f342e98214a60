import dataclasses
import hashlib
import itertools
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distmoe.contracts import UserError
from distmoe.parallel.shards import Piece
from distmoe.training import checkpoint, tensor_files
from distmoe.training.checkpoint import (
    Best,
    Checkpoint,
    CheckpointFolder,
    Progress,
    TrainingState,
    load_checkpoint,
    spec_from_json,
    spec_to_json,
)
from distmoe.training.integrity import DamagedCheckpointError
from tests.runs import all_tensors, pieces_of
from tests.unit.training.little import ADAMW, SGD, SPEC, run_config, trainer


def little_state(step: int, best: Best | None = None) -> TrainingState:
    return TrainingState(Progress(step, 2, 1), best, {}, "abc", SPEC, "seed: 0\n")


def little_tensors(step: int) -> dict[str, Tensor]:
    """Of no model; the one weight is the step."""
    weight = torch.full((2, 3), float(step))
    return {
        "weight layer.weight": weight,
        "moment:exp_avg layer.weight": weight + 0.1,
        "moment:step layer.weight": torch.tensor(float(step)),
        "average layer.weight": weight + 0.5,
        "buffer norm.count": torch.tensor(7),
        "buffer norm.mask": torch.tensor([True, False, True]),
        "buffer norm.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "buffer norm.empty": torch.empty(0, 3),
    }


def save(folder: CheckpointFolder, step: int, best: Best | None = None) -> Path:
    return folder.save(little_state(step, best), pieces_of(little_tensors(step)))


TENSORS = "tensors-00001-of-00001.safetensors"
FILES = ["checksums.json", "config.yaml", "index.json", "state.json", TENSORS]


def assert_same(one: Checkpoint, state: TrainingState, tensors: dict[str, Tensor]) -> None:
    assert one.state == state
    ours = all_tensors(one)
    assert ours.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(ours[name], value), name
        assert ours[name].dtype == value.dtype, name


@pytest.mark.parametrize("optim", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_run_that_is_saved_and_loaded_goes_on_bit_for_bit(tmp_path, optim):
    config = run_config(optim=optim, schedule={"name": "cosine", "warmup_share": 0.5})

    def tensors(run) -> dict[str, Tensor]:
        """Copies, by the names of all_tensors."""
        return {f"{one.kind} {one.name}": one.values.clone().view(one.shape) for one in run.pieces()}

    with trainer(config) as straight:
        straight.train(range(2))
        state, before = straight.state(2, Best(step=1, accuracy=0.1 + 0.2)), tensors(straight)
        saved = load_checkpoint(CheckpointFolder(tmp_path / "checkpoints", keep=2).save(state, straight.pieces()))
        assert_same(saved, state, before)
        moments = {"moment:momentum_buffer"} if optim is SGD else {"moment:exp_avg", "moment:exp_avg_sq", "moment:step"}
        assert set(saved.tensors.kinds()) == {"weight", "buffer"} | moments
        names = [name for name, _ in straight.module.named_parameters()]
        assert all(saved.tensors.names(kind) == sorted(names) for kind in moments)
        straight_results = straight.train(range(2, 5))
        expected = tensors(straight)
    with trainer(config) as resumed:
        for name, buffer in resumed.module.named_buffers():
            buffer.copy_(before[f"buffer {name}"])
        resumed.engine.load(saved.tensors, 2)
        resumed_results = resumed.train(range(2, 5))
        after = tensors(resumed)
    assert after.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(after[name], expected[name])] == []
    for one, other in zip(resumed_results, straight_results, strict=True):
        assert torch.equal(one.gradient_norm, other.gradient_norm)
        assert torch.equal(one.sums["loss"], other.sums["loss"])
    # The saved state was not the one that training went on with.
    assert_same(load_checkpoint(tmp_path / "checkpoints" / "step-2"), state, before)


def test_a_checkpoint_of_one_weight_comes_back_as_such(tmp_path):
    folder = CheckpointFolder(tmp_path, 1).save(little_state(0), pieces_of({"weight w": torch.ones(2)}))
    assert_same(load_checkpoint(folder), little_state(0), {"weight w": torch.ones(2)})


def test_inference_takes_the_averaged_weights_where_there_are_any(tmp_path):
    averaged = load_checkpoint(save(CheckpointFolder(tmp_path / "averaged", 1), 3)).trained()
    assert averaged.read("layer.weight").tolist() == [[3.5] * 3] * 2
    assert averaged.read("norm.count").tolist() == 7
    tensors = little_tensors(3)
    del tensors["average layer.weight"]
    plain = CheckpointFolder(tmp_path / "plain", 1).save(little_state(3), pieces_of(tensors))
    assert load_checkpoint(plain).trained().read("layer.weight").tolist() == [[3.0] * 3] * 2


def test_the_files_are_those_the_other_tests_damage(tmp_path):
    folder = save(CheckpointFolder(tmp_path, 1), 1)
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_one_flipped_byte_in_any_file_is_detected(tmp_path, name, flip):
    folder = save(CheckpointFolder(tmp_path, 1), 1)
    content = (folder / name).read_bytes()
    for place in sorted({0, len(content) // 3, len(content) // 2, len(content) - 1}):
        damaged = bytearray(content)
        damaged[place] ^= flip
        (folder / name).write_bytes(damaged)
        with pytest.raises(
            UserError, match=r"checkpoint .*step-1: .*(is damaged|cannot be read|is missing|lacks).*use another"
        ):
            load_checkpoint(folder)
    (folder / name).write_bytes(content)
    assert_same(load_checkpoint(folder), little_state(1), little_tensors(1))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", ["none", "half", "nothing in it"])
def test_missing_and_truncated_files_are_detected(tmp_path, name, left):
    folder = save(CheckpointFolder(tmp_path, 1), 1)
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
    else:
        assert f"{name} is damaged" in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"state.json": 1}', '{"../other": "x"}'])
def test_a_list_of_checksums_that_is_something_else_is_refused(tmp_path, content):
    folder = save(CheckpointFolder(tmp_path, 1), 1)
    (folder / "checksums.json").write_text(content)
    with pytest.raises(UserError, match="step-1"):
        load_checkpoint(folder)


def put(folder: Path, name: str, values: Any) -> None:
    """Changes a file such that its checksum is right again."""
    (folder / name).write_text(json.dumps(values))
    checksums = json.loads((folder / "checksums.json").read_text())
    checksums[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(checksums))


def of_weight(segments: Any) -> Any:
    return lambda row: {**row, "segments": segments}


INDICES = {
    "a hole at the start": (of_weight([[2, 6, TENSORS]]), "weight layer.weight lacks elements 0 to 2"),
    "a hole in the middle": (of_weight([[0, 2, TENSORS], [3, 6, TENSORS]]), "lacks elements 2 to 3"),
    "a hole at the end": (of_weight([[0, 5, TENSORS]]), "weight layer.weight has 5 of its 6 elements"),
    "more than there is": (of_weight([[0, 7, TENSORS]]), "weight layer.weight has 7 of its 6 elements"),
    "an overlap": (of_weight([[0, 4, TENSORS], [2, 6, TENSORS]]), "has elements 2 to 4 twice"),
    "the same twice": (of_weight([[0, 6, TENSORS], [0, 6, TENSORS]]), "has elements 0 to 6 twice"),
    "backwards": (of_weight([[0, 6, TENSORS], [6, 4, TENSORS]]), "lacks elements"),
    "a file that is not listed": (of_weight([[0, 6, "../x"]]), "checksums.json lacks ../x"),
    "another type": (lambda row: {**row, "dtype": "F13"}, "F13"),
    "no list": (of_weight(3), "cannot be read"),
    "no name": (lambda row: {"kind": "weight"}, "cannot be read"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_does_not_cover_every_element_once_is_damage(tmp_path, case):
    change, message = INDICES[case]
    folder = save(CheckpointFolder(tmp_path, 1), 1)
    rows = json.loads((folder / "index.json").read_text())
    put(folder, "index.json", [change(row) if row["kind"] == "weight" else row for row in rows])
    with pytest.raises(DamagedCheckpointError, match=f"step-1: .*{message}.*use another"):
        load_checkpoint(folder)


WEIGHT = Piece("weight", "w", torch.Size([2, 3]), 0, torch.arange(6.0))
WRONG_PIECES = {
    "a part is missing": ([dataclasses.replace(WEIGHT, values=torch.arange(4.0))], "w has 4 of its 6 elements"),
    "twice the same": ([WEIGHT, WEIGHT], "weight/w/0 would be written twice"),
    "an overlap": (
        [dataclasses.replace(WEIGHT, values=torch.arange(4.0)), dataclasses.replace(WEIGHT, start=2)],
        "w has elements 2 to 4 twice",
    ),
    "two shapes": (
        [
            dataclasses.replace(WEIGHT, values=torch.arange(3.0)),
            Piece("weight", "w", torch.Size([3, 2]), 3, torch.ones(3)),
        ],
        "w has two shapes or types",
    ),
    "two types": (
        [
            dataclasses.replace(WEIGHT, values=torch.arange(3.0)),
            Piece("weight", "w", WEIGHT.shape, 3, torch.ones(3, dtype=torch.float64)),
        ],
        "w has two shapes or types",
    ),
}


@pytest.mark.parametrize("case", WRONG_PIECES)
def test_pieces_that_are_not_the_whole_are_a_defect_and_nothing_is_left(tmp_path, case):
    pieces, message = WRONG_PIECES[case]
    folder = CheckpointFolder(tmp_path, 1)
    save(folder, 1)
    with pytest.raises(ValueError, match=message) as caught:
        folder.save(little_state(2), pieces)
    assert not isinstance(caught.value, UserError)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_ranges_are_read_over_the_borders_of_pieces(tmp_path):
    values = torch.arange(12.0)
    cuts = [0, 5, 6, 11, 12]
    pieces = [
        Piece("weight", "w", torch.Size([4, 3]), first, values[first:last]) for first, last in itertools.pairwise(cuts)
    ]
    source = load_checkpoint(CheckpointFolder(tmp_path, 1).save(little_state(1), pieces[::-1])).tensors
    assert source.shape("weight", "w") == (4, 3)
    for first in range(13):
        for last in range(first, 13):
            assert source.read("weight", "w", first, last - first).tolist() == list(range(first, last))
    for start, length in ((-1, 2), (0, 13), (12, 1), (3, -1)):
        with pytest.raises(ValueError, match="weight w has no elements"):
            source.read("weight", "w", start, length)
    with pytest.raises(KeyError):
        source.read("weight", "v", 0, 1)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    folder = save(CheckpointFolder(tmp_path, 1), 1)
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=f"format {checkpoint.FORMAT + 1}, this version reads {checkpoint.FORMAT}: go on with"
    ):
        load_checkpoint(folder)


def test_the_newest_whole_one_is_taken_with_a_warning_for_each_damaged_one(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path, keep=10)
    for step in (5, 9, 10, 100):
        save(folder, step)
    assert folder.steps() == [5, 9, 10, 100]  # by number, not by text
    assert folder.newest().state.progress.step == 100
    (folder.path(100) / TENSORS).write_bytes(b"no")
    (folder.path(10) / "state.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert_same(folder.newest(), little_state(9), little_tensors(9))
    assert ["step-100" in message or "step-10:" in message for message in caplog.messages] == [True, True]
    for step in (5, 9):
        shutil.rmtree(folder.path(step))
    assert folder.newest() is None
    assert CheckpointFolder(tmp_path / "none", 1).newest() is None


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 6):
        save(folder, step, Best(1, 0.9) if step < 4 else Best(4, 0.95))
        if step == 3:
            assert folder.steps() == [1, 2, 3]
    assert folder.steps() == [4, 5]
    save(folder, 6, Best(4, 0.95))
    save(folder, 7, Best(4, 0.95))
    assert folder.steps() == [4, 6, 7]
    for step in folder.steps():
        assert load_checkpoint(folder.path(step)).state.progress.step == step


def test_a_removal_that_was_cut_off_leaves_nothing_under_a_checkpoints_name(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)

    class Killed(BaseException):
        pass

    def killed_amid(path, **_):
        if path.exists():
            (path / "state.json").unlink()
            raise Killed

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed_amid)
    with pytest.raises(Killed):
        save(folder, 2)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2  # something was left
    assert [load_checkpoint(folder.path(step)).state.progress.step for step in folder.steps()] == [2]
    save(folder, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_run_that_goes_on_from_before_damaged_ones_keeps_what_it_saves(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (10, 20, 30):
        save(folder, step, Best(10, 0.5))
    for step in (20, 30):
        (folder.path(step) / TENSORS).write_bytes(b"no")
    assert folder.newest(set_aside=True).state.progress.step == 10
    save(folder, 15, Best(10, 0.5))
    assert folder.steps() == [10, 15]
    assert folder.newest().state.progress.step == 15
    aside = sorted(path.name for path in tmp_path.glob("damaged-*"))
    assert aside == ["damaged-step-20", "damaged-step-30"]  # still there to be looked at


def test_looking_at_a_run_renames_nothing(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 10)
    (folder.path(10) / TENSORS).write_bytes(b"no")
    assert folder.newest() is None
    assert folder.steps() == [10]


def test_another_format_is_refused_and_not_passed_over(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 10)
    save(folder, 20)
    values = json.loads((folder.path(20) / "state.json").read_text())
    put(folder.path(20), "state.json", {**values, "format": 99})
    # Going on from step 10 would throw step 20 away, which a newer version could read.
    with pytest.raises(UserError, match="step-20: format 99, this version reads 2"):
        folder.newest(set_aside=True)


def test_a_replacement_cut_off_between_its_two_renames_is_put_back(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    save(folder, 10)
    folder.path(10).rename(tmp_path / ".replaced-step-10")
    assert folder.newest(set_aside=True).state.progress.step == 10


def test_saving_a_step_again_replaces_it(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 3)
    (folder.path(3) / TENSORS).write_bytes(b"no")
    save(folder, 3, Best(3, 0.75))
    assert folder.newest().state.best == Best(3, 0.75)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_save_that_was_cut_off_is_never_taken_for_a_checkpoint(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=3)
    save(folder, 1)

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    for place in ("checksum_of", "flush"):  # before the list of checksums is written, and before the rename
        monkeypatch.setattr(checkpoint, place, killed)
        with pytest.raises(Killed):
            save(folder, 2)
        monkeypatch.undo()
        assert len(list(tmp_path.iterdir())) == 2  # something was left
        assert folder.steps() == [1]
        assert folder.newest().state.progress.step == 1
    save(folder, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_a_full_disk_is_a_clear_error_and_leaves_the_older_ones(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=1)
    save(folder, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files.os, "fsync", full)
    with pytest.raises(UserError, match=r"step-2: cannot be written \(No space left on device\); free space"):
        save(folder, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    assert folder.newest().state.progress.step == 1


def test_the_description_of_the_data_survives_json():
    assert spec_from_json(json.loads(json.dumps(spec_to_json(SPEC)))) == SPEC
