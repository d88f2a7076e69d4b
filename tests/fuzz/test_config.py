"""Recipes and overrides that are nearly right, and those that are not at all: a configuration, or two lines that say why not."""

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from selfsup import methods, runtime
from selfsup.config import Config, _keys, dump, load, recipe_texts
from selfsup.eval.settings import VERBS, resolve
from selfsup.schedules import evaluate, optimizer_schedules, plan
from tests.fuzz.cases import Edit, edits, fuzz, told

KEYS = sorted(
    {
        *_keys(Config),
        "method.out_dim",
        "method.momentum",
        "method.freeze_last_layer",
        "backbone.depth",
        "backbone.img_size",
    }
)
EVAL_KEYS = sorted({key for kind in VERBS.values() for key in _keys(kind)})


@st.composite
def near(draw: Any, keys: list[str]) -> str:
    """A key, or what a person may type for it."""
    key = draw(st.sampled_from(keys))
    match draw(st.integers(0, 9)):
        case 0:
            at = draw(st.integers(0, len(key)))
            return key[:at] + draw(st.sampled_from(["", ".", "_", "-", " ", "é", "\n", "[0]"])) + key[at + 1 :]
        case 1:
            return draw(
                st.sampled_from([key.upper(), key.split(".")[-1], key + ".x", "x." + key, key + "." + key, "." + key])
            )
        case 2:
            return draw(st.text(max_size=10))
    return key


WORDS = ["", "null", "~", "true", "no", "0", "1", "-1", "8", "0.5", "1e-3", "1e400", "-1e400", ".nan", ".inf", "nan",
         "inf", "0x10", "0o9", "1_000", "9" * 30, "9" * 5000, "1" + "0" * 400 + ".0", "1:30:00", "2024-01-01",
         "2024-13-45", "2024-01-01 99:99:99", "10%", "10 epochs", "1 step", "9999999999999999999999 epochs",
         "1e5 steps", "-5 steps", "9" * 400 + " epochs", "1e308", "9" * 400, "[]", "{}", "[0.5]", "[0.5, 0.5, 0.5]",
         "[1, 2, 3, 4]", "{count: 2}",
         "{size: 32, count: 0}", "{a: {b: {c: 1}}}", "{1: 2}", "{[1]: 2}", "{null: 1}", "&a [*a]", "&a {x: *a}",
         "!!python/object/apply:os.getcwd []", "!!python/name:os.system", "!!set {a, b}", "!!binary aGk=",
         "!!omap [a: 1]", "!!map [1, 2]", "!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!null x", "!!str 3",
         "!x y", "*nowhere", "<<: 3", "{<<: [1]}", "{<<: {steps: 3}}", "[" * 2000, "{a: " * 500, "'", '"', "|", ">",
         "- a", "a: b: c", "%", "@", "`", "\t", "\0", "\x1b[2J", "\ud800", "\ufeff", "\u2028", "a\nb\nc\nd", "é" * 3000,
         "demo", "dino", "adamw", "lars", "cpu", "cuda", "bf16", "fp16", "vit_tiny_patch16_224",
         "vit_tiny_patch16_224.x", "no_such_model", "x:Y", ":x", "x:", ".x:Y", "os:path", "os.path:join",
         "builtins:int", "a..b:C", "torch.nn:Linear", "selfsup.methods.dino:dino"]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(WORDS), st.sampled_from(WORDS), st.text(max_size=12))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6), st.binary(max_size=4), st.dates(),
    st.datetimes(),
    st.sampled_from([0, -1, 1, 2, 8, 10**400, 1e308, math.inf, "10%", "demo", datetime.date(1, 1, 1)]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(near([k.split(".")[-1] for k in KEYS]), SCALARS), inner, max_size=4),
        st.sets(st.integers(), max_size=2),
    ),
    max_leaves=12,
)
TOKENS = st.sampled_from(
    ["\n", "\n", "\n  ", "  ", "    ", "\t", ": ", ": ", "- ", ", ", "[", "]", "{", "}", "&x ", "*x", "<<: ", "? ",
     "| ", "> ", "'", '"', "#", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n", "!!python/object/new:os.system ",
     "!!python/tuple ", "\ufeff", "\0", "\r", "\x85", *WORDS[:40], *[k.split(".")[-1] for k in KEYS]]
)  # fmt: skip


