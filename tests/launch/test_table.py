"""The table of a sweep, while it goes on and at its end."""

import json
from pathlib import Path

import pytest

from selfsup.errors import UserError
from selfsup.launch import table
from tests.launch.written_runs import ended, forgetful, happened, no_slurm, submitted, trained

__all__ = ["forgetful", "no_slurm"]


@pytest.fixture
def sweep(no_slurm: None, tmp_path: Path) -> Path:
    """Four runs: two that are done, one that failed, and one that waits."""
    values = {"optimizer.lr": [0.001, 0.0005], "seed": [0, 1]}
    names = [f"lr={lr},seed={seed}" for lr in values["optimizer.lr"] for seed in values["seed"]]
    sweep = submitted(tmp_path / "sweep", "12", runs=names, sweep=values)
    for index, name in enumerate(names):
        submitted(sweep / name, f"12_{index}", index=index, part_of="..", logs="../logs", code="../code")
    for index, knn in ((0, 0.5), (1, 0.625)):
        run = ended(trained(sweep / names[index], 100, eval={"knn_top1": knn}), f"12_{index}", 0)
        (run / "eval").mkdir()
        (run / "eval" / "linear.json").write_text(json.dumps({"metrics": {"top1": knn + 0.1}, "target": {}}))
    happened(trained(sweep / names[2], 40), "12_2", "start")
    return sweep


def test_table(sweep: Path, capsys: pytest.CaptureFixture[str]):
    table.write(sweep)
    text = (sweep / "sweep.txt").read_text()
    assert capsys.readouterr().out == text
    assert text.splitlines() == [
        "   optimizer.lr  seed  state      step     loss    knn_top1  linear_top1",
        "   0.001         0     completed  100/100  4.0000  50.00 %   60.00 %",
        "*  0.001         1     completed  100/100  4.0000  62.50 %   72.50 %",
        "   0.0005        0     failed     40/100   4.6000",
        "   0.0005        1     queued     0",
        "* highest knn_top1",
    ]
    rows = json.loads((sweep / "sweep.json").read_text())
    assert [row["values"]["optimizer.lr"] for row in rows] == [0.001, 0.001, 0.0005, 0.0005]
    assert [row["state"] for row in rows] == ["completed", "completed", "failed", "queued"]
    assert [row["best"] for row in rows] == [False, True, False, False]
    assert rows[1]["metrics"]["knn_top1"] == 0.625 and rows[1]["metrics"]["linear_top1"] == 0.725
    assert all(row["run"] == f"lr={row['values']['optimizer.lr']},seed={row['values']['seed']}" for row in rows)


def test_what_tells_classes_is_compared_where_there_is_any(sweep: Path):
    for name, top1 in (("lr=0.001,seed=0", 0.9), ("lr=0.001,seed=1", 0.8)):
        (sweep / name / "eval" / "classify.json").write_text(json.dumps({"metrics": {"top1": top1}, "target": {}}))
    table.write(sweep)
    assert [row["best"] for row in json.loads((sweep / "sweep.json").read_text())] == [True, False, False, False]
    assert (sweep / "sweep.txt").read_text().endswith("* highest classify_top1\n")


def test_without_figures(sweep: Path):
    for file in [*sweep.glob("*/metrics.jsonl"), *sweep.glob("*/eval/*.json")]:
        file.unlink()
    table.write(sweep)
    assert not any(row["best"] for row in json.loads((sweep / "sweep.json").read_text()))
    assert "*" not in (sweep / "sweep.txt").read_text()


def test_no_sweep(tmp_path: Path, no_slurm: None):
    for folder in (tmp_path, submitted(tmp_path / "run", "12")):
        with pytest.raises(UserError, match="is no sweep"):
            table.write(folder)
