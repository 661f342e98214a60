"""Bad input: exit code 2, one clear message, no traceback, nothing half-written.

First every key of the configuration with every kind of wrong value, generated from the schema; then the table of
``tests/bad_input.py``; then what a run does about damaged checkpoints.
"""

import fnmatch
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import yaml
from pydantic.fields import FieldInfo

from distmoe.cli import main
from distmoe.config import RunConfig, Section, load_config
from distmoe.contracts import UserError
from distmoe.training.checkpoint import CheckpointFolder
from tests.bad_input import (
    COMMAND_LINE,
    STEPS,
    TABLE,
    Place,
    Row,
    all_damaged,
    arrays,
    base_config,
    full_disk,
    no_checkpoints,
    snapshot,
)

# --- every key x every kind of wrong value

# All kinds of values that YAML can hold. By name, because `true`, `1` and `1.0` are equal in Python.
VALUES: dict[str, Any] = {
    "null": None,
    "text": "some text/with a slash",
    "empty text": "",
    "number as text": "12",
    "true": True,
    "false": False,
    "negative": -3,
    "zero": 0,
    "one": 1,
    "two": 2,
    "huge": 2**70,
    "negative fraction": -0.25,
    "fraction": 0.25,
    "whole float": 2.0,
    "large float": 1e9,
    "NaN": math.nan,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "empty list": [],
    "list": [1, 2],
    "list of text": ["a"],
    "nested list": [[1]],
    "list with null": [None],
    "mapping": {"a": 1},
    "empty mapping": {},
    "NUL in text": "a\0b",
}
NUMBERS = {"negative", "zero", "one", "two", "huge", "negative fraction", "fraction", "whole float", "large float"}
TEXTS = {"text", "empty text", "number as text", "NUL in text"}
# What is right for a type before its bounds: everything else is wrong.
RIGHT: dict[Any, set[str]] = {
    int: {"negative", "zero", "one", "two", "huge"},
    float: NUMBERS,
    bool: {"true", "false"},
    str: TEXTS,
    NoneType: {"null"},
}


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        path: From the root.
        annotation: Of its field.
        tags: Names that must be set above it, for it to exist: {"optim": "sgd"}.
    """

    path: tuple[str, ...]
    annotation: Any
    tags: tuple[tuple[tuple[str, ...], str], ...] = ()

    @property
    def name(self) -> str:
        chosen = "".join(f" ({tag})" for _, tag in self.tags)
        return ".".join(self.path) + chosen

    def values(self, value: Any) -> dict[str, Any]:
        """A configuration that is right but for this key."""
        tree: dict[str, Any] = {}
        for section, tag in self.tags:
            inside(tree, section)["name"] = tag
        inside(tree, self.path[:-1])[self.path[-1]] = value
        return tree


def inside(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for part in path:
        tree = tree.setdefault(part, {})
    return tree


def members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without what ``Annotated`` adds around a union."""
    if get_origin(annotation) is Annotated and get_origin(get_args(annotation)[0]) in (Union, UnionType):
        annotation = get_args(annotation)[0]
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def sections_in(annotation: Any) -> list[type[Section]]:
    return [one for one in members(annotation) if isinstance(one, type) and issubclass(one, Section)] + [
        inner for one in members(annotation) if get_origin(one) is Annotated for inner in sections_in(get_args(one)[0])
    ]


def keys(section: type[Section] = RunConfig, path: tuple[str, ...] = (), tags: Any = ()) -> Iterator[Key]:
    """Every key of the schema, sections and leaves, in every member of every union."""
    for name, annotation in get_type_hints(section, include_extras=True).items():
        if name == "model_config" or name.startswith("_"):
            continue
        key = Key((*path, name), annotation, tags)
        yield key
        found = sections_in(annotation)
        for inner in found:
            chosen = (*tags, (key.path, tag_of(inner))) if len(found) > 1 else tags
            yield from keys(inner, key.path, chosen)


def tag_of(section: type[Section]) -> str:
    tag: str = get_args(get_type_hints(section)["name"])[0]
    return tag


