"""A report of finished runs: learning curves side by side, class-by-expert heat maps, a table of results."""

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from distmoe.config import RunSection, config_to_yaml, load_config
from distmoe.contracts import UserError
from distmoe.studies.intervals import mean_interval
from distmoe.training.figures import class_expert_figure, learning_curves_figure
from distmoe.training.metrics import read_metrics
from distmoe.training.run_folder import RunFolder, write_whole

Curve = tuple[list[float], list[float]]

_COLUMNS = {
    "test_accuracy": ("test accuracy", "{:.4f}"),
    "best_validation_accuracy": ("best validation accuracy", "{:.4f}"),
    "num_parameters": ("parameters", "{:,.0f}"),
    "num_active_parameters": ("active parameters", "{:,.0f}"),
    "active_flops_per_image": ("active FLOPs an image", "{:,.0f}"),
    "images_per_second": ("images/s", "{:,.0f}"),
    "train_seconds": ("training, s", "{:.0f}"),
    "data_wait_share": ("data wait", "{:.2%}"),
}


def write_report(runs: list[Path], out: Path) -> list[Path]:
    """Writes figures (PNG) and a table (Markdown) of runs into a folder.

    Args:
        runs: Folders of runs; unfinished ones appear in the curves only.
        out: Made if missing; files of the same names are replaced.

    Returns:
        The files written: ``learning_curves.png``, ``RUN-LAYER.png`` for each MoE layer, ``results.md``.

    Raises:
        UserError: A folder is not a run's, or a file cannot be read or written.
    """
    folders = list(dict.fromkeys(RunFolder.existing(run) for run in runs))
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = [_save(learning_curves_figure(learning_curves(folders)), out / "learning_curves.png")]
        for folder in folders:
            written += _heat_maps(folder, labels(folders)[folder], out)
        table = out / "results.md"
        write_whole(table, results_table(folders))
    except OSError as error:
        place = error.filename or out
        raise UserError(f"report {out}: {place}: {error.strerror}; mend it or choose another --out") from None
    return [*written, table]


def labels(folders: list[RunFolder]) -> dict[RunFolder, str]:
    """What each run is called: its folder's name, or the whole path where two have the same."""
    names = [folder.path.name for folder in folders]
    return {folder: folder.path.name if names.count(folder.path.name) == 1 else str(folder.path) for folder in folders}


def learning_curves(folders: list[RunFolder]) -> dict[str, dict[str, Curve]]:
    """Panels of curves: training loss at each log line, accuracy at each validation."""
    losses: dict[str, Curve] = {}
    accuracies: dict[str, Curve] = {}
    for folder, label in labels(folders).items():
        lines = list(read_metrics(folder.metrics_file))
        training = [line for line in lines if "split" not in line]
        validations = [line for line in lines if line.get("split") == "validation"]
        losses[label] = _curve(training, "loss")
        accuracies[label] = _curve(validations, "accuracy")
    return {"training loss": losses, "validation accuracy": accuracies}


def results_table(folders: list[RunFolder]) -> str:
    """Markdown: a row for each set of runs that differ in their seed only, mean and 95 % interval over the seeds."""
    groups: dict[str, list[RunFolder]] = {}
    for folder in folders:
        groups.setdefault(_all_but_seed(folder), []).append(folder)
    header = ["runs", "seeds", *(title for title, _ in _COLUMNS.values())]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for group in groups.values():
        summaries = [summary for folder in group if (summary := folder.read_summary()) is not None]
        names = ", ".join(labels(folders)[folder] for folder in group)
        lines.append("| " + " | ".join([names, str(len(summaries)), *_cells(summaries)]) + " |")
    return "\n".join(lines) + "\n"


def _cells(summaries: list[dict[str, Any]]) -> list[str]:
    cells = []
    for key, (_, pattern) in _COLUMNS.items():
        values = [summary[key] for summary in summaries if summary.get(key) is not None]
        same = len(set(values)) == 1
        cells.append(
            "-" if not values else pattern.format(values[0]) if same else mean_interval(values).format(pattern)
        )
    return cells


def _all_but_seed(folder: RunFolder) -> str:
    """What two runs have in common that differ in their seed, and the folder's name, only."""
    config = load_config(folder.config_file)
    return config_to_yaml(config.model_copy(update={"seed": 0, "run": RunSection()}))


def _heat_maps(folder: RunFolder, label: str, out: Path) -> list[Path]:
    file = folder.path / "evaluation.json"
    if not file.exists():
        return []
    try:
        values: dict[str, Any] = json.loads(file.read_text())
        names = list(values["class_accuracy"])
        tables = {layer: torch.tensor(measures["class_by_expert"]) for layer, measures in values["layers"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a whole evaluation ({error}); run `distmoe evaluate {folder.path}`") from None
    file_label = label.replace("/", "-").lstrip("-")
    return [
        _save(class_expert_figure(table, names, f"{label}, {layer}"), out / f"{file_label}-{layer}.png")
        for layer, table in tables.items()
    ]


def _curve(lines: list[dict[str, Any]], key: str) -> Curve:
    with_key = [line for line in lines if isinstance(line.get(key), float)]
    return [line["step"] for line in with_key], [line[key] for line in with_key]


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
