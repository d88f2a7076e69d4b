"""The page in a real browser: no error, no request, nothing wider than a phone; tables sort, curves zoom, two schemes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selfsup import cli
from tests.eval.test_health import falling, write
from tests.eval.test_report import EVIL, evil_run

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Skipped where there is none, which CI counts as a failure."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with everything, two beside it compared, and one whose files are out to break the page."""
    folder = tmp_path_factory.mktemp("pages")
    for place, name in enumerate(("a-run-with-quite-a-long-name-that-a-phone-must-break", "b", "c")):
        run = folder / name
        lines = falling(2000 - 100 * place, img_per_s=900.0, grad_norm=3.0)
        for line in lines:
            line["health"] = {"teacher_entropy": 0.5, "feature_std": 0.4, "information": 1.0, "kl": 0.3, "state": "ok"}
            if line["step"] % 200 == 0:
                line["eval"] = {"knn_top1": 0.5 + line["step"] / 10_000}
        write(run, lines)
        (run / "config.yaml").write_text(
            f"steps: {2000 - 100 * place}\nmethod:\n  name: dino\ndata:\n  path: {'/long' * 40}\n"
        )
        (run / "eval").mkdir()
        for task, top1 in (("knn", 0.101), ("knn_student", 0.9), ("knn_random", 0.25)):
            target = {"name": f"runs/{name}/{task}", "kind": "run", "step": 100 if task == "knn" else None}
            result = {"task": "knn", "target": target, "metrics": {"top1": top1 + place / 100, "top5": 0.95}}
            result |= {"protocol": {"note": "x" * 500, "top1_interval_95": [top1 - 0.01, top1 + 0.01]}}
            result |= {"settings": [{"k": k, "top1": top1 / k} for k in (1, 5, 20, 100)]}
            (run / "eval" / f"{task}.json").write_text(json.dumps(result))
        noise = np.random.default_rng(place).integers(0, 256, (600, 900, 3), dtype=np.uint8)
        Image.fromarray(noise).save(run / "large.png")
        Image.fromarray(noise[:40, :400]).save(run / "eval" / "wide.jpg")
    runs = sorted(path for path in folder.iterdir())
    made = {"one": runs[:1], "three": runs, "evil": [evil_run(folder / "evil")]}
    for name, each in made.items():
        cli.app(["report", *map(str, each), "--out", str(folder / f"{name}.html")], standalone_mode=False)
    return {name: folder / f"{name}.html" for name in made}


class Opened:
    """A page, with all that it complains about and asks for."""

    def __init__(self, browser: Any, file: Path, viewport: dict[str, int], scheme: str = "light", **more: Any) -> None:
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme, **more)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: Any) -> None:
        self.context.close()

    def __call__(self, script: str) -> Any:
        return self.page.evaluate(script)

    def until(self, script: str) -> None:
        """Ask again until it is true. (Playwright's own waiting evaluates text in the page, which its policy forbids.)"""
        for _ in range(200):
            if self(script):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"never true: {script}")

    def shown(self) -> list[int]:
        """First and last step in view."""
        text = self.page.inner_text("#shown").removeprefix("steps ").replace(",", "")
        return [int(word) for word in text.split(" to ")]


