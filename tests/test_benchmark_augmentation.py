"""The table with and without augmentation: its statistics by hand, and that a row is what its keys say."""

import json
import math

import pytest
import torch

from benchmarks import augmentation as bench


def test_intervals_and_table() -> None:
    """Student's: of 1, 2, 3 the mean is 2 and the half width 4.303 / sqrt(3); differences are paired by seed."""
    mean, half = bench.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(bench.interval([5.0])[1])
    gains = (("none", 0), ("flips", 0.1))
    runs = [{"row": row, "seed": s, "top1": 0.5 + s / 100 + gain} for row, gain in gains for s in (0, 1, 2)]
    lines = bench.table(runs, "head").splitlines()
    assert lines[0] == "head" and lines[-2] == "| none | 3 | 51.0 ± 2.5 |  |"
    assert lines[-1] == "| flips | 3 | 61.0 ± 2.5 | +10.0 ± 0.0 |"


def test_it_runs_and_goes_on(tmp_path, monkeypatch) -> None:
    """Two rows of one step; again, nothing is trained twice; other settings are refused."""
    monkeypatch.setattr(bench, "ROWS", {"none": {}, "all": bench.ROWS["all"]})
    out = tmp_path / "a.json"
    words = ["x", "--seeds", "1", "--labels", "2", "--steps", "1", "--batch", "10", "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    threads = torch.get_num_threads()
    try:
        assert bench.main() == 0
        first = json.loads(out.read_text())
        assert [run["row"] for run in first["runs"]] == ["none", "all"] and "torch" in first["versions"]
        assert bench.main() == 0 and json.loads(out.read_text()) == first
        monkeypatch.setattr("sys.argv", [*words, "--steps", "2"])
        assert bench.main() == 2
    finally:
        torch.set_num_threads(threads)
