"""The configuration: recipes in YAML, dotted overrides from the command line, faults explained in one line.

`load(recipe, overrides)` gives a `Config` (see `selfsup.schema.whole`). Unknown keys are refused with a suggestion; `dump`
writes a file that is itself a recipe. Options that belong to a method are checked by `selfsup.methods` against that
method's own schema; options of a backbone are passed to timm.
"""

import datetime
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from selfsup.errors import UserError
from selfsup.schema.data import DataConfig, MixConfig
from selfsup.schema.kinds import (
    SHORT_FORMS,
    Duration,
    Level,
    OpenSection,
    Positive,
    Probability,
    Range,
    Section,
    ValueRange,
    expand_short_forms,
    parse_duration,
)
from selfsup.schema.training import (
    BackboneConfig,
    CheckpointConfig,
    EarlyStopConfig,
    EvalConfig,
    InitConfig,
    MethodConfig,
    OptimizerConfig,
    TeacherConfig,
)
from selfsup.schema.views import Crops, ViewsConfig
from selfsup.schema.whole import Config
from selfsup.wording import one_line

__all__ = [
    "SHORT_FORMS",
    "BackboneConfig",
    "CheckpointConfig",
    "Config",
    "Crops",
    "DataConfig",
    "Duration",
    "EarlyStopConfig",
    "EvalConfig",
    "InitConfig",
    "Level",
    "MethodConfig",
    "MixConfig",
    "OpenSection",
    "OptimizerConfig",
    "Positive",
    "Probability",
    "Range",
    "Section",
    "TeacherConfig",
    "ValueRange",
    "ViewsConfig",
    "dump",
    "expand_short_forms",
    "file_names",
    "load",
    "merge",
    "parse_duration",
    "parse_overrides",
    "parse_yaml",
    "read_named",
    "read_recipe",
    "recipe_names",
    "recipe_texts",
    "suggest",
    "validate",
]


def file_names(folder: Traversable) -> list[str]:
    """Names of the YAML files in a folder of a package, without the suffix."""
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    return file_names(resources.files("selfsup.recipes"))


def recipe_texts() -> dict[str, str]:
    """Name -> text of every built-in recipe; the first line is a comment that says what it is."""
    return {name: (resources.files("selfsup.recipes") / f"{name}.yaml").read_text() for name in recipe_names()}


class _StrictLoader(yaml.SafeLoader):
    """YAML without two traps: of a key given twice the last would win, and 24:00:00 would be the number 86400."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and (name := str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        """A number, but for 24:00:00 (base 60 in YAML 1.1) and 007 (base 8), which are kept as they are written."""
        if ":" in node.value or re.fullmatch(r"[+-]?0[\d_]+", node.value):
            return node.value
        return self.construct_yaml_int(node) if node.tag.endswith("int") else self.construct_yaml_float(node)


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _StrictLoader.construct_number)


def read_named(kind: str, name: str, folder: Traversable) -> dict[str, Any]:
    """The YAML file `name` of this folder, or one by its path, as nested dicts; `kind` is what messages call it."""
    built_in = file_names(folder)
    path: Traversable = folder / f"{name}.yaml" if name in built_in else Path(name)
    if name not in built_in and not os.path.isfile(name) and Path(name).suffix not in (".yaml", ".yml"):
        known = ", ".join(built_in)
        raise UserError(f"no {kind} {one_line(name)!r}{suggest(name, built_in)}; built in: {known}, or a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        raise UserError(f"{kind} {one_line(name)}: cannot be read: {one_line(error)}") from None
    return parse_yaml(text, f"{kind} {name}")


def read_recipe(recipe: str) -> dict[str, Any]:
    """A built-in recipe by name, or a YAML file, as nested dicts (short forms expanded)."""
    return expand_short_forms(read_named("recipe", recipe, resources.files("selfsup.recipes")))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The 'key: value' lines of a YAML text; raises UserError, beginning with `where`, for anything else."""
    try:
        values = plain(_StrictLoader(text).get_single_data())
    except RecursionError:
        raise UserError(f"{one_line(where)}: not valid YAML: nested too deeply") from None
    except Exception as error:  # yaml.YAMLError; ValueError, TypeError or AttributeError where a value belies its tag
        raise UserError(f"{one_line(where)}: not valid YAML: {one_line(error)}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UserError(
            f"{one_line(where)}: expected 'key: value' lines at the top level, seen {type(values).__name__}"
        )
    return values


_DEEPEST = 20


def plain(value: Any, depth: int = 0) -> Any:
    """A value as YAML gives it, of text, numbers, lists and tables alone; dates become text. Else raises ValueError."""
    if depth > _DEEPEST:  # a list may even hold itself
        raise ValueError(f"nested more than {_DEEPEST} deep")
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"the key {odd[0]!r} is no text; quote it")
        return {key: plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner, depth + 1) for inner in value]
    if isinstance(value, datetime.date):  # and datetime
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} where a number is needed")
    if isinstance(value, (str, int, float)) or value is None:
        return value
    raise ValueError(f"a value of type {type(value).__name__}; give text, numbers, lists or key: value")


