"""A training that moves: saved in one layout, it goes on in others as it does in one process."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore
from torch.utils.tensorboard import SummaryWriter

from distmoe.parallel.world import World
from distmoe.train import train
from distmoe.training.checkpoint import load_checkpoint
from distmoe.training.run_folder import RunFolder
from tests.distributed.layout_cases import Layout
from tests.distributed.ranks import run_ranks
from tests.runs import all_tensors, metrics_lines, tiny_config, write_quadrants

pytestmark = pytest.mark.distributed

SAVED_STEP, NUM_STEPS = 4, 10  # in the middle of the first epoch; to the end of the second
BETA = 0.9  # of AdamW's first moment
FROM = Layout(4, 4, "zero 1")
ALONE = Layout()
LAYOUTS = (Layout(2, 2, "zero 2"), Layout(1, 1, "zero 0"), Layout(4, 2, "zero 1"))
SETTINGS = (
    "moe.loss_weights.z=0.01",
    "train.clip_norm=0.1",
    "train.ema_decay=0.9",
    "train.checkpoint_every_steps=1",
    "schedule.name=cosine",
    "run.resume=true",
)


def name_of(layout: Layout) -> str:
    return f"{layout.world}-{layout.expert_parallel}-{layout.engine.replace(' ', '-')}"


def _train(data: Path, runs: Path, layout: Layout, *overrides: str) -> None:
    """Trains, or goes on with, the run named after the layout."""
    SummaryWriter.add_figure = lambda *args, **kwargs: None  # type: ignore[method-assign]  # drawing takes longest
    section = [f"parallel.{name}={value}" for name, value in layout.section.items()]
    config = tiny_config(data, runs, f"run.name={name_of(layout)}", *SETTINGS, *section, *overrides)
    rank, size = dist.get_rank(), dist.get_world_size()
    store = FileStore(str(runs / f"store of {name_of(layout)}"), size)
    train(config, World(rank, size, rank, size, store=store))


def _save_and_go_on(data: Path, runs: Path) -> None:
    """Trains up to the step at which the others take over, and goes on in the layout that has as many processes."""
    _train(data, runs, FROM, f"train.stop_after_steps={SAVED_STEP}")
    dist.barrier()
    if dist.get_rank() == 0:
        for layout in (ALONE, *LAYOUTS):
            shutil.copytree(runs / name_of(FROM), runs / name_of(layout))
    dist.barrier()
    _go_on(data, runs, 4)


def _go_on(data: Path, runs: Path, world: int) -> None:
    for layout in (ALONE, *LAYOUTS):
        if layout.world == world:
            _train(data, runs, layout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = write_quadrants(tmp_path_factory.mktemp("data") / "quadrants.npz")
    run_ranks(_save_and_go_on, 4, data, folder)
    for world in (1, 2):
        run_ranks(_go_on, world, data, folder, world)
    return folder


def tensors_after(folder: RunFolder, step: int) -> dict[str, Tensor]:
    return all_tensors(load_checkpoint(folder.checkpoints().path(step)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_training_goes_on_in_another_layout(layout, runs):
    ours, theirs = (RunFolder(runs / name_of(each)) for each in (layout, ALONE))
    before, here, there = (
        tensors_after(theirs, SAVED_STEP),
        *(tensors_after(one, SAVED_STEP + 1) for one in (ours, theirs)),
    )
    assert here.keys() == there.keys()

    # Measure (a): m' = 0.9 m + 0.1 g tells the gradient of the first step, clipping included.
    def gradients(after: dict[str, Tensor]) -> dict[str, Tensor]:
        moments = {name: value.double() for name, value in after.items() if name.startswith("moment:exp_avg ")}
        return {name: (value - BETA * before[name].double()) / (1.0 - BETA) for name, value in moments.items()}

    expected = gradients(there)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in gradients(here).items():
        scale = max(float(expected[name].abs().max()), 1e-2 * float(norm))
        error = float((gradient - expected[name]).abs().max()) / scale
        assert error <= 1e-5, f"{name}: the gradient is {error:.1e} off"
    for name, value in there.items():
        if name.split()[0] in ("buffer", "average", "moment:step"):
            torch.testing.assert_close(
                here[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )

    # Measure (c): no token changes its expert in these few steps, or the losses would tell.
    lines = [[line for line in metrics_lines(folder) if "split" not in line] for folder in (ours, theirs)]
    steps = [line["step"] for line in lines[1]]
    assert steps == list(range(1, NUM_STEPS + 1))
    assert lines[0][:SAVED_STEP] == lines[1][:SAVED_STEP]
    for our, their in zip(lines[0][SAVED_STEP:], lines[1][SAVED_STEP:], strict=True):
        assert our["lr"] == their["lr"]
        within = 1e-6 if their["step"] <= SAVED_STEP + 3 else 1e-4
        for key in ("loss", "load_balance", "z"):
            assert our[key] == pytest.approx(their[key], rel=within), f"step {their['step']}: {key}"
        assert our["gradient_norm"] == pytest.approx(their["gradient_norm"], rel=1e-3), f"step {their['step']}"
