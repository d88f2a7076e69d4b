"""HTML in small pieces. Whatever comes from files or from people goes through `escape`, here and nowhere else."""

import html
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Markup(str):
    """Text that is HTML already."""


class Cell(NamedTuple):
    """Of a table: what is shown, and the number that it is sorted by, if it is one."""

    text: Any
    value: float | None = None
    kind: str = ""
    """A class of the style sheet."""


def escape(what: object) -> Markup:
    """Text as HTML; what is HTML stays."""
    return what if isinstance(what, Markup) else Markup(html.escape(str(what)))


def tag(name: str, *inner: object, **attributes: object) -> Markup:
    """<name attribute="...">inner</name>. `kind` is the class; data_v is data-v; None and False leave an attribute out."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = "class" if key == "kind" else key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    return Markup(f"<{' '.join(words)}>{join(inner)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Markup:
    """The parts in a row, escaped."""
    return Markup(between.join(escape(part) for part in parts))


def section(name: str, title: str, *inner: object) -> Markup:
    """A part of the page with a heading that can be linked to; nothing for nothing."""
    text = join(inner)
    return tag("section", tag("h2", title), text, id=name) if text else Markup("")


def details(summary: object, *inner: object, open_: bool = False) -> Markup:
    """What is folded away at first."""
    return tag("details", tag("summary", summary), *inner, open=open_)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Cell | object]], kind: str = "", sorts: bool = True
) -> Markup:
    """A table whose headings sort it; it scrolls by itself where it is wider than the page. Numbers stand to the right."""
    filled = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    numeric = [bool(filled) and any(row[i].value is not None for row in filled) for i in range(len(columns))]
    heads = [
        tag("th", tag("button", name, type="button") if sorts else name, kind="n" if right else None, scope="col")
        for name, right in zip(columns, numeric)
    ]
    lines = [
        tag(
            "tr",
            *(
                tag(
                    "td",
                    cell.text,
                    kind=" ".join(filter(None, ("n" if right else "", cell.kind))) or None,
                    data_v=cell.value,
                )
                for cell, right in zip(row, numeric)
            ),
        )
        for row in filled
    ]
    body = tag(
        "table",
        tag("thead", tag("tr", *heads)),
        tag("tbody", *lines),
        kind=f"{'sorts' if sorts else ''} {kind}".strip(),
    )
    return tag("div", body, kind="wide", tabindex="0", role="region", aria_label="table")


def number(value: Any, percent: bool = False) -> Cell:
    """A figure as a cell; what is no number is shown as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Cell("–" if value is None else value)
    if isinstance(value, int) and not percent:
        return Cell(f"{value:,}", value)
    return Cell(f"{100 * value:.2f}" if percent else f"{value:.4g}", float(f"{value:.8g}"))


def plain(value: Any) -> str:
    """A value of a configuration as a line of YAML would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(plain(each) for each in value)}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
