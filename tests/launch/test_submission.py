"""submission.json: it is what it was, or it is refused in words."""

import json
from pathlib import Path
from typing import Any

import pytest

from selfsup.errors import UserError
from selfsup.launch import submission
from selfsup.launch.cluster import load
from selfsup.launch.submission import Submission, Then


def example(**changes: Any) -> Submission:
    """With something that is no default everywhere."""
    overrides = [
        "partition=p",
        "setup=[a, b]",
        "env.A=1",
        "sbatch.exclusive=true",
        "time=1-00:00:00",
        "ports=2000-2100",
    ]
    values: dict[str, Any] = {
        "kind": "slurm",
        "job": "12",
        "cluster": load("slurm", [*overrides, "evaluation.time=60", "evaluation.signal_before_s=30"]),
        "cluster_name": "größer.yaml",
        "recipe": "demo",
        "overrides": ("seed=3",),
        "runs": ("seed=0", "seed=1"),
        "sweep": {"seed": [0, 1], "views.global.scale": [[0.4, 1.0]]},
        "then": (Then(task="knn", overrides=("k=10,20",), job="13"), Then(task="linear")),
        "table": "14",
        "submitted": "2026-01-31T12:00:00+00:00",
        "selfsup": "0.1.0",
        "code_sha256": "0" * 64,
        "cwd": "/home/größer 走る",
    }
    return Submission(**{**values, **changes})


def test_round_trip(tmp_path: Path):
    assert submission.read(tmp_path) is None and submission.read(tmp_path / "nowhere") is None
    submission.write(tmp_path, example())
    assert submission.read(tmp_path) == example()
    submission.write(tmp_path, example(job=None, slurm_conf="/etc/slurm.conf"))
    assert submission.read(tmp_path) == example(job=None, slurm_conf="/etc/slurm.conf")
    assert [path.name for path in (tmp_path / "job").iterdir()] == ["submission.json"]
    read = submission.read(tmp_path)
    assert read is not None and read.cluster.for_evaluation().time == 60


def test_the_file_is_plain(tmp_path: Path):
    """As other programs read it."""
    submission.write(tmp_path, example())
    values = json.loads(submission.path(tmp_path).read_text())
    assert (values["format"], values["job"], values["runs"]) == (1, "12", ["seed=0", "seed=1"])
    assert values["then"][0] == {"task": "knn", "overrides": ["k=10,20"], "job": "13"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "expected an object, seen list"),
        ("{}", "kind"),
        ('{"format": 2}', "format=2"),
        ('{"whatever": 2}', "'whatever'"),
    ],
)
def test_refusals(text: str, expected: str, tmp_path: Path):
    submission.path(tmp_path).parent.mkdir()
    submission.path(tmp_path).write_text(text)
    with pytest.raises(UserError) as caught:
        submission.read(tmp_path)
    assert expected in str(caught.value) and str(submission.path(tmp_path)) in str(caught.value)


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        submission.write(tmp_path / "file", example())