@pytest.mark.parametrize("name", ["one", "three", "evil"])
def test_opens_on_a_desk_and_on_a_phone_in_both_schemes(browser: Any, pages: dict[str, Path], name: str) -> None:
    colours = {}
    for viewport in (DESK, PHONE):
        for scheme in ("light", "dark"):
            with Opened(browser, pages[name], viewport, scheme) as page:
                page("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
                page("Promise.all([...document.images].filter((i) => i.src).map((i) => i.decode()))")
                sizes = page("[...document.images].filter((i) => i.src).map((i) => [i.naturalWidth, i.clientWidth])")
                assert sizes and all(natural > 0 and shown > 0 for natural, shown in sizes)
                assert page("document.documentElement.scrollWidth") <= viewport["width"]
                charts = page("JSON.parse(document.getElementById('curves').textContent).length")
                assert (
                    charts
                    == page("document.querySelectorAll('svg').length")
                    == page("document.querySelectorAll('svg:has(.line)').length")
                )
                assert page("window.hacked") is None
                assert page.said == [] and {url.split(":")[0] for url in page.asked} <= {"file", "data"}
                style = "getComputedStyle(document.querySelector('{}')).{}"
                look = [page(style.format("body", "backgroundColor")), page(style.format("body", "color")),
                        page(style.format("section", "backgroundColor")), page(style.format(".line", "stroke"))]  # fmt: skip
                colours[scheme] = look
    assert all(a != b for a, b in zip(colours["light"], colours["dark"]))


def test_files_cannot_break_out(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["evil"], DESK) as page:
        assert EVIL in page.page.text_content("main") and page("document.scripts.length") == 2


def test_tables_sort(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["one"], DESK) as page:
        top = page.page.locator("#results table").first
        cells = "(table) => [...table.tBodies[0].rows].map((row) => row.cells[{}].textContent)"
        assert top.evaluate(cells.format(0)) == ["knn", "knn_random", "knn_student"]
        top.locator("th button", has_text="top1").click()
        assert top.evaluate(cells.format(3)) == ["90.00", "25.00", "10.10"]  # the largest first, as numbers
        assert top.locator("th").nth(3).get_attribute("aria-sort") == "descending"
        top.locator("th button", has_text="top1").press("Enter")
        assert top.evaluate(cells.format(3)) == ["10.10", "25.00", "90.00"]
        top.locator("th button", has_text="step").click()
        assert top.evaluate(cells.format(2)) == ["100", "–", "–"]
        top.locator("th button", has_text="result").click()
        assert top.evaluate(cells.format(0)) == ["knn", "knn_random", "knn_student"]
        top.locator("th button", has_text="result").click()
        assert top.evaluate(cells.format(0)) == ["knn_student", "knn_random", "knn"]


def test_curves_zoom(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["one"], DESK) as page:
        plot = page.page.locator("svg").nth(0)
        plot.scroll_into_view_if_needed()
        before = page("[...document.querySelectorAll('.line')].map((line) => line.getAttribute('d'))")
        box = plot.bounding_box()
        assert page.shown() == [0, 2000]
        y = box["y"] + 80
        page.page.mouse.move(box["x"] + 0.5 * box["width"], y)
        page.page.mouse.down()
        page.page.mouse.move(box["x"] + 0.75 * box["width"], y, steps=4)
        page.page.mouse.up()
        page.page.mouse.move(5, 5)
        first, last = page.shown()
        assert 750 < first < 1050 and 1300 < last < 1550
        after = page("[...document.querySelectorAll('.line')].map((line) => line.getAttribute('d'))")
        assert len(after) == len(before) and all(a != b for a, b in zip(before, after))  # every chart shows these steps
        labels = page(
            "[...document.querySelector('svg').querySelectorAll('text[text-anchor=middle]')].map((t) => Number(t.textContent))"
        )
        assert labels and all(first - 1 <= step <= last + 1 for step in labels)
        page.page.mouse.dblclick(box["x"] + 200, y)
        page.page.mouse.move(5, 5)
        assert page.shown() == [0, 2000]
        plot.focus()
        page.page.keyboard.press("+")
        assert page.shown() == [500, 1500]
        page.page.keyboard.press("ArrowRight")
        assert page.shown() == [1000, 2000]
        page.page.locator("[data-do=left]").click()
        assert page.shown() == [500, 1500]
        page.page.locator("[data-do=out]").click()
        assert page.shown() == [0, 2000]
        for _ in range(20):
            page.page.locator("[data-do=in]").click()
        assert page.shown() == [998, 1002] and page.said == []
        page.page.locator("[data-do=all]").click()
        assert page.shown() == [0, 2000]


def test_a_finger_zooms(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["one"], PHONE, has_touch=True, is_mobile=True) as page:
        page("document.querySelector('svg').scrollIntoView({behavior: 'instant', block: 'center'})")
        box = page.page.locator("svg").nth(0).bounding_box()
        touch = page.context.new_cdp_session(page.page)
        for kind, part in (
            ("touchStart", 0.4),
            ("touchMove", 0.5),
            ("touchMove", 0.65),
            ("touchMove", 0.8),
            ("touchEnd", None),
        ):
            points = [] if part is None else [{"x": box["x"] + part * box["width"], "y": box["y"] + 60}]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.until("/^steps [5-9]/.test(document.getElementById('shown').textContent)")
        first, last = page.shown()
        assert 500 < first < 800 and 1400 < last < 1750
        assert page("document.documentElement.scrollWidth") <= PHONE["width"]


def test_legend_reads_and_hides(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["three"], DESK) as page:
        chart = page.page.locator(".chart").nth(0)
        assert chart.locator(".line").count() == 3
        values = chart.locator(".legend b").all_inner_texts()
        chart.scroll_into_view_if_needed()
        box = chart.locator("svg").bounding_box()
        page.page.mouse.move(box["x"] + 60, box["y"] + 50)
        assert chart.locator(".legend b").all_inner_texts() != values
        assert page.page.inner_text("#shown").startswith("step ")
        page.page.mouse.move(5, 5)
        assert chart.locator(".legend b").all_inner_texts() == values
        chart.locator(".legend button").nth(1).click()
        assert chart.locator(".line").count() == 2
        assert chart.locator(".legend button").nth(1).get_attribute("aria-pressed") == "false"
        dots = page(
            "[...document.querySelectorAll('.chart')[0].querySelectorAll('.dot')].map((d) => getComputedStyle(d).color)"
        )
        assert len(set(dots)) == 3


def test_pictures_enlarge_and_links_open(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["one"], DESK) as page:
        page.page.locator(".enlarge").first.click()
        page("document.querySelector('#large img').decode()")
        assert page("document.getElementById('large').open && document.querySelector('#large img').naturalWidth") == 900
        page.page.locator("#large").click()
        assert not page("document.getElementById('large').open")
        with page.page.expect_download() as download:
            page.page.locator("a[download]").click()
        assert "name: dino" in Path(download.value.path()).read_text()
        page.page.locator(".copy").first.click()
        page.until("/Copied|Selected/.test(document.querySelector('.copy').textContent)")
        assert page.said == []
    with Opened(browser, pages["three"], DESK) as page:
        page.page.locator("#runs a").nth(2).click()
        page.until("document.querySelector('#run-2 details').open")
        assert not page("document.querySelector('#run-0 details').open")
