"""An ssh server on each imitated host, and clients that may log in to all of them as root without being asked.

Keys and settings are made anew and are seen inside the hosts only: they hide the machine's own, which stay as they are.
"""

import os
import shutil
import subprocess
from pathlib import Path

from tests.launch import hosts as imitated
from tests.launch.hosts import Host, Hosts
from tests.launch.processes import EXECUTABLES

PDSH = {"PDSH_RCMD_TYPE": "ssh"}  # environment in which pdsh uses ssh; without it Debian's uses rsh

CLIENT = """Host *
  IdentityFile {folder}/id
  IdentitiesOnly yes
  UserKnownHostsFile /dev/null
  GlobalKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  LogLevel ERROR
"""
SERVER = """ListenAddress {host.address}
HostKey {folder}/{host.name}
PidFile none
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
"""
# The client looks into ~/.ssh first. Where there is one, an empty folder hides it.
PREPARE = 'mkdir -p /run/sshd; mount --bind "$1" /etc/ssh/ssh_config; [ ! -d "$2" ] || mount -t tmpfs tmpfs "$2"'


def why_not() -> str | None:
    """The reason why hosts with ssh cannot be imitated here, or None if they can."""
    return imitated.why_not("ssh", "sshd", "ssh-keygen")


def serve_ssh(hosts: Hosts) -> None:
    """Starts the servers, now and at every boot of a host.

    As on real hosts, what logs in does not have this process's environment but that of root's shell.
    """
    folder = hosts.folder / "ssh"
    folder.mkdir()
    _make_key(folder / "id")
    keys = {host: _make_key(folder / host.name) for host in hosts}
    (folder / "known_hosts").write_text("".join(f"{host.name},{host.address} {key}\n" for host, key in keys.items()))
    (folder / "config").write_text(CLIENT.format(folder=folder))
    server = shutil.which("sshd", path=EXECUTABLES)
    assert server is not None

    def start(host: Host) -> None:
        settings = folder / f"{host.name}.conf"
        settings.write_text(SERVER.format(folder=folder, host=host))
        private = os.path.expanduser("~root/.ssh")
        host.run(["sh", "-euc", PREPARE, "prepare", folder / "config", private])
        # sshd needs absolute paths, also its own: it starts itself anew for every connection.
        log = folder / f"{host.name}.log"
        host.popen([server, "-D", "-e", "-f", settings], log=log).wait_for("Server listening on")

    hosts.at_boot(start)


def _make_key(path: Path) -> str:
    """Makes a key pair in ``path`` and ``path``.pub and returns the public key."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", path], check=True)
    kind, key, _ = path.with_suffix(".pub").read_text().split()
    return f"{kind} {key}"
