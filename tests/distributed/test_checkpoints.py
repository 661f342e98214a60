"""One checkpoint for any layout: written by the ranks of one mesh, read by those of another, each element once."""

import functools
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from distmoe.contracts import UserError
from distmoe.models import build_model
from distmoe.moe.dispatch import Placement
from distmoe.moe.experts import MLPExperts, ModuleExperts
from distmoe.moe.gates.topk import TopKGate
from distmoe.moe.growing import exact, take_weights
from distmoe.moe.layer import MoELayer
from distmoe.parallel import shards
from distmoe.parallel.control import Control
from distmoe.parallel.engines.moments import load_whole_moments, whole_moments
from distmoe.parallel.mesh import Mesh
from distmoe.parallel.shards import (
    BUFFER,
    WEIGHT,
    Piece,
    buffer_extents,
    load_extents,
    owned_pieces,
    parameter_extents,
)
from distmoe.training import integrity, loading, tensor_files
from distmoe.training.checkpoint import Checkpoint, CheckpointFolder, Progress, TrainingState, load_checkpoint
from distmoe.training.ema import WeightAverage
from distmoe.training.loading import export_model, start_from
from distmoe.training.run_folder import RunFolder
from distmoe.training.tensor_files import PieceFiles
from tests.distributed.ranks import run_ranks
from tests.unit.training.little import SPARSE, SPEC, run_config, trainer

pytestmark = pytest.mark.distributed

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # processes, expert-parallel size
NUM_EXPERTS = 4
ADAM = ("exp_avg", "exp_avg_sq")


class Net(nn.Module):
    """Stacked and separate experts, buffers inside and outside of them, sizes that four ranks cannot share evenly."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        ids = mesh.local_experts(NUM_EXPERTS)
        here = Placement(mesh.local_experts)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.stem = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.stacked = MoELayer(gate(), MLPExperts(ids, 5, 3), here)
        self.modules_ = MoELayer(gate(), ModuleExperts(ids, expert), here)


def gate() -> TopKGate:
    return TopKGate(nn.Linear(5, NUM_EXPERTS), NUM_EXPERTS, k=2)


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5))


# --- what is in a checkpoint, by hand

WHOLE = Net(Mesh())


def number(text: str) -> int:
    return zlib.crc32(text.encode())


@functools.cache
def value(kind: str, name: str) -> Tensor:
    """A canonical tensor: random, keyed by its name, whatever the layout."""
    like = dict(WHOLE.named_parameters()) | dict(WHOLE.named_buffers())
    if kind == "moment:step" or not like[name].is_floating_point():
        return torch.tensor(number(kind + name) % 1000, dtype=torch.float32 if "step" in kind else torch.int64)
    return torch.rand(like[name].shape, generator=torch.Generator().manual_seed(number(kind + name)))


def local_value(kind: str, name: str, mesh: Mesh) -> Tensor:
    whole = value(kind, name)
    if name.startswith("stacked.experts.") and kind != "moment:step":
        return whole.chunk(mesh.expert_parallel_size)[mesh.expert_rank]
    return whole


def canonical() -> dict[tuple[str, str], Tensor]:
    """Everything that a checkpoint of the net holds."""
    weights = [name for name, _ in WHOLE.named_parameters()]
    kinds = ("weight", "average", "moment:step", *(f"moment:{key}" for key in ADAM))
    names = [(kind, name) for kind in kinds for name in weights]
    names += [("buffer", name) for name, _ in WHOLE.named_buffers()]
    return {(kind, name): value(kind, name) for kind, name in names}


class Rank:
    """What one rank holds: module, optimizer, average."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.module = Net(mesh)
        self.optimizer = torch.optim.AdamW(self.module.parameters())
        self.average = WeightAverage(self.module, 0.5, mesh)

    @torch.no_grad()
    def fill(self) -> "Rank":
        for name, weight in self.module.named_parameters():
            weight.copy_(local_value("average", name, self.mesh))
        self.average.restart()
        for name, weight in self.module.named_parameters():
            weight.copy_(local_value("weight", name, self.mesh))
            moments = {key: local_value(f"moment:{key}", name, self.mesh) for key in ("step", *ADAM)}
            self.optimizer.state[weight] = moments
        for name, buffer in self.module.named_buffers():
            buffer.copy_(local_value("buffer", name, self.mesh))
        return self

    def pieces(self) -> Iterator[Piece]:
        extents = parameter_extents(self.module, self.mesh)
        yield from owned_pieces(WEIGHT, extents, self.mesh)
        for name, extent in extents.items():
            yield from whole_moments(self.optimizer, name, extent, self.mesh)
        yield from owned_pieces(BUFFER, buffer_extents(self.module, self.mesh), self.mesh)
        yield from self.average.pieces()

    def load(self, source: PieceFiles) -> "Rank":
        extents = parameter_extents(self.module, self.mesh)
        load_extents(source, WEIGHT, extents)
        for name, extent in extents.items():
            load_whole_moments(self.optimizer, source, name, extent)
        load_extents(source, BUFFER, buffer_extents(self.module, self.mesh))
        self.average.load(source)
        return self

    def held(self) -> dict[tuple[str, str], Tensor]:
        held = {("weight", name): weight.detach().clone() for name, weight in self.module.named_parameters()}
        for name, weight in self.module.named_parameters():
            held |= {(f"moment:{key}", name): moment for key, moment in self.optimizer.state[weight].items()}
        held |= {("buffer", name): buffer for name, buffer in self.module.named_buffers()}
        with self.average.swapped_in():
            held |= {("average", name): weight.detach().clone() for name, weight in self.module.named_parameters()}
        return held


