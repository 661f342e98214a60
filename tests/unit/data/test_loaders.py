import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from distmoe.config import DataSection
from distmoe.contracts import Batch, UserError
from distmoe.data.index_plan import IndexPlan, PlannedBatch
from distmoe.data.loaders import LOADERS, OpenData, open_data
from distmoe.data.loaders.protocol import Loader
from distmoe.data.prepared import PreparedSplit

pytest.importorskip("ffcv")

from distmoe.data import ffcv_package
from distmoe.data.loaders import ffcv as ffcv_loader
from distmoe.data.loaders.ffcv import FFCVLoader, allowed_workers, check_operations

NUM_TRAIN, NUM_TEST = 60, 12


def arrays_of(kind: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for prefix, size in (("", NUM_TRAIN), ("test_", NUM_TEST)):
        arrays[prefix + "labels"] = np.arange(size) % 4
        if kind == "rgb":
            arrays[prefix + "inputs"] = generator.integers(0, 256, (size, 8, 6, 3), dtype=np.uint8)
            arrays[prefix + "angle"] = generator.normal(size=size)
            arrays[prefix + "offset"] = generator.normal(size=(size, 2))
        elif kind == "grey":
            arrays[prefix + "inputs"] = generator.integers(0, 256, (size, 8, 6, 1), dtype=np.uint8)
        else:
            arrays[prefix + "inputs"] = generator.normal(size=(size, 7)).astype(np.float32)
    return arrays


class Opened:
    """The same small data set behind both loaders."""

    def __init__(self, folder: Path, kind: str):
        np.savez(folder / f"{kind}.npz", **arrays_of(kind))
        self.section = DataSection(name="arrays", path=str(folder / f"{kind}.npz"), root=str(folder))
        self.ffcv = open_data(self.section)
        self.resident = open_data(self.section.model_copy(update={"loader": "resident"}))
        self.prepared = self.train._prepared

    @property
    def train(self) -> FFCVLoader:
        loader = self.ffcv.loaders["train"]
        assert isinstance(loader, FFCVLoader)
        return loader


@pytest.fixture(scope="session")
def rgb(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(tmp_path_factory.mktemp("rgb"), "rgb")


@pytest.fixture(scope="session", params=["rgb", "grey", "vectors"])
def opened(request: pytest.FixtureRequest, rgb: Opened, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return rgb if request.param == "rgb" else Opened(tmp_path_factory.mktemp("data"), request.param)


@pytest.fixture
def copied(rgb: Opened, tmp_path: Path) -> PreparedSplit:
    """The description of a prepared split whose file a test may spoil."""
    path = tmp_path / "copy.beton"
    shutil.copy(rgb.prepared.path, path)
    return PreparedSplit(**(vars(rgb.prepared) | {"path": path}))


def plan_of(batch_size: int = 16, num_samples: int = NUM_TRAIN, **settings: int) -> list[PlannedBatch]:
    return IndexPlan(torch.arange(num_samples), batch_size, drop_last=False, **settings).epoch(0)


def assert_equal(left: Batch, right: Batch) -> None:
    assert left.num_valid == right.num_valid
    assert list(left.factors) == list(right.factors)
    pairs = [(getattr(left, name), getattr(right, name)) for name in ("images", "labels", "sample_ids")]
    for a, b in [*pairs, *((left.factors[name], right.factors[name]) for name in left.factors)]:
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a, b)


def num_reading_threads() -> int:
    return sum(isinstance(thread, ffcv_package.EpochIterator) for thread in threading.enumerate())


# What is delivered


def test_loaders_deliver_equal_batches(opened: Opened):
    # 60 samples in batches of 4 over 3 ranks are 15 slices of 2: more than FFCV's ring of 5 buffers holds, and all
    # are kept until the end, so a batch that were only a view would have been written over.
    plan = plan_of(4, world_size=3, rank=1)
    pairs = zip(opened.ffcv.loaders["train"].batches(plan), opened.resident.loaders["train"].batches(plan), strict=True)
    kept = list(pairs)
    assert len(kept) == 15
    for from_ffcv, from_memory in kept:
        assert_equal(from_ffcv, from_memory)


def test_batches_hold_the_planned_samples(rgb: Opened):
    arrays = arrays_of("rgb")
    for loaders in (rgb.ffcv.loaders, rgb.resident.loaders):
        plan = plan_of(25)
        for planned, batch in zip(plan, loaders["train"].batches(plan), strict=True):
            ids = planned.sample_ids[: planned.num_valid].numpy()
            assert batch.num_valid == len(ids)
            assert batch.sample_ids.tolist() == ids.tolist()
            assert batch.images.dtype == torch.uint8
            np.testing.assert_array_equal(batch.images, arrays["inputs"][ids].transpose(0, 3, 1, 2))
            np.testing.assert_array_equal(batch.labels, arrays["labels"][ids])
            np.testing.assert_array_equal(batch.factors["angle"], arrays["angle"][ids, None].astype(np.float32))
            np.testing.assert_array_equal(batch.factors["offset"], arrays["offset"][ids].astype(np.float32))


def test_batch_of_one_and_of_no_samples_keep_their_dimensions(rgb: Opened):
    one = plan_of(1, num_samples=2)
    nothing = plan_of(1, num_samples=2, world_size=2, rank=1)
    for loaders in (rgb.ffcv.loaders, rgb.resident.loaders):
        for plan, rows in ((one, 1), (nothing, 0)):
            for batch in loaders["train"].batches(plan):
                assert batch.images.shape == (rows, 3, 8, 6)
                assert batch.labels.shape == batch.sample_ids.shape == (rows,)
                assert batch.factors["offset"].shape == (rows, 2)


def test_two_plans_of_one_loader_can_be_read_in_turn(rgb: Opened):
    # Evaluation in the middle of an epoch, with another batch size.
    training = rgb.train.batches(plan_of(8))
    first = next(training)
    assert [batch.num_valid for batch in rgb.train.batches(plan_of(25))] == [25, 25, 10]
    rest = list(training)
    assert_equal(first, next(iter(rgb.resident.loaders["train"].batches(plan_of(8)))))
    assert [batch.num_valid for batch in rest] == [8] * 6 + [4]


def test_empty_plan_delivers_nothing_and_starts_nothing(rgb: Opened):
    for loaders in (rgb.ffcv.loaders, rgb.resident.loaders):
        assert list(loaders["train"].batches([])) == []


@pytest.mark.parametrize("ids", [[[0, 1], [2]], [[]], [[0, NUM_TRAIN]], [[-1, 0]]])
def test_plan_that_compiled_code_could_not_bear_is_refused(rgb: Opened, ids: list[list[int]]):
    plan = [PlannedBatch(0, 0, torch.tensor(row, dtype=torch.int64), len(row), 2, 2) for row in ids]
    with pytest.raises(ValueError, match=r"one length|must be in 0\.\.59"):
        list(rgb.train.batches(plan))


# The reading thread


def test_thread_ends_however_an_epoch_is_left(rgb: Opened):
    before = num_reading_threads()
    list(rgb.train.batches(plan_of()))
    assert num_reading_threads() == before

    early = rgb.train.batches(plan_of(2))
    next(early)
    assert num_reading_threads() == before + 1
    early.close()  # type: ignore[attr-defined]
    assert num_reading_threads() == before

    def leave_by_an_error() -> None:
        for _ in rgb.train.batches(plan_of(2)):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave_by_an_error()
    assert num_reading_threads() == before

    left_open = rgb.train.batches(plan_of(2))
    next(left_open)
    rgb.train.close()
    rgb.train.close()
    assert num_reading_threads() == before
    with pytest.raises(RuntimeError, match=r"\.beton was closed while it was read"):
        list(left_open)


def test_error_of_the_thread_reaches_the_consumer(rgb: Opened, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise TypeError("no such numba type")

    monkeypatch.setattr(ffcv_loader._ReadingThread, "run_pipeline", fail)
    with pytest.raises(RuntimeError, match=r"train\.beton ended early: no such numba type") as caught:
        list(rgb.train.batches(plan_of()))
    assert isinstance(caught.value.__cause__, TypeError)


def test_thread_that_dies_without_a_word_is_noticed(rgb: Opened, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ffcv_loader._ReadingThread, "run", lambda _: None)
    with pytest.raises(RuntimeError, match=r"train\.beton ended early: no reason known"):
        list(rgb.train.batches(plan_of()))


def test_thread_that_hangs_is_given_up(rgb: Opened, monkeypatch: pytest.MonkeyPatch):
    released = threading.Event()
    monkeypatch.setattr(ffcv_loader._ReadingThread, "run_pipeline", lambda *_: released.wait())
    monkeypatch.setattr(ffcv_loader, "_JOIN_S", 0.0)
    loader = FFCVLoader(rgb.prepared, timeout_s=0.2)
    with pytest.raises(RuntimeError, match=r"train\.beton has delivered nothing for 0\.2 s"):
        list(loader.batches(plan_of()))
    released.set()
    loader.close()


# What FFCV does to the process


def test_torch_keeps_its_thread_count(rgb: Opened):
    def counts() -> list[int]:
        seen = [torch.get_num_threads()]
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))  # takes the process's default
        thread.start()
        thread.join()
        return seen

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = FFCVLoader(rgb.prepared)
        batches = loader.batches(plan_of(4))
        next(batches)
        assert counts() == [3, 3]
        list(batches)
        assert counts() == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_import_of_ffcv_leaves_torch_and_numba_as_they_were():
    code = (
        "import torch, numba.typed; torch.set_num_threads(3); typed = numba.typed.Dict\n"
        "import distmoe.data.ffcv_package, ffcv.pipeline.compiler\n"
        "print(torch.get_num_threads(), numba.typed.Dict is typed)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "3 True\n"


def test_workers_are_no_more_than_the_process_may_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("numba.config.NUMBA_NUM_THREADS", 8)
    assert [allowed_workers(wanted) for wanted in (-1, 0, 1, 4, 9)] == [1, 1, 1, 4, 8]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5})
    assert allowed_workers(4) == 1


