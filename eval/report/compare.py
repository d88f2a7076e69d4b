"""The parts of the page that set several runs side by side."""

from collections.abc import Sequence
from typing import Any

from selfsup.log import duration

from .markup import Cell, Markup, join, number, plain, table, tag
from .sections import chips, is_share
from .story import Story

_LOWER_IS_BETTER = ("loss", "nll", "ece", "brier", "error", "rmse", "seconds")


def overview(stories: Sequence[Story]) -> Markup:
    """A row for each run."""
    rows = []
    for place, story in enumerate(stories):
        metrics = story.standing.get("metrics") or {}
        top = next((metrics[key] for key in ("top1", "classify_top1", "knn_top1") if key in metrics), None)
        _, losses = story.curves.known("loss")
        _, speeds = story.curves.known("img_per_s")
        rows.append(
            (
                named(story, place),
                chips(story),
                plain(story.setting("method.name", "unknown")),
                plain(story.setting("backbone.name", "unknown")),
                number(int(story.standing.get("step", 0))),
                number(top, percent=True) if top is not None else Cell("–"),
                number(float(losses[-1])) if len(losses) else Cell("–"),
                Cell(f"{float(sorted(speeds)[len(speeds) // 2]):,.0f}", float(speeds.mean()))
                if len(speeds)
                else Cell("–"),
                Cell(duration(story.seconds), story.seconds) if story.seconds is not None else Cell("–"),
                story.standing.get("host") or "unknown",
            )
        )
    columns = ("run", "state", "method", "backbone", "step", "top-1, %", "loss", "img/s", "duration", "host")
    return table(columns, rows)


def named(story: Story, place: int) -> Cell:
    """The run's name beside the colour of its curves."""
    return Cell(join([tag("i", kind=f"dot s{place % 8}"), " ", tag("a", story.name, href=f"#run-{place}")]))


def settings(stories: Sequence[Story]) -> Markup:
    """Keys of the configurations that are not the same in all runs.

    One that some runs do not have, as their method is another, is shown if a run has set it to something of its own.
    """
    flats = [story.flat for story in stories]
    chosen = {each.key for story in stories for each in story.differences}
    rows = []
    for key in dict.fromkeys(key for each in flats for key in each):
        values = [each.get(key, "not set") for each in flats]
        everywhere = all(key in each for each in flats)
        if any(value != values[0] for value in values[1:]) and (everywhere or key in chosen):
            rows.append([Cell(key, kind="key"), *(Cell(plain(value), kind="value") for value in values)])
    if not rows:
        return tag("p", "The configurations are the same, key by key.")
    note = "Keys that only some methods have are left out where they are as by default."
    return join([table(["key", *(story.name for story in stories)], rows), tag("p", note, kind="soft")])


def results(stories: Sequence[Story]) -> Markup:
    """A row for each figure of each result file, a column for each run; the best of a row is marked."""
    names = list(dict.fromkeys(name for story in stories for name in story.results))
    rows: list[list[Any]] = []
    for name in names:
        found = [story.results[name]["metrics"] if name in story.results else {} for story in stories]
        for key in dict.fromkeys(key for metrics in found for key in metrics):
            values = [metrics.get(key) for metrics in found]
            share = is_share(values)
            best = _best(key, values)
            cells = [number(value, share) for value in values]
            cells = [cell._replace(kind="best") if i in best else cell for i, cell in enumerate(cells)]
            rows.append([name, f"{key}, %" if share else key, *cells])
    if not rows:
        return Markup("")
    note = "The best of each row is marked, where runs differ; whether by more than chance, intervals tell."
    return join([table(["result", "figure", *(story.name for story in stories)], rows), tag("p", note, kind="soft")])


def _best(key: str, values: Sequence[Any]) -> set[int]:
    """Places of the best value; none if all are the same, or there is one."""
    numbers = {i: v for i, v in enumerate(values) if isinstance(v, (int, float)) and not isinstance(v, bool)}
    if len(set(numbers.values())) < 2:
        return set()
    best = (min if any(word in key.lower() for word in _LOWER_IS_BETTER) else max)(numbers.values())
    return {i for i, v in numbers.items() if v == best}