def num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state(step: int) -> TrainingState:
    return TrainingState(Progress(step), None, {}, "abc", SPEC, "seed: 0\n")


# --- what the ranks do


@contextmanager
def counted(owner: Any, name: str, count: Callable[..., int]) -> Iterator[list[int]]:
    """Sums what a method's results count to."""
    original, total = getattr(owner, name), [0]

    def method(*args: Any) -> Any:
        result = original(*args)
        total[0] += count(result)
        return result

    setattr(owner, name, method)
    try:
        yield total
    finally:
        setattr(owner, name, original)


def differing(ours: dict[tuple[str, str], Tensor], mesh: Mesh) -> list[tuple[str, str]]:
    return [key for key, tensor in ours.items() if not torch.equal(tensor, local_value(*key, mesh))]


def read_back(folder: Path, mesh: Mesh, control: Control) -> dict[str, Any]:
    """Loads a checkpoint into this rank's part, twice: to go on training from it, and its trained weights alone."""
    found = load_checkpoint(folder, control)
    rank = Rank(mesh)
    with counted(PieceFiles, "read", lambda tensor: num_bytes([tensor])) as resumed_bytes:
        rank.load(found.tensors)
    held, module = rank.held(), Net(mesh)
    with counted(PieceFiles, "read", lambda tensor: num_bytes([tensor])) as trained_bytes:
        take_weights(exact(module), found.trained())
    trained = dict(module.named_parameters()) | dict(module.named_buffers())
    kinds = {name: "buffer" for name, _ in module.named_buffers()}
    return {
        "wrong": differing(held, mesh),
        "missing": sorted(canonical().keys() - held.keys()) if mesh.expert_parallel_size == 1 else [],
        "bytes": (resumed_bytes[0], num_bytes(held.values())),
        "wrong trained": differing({(kinds.get(name, "average"), name): one for name, one in trained.items()}, mesh),
        "trained bytes": (trained_bytes[0], num_bytes(trained.values())),
    }


def check_layouts(folder: Path) -> dict[str, Any]:
    """Every layout writes a checkpoint, and every layout reads each of them."""
    rank, groups = dist.get_rank(), {size: dist.new_group(list(range(size))) for size in (1, 2, 4)}

    def control(size: int) -> Control:
        return Control(rank, size, groups[size])

    for size, expert_parallel in LAYOUTS:
        if rank < size:
            mesh = Mesh(size, rank, expert_parallel)
            target = CheckpointFolder(folder / f"{size}-{expert_parallel}", 1)
            target.save(state(1), Rank(mesh).fill().pieces(), control(size))
    results = {}
    for size, expert_parallel in LAYOUTS:
        if rank < size:
            for written in LAYOUTS:
                place = folder / f"{written[0]}-{written[1]}" / "step-1"
                mesh = Mesh(size, rank, expert_parallel)
                results[written, (size, expert_parallel)] = read_back(place, mesh, control(size))
        control(4).wait()
    return results


