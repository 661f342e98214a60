"""``distmoe doctor --hostfile`` over real ssh: what is wrong between hosts is found, and who is concerned is named."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.launch import ssh
from tests.launch.hosts import Hosts

pytestmark = [pytest.mark.launch, pytest.mark.skipif(ssh.why_not() is not None, reason=str(ssh.why_not()))]

TIMEOUT_S = 120.0


@pytest.fixture
def three_hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(3, tmp_path) as hosts:
        ssh.serve_ssh(hosts)
        yield hosts


def findings(hosts: Hosts, runs: Path) -> tuple[int, dict[str, str]]:
    """Exit code, and the level of every finding about the hosts, by its text."""
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=2\n" for host in hosts))
    command = [sys.executable, "-m", "distmoe", "doctor", REPOSITORY / "configs" / "smoke.yaml", f"run.dir={runs}"]
    done = hosts[0].run([*command, "--hostfile", hostfile], timeout=TIMEOUT_S, check=False)
    lines = done.stdout.partition(f"hosts of {hostfile}: 3 hosts, 2 slots each\n")[2].partition("\n\n")[0].splitlines()
    assert lines, done.stdout + done.stderr
    found = [line.split(maxsplit=1) for line in lines if line.split()[0] in ("ok", "warn", "fail")]
    return done.returncode, {text: level for level, text in found}


def test_hosts_that_are_well_and_hosts_that_are_not(three_hosts: Hosts, tmp_path: Path):
    runs = tmp_path / "runs"
    runs.mkdir()
    code, found = findings(three_hosts, runs)
    assert code == 0
    assert set(found.values()) == {"ok"}, found

    three_hosts[1].link.down()
    three_hosts[2].mount_tmpfs(runs, "5m")  # a disk of its own where the others share one
    code, found = findings(three_hosts, runs)
    assert code == 2
    failed = [text for text, level in found.items() if level == "fail"]
    assert len(failed) == 2, found
    assert any("host2" in text for text in failed), failed
    assert any("host3" in text and "run.dir" in text for text in failed), failed
