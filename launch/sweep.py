"""`--sweep KEY=A,B`: the combinations, each a configuration of its own in a folder of its own."""

import collections
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from selfsup import config as configuration
from selfsup.config import SHORT_FORMS, Config
from selfsup.errors import UserError
from selfsup.wording import one_line

from .cluster import Cluster

_MOST_RUNS = 5000
_MOST_BYTES = 100
_OPEN = ("method.", "backbone.")
"""Sections that take further keys, which their owners check."""


class Member(NamedTuple):
    """One run of a sweep: its folder's name within the sweep's, the values it differs in as overrides, and everything."""

    folder: str
    overrides: tuple[str, ...]
    config: Config


class Sweep(NamedTuple):
    """values: by key, in the order given; members: the combinations, the last key varying fastest; notes: to be said."""

    values: dict[str, list[Any]]
    members: list[Member]
    notes: list[str]


def expand(options: Sequence[str], recipe: str, overrides: Sequence[str]) -> Sweep:
    """options: KEY=A,B each. Every configuration is validated. Raises UserError that names the key or the run."""
    base = configuration.load(recipe, overrides)
    given = {_full(item.partition("=")[0]) for item in overrides}
    texts: dict[str, list[str]] = {}
    notes = []
    for option in options:
        word, values = _split(option)
        key = _resolve(word, base, option)
        if key != _full(word):
            notes.append(f"--sweep {word}: taken as {key}")
        if key in texts:
            raise UserError(f"--sweep {one_line(option)}: {key} is given twice; list its values in one --sweep")
        if key in given:
            raise UserError(f"--sweep {one_line(option)}: {key} is given as an override as well; leave one out")
        texts[key] = [_override(key, word, text) for text in values]
    count = 1
    for words in texts.values():
        count *= len(words)
    if count > _MOST_RUNS:
        raise UserError(f"--sweep: {count} combinations; at most {_MOST_RUNS} runs in one sweep")
    combinations = list(itertools.product(*texts.values()))
    configs = [configuration.load(recipe, [*overrides, *words]) for words in combinations]
    names = [_name(words) for words in combinations]
    _refuse_equal(configs, names)
    varied = {key: [_value(word) for word in words] for key, words in texts.items()}
    return Sweep(varied, [Member(*each) for each in zip(folder_names(names), combinations, configs)], notes)


def _split(option: str) -> tuple[str, list[str]]:
    """(key, texts of its values). Commas within brackets, braces or quotes divide nothing."""
    key, equals, rest = option.partition("=")
    values, depth, quote, current = [], 0, "", ""
    for at, c in enumerate(rest):
        if quote:
            quote = "" if c == quote and rest[at - 1] != "\\" else quote
        elif c in "'\"" and (depth or not current.strip()):
            quote = c
        elif c in "[{":
            depth += 1
        elif c in "]}":
            depth -= 1
        elif c == "," and depth == 0:
            values.append(current.strip())
            current = ""
            continue
        current += c
    values.append(current.strip())
    if not equals or not key or depth or quote or "" in values:
        raise UserError(
            f"--sweep {one_line(option)}: write KEY=A,B,C, as in optimizer.lr=1e-3,5e-4; lists as [0.4,1.0]"
        )
    return key, values


def _full(key: str) -> str:
    return f"{key}.{SHORT_FORMS[key]}" if key in SHORT_FORMS else key


def _resolve(word: str, base: Config, option: str) -> str:
    """The full name of a key that may be given by its last part alone."""
    known = list(dict.fromkeys([*_of_schema(Config), *_of_values(base.model_dump(mode="json", by_alias=True))]))
    key = _full(word)
    if key in known or key.startswith(_OPEN):
        return key
    if word.partition(".")[0] in Cluster.model_fields:
        raise UserError(f"--sweep {one_line(option)}: {word} is a key of the cluster, the same for all runs of a sweep")
    ends = [full for full in known if full.endswith("." + word)]
    if len(ends) > 1:
        raise UserError(f"--sweep {one_line(option)}: {word} may be {' or '.join(ends)}; write it in full")
    if not ends:
        hint = configuration.suggest(word, [*known, *(full.rpartition(".")[2] for full in known)])
        rest = "ptions that the recipe does not give are written in full, as in method.NAME"
        rest = f"{hint} O{rest}" if hint else f"; o{rest}"
        raise UserError(f"--sweep {one_line(option)}: no recipe has a key {word!r}{rest}")
    return ends[0]


def _of_schema(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        name = prefix + (field.alias or name)
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _of_schema(field.annotation, f"{name}.")


def _of_values(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Also the keys of open sections that the recipe itself has."""
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _of_values(value, f"{prefix}{name}.")


def _override(key: str, word: str, text: str) -> str:
    """A name or a path given in short may look like a number, and stays text; but for quotes it is as it is written."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if word in SHORT_FORMS and not quoted:
        return f"{key}={json.dumps(text, ensure_ascii=False)}"
    return f"{key}={text}"


def _value(override: str) -> Any:
    value: Any = configuration.parse_overrides([override], short={})
    for part in override.partition("=")[0].split("."):
        value = value[part]
    return value


def _name(words: Sequence[str]) -> str:
    return ",".join(f"{word.partition('=')[0]}={_shown(_value(word))}" for word in words)


def _shown(value: Any) -> str:
    """A list as 0.4+1.0: brackets mean something to shells, and commas divide the keys."""
    if isinstance(value, (list, dict)):
        inner = value if isinstance(value, list) else [f"{key}={_shown(each)}" for key, each in value.items()]
        return "+".join(map(_shown, inner))
    return value if isinstance(value, str) else json.dumps(value)


def folder_names(names: Sequence[str]) -> list[str]:
    """One for each, that any file system and Slurm can hold: distinct whatever the case, of 100 bytes at most.

    Where characters were replaced and two would be the same, or the end was cut off, a digest of the name follows.
    """
    plain = [re.sub(r"[^\w.,=+-]", "-", unicodedata.normalize("NFC", name)) for name in names]
    times = collections.Counter(name.casefold() for name in plain)
    found = []
    for name, safe in zip(names, plain):
        if times[safe.casefold()] > 1 or len(safe.encode()) > _MOST_BYTES:
            digest = hashlib.sha256(name.encode()).hexdigest()[:10]
            safe = safe.encode()[: _MOST_BYTES - len(digest) - 1].decode(errors="ignore") + f"-{digest}"
        found.append(safe)
    return found


def _refuse_equal(configs: Sequence[Config], names: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for config, name in zip(configs, names):
        text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
        if text in seen:
            raise UserError(f"--sweep: {one_line(seen[text])} and {one_line(name)} are the same run; leave one out")
        seen[text] = name