# --- faults


def attempt(function: Callable[[], Any]) -> str:
    try:
        function()
    except UserError as error:
        return str(error)
    return "went well"


def check_faults(folder: Path) -> dict[str, Any]:
    """Saves and loads while one rank or one file is at fault; gives messages and what is left."""
    rank, control = dist.get_rank(), Control(dist.get_rank(), 4)
    mesh, results = Mesh(4, rank, 4), {}
    checkpoints = CheckpointFolder(folder / "run", 10)

    def save(step: int, target: CheckpointFolder = checkpoints) -> str:
        return attempt(lambda: target.save(state(step), Rank(mesh).fill().pieces(), control))

    def left() -> list[str]:
        control.wait()
        names = sorted(path.name for path in checkpoints.root.iterdir())
        control.wait()
        return names

    for step in (1, 2, 3, 4, 5):
        save(step)
    flush = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    tensor_files.os.fsync = full if rank == 2 else flush
    results["full disk"] = (save(6), left())
    tensor_files.os.fsync = flush

    elsewhere = CheckpointFolder(folder / "elsewhere" if rank == 3 else checkpoints.root, 10)
    results["not seen by a rank"] = (save(6, elsewhere), left())
    if rank == 3:
        (elsewhere.root / ".writing-step-6").mkdir(parents=True)
    results["not seen by rank 0"] = (save(6, elsewhere), left())

    found = checkpoints.newest(control=control)
    assert found is not None
    astray = CheckpointFolder(elsewhere.root, 10) if rank == 3 else checkpoints
    results["unseen by a rank"] = (attempt(lambda: astray.newest(set_aside=True, control=control)), left())
    lost = PieceFiles(elsewhere.root, found.tensors._index, rank)
    results["unseen later"] = attempt(lambda: Rank(mesh).load(lost) if rank == 2 else None)

    if rank == 0:
        damage(checkpoints.path(5) / "tensors-00003-of-00004.safetensors", lambda content: content[:-1])
        damage(checkpoints.path(4) / "tensors-00004-of-00004.safetensors", lambda content: content[:-1] + b"\xff")
        (checkpoints.path(3) / "tensors-00002-of-00004.safetensors").unlink()
    control.wait()
    verified, warnings = record_verified(), record_warnings()
    found = checkpoints.newest(control=control)
    looked = (step_of(found), left())
    found = checkpoints.newest(set_aside=True, control=control)
    results["damaged"] = (looked, step_of(found), left())
    results["warnings"] = warnings
    verified.clear()
    load_checkpoint(checkpoints.path(2), control)
    results["verified"] = sorted(name for name in verified if name.startswith("tensors"))
    results["bitwise"] = differing(Rank(mesh).load(found.tensors).held(), mesh) if found else ["nothing found"]
    return results


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def step_of(found: Checkpoint | None) -> int | None:
    return found.state.progress.step if found else None


def record_verified() -> list[str]:
    names: list[str] = []
    original = integrity.checksum_of

    def checksum_of(path: Path) -> str:
        names.append(path.name)
        return original(path)

    integrity.checksum_of = checksum_of
    return names


def record_warnings() -> list[str]:
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("distmoe").addHandler(handler)
    return messages


# --- starts from trained weights

DENSE = {"model": SPARSE["model"]}
FOUR, TWO = ({**DENSE, "moe": {"num_experts": number}} for number in (4, 2))
STARTS = {  # mode: what is trained, whether it is exported, settings of the start
    "exact": (FOUR, False, {}),
    "exact-file": (FOUR, True, {}),
    "grow": (TWO, False, {"init_mode": "grow"}),
    "grow-file": (TWO, True, {"init_mode": "grow"}),
    "upcycle": (DENSE, False, {"init_mode": "upcycle", "upcycle_noise": 0.1}),
    "upcycle-file": (DENSE, True, {"init_mode": "upcycle", "upcycle_noise": 0.1}),
}


