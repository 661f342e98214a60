"""Rules about the package that ruff and mypy cannot see: who may import whom, where, and how long a file may be.

Every rule is checked on the package as it stands, and on small synthetic packages to show that a breach is caught.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

MAX_LINES = 400

# A unit is the first part of a module's path under distmoe/. Imports point one way: to the units named here.
BASE = {"contracts", "noise", "config"}
TRAINING = BASE | {"data", "moe", "models", "parallel"}
TRAIN = TRAINING | {"training"}
MAY_IMPORT = {
    "contracts": set[str](),
    "noise": set[str](),
    "config": {"contracts"},
    "data": BASE,
    "moe": BASE,
    "models": BASE | {"moe"},
    "parallel": BASE | {"moe", "models"},
    "training": TRAINING,
    "train": TRAIN,
    "evaluate": TRAIN,
    "doctor": TRAIN,
    "studies": TRAIN | {"train"},
    "bench": TRAIN | {"train"},
    "cli": TRAIN | {"train", "evaluate", "doctor", "studies", "bench"},
    "__main__": {"cli"},
    "__init__": TRAIN | {"train", "studies", "bench", "cli"},
}
# The rest of the package does not know of other processes; DeepSpeed's layer is also what benchmarks compare with.
ONLY_IN = {"torch.distributed": ("parallel",), "deepspeed": ("parallel", "bench")}


def is_or_is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


class Checker(ast.NodeVisitor):
    """Collects the breaches of one module as (line number, message)."""

    def __init__(self, unit: str, tree: ast.Module):
        self.unit = unit
        self.breaches: list[tuple[int, str]] = []
        self.depth = 0  # of function and class bodies
        self.tables = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        self.visit(tree)

    def breach(self, node: ast.stmt | ast.expr, message: str) -> None:
        self.breaches.append((node.lineno, message))

    def check_name(self, node: ast.stmt | ast.expr, name: str) -> None:
        """Checks one imported dotted name, however it is imported."""
        for package, units in ONLY_IN.items():
            if is_or_is_in(name, package) and self.unit not in units:
                self.breach(node, f"{package} is for {' and '.join(f'{unit}/' for unit in units)} only")
        if not is_or_is_in(name, "distmoe") or name == "distmoe.__version__":
            return
        imported = name.split(".")[1] if "." in name else ""
        if imported not in MAY_IMPORT:
            self.breach(node, f"{name} is no module: name the module that defines it, not the package's exports")
        elif imported != self.unit and imported not in MAY_IMPORT.get(self.unit, set()):
            self.breach(node, f"{self.unit} may not import {imported}")

    def check_import_statement(self, node: ast.Import | ast.ImportFrom, names: list[str]) -> None:
        for name in names:
            self.check_name(node, name)
        if self.depth and any(is_or_is_in(name, "distmoe") for name in names):
            self.breach(node, "first-party import inside a body: it belongs at the top of the module")

    def visit_Import(self, node: ast.Import) -> None:
        self.check_import_statement(node, [alias.name for alias in node.names])

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            self.breach(node, "relative import")
            return
        self.check_import_statement(node, [f"{node.module}.{alias.name}" for alias in node.names])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        # torch.distributed.x needs no import of its own
        if isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr == "distributed":
            self.check_name(node, "torch.distributed")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in {"import_module", "__import__"}:
            self.check_import_call(node)
        if called == "print" and isinstance(node.func, ast.Name) and self.unit != "cli":
            self.breach(node, "print outside cli: use logging")
        self.generic_visit(node)

    def check_import_call(self, node: ast.Call) -> None:
        """A builder imports the module of an optional package when it is chosen: by a literal, which can be checked."""
        argument = node.args[0] if node.args else None
        if isinstance(argument, ast.Subscript) and isinstance(argument.value, ast.Name):
            literals: list[ast.expr] = list(getattr(self.tables.get(argument.value.id), "values", []))
        else:
            literals = [argument] if argument else []
        names = [item.value for item in literals if isinstance(item, ast.Constant) and isinstance(item.value, str)]
        if self.unit != "__init__" and (not names or len(names) < len(literals)):
            self.breach(
                node, "module imported by a computed name: use a literal, or a table of literals in this module"
            )
        for name in names:
            self.check_name(node, name)

    def visit_body(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_body  # noqa: N815, names of ast.NodeVisitor


def breaches_of(package: Path) -> Iterator[str]:
    """All breaches in a package folder, as ``file:line: message``."""
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package)
        unit = module.parts[0].removesuffix(".py")
        source = path.read_text(encoding="utf-8")
        if unit not in MAY_IMPORT:
            yield f"{module}:1: the unit {unit} is not in the table MAY_IMPORT of {Path(__file__).name}"
            continue
        if (lines := len(source.splitlines())) > MAX_LINES:
            yield f"{module}:{lines}: {lines} lines, more than {MAX_LINES}: does it tell one story?"
        for line, message in Checker(unit, ast.parse(source)).breaches:
            yield f"{module}:{line}: {message}"


def test_package_keeps_the_rules():
    package = REPOSITORY / "distmoe"
    assert list(package.rglob("*.py")), f"no modules under {package}: the rules would hold of nothing"
    assert "\n".join(breaches_of(package)) == ""


def test_imports_point_one_way():
    # A unit on which another depends must not depend on it, directly or through others.
    def reachable(unit: str) -> set[str]:
        return MAY_IMPORT[unit].union(*(reachable(other) for other in MAY_IMPORT[unit]))

    for unit, allowed in MAY_IMPORT.items():
        assert allowed <= set(MAY_IMPORT), unit
        assert unit not in reachable(unit), unit


def found(tmp_path: Path, module: str, source: str) -> list[str]:
    path = tmp_path / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return list(breaches_of(tmp_path))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("moe/layer.py", "import torch\nfrom distmoe.moe.routing import Routing\nfrom distmoe.config import RunConfig"),
        ("parallel/mesh.py", "import torch.distributed as dist\nimport deepspeed\nfrom torch import distributed"),
        ("train.py", "if TYPE_CHECKING:\n    from distmoe.training.step import step"),
        ("data/build.py", "def build():\n    return importlib.import_module('distmoe.data.loaders.ffcv')"),
        ("data/build.py", "TABLE = {'ffcv': 'distmoe.data.ffcv'}\ndef f(x):\n    return import_module(TABLE[x])"),
        ("__init__.py", "def __getattr__(name):\n    return importlib.import_module(HOMES[name])"),
        ("cli.py", "from distmoe.train import train\nprint(1)"),
        ("cli.py", "from distmoe import __version__"),
        ("__main__.py", "from distmoe.cli import main"),
        ("bench/layer.py", "def f():\n    import deep_something\n    model.print(1)"),
        ("moe/long.py", "x = 1\n" * MAX_LINES),
    ],
)
def test_compliant_module_is_silent(tmp_path: Path, module: str, source: str):
    assert found(tmp_path, module, source) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("moe/layer.py", "from distmoe.parallel.mesh import Mesh", "moe/layer.py:1: moe may not import parallel"),
        ("moe/layer.py", "import distmoe.parallel.mesh", "moe/layer.py:1: moe may not import parallel"),
        ("moe/layer.py", "from distmoe import parallel", "moe/layer.py:1: moe may not import parallel"),
        ("noise.py", "from distmoe.config import RunConfig", "noise.py:1: noise may not import config"),
        ("__main__.py", "from distmoe.train import x", "__main__.py:1: __main__ may not import train"),
        ("train.py", "from distmoe.cli import main", "train.py:1: train may not import cli"),
        ("moe/a.py", "if TYPE_CHECKING:\n    from distmoe.data import x", "moe/a.py:2: moe may not import data"),
        ("moe/a.py", "def f():\n    return import_module('distmoe.data')", "moe/a.py:2: moe may not import data"),
        ("moe/a.py", "T = {'a': 'distmoe.data'}\nimport_module(T['a'])", "moe/a.py:2: moe may not import data"),
        ("moe/a.py", "import_module(f'distmoe.{x}')", "moe/a.py:1: module imported by a computed name"),
        ("moe/a.py", "import_module(ELSEWHERE[x])", "moe/a.py:1: module imported by a computed name"),
        ("train.py", "from distmoe import MoELayer", "train.py:1: distmoe.MoELayer is no module"),
        ("train.py", "import distmoe", "train.py:1: distmoe is no module"),
        ("moe/a.py", "from torch import distributed", "moe/a.py:1: torch.distributed is for parallel/ only"),
        ("moe/a.py", "import torch.distributed.nn as n", "moe/a.py:1: torch.distributed is for parallel/ only"),
        (
            "train.py",
            "def f():\n    torch.distributed.barrier()",
            "train.py:2: torch.distributed is for parallel/ only",
        ),
        ("train.py", "def f():\n    import deepspeed", "train.py:2: deepspeed is for parallel/ and bench/ only"),
        ("moe/a.py", "from deepspeed.moe.layer import MoE", "moe/a.py:1: deepspeed is for parallel/ and bench/ only"),
        ("bench/a.py", "from torch.distributed import nn", "bench/a.py:1: torch.distributed is for parallel/ only"),
        ("moe/a.py", "from .gates import x", "moe/a.py:1: relative import"),
        ("moe/a.py", "def f():\n    from distmoe.moe import b", "moe/a.py:2: first-party import inside a body"),
        ("moe/a.py", "class A:\n    import distmoe.moe.b", "moe/a.py:2: first-party import inside a body"),
        ("moe/a.py", "def f():\n    print(1)", "moe/a.py:2: print outside cli"),
        ("moe/a.py", "x = 1\n" * (MAX_LINES + 1), "moe/a.py:401: 401 lines, more than 400"),
        ("utils.py", "", "utils.py:1: the unit utils is not in the table"),
    ],
)
def test_breach_is_caught(tmp_path: Path, module: str, source: str, expected: str):
    messages = found(tmp_path, module, source)
    assert len(messages) == 1
    assert messages[0].startswith(expected)
