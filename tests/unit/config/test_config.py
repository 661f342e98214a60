"""The configuration: reading, merging, writing, its messages, and the tables that its unions stand for."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from pydantic import ValidationError

from distmoe.config import DataSection, LossWeights, ParallelSection, RunConfig, Section, config_to_yaml, load_config
from distmoe.config.io import MAX_CONFIG_BYTES, MAX_VALUES
from distmoe.contracts import UserError
from distmoe.data.datasets import DATASETS
from distmoe.data.loaders import LOADERS
from distmoe.models import MODELS
from distmoe.moe.gates import GATES
from distmoe.moe.losses import LOSSES
from distmoe.parallel.engines import ENGINES
from distmoe.training.optim import OPTIMIZERS
from tests.conftest import REPOSITORY

EXAMPLES = sorted((REPOSITORY / "configs").rglob("*.yaml"))


def written(folder: Path, content: str | bytes, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def load(folder: Path, content: str | bytes, *overrides: str) -> RunConfig:
    return load_config(written(folder, content), overrides)


def message(folder: Path, content: str | bytes, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, content, *overrides)
    return str(caught.value)


# --- reading, merging, writing


def test_defaults_file_and_overrides_win_in_this_order(tmp_path: Path):
    content = "optim: {name: sgd, lr: 0.5, momentum: 0.1}\nseed: 4"
    config = load(tmp_path, content, "optim.lr=1e-3", "optim.lr=2e-3")
    assert config.optim.lr == 2e-3  # the last override
    assert config.seed == 4  # the file
    assert config.optim.model_dump() == {
        "lr": 2e-3,
        "weight_decay": 0.0,
        "name": "sgd",
        "momentum": 0.1,
        "nesterov": False,
    }
    assert config.data == RunConfig().data  # the defaults


def test_empty_file_is_the_defaults(tmp_path: Path):
    for content in ("", "# nothing\n", "{}", "null"):
        assert load(tmp_path, content, "run.name=x") == RunConfig().model_copy(
            update={"run": RunConfig().run.model_copy(update={"name": "x"})}
        )


OVERRIDES: list[tuple[str, str, Any]] = [
    ("seed=3", "seed", 3),
    ("data.augment.flip=random", "data.augment.flip", "random"),
    ("data.augment.flip=null", "data.augment.flip", None),
    ("data.augment.flip=none", "data.augment.flip", "none"),
    ("model.widths=[8, 16]", "model.widths", (8, 16)),
    ("model.ffn_stages=[]", "model.ffn_stages", ()),
    ("optim.lr=1e-3", "optim.lr", 1e-3),
    ("optim.lr=1E+0", "optim.lr", 1.0),
    ("optim.lr=5", "optim.lr", 5.0),
    ("optim={name: sgd, lr: .5}", "optim.lr", 0.5),
    ("moe=null", "moe", None),
    ("moe.num_experts=5", "moe.num_experts", 5),
    ("train.max_steps=null", "train.max_steps", None),
    ("data.drop_last=false", "data.drop_last", False),
    ("data.root=a=b", "data.root", "a=b"),
    ('data.root="3"', "data.root", "3"),
    ("parallel.expert_parallel_size=auto", "parallel.expert_parallel_size", "auto"),
    ("parallel.expert_parallel_size=4", "parallel.expert_parallel_size", 4),
]


@pytest.mark.parametrize(("override", "path", "expected"), OVERRIDES)
def test_override_is_read_as_yaml(tmp_path: Path, override: str, path: str, expected: Any):
    content = "model: {name: convnet, widths: [4, 8], ffn_stages: [1]}\noptim: {name: adamw}\nmoe: {num_experts: 2}"
    value: Any = load(tmp_path, content, override)
    for part in path.split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_override_makes_a_missing_section(tmp_path: Path):
    assert load(tmp_path, "seed: 1").moe is None
    for content in ("seed: 1", "moe: null"):
        moe = load(tmp_path, content, "moe.gate.name=topk", "moe.gate.k=3", "moe.num_experts=4").moe
        assert moe is not None
        assert moe.gate.model_dump()["k"] == 3


def test_run_name_comes_from_the_file_unless_given(tmp_path: Path):
    path = written(tmp_path, "seed: 1", "my.study-2.yaml")
    assert load_config(path).run.name == "my.study-2"
    assert load_config(path, ["run.name=other"]).run.name == "other"
    assert load_config(path, ["run.dir=elsewhere"]).run.model_dump() == {
        **RunConfig().run.model_dump(),
        "dir": "elsewhere",
        "name": "my.study-2",
    }
    with pytest.raises(UserError, match=r"run.name \('my study'\): must be text that matches"):
        load_config(written(tmp_path, "", "my study.yaml"))


ROUND_TRIP = [
    "{}",
    "seed: 2147483647\nrun: {dir: 'runs: ü/日本', name: a}",
    "model: {name: tutorial, channels: [1, 2, 3]}\nmoe: {num_experts: 3, gate: {name: dense}}",
    "model: {name: tutorial_cnn}\noptim: {name: sgd, lr: 1.0e-300, nesterov: true}",
    "moe: {gate: {name: topk, k: 1, renormalize: false, capacity_factor: 1.25, group: 3}}\noptim: {name: adamw}",
    "data: {name: arrays, path: 'null', root: '1e3', prepared_dir: 'yes', augment: {flip: none, cutout: 3}}",
]


@pytest.mark.parametrize("content", ROUND_TRIP)
def test_written_configuration_reads_back_equal(tmp_path: Path, content: str):
    config = load(tmp_path, content)
    assert load_config(written(tmp_path, config_to_yaml(config), "again.yaml")) == config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_valid_and_reads_back_equal(tmp_path: Path, path: Path):
    config = load_config(path)
    assert load_config(written(tmp_path, config_to_yaml(config), "again.yaml")) == config
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# "), "the first line says what it is"
    assert f"python -m distmoe train {path.relative_to(REPOSITORY)}" in lines[1]


def test_configuration_cannot_be_changed():
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.data.augment.cutout = 1
    assert hash(config) == hash(RunConfig())


# --- the schema


def sections(model: type[Section] = RunConfig) -> Iterator[type[Section]]:
    """A section and all below it, every member of a union."""
    yield model
    for annotation in get_type_hints(model, include_extras=True).values():
        for inner in classes_in(annotation):
            yield from sections(inner)


def classes_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from classes_in(argument)


SECTIONS = list(dict.fromkeys(sections()))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_is_described(section: type[Section]):
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no docstring"
        assert field.description.endswith("."), f"{section.__name__}.{name}: the description is no sentence"


def tags(path: str) -> set[str]:
    """The names of the union at a dotted path, from the annotations alone."""
    models: list[type[Section]] = [RunConfig]
    for part in path.split("."):
        models = [inner for model in models for inner in classes_in(get_type_hints(model, include_extras=True)[part])]
    return {name for model in models for name in literals(model, "name")}


def literals(model: type[Section], field: str) -> set[str]:
    def inside(annotation: Any) -> Iterator[str]:
        if get_origin(annotation) is Literal:
            yield from get_args(annotation)
        else:
            for argument in get_args(annotation):
                yield from inside(argument)

    return set(inside(get_type_hints(model, include_extras=True)[field]))


def test_unions_and_tables_agree():
    assert tags("model") == set(MODELS)
    assert tags("moe.gate") == set(GATES)
    assert tags("optim") == set(OPTIMIZERS)
    assert literals(DataSection, "name") == set(DATASETS)
    assert literals(DataSection, "loader") == set(LOADERS)
    assert literals(ParallelSection, "backend") == {"auto", *ENGINES}
    assert set(LossWeights.model_fields) == set(LOSSES)


# --- files that are no configuration


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"seed: \xff\xfe", "config {path}: not UTF-8 text; give the path of a YAML file"),
        ("seed: 1\nseed: 2", "config {path}: not valid YAML at line 2, column 1: key 'seed' is given twice"),
        (
            "data:\n  root: a\n  root: b",
            "config {path}: not valid YAML at line 3, column 3: key 'root' is given twice",
        ),
        ("3: 4", "config {path}: not valid YAML at line 1, column 1: key 3 is not text"),
        ("- seed", "config {path}: must hold sections (section: ...), not a list"),
        ("hello", "config {path}: must hold sections (section: ...), not a str"),
        (
            "seed: !!python/object/apply:os.system ['exit 3']",
            "config {path}: not valid YAML at line 1, column 7: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        ("seed: !!timestamp x", "config {path}: not valid YAML: "),
        ("seed: !!int x", "config {path}: not valid YAML: "),
        ("seed: 2026-13-45", "config {path}: not valid YAML: "),
        ("a: 1\n---\nb: 2", "config {path}: not valid YAML at line 2, column 1: but found another document"),
        ("seed: [", "config {path}: not valid YAML at line 1, column 8: "),
        ("seed: \x00", "config {path}: not valid YAML: special characters are not allowed"),
        ("[" * 600, "config {path}: not valid YAML: nested too deeply"),
        ("a: &a [*a]", "config {path}: not valid YAML at line 1, column 4: an alias stands inside its own anchor"),
        ("seed: *nothing", "config {path}: not valid YAML at line 1, column 7: found undefined alias 'nothing'"),
        ("#" * (MAX_CONFIG_BYTES + 1), "config {path}: larger than 1000000 bytes, not a configuration file"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_file_that_is_no_configuration(tmp_path: Path, content: str | bytes, expected: str):
    assert message(tmp_path, content).startswith(expected.format(path=tmp_path / "run.yaml"))


@pytest.mark.parametrize("levels", [9, 60])
@pytest.mark.parametrize("kind", ["list", "mapping"])
def test_billion_laughs_end_at_once(tmp_path: Path, levels: int, kind: str):
    items = [f"k{number}: *a{{0}}" if kind == "mapping" else "*a{0}" for number in range(10)]
    opening, closing = "{}" if kind == "mapping" else "[]"
    lines = [f"a0: &a0 {opening}{closing}"]
    for level in range(1, levels):
        below = ", ".join(item.replace("{0}", str(level - 1)) for item in items)
        lines.append(f"a{level}: &a{level} {opening}{below}{closing}")
    started = time.perf_counter()
    found = message(tmp_path, "\n".join(lines), "a1.x=1")
    assert f"more than {MAX_VALUES} values with its aliases written out" in found
    assert time.perf_counter() - started < 2


def test_aliases_and_merge_keys_are_fine(tmp_path: Path):
    content = """
    model: {name: tutorial, channels: &widths [8, 16], gate_channels: *widths}
    moe: {num_experts: 2, gate: {name: dense}, loss_weights: &weights {load_balance: 0.1, z: 0.2}}
    """
    config = load(tmp_path, content)
    assert config.model.model_dump()["gate_channels"] == (8, 16)
    merged = "moe:\n  loss_weights: {<<: {z: 0.5, importance: 0.1}, importance: 0.2}"
    moe = load(tmp_path, merged).moe
    assert moe is not None
    assert moe.loss_weights == LossWeights(z=0.5, importance=0.2)


# --- messages: the place, the value, what is allowed, the fix

MESSAGES = [
    ("seed=x", "seed ('x'): must be a valid integer"),
    ("seed=1.5", "seed (1.5): must be a valid integer"),
    ("seed=true", "seed (True): must be a valid integer"),
    ("seed=-1", "seed (-1): must be greater than or equal to 0"),
    ("seed=2147483648", "seed (2147483648): must be less than 2147483648"),
    ("seed.x=1", "seed ({'x': 1}): must be a valid integer"),
    ("sede=1", "sede: unknown key; did you mean seed?"),
    (
        "foo.bar=1",
        "foo: unknown key; known keys here: seed, run, data, model, moe, optim, schedule, train, parallel",
    ),
    ("data.augment.flop=none", "data.augment.flop: unknown key; did you mean flip?"),
    ("optim.betas=[0.1, 0.2]", "optim.betas: unknown key; known keys here: lr, weight_decay, name, momentum, nesterov"),
    (
        "moe.k=2",
        "moe.k: unknown key; known keys here: num_experts, gate, shared_hidden, objective, loss_weights, similarity",
    ),
    ("optim.lr=0", "optim.lr (0): must be greater than 0"),
    ("optim.lr=.nan", "optim.lr (nan): must be a finite number"),
    ("optim.lr=null", "optim.lr (None): must be a valid number"),
    ("optim.name=lion", "optim.name ('lion'): must be one of 'sgd', 'adamw'"),
    ("optim={lr: 1}", "optim.name: must be given, one of 'sgd', 'adamw'"),
    (
        "moe.gate={k: 1}",
        "moe.gate.name: must be given, one of 'dense', 'topk', 'noisy_topk', 'switch', 'cosine', 'sigmoid', "
        "'expert_choice', 'soft', 'attentive', 'hash', 'uniform'",
    ),
    (
        "moe=3",
        "moe (3): must be a section with fields: num_experts, gate, shared_hidden, objective, loss_weights, similarity",
    ),
    ("schedule=[]", "schedule ([]): must be a section with fields: name, warmup_share, final_share"),
    ("data.augment.flip=left", "data.augment.flip ('left'): must be 'none', 'random' or 'alternating'"),
    ("data.root=''", "data.root (''): must have at least 1 character"),
    ("run.name=a/b", "run.name ('a/b'): must be text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$"),
    ("model={name: convnet, widths: []}", "model.widths (()): must have at least 1 item"),
    ("model={name: convnet, widths: [8, x]}", "model.widths.1 ('x'): must be a valid integer"),
    ("model={name: convnet, widths: 8}", "model.widths (8): must be a list"),
    ("train.ema_decay=1", "train.ema_decay (1): must be less than 1"),
    ("parallel.expert_parallel_size=x", "parallel.expert_parallel_size ('x'): must be a valid integer or be 'auto'"),
    ("data.drop_last=1", "data.drop_last (1): must be a valid boolean"),
    ("data.batch_size=10", "data.batch_size (10) must be divisible by train.accumulation (4)"),
    ("moe.gate={name: topk, k: 9}", "moe.gate.k (9) must be at most moe.num_experts (8)"),
    (
        "moe.loss_weights.load=0.1",
        "moe.loss_weights.load (0.1) needs moe.gate.name=noisy_topk: no other gate estimates it",
    ),
    (
        "moe={gate: {name: hash}, loss_weights: {z: 0.1}}",
        "moe.loss_weights must be 0 for moe.gate.name=hash, a gate that learns nothing",
    ),
    ("model={name: convnet, ffn_stages: [1, 1]}", "model.ffn_stages [1, 1] must be different stages of 1..3"),
]


@pytest.mark.parametrize(("override", "expected"), MESSAGES, ids=[row[0] for row in MESSAGES])
def test_message_names_place_value_and_what_is_allowed(tmp_path: Path, override: str, expected: str):
    found = message(tmp_path, "optim: {name: sgd}\nmoe: {num_experts: 8}\ntrain: {accumulation: 4}", override)
    assert found == f"{tmp_path / 'run.yaml'}: {expected}"


@pytest.mark.parametrize(
    ("overrides", "expected", "left_out"),
    [
        (["moe.gate.name=soft"], {"name": "soft", "group": 2}, ["k", "renormalize"]),
        (["moe.gate.name=switch"], {"name": "switch", "group": 2}, ["k", "renormalize"]),
        (["moe.gate.name=sigmoid", "moe.gate.k=3"], {"name": "sigmoid", "k": 3, "group": 2, "renormalize": False}, []),
    ],
)
def test_another_choice_of_a_union_leaves_out_what_only_the_former_one_has(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    overrides: list[str],
    expected: dict[str, Any],
    left_out: list[str],
):
    content = "moe: {gate: {name: topk, k: 2, renormalize: false, group: 2}}"
    moe = load(tmp_path, content, *overrides).moe
    assert moe is not None
    assert moe.gate.model_dump(exclude_unset=True) == expected
    assert [record.args[2] for record in caplog.records] == left_out  # type: ignore[index]


def test_a_misspelt_key_is_an_error_whatever_is_chosen(tmp_path: Path):
    found = message(tmp_path, "moe: {gate: {name: topk, kk: 2}}", "moe.gate.name=soft")
    assert "moe.gate.kk: unknown key" in found


@pytest.mark.parametrize("override", ["seed", "=3", "seed..x=1", ".seed=1", "seed.=1", ""])
def test_override_that_is_none(tmp_path: Path, override: str):
    expected = f"override {override!r}: must look like section.field=value, e.g. optim.lr=0.01"
    assert message(tmp_path, "", override) == expected


def test_override_messages_name_the_override(tmp_path: Path):
    found = message(tmp_path, "seed: 3", "seed.a.b=1")
    assert found == "override 'seed.a.b=1': seed is a value, not a section with fields"
    assert message(tmp_path, "", "seed=[").startswith("override 'seed=[': not valid YAML at line 1, column 2: ")


def test_all_problems_come_in_one_message(tmp_path: Path):
    content = yaml.safe_dump({"seed": -1, "data": {"nam": "x", "batch_size": 0}, "optim": {"name": "sgd", "lr": "x"}})
    assert message(tmp_path, content) == (
        f"{tmp_path / 'run.yaml'}: 4 problems\n"
        "  data.batch_size (0): must be greater than 0\n"
        "  data.nam: unknown key; did you mean name?\n"
        "  optim.lr ('x'): must be a valid number\n"
        "  seed (-1): must be greater than or equal to 0"
    )


def test_two_files_of_the_same_values_are_equal(tmp_path: Path):
    first, second = load(tmp_path, "seed: 1"), load(tmp_path, "{}", "seed=1")
    assert first == second
    assert hash(first) == hash(second)
