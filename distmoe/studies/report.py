"""A report of finished runs: learning curves side by side, class-by-expert heat maps, a table of results."""

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from distmoe.contracts import UserError
from distmoe.training.figures import class_expert_figure, learning_curves_figure
from distmoe.training.metrics import read_metrics
from distmoe.training.run_folder import RunFolder

Curve = tuple[list[float], list[float]]

_COLUMNS = {
    "test_accuracy": ("test accuracy", "{:.4f}"),
    "best_validation_accuracy": ("best validation accuracy", "{:.4f}"),
    "num_parameters": ("parameters", "{:,}"),
    "num_active_parameters": ("active parameters", "{:,}"),
    "active_flops_per_image": ("active FLOPs an image", "{:,}"),
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
    folders = [RunFolder.existing(run) for run in runs]
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = [_save(learning_curves_figure(learning_curves(folders)), out / "learning_curves.png")]
        for folder in folders:
            written += _heat_maps(folder, out)
        table = out / "results.md"
        table.write_text(results_table(folders))
    except OSError as error:
        raise UserError(f"report {out}: {error.filename or out}: {error.strerror}; choose another --out") from None
    return [*written, table]


def learning_curves(folders: list[RunFolder]) -> dict[str, dict[str, Curve]]:
    """Panels of curves: training loss at each log line, accuracy at each validation."""
    losses: dict[str, Curve] = {}
    accuracies: dict[str, Curve] = {}
    for folder in folders:
        lines = list(read_metrics(folder.metrics_file))
        training = [line for line in lines if "split" not in line]
        validations = [line for line in lines if line.get("split") == "validation"]
        losses[folder.path.name] = _curve(training, "loss")
        accuracies[folder.path.name] = _curve(validations, "accuracy")
    return {"training loss": losses, "validation accuracy": accuracies}


def results_table(folders: list[RunFolder]) -> str:
    """Markdown: a row a run, a column a number of its summary."""
    header = ["run", *(title for title, _ in _COLUMNS.values())]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for folder in folders:
        summary = folder.read_summary() or {}
        cells = ["-" if summary.get(key) is None else form.format(summary[key]) for key, (_, form) in _COLUMNS.items()]
        lines.append("| " + " | ".join([folder.path.name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def _heat_maps(folder: RunFolder, out: Path) -> list[Path]:
    file = folder.path / "evaluation.json"
    if not file.exists():
        return []
    try:
        values: dict[str, Any] = json.loads(file.read_text())
        names = list(values["class_accuracy"])
        tables = {layer: torch.tensor(measures["class_by_expert"]) for layer, measures in values["layers"].items()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a whole evaluation ({error}); run `distmoe evaluate {folder.path}`") from None
    return [
        _save(
            class_expert_figure(table, names, f"{folder.path.name}, {layer}"), out / f"{folder.path.name}-{layer}.png"
        )
        for layer, table in tables.items()
    ]


def _curve(lines: list[dict[str, Any]], key: str) -> Curve:
    return [line["step"] for line in lines], [line[key] for line in lines]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
