"""The report of runs, on folders whose content is known."""

import json
from pathlib import Path

import pytest

from distmoe.config import config_to_yaml, parse_config
from distmoe.contracts import UserError
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


def test_table_has_a_row_a_run_and_a_dash_for_what_is_missing(run: RunFolder, tmp_path: Path):
    unfinished = RunFolder(tmp_path / "second")
    unfinished.path.mkdir()
    header, _, first, second = results_table([run, unfinished]).splitlines()
    assert header.startswith("| run | test accuracy | best validation accuracy | parameters |")
    assert first == "| first | 0.3900 | 0.4000 | 1,234,567 | 1,000 | 5,000,000 | 1,500 | 13 | 1.23% |"
    assert second == "| second |" + " - |" * 8


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
