"""The figures of distillation: what is run, what is not run again, and what the table says of it."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import distill, distill_table
from benchmarks.distill_rows import BASE, BATCH, GROUPS, ROWS, Row
from selfsup import methods
from selfsup.config import load

BY_NAME = {row.name: row for row in ROWS}


def run_of(*values: float, **classifiers: float) -> dict[str, dict[str, Any]]:
    """Seeds 0, 1, ... with these accuracies."""
    return {
        str(i): {"top1": v, "classifiers": {"main": v, **classifiers}, "seconds": 10.0, "key": "k"}
        for i, v in enumerate(values)
    }


def line(name: str, runs: dict[str, Any]) -> distill_table.Line:
    return next(found for found in distill_table.lines(runs) if found.name == name)


def test_gain_is_paired_and_judged_by_the_seeds_spread() -> None:
    runs = {"student": run_of(0.80, 0.82, 0.81), "kd": run_of(0.83, 0.85, 0.84), "kd_hint": run_of(0.831, 0.846, 0.842)}
    found = line("kd", runs)
    assert (
        found.mean == pytest.approx(0.84)
        and found.gain == pytest.approx(0.03)
        and found.gains == pytest.approx((0.03,) * 3)
    )
    assert found.spread == pytest.approx(0.01) and found.verdict == "gain" and found.against == "student"
    assert line("kd_hint", runs).against == "kd" and line("kd_hint", runs).verdict == "within the seeds' spread"
    lower = {**runs, "kd": run_of(0.70, 0.71, 0.72)}
    assert line("kd", lower).verdict == "loss" and line("kd", lower).gain == pytest.approx(-0.1)
    assert line("student", runs).gain is None and line("student", runs).verdict == ""


def test_only_seeds_that_both_have_are_compared() -> None:
    runs = {"student": run_of(0.8, 0.9), "kd": {k: v for k, v in run_of(0.0, 0.95, 0.99).items() if k != "0"}}
    found = line("kd", runs)
    assert found.gains == pytest.approx((0.05,)) and found.verdict == "one seed says nothing"
    assert found.values == pytest.approx((0.95, 0.99))
    alone = line("kd", {"kd": runs["kd"]})
    assert alone.gain is None and alone.against is None


def test_exits_have_lines_of_their_own() -> None:
    byot = {
        str(s): {
            "top1": 0.8 + s / 100,
            "classifiers": {"exit2": 0.8 + s / 100, "exit1": 0.7},
            "seconds": 1.0,
            "key": "k",
        }
        for s in range(3)
    }
    names = [found.name for found in distill_table.lines({"student": run_of(0.7, 0.7, 0.7), "byot": byot})]
    assert names == ["student", "byot", "byot: exit1", "byot: exit2"]


def test_tables_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {"student": run_of(0.8, 0.81), "kd": run_of(0.83, 0.84), "plain": run_of(0.6, 0.7)}
    text = distill_table.markdown(runs, {"data": "demo", "budget": "10"})
    assert "| kd |" in text and "+3.00" in text and GROUPS["tricks"] in text and GROUPS["deit"] not in text
    assert text.count("\n| ") == 3 + 2  # rows and headers
    distill_table.show(runs, {"data": "demo"})
    assert "kd" in capsys.readouterr().out
    path = distill_table.picture(runs, tmp_path / "out" / "a.png")
    assert path is not None and path.stat().st_size > 5000
    assert distill_table.picture({}, tmp_path / "b.png") is None


def test_rows_are_well_formed() -> None:
    assert len(BY_NAME) == len(ROWS) and {row.group for row in ROWS} == set(GROUPS)
    seen: set[str] = set()
    for row in ROWS:
        assert row.against is None or row.against in seen, f"{row.name} comes before what it is compared with"
        assert row.teacher is None or BY_NAME[row.teacher].group == "teachers"
        assert row.times == 1.0 or row.group == "teachers", (
            f"{row.name} has another budget than what it is compared with"
        )
        seen.add(row.name)
    tricks = [row for row in ROWS if row.group == "tricks"]
    assert [row.against for row in tricks if row.name == "all_tricks"] == ["plain"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_a_configuration(row: Row, tmp_path: Path) -> None:
    """Schema and options of the method accept it, and it is as large as it says."""
    recipe = tmp_path / "base.yaml"
    recipe.write_text("# base\n" + json.dumps(BASE))
    lab = distill.Lab(tmp_path, tmp_path / "x.json", {"data": "demo", "budget": "100"}, "demo", "demo:val")
    steps = distill._steps(lab, row, 0)
    config = methods.complete(load(str(recipe), distill._overrides(lab, row, 3, steps)))
    assert config.seed == 3 and config.steps == steps and config.data.path == "demo"
    assert config.steps * config.global_batch == 100 * BATCH * row.times
    assert (config.teacher.path is not None) == (row.teacher is not None)


class Fake:
    """Stands in for the `selfsup` command; `accuracy` by row."""

    def __init__(self, accuracy: dict[str, float]) -> None:
        self.accuracy, self.calls, self.lock = accuracy, [], threading.Lock()

    def __call__(self, run: Path, *arguments: str) -> float:
        name = run.name.rpartition("_seed")[0]
        with self.lock:
            self.calls.append((arguments[0], name))
        if name not in self.accuracy:
            raise distill.forks.Failed("no such row")
        if any("teacher.path" in a for a in arguments):
            teacher = next(a.partition("=")[2] for a in arguments if a.startswith("teacher.path"))
            assert Path(teacher).is_dir(), "the teacher comes first"
        (run / "eval").mkdir(parents=True)
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5, "img_per_s": 256.0}\n')
        top1 = self.accuracy[name]
        found = {"metrics": {"top1": top1}, "settings": [{"classifier": "head", "top1": top1}]}
        (run / "eval" / "classify.json").write_text(json.dumps(found))
        return 12.34


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(run the benchmark, the fake command it calls, its JSON)."""
    fake = Fake({"teacher": 0.9, "student": 0.8, "kd": 0.85, "vit": 0.7})
    monkeypatch.setattr(distill, "_selfsup", fake)
    file = tmp_path / "out.json"

    def call(*arguments: str) -> int:
        common = ["--data", "demo", "--budget", "10", "--work", str(tmp_path / "work"), "--json", str(file)]
        return distill.main([*common, *arguments])

    return call, fake, file