def parse_overrides(overrides: Iterable[str], short: Mapping[str, str] = SHORT_FORMS) -> dict[str, Any]:
    """['data=x', 'optimizer.lr=1e-3'] -> {'data': {'path': 'x'}, 'optimizer': {'lr': 0.001}}. Later ones win."""
    out: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key or any(not part for part in key.split(".")) or key.count(".") > _DEEPEST:
            raise UserError(f"override {one_line(item)!r}: write KEY=VALUE, as in optimizer.lr=1e-3")
        parts = key.split(".")
        try:
            value = _scalar(text)
        except ValueError as error:
            raise UserError(f"override {one_line(item)!r}: {one_line(error)}") from None
        if key in short and not isinstance(value, dict):
            parts.append(short[key])
            value = None if value is None else text  # a name or a path, also if it looks like a number
        _put(out, parts, value, item)
    return out


def _put(tree: dict[str, Any], parts: list[str], value: Any, item: str) -> None:
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            shown = one_line(item)
            raise UserError(
                f"override {shown!r}: {one_line(part)!r} was given a value before; it cannot hold keys as well"
            )
    tree[parts[-1]] = value


def _scalar(text: str) -> Any:
    """A value as YAML reads it, except that 1e-3 is a number, as people expect, and bad YAML is text.

    Raises ValueError for a list or a table that holds what is not `plain`.
    """
    try:
        is_number = re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text)
        value = float(text) if is_number else _StrictLoader(text).get_single_data() if text else ""
    except Exception:  # as in parse_yaml
        return text
    if isinstance(value, (dict, list)):
        return plain(value)
    known = isinstance(value, (str, int)) or value is None or (isinstance(value, float) and math.isfinite(value))
    return value if known else text


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts; `over` wins. Naming another method or backbone drops the former one's own options."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            sections: dict[str, type[OpenSection]] = {"method": MethodConfig, "backbone": BackboneConfig}
            section = sections.get(key)
            if section and "name" in value and value["name"] != old.get("name", section.model_fields["name"].default):
                old = {k: v for k, v in old.items() if k in section.model_fields}
            out[key] = merge(old, value)
        else:
            out[key] = value
    return out


def load(recipe: str | None = None, overrides: Iterable[str] = (), extra: Mapping[str, Any] | None = None) -> Config:
    """Read a recipe, apply overrides, validate. Raises UserError naming the key and what would be right."""
    values = read_recipe(recipe) if recipe else {}
    over = parse_overrides(overrides)
    durations = {"steps", "epochs", "samples"}
    if durations & over.keys():  # `steps=50` replaces the recipe's `epochs`
        values = {k: v for k, v in values.items() if k not in durations}
    return validate(
        Config, merge(merge(values, over), extra or {}), where=f"recipe {recipe}" if recipe else "configuration"
    )


S = TypeVar("S", bound=BaseModel)


def validate(schema: type[S], values: Mapping[str, Any], where: str, prefix: str = "") -> S:
    """`schema(**values)`; every fault as one line with the key, the value seen, and what would be right."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(schema, fault, prefix) for fault in error.errors()]
        more = f" (and {len(lines) - 1} more: {lines[1]})" if len(lines) > 1 else ""
        raise UserError(f"{one_line(where)}: {one_line(lines[0] + more, 600)}") from None


def _explain(schema: type[BaseModel], fault: Any, prefix: str) -> str:
    loc = _path(schema, fault["loc"], unknown=fault["type"] == "extra_forbidden")
    key = prefix + ".".join(loc)
    seen = repr(fault.get("input"))
    seen = seen if len(seen) <= 80 else seen[:77] + "..."
    if fault["type"] == "extra_forbidden":
        known = sorted(_keys(schema))
        full = [k for k in known if k.split(".")[-1] == loc[-1]]
        hint = f"; did you mean {prefix}{full[0]}?" if full else suggest(".".join(loc), known, prefix)
        return f"unknown key {one_line(key)!r}{hint}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        message += suggest(fault["input"], re.findall(r"'([^']*)'", fault["ctx"]["expected"]))
    return f"{key}={seen}: {message}" if key else message


def _path(schema: type[BaseModel], loc: tuple[Any, ...], unknown: bool) -> list[str]:
    """The keys among a fault's location, which also holds indices and the names of types in a union."""
    keys: list[str] = []
    kinds, mapping = [schema], False
    for i, part in enumerate(loc):
        fields = {field.alias or name: field for kind in kinds for name, field in kind.model_fields.items()}
        if part in fields:
            keys.append(part)
            kinds, mapping = _models(fields[part].annotation), typing.get_origin(fields[part].annotation) is dict
        elif mapping:  # a key of the user's own choice
            keys.append(str(part))
            kinds, mapping = [], False
        elif unknown and i == len(loc) - 1:
            keys.append(str(part))
    return keys


def suggest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """'; did you mean X?' or an empty string."""
    if len(word) > 100:  # nobody's typing error
        return ""
    known = list(known)
    close = difflib.get_close_matches(word, known, 1, 0.6) or difflib.get_close_matches(
        word.split(".")[-1], known, 1, 0.6
    )
    return f"; did you mean {prefix}{close[0]!s}?" if close else ""


def _keys(schema: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in schema.model_fields.items():
        name = field.alias or name
        yield prefix + name
        for kind in _models(field.annotation):
            yield from _keys(kind, f"{prefix}{name}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for a in typing.get_args(annotation) for m in _models(a)]
    return []


def dump(config: BaseModel) -> str:
    """The complete configuration as YAML; `load` of it gives the same configuration."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)
