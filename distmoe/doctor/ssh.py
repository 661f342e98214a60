"""A conversation with another host over ssh, with a time limit on every answer.

The command that the other host's shell gets is the path of the interpreter and one fixed line; everything else goes
through the connection as data: the probe's text, then requests as JSON. Nothing of this environment is sent.
"""

import contextlib
import json
import os
import select
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distmoe.doctor import probe

CONNECT_S = 5  # seconds for a connection, by ssh's own count
_FIRST_ANSWER_S = 20.0  # with name look-ups, log-in, and Python's start from shared storage
_ANSWER_S = 15.0
_CLOSE_S = 2.0

_PROBE = Path(probe.__file__).read_text(encoding="ascii")
# Without the working folder, whose files would go before Python's own modules of the same name.
_START = f"import sys;sys.path[:]=filter(None,sys.path);exec(sys.stdin.read({len(_PROBE)}))"
_OPTIONS = {
    "BatchMode": "yes",  # no questions: there is nobody to answer
    "ConnectTimeout": str(CONNECT_S),
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "RequestTTY": "no",
    "EscapeChar": "none",
}
_SHELL_CANNOT_RUN = (126, 127)


class SilentHostError(Exception):
    """The host did not answer, or ended; the message says why, as ssh put it.

    Attributes:
        remedy: What to do about it.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class Conversation:
    """One, with one host; a context manager that ends it.

    Args:
        host: A name that :mod:`distmoe.doctor.hostfile` lets through.
        port: Of ssh; None: the one of ssh's own configuration.

    Raises:
        OSError: There is no ssh here, or no room for one more process or file.
    """

    def __init__(self, host: str, port: int | None = None) -> None:
        self.host = host
        options = [word for key, value in _OPTIONS.items() for word in ("-o", f"{key}={value}")]
        options += ["-p", str(port)] if port is not None else []
        remote = shlex.join([sys.executable, "-c", _START])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the conversation
        try:
            self._ssh = subprocess.Popen(
                ["ssh", *options, "--", host, remote],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
            )
        except OSError:
            self._errors.close()
            raise
        self._unread = b""
        self._started = False
        self._send(_PROBE)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request of :data:`distmoe.doctor.probe.REQUESTS`.

        Raises:
            SilentHostError: There is none.
        """
        self._send(json.dumps({"do": do, **arguments}) + "\n")
        limit_s = _ANSWER_S if self._started else _FIRST_ANSWER_S
        give_up = time.monotonic() + limit_s
        while True:
            line = self._line(give_up)
            if line is None:
                raise self._failure(limit_s)
            if line.startswith(probe.MARK):
                self._started = True
                answer: dict[str, Any] = json.loads(line.removeprefix(probe.MARK))
                return answer

    def close(self) -> None:
        """Ends the probe, which then removes what it has left, and ssh."""
        if self._ssh.stdin is not None and not self._ssh.stdin.closed:
            with contextlib.suppress(OSError):
                self._ssh.stdin.close()
        try:
            self._ssh.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()
        assert self._ssh.stdout is not None
        self._ssh.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, text: str) -> None:
        assert self._ssh.stdin is not None
        try:
            self._ssh.stdin.write(text.encode("ascii"))
            self._ssh.stdin.flush()
        except BrokenPipeError:  # ssh has ended: the answer that does not come says why
            pass

    def _line(self, give_up: float) -> str | None:
        """The next line of output; None: it has ended, or the time is up."""
        assert self._ssh.stdout is not None
        waiting = select.poll()
        waiting.register(self._ssh.stdout, select.POLLIN)
        while b"\n" not in self._unread:
            ready = waiting.poll(1e3 * max(give_up - time.monotonic(), 0.0))
            read = os.read(self._ssh.stdout.fileno(), 65536) if ready else b""
            if not read:
                return None
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode("utf-8", "replace")

    def _failure(self, limit_s: float) -> SilentHostError:
        """Why there is no answer, from ssh's exit code and what it has said."""
        try:
            code = self._ssh.wait(0.5)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            return SilentHostError(
                f"no answer within {limit_s:g} s", f"see how long `ssh {self.host} true` takes, and what the host does"
            )
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace").strip()
        reason = said.splitlines()[-1].removeprefix("ssh: ") if said else f"ssh ended with exit code {code}"
        if code in _SHELL_CANNOT_RUN and not self._started:
            return SilentHostError(
                f"{sys.executable} cannot be run there ({reason})",
                f"set it up at the same path: on {self.host}, in the same folder, `bash launch/setup.sh`",
            )
        return SilentHostError(reason, _remedy(said, self.host))


def _remedy(said: str, host: str) -> str:
    """For what ssh has said."""
    remedies = {
        "REMOTE HOST IDENTIFICATION": f"the host has another key than before: if that is right, `ssh-keygen -R {host}`",
        "Host key verification failed": f"`ssh {host}` once by hand, to accept its key",
        "Permission denied": f"`ssh-copy-id {host}`, until `ssh -o BatchMode=yes {host} true` works",
        "Connection refused": f"start the ssh server on {host} (systemctl start ssh), or give its port: --ssh-port",
        "timed out": f"see whether {host} is up, and whether a firewall lets port 22 through",
        "No route to host": f"see whether {host} is up, and its address in /etc/hosts",
        "resolve": f"a line `ADDRESS {host}` in /etc/hosts",
    }
    return next((remedy for sign, remedy in remedies.items() if sign in said), f"`ssh -v {host} true` says more")
