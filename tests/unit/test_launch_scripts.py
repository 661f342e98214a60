"""launch/torchrun.sh, accelerate.sh and deepspeed.sh: which command comes out of which options, and what is refused."""

import re
import shlex
from pathlib import Path

import pytest

from tests.unit.fake_launchers import CORES, ODD_VALUES, SCRIPTS, Machine

TORCHRUN = "torchrun --nnodes {nodes} --nproc-per-node {each} --max-restarts {restarts} --rdzv-backend distmoe"
LOCAL = "--rdzv-endpoint 127.0.0.1:0 --rdzv-id distmoe"
MODULE = "--module distmoe"
CPU = "CUDA_VISIBLE_DEVICES="
SHARED = "OMP_NUM_THREADS={threads} TORCH_CPP_LOG_LEVEL=ERROR"
PATIENCE = "keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=10"
ACCELERATE = (
    "accelerate launch --config_file {checkout}/launch/accelerate.yaml --mixed_precision no --dynamo_backend no"
)
ACCELERATE_CPU = f"{CPU} {SHARED} ACCELERATE_USE_CPU=true DISTMOE_WORLD_SIZE={{size}} {ACCELERATE}"
DEEPSPEED_CPU = f"{CPU} {SHARED} DS_ACCELERATOR=cpu DISTMOE_WORLD_SIZE={{size}} deepspeed"
ONE_HOST = "--hostfile /dev/null/none --no_local_rank --master_port {port}"
ON_CPU = "--no_python env CUDA_VISIBLE_DEVICES= {python} -u -m distmoe"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def torchrun(nodes: str, each: int, restarts: int = 0, *, size: int | None = None, before: str = "") -> str:
    settings = f"{CPU} {SHARED.format(threads=max(CORES // each, 1))} {before}"
    if size is not None:
        settings += f"DISTMOE_WORLD_SIZE={size} "
    return settings + TORCHRUN.format(nodes=nodes, each=each, restarts=restarts)


def accelerate(processes: int, hosts: int, each: int, restarts: int = 0) -> str:
    threads = CORES // each
    return (
        f"{ACCELERATE_CPU.replace('{threads}', str(threads)).replace('{size}', str(processes))} "
        f"--num_processes {processes} --num_machines {hosts} --num_cpu_threads_per_process {threads} "
        f"--max_restarts {restarts} --rdzv_backend distmoe"
    )


