"""Carries out a Dockerfile in a chroot, where no container engine runs, and runs commands in what comes of it.

    python3 -m tests.launch.dockerfile_steps build ROOT CONTEXT --base NAME --report FILE
                                             [--build-arg NAME=VALUE]... [--secret ID=FILE]...
    python3 -m tests.launch.dockerfile_steps run [--user UID:GID] [--entrypoint PROGRAM] ROOT [ARGUMENT]...

``build`` takes ROOT for the image NAME that FROM asks for, carries out the instructions in it as ``docker build`` does
and leaves the image's settings in ROOT.json; ``run`` starts a command in it as ``docker run`` does. Both need root's
rights and belong into a mount namespace of their own, with /proc, /dev and /sys mounted in ROOT.

An instruction, flag or form that is not known here is an error: what is not understood would not be proven.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.launch.dockerfile import Ignored, Instruction, expand, parse

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # what docker starts with
ALWAYS_ARGUMENTS = {name for proxy in ("http_proxy", "https_proxy", "no_proxy") for name in (proxy, proxy.upper())}


@dataclass
class Image:
    """The settings that an image hands to its containers."""

    env: dict[str, str] = field(default_factory=lambda: {"PATH": SYSTEM_PATH})
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)


@contextmanager
def _bound(source: Path, target: Path) -> Iterator[None]:
    """Binds a folder or file of the host to a place in the root while an instruction runs."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.touch()
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", target], check=True)


def run_in(root: Path, image: Image, command: Sequence[str], extra: Mapping[str, str]) -> int:
    """Runs a command in ``root`` with the image's user, folder and environment only; returns its exit code."""
    home = {"HOME": "/root"} if image.user.split(":")[0] == "0" else {}
    env = [f"{name}={value}" for name, value in {**extra, **home, **image.env}.items()]
    user = ":".join(f"+{number}" for number in image.user.split(":"))  # + says: a number, never a name
    prefix = ["chroot", f"--userspec={user}", "--groups=", str(root), "/usr/bin/env", "-i", f"--chdir={image.workdir}"]
    return subprocess.run([*prefix, *env, *command], stdin=subprocess.DEVNULL, check=False).returncode


