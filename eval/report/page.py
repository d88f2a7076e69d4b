"""The page: its parts in order, with style, script, curves and pictures inside, and nothing that is fetched."""

import base64
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from selfsup import durable
from selfsup.errors import UserError

from . import compare, sections
from .images import pictures
from .markup import Markup, details, join, section, tag
from .series import charts
from .story import Defaults, Story, read, short_names

MOST_RUNS = 40
_PICTURE_BYTES = 8_000_000
"""Of all pictures in the page."""


def write(standings: Sequence[Mapping[str, Any]], out: Path, defaults: Defaults) -> int:
    """Write the page about these runs; returns its bytes.

    standings: of each run what `selfsup status --json` says. defaults: see `story.Defaults`. Raises UserError for more runs
    than a page can show, and for a file that cannot be written.
    """
    if len(standings) > MOST_RUNS:
        raise UserError(f"{len(standings)} runs are too many for a page; name at most {MOST_RUNS}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file such as {out / 'report.html'}")
    names = short_names([Path(each["run"]) for each in standings])
    text = render([read(each, name, defaults) for each, name in zip(standings, names)])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        durable.write_atomically(out, text)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}; name another file") from None
    return len(text.encode())


def render(stories: Sequence[Story]) -> str:
    """The whole page as text."""
    title = stories[0].name if len(stories) == 1 else f"{len(stories)} runs compared"
    body = _one(stories[0]) if len(stories) == 1 else _several(stories)
    style, script = _own("page.css"), "".join(_own(name) for name in ("drawing.js", "charts.js", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    data = json.dumps(charts(stories), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<link rel="icon" href="data:,">',
        tag("title", f"{title} · selfsup report"),
        f"<style>{style}</style>",
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>',
            *head,
            "</head>\n<body>",
            body,
            '<dialog id="large"><img alt=""></dialog>',
            f'<script type="application/json" id="curves">{data}</script>',
            f"<script>{script}</script>",
            "</body>\n</html>\n",
        ]
    )


def _own(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _one(story: Story) -> Markup:
    found, remarks = pictures(story.folder, _PICTURE_BYTES)
    story.remarks.extend(remarks)
    parts = [
        section("ran", "What ran", sections.pairs(sections.facts(story))),
        section("health", "Health", sections.health(story)),
        _curves([story]),
        section("results", "Evaluations", sections.evaluations(story)),
        section("pictures", "Pictures", sections.gallery(found)) if found else Markup(""),
        section("recipe", "Recipe", sections.recipe(story)),
        section("environment", "Environment", sections.pairs(story.environment.items()))
        if story.environment
        else Markup(""),
        section("again", "How to reproduce", sections.reproduce(story)),
    ]
    header = tag("header", tag("h1", story.name), sections.chips(story), sections.figures(story))
    return tag("main", header, *parts, _footer())


def _several(stories: Sequence[Story]) -> Markup:
    parts = [
        section("runs", "Runs", compare.overview(stories)),
        _curves(stories),
        section("results", "Evaluations", compare.results(stories)),
        section("recipe", "Settings that differ", compare.settings(stories)),
        section("each", "Each run", *(_folded(story, place, len(stories)) for place, story in enumerate(stories))),
    ]
    header = tag("header", tag("h1", f"{len(stories)} runs compared"))
    return tag("main", header, *parts, _footer())


def _folded(story: Story, place: int, count: int) -> Markup:
    found, remarks = pictures(story.folder, _PICTURE_BYTES // count)
    story.remarks.extend(remarks)
    parts = [
        ("What ran", sections.pairs(sections.facts(story))),
        ("Health", sections.health(story)),
        ("Evaluations", sections.evaluations(story)),
        ("Pictures", sections.gallery(found) if found else Markup("")),
        ("Recipe", sections.recipe(story)),
        ("Environment", sections.pairs(story.environment.items()) if story.environment else Markup("")),
        ("How to reproduce", sections.reproduce(story)),
    ]
    inner = [join([tag("h3", name), text]) for name, text in parts if text]
    dot = tag("i", kind=f"dot s{place % 8}")
    return tag(
        "div", details(join([dot, " ", story.name, " ", sections.chips(story)]), *inner), id=f"run-{place}", kind="run"
    )


def _curves(stories: Sequence[Story]) -> Markup:
    """What the script fills; marks are the steps at which problems of a run began."""
    if not any(len(story.curves) for story in stories):
        return Markup("")
    since = [each.since for each in stories[0].diagnosis.findings if each.problem] if len(stories) == 1 else []
    tools = [("in", "+", "zoom in"), ("out", "−", "zoom out"), ("left", "←", "earlier"), ("right", "→", "later")]
    buttons = [tag("button", sign, type="button", data_do=do, aria_label=what, title=what) for do, sign, what in tools]
    buttons.append(tag("button", "whole run", type="button", data_do="all"))
    hint = "Drag across a curve to zoom in on these steps; double-click for the whole run."
    return section(
        "curves-of-the-run",
        "Curves",
        tag("div", *buttons, tag("output", "", id="shown"), kind="tools"),
        tag("p", hint, kind="soft"),
        tag("div", kind="charts", id="charts", data_marks=json.dumps(since)),
        tag("noscript", "Curves are drawn by a script in this page, which is switched off here."),
    )


def _footer() -> Markup:
    made = time.strftime("%Y-%m-%d %H:%M %Z")
    return tag("footer", f"Made by selfsup report, {made}. Evaluations that came later are not in it: make it again.")
