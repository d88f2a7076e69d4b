"""`selfsup health`: runs that really collapse, diverge and starve are named; healthy ones are not; broken logs are read."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import selfsup
from selfsup.columns import read_curves
from selfsup.diagnosis import diagnose
from selfsup.errors import UserError
from selfsup.eval import health
from selfsup.eval.runfacts import stored_config
from selfsup.judges import FLAT_STEPS
from selfsup.remedies import advice, knobs
from tests.methods.tiny import tiny_config, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


RUN = ["precision=fp32", "steps=50", "optimizer.warmup=0%", "optimizer.lr=0.003", "method.freeze_last_layer=0 steps"]
BROKEN = {
    "collapse: uniform": ["method.teacher_temp=5", "method.warmup_teacher_temp=5", "method.momentum=0.9"],
    "collapse: constant": ["method.center_momentum=1", "method.teacher_temp=0.001", "method.warmup_teacher_temp=0.001"],
    "diverges": ["optimizer=sgd", "optimizer.lr=1000", "optimizer.clip=null", "method.momentum=0.9"],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_run_that_really_goes_wrong(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Named within 50 steps, with the step, the figures, the settings behind it, and a picture."""
    config = tiny_config("dino", *RUN, f"data={images}", *BROKEN[kind])
    if kind == "diverges":
        with pytest.raises(UserError, match="not finite"):
            selfsup.train(config, out=tmp_path, quiet=True)
    else:
        selfsup.train(config, out=tmp_path, quiet=True)
    health.run(tmp_path, "completed", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == kind and found["healthy"] is False and found["state"] == "completed"
    first = found["findings"][0]
    assert first["kind"] == kind and first["problem"] and first["until"] is None and 1 < first["since"] <= 25
    assert (
        first["figures"]
        and first["advice"] == advice(kind, "dino").replace("RUN", str(tmp_path))
        and "optimizer.lr=" in first["now"]
    )
    assert Image.open(found["picture"]).size > (1000, 500)
    if kind == "diverges":
        assert any(each["kind"] == "refuses steps" and each["problem"] for each in found["findings"])
    else:
        assert first["figures"]["information"] < 0.02
    health.run(tmp_path, "completed", picture=False)
    shown = capsys.readouterr().out
    assert f"{tmp_path}: {kind} (completed" in shown and f"since step {first['since']}" in shown and "▁" in shown
    with pytest.raises(UserError, match=kind):
        health.run(tmp_path, picture=False, check=True)


SHORT = ["precision=fp32", "steps=60", "optimizer.warmup=0%"]
ALL_OVER = ["optimizer=sgd", "optimizer.clip=null"]
OTHERS = [
    # method, options, verdict, a key of its own that the advice names
    ("simclr", ["optimizer.lr=0.003"], "fine", ""),
    ("mae", ["optimizer.lr=0.003"], "fine", ""),
    ("swav", ["optimizer.lr=0.003"], "fine", ""),
    ("swav", ["optimizer.lr=0.003", "method.epsilon=50"], "collapse: uniform", "method.epsilon=50.0"),
    ("simsiam", ["optimizer=sgd", "optimizer.lr=10"], "collapse: features", "method.fix_predictor_lr=True"),
    ("mae", [*ALL_OVER, "optimizer.lr=100"], "diverges", ""),
    pytest.param("msn", ["optimizer.lr=0.01", "method.momentum=0.9", "method.mean_entropy_weight=0", "method.sinkhorn=0"],
                 "collapse: constant", "method.mean_entropy_weight=0.0", marks=pytest.mark.slow),
    pytest.param("byol", [*ALL_OVER, "optimizer.lr=1000"], "diverges", "", marks=pytest.mark.slow),
    pytest.param("simclr", [*ALL_OVER, "optimizer.lr=100"], "diverges", "method.temperature=0.1", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "kind", "key"), OTHERS)
def test_other_methods(images: Path, tmp_path: Path, method: str, options: list[str], kind: str, key: str) -> None:
    """Real runs, healthy, made to collapse, and with a learning rate of 100: the advice is in the method's own keys."""
    config = tiny_config(method, *SHORT, f"data={images}", *options)
    with contextlib.suppress(UserError):  # steps are refused until it ends
        selfsup.train(config, out=tmp_path, quiet=True)
    written = stored_config(tmp_path)
    found = diagnose(read_curves(tmp_path / "metrics.jsonl"))
    problems = [each.kind for each in found.findings if each.problem and each.kind != "starves for data"]
    assert problems[:1] == ([] if kind == "fine" else [kind])
    if kind != "fine":
        assert key in knobs(kind, written) and key.partition("=")[0] in advice(kind, method)
        shown = "\n".join(
            health.lines(tmp_path, None, read_curves(tmp_path / "metrics.jsonl"), found, written, [], None)
        )
        assert "method.teacher_temp" not in shown and "method.center_momentum" not in shown


class Slow:
    """Images that take a while; more than one epoch of the test, for the loader keeps what it has read."""

    def __len__(self) -> int:
        return 200

    def __getitem__(self, i: int) -> Any:
        time.sleep(0.03)
        return np.full((40, 40, 3), i, dtype=np.uint8), 0


def test_a_run_that_waits_for_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config("dino", "precision=fp32", "steps=14", "log_every=2", "method.freeze_last_layer=0 steps")
    selfsup.train(config, out=tmp_path, dataset=Slow(), quiet=True)
    health.run(tmp_path, "running", picture=False, as_json=True)
    found = json.loads(capsys.readouterr().out)
    starving = next(each for each in found["findings"] if each["kind"] == "starves for data")
    assert starving["problem"] and starving["figures"]["data_wait"] > 0.4 and "workers=0" in starving["now"]


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def falling(steps: int, **more: Any) -> list[dict[str, Any]]:
    """A healthy log, with noise."""
    rng = np.random.default_rng(0)
    return [
        {
            "step": s,
            "loss": 1 + 2 * np.exp(-3 * s / steps) + 0.1 * rng.standard_normal(),
            "lr": 0.001,
            "data_wait": 0.02,
        }
        | more
        for s in range(1, steps + 1)
    ]


def verdict(folder: Path) -> str:
    return diagnose(read_curves(folder / "metrics.jsonl")).verdict


def test_healthy_logs_are_fine(tmp_path: Path) -> None:
    assert verdict(write(tmp_path / "a", falling(400))) == "fine"
    # the demo recipe's beginning: up, a plateau at ln K that lasts for hundreds of steps, and only then down
    lines = [
        {"step": s, "loss": 7.6 - 1.3 * np.exp(-s / 15) - max(0, s - 350) / 200, "health": {"teacher_entropy": 0.99,
         "information": 0.03 + max(0, s - 200) / 1000, "feature_std": 0.25 + s / 2000, "kl": 0.03 + s / 4000}}
        for s in range(1, 701)
    ]  # fmt: skip
    for steps in (100, 300, 400, 550, 700):
        assert verdict(write(tmp_path / f"b{steps}", lines[:steps])) == "fine", steps


def test_a_queue_that_fills_and_the_end_of_a_schedule_are_no_fault(tmp_path: Path) -> None:
    """MoCo's loss rises while its queue fills; at the end every loss is level."""
    lines = [{"step": s, "loss": min(1 + s / 20, 7) - max(0, min(s, 600) - 120) / 200} for s in range(1, 1001)]
    assert verdict(write(tmp_path, lines)) == "fine"


def test_a_loss_that_rises(tmp_path: Path) -> None:
    """Since the step where it leaves what it was."""
    lines = falling(400)
    for line in lines[250:]:
        line["loss"] += (line["step"] - 250) / 10
    found = diagnose(read_curves(write(tmp_path, lines) / "metrics.jsonl"))
    assert found.verdict == "diverges" and 250 < found.findings[0].since < 300


def test_a_flat_loss(tmp_path: Path) -> None:
    """Unless an evaluation says that something is learned."""
    rng = np.random.default_rng(0)
    lines = [{"step": s, "loss": 2.3 + 0.05 * rng.standard_normal()} for s in range(1, FLAT_STEPS + 100)]
    assert verdict(write(tmp_path / "a", lines)) == "flat loss"
    lines[0]["eval"], lines[-1]["eval"] = {"knn_top1": 0.4}, {"knn_top1": 0.6}
    assert verdict(write(tmp_path / "b", lines)) == "fine"


def test_refused_steps(tmp_path: Path) -> None:
    lines = falling(200)
    for i in (50, 90, 120, 121):
        lines[i] |= {"loss": "nan", "refused_in_row": 1}
    found = diagnose(read_curves(write(tmp_path / "a", lines) / "metrics.jsonl"))
    assert found.verdict == "refuses steps" and found.findings[0].since == 51 and found.findings[0].until == 122
    for line in lines:
        line["loss_scale"] = 1024.0  # fp16: that is how its scale is found
    assert verdict(write(tmp_path / "b", lines)) == "fine"


def test_a_collapse_that_is_over_is_no_problem(tmp_path: Path) -> None:
    good, bad = (
        {"information": 0.5, "feature_std": 0.5, "teacher_entropy": 0.6},
        {"information": 0.001, "teacher_entropy": 0.99},
    )
    lines = [line | {"health": bad if 100 < line["step"] <= 160 else good} for line in falling(400)]
    found = diagnose(read_curves(write(tmp_path, lines) / "metrics.jsonl"))
    assert found.verdict == "fine" and (found.findings[0].kind, found.findings[0].since, found.findings[0].until) == (
        *("collapse: uniform", 101, 160),
    )


def test_old_broken_and_empty_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without keys, cut in half, with garbage, with nothing, with the state alone."""
    assert verdict(write(tmp_path / "keys", [{"step": s} for s in range(1, 50)])) == "unknown"
    cut = write(tmp_path / "cut", falling(100))
    log = cut / "metrics.jsonl"
    log.write_bytes(b"\0" * 5000 + b"\n[1]\n{}\n" + log.read_bytes()[:-20])
    assert verdict(cut) == "fine" and read_curves(log).broken == 4
    odd = [
        {"step": 1, "loss": {}, "health": 3, "eval": [1]},
        {"step": 2, "loss": "x", "lr": None, "health": {"state": 1}},
    ]
    assert verdict(write(tmp_path / "odd", odd)) == "unknown"
    told = [
        {"step": s, "loss": 1.0, "health": {"state": "collapse: constant" if s > 30 else "ok"}} for s in range(1, 60)
    ]
    assert verdict(write(tmp_path / "told", told)) == "collapse: constant"
    for name in ("keys", "cut", "odd", "told"):
        health.run(tmp_path / name)
        health.run(tmp_path / name, as_json=True)
        assert (tmp_path / name / "health.png").stat().st_size > 1000
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("workers: 1\n")
    for _ in range(2):  # without a log, and with one that has no line
        capsys.readouterr()
        health.run(empty)
        assert "unknown" in capsys.readouterr().out
        (empty / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no run folder"):
        health.run(tmp_path / "nothing")


def test_sparkline() -> None:
    assert health.sparkline(np.arange(8.0)) == "▁▂▃▄▅▆▇█" and health.sparkline(np.ones(3)) == "▁▁▁"
    assert len(health.sparkline(np.random.default_rng(0).random(1000))) == 48 and health.sparkline(np.zeros(0)) == ""


def test_the_command(tmp_path: Path) -> None:
    """Exit 0 whatever the verdict, 2 with --check; a terminal without blocks; a folder that cannot be written."""
    run = write(tmp_path / "run", falling(100))
    command = [sys.executable, "-m", "selfsup.cli", "health", str(run)]
    lines = falling(100)
    for line in lines:
        line["data_wait"] = 0.5
    write(run, lines)
    (run / ".health.png.tmp.png").mkdir()
    done = subprocess.run(
        [*command, "--check"], capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 2 and "starves for data" in done.stderr and "Traceback" not in done.stderr
    assert "health.png cannot be written" in done.stdout
