"""The command line: ``python -m distmoe COMMAND``.

Commands import what they need when they run, through :func:`_load`: ``--help`` and a wrong option answer at once.
"""

import importlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from distmoe.config import RunConfig, load_config
from distmoe.contracts import UserError
from distmoe.parallel.endings import (
    LostRanksError,
    PeerFailureError,
    end_at_once,
    exit_code_of,
    first_line,
    is_out_of_memory,
    say,
)
from distmoe.parallel.launchers import started_by_launcher

# What the commands run, imported when they do.
_MODULES = {
    "world": "distmoe.parallel.world",
    "runtime": "distmoe.parallel.runtime",
    "train": "distmoe.train",
    "evaluate": "distmoe.evaluate",
    "datasets": "distmoe.data.datasets",
    "beton": "distmoe.data.beton",
    "loading": "distmoe.training.loading",
    "doctor": "distmoe.doctor",
    "report": "distmoe.studies.report",
    "bench_layer": "distmoe.bench.layer",
    "bench_loader": "distmoe.bench.loader",
    "bench_data_wait": "distmoe.bench.data_wait",
    "bench_scaling": "distmoe.bench.scaling",
    "calibration": "distmoe.bench.calibration",
    "devices": "distmoe.training.devices",
    "forecast": "distmoe.training.forecast",
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


@app.callback()
def accept_local_rank(
    local_rank: Annotated[
        int | None, typer.Option("--local_rank", help="From the deepspeed launcher; not used.")
    ] = None,
) -> None:
    """Takes what the deepspeed launcher puts before the command; LOCAL_RANK says the same."""
    del local_rank


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a run, then test it once.

    Everything goes into its folder, run.dir/run.name. Prepares the data first where needed; never downloads. Ctrl-C,
    SIGTERM or SIGUSR1: save, exit with 130, 143 or 138; continue with run.resume=true.
    """
    run_config = _config(config, overrides)
    module = _load("train")
    try:
        summary = module.train(run_config)
    except module.Interrupted as stop:
        raise SystemExit(128 + stop.signal_number) from None
    if summary is not None:
        folder = Path(run_config.run.dir) / str(run_config.run.name)
        _show(_finished(summary, folder))


@app.command()
def evaluate(run: Run, overrides: Overrides = None) -> None:
    """Test a trained run and show its experts.

    Accuracy, accuracy of each class, and what each expert gets. Writes evaluation.json into the run's folder where
    nothing is overridden. With moe.gate.k=1, one expert a token.
    """
    _show(_load("evaluate").evaluate_run(run, overrides or []))


@app.command()
def prepare(config: Config, overrides: Overrides = None) -> None:
    """Download and prepare a data set.

    Writes the files that training reads. The only command, besides launch/smoke.sh, that uses the network.
    """
    run_config = _config(config, overrides)
    _load("datasets").download(run_config.data)
    prepared = _load("beton").prepare(run_config.data)
    for name, split in prepared.splits.items():
        _show(f"{name}: {split.num_samples} samples in {split.path}")


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
def plan(
    config: Config,
    overrides: Overrides = None,
    device: Annotated[str | None, typer.Option(help="Hardware to predict for: h100 or a100.  [h100]")] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Predict for the CPUs of this machine instead. Starts --per-host processes on it, or --world if that "
            "is less: 8 by default.",
        ),
    ] = False,
    world: Annotated[int, typer.Option(min=1, max=65536, help="Number of processes to predict for.")] = 8,
    per_host: Annotated[int, typer.Option(min=1, max=64, help="Of these, on one host.")] = 8,
) -> None:
    """Say what a run would do.

    Data, steps, parameters, work of an image, without training. And what a step would take on hypothetical hardware, in
    time and memory, for each expert-parallel size, with the size to take.
    """
    if measure and device is not None:
        raise UserError(f"--device ({device}) and --measure exclude each other: leave one of them away")
    _load("forecast").check_world(world, per_host)
    run_config = _config(config, overrides)
    if measure:
        machine = _load("calibration").measure_machine(min(world, per_host))
    else:
        machine = _load("devices").machine_of(device or "h100", run_config.train.precision)
    _show(_load("evaluate").describe_plan(run_config, machine, world, per_host))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="YAML file of a run to look at.", show_default=False)] = None,
    overrides: Overrides = None,
    world: Annotated[
        int | None, typer.Option(min=1, help="Processes to imagine, in place of those that are there.")
    ] = None,
    per_host: Annotated[int | None, typer.Option(min=1, help="Of them on each host.  [all]")] = None,
    hostfile: Annotated[
        Path | None, typer.Option(help="Hosts to ask over ssh, lines HOST slots=N; see launch/hostfile.example.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of the store of rank 0.  [MASTER_PORT, or 29500]")
    ] = None,
    ssh_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of ssh, on all hosts.  [that of ssh's configuration]")
    ] = None,
) -> None:
    """Look at this machine, at the hosts and at the layout of a run.

    Each line says ok, warn or fail, and what to do about it: memory and limits, GPUs, packages, network; of a run, its
    data and disk, and which rank has which device and experts. Exit code 2 if something fails. After a launcher's name,
    the ranks it has started.
    """
    if world is not None and config is None:
        raise UserError(f"--world ({world}) imagines processes of a run: give its YAML file, or leave --world away")
    if per_host is not None and world is None:
        raise UserError(f"--per-host ({per_host}) is for --world: give the number of processes to imagine as well")
    if hostfile is not None and world is not None:
        raise UserError(f"--hostfile ({hostfile}) and --world ({world}) exclude each other: leave one of them away")
    if ssh_port is not None and hostfile is None:
        raise UserError(f"--ssh-port ({ssh_port}) is for --hostfile: give the file of the hosts as well")
    module = _load("doctor")
    question = module.Question(
        config=_config(config, overrides) if config is not None else None,
        prepare=shlex.join(["python", "-m", "distmoe", "prepare", str(config or ""), *(overrides or [])]),
        num_ranks=world,
        ranks_per_host=per_host,
        hostfile=hostfile,
        port=port,
        ssh_port=ssh_port,
    )
    if not module.examine(question, _show):
        raise SystemExit(2)


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


@bench_app.command("scaling")
def bench_scaling(
    width: Annotated[int, typer.Option(help="D, values of a token.")] = 192,
    hidden: Annotated[int, typer.Option(help="H, hidden units of an expert.")] = 768,
    experts: Annotated[int, typer.Option(help="E, of all processes.")] = 8,
    k: Annotated[list[int] | None, typer.Option(help="Experts a token; repeat for several.  [1, 2]")] = None,
    tokens: Annotated[int, typer.Option(help="Of all processes; a multiple of processes times experts.")] = 3584,
    expert_parallel: Annotated[
        list[int] | None, typer.Option(help="Processes that share the experts; repeat for several.  [1, 2, 4]")
    ] = None,
    world: Annotated[int | None, typer.Option(help="Number of processes.  [as many as share the experts]")] = None,
    rounds: Annotated[int, typer.Option(min=6, help="Timed rounds of each layer, in turn.")] = 31,
) -> None:
    """Speed, memory and traffic of an MoE layer spread over processes, beside DeepSpeed's and what `plan` predicts.

    Starts its own processes, on CPUs, one thread each. Six comparisons if nothing is chosen: about 90 s on 2 cores.
    """
    shapes = (width, hidden, experts, k or [1, 2], tokens, expert_parallel or [1, 2, 4], world)
    for line in _load("bench_scaling").bench_scaling(*shapes, rounds):
        typer.echo(line)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs a command; see :func:`end_with`."""
    end_with(lambda: app(arguments, standalone_mode=True))


def end_with(command: Callable[[], object]) -> NoReturn:
    """Runs a command and ends the process.

    Exit codes: 0 done, 1 our defect or a lost process, 2 the user can mend it, 130, 143 and 138 stopped by a signal.
    Where there are several processes, all end with the code of the first cause.
    """
    code = 0
    try:
        _run(command)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt as stop:
        say("distmoe: stopped")
        code = exit_code_of(stop)
    except PeerFailureError as error:  # it has said so itself
        code = error.exit_code
    except (UserError, LostRanksError) as error:
        say(f"distmoe: error: {error}")
        code = exit_code_of(error)
    except Exception as error:
        code = exit_code_of(error)
        if is_out_of_memory(error):
            say(f"distmoe: error: not enough memory ({first_line(str(error)) or type(error).__name__}): {_LESS_MEMORY}")
        else:
            traceback.print_exc()
    runtime = sys.modules.get("distmoe.parallel.runtime")
    if runtime is not None and runtime.is_connected():  # to ranks that are gone: closing would wait for them
        end_at_once(code)
    sys.exit(code)


def _run(command: Callable[[], object]) -> None:
    try:
        command()
    except BaseException:
        if started_by_launcher(os.environ):  # it ends all when one leaves, and this one has still to speak
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise


_LESS_MEMORY = (
    "lower data.batch_size (or cut it with train.accumulation), data.eval_batch_size, data.synthetic.train_size, "
    "or the model's sizes (model.widths, model.hidden, model.ffn_hidden, moe.num_experts)"
)


def _config(path: Path, overrides: list[str] | None) -> RunConfig:
    def load() -> RunConfig:
        return load_config(path, overrides or [])

    config: RunConfig = _load("runtime").told_once(load) if started_by_launcher(os.environ) else load()
    return config


def _show(text: str) -> None:
    """Prints a result, once."""
    if _load("world").World.of_environment().rank == 0:
        typer.echo(text)


def _load(name: str) -> Any:
    rank = importlib.import_module(_MODULES["world"]).World.of_environment().rank
    importlib.import_module(_MODULES["runtime"]).set_up_logging(rank)
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
