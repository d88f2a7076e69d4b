"""What `selfsup health` advises: keys that the run's method has, for every method and everything that can be wrong."""

import itertools
import re

import pytest

from selfsup import methods
from selfsup.config import dump, load, parse_yaml
from selfsup.health import PATIENCE, CollapseMonitor
from selfsup.remedies import ALWAYS, OF_METHOD, SEEN, advice, knobs, method_of

COLLAPSES = {"collapse: uniform", "collapse: constant", "collapse: features"}
PROTOTYPES = {"dino", "ibot", "dinov2", "swav", "msn", "capi"}
"""Methods that log what their teacher's output tells."""


@pytest.mark.parametrize(("kind", "name"), itertools.product(SEEN, methods.METHODS))
def test_keys_that_there_are(kind: str, name: str) -> None:
    """Those of the method are among its options, all others in the configuration; the settings of now show them."""
    text = advice(kind, name)
    options = methods.find(name).Options.model_fields
    named = re.findall(r"\bmethod\.(\w+)", text)
    assert text and [key for key in named if key not in options] == []
    others = [key for key in re.findall(r"\b([a-z_]+(?:\.[a-z_]+)+)\b", text) if not key.startswith("method.")]
    known = parse_yaml(dump(load(None, ["data=x"])), "defaults")
    for key in others:
        part = known
        for word in key.split("."):
            part = part[word]
    values = " ".join(f"{key}=1" for key in options)
    config = {"method": {"name": name, **dict.fromkeys(options, 1)}, "optimizer": {"lr": 0.1}}
    shown = knobs(kind, config)
    assert all(f"method.{key}=1" in shown for key in named), (shown, values)


def test_every_kind_and_every_method_has_advice() -> None:
    """Of its own where its own keys help: a method with prototypes for their collapses, all for a loss that does not fall."""
    assert set(SEEN) == set(ALWAYS) == COLLAPSES | {"diverges", "flat loss", "refuses steps", "starves for data"}
    assert set(OF_METHOD["collapse: uniform"]) == set(OF_METHOD["collapse: constant"]) == PROTOTYPES
    assert set(OF_METHOD["flat loss"]) == set(methods.METHODS)
    assert all(set(own) <= set(methods.METHODS) for own in OF_METHOD.values())
    assert "method." not in " ".join(advice(kind, "package.module:Other") for kind in SEEN)
    assert (
        method_of({"method": "dino"}) == "dino" and method_of({}) is None and method_of({"method": {"name": 3}}) is None
    )


def test_the_run_itself_says_the_same() -> None:
    monitor = CollapseMonitor(grace=0)
    flat = {"information": 0.0, "teacher_entropy": 1.0}
    (kind,) = {monitor.judge(step, flat) for step in range(PATIENCE)} - {"ok"}
    assert "method.epsilon" in advice(kind, "swav") and "teacher_temp" not in advice(kind, "swav")
