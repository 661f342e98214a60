"""Reads a Dockerfile and a .dockerignore: the subset of their languages that this repository's files are written in.

What is not in the subset is an error: what is not understood could be neither carried out nor checked.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate


@dataclass(frozen=True)
class Instruction:
    """One instruction: its first line, its name, ``--flags`` and the rest."""

    line: int
    name: str
    flags: tuple[tuple[str, str], ...]
    value: str

    def words(self) -> list[str]:
        """The rest as words, quotes taken off."""
        return shlex.split(self.value)

    def command(self) -> list[str]:
        """The rest of RUN, CMD or ENTRYPOINT: a JSON list as it is, anything else for the shell."""
        if not self.value.startswith("["):
            return ["/bin/sh", "-c", self.value]
        return [str(word) for word in json.loads(self.value)]


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile, comments dropped and continued lines joined."""
    instructions, joined, first = [], "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (joined and not line.strip()):
            continue
        first = first if joined else number
        joined += line.strip() if not joined else line
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        if joined:
            instructions.append(_instruction(first, joined))
        joined = ""
    if joined:
        raise ValueError(f"line {first}: the last line is continued")
    return instructions


def _instruction(line: int, text: str) -> Instruction:
    name, _, rest = text.partition(" ")
    rest = rest.strip()
    flags = []
    while found := re.match(r"--([a-z]+)=(\S+)\s+", rest):
        flags.append((found[1], found[2]))
        rest = rest[found.end() :]
    if rest.startswith("--") or re.search(r"<<-?\w", rest):
        raise ValueError(f"line {line}: flags without a value and here-documents are not supported: {rest}")
    return Instruction(line, name.upper(), tuple(flags), rest)


def expand(text: str, variables: Mapping[str, str]) -> str:
    """``$NAME`` and ``${NAME}`` replaced; an unknown name is empty, as in a Dockerfile."""
    if re.search(r"\$\{\w+[^\w}]", text):
        raise ValueError(f"substitution with a modifier is not supported: {text}")
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: variables.get(found[1] or found[2], ""), text)


class Ignored:
    """The patterns of a .dockerignore: the last one that matches a path, or a folder above it, decides."""

    def __init__(self, text: str):
        lines = [line.strip() for line in text.splitlines()]
        self.patterns = [
            (re.compile(self._regex(line.removeprefix("!").strip("/"))), line.startswith("!"))
            for line in lines
            if line and not line.startswith("#")
        ]

    @staticmethod
    def _regex(pattern: str) -> str:
        parts = [
            "(?:.*/)?" if part == "**" else translate(part)[:-2].replace(".*", "[^/]*") for part in pattern.split("/")
        ]
        joined = "".join(part if part.startswith("(?:.*/") else part + "/" for part in parts)
        return joined.removesuffix("/") + r"(?:/.*)?\Z"

    def __call__(self, path: str) -> bool:
        """Whether the file ``path``, relative to the context, stays outside."""
        ignored = False
        for pattern, included in self.patterns:
            if pattern.match(path):
                ignored = not included
        return ignored