def train_sources(folder: Path) -> None:
    """What the starts are from: runs with random weights, and their exports."""
    for case, (sections, exported, _) in STARTS.items():
        config = run_config({}, run={"dir": str(folder), "name": case}, **sections)
        run = RunFolder.of(config)
        with trainer(config) as trained:
            for number_, weight in enumerate(trained.module.parameters()):
                weight.data.add_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(number_)))
            run.open(config)
            run.checkpoints().save(trained.state(1), trained.pieces())
        if exported:
            export_model(run.path, folder / f"{case}.safetensors")


def check_starts(folder: Path) -> dict[Any, Any]:
    """A model of four experts, spread over ranks, starts from a trained one."""
    results: dict[Any, Any] = {}
    rank, control = dist.get_rank(), Control(dist.get_rank(), 4)
    for case, (_, exported, settings) in STARTS.items():
        config = run_config({}, model={**DENSE["model"], "init_from": "x", **settings}, moe=FOUR["moe"])
        place = folder / f"{case}.safetensors" if exported else folder / case
        whole = build_model(config, SPEC)
        start_from(whole, config, place)
        for expert_parallel in (1, 2, 4):
            mesh = Mesh(4, rank, expert_parallel)
            network = build_model(config, SPEC, Placement(mesh.local_experts))
            owner = loading._ExportedFile if exported else PieceFiles
            with counted(owner, "read", lambda tensor: num_bytes([tensor])) as read_bytes:
                start_from(network, config, place, control)
            ids = mesh.local_experts(NUM_EXPERTS)
            wrong = [
                name
                for name, tensor in network.state_dict().items()
                if not torch.equal(tensor, of_experts(name, whole.state_dict()[name], ids))
            ]
            results[case, expert_parallel] = (wrong, read_bytes[0], ids)
    missing = folder / ("nowhere" if rank == 1 else "exact-file.safetensors")
    results["missing"] = attempt(lambda: start_from(network, config, missing, control))
    return results


def of_experts(name: str, whole: Tensor, ids: range) -> Tensor:
    return whole[ids.start : ids.stop] if ".experts." in name else whole


# --- one group of processes runs it all


