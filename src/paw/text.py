"""Text that people read, made the same way everywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

WIDTH = 100  # characters of a page for the terminal


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; columns are aligned, so that it reads as plain text too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def table_within(
    rows: Sequence[Mapping[str, str]],
    width: int | None,
    spare: Sequence[str],
    columns: Sequence[str] | None = None,
) -> str:
    """Rows by their heads. Of what is wider than so many characters, columns are left out.

    Args:
        spare: the columns that may go, the first of them first.
        columns: all of the first row unless said.
    """
    kept = list(columns or rows[0])

    def made() -> str:
        return markdown_table([kept, *([row[c] for c in kept] for row in rows)])

    text = made()
    for name in spare:
        if width and len(text.partition("\n")[0]) > width and name in kept:
            kept.remove(name)
            text = made()
    return text


def figure(value: float | None, form: str) -> str:
    """A number of a table; a dash where there is none."""
    return "–" if value is None else f"{value:{form}}"


def first_line(error: BaseException) -> str:
    """What an error says, without the lines that follow; its type where it says nothing."""
    lines = (line for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__)


def file_name(name: str) -> str:
    """A name with nothing in it that a file system or a shell takes amiss."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_")


def some(names: Sequence[str]) -> str:
    """The first few names of many."""
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
