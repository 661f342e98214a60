"""launch/docker.sh against an engine that only records what it is asked: which command comes out of which options."""

import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "launch" / "docker.sh"
TOOLS = ("bash", "dirname", "sed", "realpath", "mkdir")  # all that the script may rely on
RECORDER = f"""#!{sys.executable} -IS
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
if sys.argv[1:3] == ["image", "inspect"]:
    sys.exit(int(os.environ.get("INSPECT_CODE", "0")))
sys.exit(int(os.environ.get("RUN_CODE", "0")) if sys.argv[1] == "run" else 0)
"""
ODD = [
    "a b",
    "it's",
    'say "no"',
    "$(touch broken)",
    "`id`",
    "*",
    "",
    "two\nlines",
    "-x",
    "--gpu",
    "{1,2}",
    "\\n",
    "#",
    "~",
]


class Host:
    """A machine with the programs it is given, seen by the script through its PATH."""

    def __init__(self, folder: Path):
        self.bin, self.home, self.record = folder / "bin", folder / "home", folder / "record"
        self.bin.mkdir()
        self.home.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.has("id", '#!/bin/sh\n[ "$1" = -u ] && echo 1234 || echo 5678\n')
        self.has("docker")

    def has(self, program: str, script: str = RECORDER) -> None:
        (self.bin / program).write_text(script)
        (self.bin / program).chmod(0o755)

    def has_gpu(self) -> None:
        self.has("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")

    def env(self, **environment: str) -> dict[str, str]:
        return {"PATH": str(self.bin), "HOME": str(self.home), "RECORD": str(self.record), **environment}

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", SCRIPT, *arguments],
            cwd=self.home,
            env=self.env(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def folders(self) -> tuple[str, ...]:
        """Options that keep data and runs out of this checkout."""
        return "--data", str(self.home / "data"), "--runs", str(self.home / "runs")

    def calls(self) -> list[list[str]]:
        """What the engine was asked, the path of its program left off."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [json.loads(line)[1:] for line in lines]

    def expected(self, command: list[str], *extra: str, after: tuple[str, ...] = (), **changed: str) -> list[str]:
        """The arguments of ``run``: ``extra`` between the limits and the folders, ``after`` behind the folders."""
        value = {"user": "1234:5678", "shm": "8g", "image": "distmoe", "label": "", **changed}
        fixed = f"run --rm --init --stop-timeout 60 --user {value['user']} {value.get('before', '')}"
        fixed += f" --cap-drop ALL --security-opt no-new-privileges --shm-size {value['shm']}"
        volumes = [
            f"{self.home}/data:/opt/distmoe/.data:rw",
            f"{self.home}/runs:/opt/distmoe/runs:rw",
            f"{self.home}/.cache/distmoe-container:/home/distmoe/.cache:rw",
            f"{REPOSITORY}/configs:/opt/distmoe/configs:ro",
        ]
        mounted = [word for volume in volumes for word in ("--volume", volume + value["label"])]
        return [*fixed.split(), *extra, *mounted, *after, "--entrypoint", command[0], value["image"], *command[1:]]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["smoke"], ["bash", "launch/smoke.sh"]),
        (["smoke", "cifar10", "train.epochs=1"], ["bash", "launch/smoke.sh", "cifar10", "train.epochs=1"]),
        (["test", "tests/unit", "-k", "a or b"], ["bash", "launch/test.sh", "tests/unit", "-k", "a or b"]),
        (["distmoe", "train", "configs/smoke.yaml"], ["distmoe", "train", "configs/smoke.yaml"]),
        (
            ["torchrun", "--nproc-per-node", "2", "-m", "distmoe"],
            ["torchrun", "--nproc-per-node", "2", "-m", "distmoe"],
        ),
        (["python", "-c", "print(1)", *ODD], ["python", "-c", "print(1)", *ODD]),
    ],
)
def test_command_reaches_the_engine_unchanged(host: Host, words: list[str], command: list[str]):
    result = host.run(*host.folders(), *words)
    assert result.returncode == 0, result.stderr
    assert host.calls() == [["image", "inspect", "distmoe"], host.expected(command)]
    assert not (host.home / "broken").exists()
    assert all((host.home / name).is_dir() for name in ("data", "runs", ".cache/distmoe-container"))


@pytest.mark.parametrize(
    ("options", "extra", "after", "changed"),
    [
        (["--gpu"], ["--gpus", "all", "--ulimit", "memlock=-1"], (), {}),
        (["--cpu"], [], (), {}),
        (["--shm-size", "512m"], [], (), {"shm": "512m"}),
        (
            ["--shm-size=2g", "--image=registry.example:5000/me/distmoe:1"],
            [],
            (),
            {"shm": "2g", "image": "registry.example:5000/me/distmoe:1"},
        ),
        (["--host-network"], ["--network", "host"], (), {}),
        (["--tensorboard"], ["--publish", "127.0.0.1:6006:6006"], (), {}),
        (["--tensorboard=7007"], ["--publish", "127.0.0.1:7007:6006"], (), {}),
        (["--user", "0:0"], [], (), {"user": "0:0"}),
        (["--env", "A=INFO a=b", "--env=TOKEN"], [], ("--env", "A=INFO a=b", "--env", "TOKEN"), {}),
        (["--engine-option=--device=/dev/x", "--env", "A="], [], ("--env", "A=", "--device=/dev/x"), {}),
        (
            ["--gpu", "--host-network", "--gpu"],
            ["--gpus", "all", "--ulimit", "memlock=-1", "--network", "host"],
            (),
            {},
        ),
    ],
)
def test_options(host: Host, options: list[str], extra: list[str], after: tuple[str, ...], changed: dict[str, str]):
    result = host.run(*host.folders(), *options, "distmoe", "doctor", TOKEN="hunter2")
    assert result.returncode == 0, result.stderr
    assert host.calls()[-1] == host.expected(["distmoe", "doctor"], *extra, after=after, **changed)
    assert "hunter2" not in result.stdout + result.stderr


def test_podman_has_words_of_its_own(host: Host):
    host.has("podman")
    (host.bin / "docker").unlink()
    result = host.run(*host.folders(), "--gpu", "smoke")
    assert result.returncode == 0, result.stderr
    gpu = ["--device", "nvidia.com/gpu=all", "--ulimit", "memlock=-1"]
    smoke = ["bash", "launch/smoke.sh"]
    assert host.calls()[-1] == host.expected(smoke, *gpu, before="--userns keep-id")
    host.has("id", "#!/bin/sh\necho 0\n")  # as root there is nobody to map
    host.run(*host.folders(), "smoke")
    assert host.calls()[-1] == host.expected(smoke, user="0:0")


def test_engine_by_name(host: Host):
    host.has("podman")
    other = host.home / "my docker"
    shutil.copy(host.bin / "docker", other)
    for engine, kind in (("podman", "--userns keep-id"), (str(other), ""), ("docker", "")):
        assert host.run(*host.folders(), "smoke", DISTMOE_CONTAINER_ENGINE=engine).returncode == 0
        assert host.calls()[-1] == host.expected(["bash", "launch/smoke.sh"], before=kind)
    assert json.loads(host.record.read_text().splitlines()[3])[0] == str(other)


def test_gpus_are_used_where_the_engine_can(host: Host):
    host.has("nvidia-container-runtime-hook")
    smoke, gpus = ["bash", "launch/smoke.sh"], ["--gpus", "all", "--ulimit", "memlock=-1"]
    host.run(*host.folders(), "smoke")
    assert host.calls()[-1] == host.expected(smoke)  # the toolkit, and no GPU
    host.has_gpu()
    host.run(*host.folders(), "smoke")
    assert host.calls()[-1] == host.expected(smoke, *gpus)
    host.run(*host.folders(), "--cpu", "smoke")
    assert host.calls()[-1] == host.expected(smoke)
    host.has("nvidia-smi", "#!/bin/sh\necho 'no devices were found' >&2\nexit 6\n")
    assert host.run(*host.folders(), "smoke").returncode == 0
    assert host.calls()[-1] == host.expected(smoke)


@pytest.mark.skipif(
    bool(glob("/etc/cdi/*nvidia*") + glob("/var/run/cdi/*nvidia*")), reason="this machine hands GPUs to containers"
)
def test_gpus_without_the_toolkit_are_not_forgotten_silently(host: Host):
    host.has_gpu()
    result = host.run(*host.folders(), "smoke")
    assert result.returncode == 0
    assert host.calls()[-1] == host.expected(["bash", "launch/smoke.sh"])
    assert "docker cannot hand them on: install the NVIDIA Container Toolkit" in result.stderr
    assert "Toolkit" not in host.run(*host.folders(), "--cpu", "smoke").stderr


def test_files_belong_to_the_caller(host: Host):
    host.has("id", "#!/bin/sh\necho 0\n")
    for sudo, user in (({}, "0:0"), ({"SUDO_UID": "1001", "SUDO_GID": "1002"}, "1001:1002")):
        host.run(*host.folders(), "smoke", **sudo)
        assert host.calls()[-1] == host.expected(["bash", "launch/smoke.sh"], user=user)


def test_labels_where_selinux_is_on(host: Host):
    host.has("selinuxenabled", "#!/bin/sh\nexit 0\n")
    host.run(*host.folders(), "smoke")
    assert host.calls()[-1] == host.expected(["bash", "launch/smoke.sh"], label=",z")
    host.has("selinuxenabled", "#!/bin/sh\nexit 1\n")
    host.run(*host.folders(), "smoke")
    assert host.calls()[-1] == host.expected(["bash", "launch/smoke.sh"])


def test_folders_may_be_relative_and_odd(host: Host):
    folder = host.home / "my $(data), 1"
    host.run("--data", "my $(data), 1", "--runs", "x/../runs", "smoke", XDG_CACHE_HOME=str(host.home / "c a"))
    volumes = [word for word in host.calls()[-1] if word.startswith(str(host.home))]
    assert volumes[0] == f"{folder}:/opt/distmoe/.data:rw"
    assert volumes[1] == f"{host.home}/runs:/opt/distmoe/runs:rw"
    assert volumes[2] == f"{host.home}/c a/distmoe-container:/home/distmoe/.cache:rw"
    assert folder.is_dir()


def test_build(host: Host):
    settings = host.home / "pip.conf"
    settings.write_text("[global]\n")
    arguments = ["--build-arg", "BASE_IMAGE=ubuntu:24.04", "--build-arg=DISTMOE_EXTRAS=", "--pip-conf", "pip.conf"]
    build = ["build", "--tag", "mine", "--build-arg", "BASE_IMAGE=ubuntu:24.04", "--build-arg", "DISTMOE_EXTRAS="]
    build += ["--secret", f"id=pip.conf,src={settings}", str(REPOSITORY)]
    run = host.expected(["bash", "launch/smoke.sh"], image="mine")
    assert host.run(*host.folders(), "--image", "mine", "--build", *arguments, "smoke").returncode == 0
    assert host.calls() == [build, run]
    host.record.unlink()
    host.run(*host.folders(), "smoke", INSPECT_CODE="1")  # there is no image yet
    plain = host.expected(["bash", "launch/smoke.sh"])
    assert host.calls() == [["image", "inspect", "distmoe"], ["build", "--tag", "distmoe", str(REPOSITORY)], plain]


@pytest.mark.parametrize("code", [1, 125, 143])
def test_exit_code_is_the_commands(host: Host, code: int):
    assert host.run(*host.folders(), "distmoe", RUN_CODE=str(code)).returncode == code


def test_dry_run_prints_what_would_run(host: Host):
    options = ["--build", "--env", "A=$(touch broken) 'x'", *host.folders(), "--gpu"]
    dry = host.run("--dry-run", *options, "python", *ODD)
    assert (dry.returncode, dry.stderr, host.calls()) == (0, "", [])
    assert sorted(path.name for path in host.home.iterdir()) == []
    subprocess.run(["bash", "-c", dry.stdout], env=host.env(), cwd=host.home, check=True)
    printed = host.calls()
    host.record.unlink()
    wet = host.run(*options, "python", *ODD)
    assert host.calls() == printed
    assert len(printed) == 2
    assert wet.stderr == dry.stdout  # what is run is also shown
    assert not (host.home / "broken").exists()


def test_terminal_is_handed_on(host: Host):
    outer, inner = pty.openpty()
    try:
        subprocess.run(["bash", SCRIPT, *host.folders(), "bash"], env=host.env(), stdin=inner, stdout=inner, check=True)
    finally:
        os.close(outer)
        os.close(inner)
    assert host.calls()[-1] == host.expected(["bash"], before="--interactive --tty")


BAD = [
    ("", "no command; use smoke, test, or a program of the image such as distmoe; see --help"),
    ("--gpu", "no command; use smoke, test, or a program of the image such as distmoe; see --help"),
    ("--gpus smoke", "unknown option --gpus; see --help"),
    ("-- smoke", "unknown option --; see --help"),
    ("-x", "unknown option -x; see --help"),
    ("--gpu=2 smoke", "--gpu takes no value, but is given '2'"),
    ("--gpu --cpu smoke", "--gpu and --cpu exclude each other; leave one out"),
    ("--image", "--image needs a value; see --help"),
    ("--image -v smoke", "--image '-v' is not allowed; write it like distmoe:latest"),
    ("--image= smoke", "--image '' is not allowed; write it like distmoe:latest"),
    ("--shm-size '8 GB' smoke", "--shm-size '8 GB' is not allowed; write it like 8g"),
    ("--shm-size 0 smoke", "--shm-size '0' is not allowed; write it like 8g"),
    ("--tensorboard=0 smoke", "--tensorboard '0' is not allowed; write it like --tensorboard=6006"),
    ("--tensorboard=0.0.0.0:80 x", "--tensorboard '0.0.0.0:80' is not allowed; write it like --tensorboard=6006"),
    ("--tensorboard=70000 smoke", "--tensorboard=70000 is no port; use 1 to 65535"),
    (
        "--tensorboard --host-network smoke",
        "--tensorboard has no effect with --host-network: start tensorboard with --host 127.0.0.1 instead",
    ),
    ("--env A-B=1 smoke", "--env 'A-B' is not allowed; write it like NCCL_DEBUG=INFO, or NCCL_DEBUG for yours"),
    ("--env =1 smoke", "--env '' is not allowed; write it like NCCL_DEBUG=INFO, or NCCL_DEBUG for yours"),
    ("--user me smoke", "--user 'me' is not allowed; write it like 1000:1000"),
    ("--user '1 -v /:/x:1' smoke", "--user '1 -v /:/x:1' is not allowed; write it like 1000:1000"),
    ("--build --build-arg UID smoke", "--build-arg 'UID' is not allowed; write it like BASE_IMAGE=ubuntu:24.04"),
    ("--build-arg UID=1 smoke", "--build-arg and --pip-conf have no effect without --build"),
    ("--pip-conf a-file smoke", "--build-arg and --pip-conf have no effect without --build"),
    ("--build --pip-conf none smoke", "--pip-conf 'none' is not a file"),
    ("--build --pip-conf a,file smoke", "--pip-conf 'a,file' contains a comma, the engine's separator; rename it"),
    ("--data a-file smoke", "--data 'a-file' is not a folder"),
    ("--runs a:/etc smoke", "--runs 'a:/etc' contains a colon, the engine's separator; use another"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_bad_options(host: Host, line: str, message: str):
    for name in ("a-file", "a,file"):
        (host.home / name).touch()
    result = host.run(*shlex.split(line))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"docker.sh: error: {message}\n"
    assert host.calls() == []


def test_unknown_engine(host: Host):
    result = host.run("smoke", DISTMOE_CONTAINER_ENGINE="no-engine")
    assert result.returncode == 2
    expected = "DISTMOE_CONTAINER_ENGINE=no-engine is not a program; use docker, podman or the path of one"
    assert result.stderr == f"docker.sh: error: {expected}\n"


def test_no_engine(host: Host):
    (host.bin / "docker").unlink()
    result = host.run("smoke")
    assert result.returncode == 2
    expected = "neither docker nor podman is on the PATH; install one, or name it: DISTMOE_CONTAINER_ENGINE=PATH"
    assert result.stderr == f"docker.sh: error: {expected}\n"


@pytest.mark.skipif(shutil.which("docker") is None, reason="no docker client here")
@pytest.mark.parametrize("options", [["--gpu", "--tensorboard", "--env", "A=1"], ["--cpu", "--host-network"]])
def test_a_real_client_knows_every_option(host: Host, options: list[str]):
    dry = host.run("--dry-run", *host.folders(), *options, "smoke")
    _, *arguments = shlex.split(dry.stdout)
    nowhere = {**os.environ, "DOCKER_HOST": f"unix://{host.home}/none.sock"}
    client = [str(shutil.which("docker")), *arguments]
    result = subprocess.run(client, env=nowhere, capture_output=True, text=True, timeout=60, check=False)
    assert "none.sock" in result.stderr  # it got as far as looking for the daemon
    assert "unknown" not in result.stderr
