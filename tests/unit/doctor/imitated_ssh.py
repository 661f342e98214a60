"""A program ``ssh`` that runs the command here, as if on another host, with the faults that the host has been given.

Hosts ``host1``, ``host2``, ... have the addresses 10.99.0.1, ..., which only they know of: in the processes that the
program starts, such an address stands for this machine's loopback address.
"""

import os
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest

SSH = """#!/bin/sh
printf '%s\\n' "$*" >>{folder}/commands
while [ "$1" != -- ]; do shift; done
HOST=$2 COMMAND=$3
export HOST
[ ! -f {folder}/"$HOST".sh ] || . {folder}/"$HOST".sh
PYTHONPATH={folder}/python exec sh -c "$COMMAND"
"""

# Run by every Python that the program starts, before anything else.
START = """
import os, pathlib, socket

def known(name, port=None, *rest, **options):
    if not name.startswith("host"):
        return real(name, port, *rest, **options)
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.99.0." + name[4:], port or 0))]

def here(place):
    return ("127.0.0.1", place[1]) if place[0].startswith("10.99.0.") else place

class Socket(socket.socket):
    def bind(self, place):
        super().bind(here(place))

    def connect(self, place):
        super().connect(here(place))

real = socket.getaddrinfo
socket.getaddrinfo, socket.socket = known, Socket
fault = pathlib.Path(__file__).parent.parent / (os.environ["HOST"] + ".py")
if fault.exists():
    exec(fault.read_text())
"""


class ImitatedHosts:
    """The hosts behind the program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def log_in(self, host: str, script: str) -> None:
        """What the shell of this host does before the command."""
        (self.folder / f"{host}.sh").write_text(script)

    def python(self, host: str, code: str) -> None:
        """What the Python of this host does before anything else."""
        (self.folder / f"{host}.py").write_text(code)

    def commands(self) -> list[str]:
        """All the program was called with."""
        return (self.folder / "commands").read_text().splitlines()


def imitate_hosts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ImitatedHosts:
    """Puts the program first on the PATH, and makes the names of the hosts known to this process."""
    folder.mkdir()
    (folder / "python").mkdir()
    (folder / "python" / "sitecustomize.py").write_text(START)
    program = folder / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH.format(folder=shlex.quote(str(folder))))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    real = socket.getaddrinfo

    def known(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("unknown"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        if not name.startswith("host"):
            return real(name, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"10.99.0.{name[4:]}", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", known)
    return ImitatedHosts(folder)
