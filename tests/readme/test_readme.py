"""Runs the bash and python blocks of README.md, in order, in a copy of the checkout.

A block is exempt, or needs a real data set, where a comment right before it says so:

    <!-- not run: it needs four hosts -->
    <!-- needs: cifar10 -->

Each block is a shell or an interpreter of its own, started in the copy's root. The copy shares this environment.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import DATA_SETS, REPOSITORY, real_data_root, why_absent

pytestmark = pytest.mark.readme

README = REPOSITORY / "README.md"
TIMEOUT_S = 600  # of one block
NESTED = "DISTMOE_README_TEST"  # set while a block runs

FENCE = re.compile(r"^(?P<indent>\s*)(?P<marks>```+)\s*(?P<language>[\w+-]*)")
COMMENT = re.compile(r"^\s*<!--\s*(?P<kind>not run|needs):\s*(?P<text>.*?)\s*-->\s*$")
RUN = {"bash", "python"}
ALIASES = {"sh", "shell", "console", "shell-session", "zsh", "py", "python3", "pycon"}  # a reader would run these too


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is that of its opening fence in the README."""

    line: int
    language: str
    source: str
    not_run: str | None = None
    needs: str | None = None


def code_blocks(text: str) -> list[Block]:
    """The bash and python blocks in order; ValueError for what would drop a block without a word."""
    blocks: list[Block] = []
    lines = iter(enumerate(text.splitlines(), start=1))
    comment: dict[str, str] = {}
    for line, content in lines:
        if match := COMMENT.match(content):
            comment = read_comment(match, line)
        elif match := FENCE.match(content):
            language = match["language"]
            source = textwrap.dedent("\n".join(body_of(lines, match["marks"], line)))
            if language in ALIASES:
                raise ValueError(f"README.md:{line}: a block marked {language!r} is not run: mark it bash or python")
            if language in RUN:
                blocks.append(Block(line, language, source, comment.get("not run"), comment.get("needs")))
            elif comment:
                raise ValueError(f"README.md:{line}: the comment before this block is of no use: it is never run")
            comment = {}
        elif comment and content.strip():
            raise ValueError(f"README.md:{line}: the comment before this line belongs right before a block")
    if comment:
        raise ValueError("README.md: the last comment has no block after it")
    return blocks


def read_comment(match: re.Match[str], line: int) -> dict[str, str]:
    if not match["text"]:
        raise ValueError(f"README.md:{line}: the comment gives no reason")
    if match["kind"] == "needs" and match["text"] not in DATA_SETS:
        raise ValueError(f"README.md:{line}: needs {match['text']!r}, allowed: {', '.join(DATA_SETS)}")
    return {match["kind"]: match["text"]}


def body_of(lines: Iterator[tuple[int, str]], marks: str, opened: int) -> Iterator[str]:
    for _, content in lines:
        if content.strip() == marks:
            return
        yield content
    raise ValueError(f"README.md:{opened}: the block is not closed")


