"""The hosts of a hostfile, asked all at once: whether launchers reach them, and whether they fit together."""

import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmoe.contracts import UserError
from distmoe.doctor import probe
from distmoe.doctor.clocks import Skew, judge_skew, measure_skew
from distmoe.doctor.findings import Finding, fail, ok, plural
from distmoe.doctor.hostfile import Hostfile
from distmoe.doctor.ssh import CONNECT_S, Conversation, SilentHostError
from distmoe.parallel.network import resolve

_PACKAGES = ["torch", "deepspeed", "distmoe"]
_AT_ONCE = 64  # hosts talked to at the same time


@dataclass(frozen=True)
class _Host:
    """One that answers.

    Attributes:
        name: As in the hostfile.
        address: That it stands for here.
        conversation: With it.
        description: See :func:`distmoe.doctor.probe.describe`.
        skew: Of its clock against this host's.
    """

    name: str
    address: str
    conversation: Conversation
    description: dict[str, Any]
    skew: Skew


def examine_hosts(hostfile: Hostfile, port: int, ssh_port: int | None, run_dir: Path | None) -> list[Finding]:
    """Names, ssh, interpreter, versions, clocks, GPUs, connections to the first host, and shared storage.

    Args:
        hostfile: The hosts.
        port: Of the store on the first of them.
        ssh_port: Of ssh on all of them; None: the one of ssh's own configuration.
        run_dir: Folder of all runs, where the run is known.
    """
    if shutil.which("ssh") is None:
        return [fail("ssh", "is not installed here", "apt-get install -y openssh-client")]
    with _met(hostfile.names, ssh_port) as (pool, met):
        hosts = [one for one in met if isinstance(one, _Host)]
        own = probe.describe(_PACKAGES)["versions"]
        findings = [found for one in met for found in ([one] if isinstance(one, Finding) else _examine(one, own))]
        findings += _examine_gpus(hosts, hostfile.slots)
        if not isinstance(met[0], _Host):
            what = "connections" if run_dir is None else "connections and storage"
            return [*findings, fail(what, f"not looked at: {hostfile.names[0]} does not answer", "mend what is above")]
        findings += _examine_connections(pool, hosts, len(hostfile.names) > 1, port)
        if run_dir is not None and len(hosts) > 1:
            findings += _examine_storage(pool, hosts, run_dir)
    return findings


@contextmanager
def _met(names: Sequence[str], ssh_port: int | None) -> Iterator[tuple[ThreadPoolExecutor, list[_Host | Finding]]]:
    """The hosts in order, and of those that do not answer why; inside, they can be asked more."""
    conversations: list[Conversation] = []
    lock = threading.Lock()

    def meet(name: str) -> _Host | Finding:
        try:
            address = resolve(name, "host")
        except UserError:
            known = f"a line `ADDRESS {name}` in /etc/hosts of every host, or in the name server"
            return fail(name, "this name stands for no address here", known)
        try:
            conversation = Conversation(name, ssh_port)
        except OSError as error:
            return fail(
                name, f"{address}, ssh cannot be started here: {error.strerror}", "ulimit -n 4096; ulimit -u 4096"
            )
        with lock:
            conversations.append(conversation)
        try:
            description = conversation.ask("describe", packages=_PACKAGES)
            skew = measure_skew(lambda: float(conversation.ask("tell_time")["time"]))
        except SilentHostError as error:
            return fail(name, f"{address}, ssh: {error}", error.remedy)
        if "error" in description:
            unread = f"{address}, files of Python's packages cannot be read there: {description['error']}"
            return fail(name, unread, f"make them readable: on {name}, in the same folder, `bash launch/setup.sh`")
        return _Host(name, address, conversation, description, skew)

    with ThreadPoolExecutor(min(len(names), _AT_ONCE)) as pool:
        try:
            yield pool, list(pool.map(meet, names))
        finally:
            list(pool.map(Conversation.close, conversations))


def _examine(host: _Host, own: Mapping[str, str]) -> list[Finding]:
    """One line where all is well; ``own`` are the versions here."""
    theirs, findings = host.description["versions"], []
    other = [f"{name} {theirs[name]} ({version})" for name, version in own.items() if theirs[name] != version]
    if other:
        findings.append(
            fail(
                host.name,
                f"has other versions than this host (in brackets): {', '.join(other)}",
                f"bring both to one state: on {host.name}, in the same folder, `bash launch/setup.sh`",
            )
        )
    clock = judge_skew(host.name, "clock against this host's", host.skew)
    if clock.level != "ok":
        findings.append(clock)
    return findings or [ok(host.name, f"{host.address}, ssh, versions as here, clock {host.skew}")]


