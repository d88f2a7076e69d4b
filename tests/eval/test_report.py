"""`selfsup report`: what is in the page, what is left out, that it stays small, and that nothing in a run folder can break it."""

import base64
import html.parser
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from selfsup import cli, cli_report
from selfsup.errors import UserError
from selfsup.eval import knn
from selfsup.eval.report import page
from selfsup.eval.report.images import pictures
from selfsup.eval.report.markup import number, table, tag
from selfsup.eval.report.series import thinned
from selfsup.eval.report.story import differences, short_names
from selfsup.launch import status


class Seen(html.parser.HTMLParser):
    """Tags with their attributes, and all text outside of script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data + "\n"

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def make(*runs: Path, out: Path) -> str:
    cli.app(["report", *map(str, runs), "--out", str(out)], standalone_mode=False)
    return out.read_text(encoding="utf-8")


def curves(text: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="curves">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def evaluated(run: Path, tmp_path_factory: pytest.TempPathFactory, train_folder: Path, val_folder: Path) -> Path:
    """A copy of the tiny run, with a k-NN result and a picture."""
    copy = tmp_path_factory.mktemp("report") / "run-a"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("eval", "pictures"))  # other tests write there
    knn.evaluate_quietly(
        str(copy), [f"eval.train={train_folder}", f"eval.val={val_folder}", "k=[5,10]"], copy / "eval/knn.json"
    )
    (copy / "pictures").mkdir()
    shutil.copy(next(val_folder.rglob("*.png")), copy / "pictures" / "one.png")
    return copy


def test_a_real_run(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = make(evaluated, out=tmp_path / "sub" / "page.html")
    assert "page.html: 1 run" in capsys.readouterr().out
    seen = Seen(text)
    assert not set(re.findall(r"https?://[^\"'` )]+", text)) - {"http://www.w3.org/2000/svg"}  # a namespace
    assert not [a for _, a in seen.tags if str(a.get("src", "data:")).split(":")[0] != "data"]
    top1 = json.loads((evaluated / "eval" / "knn.json").read_text())["metrics"]["top1"]
    for expected in (
        "completed",
        "6 of 6",
        "vit_tiny_patch16_224",
        "backbone.depth",
        "method.out_dim",
        "65536",
        f"{100 * top1:.2f}",
    ):
        assert expected in seen.text, expected
    assert "method.center_momentum" not in seen.text.split("The whole configuration")[0]  # as by default
    link = next(a for a in seen.all("a") if a.get("download"))
    assert yaml.safe_load(base64.b64decode(str(link["href"]).partition("base64,")[2])) == yaml.safe_load(
        (evaluated / "config.yaml").read_text()
    )
    assert [a["alt"] for a in seen.all("img") if a["alt"]] == ["pictures/one.png"]
    titles = [chart["title"] for chart in curves(text)]
    assert {"Loss", "Health", "Learning rate", "Throughput"} <= set(titles)
    lines = [json.loads(line) for line in (evaluated / "metrics.jsonl").read_text().splitlines()]
    loss = curves(text)[0]["series"][0]
    assert loss["x"] == [line["step"] for line in lines]
    np.testing.assert_allclose(loss["y"], [line["loss"] for line in lines], rtol=1e-4)


def test_several_runs_are_compared(evaluated: Path, tmp_path: Path) -> None:
    other = tmp_path / "run-b"
    shutil.copytree(evaluated, other, ignore=shutil.ignore_patterns("checkpoints", "backbone"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["optimizer"]["weight_decay"], config["method"]["name"] = 0.123, "simclr"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    result = json.loads((other / "eval" / "knn.json").read_text())
    result["metrics"]["top1"] = 0.99875
    (other / "eval" / "knn.json").write_text(json.dumps(result))
    text = make(evaluated, other, out=tmp_path / "page.html")
    differ = text[text.index("Settings that differ") : text.index('id="each"')]
    assert (
        "0.123" in differ and "0.04" in differ and "optimizer.weight_decay" in differ and "optimizer.clip" not in differ
    )
    assert re.search(r'<td class="n best" data-v="0.99875">99.8[78]</td>', text)
    loss = next(chart for chart in curves(text) if chart["title"] == "Loss")
    assert [one["name"] for one in loss["series"]] == ["run-a", "run-b"]
    assert {chart["title"] for chart in curves(text)} > {"Teacher entropy / ln K", "Feature spread"}
    with pytest.raises(UserError, match="at most 40"):
        page.write([{"run": str(evaluated)}] * 41, tmp_path / "x.html", lambda _: {})


def test_parts_of_the_loss_have_curves(evaluated: Path, tmp_path: Path) -> None:
    """Parts of a size share a chart; shares of right answers are percent; schedules and unreadable values are no parts."""
    folder = tmp_path / "run-p"
    shutil.copytree(evaluated, folder, ignore=shutil.ignore_patterns("checkpoints", "backbone"))
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for i, line in enumerate(lines):
        whole = dict(line)
        line.clear()
        for key, value in whole.items():
            line[key] = value
            if key == "loss":
                line |= {"cls_loss": 5.0 + i, "loss/patch": 2.0 + i, "koleo_loss": -0.01 * i - 0.02, "batch_top1": 0.25}
                line |= {"note": "text", "flag": True, "broken": "nan"}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = make(folder, out=tmp_path / "page.html")
    found = [(c["title"], c["unit"], {one["name"]: one["y"] for one in c["series"]}) for c in curves(text)]
    own = found[1:4]
    assert own[0] == ("Parts of the loss", "", {"cls": [5.0, 6, 7, 8, 9, 10], "patch": [2.0, 3, 4, 5, 6, 7]})
    assert own[1][0] == "Part of the loss: koleo" and list(own[1][2]) == ["koleo"] and own[1][2]["koleo"][0] == -0.02
    assert own[2][1:] == ("%", {"batch top1": [25.0] * 6})
    assert not {"note", "flag", "broken", "wd"} & {n for f in found for n in f[2]}
    both = curves(make(evaluated, folder, out=tmp_path / "both.html"))
    assert next(c for c in both if c["title"] == "Patch")["series"][0]["name"] == "run-p"


EVIL = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">&\''

NAME = "</script><img src=x onerror='hacked()'>"  # of a figure, which has no dot


def evil_run(folder: Path) -> Path:
    """Whatever a file says, a page shows it as text."""
    run = folder / "<b>&\"'<img src=x onerror=hacked()>"
    (run / "eval").mkdir(parents=True)
    config = {"method": {"name": EVIL, EVIL: EVIL}, "backbone": {"name": EVIL}, "data": {"path": EVIL}, EVIL: [EVIL]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"step": s, "loss": 1.0 / s, "eval": {NAME: 2.0 * s, "knn_top1": 0.5}, "health": {"state": EVIL}}
        for s in range(1, 60)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + EVIL)
    result = {
        "task": EVIL,
        "target": {"name": EVIL, "step": EVIL},
        "metrics": {EVIL: 0.5, "x": EVIL, "y": float("nan")},
    }
    result |= {"protocol": {EVIL: {EVIL: EVIL}, "versions": {EVIL: EVIL}}, "settings": [{EVIL: EVIL}, {EVIL: 1}]}
    (run / "eval" / "<i>'&\".json").write_text(json.dumps(result))
    Image.new("RGB", (30, 20), "red").save(run / "<u>&'.png")
    return run


def test_what_files_say_is_text(tmp_path: Path) -> None:
    text = make(evil_run(tmp_path), out=tmp_path / "page.html")
    seen = Seen(text)
    assert len(seen.all("script")) == 2 and seen.all("i") + seen.all("u") == []
    assert not [a for _, a in seen.tags if any(key.startswith("on") for key in a)]
    assert {a["alt"] for a in seen.all("img")} == {"", "<u>&'.png"}
    assert EVIL in seen.text and any(chart["title"] == NAME for chart in curves(text))


def test_a_folder_in_ruins(tmp_path: Path) -> None:
    """Broken files are named, and the page is made all the same."""
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text("a: [")
    (run / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": "nan"}\n\xff\xfe\x00{"step"')
    (run / "eval" / "half.json").write_text('{"task": "knn", "target": {')
    (run / "eval" / "odd.json").write_text('{"task": 1, "target": 2, "metrics": 3, "protocol": 4}')
    Image.new("RGB", (64, 64), "red").save(run / "whole.png")
    (run / "cut.png").write_bytes((run / "whole.png").read_bytes()[:60])
    (run / "page.jpg").write_text("<html>not found</html>")
    (run / "linked.png").symlink_to(run / "whole.png")
    seen = Seen(make(run, out=tmp_path / "page.html"))
    for expected in ("half.json", "odd.json", "cut.png", "page.jpg", "config.yaml cannot be read", "1 broken line"):
        assert expected in seen.text, expected
    assert {a["alt"] for a in seen.all("img")} == {"", "whole.png"}
    with pytest.raises(UserError, match="is a folder"):
        page.write([{"run": str(run)}], tmp_path, lambda _: {})
    with pytest.raises(UserError, match="no run folder"):
        make(tmp_path / "run" / "eval", out=tmp_path / "x.html")


def test_a_long_run_is_a_small_page(tmp_path: Path) -> None:
    """100,000 lines: in seconds, in a few MB, and the one step that spikes is still seen."""
    run = tmp_path / "long"
    run.mkdir()
    (run / "config.yaml").write_text("steps: 100000\n")
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(100_000, 4))
    with open(run / "metrics.jsonl", "w") as file:
        for step, (a, b, c, d) in enumerate(noise.tolist(), 1):
            loss = 77.5 if step == 54_321 else 5 + a
            file.write(
                f'{{"step":{step},"loss":{loss},"lr":{1e-3 + 1e-9 * step},"grad_norm":{4 + b},"img_per_s":{800 + c},'
                f'"data_wait":0.01,"time":{1e9 + step},"health":{{"teacher_entropy":{0.5 + d / 100},"information":{2 + c / 9},'
                f'"feature_std":{0.6 + b / 99},"kl":{1 + a / 9},"state":"ok"}}}}\n'
            )
    began = time.process_time()
    text = make(run, out=tmp_path / "page.html")
    assert time.process_time() - began < 30
    assert len(text) < 3_000_000
    loss = curves(text)[0]["series"][0]
    assert len(loss["x"]) == 1200 and max(loss["hi"]) == 77.5


def test_thinned_keeps_the_extremes() -> None:
    rng = np.random.default_rng(1)
    for count in (1201, 5000, 77_777):
        values = rng.normal(size=count)
        found = thinned(np.arange(count), values, 1200)
        assert len(found["x"]) == len(found["lo"]) == len(found["hi"]) == 1200
        assert max(found["hi"]) == pytest.approx(values.max(), rel=1e-4)
        assert min(found["lo"]) == pytest.approx(values.min(), rel=1e-4)
        assert all(a <= b + 1e-4 and b <= c + 1e-4 for a, b, c in zip(found["lo"], found["y"], found["hi"]))
        assert found["x"] == sorted(set(found["x"]))
    assert thinned(np.arange(3), np.array([0.1, 0.2, 0.3]), 1200, 100) == {
        "last": 30.0,
        "x": [0, 1, 2],
        "y": [10.0, 20.0, 30.0],
    }
    assert thinned(np.zeros(0), np.zeros(0), 10) == {}


def test_differences_from_the_defaults() -> None:
    usual = cli_report._defaults("dino")
    config = json.loads(json.dumps(usual))
    assert differences(config, cli_report._defaults) == []
    config["precision"] = "bf16"
    config["method"]["out_dim"] = 99
    config["backbone"]["depth"] = 4
    found = {each.key: each for each in differences(config, cli_report._defaults)}
    assert set(found) == {"precision", "method.out_dim", "backbone.depth"}
    assert found["precision"].resolved and not found["method.out_dim"].resolved
    assert found["method.out_dim"].default == 65536 and found["backbone.depth"].default == "not set"
    assert cli_report._defaults("no.such:Method")["optimizer"]["name"] == "adamw"


def test_pictures_fit_into_what_is_allowed(tmp_path: Path) -> None:
    """Large ones are made smaller; other runs' and those of inner folders are left alone."""
    noise = np.random.default_rng(0).integers(0, 256, (500, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for folder in ("checkpoints", "sub/deep", "other"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (9, 9)).save(tmp_path / folder / "x.png")
    (tmp_path / "other" / "config.yaml").write_text("")
    found, remarks = pictures(tmp_path, 8_000_000)
    assert {p.name for p in found} == {"noise.png", "sub/deep/x.png"} and not remarks
    noisy = next(p for p in found if p.name == "noise.png")
    assert noisy.size == (1800, 450) and noisy.address.startswith("data:image/webp;base64,")
    found, remarks = pictures(tmp_path, 10_000)
    assert [p.name for p in found] == ["sub/deep/x.png"] and "left out" in remarks[0]


def test_small_parts() -> None:
    assert tag("a", "<&>", href='"x"', hidden=True, title=None) == '<a href="&quot;x&quot;" hidden>&lt;&amp;&gt;</a>'
    assert number(0.5, percent=True) == ("50.00", 0.5, "") and number(None).text == "–" and number(True).value is None
    assert 'data-v="3"' in table(("n",), [(number(3),)]) and "<button" not in table(("n",), [], sorts=False)
    folders = [Path("/a/x/run"), Path("/a/y/run")]
    assert short_names(folders) == ["x/run", "y/run"] and short_names(folders[:1]) == ["run"]


def test_written_when_training_is_done(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, unless report=false; what goes wrong with it is a line, and the run is done."""
    words = ["train", str(run / "config.yaml"), "eval.every=null"]
    cli.app([*words, "--out", str(tmp_path / "a")], standalone_mode=False)
    seen = Seen((tmp_path / "a" / "report.html").read_text())
    assert "completed" in seen.text and "6 of 6" in seen.text
    assert status.describe([tmp_path / "a"])[0].state == "completed"
    cli.app([*words, "report=false", "--out", str(tmp_path / "b")], standalone_mode=False)
    assert not (tmp_path / "b" / "report.html").exists()
    capsys.readouterr()
    (tmp_path / "c" / "report.html").mkdir(parents=True)  # in its way
    cli.app([*words, "--out", str(tmp_path / "c")], standalone_mode=False)
    told = capsys.readouterr()
    assert "done: 6 steps" in told.out and "no report.html: UserError" in told.err
    assert os.listdir(tmp_path / "c" / "report.html") == []
