"""How answers reach the caller: protobuf JSON, plain aligned text, or a coloured table on a terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from scheduler.cli.words import clean

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from rich.table import Table as RichTable

GAP = "  "
# Columns that may be cut in a narrow window, and how far; the last column keeps room to be read.
FLEXIBLE = frozenset({"NAME", "MODEL", "JOB"})
FLEXIBLE_WIDTH_MIN = 6
LAST_WIDTH_MIN = 24
# Colours by state word, of jobs and of GPUs; what isn't listed is plain.
STYLES = {
    "RUNNING": "green",
    "ALLOCATED": "green",
    "SUCCEEDED": "green",
    "STARTING": "cyan",
    "HANDOVER": "cyan",
    "PENDING": "yellow",
    "SUSPENDED": "yellow",
    "PREEMPTING": "magenta",
    "STOPPING": "magenta",
    "CORDONED": "yellow",
    "FOREIGN": "yellow",
    "FAILED": "red",
    "QUARANTINED": "red",
    "LOST": "red",
    "CANCELLED": "bright_black",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column's title, and whether it holds numbers, which line up at the right."""

    title: str
    right: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text; every row has a cell for each column."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()) -> Table:
    """Return a table of printable text; `right` names the columns of numbers."""
    numbers = frozenset(right)
    columns = tuple(Column(title, title in numbers) for title in titles)
    return Table(columns, tuple(tuple(clean(cell) for cell in row) for row in rows))


def print_table(shown: Table, stream: TextIO | None = None) -> None:
    """Write a table: coloured and fitted to the window on a terminal, else plain aligned text."""
    stream = stream or sys.stdout
    if stream.isatty():
        from rich.console import Console

        console = Console(file=stream, highlight=False)
        console.print(rich_table(shown, console.width, fold=True))
        return
    for line in plain_lines(shown):
        stream.write(line + "\n")


def widths(shown: Table, at_least: Sequence[int] = ()) -> list[int]:
    """Return each column's width in characters."""
    lines = (tuple(column.title for column in shown.columns), *shown.rows)
    needed = [max(len(line[i]) for line in lines) for i in range(len(shown.columns))]
    return [max(pair) for pair in zip(needed, at_least or needed, strict=True)]


def plain_lines(shown: Table, at_least: Sequence[int] = ()) -> list[str]:
    """Return a table, titles first, as aligned lines without escape codes or trailing blanks."""
    lines = (tuple(column.title for column in shown.columns), *shown.rows)
    wide = widths(shown, at_least)
    return [
        GAP.join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(line, wide, shown.columns, strict=True)
        ).rstrip()
        for line in lines
    ]


def coloured_lines(shown: Table, width: int) -> list[str]:
    """Return a table as lines with colours, a line a row, cut to the width."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=width, highlight=False)
    console.print(rich_table(shown, width, fold=False))
    return text.getvalue().splitlines()


def rich_table(shown: Table, width: int, *, fold: bool) -> RichTable:
    """Return a table that rich draws: no frame, states in colour.

    Where the window is narrow the flexible columns are cut, down to FLEXIBLE_WIDTH_MIN; the last
    column takes what is left, over several lines with `fold`.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=None, pad_edge=False, padding=(0, len(GAP), 0, 0), header_style="bold")
    last = len(shown.columns) - 1
    for i, (column, room) in enumerate(zip(shown.columns, fitted_widths(shown, width), strict=True)):
        folds = fold and i == last
        drawn.add_column(
            column.title,
            justify="right" if column.right else "left",
            width=None if folds else room,
            no_wrap=not folds,
            overflow="fold" if folds else "ellipsis",
        )
    for row in shown.rows:
        # Text, not str: a job's name is never markup.
        drawn.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    return drawn


def fitted_widths(shown: Table, width: int) -> list[int]:
    """Return each column's width in a window: flexible columns give way, the widest first."""
    fitted = widths(shown)
    flexible = [i for i, column in enumerate(shown.columns[:-1]) if column.title in FLEXIBLE]
    gaps = len(GAP) * (len(fitted) - 1)
    last_min = min(fitted[-1], LAST_WIDTH_MIN)
    while sum(fitted[:-1]) + last_min + gaps > width:
        widest = max(flexible, key=lambda i: fitted[i], default=None)
        if widest is None or fitted[widest] <= FLEXIBLE_WIDTH_MIN:
            break
        fitted[widest] -= 1
    fitted[-1] = max(1, min(fitted[-1], width - sum(fitted[:-1]) - gaps))
    return fitted


def print_message(message: Message) -> None:
    """Write one answer as indented protobuf JSON."""
    print(message_json(message, indent=2))


def print_line(message: Message) -> None:
    """Write one message of a stream as a line of protobuf JSON, at once."""
    print(message_json(message, indent=None), flush=True)


def message_json(message: Message, indent: int | None) -> str:
    """Return protobuf JSON with the original field names.

    Empty lists, zeros and empty texts are printed, so that a script may index what it finds in the
    proto; what is optional there stays out while it is unset.
    """
    from google.protobuf import json_format

    return json_format.MessageToJson(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
        indent=indent,
    )


def note(text: str) -> None:
    """Tell a person something beside the output; a script that reads the output never sees it."""
    print(clean(text), file=sys.stderr, flush=True)