def test_operation_after_to_tensor_is_refused():
    decoder, to_tensor = ffcv_package.IntDecoder(), ffcv_package.ToTensor()
    check_operations({"label": [decoder, to_tensor]})
    for wrong in ([decoder, to_tensor, ffcv_package.IntDecoder()], [decoder], []):
        with pytest.raises(ValueError, match=r"field label.*ToTensor must come last"):
            check_operations({"label": wrong})


# Damaged files


@pytest.mark.parametrize("keep", [0, 7, 100, 1000, 5000, -1])
def test_cut_file_is_refused_when_it_is_opened(copied: PreparedSplit, keep: int):
    content = copied.path.read_bytes()
    copied.path.write_bytes(content[:keep])
    with pytest.raises(UserError, match=r"copy\.beton.*distmoe prepare"):
        FFCVLoader(copied)


def test_foreign_or_missing_file_is_refused(copied: PreparedSplit):
    copied.path.write_bytes(b"\x02\x00" + bytes(range(256)) * 40)
    with pytest.raises(UserError, match=r"copy\.beton.*distmoe prepare"):
        FFCVLoader(copied)
    copied.path.unlink()
    with pytest.raises(UserError, match=r"copy\.beton.*distmoe prepare"):
        FFCVLoader(copied)


def test_file_of_another_data_set_is_refused(copied: PreparedSplit, rgb: Opened):
    with pytest.raises(UserError, match="60 samples where 61 are expected"):
        FFCVLoader(PreparedSplit(**(vars(copied) | {"num_samples": 61})))
    with pytest.raises(UserError, match="no field factor9"):
        FFCVLoader(PreparedSplit(**(vars(copied) | {"factor_fields": {"x": ("factor9", 1)}})))


