"""Early stopping: what counts as better, and runs that end, are resumed, and are looked at afterwards."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import selfsup
from selfsup import EarlyStop, UserError
from selfsup.config import dump, load
from selfsup.early_stopping import EarlyStopping
from selfsup.launch.status import describe
from selfsup.log import read_metrics
from tests.methods.tiny import cli, tiny_config, write_images


def fed(values: list[float], patience: int | None = 3, **options: Any) -> list[bool]:
    judge = EarlyStopping(patience, **options)
    return [judge.judge(10 * (i + 1), {"top1": value}) for i, value in enumerate(values)]


def test_patience_counts_evaluations_without_a_new_best() -> None:
    assert fed([0.1, 0.2, 0.2, 0.1, 0.3, 0.3, 0.29, 0.3]) == [False] * 7 + [True]
    assert fed([0.5, 0.4], patience=1) == [False, True]
    assert not any(fed([0.5] * 50, patience=None))
    assert not any(fed([i / 50 for i in range(50)], patience=1))


def test_smaller_may_be_better() -> None:
    assert fed([3.0, 2.0, 1.0, 1.0, 2.0], patience=2, mode="min") == [False, False, False, False, True]


def test_min_delta_is_what_a_new_best_must_exceed() -> None:
    """More than it, above the best and not above the last: three small gains are one of 0.75."""
    assert fed([0.0, 0.5], patience=1, min_delta=0.5) == [False, True]
    assert fed([0.0, 0.625], patience=1, min_delta=0.5) == [False, False]
    assert fed([0.0, 0.25, 0.5, 0.75, 0.8, 0.8, 0.8], patience=3, min_delta=0.5) == [False] * 6 + [True]
    assert fed([0.0, -0.25, -0.5, -0.75], patience=3, min_delta=0.5, mode="min") == [False] * 4


def test_what_is_not_finite_is_never_better() -> None:
    assert fed([math.nan, 0.1, math.inf, math.nan], patience=2) == [False, False, False, True]
    judge = EarlyStopping(1)
    assert judge.judge(5, {"top1": math.nan}) and "never finite" in judge.why(5)
    assert json.loads(json.dumps(judge.state(), allow_nan=False))["best"] is None


def test_which_figure() -> None:
    """top1 of what tells classes, before k-NN; or the one that is named, whatever else there is."""
    judge = EarlyStopping(2)
    judge.judge(1, {"loss": 1.0, "knn_top1": 0.2, "top1": 0.4})
    assert judge.metric == "top1" and judge.best == 0.4
    judge = EarlyStopping(2)
    judge.judge(1, {"knn_top1": 0.2})
    assert judge.metric == "knn_top1"
    judge.judge(2, {"top1": 0.1})  # another figure: nothing is known of it
    assert (judge.metric, judge.best, judge.waited) == ("top1", 0.1, 0)
    named = EarlyStopping(2, metric="loss", mode="min")
    named.judge(1, {"loss": 3.0, "top1": 0.1})
    assert named.metric == "loss"
    with pytest.raises(UserError, match=r"early_stop\.metric=loss.*knn_top1, top1"):
        named.judge(2, {"top1": 0.1, "knn_top1": 0.1})
    with pytest.raises(UserError, match="no figures"):
        EarlyStopping(2).judge(1, {})


def test_a_restored_one_goes_on_the_same() -> None:
    rng = random.Random(0)
    for _ in range(50):
        values = [rng.choice([0.1, 0.2, 0.3, 0.4, math.nan]) for _ in range(12)]
        whole, parts = EarlyStopping(3, min_delta=0.05), EarlyStopping(3, min_delta=0.05)
        cut = rng.randrange(12)
        for i, value in enumerate(values):
            if i == cut:
                state = json.loads(json.dumps(parts.state()))
                parts = EarlyStopping(3, min_delta=0.05)
                parts.restore(state)
            assert whole.judge(i + 1, {"top1": value}) == parts.judge(i + 1, {"top1": value})
        assert whole.state() == parts.state()


def test_what_is_known_of_another_question_is_forgotten() -> None:
    judge = EarlyStopping(3)
    for step in (1, 2):
        judge.judge(step, {"top1": 0.9, "loss": 1.0})
    for other in (EarlyStopping(3, metric="loss"), EarlyStopping(3, mode="min")):
        other.restore(judge.state())
        assert (other.best, other.waited) == (None, 0)
    more = EarlyStopping(1)  # with another patience the same evaluations count
    more.restore(judge.state())
    assert more.stopped
    judge.restore({})
    assert (judge.metric, judge.best, judge.waited, judge.stopped) == (None, None, 0, False)


@pytest.mark.parametrize("options", [{"patience": 0}, {"patience": -1}, {"patience": 1, "min_delta": -0.1}])
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="seen"):
        EarlyStopping(**options)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["early_stop.patience=3"], "eval.every"),
        (["early_stop.patience=3", "eval.every=5", "eval.as_jobs=true"], "eval.as_jobs=false"),
        (["early_stop.patience=0", "eval.every=5"], "early_stop.patience=0"),
        (["early_stop.min_delta=-1"], "early_stop.min_delta=-1"),
        (["early_stop.mode=best"], "early_stop.mode='best'"),
        (["early_stop.patiense=3"], "did you mean early_stop.patience?"),
    ],
)
def test_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, overrides)
    assert named in str(caught.value), caught.value


# ----------------------------------------------------------------------------------------------------------------- runs

ACCURACY = {2: 0.1, 4: 0.5, 6: 0.5, 8: 0.4, 10: 0.45, 12: 0.9, 14: 0.1, 16: 0.1, 18: 0.1, 20: 0.1}
"""With a patience of 2: over at step 8."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