def _examine_gpus(hosts: Sequence[_Host], slots: int) -> Iterator[Finding]:
    """By what the drivers know, of which a container may see less; training checks what it sees."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # on CPUs, on purpose
        return
    without = [host.name for host in hosts if host.description["gpus"] == 0]
    for host in hosts:
        gpus = host.description["gpus"]
        if 0 < gpus < slots:
            remedy = f"slots={gpus} in the hostfile, for all hosts; or CUDA_VISIBLE_DEVICES= to train on CPUs"
            yield fail(host.name, f"{plural(gpus, 'GPU')} for {slots} processes", remedy)
    if 0 < len(without) < len(hosts):
        remedy = "install its driver, leave it out of the hostfile, or set CUDA_VISIBLE_DEVICES= to train on CPUs"
        yield fail("GPUs", f"none on {', '.join(without)}, but some on the others", remedy)


def _examine_connections(
    pool: ThreadPoolExecutor, hosts: Sequence[_Host], several: bool, port: int
) -> Iterator[Finding]:
    """The first host listens as its store would, the others connect."""
    first, others = hosts[0], hosts[1:]
    listening = _ask(first, "listen", name=first.name, port=port)
    judged = _judge_listening(first, listening, several, port)
    if judged is not None:
        yield judged
        return
    if not others:
        yield ok(f"port {port}", f"free on {first.name}")
        return
    ports = listening["ports"]
    asked = [pool.submit(_ask, host, "connect", name=first.name, ports=ports, timeout_s=CONNECT_S) for host in others]
    judged_others = [
        _judge_connection(host, first, ports, answer.result()) for host, answer in zip(others, asked, strict=True)
    ]
    faults = [finding for finding in judged_others if finding is not None]
    yield from faults
    if not faults:
        reach = f"{plural(len(others), 'other host')} reach" + ("es" if len(others) == 1 else "")
        yield ok("connections", f"{reach} {first.name} at port {port} and at any other")


def _judge_listening(first: _Host, listening: Mapping[str, Any], several: bool, port: int) -> Finding | None:
    """What keeps others from being asked to connect."""
    subject = f"port {port}"
    mend = f"in {first.name}'s /etc/hosts, give `{first.name}` its address in the network"
    if "error" in listening:
        remedy = "--port PORT with a free one, also for the launcher" if "in use" in listening["error"] else mend
        return fail(subject, f"{first.name} cannot serve the store there: {listening['error']}", remedy)
    if not listening["loopback"] or not several:
        return None
    found = f"{first.name} takes its own name for {listening['address']}, which no other host reaches"
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        return ok(subject, f"{found}; GLOO_SOCKET_IFNAME={chosen} decides instead, and connections were not tried")
    return fail(subject, found, f"{mend}, or set GLOO_SOCKET_IFNAME to the interface with that address")


def _judge_connection(host: _Host, first: _Host, ports: Sequence[int], answer: dict[str, Any]) -> Finding | None:
    if "error" in answer:
        return fail(host.name, f"connection to {first.name}: {answer['error']}", f"`ssh -v {host.name} true`")
    reasons = answer["errors"]
    if not any(reasons):
        return None
    failed = [f"port {port}: {reason}" for port, reason in zip(ports, reasons, strict=True) if reason]
    if reasons[0] is None:
        remedy = "let all ports from 1024 on through between the hosts: gloo and NCCL take any that is free"
    elif "not known" in reasons[0] or "resolution" in reasons[0]:
        remedy = f"a line `{first.address} {first.name}` in /etc/hosts of {host.name}"
    else:
        remedy = f"see the firewall of {first.name}, and what `getent hosts {first.name}` says on {host.name}"
    return fail(host.name, f"cannot connect to {first.name}, {'; '.join(failed)}", remedy)


def _examine_storage(pool: ThreadPoolExecutor, hosts: Sequence[_Host], run_dir: Path) -> Iterator[Finding]:
    """The first host writes a file; the others look for it."""
    first, others, folder = hosts[0], hosts[1:], run_dir.absolute()
    token = secrets.token_hex(8)
    written = _ask(first, "write", folder=str(folder), name=f".distmoe-doctor-{token}", text=token)
    if "error" in written:
        yield fail(
            "run.dir",
            f"{first.name} cannot write {folder}: {written['error']}",
            "make it writable there, and leave space on it; or set run.dir to another folder",
        )
        return
    asked = [pool.submit(_ask, host, "read", path=written["path"]) for host in others]
    apart = [host.name for host, answer in zip(others, asked, strict=True) if answer.result().get("text") != token]
    for name in apart:
        yield fail(
            name,
            f"does not see what {first.name} writes to run.dir ({folder}): checkpoints need storage that all share",
            f"mount the same storage at {folder} on all hosts, or set run.dir to a folder that they share",
        )
    if not apart:
        yield ok("run.dir", f"{folder}: the same storage on {len(hosts)} hosts")


def _ask(host: _Host, do: str, **arguments: Any) -> dict[str, Any]:
    """The answer, or what takes its place where the host has fallen silent."""
    try:
        return host.conversation.ask(do, **arguments)
    except SilentHostError as error:
        return {"error": str(error)}
