"""The file that names the hosts of a run: lines ``HOST slots=N``, as deepspeed reads it, comments after ``#``."""

import re
from dataclasses import dataclass
from pathlib import Path

from distmoe.contracts import UserError

# Names go into commands: what could be an option, a user, or anything to a shell is not a name.
_LINE = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)[ \t]+slots=(?P<slots>[1-9][0-9]{0,3})")


@dataclass(frozen=True)
class Hostfile:
    """The hosts of a run.

    Attributes:
        names: In order; the first one has rank 0.
        slots: Processes on each.
    """

    names: tuple[str, ...]
    slots: int

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return len(self.names) * self.slots


def read_hostfile(path: Path) -> Hostfile:
    """Reads a file of hosts.

    Raises:
        UserError: It cannot be read, or a line is not as described; the message names the line and what it holds.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"--hostfile {path}: cannot be read ({reason}); give a file of lines HOST slots=N") from None
    names: list[str] = []
    slots = 0
    for number, line in enumerate(text.split("\n"), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        place = f"--hostfile {path}, line {number}"
        match = _LINE.fullmatch(content)
        if match is None:
            raise UserError(
                f"{place} ({content!r}): must be HOST slots=N, the name of letters, digits, '.', '_' and '-', N from 1 "
                "to 9999; what else ssh needs to know of a host belongs into ~/.ssh/config"
            )
        if match["name"] in names:
            raise UserError(f"{place}: host {match['name']} is there twice; give each host one line")
        if slots and int(match["slots"]) != slots:
            raise UserError(
                f"{place}: slots={match['slots']}, but {slots} above; every host must have as many processes"
            )
        names.append(match["name"])
        slots = int(match["slots"])
    if not names:
        raise UserError(f"--hostfile {path}: names no host; give a line HOST slots=N for each")
    return Hostfile(tuple(names), slots)
