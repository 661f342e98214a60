"""launch/deepspeed.sh with a file of hosts: what of the command line and of the environment reaches the other hosts."""

import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.fake_launchers import CORES, ODD_VALUES, Call, Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def write_hosts(machine: Machine, text: str = "node1 slots=2\nnode2 slots=2\n") -> Path:
    path = machine.config.with_name("hostfile")
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


def launched(machine: Machine, *arguments: str | Path, **environment: str) -> Call:
    return machine.launched("deepspeed", "--cpu", "--hostfile", write_hosts(machine), *arguments, **environment)


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return pytest.importorskip("deepspeed.launcher.runner")


def remote_line(runner: ModuleType, argv: list[str], python: str) -> str:
    """What deepspeed has pdsh run on the hosts, given these arguments, with ``python`` in this interpreter's place."""
    arguments = runner.parse_args(argv)
    assert arguments.launcher == "pdsh"
    assert arguments.force_multi
    resources = {host: list(range(slots)) for host, slots in runner.fetch_hostfile(arguments.hostfile).items()}
    pdsh = runner.PDSHRunner(arguments, runner.encode_world_info(resources))
    command, _, _ = pdsh.get_cmd({}, resources)
    assert command[:6] == ["pdsh", "-S", "-f", "1024", "-w", "node1,node2"]
    assert "%" not in "".join(command[6:]).replace("--node_rank=%n", "")  # pdsh replaces %h, %n, %u and %%
    return " ".join(command[6:]).replace(runner.sys.executable, python, 1)  # as pdsh and ssh put it together


@pytest.mark.parametrize("shell", [shell for shell in ("bash", "zsh", "ksh") if shutil.which(shell)])
def test_arguments_arrive_unchanged_on_other_hosts(
    machine: Machine, runner: ModuleType, shell: str, monkeypatch: pytest.MonkeyPatch
):
    config = machine.config.with_name("it's $(touch broken) %h {a,b} * Grüße.yaml")
    config.touch()
    overrides = [f"run.name={value}" for value in ODD_VALUES]
    call = launched(machine, "doctor", config, *overrides)
    monkeypatch.chdir(machine.checkout)  # which deepspeed writes into the command
    line = remote_line(runner, call.argv, machine.python)
    log_in = [str(shutil.which(shell)), "-c", line]
    subprocess.run(log_in, cwd="/", env=machine.environment(), check=True, timeout=30)
    remote = machine.calls()[-1]
    begin = remote.argv.index("env")
    assert remote.argv[:3] == ["-u", "-m", "deepspeed.launcher.launch"]
    program = ["env", "CUDA_VISIBLE_DEVICES=", machine.python, "-u", "-m", "distmoe"]
    assert remote.argv[begin:] == [*program, "doctor", str(config), *overrides]
    assert "--no_python" in remote.argv[:begin]
    assert remote.folder == str(machine.checkout)
    assert [path.name for path in machine.checkout.iterdir()] == ["launch"]  # no substitution has run
    assert not Path("/broken").exists()


def exported(runner: ModuleType, call: Call) -> dict[str, str]:
    """The variables that deepspeed sends to the hosts: those with certain beginnings, and those in its file."""
    beginnings = (*runner.EXPORT_ENVS, "NCCL")  # the latter where there are GPUs
    sent = {name: value for name, value in call.environment.items() if name.startswith(beginnings)}
    for text in call.files:  # looked for in two folders, which makes no difference to an absolute name
        sent |= dict(line.split("=", 1) for line in text.splitlines())
    return sent


SECRETS = {
    "MLFLOW_TRACKING_TOKEN": "s3cret",
    "MLFLOW.TOKEN": "s3cret",  # no name to bash, which hands it on all the same
    "PYTHON_KEYRING": "s3cret",
    "UCX_S": "s3cret",
    "MV2_S": "s3cret",
    "AWS_SECRET_ACCESS_KEY": "s3cret",
    "WANDB_API_KEY": "s3cret",
    "MY_NCCL_TOKEN": "s3cret",
    "gloo_token": "s3cret",
}