def deepspeed(processes: int, port: int = 29500) -> str:
    command = DEEPSPEED_CPU.format(threads=CORES // processes, size=processes)
    return f"{command} --num_gpus {processes} {ONE_HOST.format(port=port)} {ON_CPU}"


COMMANDS = {
    "torchrun: one process": (
        "torchrun --cpu {config} data.batch_size=8",
        f"{torchrun('1', 1, size=1)} {LOCAL} {MODULE} train {{config}} data.batch_size=8",
    ),
    "torchrun: without GPUs, --cpu goes without saying": (
        "torchrun --processes 3 {config}",
        f"{torchrun('1', 3, size=3)} {LOCAL} {MODULE} train {{config}}",
    ),
    "torchrun: the ranks look, and train not": (
        "torchrun --processes 2 doctor {config}",
        f"{torchrun('1', 2, size=2)} {LOCAL} {MODULE} doctor {{config}}",
    ),
    "torchrun: two hosts": (
        "torchrun --hosts 2 --master node1 --processes 4 train {config} seed=1",
        f"{torchrun('2', 4, size=8)} --rdzv-endpoint node1 --rdzv-id distmoe {MODULE} train {{config}} seed=1",
    ),
    "torchrun: numbers that bash would read as octal": (
        "torchrun --hosts 08 --master node1:00080 --processes 010 --host-rank 07 --restarts 010 {config}",
        f"{torchrun('8', 10, 10, size=80)} --rdzv-endpoint node1:00080 --rdzv-id distmoe --rdzv-conf rank=7 {MODULE} "
        "train {config}",
    ),
    "torchrun: rank of the host, port, name of the run, settings": (
        "torchrun --hosts 3 --master 10.0.0.7:1234 --host-rank 2 --id my.run-2 --rendezvous read_timeout=9 {config}",
        f"{torchrun('3', 1, size=3)} --rdzv-endpoint 10.0.0.7:1234 --rdzv-id my.run-2 "
        f"--rdzv-conf rank=2,read_timeout=9 {MODULE} train {{config}}",
    ),
    "torchrun: IPv6": (
        "torchrun --hosts 2 --master [fd00::7]:1234 {config}",
        f"{torchrun('2', 1, size=2)} --rdzv-endpoint [fd00::7]:1234 --rdzv-id distmoe {MODULE} train {{config}}",
    ),
    # How many processes there will be is open: nothing is promised.
    "torchrun: elastic": (
        "torchrun --hosts 1:4 --master node1 {config}",
        f"{torchrun('1:4', 1, 3)} --rdzv-endpoint node1 --rdzv-id distmoe --rdzv-conf {PATIENCE} {MODULE} "
        "train {config}",
    ),
    "torchrun: elastic, with restarts and settings of one's own, which come later and win": (
        "torchrun --hosts 1:4 --master node1 --restarts 10 --rendezvous last_call_timeout=3,join_timeout=60 {config}",
        f"{torchrun('1:4', 1, 10)} --rdzv-endpoint node1 --rdzv-id distmoe --rdzv-conf "
        f"{PATIENCE},last_call_timeout=3,join_timeout=60 {MODULE} train {{config}}",
    ),
    "torchrun: MIN and MAX are one": (
        "torchrun --hosts 2:2 --master node1 {config}",
        f"{torchrun('2', 1, size=2)} --rdzv-endpoint node1 --rdzv-id distmoe {MODULE} train {{config}}",
    ),
    "torchrun: interface": (
        "torchrun --interface ib0 {config}",
        f"{torchrun('1', 1, size=1, before='GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME==ib0 ')} {LOCAL} {MODULE} "
        "train {config}",
    ),
    "accelerate: one process": (
        "accelerate --cpu {config} data.batch_size=8",
        f"{accelerate(1, 1, 1)} --quiet --main_process_port 0 {MODULE} train {{config}} data.batch_size=8",
    ),
    "accelerate: two processes": (
        "accelerate --cpu --processes 2 --restarts 4 {config}",
        f"{accelerate(2, 1, 2, 4)} --multi_gpu --main_process_port 0 {MODULE} train {{config}}",
    ),
    "accelerate: two hosts": (
        "accelerate --cpu --hosts 2 --processes 2 --host-rank 1 --master node1 {config}",
        f"{accelerate(4, 2, 2)} --multi_gpu --machine_rank 1 --main_process_ip node1 --main_process_port 29500 "
        f"--rdzv_conf rank=1 {MODULE} train {{config}}",
    ),
    "accelerate: port, IPv6, octal": (
        "accelerate --cpu --hosts 09 --host-rank 08 --master fd00::7 --port 01234 {config}",
        f"{accelerate(9, 9, 1)} --multi_gpu --machine_rank 8 --main_process_ip fd00::7 --main_process_port 1234 "
        f"--rdzv_conf rank=8 {MODULE} train {{config}}",
    ),
    "deepspeed: one process": (
        "deepspeed --cpu {config} data.batch_size=8",
        f"{deepspeed(1)} train {{config}} data.batch_size=8",
    ),
    "deepspeed: two processes, port": (
        "deepspeed --processes 2 --port 1234 doctor {config}",
        f"{deepspeed(2, 1234)} doctor {{config}}",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command_of_options(machine: Machine, case: str):
    line, expected = COMMANDS[case]
    names = {"config": str(machine.config), "checkout": str(machine.checkout), "python": machine.python}
    script, *arguments = shlex.split(line.format(**names))
    (machine.programs / "launch").mkdir()  # to which CDPATH leads a careless cd
    result = machine.run(script, "--dry-run", *arguments, CDPATH=str(machine.programs))
    assert (result.returncode, result.stderr) == (0, "")
    assert shlex.split(result.stdout) == shlex.split(expected.format(**names))
    assert result.stdout.count("\n") == 1
    assert machine.calls() == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_printed_command_is_the_one_that_is_run(machine: Machine, script: str):
    arguments = ["--processes", "2", machine.config, "run.name=a b", "model.widths=[8,8]"]
    printed = shlex.split(machine.run(script, "--dry-run", *arguments).stdout)
    result = machine.run(script, *arguments)
    assert (result.returncode, result.stdout) == (0, "")
    assert shlex.split(result.stderr) == [f"{script}:", *printed]
    (call,) = machine.calls()
    program = printed.index(script)
    assert call.argv == printed[program + 1 :]
    settings = dict(setting.split("=", 1) for setting in printed[:program])
    assert settings.items() <= call.environment.items()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("gpus", [0, 4])
def test_what_the_user_has_set_stays(machine: Machine, script: str, gpus: int):
    machine.has_gpus(gpus)
    own = {
        "OMP_NUM_THREADS": "3",
        "GLOO_SOCKET_IFNAME": "eth7",
        "NCCL_SOCKET_IFNAME": "^docker0",
        "NCCL_DEBUG": "INFO",
        "DISTMOE_WORLD_SIZE": "5",
        "ACCELERATE_USE_CPU": "false",
        "DS_ACCELERATOR": "cuda",
    }
    call = machine.launched(script, "--interface", "eth0", machine.config, **own)
    assert own.items() <= call.environment.items()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("gpus", "visible", "options", "processes", "seen"),
    [
        (4, None, [], 4, None),
        (4, "2,3", [], 2, "2,3"),
        (4, "2,3", ["--processes", "1"], 1, "2,3"),
        (4, None, ["--cpu"], 1, ""),
        (4, "2,3", ["--cpu", "--processes", "2"], 2, ""),
        (4, "", [], 1, ""),
        (4, "-1", [], 1, ""),  # to CUDA, no GPU
        (0, None, [], 1, ""),  # a driver without GPUs
    ],
)
def test_as_many_processes_as_gpus(
    machine: Machine, script: str, gpus: int, visible: str | None, options: list[str], processes: int, seen: str | None
):
    machine.has_gpus(gpus)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    call = machine.launched(script, *options, machine.config, **environment)
    assert call.environment["DISTMOE_WORLD_SIZE"] == str(processes)
    assert call.environment.get("CUDA_VISIBLE_DEVICES") == seen
    on_gpus = seen != ""
    assert call.environment.get("NCCL_DEBUG") == ("WARN" if on_gpus else None)
    assert call.environment.get("ACCELERATE_USE_CPU" if script == "accelerate" else "DS_ACCELERATOR") == {
        "torchrun": None,
        "accelerate": None if on_gpus else "true",
        "deepspeed": None if on_gpus else "cpu",
    }.get(script)
    if script == "deepspeed":  # it sets CUDA_VISIBLE_DEVICES itself
        chosen = (
            f"--include localhost:{visible[: 2 * processes - 1]}" if visible and on_gpus else f"--num_gpus {processes}"
        )
        assert " ".join(call.argv[:2]) == chosen
        assert ("CUDA_VISIBLE_DEVICES=" in call.argv) != on_gpus


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_arrive_unchanged(machine: Machine, script: str):
    config = machine.config.with_name("it's $(touch broken) %h {a,b} * Grüße.yaml")
    config.touch()
    overrides = [f"run.name={value}" for value in ODD_VALUES]
    call = machine.launched(script, "--processes", "2", config, *overrides)
    assert call.argv[-len(overrides) - 2 :] == ["train", str(config), *overrides]
    assert [path.name for path in machine.checkout.iterdir()] == ["launch"]  # no substitution has run


SEVERAL = "--hosts 2 --master node1"
SHARED = {
    "": "CONFIG is missing: the YAML file of a run, e.g. configs/smoke.yaml",
    "train": "CONFIG is missing: the YAML file of a run, e.g. configs/smoke.yaml",
    "gone.yaml": "CONFIG (gone.yaml) is not a file",
    "{config} --cpu": "'--cpu' is not SECTION.FIELD=VALUE; options come before CONFIG",
    "{config} seed": "'seed' is not SECTION.FIELD=VALUE; options come before CONFIG",
    "{config} 'a b=1'": "'a b=1' is not SECTION.FIELD=VALUE; options come before CONFIG",
    "{config} =1": "'=1' is not SECTION.FIELD=VALUE; options come before CONFIG",
    "--fast {config}": "unknown option --fast; options come before CONFIG, --help lists them",
    "--processes=2 {config}": "unknown option --processes=2; options come before CONFIG, --help lists them",
    "--processes": "option --processes needs a value",
    "--processes 0 {config}": "--processes (0) must be a whole number from 1 to 1024",
    "--processes 1025 {config}": "--processes (1025) must be a whole number from 1 to 1024",
    "--processes -1 {config}": "--processes (-1) must be a whole number from 1 to 1024",
    "--processes two {config}": "--processes (two) must be a whole number from 1 to 1024",
    "--processes '' {config}": "--processes () must be a whole number from 1 to 1024",
    "--processes 'a[$(touch x)]' {config}": "--processes (a[$(touch x)]) must be a whole number from 1 to 1024",
    "--processes '1\n2' {config}": "--processes (1?2) must be a whole number from 1 to 1024",
    "--interface 'a b' {config}": "--interface (a b) must be the name of a network interface",
    "--interface -x {config}": "--interface (-x) must be the name of a network interface",
}
IN_ALL = ("", "{config} --cpu", "--processes", "--fast {config}")  # code that all have: for the others a sample will do
FORGOTTEN = "--master and --host-rank need --hosts: how many there are"
REFUSED = {
    **{f"torchrun {line}": message for line, message in SHARED.items()},
    **{f"{script} {line}": SHARED[line] for script in ("accelerate", "deepspeed") for line in IN_ALL},
    "torchrun --hosts 0 {config}": "--hosts (0) must be at least 1, and MIN at most MAX",
    "torchrun --hosts 3:2 {config}": "--hosts (3:2) must be at least 1, and MIN at most MAX",
    "torchrun --hosts 0:2 {config}": "--hosts (0:2) must be at least 1, and MIN at most MAX",
    "torchrun --hosts 1: {config}": "--hosts (1:) must be a whole number, or MIN:MAX",
    "torchrun --hosts 1:2:3 {config}": "--hosts (1:2:3) must be a whole number, or MIN:MAX",
    "torchrun --hosts 12345 {config}": "--hosts (12345) must be a whole number, or MIN:MAX",
    "torchrun --hosts 2 {config}": "--hosts (2) needs --master: the name or address of the first host",
    "torchrun --hosts 1:2 {config}": "--hosts (1:2) needs --master: the name or address of the first host",
    "torchrun --master node1 {config}": FORGOTTEN,
    "torchrun --host-rank 1 {config}": FORGOTTEN,
    "torchrun --hosts 2 --master node1:x {config}": (
        "--master (node1:x) must be HOST or HOST:PORT, with [...] around an IPv6 address"
    ),
    "torchrun --hosts 2 --master fd00::7 {config}": (
        "--master (fd00::7) must be HOST or HOST:PORT, with [...] around an IPv6 address"
    ),
    "torchrun --hosts 2 --master [fd00::7 {config}": (
        "--master ([fd00::7) must be HOST or HOST:PORT, with [...] around an IPv6 address"
    ),
    "torchrun --hosts 2 --master node1:0 {config}": "the port in --master (0) must be a whole number from 1 to 65535",
    "torchrun --hosts 2 --master node1:65536 {config}": (
        "the port in --master (65536) must be a whole number from 1 to 65535"
    ),
    "torchrun --hosts 2 --master -x {config}": "--master (-x) must be the name or the address of a host",
    "torchrun --hosts 2 --master 'a;touch broken' {config}": (
        "--master (a;touch broken) must be the name or the address of a host"
    ),
    f"torchrun {SEVERAL} --host-rank 2 {{config}}": "--host-rank (2) must be below --hosts (2)",
    f"torchrun {SEVERAL} --host-rank x {{config}}": "--host-rank (x) must be a whole number from 0 to 9999",
    "torchrun --hosts 1:2 --master node1 --host-rank 0 {config}": (
        "--host-rank (0) fixes the hosts, --hosts (1:2) leaves them open: drop one"
    ),
    "torchrun --restarts x {config}": "--restarts (x) must be a whole number from 0 to 100000",
    "torchrun --id 'a b' {config}": "--id (a b) must be letters, digits, '.', '_' and '-'",
    "torchrun --rendezvous rank {config}": "--rendezvous (rank) must be K=V,...",
    "torchrun --rendezvous 'a=1 --x' {config}": "--rendezvous (a=1 --x) must be K=V,...",
    "accelerate --hosts 2:3 {config}": "--hosts (2:3) must be a whole number from 1 to 9999",
    "accelerate --hosts 0 {config}": "--hosts (0) must be a whole number from 1 to 9999",
    "accelerate --master node1 {config}": FORGOTTEN,
    "accelerate --host-rank 1 {config}": FORGOTTEN,
    "accelerate --hosts 2 --host-rank 0 {config}": "--hosts (2) needs --master: the name or address of the first host",
    f"accelerate {SEVERAL} {{config}}": "--hosts (2) needs --host-rank: 0 on the master, 1, 2, ... elsewhere",
    f"accelerate {SEVERAL} --host-rank 2 {{config}}": "--host-rank (2) must be below --hosts (2)",
    "accelerate --hosts 2 --master node1:80 {config}": "--master (node1:80) must be the name or the address of a host",
    "accelerate --port 0 {config}": "--port (0) must be a whole number from 1 to 65535",
    "accelerate --restarts -1 {config}": "--restarts (-1) must be a whole number from 0 to 100000",
    "deepspeed --port 65536 {config}": "--port (65536) must be a whole number from 1 to 65535",
    "deepspeed --ssh-port 0 {config}": "--ssh-port (0) must be a whole number from 1 to 65535",
    "deepspeed --master node1 {config}": "--master and --ssh-port need --hostfile: the file with all hosts",
    "deepspeed --ssh-port 22 {config}": "--master and --ssh-port need --hostfile: the file with all hosts",
    "deepspeed --master node1:80 {config}": "--master (node1:80) must be the name or the address of a host",
    "deepspeed --hostfile gone {config}": "--hostfile (gone) is not a file that can be read",
    "deepspeed --hosts 2 {config}": "unknown option --hosts; options come before CONFIG, --help lists them",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_option_is_refused_in_one_line(machine: Machine, line: str):
    script, *arguments = shlex.split(line.format(config=machine.config))
    result = machine.run(script, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{script}.sh: error: {REFUSED[line]}\n"
    assert machine.calls() == []
    assert [path.name for path in machine.checkout.iterdir()] == ["launch"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_launcher_that_is_not_installed(machine: Machine, script: str):
    machine.lacks(script)
    result = machine.run(script, machine.config)
    assert result.returncode == 2
    assert result.stderr == f"{script}.sh: error: {script} is not installed here: run bash launch/setup.sh\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_option(machine: Machine, script: str):
    result = machine.run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    files = [(machine.checkout / "launch" / name).read_text() for name in (f"{script}.sh", "environment.sh")]
    options = {
        option for text in files for option in re.findall(r"^        (?:.*\| )?(--[a-z-]+)(?= \||\))", text, re.M)
    }
    assert {"--processes", "--cpu", "--interface", "--dry-run", "--help"} < options
    assert options <= set(re.findall(r"^  +(--[a-z-]+)", result.stdout, re.M))
    assert "set -euo" not in result.stdout


def test_saved_settings_of_accelerate_are_not_used(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    # With these, accelerate launch shards one process with FSDP, and gives it GPU 0, also where GPUs are hidden.
    launch = pytest.importorskip("accelerate.commands.launch")
    saved = machine.config.with_name("default_config.yaml")
    saved.write_text("distributed_type: FSDP\ngpu_ids: '0'\nnum_processes: 16\nmixed_precision: bf16\ndebug: true\n")
    for module in ("launch", "config.config_args"):
        monkeypatch.setattr(f"accelerate.commands.{module}.default_config_file", str(saved))
    for processes in (1, 2):
        call = machine.launched("accelerate", "--processes", str(processes), machine.config, "seed=1")
        assert call.argv[0] == "launch"
        arguments = launch.launch_command_parser().parse_args(call.argv[1:])
        settings, defaults, _ = launch._validate_launch_command(arguments)
        assert (settings.use_fsdp, settings.gpu_ids, settings.mixed_precision) == (False, "all", "no")
        assert (settings.num_processes, settings.multi_gpu, settings.debug) == (processes, processes > 1, False)
        assert (settings.module, settings.training_script) == (True, "distmoe")
        assert settings.training_script_args == ["train", str(machine.config), "seed=1"]
        assert defaults.distributed_type == "NO"
