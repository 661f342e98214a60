"""Reading and writing configuration values: YAML, dotted overrides, and error messages that name place and fix."""

import difflib
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from distmoe.contracts import UserError

logger = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 1_000_000  # far above any configuration: a data file given by mistake is refused, not parsed
MAX_VALUES = 100_000  # the same once aliases (*name) are written out: a few lines of them can stand for billions
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-3`` as a number, and refuses a key that is given twice and aliases that explode."""

    def construct_document(self, node: yaml.Node) -> Any:
        _count_values(node, {})
        return super().construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:  # "<<: *name" may be overridden by the keys beside it
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Values below a node with aliases written out; each node is visited once. 0 marks a node that is being visited."""
    known = counts.get(id(node))
    if known is not None:
        if known == 0:
            raise yaml.constructor.ConstructorError(
                None, None, "an alias stands inside its own anchor", node.start_mark
            )
        return known
    counts[id(node)] = 0
    children = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
    total = 1 + (sum(_count_values(one, counts) for one in children) if isinstance(children, list) else 0)
    if total > MAX_VALUES:
        reason = f"more than {MAX_VALUES} values with its aliases written out, not a configuration"
        raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
    counts[id(node)] = total
    return total


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes every text :class:`_Loader` would read as something else."""


# YAML 1.1 takes 1e-3 for text (no dot); everybody who writes a learning rate means a number.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an unreadable, oversized or malformed file is a :class:`UserError`."""
    try:
        if path.is_file() and path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"config {path}: larger than {MAX_CONFIG_BYTES} bytes, not a configuration file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config {path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"config {path}: not UTF-8 text; give the path of a YAML file") from None
    values = parse_yaml(text, f"config {path}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"config {path}: must hold sections (section: ...), not a {type(values).__name__}")
    return values


def merge_overrides(
    values: dict[str, Any], overrides: tuple[str, ...] | list[str], schema: type[BaseModel] | None = None
) -> dict[str, Any]:
    """A copy of ``values`` with each ``a.b.c=value`` applied in order; the values are read as YAML.

    Where an override makes another choice in a tagged union (``moe.gate.name=soft``), settings of the former choice
    that the new one does not have are left out, with a warning; for that the ``schema`` must be given.
    """
    merged = _copy(values)
    for override in overrides:
        key, separator, text = override.partition("=")
        parts = key.split(".")
        if not separator or not all(parts):
            raise UserError(f"override {override!r}: must look like section.field=value, e.g. optim.lr=0.01")
        section = merged
        for part in parts[:-1]:
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise UserError(f"override {override!r}: {part} is a value, not a section with fields")
        section[parts[-1]] = parse_yaml(text, f"override {override!r}")
        if schema is not None and parts[-1] == "name":
            for foreign in _settings_of_others(section, parts[:-1], schema):
                logger.warning("%s: %s.%s is no setting of it and left out", override, ".".join(parts[:-1]), foreign)
                del section[foreign]
    return merged


def _settings_of_others(section: dict[str, Any], path: list[str], schema: type[BaseModel]) -> list[str]:
    """Keys of a section that only other members of its union have than the one it names."""
    choices = _choices_at(path, schema)
    chosen = [model for model in choices if _tag(model) == section["name"]]
    if not chosen:
        return []
    known = {name for model in choices for name in model.model_fields}
    return [key for key in section if key in known and key not in chosen[0].model_fields]


def _choices_at(path: Iterable[str], schema: type[BaseModel]) -> list[type[BaseModel]]:
    choices: list[type[BaseModel]] = [schema]
    for part in path:
        fields = [model.model_fields[part] for model in choices if part in model.model_fields]
        choices = [found for field in fields for found in _models_in(field.annotation)]
    return choices


def to_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def describe_errors(error: ValidationError, schema: type[BaseModel]) -> str:
    """All problems of a failed validation, one a line: path, value, what is allowed, the fix."""
    by_place: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        place, allowed = _describe(problem, schema)
        by_place.setdefault(place, []).append(allowed)
    # A union of types fails once for each of them: one line says what any of them would allow.
    lines = sorted(place + " or ".join(dict.fromkeys(allowed)) for place, allowed in by_place.items())
    return lines[0] if len(lines) == 1 else f"{len(lines)} problems\n" + "\n".join(f"  {line}" for line in lines)


def parse_yaml(text: str, source: str) -> Any:
    """The values in a YAML text; ``source`` names it in the error message."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, AttributeError) as error:  # AttributeError: PyYAML on a malformed !!timestamp
        where = getattr(error, "problem_mark", None)
        place = f" at line {where.line + 1}, column {where.column + 1}" if where else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or _shorten(str(error))
        raise UserError(f"{source}: not valid YAML{place}: {reason}") from None


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, dict) else values


def _describe(problem: Any, schema: type[BaseModel]) -> tuple[str, str]:
    """The place with the wrong value, and what is allowed there."""
    parts, fields = _walk(problem["loc"], schema)
    path, kind = ".".join(parts), problem["type"]
    value, details = problem["input"], problem.get("ctx", {})
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(parts[-1], fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys here: {', '.join(fields) or 'none'}"
        return f"{path}: unknown key; {hint}", ""
    if kind == "value_error":
        return str(details["error"]), ""
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = value.get("name") if isinstance(value, dict) else None
        given = f" ({tag!r})" if tag is not None else ""
        tags = details.get("expected_tags") or ", ".join(repr(one) for one in _tags(problem, schema))
        return f"{path}.name{given}: must be ", f"{'' if given else 'given, '}one of {tags}"
    return f"{path} ({_shorten(value)}): must ", _allowed(kind, problem["msg"], details, fields)


def _allowed(kind: str, message: str, details: dict[str, Any], fields: list[str]) -> str:
    """What is allowed instead, in words that follow "must"."""
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"be a section with fields: {', '.join(fields)}"
    known = {
        "missing": "be given",
        "tuple_type": "be a list",
        "string_pattern_mismatch": "be text that matches {pattern}",
        "string_too_short": "have at least {min_length} character",
        "string_too_long": "have at most {max_length} characters",
        "too_short": "have at least {min_length} item",
        "too_long": "have at most {max_length} items",
    }
    return known[kind].format(**details) if kind in known else message.removeprefix("Input should ")


def _walk(location: tuple[int | str, ...], schema: type[BaseModel]) -> tuple[list[str], list[str]]:
    """The dotted path without the tags pydantic adds for unions, and the field names known at its last section."""
    parts: list[str] = []
    fields: list[str] = list(schema.model_fields)
    choices: list[type[BaseModel]] = [schema]
    for item in location:
        if isinstance(item, int):
            parts.append(str(item))
            continue
        matching = [model for model in choices if item in model.model_fields]
        tagged = [model for model in choices if _tag(model) == item]
        if matching:
            parts.append(item)
            choices = [found for model in matching for found in _models_in(model.model_fields[item].annotation)]
            fields = _field_names(choices or matching)
        elif tagged:
            choices = tagged
        elif item == location[-1] and choices:
            parts.append(item)
            fields = _field_names(choices)
    return parts, fields


def _field_names(models: list[type[BaseModel]]) -> list[str]:
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType) or get_args(annotation):
        for argument in get_args(annotation):
            yield from _models_in(argument)


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("name")
    return field.default if field is not None and isinstance(field.default, str) else None


def _tags(problem: Any, schema: type[BaseModel]) -> list[str]:
    choices: list[type[BaseModel]] = [schema]
    for item in problem["loc"]:
        matching = [model for model in choices if item in model.model_fields]
        if matching:
            choices = [found for model in matching for found in _models_in(model.model_fields[item].annotation)]
        else:  # the tag of a union on the way
            choices = [model for model in choices if _tag(model) == item]
    return [tag for tag in map(_tag, choices) if tag]


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