def test_what_has_run_is_not_run_again(command, monkeypatch: pytest.MonkeyPatch) -> None:
    call, fake, file = command
    assert call("--only", "kd", "--seeds", "0") == 1  # the other rows of the group fail
    assert json.loads(file.read_text())["runs"].keys() == {"teacher", "student", "kd"}
    fake.calls.clear()
    assert call("--only", "student", "--seeds", "0,1") == 0
    assert fake.calls == [("train", "student")]  # seed 1 alone
    stored = json.loads(file.read_text())
    assert sorted(stored["runs"]["student"]) == ["0", "1"] and "kd" in stored["runs"]
    assert file.with_suffix(".md").read_text().startswith("data demo, budget 10")
    assert file.with_suffix(".png").stat().st_size > 5000
    assert stored["runs"]["kd"]["0"]["top1"] == 0.85 and stored["runs"]["kd"]["0"]["steps"] == 10

    fake.calls.clear()
    assert call("--only", "student", "--seeds", "0", "--budget", "20") == 0  # another budget: measured again
    assert fake.calls == [("train", "student")]
    assert json.loads(file.read_text())["runs"].keys() == {"student"}


def test_a_row_that_changed_is_measured_again_with_what_it_teaches(command, monkeypatch: pytest.MonkeyPatch) -> None:
    call, fake, file = command
    kd = [row if row.name != "teacher" else Row("teacher", "teachers", "", {"backbone.channels": [8]}) for row in ROWS]
    assert call("--only", "teacher,student", "--seeds", "0") == 0
    before = json.loads(file.read_text())["runs"]
    monkeypatch.setattr(distill, "ROWS", kd)
    fake.calls.clear()
    assert call("--only", "teacher,student", "--seeds", "0") == 0
    assert {name for _, name in fake.calls} == {"teacher"}
    after = json.loads(file.read_text())["runs"]
    assert after["student"] == before["student"] and after["teacher"]["0"]["key"] != before["teacher"]["0"]["key"]


def test_teachers_come_first_and_once() -> None:
    first, rest = distill.plan(distill.choose("kd"), [0, 1])
    assert [(row.name, seed) for row, seed in first] == [("teacher", 0)]
    assert ("student", 1) in [(row.name, seed) for row, seed in rest] and all(row.name != "teacher" for row, _ in rest)


def test_rows_bring_what_they_are_compared_with() -> None:
    assert next(row.name for row in distill.choose("byot")) == "student"
    assert [row.name for row in distill.choose("kd_hint")] == ["student", "kd", "kd_hint"]
    assert [row.name for row in distill.choose(None)] == [row.name for row in ROWS]
    with pytest.raises(SystemExit, match="nosuch"):
        distill.choose("nosuch")


def test_a_budget_in_seconds_is_reckoned_from_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def calibrate(run: Path, *arguments: str) -> None:
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text('{"img_per_s": 256.0}\n')

    monkeypatch.setattr(distill, "_selfsup", calibrate)
    lab = distill.Lab(tmp_path, tmp_path / "x.json", {"data": "demo", "budget": "60s"}, "demo", "demo:val")
    assert distill._steps(lab, BY_NAME["student"], 0) == 60 * 256 / BATCH
    assert distill._steps(lab, BY_NAME["plain"], 0) == 60 * 256 / 64


@pytest.mark.parametrize(
    "wrong", [["--budget", "fast"], ["--budget", "0"], ["--seeds", "a"], ["--jobs", "0"], ["--data", "x"]]
)
def test_bad_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        distill.main(wrong)
    assert stopped.value.code == 2
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_from_end_to_end(tmp_path: Path) -> None:
    """Two rows and their teacher, a few steps each, in processes."""
    rows = [row for row in ROWS if row.name in ("teacher", "student", "kd", "byot")]
    lab = distill.Lab(
        tmp_path / "work", tmp_path / "out.json", {"data": "demo", "budget": "6"}, "demo", "demo:val", jobs=1
    )
    lab.work.mkdir()
    assert distill.work(lab, rows, [0]) == []
    found = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert set(found["byot"]["0"]["classifiers"]) == {"exit1", "exit2", "exit3", "exit4", "ensemble"}
    assert all(0 <= found[name]["0"]["top1"] <= 1 and found[name]["0"]["seconds"] > 0 for name in found)
