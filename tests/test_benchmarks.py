"""The measuring protocol itself, and one real comparison small enough for a test."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import checkpoint, present, protocol, run, step
from benchmarks.equality import compare, distance
from benchmarks.protocol import Result
from benchmarks.rows import ROWS, Row, initial_state, normalised
from benchmarks.sides import Machine
from benchmarks.targets import TARGETS, judge

ROOT = Path(__file__).resolve().parent.parent
TINY = Row(
    name="tiny",
    title="a step for tests",
    peers=("lightly",),
    backbone="vit_tiny_patch16_224",
    backbone_options={"img_size": 32, "patch_size": 8, "depth": 2},
    batch=2,
    global_size=32,
    local_size=16,
    locals=2,
    out_dim=256,
    hidden_dim=64,
    bottleneck_dim=32,
)


def test_order_is_abba_with_a_control_in_turn():
    order = "".join(protocol.interleave(4))
    assert order == "ABCCBAABCCBA"
    assert order.replace("C", "") == "ABBAABBA" and order.replace("B", "") == "ACCAACCA"
    assert "".join(protocol.interleave(3)).count("B") == 3


def test_drift_falls_on_both_sides():
    """A machine that slows down by 1 % a measurement: plain A B A B pairs would be off by that, these are not."""
    clock = iter(range(10_000))

    def timer(seconds: float):
        return lambda: seconds * (1 + 0.01 * next(clock))

    versus, control = protocol.measure({"A": timer(1.0), "B": timer(2.0), "C": timer(1.0)}, pairs=16)
    result = protocol.summarise(Result("x", "y"), versus, control)
    assert result.ratio == pytest.approx(2.0, rel=3e-3)
    assert result.aa == pytest.approx(1.0, abs=3e-3)
    assert result.low <= result.ratio <= result.high
    assert result.claim.startswith("at least 1.9")


def test_bootstrap_covers_the_median():
    """The 95 % interval of 16 noisy ratios holds the true median about 95 times of 100."""
    draw = random.Random(1)
    hits = 0
    for trial in range(200):
        values = [1.5 * draw.lognormvariate(0, 0.1) for _ in range(16)]
        low, high = protocol.bootstrap(values, resamples=400, seed=trial)
        hits += low <= 1.5 <= high
    assert 180 <= hits <= 200
    assert protocol.bootstrap([1.2] * 15) == (1.2, 1.2)


@pytest.mark.parametrize(
    ("low", "high", "aa", "pairs", "expected"),
    [
        (1.4, 1.6, 1.06, 16, "too noisy, nothing claimed"),
        (1.4, 1.6, 0.94, 16, "too noisy, nothing claimed"),
        (1.4, 1.6, 1.00, 14, "14 pairs are too few"),
        (1.4, 1.6, 1.04, 15, "at least 1.40x"),
        (0.9, 1.1, 1.00, 15, "no difference shown"),
        (1.004, 1.2, 1.00, 15, "no difference shown"),
        (1.209, 1.6, 1.00, 15, "at least 1.20x"),
        (0.7, 0.9, 1.00, 15, "slower: at most 0.90x"),
    ],
)
def test_what_may_be_claimed(low, high, aa, pairs, expected):
    assert (protocol.refusal(aa, pairs) or protocol.claim(low, high)).startswith(expected)


def test_upper_bounds_are_claimed_the_other_way_round():
    result = protocol.summarise(Result("memory", "dino"), [2.0, 2.1, 2.2], [1.0, 1.01, 0.99], at_most=True, least=3)
    assert result.ratio == pytest.approx(1 / 2.1) and result.claim == "at most 0.50x of the peer's"
    assert judge(result).met is True and result.target == "<= 0.65x"
    worse = protocol.summarise(Result("memory", "dino"), [0.8] * 3, [1.0] * 3, at_most=True, least=3)
    assert worse.claim == "more: at least 1.25x of the peer's" and judge(worse).met is False


@pytest.mark.parametrize(
    ("low", "aa", "details", "met"),
    [
        (2.01, 1.0, {}, True),
        (1.99, 1.0, {}, False),
        (2.5, 1.08, {}, None),  # too noisy to say
        (2.5, 1.0, {"clock": "cpu", "threads": 2}, None),  # CPU seconds of two threads
        (2.5, 1.0, {"clock": "cpu", "threads": 1}, True),
        (2.5, 1.0, {"data_wait": 0.08}, False),
    ],
)
def test_targets_are_judged_by_the_interval(low, aa, details, met):
    result = protocol.summarise(Result("loader", "dino"), [low] * 15, [aa] * 15)
    result.details |= details
    assert judge(result).met is met and result.target == ">= 2x"


def test_every_row_of_the_issue_has_a_target():
    rows = {(job.name, job.peer) for job in run.jobs() if job.peer != "-"}
    assert rows == set(TARGETS)


def test_unequal_steps_are_seen():
    torch.manual_seed(0)
    a = {"w": torch.randn(8, 8), "blocks.0.attn.qkv.bias": torch.randn(12)}
    assert compare(1.0, a, 1.0, {k: v.clone() for k, v in a.items()}).within("fp32")
    rounding = {k: v * (1 + 1e-7) for k, v in a.items()}
    assert compare(1.0, a, 1.0 + 1e-7, rounding).within("fp32")
    wrong = {**a, "w": a["w"] * 1.001}
    assert not compare(1.0, a, 1.0, wrong).within("fp32")
    assert compare(1.0, a, 1.0, wrong).worst_name == "w"
    assert not compare(1.0, a, 1.001, a).within("fp32")
    keys = a["blocks.0.attn.qkv.bias"].clone()
    keys[4:8] = 0  # the key third: rounding noise on both sides
    assert compare(1.0, a, 1.0, {**a, "blocks.0.attn.qkv.bias": keys}).within("fp32")
    with pytest.raises(ValueError, match="one side only"):
        compare(1.0, a, 1.0, {"w": a["w"]})


def test_bf16_must_be_as_close_to_fp32_as_the_peer():
    torch.manual_seed(0)
    exact = {"w": torch.randn(64, 64)}
    near, far = ({"w": exact["w"] + e * torch.randn(64, 64)} for e in (1e-3, 1e-2))
    assert distance(exact, exact) == pytest.approx(0, abs=1e-12)
    assert distance(near, exact) == pytest.approx(5e-7, rel=0.2)
    good = compare(1.0, near, 1.0, far)
    assert not good.within("bf16"), "not compared with fp32 yet"
    d, e = distance(near, exact), distance(far, exact)
    assert replace(good, distance=d, peer_distance=e).within("bf16")
    assert not replace(good, distance=e, peer_distance=d).within("bf16")


def test_rows_are_json_and_start_from_one_state():
    for row in ROWS:
        assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row
    first, second = initial_state(TINY), initial_state(TINY)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert first["global"].shape == (2, 2, 3, 32, 32) and first["local"].shape == (2, 2, 3, 16, 16)
    crops = normalised(first["global"])
    assert crops.dtype == torch.float32 and abs(float(crops.mean())) < 0.5 and 1 < float(crops.std()) < 1.6


@pytest.mark.slow
def test_step_against_lightly(tmp_path: Path):
    """Processes, pipes, equality of loss and gradients, counts, memory, table and picture; too few pairs to claim."""
    job = run.Job(
        "tiny", "lightly", TINY.title, 1.0, lambda machine, tick: step.Bench(machine).measure(TINY, "lightly", tick)
    )
    results = run.run([job], {}, threads=1, pairs=2)
    (result,) = results
    assert result.claim == "2 pairs are too few, nothing claimed" or result.claim.startswith("too noisy"), result
    assert result.details["equality"]["loss"] < 1e-5 and result.details["equality"]["gradient"] < 1e-5
    assert result.ratio > 0 and result.low <= result.high and result.aa > 0
    assert 0 < result.gemm_fraction < 1 and result.peak_bytes > 1e6
    assert result.details["flops"]["ours"] > 0
    assert result.details["disclosures"]
    present.table(results)
    present.picture(results, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 5000
    assert {"name", "peer", "ratio", "low", "high", "aa", "gemm_fraction", "peak_bytes"} <= result.json().keys()


def test_a_wrong_step_is_never_timed(tmp_path: Path):
    """Another learning problem on one side (a warmer teacher): refused before any timing."""
    bench = step.Bench(Machine({}, 1, 2, tmp_path))
    plain = bench.side

    def warmer(name: str, row: Row, like: str):
        return plain(name, replace(row, teacher_temp=0.06) if name == "lightly" else row, like)

    bench.side = warmer  # type: ignore[method-assign]
    result = bench.measure(TINY, "lightly")
    assert result.claim.startswith("not the same step, nothing timed") and result.ratio is None


def test_missing_peer_is_reported(tmp_path: Path):
    assert "give a clone" in str(run.missing("dino", {}))
    assert "no main_dino.py" in str(run.missing("dino", {"dino": str(tmp_path)}))
    assert run.missing("lightly", {}) is None and run.missing("-", {}) is None
    job = next(job for job in run.jobs() if job.name == "knn")
    result = run.measure(job, Machine({}, 1, 1, tmp_path), lambda share: None)
    assert result.claim.startswith("missing") and result.ratio is None
    present.table([result])
    present.picture([result], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("wrong", [["--only", "stepp"], ["--peer", "solo=/x"], ["--pairs", "0"]])
def test_bad_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        run.main(wrong)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert wrong[1] in said or "at least 1" in said


def test_runs_as_a_script():
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--help"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--peer" in done.stdout, done.stderr


def test_cost_of_saving(capsys: pytest.CaptureFixture[str]):
    """The demo with few saves: every save is counted, what is printed is what was measured, and the trainer is put back."""
    from selfsup import run as running
    from selfsup import train

    case = checkpoint.Case("demo", ("eval.every=null", "global_batch=4"), 2, 2)
    found = checkpoint.measure(case, 2, 1)
    assert 20 < found["state_mb"] < 24 and found["saves"] == 2
    assert 0 < found["blocked_ms"] < found["durable_ms"] and found["share_low"] <= found["share"] <= found["share_high"]
    assert train.Run is running.Run
    found |= checkpoint.startup(case, 1, 1)
    assert found["startup_fresh_s"] > 0
    print("\n".join(checkpoint.lines(found)))
    assert f"{found['share']:.2%} of step time" in capsys.readouterr().out
