"""How far the clocks of hosts are apart, how well that is known, and from when on it matters.

One host asks another for its time. The answer was given at some moment between asking and hearing it: taken to be the
middle, it is wrong by at most half of what passed in between. Of several answers the quickest is the best one.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from distmoe.doctor.findings import Finding, fail, ok, warn
from distmoe.parallel.control import Control

# The first cause of a failure is found by the times of log lines, and TensorBoard and ninja go by those of files on
# shared storage: half a second does no harm there, several seconds do. NTP holds milliseconds.
WARN_S = 1.0
# Nothing keeps such a clock. Munge, and Slurm with it, rejects messages that are 5 minutes off, and so does Kerberos;
# certificates come next. A minute leaves time before that.
FAIL_S = 60.0

_ROUNDS = 5
_SYNCHRONIZE = "systemctl restart chronyd (or systemd-timesyncd, ntpd), then chronyc tracking or timedatectl"


@dataclass(frozen=True)
class Skew:
    """Of another clock against this one.

    Attributes:
        seconds: It is ahead by; negative: it is behind.
        accuracy_s: Largest error of that.
    """

    seconds: float
    accuracy_s: float

    @staticmethod
    def of_answer(asked: float, answer: float, heard: float) -> "Skew":
        """From one answer; all times in seconds since the epoch, ``answer`` by the other clock."""
        return Skew(answer - (asked + heard) / 2, (heard - asked) / 2)

    def __str__(self) -> str:
        unit, scale = ("s", 1.0) if abs(self.seconds) >= 1 else ("ms", 1e3)
        return f"{self.seconds * scale:+.1f} {unit} (+-{self.accuracy_s * 1e3:.1f} ms)"


def measure_skew(ask: Callable[[], float]) -> Skew:
    """The other clock against this one, from the quickest of several answers.

    Args:
        ask: Gives the time by the other clock.
    """
    skews = []
    for _ in range(_ROUNDS):
        asked = time.time()
        answer = ask()
        skews.append(Skew.of_answer(asked, answer, time.time()))
    return best(skews)


def measure_ranks(control: Control) -> list[Skew]:
    """The clocks of all ranks against this one, by rank. Collective.

    Nobody leaves the meeting before all have come, so every rank looks at its clock after this one came, and before
    this one has heard from all: exactly what :class:`Skew` needs, whatever the exchanges take.
    """
    rounds: list[list[Skew]] = []
    control.wait()  # the first meeting also waits for the slowest to arrive
    for _ in range(_ROUNDS):
        came = time.time()
        control.wait()
        answers = control.gather(time.time())
        heard = time.time()
        rounds.append([Skew.of_answer(came, answer, heard) for answer in answers])
    return [best(skews) for skews in zip(*rounds, strict=True)]


def best(skews: Iterable[Skew]) -> Skew:
    """The one that is known best."""
    return min(skews, key=lambda skew: skew.accuracy_s)


def judge_skew(subject: str, clock: str, skew: Skew) -> Finding:
    """Whether it matters; what may be an error of the measurement does not.

    Args:
        subject: Of the finding.
        clock: Whose it is, and against whose: ``clock of host2 against host1``.
        skew: Of the one against the other.
    """
    least = abs(skew.seconds) - skew.accuracy_s
    if least > FAIL_S:
        return fail(subject, f"{clock}: {skew}; Slurm and Kerberos reject messages 5 minutes off", _SYNCHRONIZE)
    if least > WARN_S:
        return warn(subject, f"{clock}: {skew}; log lines and times of files get out of order", _SYNCHRONIZE)
    return ok(subject, f"{clock}: {skew}")


def judge_hosts(hosts: Sequence[str], skews: Sequence[Skew], ranks_per_host: int) -> list[Finding]:
    """One finding for each host that is not the first one's.

    Args:
        hosts: Name of each rank's host.
        skews: Of each rank's clock against rank 0's.
        ranks_per_host: Ranks on each host.
    """
    return [
        judge_skew("clock", f"{hosts[rank]} against {hosts[0]}", skews[rank])
        for rank in range(ranks_per_host, len(hosts), ranks_per_host)
    ]
