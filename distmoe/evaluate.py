"""Looking at a run: its test result with the expert analysis, and what a configuration would do."""

from pathlib import Path
from typing import Any

from distmoe.config import RunConfig, load_config
from distmoe.contracts import DataSpec
from distmoe.parallel.runtime import open_runtime
from distmoe.training.evaluation import Evaluation
from distmoe.training.run_folder import RunFolder, write_json
from distmoe.training.session import open_session


def evaluate_run(run: Path, overrides: list[str]) -> str:
    """Tests a run's selected checkpoint and gives the result as text.

    Args:
        run: The run's folder.
        overrides: Changes of its configuration, e.g. ``moe.gate.k=4``; without any, ``evaluation.json`` is written.

    Raises:
        UserError: The run has no whole checkpoint, or an override does not fit it.
    """
    folder = RunFolder.existing(run)
    # No optimizer state is read, and the weights come from the checkpoint.
    config = load_config(folder.config_file, [*overrides, "model.init_from=null"])
    state = folder.selected(config.train.select)
    with open_runtime(config) as runtime, open_session(config, runtime) as session:
        if not any(override.startswith("data.") for override in overrides):
            session.check_same_data(state)
        session.select(state)
        result = session.evaluate_current("test")
        values = {"step": state.progress.step, **result.describe(session.data.spec)}
        if not overrides:
            write_json(folder.path / "evaluation.json", values)
        return format_evaluation(result, values, session.data.spec)


def format_evaluation(result: Evaluation, values: dict[str, Any], spec: DataSpec) -> str:
    """Accuracy, accuracy by class, and for each MoE layer its measures beside their maxima, and classes by expert."""
    lines = [f"test accuracy {result.accuracy:.4f} ({result.samples} samples, checkpoint of step {values['step']})", ""]
    width = max(len(name) for name in spec.class_names)
    lines += [f"  {name:<{width}}  {share:.4f}" for name, share in values["class_accuracy"].items()]
    for layer, measures in values["layers"].items():
        lines += ["", f"layer {layer}"]
        longest = max(len(name) for name in measures["maxima"])
        lines += [
            f"  {name:<{longest}}  {measures[name]:.4f} of {maximum:.4f}"
            for name, maximum in measures["maxima"].items()
        ]
        lines += ["", f"  {'share of each class by expert':<{width}}"]
        for name, shares in zip(spec.class_names, measures["class_by_expert"], strict=True):
            lines.append(f"  {name:<{width}}  " + " ".join(f"{share:5.2f}" for share in shares))
    return "\n".join(lines)


def describe_plan(config: RunConfig) -> str:
    """What a run would do: data, steps, parameters and work, without training.

    Raises:
        UserError: It would be refused.
    """
    config.check_trainable()
    with open_runtime(config) as runtime, open_session(config, runtime) as session:
        cost = session.cost
        rows = {
            "data": f"{session.data.spec.name}, samples of shape {list(session.data.spec.input_shape)}, "
            f"{session.data.spec.num_classes} classes",
            "training samples": session.plan.num_samples,
            "validation samples": session.evaluation_plans["validation"].num_samples,
            "test samples": session.evaluation_plans["test"].num_samples,
            "steps an epoch": session.plan.num_steps,
            "steps of the run": session.total_steps,
            "micro-batch on each rank": session.plan.rows,
            "parameters": f"{cost.num_parameters:,}",
            "active parameters": f"{cost.num_active_parameters:,}",
            "active FLOPs an image": f"{cost.active_flops_per_image:,}",
            "device": f"{runtime.device}, {runtime.num_threads} threads",
            "run folder": RunFolder.of(config).path,
        }
        return "\n".join(f"{name:<26}{value}" for name, value in rows.items())
