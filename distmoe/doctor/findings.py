"""What has been looked at and found, each with its level and remedy, and how a page of it is printed."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from distmoe.contracts import UserError

Level = Literal["ok", "warn", "fail"]

PAGE_WIDTH = 120  # columns
_SUBJECT_WIDTH = 16  # columns at least, so that the sections of a page are aligned
_LEVEL_WIDTH = 6


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        level: ``ok``; ``warn``: works, but not well or not in every case; ``fail``: a run cannot work so.
        subject: What was looked at.
        found: What is there.
        remedy: What to do about it, a command where possible; empty where ``found`` says so itself.
    """

    level: Level
    subject: str
    found: str
    remedy: str = ""


def ok(subject: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding("ok", subject, found)


def warn(subject: str, found: str, remedy: str) -> Finding:
    """Works, but not well or not in every case."""
    return Finding("warn", subject, found, remedy)


def fail(subject: str, found: str, remedy: str) -> Finding:
    """A run cannot work so."""
    return Finding("fail", subject, found, remedy)


def refused(subject: str, error: UserError) -> Finding:
    """A run would be refused with this message, which names its remedy."""
    return Finding("fail", subject, str(error))


@dataclass(frozen=True)
class Section:
    """Findings that belong together.

    Attributes:
        title: Their heading.
        findings: In order.
        lines: Text below them, at most as wide as the page.
    """

    title: str
    findings: Sequence[Finding]
    lines: Sequence[str] = field(default=())

    @property
    def text(self) -> str:
        """For printing: each finding begins a line with its level; what is too long goes on below, indented."""
        width = max([_SUBJECT_WIDTH, *(len(finding.subject) for finding in self.findings)])
        printed = [self.title]
        for finding in self.findings:
            printed += _wrapped(f"{finding.level:<{_LEVEL_WIDTH}}{finding.subject:<{width}}  ", finding.found)
            if finding.remedy:
                printed += _wrapped(" " * (_LEVEL_WIDTH + width + 2) + "-> ", finding.remedy)
        return "\n".join([*printed, *self.lines]) + "\n"


def summary(findings: Iterable[Finding]) -> str:
    """How many of each level there are, as the last line of a page."""
    levels = [finding.level for finding in findings]
    return f"{levels.count('ok')} ok, {levels.count('warn')} warn, {levels.count('fail')} fail"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, with the cells of a column below one another."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def size(num_bytes: float) -> str:
    """Bytes in a unit that people read: ``512 MiB``, ``31.3 GiB``."""
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.0f} KiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"


def plural(number: int, what: str) -> str:
    """``1 host``, ``2 hosts``; of nouns that take an s."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _wrapped(head: str, text: str) -> list[str]:
    """Lines of at most the page's width; words, paths and options in a command stay whole."""
    return textwrap.wrap(
        text,
        PAGE_WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
