"""The command: its page, its exit code, and the layout of a run, without running it."""

import socket
import sys
from pathlib import Path

import pytest

from distmoe import cli
from tests.runs import write_quadrants, write_tiny_config
from tests.unit.doctor.imitated_ssh import imitate_hosts


def doctor(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """Exit code and lines of the command."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", *map(str, arguments)])
    shown = capsys.readouterr()
    return int(stop.value.code or 0), (shown.out + shown.err).splitlines()


@pytest.fixture(autouse=True)
def one_process_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for variable in ("MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_quadrants(tmp_path / "data.npz")
    return write_tiny_config(tmp_path / "data.npz", tmp_path / "runs", "moe.num_experts=6")


def table(lines: list[str]) -> list[list[str]]:
    """The rows below the heading of the ranks, down to the summary."""
    (start,) = [
        number for number, line in enumerate(lines) if line.split() == ["rank", "host", "device", "copy", "experts"]
    ]
    rows = lines[start + 1 :]
    return [line.split() for line in rows[: rows.index("")]]


def section(lines: list[str], title: str) -> list[str]:
    """The findings of a section, each in one line again."""
    rest = lines[lines.index(title) + 1 :]
    found: list[str] = []
    for line in rest[: rest.index("")]:
        if line.startswith(" "):
            found[-1] += f" {line.strip()}"
        else:
            found.append(line)
    return found


def test_ranks_of_an_imagined_world(config: Path, capsys: pytest.CaptureFixture[str]):
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
    assert section(lines, "layout")[0] == "ok    layout            fits the processes and the experts"


def test_every_problem_is_named_with_its_remedy(config: Path, capsys: pytest.CaptureFixture[str]):
    bad = ("train.precision=fp16", "parallel.expert_parallel_size=4")
    code, lines = doctor(capsys, config, *bad, "--world", 4)
    assert code == 2
    assert section(lines, "layout") == [
        "fail  layout            parallel.expert_parallel_size (4) must divide the number of processes (4) and "
        "moe.num_experts (6): set it to 1 or 2, or auto",
        "fail  precision         train.precision (fp16) needs a CUDA device; on a CPU use bf16 or fp32",
    ]
    assert lines[-1].endswith(", 2 fail")


def test_machine_alone(capsys: pytest.CaptureFixture[str]):
    code, lines = doctor(capsys)
    assert code == 0
    assert "layout" not in lines
    assert "ok    GPUs              none: training on the CPU" in lines
    findings = [line for line in lines if line[:4].strip() in ("ok", "warn", "fail")]
    assert f"ok    Python            {sys.version.split()[0]}, {sys.executable}" in findings
    levels = [line[:4].strip() for line in findings]
    assert lines[-1] == f"{levels.count('ok')} ok, {levels.count('warn')} warn, 0 fail"
    assert max(map(len, lines)) <= 120


def test_data_and_disk_of_a_run(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    _, lines = doctor(capsys, config, "run.name=new")
    data, run_dir = section(lines, f"run {tmp_path}/runs/new")
    assert data == f"ok    data set          arrays, in {tmp_path}/data.npz"
    assert run_dir.startswith(f"ok    run.dir           {tmp_path}/runs: ")


def test_command_that_prepares_the_data_is_that_of_this_run(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    overrides = ("data.name=cifar10", "data.path=null", f"data.root={tmp_path}/with space")
    code, lines = doctor(capsys, config, *overrides)
    assert code == 2
    assert f"prepare {config} data.name=cifar10 data.path=null 'data.root={tmp_path}/with space'" in " ".join(
        line.strip() for line in lines
    )
    code, _ = doctor(capsys, config, *overrides, "--world", 2)  # imagined: the data need not be here
    assert code == 0


def test_port_of_the_store(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        _, lines = doctor(capsys, "--port", port)
        assert f"warn  port {port}" in [line[:24].strip() for line in lines]
        monkeypatch.setenv("MASTER_PORT", str(port))
        _, lines = doctor(capsys)
        assert f"warn  port {port}" in [line[:24].strip() for line in lines]
    monkeypatch.delenv("MASTER_PORT")
    _, lines = doctor(capsys)
    assert "port 29500" in [line[6:24].strip() for line in lines]


def test_hosts_of_a_file(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    imitated = imitate_hosts(tmp_path / "ssh", monkeypatch)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("host1 slots=2\nhost2 slots=2\n")
    code, lines = doctor(capsys, config, "--hostfile", hostfile)
    assert code == 0
    found = section(lines, f"hosts of {hostfile}: 2 hosts, 2 slots each")
    assert [line[:24].split() for line in found] == [
        ["ok", "host1"],
        ["ok", "host2"],
        ["ok", "connections"],
        ["ok", "run.dir"],
    ]
    assert "port 29500 and at any other" in found[2]
    # 4 ranks and 6 experts, 2 ranks on a host
    assert table(lines) == [
        ["0", "host1", "cpu", "0", "0-2"],
        ["1", "host1", "cpu", "0", "3-5"],
        ["2", "host2", "cpu", "1", "0-2"],
        ["3", "host2", "cpu", "1", "3-5"],
    ]
    imitated.log_in("host2", "exit 1")
    assert doctor(capsys, "--hostfile", hostfile)[0] == 2


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
REFUSED = {
    "hosts of different size": (
        ("CONFIG", "--world", "6", "--per-host", "4"),
        "--world (6) must be a multiple of --per-host (4), or smaller: every host has as many processes; change one of "
        "the two",
    ),
    "processes of no run": (
        ("--world", "6"),
        "--world (6) imagines processes of a run: give its YAML file, or leave --world away",
    ),
    "hosts of real processes": (
        ("CONFIG", "--per-host", "4"),
        "--per-host (4) is for --world: give the number of processes to imagine as well",
    ),
    "hosts of nothing": (
        ("--per-host", "4"),
        "--per-host (4) is for --world: give the number of processes to imagine as well",
    ),
    "imagined processes on real hosts": (
        ("CONFIG", "--world", "4", "--hostfile", "hosts"),
        "--hostfile (hosts) and --world (4) exclude each other: leave one of them away",
    ),
    "ssh to nobody": (
        ("--ssh-port", "2222"),
        "--ssh-port (2222) is for --hostfile: give the file of the hosts as well",
    ),
    "no such file of hosts": (
        ("--hostfile", "absent"),
        "--hostfile absent: cannot be read (No such file or directory); give a file of lines HOST slots=N",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_go_together_are_refused(config: Path, capsys: pytest.CaptureFixture[str], case: str):
    options, message = REFUSED[case]
    code, lines = doctor(capsys, *(config if option == "CONFIG" else option for option in options))
    assert code == 2
    assert lines == [f"distmoe: error: {message}"]


def test_what_a_launcher_has_settled_is_not_asked_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    code, lines = doctor(capsys, "--hostfile", "hosts")
    assert code == 2
    assert lines == [
        "distmoe: error: --hostfile hosts has one process ask the hosts, but a launcher has started 2: "
        "leave one of the two away"
    ]
    code, lines = doctor(capsys, "--port", 4000)
    assert (code, lines) == (
        2,
        ["distmoe: error: --port (4000): a launcher has chosen the port already; leave --port away"],
    )
