"""The parts of the page that are about one run."""

import base64
import math
import shlex
from collections.abc import Iterable
from typing import Any

import yaml

from selfsup.diagnosis import LEAST
from selfsup.log import duration
from selfsup.remedies import knobs

from ..runfacts import advised
from .images import Picture
from .markup import Cell, Markup, details, escape, join, number, plain, table, tag
from .story import Story

_MOST_SETTINGS = 300
_CALLED = {
    "knn_top1": "k-NN top-1",
    "top1": "top-1",
    "classify_top1": "classifier top-1",
    "linear_top1": "linear top-1",
}


def chips(story: Story) -> Markup:
    """State and verdict, in a word each."""
    state, found = str(story.standing.get("state", "unknown")), story.diagnosis
    good = {"completed": "good", "running": "good", "failed": "bad", "cancelled": "bad"}.get(state, "")
    health = "bad" if found.healthy is False else "good" if found.healthy else ""
    verdict = "too early to judge" if found.healthy is None else found.verdict
    return tag(
        "span", tag("span", state, kind=f"chip {good}"), tag("span", verdict, kind=f"chip {health}"), kind="chips"
    )


def figures(story: Story) -> Markup:
    """The few numbers that matter most, large."""
    metrics = {k: v for k, v in dict(story.standing.get("metrics") or {}).items() if isinstance(v, (int, float))}
    shown = [
        (_CALLED.get(k, k.replace("_", " ")), f"{100 * v:.1f} %") for k, v in metrics.items() if k.endswith("top1")
    ][:4]
    for key, name, pattern in (("loss", "loss", "{:.4g}"), ("img_per_s", "images a second", "{:,.0f}")):
        _, values = story.curves.known(key)
        if len(values):
            value = values[-1] if key == "loss" else sorted(values.tolist())[len(values) // 2]
            shown.append((name, pattern.format(value)))
    if story.seconds is not None:
        shown.append(("trained for", duration(story.seconds)))
    return tag("div", *(tag("div", tag("b", value), tag("span", name)) for name, value in shown), kind="figures")


def facts(story: Story) -> list[tuple[str, str]]:
    """What ran: (name, value)."""
    standing, setting = story.standing, story.setting
    steps = standing.get("steps")
    out = [
        ("method", plain(setting("method.name", "unknown"))),
        ("backbone", plain(setting("backbone.name", "unknown"))),
        ("data", plain(setting("data.path", "unknown"))),
        ("steps", f"{standing.get('step', 0):,}" + (f" of {steps:,}" if isinstance(steps, int) else "")),
        ("global batch", plain(setting("global_batch", "unknown"))),
        ("state", str(standing.get("state", "unknown"))),
        ("host", str(standing.get("host") or "unknown")),
        ("restarts", str(standing.get("restarts", 0))),
    ]
    if story.seconds is not None:
        note = ", interruptions included" if standing.get("restarts") else ""
        out.append(("duration", f"{duration(story.seconds)}, first to last logged step{note}"))
    if standing.get("eta_s") is not None:
        out.append(("time left", duration(standing["eta_s"])))
    return [*out, ("folder", str(story.folder))]


def pairs(items: Iterable[tuple[str, Any]]) -> Markup:
    """Names and values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in items))


def health(story: Story) -> Markup:
    """The diagnosis, as `selfsup health` gives it, and what else was noted."""
    found, parts = story.diagnosis, []
    if not len(story.curves):
        parts.append(tag("p", "No step is logged yet."))
    elif found.healthy is None:
        parts.append(tag("p", f"Fewer than {LEAST} steps with a loss: too early to say."))
    elif found.healthy and not found.findings:
        parts.append(tag("p", "Fine: no collapse, no divergence, no refused steps, no waiting for data."))
    for each in found.findings:
        span = f"since step {each.since:,}" if each.until is None else f"steps {each.since:,} to {each.until:,}"
        words = [tag("b", each.kind), f", {span}: {each.text}."]
        if each.problem:
            now = knobs(each.kind, story.config)
            words.append(
                tag(
                    "p",
                    advised(each, story.config, story.folder) + (f" Now: {now}" if now else ""),
                    kind="soft",
                )
            )
        parts.append(tag("div", *words, kind="note bad" if each.problem else "note"))
    parts += [tag("div", remark, kind="note") for remark in story.remarks]
    return join(parts)


def recipe(story: Story) -> Markup:
    """What the configuration says that the defaults do not."""
    if not story.config:
        return tag("p", "config.yaml cannot be read.", kind="soft")
    if not story.differences:
        return tag("p", f"All as by default, with method={story.setting('method.name')}.")
    rows = [
        (
            Cell(each.key, kind="key"),
            Cell(plain(each.value), kind="value"),
            Cell(plain(each.default), kind="soft value"),
        )
        for each in sorted(story.differences, key=lambda each: each.resolved)
    ]
    found = [each.key for each in story.differences if each.resolved]
    note = f"Found out when the run began: {', '.join(found)}. " if found else ""
    note += f"Defaults are those of the configuration and of method={plain(story.setting('method.name'))}."
    return join([table(("key", "this run", "default"), rows), tag("p", note, kind="soft")])


def evaluations(story: Story) -> Markup:
    """A table for each task, with a row for each result file; how each was measured is folded away."""
    by_task: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, one in story.results.items():
        by_task.setdefault(str(one["task"]), []).append((name, one))
    parts = []
    for task, rows in by_task.items():
        metrics = list(dict.fromkeys(key for _, one in rows for key in one["metrics"]))
        share = {key: is_share(one["metrics"].get(key) for _, one in rows) for key in metrics}
        with_range = any(isinstance(one["protocol"].get("top1_interval_95"), list) for _, one in rows)
        columns = ["result", "target", "step", *(f"{key}, %" if share[key] else key for key in metrics)]
        lines = []
        for name, one in rows:
            target = one["target"]
            line: list[Any] = [name, target.get("name", ""), number(target.get("step"))]
            line += [number(one["metrics"].get(key), share[key]) for key in metrics]
            lines.append([*line, _range(one["protocol"].get("top1_interval_95"))] if with_range else line)
        parts += [tag("h3", task), table([*columns, "top-1, 95 %"] if with_range else columns, lines)]
        parts += [_measured(name, one) for name, one in rows]
    return join(parts)


def is_share(values: Iterable[Any]) -> bool:
    """Whether figures are fractions of 1, all that there are."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return bool(numbers) and all(0 <= v <= 1 for v in numbers)


def _range(value: Any) -> Cell:
    if not (isinstance(value, list) and len(value) == 2 and is_share(value)):
        return Cell("–")
    return Cell(f"{100 * value[0]:.1f} – {100 * value[1]:.1f}", value[0])


def _measured(name: str, one: dict[str, Any]) -> Markup:
    """The protocol of a result and, of several settings, what each gave."""
    protocol = {key: value for key, value in one["protocol"].items() if key != "versions"}
    inner = [pairs((str(key), _short(value)) for key, value in protocol.items())]
    settings = (
        [row for row in one.get("settings") or () if isinstance(row, dict)]
        if isinstance(one.get("settings"), list)
        else []
    )
    if len(settings) > 1:
        keys = list(dict.fromkeys(key for row in settings for key in row))
        share = {key: "top" in key and is_share(row.get(key) for row in settings) for key in keys}
        rows = [[number(row.get(key), share[key]) for key in keys] for row in settings[:_MOST_SETTINGS]]
        inner.append(table([f"{key}, %" if share[key] else key for key in keys], rows))
        if len(settings) > _MOST_SETTINGS:
            inner.append(tag("p", f"{len(settings) - _MOST_SETTINGS} further settings are in the file.", kind="soft"))
    return details(f"How {name} was measured", *inner)


def _short(value: Any, longest: int = 300) -> str:
    if isinstance(value, dict):
        text = ", ".join(f"{key}: {_short(inner, longest)}" for key, inner in value.items())
    else:
        text = plain(round(value, 6) if isinstance(value, float) and math.isfinite(value) else value)
    return text if len(text) <= longest else f"{text[:longest]} ..."


def gallery(found: Iterable[Picture]) -> Markup:
    """Pictures, which a click enlarges."""
    return tag("div", *(_figure(each) for each in found), kind="gallery")


def _figure(picture: Picture) -> Markup:
    width, height = picture.size
    image = Markup(
        f'<img src="{picture.address}" width="{width}" height="{height}" alt="{escape(picture.name)}" decoding="async">'
    )
    wide = "wide-picture" if width > 1.9 * height else None
    return tag(
        "figure", tag("button", image, type="button", kind="enlarge"), tag("figcaption", picture.name), kind=wide
    )


def reproduce(story: Story) -> Markup:
    """The command, and the configuration to give to it."""
    if not story.config:
        return tag("p", "Without config.yaml the run cannot be repeated.", kind="soft")
    text = yaml.safe_dump(story.config, sort_keys=False, allow_unicode=True)
    address = f"data:text/yaml;base64,{base64.b64encode(text.encode()).decode()}"
    again = shlex.quote(f"{story.folder}-again")
    where = shlex.quote(str(story.folder / "config.yaml"))
    commands = f"selfsup train {where} --out {again}\nselfsup submit {where} --out {again}    # the same as a job"
    told = "The configuration is complete: with the same data, versions and kind of machine it gives the same run."
    return join(
        [
            tag("p", told),
            code(commands),
            tag("p", tag("a", "config.yaml", href=address, download="config.yaml"), " of this run, from this page."),
            details("The whole configuration", code(text)),
        ]
    )


def code(text: str) -> Markup:
    """Text as it is, with a button that copies it."""
    return tag("div", tag("pre", text), tag("button", "Copy", type="button", kind="copy"), kind="code")
