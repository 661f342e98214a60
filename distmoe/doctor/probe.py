"""What the doctor asks another host: this file, run there by its Python, answers requests until its input ends.

It is sent as text: it knows no other module of the package, which the other host may lack, and runs on older Pythons
than the package does. A request and its answer are a line of JSON each. What a request has opened or written is closed
and removed at the end, which comes after :data:`LIFE_S` at the latest: nothing stays behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import IO, Any

MARK = "distmoe-doctor "
"""Begins every answer: a log-in may print lines of its own."""

LIFE_S = 600
"""Seconds after which the probe ends, also where the connection to it is cut."""

ABSENT = "absent"
CODE = "distmoe's code"

_at_the_end: list[Callable[[], None]] = []


def describe(packages: list[str]) -> dict[str, Any]:
    """The host's own name, versions by name with a digest of distmoe's sources, and how many GPUs its driver knows."""
    versions = {"python": platform.python_version()}
    for package in packages:
        versions[package] = _version(package)
    versions[CODE] = _digest_of_sources()
    return {"host": socket.gethostname(), "versions": versions, "gpus": _num_gpus()}


def tell_time() -> dict[str, Any]:
    """Seconds since the epoch by this host's clock."""
    return {"time": time.time()}


def listen(name: str, port: int) -> dict[str, Any]:
    """Opens two ports, for connections that nobody answers, at the address that ``name`` stands for here.

    Args:
        name: This host, as others call it.
        port: Of the store; the other one is any free port, as gloo and NCCL take them.
    """
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    family, _, _, _, place = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    address = str(place[0])
    loopback = address.startswith("127.") or address == "::1"
    ports: list[int] = []
    for wanted in (port, 0):
        listener = socket.socket(family, socket.SOCK_STREAM)
        _at_the_end.append(listener.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, wanted))
        listener.listen(1024)
        ports.append(listener.getsockname()[1])
    return {"address": address, "loopback": loopback, "ports": ports}


def connect(name: str, ports: list[int], timeout_s: float) -> dict[str, Any]:
    """Why a connection to each port cannot be made; null where it can."""
    errors: list[str | None] = []
    for port in ports:
        try:
            socket.create_connection((name, port), timeout=timeout_s).close()
            errors.append(None)
        except OSError as error:
            errors.append(error.strerror or str(error))
    return {"errors": errors}


def write(folder: str, name: str, text: str) -> dict[str, Any]:
    """Writes a file, which is removed at the end, into the folder or the nearest one above it that is there."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    path = os.path.join(folder, name)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    _at_the_end.append(lambda: os.unlink(path))
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return {"path": path}


def read(path: str) -> dict[str, Any]:
    """What the file holds; null where there is none."""
    try:
        with open(path) as file:
            return {"text": file.read(1000)}
    except FileNotFoundError:
        return {"text": None}


REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {
    "describe": describe,
    "tell_time": tell_time,
    "listen": listen,
    "connect": connect,
    "write": write,
    "read": read,
}


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answers every line of ``requests`` by a line of ``answers``; what the system refuses is an answer, too."""
    try:
        for line in requests:
            request = json.loads(line)
            try:
                answer = REQUESTS[request.pop("do")](**request)
            except OSError as error:
                answer = {"error": error.strerror or str(error)}
            answers.write(MARK + json.dumps(answer) + "\n")
            answers.flush()
    finally:
        for undo in _at_the_end:
            with contextlib.suppress(OSError):
                undo()


def _version(package: str) -> str:
    try:
        from importlib import metadata

        return metadata.version(package)
    except ImportError:  # of a package that is not installed, and of this module in a Python before 3.8
        return ABSENT


def _digest_of_sources() -> str:
    spec = importlib.util.find_spec("distmoe")
    if spec is None or not spec.submodule_search_locations:
        return ABSENT
    root, digest = pathlib.Path(spec.submodule_search_locations[0]), hashlib.sha256()
    # As distmoe.parallel.handshake does, which this program cannot import: it runs without distmoe, too.
    for path in sorted(path for path in root.rglob("*.py") if path.stem.isidentifier()):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _num_gpus() -> int:
    try:
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        return 0


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, lambda number, frame: sys.exit(1))
    signal.alarm(LIFE_S)
    serve(sys.stdin, sys.stdout)
