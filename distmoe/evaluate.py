"""Looking at a run: its test result with the expert analysis, and what a configuration would do."""

from pathlib import Path
from typing import Any

from distmoe.config import RunConfig, load_config
from distmoe.contracts import DataSpec
from distmoe.models import build_model
from distmoe.parallel.runtime import open_runtime, told_once
from distmoe.training.cost_model import Machine
from distmoe.training.evaluation import Evaluation
from distmoe.training.forecast import forecast, format_forecast, training_of
from distmoe.training.run_folder import RunFolder, write_json
from distmoe.training.session import open_session
from distmoe.training.workload import measure_workload


def evaluate_run(run: Path, overrides: list[str]) -> str:
    """Tests a run's selected checkpoint and gives the result as text, on all ranks. Collective.

    Args:
        run: The run's folder.
        overrides: Changes of its configuration, e.g. ``moe.gate.k=4``; without any, ``evaluation.json`` is written.

    Raises:
        UserError: The run has no whole checkpoint, or an override does not fit it.
    """
    folder = told_once(lambda: RunFolder.existing(run))
    # No optimizer state is read, the weights come from the checkpoint, and the layout is that of these processes.
    own = ["parallel.backend=auto", "parallel.expert_parallel_size=auto", "parallel.zero_stage=0"]
    config = told_once(lambda: load_config(folder.config_file, [*own, *overrides, "model.init_from=null"]))
    with open_runtime(config) as runtime:
        checkpoint = folder.selected(config.train.select, control=runtime.control)
        with open_session(config, runtime) as session:
            if not any(override.startswith("data.") for override in overrides):
                session.check_same_data(checkpoint.state)
            session.select(checkpoint)
            result = session.evaluate_current("test")
            values = {"step": checkpoint.state.progress.step, **result.describe(session.data.spec)}
            if not overrides:
                runtime.control.on_main(lambda: write_json(folder.path / "evaluation.json", values))
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


def describe_plan(config: RunConfig, machine: Machine, world_size: int, ranks_per_host: int) -> str:
    """What a run would do: data, steps, parameters and work, and what it would take on other hardware; no training.

    Args:
        config: The run.
        machine: The hardware of each rank.
        world_size: Number of ranks there.
        ranks_per_host: Of these, on one host.

    Raises:
        UserError: It would be refused.
    """
    config.check_trainable()
    with open_runtime(config) as runtime, open_session(config, runtime) as session:
        # Another copy of the model: all experts, and without the autocast that the engine adds.
        workload = measure_workload(build_model(config, session.data.spec), session.data.spec)
        training = training_of(config)
        predictions = forecast(workload, training, machine, world_size, ranks_per_host)
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
        described = [f"{name:<26}{value}" for name, value in rows.items()]
        return "\n".join([*described, "", *format_forecast(predictions, training, machine)])
