"""Figures of a run, drawn by matplotlib without a display: heat maps of class against expert, learning curves."""

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def class_expert_figure(shares_CE: Tensor, class_names: Sequence[str], title: str) -> "Figure":
    """Heat map of a (C, E) table whose rows sum to 1: which expert each class goes to."""
    num_classes, num_experts = shares_CE.shape
    figure = _new_figure((1.6 + 0.5 * num_experts, 1.2 + 0.28 * num_classes), dpi=100)
    axes = figure.subplots()
    image = axes.imshow(
        shares_CE.numpy(), cmap="viridis", vmin=0.0, vmax=max(float(shares_CE.max()), 1e-6), aspect="auto"
    )
    axes.set_xticks(range(num_experts))
    axes.set_xlabel("expert")
    if num_classes <= 20:
        axes.set_yticks(range(num_classes), class_names)
    else:
        axes.set_ylabel("class")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="share of the class")
    return figure


def learning_curves_figure(curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> "Figure":
    """Curves side by side: panel name -> curve name -> (steps, values)."""
    figure = _new_figure((4.6 * len(curves), 3.4), dpi=120)
    for axes, (panel, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, (steps, values) in lines.items():
            axes.plot(steps, values, label=name, linewidth=1.6, marker="o" if len(steps) <= 20 else None, markersize=3)
        axes.set_xlabel("optimizer step")
        axes.set_title(panel, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    return figure


def _new_figure(size: tuple[float, float], dpi: int) -> "Figure":
    """An empty figure of ``size`` inches. Matplotlib takes a second to import, so not before the first figure."""
    figure: Any = importlib.import_module("matplotlib.figure").Figure
    return figure(figsize=size, layout="constrained", dpi=dpi)
