"""Files of hosts: what is read from them, and what is refused."""

from pathlib import Path

import pytest

from distmoe.contracts import UserError
from distmoe.doctor.hostfile import Hostfile, read_hostfile
from tests.conftest import REPOSITORY


def read(tmp_path: Path, text: str | bytes) -> Hostfile:
    path = tmp_path / "hostfile"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_hostfile(path)


def test_hosts_in_order_without_comments(tmp_path: Path):
    text = "# ours\n\nnode-2.example  slots=4  # the first\r\n\t10.0.0.7 slots=4\n n1_x slots=4"
    found = read(tmp_path, text)
    assert found == Hostfile(("node-2.example", "10.0.0.7", "n1_x"), 4)
    assert found.world_size == 12


def test_example_of_the_launchers():
    assert read_hostfile(REPOSITORY / "launch" / "hostfile.example") == Hostfile(("node1", "node2"), 8)


GRAMMAR = (
    "must be HOST slots=N, the name of letters, digits, '.', '_' and '-', N from 1 to 9999; what else ssh needs to "
    "know of a host belongs into ~/.ssh/config"
)
REFUSED = {
    "option of ssh": ("-oProxyCommand=id slots=1", f", line 1 ('-oProxyCommand=id slots=1'): {GRAMMAR}"),
    "user": ("a slots=1\nroot@b slots=1", f", line 2 ('root@b slots=1'): {GRAMMAR}"),
    "shell": ("a;reboot slots=1", f", line 1 ('a;reboot slots=1'): {GRAMMAR}"),
    "substitution": ("$(id) slots=1", f", line 1 ('$(id) slots=1'): {GRAMMAR}"),
    "quote": ("a' slots=1", f""", line 1 ("a' slots=1"): {GRAMMAR}"""),
    "IPv6 address": ("fe80::1 slots=1", f", line 1 ('fe80::1 slots=1'): {GRAMMAR}"),
    "letters that only look like them": ("nоde slots=1", f", line 1 ('nоde slots=1'): {GRAMMAR}"),  # noqa: RUF001
    "digits of another script": ("node slots=٣", f", line 1 ('node slots=٣'): {GRAMMAR}"),
    "no slots": ("node1", f", line 1 ('node1'): {GRAMMAR}"),
    "slots of none": ("node1 slots=0", f", line 1 ('node1 slots=0'): {GRAMMAR}"),
    "slots beyond": ("node1 slots=10000", f", line 1 ('node1 slots=10000'): {GRAMMAR}"),
    "more on the line": ("node1 slots=2 max=4", f", line 1 ('node1 slots=2 max=4'): {GRAMMAR}"),
    "another kind of line end": ("a slots=1\x0bb slots=1", f", line 1 ('a slots=1\\x0bb slots=1'): {GRAMMAR}"),
    "twice": ("a slots=1\nb slots=1\na slots=1", ", line 3: host a is there twice; give each host one line"),
    "different numbers": (
        "a slots=2\n#\nb slots=4",
        ", line 3: slots=4, but 2 above; every host must have as many processes",
    ),
    "nothing": ("# none\n\n", ": names no host; give a line HOST slots=N for each"),
    "not text": (b"\xff\xfe slots=1", ": cannot be read (it is not text); give a file of lines HOST slots=N"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path):
    text, message = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        read(tmp_path, text)
    assert str(refusal.value) == f"--hostfile {tmp_path / 'hostfile'}{message}"


def test_absent(tmp_path: Path):
    with pytest.raises(UserError) as refusal:
        read_hostfile(tmp_path / "absent")
    assert str(refusal.value) == (
        f"--hostfile {tmp_path / 'absent'}: cannot be read (No such file or directory); "
        "give a file of lines HOST slots=N"
    )