def readme_blocks() -> list[Block]:
    """The blocks to run; none where the README cannot be read, which test_readme_is_checked reports."""
    try:
        return code_blocks(README.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def test_readme_is_checked():
    assert README.exists(), "README.md is missing"
    blocks = code_blocks(README.read_text(encoding="utf-8"))
    assert [block for block in blocks if block.language == "bash" and not block.not_run], "README.md runs no bash block"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without what git ignores, sharing this environment and the real data."""
    copy = tmp_path_factory.mktemp("readme") / "distmoe"
    for name in source_files():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target)
    if sys.prefix != sys.base_prefix:
        (copy / ".venv").symlink_to(sys.prefix)
    if real_data_root().is_dir():
        (copy / ".data").symlink_to(real_data_root())
    return copy


def source_files() -> list[str]:
    if not (REPOSITORY / ".git").exists():  # an unpacked archive, an image
        left_out = {".venv", ".data", "data", "runs", ".gpu", ".mypy_cache", ".ruff_cache", ".pytest_cache"}
        files = (path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*") if path.is_file())
        return [str(path) for path in files if path.parts[0] not in left_out]
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


def run_block(block: Block, folder: Path, timeout_s: float) -> tuple[int | None, str]:
    """Runs a block; returns its exit status (None: timed out) and its output, and leaves no process of it behind."""
    suffix = {"bash": "sh", "python": "py"}[block.language]
    script = folder.parent / f"readme_line_{block.line}.{suffix}"
    script.write_text(block.source + "\n", encoding="utf-8")
    command = {"bash": ["bash", "-euo", "pipefail"], "python": [sys.executable]}[block.language]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        # The installed distmoe is the original's: the copy is to be run.
        "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
        "DISTMOE_DATA_ROOT": str(real_data_root()),
        NESTED: "1",
    }
    output = script.with_suffix(".log")
    with output.open("wb") as log:  # a file: a pipe would stay open as long as anything in the background lives
        process = subprocess.Popen(
            [*command, str(script)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process_group_lives(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, output.read_text(encoding="utf-8", errors="replace")


def process_group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("block", readme_blocks(), ids=lambda block: f"line{block.line}-{block.language}")
def test_block_runs(block: Block, checkout: Path):
    if NESTED in os.environ:
        pytest.fail("a README block runs the tests, which would run the README again: exempt it with a comment")
    if block.not_run:
        pytest.skip(f"README.md says: not run: {block.not_run}")
    if block.needs and (reason := why_absent(block.needs)):
        pytest.skip(reason)
    status, output = run_block(block, checkout, TIMEOUT_S)
    if status != 0:
        end = "\n".join(output.splitlines()[-60:])
        ended = f"was stopped after {TIMEOUT_S} s" if status is None else f"ended with status {status}"
        pytest.fail(f"README.md:{block.line} {ended}\n{block.source}\n--- its output ends:\n{end}", pytrace=False)


# ------------------------------------------------------------------------------------- the checks of this file itself


def test_blocks_are_found_in_order_with_their_comments():
    text = """
# Title
```bash
a \\
  b
```
<!-- not run: it needs four hosts -->
```bash
c
```
<!-- needs: cifar10 -->

1. first
""".replace("\n1. first", "   ```python\n   if 1:\n       d\n   ```\n```yaml\ne: 1\n```\n")
    assert code_blocks(text) == [
        Block(3, "bash", "a \\\n  b"),
        Block(8, "bash", "c", not_run="it needs four hosts"),
        Block(12, "python", "if 1:\n    d", needs="cifar10"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\na", "README.md:1: the block is not closed"),
        ("\n```sh\na\n```", "README.md:2: a block marked 'sh' is not run"),
        ("<!-- not run: -->\n```bash\na\n```", "README.md:1: the comment gives no reason"),
        (
            "<!-- needs: imagenet -->\n```bash\na\n```",
            "README.md:1: needs 'imagenet', allowed: cifar10, cifar100, mnist",
        ),
        (
            "<!-- not run: x -->\nwords\n```bash\na\n```",
            "README.md:2: the comment before this line belongs right before",
        ),
        ("<!-- not run: x -->\n```yaml\na\n```", "README.md:2: the comment before this block is of no use"),
        ("<!-- not run: x -->\n", "README.md: the last comment has no block after it"),
    ],
)
def test_text_that_would_drop_a_block_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        code_blocks(text)


def test_failing_command_fails_the_block(tmp_path: Path):
    folder = tmp_path / "copy"
    folder.mkdir()
    assert run_block(Block(1, "bash", "false | cat\necho reached"), folder, 30)[0] == 1
    assert run_block(Block(1, "bash", "echo $MISSING_VARIABLE"), folder, 30)[0] != 0
    assert run_block(Block(1, "python", "raise SystemExit(3)"), folder, 30)[0] == 3
    assert run_block(Block(1, "bash", "pwd; sleep 60 &\nread x || echo no input"), folder, 30) == (
        0,
        f"{folder}\nno input\n",
    )


def test_block_that_does_not_end_is_stopped(tmp_path: Path):
    folder = tmp_path / "copy"
    folder.mkdir()
    assert run_block(Block(1, "bash", "echo started; sleep 60"), folder, 1) == (None, "started\n")
