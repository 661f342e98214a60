"""The layout of a run, without running it."""

from pathlib import Path

import pytest

from distmoe import cli
from tests.runs import write_tiny_config


def doctor(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """Exit code and lines of the command."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", *map(str, arguments)])
    shown = capsys.readouterr()
    return int(stop.value.code or 0), (shown.out + shown.err).splitlines()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_tiny_config(tmp_path / "data.npz", tmp_path, "moe.num_experts=6")  # which nobody reads


def table(lines: list[str]) -> list[list[str]]:
    """The rows below the heading of the ranks."""
    (start,) = [
        number for number, line in enumerate(lines) if line.split() == ["rank", "host", "device", "copy", "experts"]
    ]
    return [line.split() for line in lines[start + 1 :]]


def test_ranks_of_an_imagined_world(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, lines = doctor(capsys, config, "--world", 8, "--per-host", 4)
    # 6 experts, 4 ranks on a host: the largest size that divides both is 2.
    assert code == 0
    assert "expert-parallel size  2 (auto); copies of each expert: 4" in lines
    assert "engine                deepspeed (auto), ZeRO 0" in lines
    experts = ["0-2", "3-5"]
    assert table(lines) == [
        [str(rank), "host", str(rank // 4), "cpu", str(rank // 2), experts[rank % 2]] for rank in range(8)
    ]


def test_one_expert_on_each_rank(config: Path, capsys: pytest.CaptureFixture[str]):
    _, lines = doctor(capsys, config, "parallel.expert_parallel_size=6", "--world", 6)
    assert [row[-1] for row in table(lines)] == ["0", "1", "2", "3", "4", "5"]


def test_this_process_alone(config: Path, capsys: pytest.CaptureFixture[str]):
    code, lines = doctor(capsys, config)
    assert code == 0
    assert "expert-parallel size  1 (auto); copies of each expert: 1" in lines
    assert [row[3:] for row in table(lines)] == [["0", "0-5"]]


def test_every_problem_is_named_with_its_remedy(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    bad = ("train.precision=fp16", "parallel.expert_parallel_size=4")
    code, lines = doctor(capsys, config, *bad, "--world", 4)
    assert code == 2
    assert lines[-2:] == [
        "problem: parallel.expert_parallel_size (4) must divide the number of processes (4) and moe.num_experts (6): "
        "set it to 1 or 2, or auto",
        "problem: train.precision (fp16) needs a CUDA device; on a CPU use bf16 or fp32",
    ]
    code, lines = doctor(capsys, config, "parallel.expert_parallel_size=2", "--world", 2)
    assert code == 2
    assert [line.partition(", but ")[2] for line in lines if line.startswith("problem: DeepSpeed compiles")] == [
        "a C++ compiler is not on PATH: install it",
        "ninja is not on PATH: install it",
    ]


def test_machine_alone_says_what_is_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: "/bin/c++" if name == "c++" else None)
    code, lines = doctor(capsys)
    rows = {line[:12].strip(): line[12:].strip() for line in lines}
    assert code == 0
    assert (rows["C++ compiler"], rows["ninja"]) == ("/bin/c++", "not found")


def test_hosts_of_different_size_are_refused(config: Path, capsys: pytest.CaptureFixture[str]):
    code, lines = doctor(capsys, config, "--world", 6, "--per-host", 4)
    assert code == 2
    assert lines == [
        "distmoe: error: --world (6) must be a multiple of --per-host (4): every host has as many processes"
    ]
