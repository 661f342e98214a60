from pathlib import Path

import numpy as np
import pytest

from distmoe.bench.estimate import Estimate
from distmoe.bench.loader import LoaderRow, bench_loader, format_table, measure_loaders
from distmoe.config import DataSection
from distmoe.contracts import UserError


def section(folder: Path, sample_shape: tuple[int, ...], dtype: type) -> DataSection:
    inputs = np.random.default_rng(0).integers(0, 256, (40, *sample_shape)).astype(dtype)
    np.savez(folder / "arrays.npz", inputs=inputs, labels=np.arange(40) % 2)
    return DataSection(name="arrays", path=str(folder / "arrays.npz"), root=str(folder), batch_size=8)


def test_every_loader_is_measured_raw_and_augmented(tmp_path: Path):
    pytest.importorskip("ffcv")
    rows = measure_loaders(section(tmp_path, (8, 8, 3), np.uint8), rounds=6, batch_size=16, workers=(0,))
    assert [(row.name, row.delivers) for row in rows] == [
        (f"{loader}, batch {size}", delivers)
        for loader in ("ffcv", "resident")
        for delivers in ("raw", "augmented")
        for size in (16, 8)
    ] + [("torchvision, 0 workers, batch 16", delivers) for delivers in ("raw", "augmented")]
    assert all(0 < row.images_per_second.low <= row.images_per_second.median for row in rows)
    assert [row.name for row in rows if row.ratio is None] == ["torchvision, 0 workers, batch 16"] * 2


def test_vectors_are_measured_too(tmp_path: Path):
    pytest.importorskip("ffcv")
    text = bench_loader(section(tmp_path, (5,), np.float32), rounds=6, batch_size=8, workers=(0,))
    assert text.startswith("data.name=arrays, 6 rounds, ")
    assert len(text.splitlines()) == 2 + 2 + 2 + 2  # header, titles, and two rows a loader


def test_table_is_aligned_and_shows_the_intervals():
    rows = [
        LoaderRow("ffcv", "raw", Estimate(1_000_000.4, 900_000.0, 1_100_000.0), Estimate(50.0, 40.5, 60.0), 1.234),
        LoaderRow("torchvision", "raw", Estimate(20_000.0, 19_000.0, 21_000.0), None, 0.5),
    ]
    assert format_table(rows).splitlines() == [
        "loader       delivers  images/s                          x torchvision    first batch",
        "ffcv         raw       1,000,000 (900,000 to 1,100,000)  50 (40.5 to 60)  1.23 s",
        "torchvision  raw       20,000 (19,000 to 21,000)         1                0.50 s",
    ]


def test_too_few_rounds_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="at least 6"):
        bench_loader(section(tmp_path, (5,), np.float32), rounds=5)