def try_recipe(recipe: str, overrides: list[str]) -> None:
    """What `selfsup train RECIPE ... --print-config` does, and what the trainer asks of a configuration at first."""
    with told():
        config = methods.complete(runtime.resolve(load(recipe, overrides)))
        again = Path(recipe).parent / "again.yaml"
        again.write_text(dump(config))
        assert load(str(again)) == config
        length = plan(config, 10_000)
        schedules = optimizer_schedules(config, length)
        for step in {0, length.steps // 2, length.steps - 1}:
            assert all(map(math.isfinite, evaluate(schedules, step).values()))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe") / "recipe.yaml"


@fuzz(400, overrides=st.lists(st.builds(lambda k, v: f"{k}={v}", near(KEYS), TEXTS), min_size=1, max_size=3))
def test_overrides(recipe: Path, overrides: list[str]) -> None:
    recipe.write_text(recipe_texts()["demo"])
    try_recipe(str(recipe), overrides)


ODD_OVERRIDES = st.sampled_from(
    ["=", "a=", "=b", "a.=1", "a..b=1", "." * 500 + "=1", "a" * 5000 + "=1", "a.b=1", "a=1", "a." * 3000 + "b=1",
     "data={path: x}", "data.path=x", "views.global=3", "views={global: {}}"]
)  # fmt: skip


@fuzz(100, overrides=st.lists(st.one_of(st.text(max_size=15), ODD_OVERRIDES), min_size=1, max_size=3))
def test_words_for_overrides(recipe: Path, overrides: list[str]) -> None:
    recipe.write_text(recipe_texts()["demo"])
    try_recipe(str(recipe), overrides)


@fuzz(250, values=st.dictionaries(near(KEYS), VALUES, max_size=4), nested=st.booleans())
def test_values(recipe: Path, values: dict[str, Any], nested: bool) -> None:
    """Of any type that YAML has, at or near keys that there are."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *above, last = key.split(".") if nested else [key]
        place = tree
        for part in above:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                break
        else:
            place[last] = value
    recipe.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    try_recipe(str(recipe), [])


HEADS = st.sampled_from(["", "steps: 5\n", "views: ", "views: {global: ", "backbone:\n  "])


@fuzz(350, tokens=st.lists(TOKENS, max_size=25), head=HEADS)
def test_text(recipe: Path, tokens: list[str], head: str) -> None:
    """Pieces of YAML in any order."""
    recipe.write_text(head + "".join(tokens), encoding="utf-8", errors="surrogatepass")
    try_recipe(str(recipe), [])


@fuzz(250, name=st.sampled_from(sorted(recipe_texts())), edit=edits())
def test_edited_recipes(recipe: Path, name: str, edit: Edit) -> None:
    recipe.write_bytes(edit(recipe_texts()[name].encode()))
    try_recipe(str(recipe), [])


FILES = st.sampled_from([b"\xff\xfes\0t\0e\0p\0", b"\xef\xbb\xbfsteps: 3", b"PK\x03\x04", b"\x89PNG"])


@fuzz(80, data=st.one_of(st.binary(max_size=60), FILES))
def test_bytes(recipe: Path, data: bytes) -> None:
    recipe.write_bytes(data)
    try_recipe(str(recipe), [])


NAMES = st.sampled_from(
    ["", ".", "/", "x.yaml", "/x.yaml", "\0", "\0.yaml", "a\nb\nc", "x" * 5000, "demo.yaml", "Demo", "/dev/null",
     "/proc/self/mem", "..", "~", "x" * 300 + ".yaml", "\ud800.yaml"]
)  # fmt: skip


@fuzz(60, name=st.one_of(st.text(max_size=12), NAMES))
def test_names_of_recipes(name: str) -> None:
    with told():
        load(name)


@fuzz(
    200,
    verb=st.sampled_from(sorted(VERBS)),
    overrides=st.lists(st.builds(lambda k, v: f"{k}={v}", near(EVAL_KEYS), TEXTS), min_size=1, max_size=3),
)
def test_overrides_of_evaluations(verb: str, overrides: list[str]) -> None:
    """What `selfsup eval VERB TARGET ... --print-config` does."""
    with told():
        dump(resolve(verb, overrides))


NAMES_OF_METHODS = st.sampled_from(
    ["builtins:int", ":x", "x:", ":", ".x:Y", "..:Y", "os:path", "torch.nn:Linear", "typing:Any", "enum:Enum", "a..b:C",
     "x\0:Y", "selfsup.methods.dino:", "selfsup.methods.dino:dino", "selfsup.methods.dino:DINO", "dino:DINO",
     "é" * 3000]
)  # fmt: skip


@fuzz(60, name=st.one_of(NAMES_OF_METHODS, st.text(max_size=8).map(lambda t: t + ":X")))
def test_names_of_methods(recipe: Path, name: str) -> None:
    recipe.write_text(yaml.safe_dump({"method": {"name": name}}))
    try_recipe(str(recipe), [])
