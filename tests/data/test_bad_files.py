"""The record of unreadable images and its threshold."""

import json

import pytest

from selfsup.data.bad_files import BadFileLog
from selfsup.errors import UserError


def entries(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_file_once_over_restarts(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    log = BadFileLog(path, 1.0)
    log.add([], 8)
    assert not path.exists()
    log.add([("a.jpg", "empty file (0 bytes)"), ("b\u00e9\n.jpg", "broken"), ("a.jpg", "empty file (0 bytes)")], 8)
    log.add([("a.jpg", "again")], 8)
    assert entries(path) == [
        {"file": "a.jpg", "reason": "empty file (0 bytes)"},
        {"file": "b\u00e9\n.jpg", "reason": "broken"},
    ]
    path.write_text(path.read_text(encoding="utf-8") + '{"file": "c.j', encoding="utf-8")  # cut by a crash
    again = BadFileLog(path, 1.0)
    again.add([("a.jpg", "x"), ("b\u00e9\n.jpg", "y")], 8)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_stops_above_the_threshold_and_not_before_ten(tmp_path):
    log = BadFileLog(tmp_path / "bad.jsonl", 0.05)
    for i in range(9):
        log.add([(f"{i}.jpg", "broken")], 1)  # all of them, but fewer than ten
    with pytest.raises(
        UserError, match=r"10 of 10 images.*max_bad_fraction=0\.05.*bad\.jsonl\n.*9\.jpg: broken"
    ) as caught:
        log.add([("9.jpg", "broken")], 1)
    assert len(str(caught.value).splitlines()) == 2
    assert len(entries(tmp_path / "bad.jsonl")) == 10

    few = BadFileLog(tmp_path / "few.jsonl", 0.05)
    for i in range(40):  # 1 in 25: below
        few.add([(f"{i}.jpg", "broken")], 25)
    assert few.count == 40 and few.seen == 1000