def right_names(annotation: Any) -> set[str]:
    """Names of the :data:`VALUES` that fit an annotation, found without pydantic."""
    if len(members(annotation)) > 1:
        return set().union(*(right_names(one) for one in members(annotation)))
    base, bounds = unwrapped(annotation)
    if isinstance(base, type) and issubclass(base, Section):
        return {"empty mapping"} if all(not field.is_required() for field in base.model_fields.values()) else set()
    if get_origin(base) is Literal:
        return set()  # none of the values is a name in this schema
    if get_origin(base) is tuple:
        return right_lists(get_args(base), bounds)
    return {name for name in RIGHT[base] if all(fits(VALUES[name], bound) for bound in bounds)}


def right_lists(items: tuple[Any, ...], bounds: list[Any]) -> set[str]:
    found = set()
    for name, values in VALUES.items():
        if isinstance(values, list):
            wanted = [items[0]] * len(values) if items[-1] is ... else list(items)
            names = [next((key for key, one in VALUES.items() if one is item), "text") for item in values]
            each = [name in right_names(kind) for name, kind in zip(names, wanted, strict=False)]
            if len(wanted) == len(values) and all(each) and all(fits(values, bound) for bound in bounds):
                found.add(name)
    return found


def unwrapped(annotation: Any) -> tuple[Any, list[Any]]:
    """The type inside ``Annotated``, and the bounds around it."""
    bounds: list[Any] = []
    while get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        for one in metadata:
            bounds += one.metadata if isinstance(one, FieldInfo) else [one]
    return annotation, bounds


def fits(value: Any, bound: Any) -> bool:
    checks: dict[str, Callable[[Any, Any], bool]] = {
        "gt": lambda value, limit: value > limit,
        "ge": lambda value, limit: value >= limit,
        "lt": lambda value, limit: value < limit,
        "le": lambda value, limit: value <= limit,
        "min_length": lambda value, limit: len(value) >= limit,
        "max_length": lambda value, limit: len(value) <= limit,
        "pattern": lambda value, pattern: re.search(pattern, value) is not None,
    }
    return all(
        check(value, getattr(bound, name)) for name, check in checks.items() if getattr(bound, name, None) is not None
    )


KEYS = list(keys())
CASES = [(key, name) for key in KEYS for name in VALUES if name not in right_names(key.annotation)]


