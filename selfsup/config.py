"""The configuration: recipes in YAML, dotted overrides from the command line, faults explained in one line.

`load(recipe, overrides)` gives a `Config` (see `selfsup.schema`). Unknown keys are refused with a suggestion; `dump`
writes a file that is itself a recipe. Options that belong to a method are checked by `selfsup.methods` against that
method's own schema; options of a backbone are passed to timm.
"""

import difflib
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
from selfsup.schema import (
    SHORT_FORMS,
    BackboneConfig,
    CheckpointConfig,
    Config,
    Crops,
    DataConfig,
    Duration,
    EvalConfig,
    InitConfig,
    MethodConfig,
    OpenSection,
    OptimizerConfig,
    Positive,
    Probability,
    Range,
    Section,
    ViewsConfig,
    expand_short_forms,
    parse_duration,
)

__all__ = [
    "SHORT_FORMS",
    "BackboneConfig",
    "CheckpointConfig",
    "Config",
    "Crops",
    "DataConfig",
    "Duration",
    "EvalConfig",
    "InitConfig",
    "MethodConfig",
    "OpenSection",
    "OptimizerConfig",
    "Positive",
    "Probability",
    "Range",
    "Section",
    "ViewsConfig",
    "dump",
    "expand_short_forms",
    "file_names",
    "load",
    "merge",
    "parse_duration",
    "parse_overrides",
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
    if name not in built_in and not path.is_file() and Path(name).suffix not in (".yaml", ".yml"):
        raise UserError(f"no {kind} {name!r}{suggest(name, built_in)}; built in: {', '.join(built_in)}, or a YAML file")
    try:
        values = _StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{kind} {name}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{kind} {name}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        raise UserError(f"{kind} {name}: expected 'key: value' lines at the top level, seen {type(values).__name__}")
    return values


def read_recipe(recipe: str) -> dict[str, Any]:
    """A built-in recipe by name, or a YAML file, as nested dicts (short forms expanded)."""
    return expand_short_forms(read_named("recipe", recipe, resources.files("selfsup.recipes")))


def parse_overrides(overrides: Iterable[str], short: Mapping[str, str] = SHORT_FORMS) -> dict[str, Any]:
    """['data=x', 'optimizer.lr=1e-3'] -> {'data': {'path': 'x'}, 'optimizer': {'lr': 0.001}}. Later ones win."""
    out: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            raise UserError(f"override {item!r}: write KEY=VALUE, as in optimizer.lr=1e-3")
        parts = key.split(".")
        value = _scalar(text)
        if key in short and not isinstance(value, dict):
            parts.append(short[key])
            value = None if value is None else text  # a name or a path, also if it looks like a number
        _put(out, parts, value, item)
    return out


def _put(tree: dict[str, Any], parts: list[str], value: Any, item: str) -> None:
    for part in parts[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {item!r}: {part!r} was given a value before; it cannot hold keys as well")
    tree[parts[-1]] = value


def _scalar(text: str) -> Any:
    """A value as YAML reads it, except that 1e-3 is a number, as people expect, and bad YAML is text."""
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text):
        return float(text)
    try:
        value = _StrictLoader(text).get_single_data() if text else ""
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (str, int, float, bool, list, dict)) or value is None else text


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
        raise UserError(f"{where}: {lines[0]}{more}") from None


def _explain(schema: type[BaseModel], fault: Any, prefix: str) -> str:
    loc = _path(schema, fault["loc"], unknown=fault["type"] == "extra_forbidden")
    key = prefix + ".".join(loc)
    seen = repr(fault.get("input"))
    seen = seen if len(seen) <= 80 else seen[:77] + "..."
    if fault["type"] == "extra_forbidden":
        known = sorted(_keys(schema))
        full = [k for k in known if k.split(".")[-1] == loc[-1]]
        hint = f"; did you mean {prefix}{full[0]}?" if full else suggest(".".join(loc), known, prefix)
        return f"unknown key {key!r}{hint}"
    message = fault["msg"].removeprefix("Value error, ")
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
