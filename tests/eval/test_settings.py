"""Keys of the verbs, and result files."""

import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from selfsup.errors import UserError
from selfsup.eval import results
from selfsup.eval.settings import resolve


def test_forms_of_lists():
    assert resolve("knn", ["k=5"]).k == (5,)
    assert resolve("knn", ["k=5,7"]).k == resolve("knn", ["k=[5, 7]"]).k == (5, 7)
    assert resolve("linear", ["lr=1e-3,0.1", "layer=-1,last4,2"]).layer == (-1, "last4", 2)
    assert resolve("linear", ["pooling=cls,cls+patchmean"]).pooling == ("cls", "cls+patchmean")
    assert resolve("knn", ["data=x", "data.val=y"]).data.model_dump(exclude_none=True) == {"path": "x", "val": "y"}


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("knn", ["temprature=1"], "did you mean temperature"),
        ("knn", ["k=0"], "k=.*greater than 0"),
        ("knn", ["k=abc"], "k="),
        ("knn", ["k=[]"], "k="),
        ("knn", ["temperature=0"], "temperature"),
        ("knn", ["pooling=mean"], "pooling='mean'"),
        ("knn", ["layer=first"], "last4"),
        ("knn", ["data=a", "eval.train=b"], "not both"),
        ("knn", ["data.val=a", "eval.val=b"], "not both"),
        ("knn", ["size=32", "resize=16"], "resize=16 is smaller"),
        ("linear", ["holdout=1"], "holdout"),
        ("linear", ["k=20"], "unknown key 'k'"),
        ("linear", ["lr=0"], "lr"),
    ],
)
def test_refused(verb: str, words: list[str], message: str):
    with pytest.raises(UserError, match=message) as caught:
        resolve(verb, words)
    assert len(str(caught.value).splitlines()) <= 2


EXAMPLE = {
    "task": "knn",
    "target": {"name": "a[b]", "kind": "run", "run": "x"},
    "metrics": {"top1": 0.8312},
    "protocol": {"k": 20, "top1_interval_95": [0.81, 0.85], "split": "as given", "unlabelled_left_out": {"train": 1}},
    "settings": [{"k": 20, "top1": 0.8312}, {"k": 10, "top1": 0.82}],
}


def test_written_whole_and_readable(tmp_path: Path):
    path = tmp_path / "new" / "knn.json"
    results.write(EXAMPLE, path)
    assert results.read(path) == EXAMPLE and [p.name for p in path.parent.iterdir()] == ["knn.json"]
    results.write({**EXAMPLE, "task": "linear"}, path)
    assert results.read(path)["task"] == "linear"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    with pytest.raises(ValueError):
        results.write({**EXAMPLE, "metrics": {"top1": float("nan")}}, path)
    assert results.read(path)["task"] == "linear"


def test_what_is_no_result(tmp_path: Path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text(json.dumps({"task": "knn"}))
    for name in ("a.json", "b.json", "missing.json"):
        with pytest.raises(UserError, match="not a result file"):
            results.read(tmp_path / name)


def test_destinations(tmp_path: Path):
    results.check_destination(None)
    results.check_destination(tmp_path / "x" / "y.json")
    with pytest.raises(UserError, match="is a folder"):
        results.check_destination(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        results.check_destination(tmp_path / "file" / "y.json")
    with pytest.raises(UserError, match="cannot be written"):
        results.write(EXAMPLE, tmp_path / "file" / "y.json")


def test_table_shows_figures_and_intervals():
    console = Console(width=120, record=True, file=io.StringIO())
    results.show(EXAMPLE, Path("out.json"), console)
    results.show({}, None, console)
    text = console.export_text()
    for part in ("a[b]", "83.1", "81.0–85.0", "82.00", "out.json", "unlabelled_left_out: {'train': 1}"):
        assert part in text, part
    both = results.table([EXAMPLE, {**EXAMPLE, "task": "linear"}, {**EXAMPLE, "target": {"name": "pixels"}}])
    assert both.row_count == 2 and len(both.columns) == 3


@pytest.mark.parametrize(
    ("accuracy", "count", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0), (0.0, 10, 0.0, 0.2775)]
)
def test_interval_is_wilson_s(accuracy: float, count: int, low: float, high: float):
    assert results.interval(accuracy, count) == pytest.approx([low, high], abs=1e-4)