def test_schema_is_walked_whole():
    names = {key.name for key in KEYS}
    assert {"seed", "data", "data.augment.flip", "optim.betas (adamw)", "optim.lr (sgd)", "moe.gate.k (topk)"} <= names
    assert {"model.widths (convnet)", "model.gate_hidden (tutorial)", "parallel.expert_parallel_size"} <= names
    assert len(KEYS) > 70
    assert len(CASES) > 1000
    # A few by hand: the rules above must not quietly let everything pass.
    wrong = {key: {name for one, name in CASES if one.name == key} for key in names}
    assert wrong["train.epochs"] == set(VALUES) - {"one", "two"}
    assert wrong["train.max_steps"] == set(VALUES) - {"one", "two", "null"}
    assert wrong["data.drop_last"] == set(VALUES) - {"true", "false"}
    assert wrong["optim.lr (sgd)"] == set(VALUES) - {"one", "two", "fraction", "whole float", "large float"}
    assert wrong["schedule.final_share"] == set(VALUES) - {"zero", "one", "fraction"}
    assert wrong["data.root"] == set(VALUES) - {"text", "number as text"}
    assert wrong["run.name"] == set(VALUES) - {"null", "number as text"}
    assert wrong["model.ffn_stages (convnet)"] == set(VALUES) - {"empty list", "list"}
    assert wrong["moe.gate.group (topk)"] == set(VALUES) - {"one", "two"}
    assert wrong["data.augment.flip"] == set(VALUES) - {"null"}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_wrong_value_is_refused_with_its_place(tmp_path: Path, key: Key, capsys: pytest.CaptureFixture[str]):
    path, place = tmp_path / "a.yaml", ".".join(key.path)
    wrong = [name for one, name in CASES if one is key]
    for name in wrong:
        path.unlink(missing_ok=True)  # to cut a file short waits for the disk, to make a new one does not
        path.write_text(yaml.safe_dump(key.values(VALUES[name])))
        with pytest.raises(UserError) as caught:
            load_config(path)
        message = str(caught.value)
        assert f"{path}: " in message, f"{name}: {message}"
        assert re.search(rf"(^|\s){re.escape(place)}[ .:]", message), f"{name} of {place}: {message}"
        assert "must be" in message or "must have" in message or "unknown key" in message, f"{name}: {message}"
    assert wrong
    with pytest.raises(SystemExit) as stopped:  # the last one once more, from the command line
        main(["train", str(path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"distmoe: error: {message}\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("key", [key for key in KEYS if sections_in(key.annotation)], ids=lambda key: key.name)
def test_unknown_key_is_refused_with_its_place(tmp_path: Path, key: Key):
    for section in sections_in(key.annotation):
        values: dict[str, Any] = {"zzz": 1}
        if len(sections_in(key.annotation)) > 1:
            values["name"] = tag_of(section)
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump(key.values(values)))
        with pytest.raises(UserError) as caught:
            load_config(path)
        known = ", ".join(section.model_fields)
        assert str(caught.value) == f"{path}: {'.'.join(key.path)}.zzz: unknown key; known keys here: {known}"


# --- the table


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A good data file, and the folder of a run trained on it."""
    folder = tmp_path_factory.mktemp("material")
    np.savez(folder / "data.npz", **arrays())
    (folder / "a.yaml").write_text(yaml.safe_dump(base_config(folder, folder / "data.npz")))
    with kept_logging(), pytest.raises(SystemExit) as stopped:
        main(["train", str(folder / "a.yaml")])
    assert stopped.value.code == 0
    assert {path.name for path in (folder / "runs/a/checkpoints").iterdir()} == {"step-2", f"step-{STEPS}"}
    yield folder / "data.npz", folder / "runs" / "a"
    shutil.rmtree(folder)


class kept_logging:  # noqa: N801 - reads as a function
    """Commands set up logging for a whole process; this puts it back."""

    def __enter__(self) -> None:
        root = logging.getLogger()
        self.before = list(root.handlers), root.level

    def __exit__(self, *error: object) -> None:
        root = logging.getLogger()
        root.handlers[:], level = self.before
        root.setLevel(level)


@pytest.fixture
def place(tmp_path: Path, material: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # the same messages and bits on every machine
    for name in ("WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    with kept_logging():
        yield Place(tmp_path, material[0], material[1], monkeypatch)


def run_command(place: Place, arguments: list[str]) -> int:
    with full_disk(place.file_size_limit), pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def check_refused(row: Row, place: Place, capsys: pytest.CaptureFixture[str]) -> str:
    """Exit code 2, the pieces of the message, no traceback, no new file but the allowed ones, no temporary file."""
    arguments = row.prepare(place)
    before = snapshot(place.folder)
    code = run_command(place, arguments)
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    for piece in row.expected:
        assert piece.format(folder=place.folder) in error
    after = snapshot(place.folder)
    assert not [name for name in after if ".tmp" in name or ".writing" in name], "something half-written stayed"
    new = [name for name, content in after.items() if name not in before or before[name] != content]
    # A run that has begun says so, and why it has ended; its folder is new only where a row allows that.
    patterns = (*row.leaves, "runs/a/attempts.jsonl")
    allowed = [name for name in new if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert sorted(new) == sorted(allowed), "new or changed files"
    assert set(before) <= set(after), "files are gone"
    for name, content in after.items():
        if name.endswith(".json") and name in new:
            json.loads(content or b"")
        if name.endswith(".jsonl") and name in new:
            assert all(json.loads(line) for line in (content or b"").splitlines())
    return error


def test_table_is_long_enough():
    names = [row.name for row in (*TABLE, *COMMAND_LINE)]
    assert len(names) >= 60
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_bad_input_gets_one_clear_message(row: Row, place: Place, capsys: pytest.CaptureFixture[str]):
    error = check_refused(row, place, capsys)
    assert error.count("distmoe: error: ") == 1
    last = [line for line in error.splitlines() if not line.startswith("  ")][-1]
    assert last.startswith("distmoe: error: "), "the message must come last"


@pytest.mark.parametrize("row", COMMAND_LINE, ids=lambda row: row.name)
def test_bad_command_line_shows_the_usage(row: Row, place: Place, capsys: pytest.CaptureFixture[str]):
    error = check_refused(row, place, capsys)
    assert error.startswith("Usage: ")


# --- damaged checkpoints: a run goes on from the newest whole one


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


TENSORS = "tensors-00001-of-00001.safetensors"
CHECKPOINT_FILES = [TENSORS, "index.json", "state.json", "config.yaml", "checksums.json"]
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "changed": flip,
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_damaged_checkpoint_is_passed_over(file: str, damage: str, place: Place, caplog: pytest.LogCaptureFixture):
    checkpoints = CheckpointFolder(place.run() / "checkpoints", keep=2)
    newest = checkpoints.path(STEPS)
    DAMAGES[damage](newest / file)
    before = snapshot(checkpoints.root)
    found = checkpoints.newest()
    assert found is not None
    assert found.state.progress.step == 2
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(f"checkpoint {newest}: ")
    assert file in record.getMessage() or file == "checksums.json"
    assert snapshot(checkpoints.root) == before


@pytest.mark.parametrize(("file", "damage"), [(TENSORS, "cut"), ("state.json", "changed"), ("checksums.json", "gone")])
def test_run_goes_on_from_the_checkpoint_before(
    file: str, damage: str, place: Place, capsys: pytest.CaptureFixture[str]
):
    newest = place.run() / f"checkpoints/step-{STEPS}"
    DAMAGES[damage](newest / file)
    assert run_command(place, place.train("run.resume=true")) == 0
    error = capsys.readouterr().err
    assert f"WARNING checkpoint {newest}: " in error
    assert f"from step 2 of {STEPS}" in error
    kept = sorted(path.name for path in newest.parent.iterdir())
    assert kept == [f"damaged-step-{STEPS}", "step-2", f"step-{STEPS}"]
    # The same tensors as the undisturbed run's, bit for bit.
    assert (newest / TENSORS).read_bytes() == (place.trained / f"checkpoints/step-{STEPS}" / TENSORS).read_bytes()


@pytest.mark.parametrize(
    "spoil",
    [
        all_damaged,
        lambda run: [path.write_text("[]") for path in run.glob("checkpoints/*/checksums.json")],
        no_checkpoints,
    ],
    ids=["weights cut", "checksums a list", "no checkpoints"],
)
def test_run_starts_again_where_no_checkpoint_is_whole(
    spoil: Callable[[Path], object], place: Place, capsys: pytest.CaptureFixture[str]
):
    run = place.run()
    spoil(run)
    damaged = len(list(run.glob("checkpoints/*")))
    assert run_command(place, place.train("run.resume=true", "train.stop_after_steps=2")) == 0
    error = capsys.readouterr().err
    assert error.count("; trying the one before") == damaged
    assert f"no whole checkpoint in {run / 'checkpoints'}: starting at step 0" in error
    assert "resuming" not in error
    # The new checkpoint is kept although damaged ones of later steps were there.
    assert [path.name for path in run.glob("checkpoints/step-*")] == ["step-2"]
    assert len(list(run.glob("checkpoints/damaged-step-*"))) == damaged
    assert run_command(place, place.train("run.resume=true")) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("split") == "test"] == [STEPS]


def test_metrics_of_another_program_do_not_stop_a_resume(place: Place, capsys: pytest.CaptureFixture[str]):
    run = place.run()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": "x"}\n[1]\nhello\n')
    assert run_command(place, place.resume()) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "loss": 2.0}
    assert all(isinstance(line["step"], int) for line in lines)


def test_damaged_prepared_file_is_written_anew(place: Place, capsys: pytest.CaptureFixture[str]):
    arguments = ["prepare", place.config(), "data.loader=ffcv"]
    assert run_command(place, arguments) == 0
    whole = snapshot(place.folder)
    for name in [name for name in whole if name.endswith((".beton", ".json"))]:
        (place.folder / name).write_bytes((whole[name] or b"")[:-20])
        assert run_command(place, arguments) == 0
        assert "preparing" in capsys.readouterr().err
        assert set(snapshot(place.folder)) == set(whole)
        assert snapshot(place.folder)[name] == whole[name]


def test_optional_packages_are_not_needed_where_they_are_not_used(place: Place, capsys: pytest.CaptureFixture[str]):
    for package in ("ffcv", "deepspeed"):
        place.patch.setitem(sys.modules, package, None)
    assert run_command(place, ["plan", place.config()]) == 0
    assert "steps of the run          3" in capsys.readouterr().out
