"""The layout of a run, without running it."""

import importlib.metadata
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
    bad = ("train.precision=fp16", "parallel.expert_parallel_size=4")
    code, lines = doctor(capsys, config, *bad, "--world", 4)
    assert code == 2
    assert lines[-2:] == [
        "problem: parallel.expert_parallel_size (4) must divide the number of processes (4) and moe.num_experts (6): "
        "set it to 1 or 2, or auto",
        "problem: train.precision (fp16) needs a CUDA device; on a CPU use bf16 or fp32",
    ]


def install_only(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(package: str) -> str:
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr("importlib.metadata.version", version)


def test_package_that_is_missing_is_a_problem_where_it_is_needed(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    install_only(monkeypatch, torch="2.8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = ("data.loader=ffcv", "parallel.expert_parallel_size=2")
    code, lines = doctor(capsys, config, *asked, "--world", 2)
    assert code == 2
    assert [line.partition(", which")[0] for line in lines if line.startswith("problem:")] == [
        "problem: data.loader is ffcv",
        "problem: the engine is deepspeed",
    ]
    code, lines = doctor(capsys, config, "data.loader=resident", "--world", 2, "parallel.expert_parallel_size=1")
    assert code == 0


def test_machine_alone_says_what_is_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    install_only(monkeypatch, torch="2.8", ffcv="1.2")
    code, lines = doctor(capsys)
    rows = {line[:12].strip(): line[12:].strip() for line in lines}
    assert code == 0
    assert (rows["torch"], rows["ffcv"], rows["deepspeed"]) == ("2.8", "1.2", "not installed")


REFUSED = {
    "hosts of different size": (
        (True, "--world", 6, "--per-host", 4),
        "--world (6) must be a multiple of --per-host (4), or smaller: every host has as many processes; change one of "
        "the two",
    ),
    "processes of no run": (
        (False, "--world", 6),
        "--world (6) imagines processes of a run: give its YAML file, or leave --world away",
    ),
    "hosts of real processes": (
        (True, "--per-host", 4),
        "--per-host (4) is for --world: give the number of processes to imagine as well",
    ),
    "hosts of nothing": (
        (False, "--per-host", 4),
        "--per-host (4) is for --world: give the number of processes to imagine as well",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_go_together_are_refused(config: Path, capsys: pytest.CaptureFixture[str], case: str):
    (with_config, *options), message = REFUSED[case]
    code, lines = doctor(capsys, *([config] if with_config else []), *options)
    assert code == 2
    assert lines == [f"distmoe: error: {message}"]