class Builder:
    """Carries out instructions in a root, one method an instruction."""

    def __init__(self, root: Path, context: Path, base: str, arguments: dict[str, str], secrets: dict[str, Path]):
        self.root, self.context, self.base, self.given, self.secrets = root, context, base, arguments, secrets
        self.image = Image()
        self.before_from: dict[str, str] | None = {}  # arguments ahead of FROM serve FROM alone
        self.arguments = {name: value for name, value in arguments.items() if name in ALWAYS_ARGUMENTS}
        ignore = context / ".dockerignore"
        self.ignored = Ignored(ignore.read_text() if ignore.exists() else "")
        self.caches = Path(tempfile.mkdtemp(prefix="caches-", dir=root.parent))

    def carry_out(self, instruction: Instruction) -> None:
        """Carries out one instruction: ``ValueError`` for what is not supported, ``RuntimeError`` if RUN fails."""
        method = getattr(self, f"do_{instruction.name.lower()}", None)
        flags = {"COPY": {"chown"}, "RUN": {"mount"}}.get(instruction.name, set())
        unknown = [name for name, _ in instruction.flags if name not in flags]
        if method is None or unknown:
            raise ValueError(f"line {instruction.line}: {instruction.name} {' '.join(unknown)} is not supported")
        if self.before_from is not None and instruction.name not in {"ARG", "FROM"}:
            raise ValueError(f"line {instruction.line}: {instruction.name} before FROM")
        method(instruction)

    def expanded(self, text: str) -> str:
        return expand(text, {**self.arguments, **self.image.env})

    def pairs(self, instruction: Instruction) -> dict[str, str]:
        pairs = [self.expanded(word).partition("=") for word in instruction.words()]
        if not all(sign for _, sign, _ in pairs):
            raise ValueError(f"line {instruction.line}: only NAME=VALUE is supported")
        return {name: value for name, _, value in pairs}

    def do_arg(self, instruction: Instruction) -> None:
        name, has_default, default = instruction.value.partition("=")
        scope = self.arguments if self.before_from is None else self.before_from
        if name in self.given or has_default:
            scope[name] = self.given.get(name, self.expanded(default))

    def do_from(self, instruction: Instruction) -> None:
        if self.before_from is None:
            raise ValueError(f"line {instruction.line}: several stages are not supported")
        if (asked := expand(instruction.value, self.before_from)) != self.base:
            raise ValueError(f"line {instruction.line}: FROM asks for {asked}, but the root stands for {self.base}")
        self.before_from = None

    def do_env(self, instruction: Instruction) -> None:
        self.image.env |= self.pairs(instruction)

    def do_label(self, instruction: Instruction) -> None:
        self.image.labels |= self.pairs(instruction)

    def do_user(self, instruction: Instruction) -> None:
        self.image.user = self.expanded(instruction.value)
        if not re.fullmatch(r"\d+:\d+", self.image.user):
            raise ValueError(f"line {instruction.line}: only UID:GID is supported, not {self.image.user}")

    def do_workdir(self, instruction: Instruction) -> None:
        self.image.workdir = os.path.join(self.image.workdir, self.expanded(instruction.value))
        self.inside(self.image.workdir).mkdir(parents=True, exist_ok=True)

    def do_entrypoint(self, instruction: Instruction) -> None:
        self.image.entrypoint = instruction.command()

    def do_cmd(self, instruction: Instruction) -> None:
        self.image.cmd = instruction.command()

    def do_copy(self, instruction: Instruction) -> None:
        owner = tuple(int(number) for number in self.expanded(dict(instruction.flags).get("chown", "0:0")).split(":"))
        *sources, target = (self.expanded(word) for word in instruction.words())
        into_folder = len(sources) > 1 or target.endswith("/")
        for source in sources:
            start = self.context / source
            if re.search(r"[*?\[]", source) or not start.exists():
                raise ValueError(f"line {instruction.line}: no such file in the context: {source}")
            for path in sorted(start.rglob("*")) if start.is_dir() else [start]:
                if path.is_dir() or self.ignored(str(path.relative_to(self.context))):
                    continue
                inner = path.relative_to(start) if start.is_dir() else Path(path.name if into_folder else "")
                self.copy(path, self.inside(os.path.join(self.image.workdir, target)) / inner, owner)

    def copy(self, source: Path, target: Path, owner: tuple[int, ...]) -> None:
        """One file with its mode and times; folders that are missing get the same owner, others keep theirs."""
        missing = [folder for folder in target.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            os.chown(folder, *owner)
        shutil.copy2(source, target, follow_symlinks=False)
        os.chown(target, *owner, follow_symlinks=False)

    def inside(self, path: str) -> Path:
        """The host's path of an absolute path in the root."""
        return self.root / path.lstrip("/")

    def do_run(self, instruction: Instruction) -> None:
        with ExitStack() as mounts:
            for _, value in instruction.flags:
                self.mount(dict(item.split("=", 1) for item in value.split(",")), mounts)
            code = run_in(self.root, self.image, instruction.command(), self.arguments)
        if code:
            raise RuntimeError(f"line {instruction.line}: RUN ended with exit code {code}")

    def mount(self, options: dict[str, str], mounts: ExitStack) -> None:
        unknown = options.keys() - {"type", "id", "target", "mode"}
        if unknown or options["type"] not in {"cache", "secret"}:
            raise ValueError(f"RUN --mount with {options} is not supported")
        source = self.caches / options["id"]
        if options["type"] == "cache":
            source.mkdir(exist_ok=True)
        elif options["id"] in self.secrets:
            shutil.copyfile(self.secrets[options["id"]], source)
        else:
            return  # a secret that is not given is left out
        source.chmod(int(options["mode"], 8))
        mounts.enter_context(_bound(source, self.inside(options["target"])))


def build(
    root: Path, context: Path, base: str, arguments: dict[str, str], secrets: dict[str, Path], report: Path
) -> None:
    """Carries out CONTEXT/Dockerfile in ``root``; ``report`` gets a line for each RUN and COPY: seconds, tab, which."""
    builder = Builder(root, context, base, arguments, secrets)
    instructions = parse((context / "Dockerfile").read_text())
    for index, instruction in enumerate(instructions, 1):
        title = f"{instruction.name} {instruction.value}"
        sys.stdout.write(f"step {index}/{len(instructions)}, line {instruction.line}: {title}\n")
        sys.stdout.flush()
        started = time.monotonic()
        builder.carry_out(instruction)
        if instruction.name in {"RUN", "COPY"}:  # the others take no time
            seconds = time.monotonic() - started
            with report.open("a") as file:
                file.write(f"{seconds:.1f}\tDockerfile:{instruction.line} {' '.join(title.split())}\n")
    Path(f"{root}.json").write_text(json.dumps(asdict(builder.image), indent=2))


def run(root: Path, user: str | None, entrypoint: str | None, arguments: Sequence[str]) -> int:
    """Starts what ``docker run`` would; arguments take the place of CMD, a given entrypoint drops both."""
    image = Image(**json.loads(Path(f"{root}.json").read_text()))
    image.user = user or image.user
    command = [entrypoint, *arguments] if entrypoint else [*image.entrypoint, *(arguments or image.cmd)]
    return run_in(root, image, command, {})


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    building, running = commands.add_parser("build"), commands.add_parser("run")
    for command in (building, running):
        command.add_argument("root", type=Path)
    building.add_argument("context", type=Path)
    building.add_argument("--base", required=True)
    building.add_argument("--build-arg", action="append", default=[])
    building.add_argument("--secret", action="append", default=[])
    building.add_argument("--report", type=Path, required=True)
    running.add_argument("--user")
    running.add_argument("--entrypoint")
    running.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.command == "run":
        return run(options.root, options.user, options.entrypoint, options.arguments)
    given = dict(item.split("=", 1) for item in options.build_arg)
    secrets = {name: Path(file) for name, file in (item.split("=", 1) for item in options.secret)}
    build(options.root, options.context, options.base, given, secrets, options.report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
