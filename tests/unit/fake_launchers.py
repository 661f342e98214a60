"""A machine on which the launch scripts find launchers that only note what they are asked for."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

SCRIPTS = ("torchrun", "accelerate", "deepspeed")
FILES = ("environment.sh", "accelerate.yaml", *(f"{script}.sh" for script in SCRIPTS))
TOOLS = (
    "basename",
    "bash",
    "cut",
    "dirname",
    "env",
    "grep",
    "mktemp",
    "rm",
    "sed",
    "seq",
    "tr",
)  # all that is relied on
CORES = 8
# Reads a file of variables as deepspeed does: if it is one, by its name, more than once.
RECORDER = f"""#!{sys.executable} -IS
import json, os, sys
sent = os.environ.get("DS_ENV_FILE", "")
files = [open(sent).read() if os.path.isfile(sent) else "" for _ in range(2)]
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ), files, os.getcwd()]) + "\\n")
"""
# What shells, pdsh, Python and YAML each read something into.
ODD_VALUES = (
    "a b",
    " two  spaces ",
    "it's",
    'say "no"',
    "$(touch broken)",
    "a $(touch broken) b",
    "`touch broken`",
    "${HOME}$HOME$$",
    "; touch broken",
    "&& touch broken",
    "| touch broken",
    "> broken",
    "\\$(touch broken)",
    '" $(touch broken) "',
    "a\\",
    "a b\\",
    "\\\\ \\n \\x41",
    "%h %n %u %%",
    "{a,b}",
    "[8,8]",
    "*",
    "c*",
    "?",
    "!!",
    "~",
    "#",
    "",
    "-x",
    "\ttab\nline\r",
    "\x01\x7f",
    "Grüße, 模型 \U0001f600",
    "\udcff\udc80",  # bytes that are no UTF-8
)


@dataclass(frozen=True)
class Call:
    """What a launcher was called with: arguments, environment, what it read in the file, twice; and where."""

    argv: list[str]
    environment: dict[str, str]
    files: list[str]
    folder: str


class Machine:
    """A checkout of the launch scripts, and a folder of programs that is all of PATH.

    Attributes:
        checkout: Also the working directory.
        config: A file that the scripts take for a configuration.
        python: What the command ``python`` stands for.
    """

    def __init__(self, folder: Path) -> None:
        self.checkout, self.programs = folder / "checkout", folder / "programs"
        self.record, self.config = folder / "record", folder / "run.yaml"
        self.temporary = folder / "temporary"
        for made in (self.checkout / "launch", self.programs, self.temporary):
            made.mkdir(parents=True)
        for name in FILES:
            shutil.copy(REPOSITORY / "launch" / name, self.checkout / "launch" / name)
        self.config.touch()
        for tool in TOOLS:
            (self.programs / tool).symlink_to(str(shutil.which(tool)))
        for launcher in (*SCRIPTS, "python", "pdsh", "ssh"):
            self.has(launcher)
        self.has("nproc", f"#!/bin/sh\necho {CORES}\n")
        self.has_gpus(0)  # whatever this machine has
        self.python = str(self.programs / "python")

    def has(self, program: str, script: str = RECORDER) -> Path:
        path = self.programs / program
        path.write_text(script)
        path.chmod(0o755)
        return path

    def lacks(self, program: str) -> None:
        (self.programs / program).unlink()

    def has_gpus(self, number: int) -> None:
        lines = "".join(f"echo 'GPU {index}: NVIDIA H100'\n" for index in range(number))
        self.has("nvidia-smi", f"#!/bin/sh\n{lines}")

    def environment(self, **added: str) -> dict[str, str]:
        return {"PATH": str(self.programs), "RECORD": str(self.record), "TMPDIR": str(self.temporary), **added}

    def run(self, script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", f"launch/{script}.sh", *arguments],
            cwd=self.checkout,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=30,
            check=False,
        )

    def calls(self) -> list[Call]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [Call(*json.loads(line)) for line in lines]

    def launched(self, script: str, *arguments: str | Path, **environment: str) -> Call:
        """Runs a script, which has to call a launcher once, and gives that call."""
        before = len(self.calls())
        result = self.run(script, *arguments, **environment)
        assert result.returncode == 0, result.stderr
        (call,) = self.calls()[before:]
        return call