def check(folder: Path) -> dict[str, Any]:
    shards.LEAST_SHARED_BYTES = 64  # some of these little tensors are cut
    return {
        "layouts": check_layouts(folder / "layouts"),
        "faults": check_faults(folder / "faults"),
        "starts": check_starts(folder),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what each rank has found."""
    folder = tmp_path_factory.mktemp("checkpoints")
    train_sources(folder)
    return folder, run_ranks(check, 4, folder)


@pytest.fixture(scope="module")
def layouts(results) -> tuple[Path, list[dict[Any, Any]]]:
    return results[0] / "layouts", [result["layouts"] for result in results[1]]


@pytest.fixture(scope="module")
def faults(results) -> list[dict[str, Any]]:
    return [result["faults"] for result in results[1]]


@pytest.fixture(scope="module")
def starts(results) -> list[dict[Any, Any]]:
    return [result["starts"] for result in results[1]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_element_is_written_once_and_the_work_is_shared(layouts, layout):
    place = layouts[0] / f"{layout[0]}-{layout[1]}" / "step-1"
    expected, written, sizes = canonical(), {}, []
    for path in sorted(place.glob("tensors-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        sizes.append(num_bytes(parts.values()))
        for key, part in parts.items():
            kind, name, start = key.split("/")
            more = {(kind, name, at): element for at, element in enumerate(part.tolist(), start=int(start))}
            assert written.keys().isdisjoint(more), key
            written |= more
    elements = {
        (kind, name, at): element
        for (kind, name), tensor in expected.items()
        for at, element in enumerate(tensor.flatten().tolist())
    }
    assert written == elements
    assert len(sizes) == layout[0]
    assert sum(sizes) == num_bytes(expected.values())
    # Small tensors are written whole, each by one rank.
    assert max(sizes) < 1.4 * sum(sizes) / layout[0]


@pytest.mark.parametrize("reader", LAYOUTS, ids=str)
@pytest.mark.parametrize("writer", LAYOUTS, ids=str)
def test_any_layout_reads_what_any_other_has_written_and_no_more_than_it_holds(layouts, writer, reader):
    for result in [one[writer, reader] for one in layouts[1][: reader[0]]]:
        assert result["wrong"] == []
        assert result["missing"] == []
        assert result["wrong trained"] == []
        assert result["bytes"][0] == result["bytes"][1]
        assert result["trained bytes"][0] == result["trained bytes"][1]


REFUSED_SAVES = {
    "full disk": "cannot be written by rank 2 on host .* \\(No space left on device\\); free space",
    "not seen by a rank": "rank 3 on host .* does not see the folder that rank 0 has made: run.dir must be on storage",
    "not seen by rank 0": "host .* does not see what rank 3 has written: run.dir must be on storage that all hosts",
}


@pytest.mark.parametrize("case", REFUSED_SAVES)
def test_what_one_rank_cannot_write_is_one_message_on_all_and_nothing_is_left(faults, case):
    (message,) = {result[case][0] for result in faults}
    assert re.search(REFUSED_SAVES[case], message)
    assert [result[case][1] for result in faults] == [[f"step-{step}" for step in range(1, 6)]] * 4


def test_files_that_one_rank_does_not_see_are_no_damage_and_nothing_is_renamed(faults):
    (message,) = {result["unseen by a rank"][0] for result in faults}
    file = "tensors-00004-of-00004.safetensors"
    assert re.search(f"step-5: rank 3 on host .* does not see {file}: run.dir must be on storage that all", message)
    assert [result["unseen by a rank"][1] for result in faults] == [[f"step-{step}" for step in range(1, 6)]] * 4
    later = [result["unseen later"] for result in faults]
    assert re.search("rank 2 on host .* does not see tensors-0000.-of-00004.safetensors: run.dir must", later.pop(2))
    assert later == ["went well"] * 3


def test_damaged_checkpoints_are_passed_over_by_all_ranks_together(faults):
    before = [f"step-{step}" for step in range(1, 6)]
    after = ["damaged-step-3", "damaged-step-4", "damaged-step-5", "step-1", "step-2"]
    assert [result["damaged"] for result in faults] == [((2, before), 2, after)] * 4
    first, *others = [result["warnings"] for result in faults]
    assert others == [[], [], []]
    names = ["tensors-00003-of-00004.safetensors is damaged", "00004-of-00004.safetensors is damaged", "is missing"]
    assert [name in message for name, message in zip(names * 2, first, strict=True)] == [True] * 6
    assert [result["bitwise"] for result in faults] == [[]] * 4


def test_each_rank_verifies_its_share_of_the_files(faults):
    names = [f"tensors-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert [result["verified"] for result in faults] == [[name] for name in names]


@pytest.mark.parametrize("expert_parallel", [1, 2, 4])
@pytest.mark.parametrize("case", STARTS)
def test_spread_model_starts_as_the_whole_one_and_reads_no_more_than_it_takes(starts, case, expert_parallel):
    trained, _, settings = STARTS[case]
    source = build_model(run_config({}, **trained), SPEC).state_dict()
    for wrong, read_bytes, ids in [one[case, expert_parallel] for one in starts]:
        assert wrong == []
        if settings.get("init_mode") == "upcycle":  # the dense layer once for each expert that is made of it
            needed = [tensor for name, tensor in source.items() if ".ffn." not in name]
            needed += len(ids) * [tensor for name, tensor in source.items() if ".ffn." in name]
        else:
            needed = [of_experts(name, tensor, ids) for name, tensor in source.items()]
        assert read_bytes == num_bytes(needed)


def test_file_that_one_rank_does_not_see_is_the_same_error_on_all(starts):
    (message,) = {one["missing"] for one in starts}
    assert re.search(r"model .*nowhere: no such folder or file", message)