Train = Callable[..., selfsup.train.Result]


@pytest.fixture
def train(images: Path) -> Train:
    """A run of 20 steps at most, evaluated every second one."""

    def train(out: Path, *overrides: str, **options: Any) -> selfsup.train.Result:
        given = ["steps=20", "eval.every=2", "early_stop.patience=2", "log_every=3", "precision=fp32", *overrides]
        config = tiny_config("dino", f"data={images}", *given)
        evaluate = options.pop("evaluate", lambda backbone, step: {"knn_top1": ACCURACY[step]})
        return selfsup.train(config, out=out, evaluate=evaluate, **options)

    return train


def contents(run: Path) -> dict[str, bytes]:
    """Of everything that a finished run leaves, but for what clocks and processes write."""
    kept = [p for name in ("checkpoints", "backbone") for p in sorted((run / name).rglob("*")) if p.is_file()]
    lines = read_metrics(run / "metrics.jsonl")
    clean = [{k: v for k, v in line.items() if k not in ("time", "img_per_s", "data_wait")} for line in lines]
    return {str(p.relative_to(run)): p.read_bytes() for p in kept} | {"log": json.dumps(clean).encode()}


def test_a_run_that_gets_no_better_is_done(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with the evaluation that says so: saved, exported, logged, told, and completed for `selfsup status`."""
    result = train(tmp_path / "run")
    assert result.steps == 8 and result.evaluations == {"knn_top1": 0.4}
    assert "stopped early at step 8: knn_top1 has not improved since step 4" in capsys.readouterr().err
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9)) and lines[-1]["eval"] == {"knn_top1": 0.4}
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_00000008"
    assert (tmp_path / "run" / "backbone" / "model.safetensors").is_file()
    (status,) = describe([tmp_path / "run"])
    assert (status.state, status.step, status.steps) == ("completed", 8, 20)
    assert any("stopped early at step 8" in remark for remark in status.remarks)


def test_a_resume_leaves_it_as_it_is(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", quiet=True)
    before = contents(tmp_path / "run")
    for _ in range(2):
        assert train(tmp_path / "run", resume=True).steps == 8
        assert contents(tmp_path / "run") == before
    assert "stopped early at step 8" in capsys.readouterr().err
    assert describe([tmp_path / "run"])[0].state == "completed"


@pytest.mark.parametrize("stop_at", [5, 6])
def test_a_resumed_run_stops_where_the_undisturbed_one_does(train: Train, tmp_path: Path, stop_at: int) -> None:
    """Stopped after the best, and after the first evaluation that was none; the same bytes, the judge's state among them."""
    train(tmp_path / "whole", quiet=True)
    with pytest.raises(EarlyStop):
        train(tmp_path / "parts", f"stop_at={stop_at}", quiet=True)
    assert describe([tmp_path / "parts"])[0].state == "preempted"
    assert train(tmp_path / "parts", resume=True, quiet=True).steps == 8
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    last = {k: v for k, v in whole.items() if "step_00000008" in k or "checkpoints" not in k}
    assert last and all(parts[k] == v for k, v in last.items())


def test_with_more_patience_it_goes_on(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which is announced; it is the run that had that patience from the beginning, weights and all."""
    train(tmp_path / "run", quiet=True)
    assert train(tmp_path / "run", "early_stop.patience=4", resume=True).steps == 20
    assert "early_stop.patience changes from 2 to 4" in capsys.readouterr().err
    assert train(tmp_path / "whole", "early_stop.patience=4", quiet=True).steps == 20
    run, whole = contents(tmp_path / "run"), contents(tmp_path / "whole")
    assert run["log"] == whole["log"] and run["backbone/model.safetensors"] == whole["backbone/model.safetensors"]
    assert describe([tmp_path / "run"])[0].remarks == ()


def test_a_figure_that_there_is_not(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"early_stop\.metric=accuracy.*step 2.*knn_top1"):
        train(tmp_path / "run", "early_stop.metric=accuracy", quiet=True)


def test_nothing_to_judge_is_told(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "steps=4", evaluate=None).steps == 4
    assert "early_stop stops nothing" in capsys.readouterr().err


def test_a_wrong_metric_is_refused_at_the_start(tmp_path: Path) -> None:
    """By the command line, which knows what its evaluations give: k-NN, and top-1 of each classifier. Nothing is trained."""
    labelled = write_images(tmp_path / "images", classes=4)
    for method, metric, known in (
        ("dino", "knn_top_1", "did you mean knn_top1?; the evaluations of this run give knn_top1, knn_top1_k5"),
        ("supervised", "top5", "the evaluations of this run give top1, top1_head, knn_top1, knn_top1_k5"),
    ):
        config = tiny_config(method, f"data={labelled}", "data.val=" + str(labelled), "eval.every=2", "eval.k=[3,5]")
        (tmp_path / f"{method}.yaml").write_text(dump(config))
        more = ("early_stop.patience=2", f"early_stop.metric={metric}", "--out", str(tmp_path / method))
        done = cli("train", str(tmp_path / f"{method}.yaml"), *more)
        assert done.returncode == 2 and f"early_stop.metric={metric}" in done.stderr, done.stderr
        assert known in done.stderr and "Traceback" not in done.stderr
        assert not read_metrics(tmp_path / method / "metrics.jsonl")
    done = cli(
        "train", str(tmp_path / "dino.yaml"), "early_stop.patience=1", "early_stop.metric=knn_top1_k5", *more[2:]
    )
    assert done.returncode == 0, done.stderr


def test_an_evaluation_that_does_not_tell_its_figures(train: Train, tmp_path: Path) -> None:
    """It is judged when it has given them; one that tells is refused before the first step."""

    class Telling:
        figures = ("knn_top1",)

        def __call__(self, backbone: Any, step: int) -> dict[str, float]:
            raise AssertionError("evaluated")

    with pytest.raises(UserError, match=r"early_stop\.metric=accuracy.*of this run give knn_top1;"):
        train(tmp_path / "run", "early_stop.metric=accuracy", evaluate=Telling(), quiet=True)
    with pytest.raises(UserError, match=r"early_stop\.metric=top1 or knn_top1.*of this run give loss;"):
        Telling.figures = ("loss",)
        train(tmp_path / "other", evaluate=Telling(), quiet=True)
