"""The report of runs, on folders whose content is known."""

import json
from pathlib import Path

import pytest

from distmoe.config import config_to_yaml, parse_config
from distmoe.contracts import UserError
from distmoe.studies.intervals import mean_interval
from distmoe.studies.report import learning_curves, results_table, write_report
from distmoe.training.run_folder import RunFolder

LINES = [
    {"step": 10, "epoch": 0, "loss": 2.0},
    {"step": 20, "epoch": 0, "loss": 1.5},
    {"step": 20, "epoch": 0, "split": "validation", "accuracy": 0.4, "loss": 1.6},
    {"step": 20, "epoch": 0, "split": "test", "accuracy": 0.39, "loss": 1.7},
]
SUMMARY = {
    "test_accuracy": 0.39,
    "best_validation_accuracy": 0.4,
    "num_parameters": 1234567,
    "num_active_parameters": 1000,
    "active_flops_per_image": 5000000,
    "images_per_second": 1500.4,
    "train_seconds": 12.6,
    "data_wait_share": 0.0123,
}
EVALUATION = {
    "class_accuracy": {"cat": 0.5, "dog": 0.25},
    "layers": {"ffns.2": {"class_by_expert": [[0.9, 0.1], [0.2, 0.8]]}},
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "first")
    folder.path.mkdir()
    folder.config_file.write_text(config_to_yaml(parse_config({}, "test")))
    folder.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    folder.summary_file.write_text(json.dumps(SUMMARY))
    (folder.path / "evaluation.json").write_text(json.dumps(EVALUATION))
    return folder


def test_curves_hold_training_loss_and_validation_accuracy_only(run: RunFolder):
    assert learning_curves([run]) == {
        "training loss": {"first": ([10, 20], [2.0, 1.5])},
        "validation accuracy": {"first": ([20], [0.4])},
    }


def copy_of(run: RunFolder, name: str, config: dict[str, object], test_accuracy: float | None) -> RunFolder:
    folder = RunFolder(run.path.parent / name)
    folder.path.mkdir()
    folder.config_file.write_text(config_to_yaml(parse_config(config, "test")))
    if test_accuracy is not None:
        folder.summary_file.write_text(json.dumps({**SUMMARY, "test_accuracy": test_accuracy}))
    return folder


def test_table_joins_runs_that_differ_in_their_seed_only(run: RunFolder):
    again = copy_of(run, "again", {"seed": 1, "run": {"name": "again"}}, 0.41)
    other = copy_of(run, "other", {"optim": {"name": "adamw", "lr": 0.5}}, None)
    header, _, joined, unfinished = results_table([run, other, again]).splitlines()
    assert header.startswith("| runs | seeds | test accuracy | best validation accuracy | parameters |")
    # 0.39 and 0.41: mean 0.40, s = 0.02 / sqrt(2), half width = 12.7062 * s / sqrt(2) = 0.127062
    expected = "| first, again | 2 | 0.4000 +- 0.1271 | 0.4000 | 1,234,567 | 1,000 | 5,000,000 | 1,500 | 13 | 1.23% |"
    assert joined == expected
    assert unfinished == "| other | 0 |" + " - |" * 8


def test_runs_of_the_same_name_are_told_apart(run: RunFolder, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    twin = copy_of(RunFolder(tmp_path / "elsewhere" / "any"), "first", {}, 0.5)
    twin.metrics_file.write_text(json.dumps({"step": 10, "epoch": 0, "loss": 7.0}))
    losses = learning_curves([run, twin])["training loss"]
    assert losses == {str(run.path): ([10, 20], [2.0, 1.5]), str(twin.path): ([10], [7.0])}


def test_interval_is_student_ts():
    # 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.3027: 4.3027 / sqrt(3) = 2.4842
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.count) == (2.0, 3)
    assert interval.half_width == pytest.approx(2.4842, abs=1e-4)
    assert mean_interval([5.0]).format("{:.1f}") == "5.0"


def test_report_writes_curves_a_map_for_each_layer_and_the_table(run: RunFolder, tmp_path: Path):
    written = write_report([run.path], tmp_path / "out")
    assert [path.name for path in written] == ["learning_curves.png", "first-ffns.2.png", "results.md"]
    # A PNG that ends with its end marker was written whole.
    assert all(path.read_bytes()[-8:-4] == b"IEND" for path in written[:2])


@pytest.mark.parametrize("content", ["{", '{"class_accuracy": {}}', "[]"])
def test_damaged_evaluation_is_named_with_the_way_to_mend_it(run: RunFolder, tmp_path: Path, content: str):
    (run.path / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json: not a whole evaluation.*distmoe evaluate"):
        write_report([run.path], tmp_path / "out")


def test_output_below_a_file_is_refused(run: RunFolder, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"report .*file/out.*choose another --out"):
        write_report([run.path], tmp_path / "file" / "out")