def test_spoiled_file_is_noticed_while_it_is_read(copied: PreparedSplit):
    # Samples in another order: the field index is the third of the table that follows the header.
    reader = ffcv_package.Reader(str(copied.path))
    offset = reader.header.nbytes + reader.field_descriptors.nbytes
    table = np.memmap(copied.path, reader.metadata_type, mode="r+", offset=offset, shape=NUM_TRAIN)
    table["f2"] = table["f2"][::-1].copy()
    table.flush()
    loader = FFCVLoader(copied)
    with pytest.raises(UserError, match=r"copy\.beton holds other samples than the plan asks for"):
        list(loader.batches(plan_of()))
    # Cut short: reading on would kill the process.
    with copied.path.open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(UserError, match=r"has 4096 now.*distmoe prepare"):
        list(loader.batches(plan_of()))


def test_file_replaced_while_it_is_read_does_no_harm(copied: PreparedSplit, rgb: Opened):
    loader = FFCVLoader(copied)
    batches = loader.batches(plan_of())
    expected = rgb.resident.loaders["train"].batches(plan_of())
    assert_equal(next(batches), next(expected))
    copied.path.unlink()
    copied.path.write_bytes(b"another file")
    for left, right in zip(
        [*batches, *loader.batches(plan_of())],
        [*expected, *rgb.resident.loaders["train"].batches(plan_of())],
        strict=True,
    ):
        assert_equal(left, right)


# Opening


def test_both_loaders_open_the_same_data_set(rgb: Opened):
    from_ffcv, from_memory = rgb.ffcv, rgb.resident
    assert from_ffcv.num_samples == from_memory.num_samples == {"train": NUM_TRAIN, "test": NUM_TEST}
    assert from_ffcv.spec == from_memory.spec
    assert from_ffcv.fingerprint == from_memory.fingerprint


def test_closing_a_data_set_closes_its_loaders(rgb: Opened):
    closed = []

    class Closable:
        def batches(self, planned: Any) -> Any:
            raise NotImplementedError

        def close(self) -> None:
            closed.append(self)

    loaders: dict[Any, Loader] = {"train": Closable(), "test": Closable()}
    OpenData(rgb.ffcv.spec, "", loaders, {"train": 1, "test": 1}).close()
    assert closed == list(loaders.values())


def test_without_ffcv_both_ways_out_are_named(rgb: Opened, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "distmoe.data.loaders.ffcv", None)
    with pytest.raises(UserError, match=r"bash launch/setup\.sh.*data\.loader=resident"):
        open_data(rgb.section)


def test_table_of_loaders_agrees_with_the_configuration():
    assert list(LOADERS) == list(get_args(DataSection.model_fields["loader"].annotation))