def test_hosts_get_settings_and_no_secrets(machine: Machine, runner: ModuleType):
    own = {"NCCL_SOCKET_IFNAME": "^docker0,lo", "NCCL_IB_HCA": "=mlx5_0:1", "GLOO_SOCKET_IFNAME": "eth0"}
    call = launched(machine, machine.config, **own, **SECRETS)
    settings = {"OMP_NUM_THREADS": str(CORES // 2), "DS_ACCELERATOR": "cpu", "DISTMOE_WORLD_SIZE": "4"}
    assert exported(runner, call) == own | settings
    assert len(set(call.files)) == 1  # read twice, the same
    assert list(machine.temporary.iterdir()) == []  # the file has no name any more
    printed = machine.run("deepspeed", "--cpu", "--hostfile", write_hosts(machine), machine.config, **SECRETS)
    assert "s3cret" not in printed.stdout + printed.stderr


def test_gpus_and_what_is_sent_for_them(machine: Machine, runner: ModuleType):
    machine.has_gpus(2)
    call = machine.launched("deepspeed", "--hostfile", write_hosts(machine), machine.config, "seed=1")
    settings = {"OMP_NUM_THREADS": str(CORES // 2), "NCCL_DEBUG": "WARN", "DISTMOE_WORLD_SIZE": "4"}
    assert exported(runner, call) == settings
    assert call.argv[-4:] == ["distmoe", "train", str(machine.config), "seed=1"]
    assert "--module" in call.argv


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--master_port 29500 {kind} --hostfile {hosts} --launcher pdsh --force_multi --master_addr node1"),
        (
            ["--master", "10.0.0.7", "--port", "0123", "--ssh-port", "2222", "--processes", "2"],
            "--master_port 123 {kind} --hostfile {hosts} --launcher pdsh --force_multi --master_addr 10.0.0.7 "
            "--ssh_port 2222",
        ),
    ],
)
def test_command_of_options(machine: Machine, options: list[str], expected: str):
    hosts = write_hosts(machine)
    arguments = ["--dry-run", "--cpu", "--hostfile", hosts, *options, machine.config, "seed=1"]
    result = machine.run("deepspeed", *arguments, MLFLOW_TOKEN="s3cret")
    assert (result.returncode, result.stderr) == (0, "")
    before = f"CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS={CORES // 2} TORCH_CPP_LOG_LEVEL=ERROR "
    before += "DS_ACCELERATOR=cpu DISTMOE_WORLD_SIZE=4 "
    before += "env -u MLFLOW_TOKEN DS_ENV_FILE=/dev/fd/9 deepspeed --no_local_rank "
    after = f" env CUDA_VISIBLE_DEVICES= {machine.python} -u -m distmoe train {machine.config} seed=1"
    expected = expected.format(kind="--no_python", hosts=hosts)
    assert shlex.split(result.stdout) == shlex.split(before + expected + after)
    assert list(machine.temporary.iterdir()) == []


def test_hosts_are_read_as_deepspeed_reads_them(machine: Machine, runner: ModuleType):
    text = "# hosts\n\n  10.0.0.1\tslots=3  # the first\r\nnode-2.example.org   slots=3\n   \nNODE_3 slots=3"
    hosts = write_hosts(machine, text)
    call = machine.launched("deepspeed", "--cpu", "--hostfile", hosts, machine.config)
    assert call.environment["DISTMOE_WORLD_SIZE"] == "9"
    assert call.argv[call.argv.index("--master_addr") + 1] == "10.0.0.1"
    assert runner.fetch_hostfile(str(hosts)) == {"10.0.0.1": 3, "node-2.example.org": 3, "NODE_3": 3}


FORM = "must be: HOST slots=N"
BAD_FILES = {
    "host;touch broken slots=1": f"line 1 (host;touch broken slots=1) {FORM}",
    "host$(touch${IFS}broken) slots=1": f"line 1 (host$(touch${{IFS}}broken) slots=1) {FORM}",
    "`touch` slots=1": f"line 1 (`touch` slots=1) {FORM}",
    "-oProxyCommand=touch slots=1": f"line 1 (-oProxyCommand=touch slots=1) {FORM}",
    "node[1-9] slots=1": f"line 1 (node[1-9] slots=1) {FORM}",  # pdsh's notation
    "a,b slots=1": f"line 1 (a,b slots=1) {FORM}",
    "^/etc/passwd slots=1": f"line 1 (^/etc/passwd slots=1) {FORM}",
    "%h slots=1": f"line 1 (%h slots=1) {FORM}",
    "a slots=1;touch": f"line 1 (a slots=1;touch) {FORM}",
    "a slots=1 b slots=1": f"line 1 (a slots=1 b slots=1) {FORM}",
    "a": f"line 1 (a) {FORM}",
    "a\n": f"line 1 (a) {FORM}",
    "a slots=0": f"line 1 (a slots=0) {FORM}",
    "a slots=-1": f"line 1 (a slots=-1) {FORM}",
    "a slots=two": f"line 1 (a slots=two) {FORM}",
    "a slots=02": f"line 1 (a slots=02) {FORM}",
    "a slots = 1": f"line 1 (a slots = 1) {FORM}",
    "a slots=1\n\n\x1b[2Jb slots=1\n": f"line 3 (?[2Jb slots=1) {FORM}",  # would clear the screen
    "a slots=1\n\udcff slots=1": f"line 2 (\udcff slots=1) {FORM}",
    "a slots=1\nb slots=1\na slots=1": "line 3: host a is there twice",
    "a slots=2\n# b\nb slots=4": "line 3: 4 slots, 2 above; every host must have as many processes",
    "": "names no host: lines must be HOST slots=N",
    "# a slots=1\n": "names no host: lines must be HOST slots=N",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_bad_file_of_hosts_is_refused(machine: Machine, text: str):
    hosts = write_hosts(machine, text)
    result = machine.run("deepspeed", "--cpu", "--hostfile", hosts, machine.config)
    assert (result.returncode, result.stdout) == (2, "")
    separator = " " if BAD_FILES[text].startswith("names") else ", "
    assert result.stderr == f"deepspeed.sh: error: {hosts}{separator}{BAD_FILES[text]}\n"
    assert machine.calls() == []
    assert [path.name for path in machine.checkout.iterdir()] == ["launch"]


@pytest.mark.parametrize(
    ("gpus", "options", "environment", "message"),
    [
        (0, ["--cpu", "--processes", "1"], {}, "--processes (1) and slots=2 in {hosts} differ"),
        (0, [], {}, "there is no GPU on this host, by which all are judged: add --cpu to train on CPUs on all of them"),
        (
            4,
            [],
            {"CUDA_VISIBLE_DEVICES": "2,3"},
            "CUDA_VISIBLE_DEVICES (2,3): with a hostfile, deepspeed takes the first 2 GPUs; unset it",
        ),
        (
            0,
            ["--cpu"],
            {"NCCL_X": "$(touch broken)"},
            "environment variable NCCL_X ($(touch broken)) cannot be sent to other hosts",
        ),
        (
            0,
            ["--cpu"],
            {"GLOO_SOCKET_IFNAME": "a\nb=1"},
            "environment variable GLOO_SOCKET_IFNAME (a?b=1) cannot be sent to other hosts",
        ),
        (
            0,
            ["--cpu"],
            {"OMP_NUM_THREADS": "%h"},
            "environment variable OMP_NUM_THREADS (%h) cannot be sent to other hosts",
        ),
    ],
)
def test_refused(machine: Machine, gpus: int, options: list[str], environment: dict[str, str], message: str):
    machine.has_gpus(gpus)
    hosts = write_hosts(machine)
    result = machine.run("deepspeed", "--hostfile", hosts, *options, machine.config, **environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"deepspeed.sh: error: {message.format(hosts=hosts)}\n"
    assert machine.calls() == []
    assert list(machine.temporary.iterdir()) == []


def test_single_host_takes_gpus_by_number_only(machine: Machine):
    machine.has_gpus(4)
    result = machine.run("deepspeed", machine.config, CUDA_VISIBLE_DEVICES="GPU-1a2b")
    message = "CUDA_VISIBLE_DEVICES (GPU-1a2b) must be numbers of GPUs: deepspeed knows no other names"
    assert (result.returncode, result.stderr) == (2, f"deepspeed.sh: error: {message}\n")


@pytest.mark.parametrize(
    ("program", "remedy"),
    [
        ("deepspeed", "run bash launch/setup.sh"),
        ("pdsh", "apt-get install pdsh"),
        ("ssh", "apt-get install openssh-client"),
    ],
)
def test_program_that_is_not_installed(machine: Machine, program: str, remedy: str):
    machine.lacks(program)
    result = machine.run("deepspeed", "--cpu", "--hostfile", write_hosts(machine), machine.config)
    assert result.returncode == 2
    assert result.stderr == f"deepspeed.sh: error: {program} is not installed here: {remedy}\n"


def test_folder_that_remote_shells_would_read_otherwise(machine: Machine, tmp_path: Path):
    # deepspeed sends the folder itself, where the shell's PWD is the harmless name of a link to it.
    odd = tmp_path / "a;touch broken"
    machine.checkout.rename(odd)
    machine.checkout.symlink_to(odd)
    hosts = write_hosts(machine)
    result = machine.run("deepspeed", "--cpu", "--hostfile", hosts, machine.config, PWD=str(machine.checkout))
    assert result.returncode == 2
    message = f"the path {odd} or {machine.checkout} has characters that remote shells read as something else"
    assert result.stderr == f"deepspeed.sh: error: {message}: move the checkout\n"
