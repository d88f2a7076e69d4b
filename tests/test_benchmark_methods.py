"""The table of the benchmark of methods: what it says of known runs."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import methods, methods_table


def run(knn: float, curve: list[list[float]] | None = None, **more: Any) -> dict[str, Any]:
    base = {"knn": knn, "linear": knn + 0.05, "rankme": 100.0, "dimensions": 512, "img_per_s": 180.0, "peak_mb": 900}
    return {**base, "steps": 40, "seconds": 8.0, "key": "k", "curve": curve or [[0.5, knn - 0.1], [1.0, knn]], **more}


def test_interval_by_student() -> None:
    low, high = methods_table.interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert methods_table.interval([1.0]) is None


def test_time_to_an_accuracy() -> None:
    curve = [[0.25, 0.5], [0.5, 0.7], [1.0, 0.6]]
    assert methods_table.time_to(curve, 0.4) == 0.25  # reached before the first point: no earlier one is known
    assert methods_table.time_to(curve, 0.6) == pytest.approx(0.375)
    assert methods_table.time_to(curve, 0.8) is None


def test_table_and_picture(tmp_path: Path) -> None:
    runs = {
        "dino": {str(seed): run(0.80 + 0.01 * seed) for seed in range(3)},
        "lightly_dino": {str(seed): run(0.75 + 0.01 * seed) for seed in range(3)},
        "vicreg": {"0": run(0.9)},
    }
    text = methods_table.markdown(runs, 120.0)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| vicreg | 1 | 90.00 | 95.00 | 100 (512) | 180 | 900 | 40 |")
    assert rows[2].startswith("| dino | 3 | 81.00 ± 1.00 |") and rows[3].startswith(
        "| dino, lightly's example | 3 | 76.00 ± 1.00 |"
    )
    assert "| dino | +5.00 [+5.00, +5.00] | 75 % of its time |" in text
    assert methods_table.picture(runs, 120.0, tmp_path / "x.png").stat().st_size > 5000
    runs["dino"]["1"] = run(0.7)
    assert "not within the budget in 1 of 3 runs" in methods_table.markdown(runs, 120.0)


def test_rows_are_the_demos_without_labels() -> None:
    found = methods.demos()
    assert found["dino"] == "demo" and not found.keys() & {"supervised", "distill", "byot", "deit"}
    with pytest.raises(SystemExit):
        methods.main(["--only", "nosuch"])
