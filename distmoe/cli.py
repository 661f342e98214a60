"""The command line: ``python -m distmoe COMMAND``.

Commands import what they need when they run, through :func:`_load`: ``--help`` and a wrong option answer at once.
"""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from distmoe.config import load_config
from distmoe.contracts import UserError

# What the commands run, imported when they do.
_MODULES = {
    "train": "distmoe.train",
    "evaluate": "distmoe.evaluate",
    "datasets": "distmoe.data.datasets",
    "beton": "distmoe.data.beton",
    "loading": "distmoe.training.loading",
    "report": "distmoe.studies.report",
    "bench_layer": "distmoe.bench.layer",
    "bench_loader": "distmoe.bench.loader",
    "bench_data_wait": "distmoe.bench.data_wait",
}

app = typer.Typer(
    help="Train Mixture-of-Experts image classifiers, watch them, resume them, see what the experts learned.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[
    Path, typer.Argument(help="YAML file with a complete run, e.g. configs/smoke.yaml.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.FIELD=VALUE]...", help="Changes to the file, e.g. optim.lr=0.01 seed=3.", show_default=False
    ),
]
Run = Annotated[Path, typer.Argument(help="Folder of a trained run, e.g. runs/smoke.", show_default=False)]


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a run, then test it once.

    Everything goes into its folder, run.dir/run.name. Prepares the data first where needed; never downloads. Ctrl-C or
    SIGTERM: save, exit with 130 or 143; continue with run.resume=true.
    """
    run_config = load_config(config, overrides or [])
    module = _load("train")
    try:
        summary = module.train(run_config)
    except module.Interrupted as stop:
        raise SystemExit(128 + stop.signal_number) from None
    if summary is not None:
        folder = Path(run_config.run.dir) / str(run_config.run.name)
        typer.echo(_finished(summary, folder))


@app.command()
def evaluate(run: Run, overrides: Overrides = None) -> None:
    """Test a trained run and show its experts.

    Accuracy, accuracy of each class, and what each expert gets. Writes evaluation.json into the run's folder where
    nothing is overridden. With moe.gate.k=1, one expert a token.
    """
    typer.echo(_load("evaluate").evaluate_run(run, overrides or []))


@app.command()
def prepare(config: Config, overrides: Overrides = None) -> None:
    """Download and prepare a data set.

    Writes the files that training reads. The only command, besides launch/smoke.sh, that uses the network.
    """
    run_config = load_config(config, overrides or [])
    _load("datasets").download(run_config.data)
    prepared = _load("beton").prepare(run_config.data)
    for name, split in prepared.splits.items():
        typer.echo(f"{name}: {split.num_samples} samples in {split.path}")


@app.command()
def export(run: Run, out: Annotated[Path, typer.Argument(help="File to write, ending in .safetensors.")]) -> None:
    """Write a trained model to one file.

    distmoe.load_model reads it.
    """
    typer.echo(f"wrote {_load('loading').export_model(run, out)}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, e.g. runs/smoke.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the figures and the table.")] = Path("report"),
) -> None:
    """Draw and table finished runs.

    Learning curves side by side, class-by-expert heat maps of each run, a table of results.
    """
    for path in _load("report").write_report(runs, out):
        typer.echo(f"wrote {path}")


@app.command()
def plan(config: Config, overrides: Overrides = None) -> None:
    """Say what a run would do.

    Data, steps, parameters, work of an image, without training.
    """
    typer.echo(_load("evaluate").describe_plan(load_config(config, overrides or [])))


bench_app = typer.Typer(
    help="Measure a part beside its peer, interleaved in one run.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(bench_app, name="bench")


@bench_app.command("loader")
def bench_loader(
    config: Config,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=6, help="Timed rounds of each path, in turn.")] = 9,
) -> None:
    """Images/s of FFCV, of torchvision's DataLoader and of the resident loader; data wait of a training step."""
    run_config = load_config(config, overrides or [])
    typer.echo(_load("bench_loader").bench_loader(run_config.data, rounds) + "\n")
    typer.echo(_load("bench_data_wait").bench_data_wait(run_config, rounds))


@bench_app.command("layer")
def bench_layer(
    width: Annotated[
        list[int] | None, typer.Option(help="D, values of a token; repeat for several.  [192, 1024]")
    ] = None,
    experts: Annotated[list[int] | None, typer.Option(help="E; repeat for several.  [8, 64]")] = None,
    k: Annotated[list[int] | None, typer.Option(help="Experts a token; repeat for several.  [1, 2, 4]")] = None,
    load: Annotated[list[str] | None, typer.Option(help="balanced or skewed; both if not given.")] = None,
    rounds: Annotated[int, typer.Option(min=6, help="Timed rounds of each layer, in turn.")] = 6,
    hidden: Annotated[int | None, typer.Option(help="H, hidden units of an expert.  [4 D up to D=256, then D]")] = None,
    rows_per_expert: Annotated[
        int | None, typer.Option(help="On average.  [256; on a CPU fewer where a layer would take long]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [a GPU if there is one]")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.  [fp32 on a CPU, bf16 on a GPU]")] = None,
) -> None:
    """Speed and memory of an MoE layer, of DeepSpeed's, a naive loop and a dense MLP of equal FLOPs.

    24 comparisons if nothing is chosen: about 7 minutes on 2 CPU cores.
    """
    shapes = (width or [192, 1024], experts or [8, 64], k or [1, 2, 4], load or ["balanced", "skewed"])
    for line in _load("bench_layer").bench_layer(*shapes, rounds, hidden, rows_per_expert, device, precision):
        typer.echo(line)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs a command. Exit codes: 0 done, 1 our defect, 2 the user can mend it, 130 and 143 stopped by a signal."""
    try:
        app(arguments, standalone_mode=True)
    except UserError as error:
        sys.stderr.write(f"distmoe: error: {error}\n")
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sys.stderr.write(f"distmoe: error: not enough memory ({_first_line(error)}): {_LESS_MEMORY}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("distmoe: stopped\n")
        sys.exit(130)
    sys.exit(0)


_LESS_MEMORY = (
    "lower data.batch_size (or cut it with train.accumulation), data.eval_batch_size, data.synthetic.train_size, "
    "or the model's sizes (model.widths, model.hidden, model.ffn_hidden, moe.num_experts)"
)


def _is_out_of_memory(error: Exception) -> bool:
    # torch is not imported here for the name of its error; on a CPU it raises a plain RuntimeError.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load(name: str) -> Any:
    importlib.import_module("distmoe.parallel.runtime").set_up_logging()
    return importlib.import_module(_MODULES[name])


def _finished(summary: dict[str, Any], folder: Path) -> str:
    return "\n".join(
        [
            f"test accuracy        {summary['test_accuracy']:.4f}  (checkpoint of step {summary['selected_step']})",
            f"training             {summary['train_seconds']:.1f} s, {summary['images_per_second']:.0f} images/s",
            f"checkpoints          {folder / 'checkpoints'}",
            f"TensorBoard          tensorboard --logdir {folder / 'tensorboard'}",
            f"what experts learned python -m distmoe evaluate {folder}",
        ]
    )
