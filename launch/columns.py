"""Tables for people: aligned columns of text, whose first row holds their heads."""

from collections.abc import Collection, Iterable, Sequence

from rich.cells import cell_len

_SHORTEST = 12
"""Columns of a terminal that the first column keeps, however narrow it is."""


def aligned(rows: Sequence[Sequence[str]], right: Collection[str] = ()) -> list[str]:
    """One line a row. right: heads of the columns that are aligned to the right."""
    widths = [_width(column) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = []
        for head, cell, width in zip(rows[0], row, widths):
            space = " " * (width - cell_len(cell))
            cells.append(space + cell if head in right else cell + space)
        lines.append("  ".join(cells).rstrip())
    return lines


def fitted(rows: Sequence[Sequence[str]], most: int, dispensable: Iterable[str]) -> list[Sequence[str]]:
    """In so many columns of a terminal: without those named, as far as it must be, and with the first one cut."""
    columns = [*zip(*rows)]

    def room() -> int:
        return most - sum(2 + _width(column) for column in columns[1:])

    for head in dispensable:
        if room() < _SHORTEST:
            columns = [column for column in columns if column[0] != head]
    columns[0] = tuple(_cut(text, max(room(), _SHORTEST)) for text in columns[0])
    return [*zip(*columns)]


def _width(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts))


def _cut(text: str, width: int) -> str:
    """Its end, which tells runs apart."""
    if cell_len(text) <= width:
        return text
    while cell_len(text) > width - 1:
        text = text[1:]
    return "…" + text
