"""CSV files with a header, read row by row; what is wrong is named by file, line and column, with a remedy.

Memory is bounded whatever the file's size: a row is read, made into values and given on.
"""

import csv
import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from scheduler.errors import InputError

# Whoever has that many wrong lines has made the same mistake in each.
PROBLEMS_SHOWN_MAX = 20
# A row of ours has some 20 short cells; a longer line is no row, and must not fill the memory.
LINE_CHARACTERS_MAX = 64 * 1024
_SHOWN_CHARACTERS_MAX = 60

Parse = Callable[[str], Any]  # raises ValueError: what the cell must be

REQUIRED: Any = object()  # stands for a default that there is not


@dataclass(frozen=True, slots=True)
class Column:
    """A column: how a cell is read, and what an empty cell or a missing column stands for."""

    name: str
    parse: Parse
    default: Any = REQUIRED


class Problems:
    """What is wrong in one file; enough of it ends the reading."""

    def __init__(self, name: str) -> None:
        """Take the file's name as the messages show it."""
        self.name = name
        self._lines: list[str] = []

    def add(self, line: int, column: str, remedy: str) -> None:
        """Note a problem.

        Raises:
            InputError: It is the last that is shown.
        """
        place = f"{self.name}:{line}: " + (f"{column}: " if column else "")
        self._lines.append(place + remedy)
        if len(self._lines) == PROBLEMS_SHOWN_MAX:
            self._lines.append(f"{self.name}: the rest was not looked at")
            self.check()

    def check(self) -> None:
        """Go on if there is none.

        Raises:
            InputError: All that were noted.
        """
        if self._lines:
            raise InputError("\n".join(self._lines))


def rows(path: Path, columns: Sequence[Column], problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row's line number and its values by column; rows with a wrong cell are noted and left out.

    Raises:
        InputError: The file can't be read, has no row, or its header or too many rows are wrong.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _rows(csv.reader(_lines(file, problems), strict=True), columns, problems)
    except OSError as error:
        raise InputError(f"{problems.name}: can't be read: {error.strerror}") from None


def _lines(file: TextIO, problems: Problems) -> Iterator[str]:
    """The file's lines, none of them too long."""
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(LINE_CHARACTERS_MAX + 1)
        except UnicodeDecodeError:
            problems.add(number, "", "is not UTF-8 from about here on; save the file as UTF-8")
            problems.check()
        if not line:
            return
        if len(line) > LINE_CHARACTERS_MAX:
            problems.add(number, "", f"is longer than {LINE_CHARACTERS_MAX} characters; is this a CSV file?")
            problems.check()
        if "\0" in line:
            problems.add(number, "", "has a zero byte in it; is this a CSV file?")
            problems.check()
        yield line


def _rows(reader: Any, columns: Sequence[Column], problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    header = _next(reader, problems)
    if header is None:
        raise InputError(
            f"{problems.name}: is empty; its first line must name the columns: {_names(columns)}"
        )
    at = _places(header, columns, problems)
    defaults = {column.name: column.default for column in columns if column.default is not REQUIRED}
    empty = True
    while (cells := _next(reader, problems)) is not None:
        if not cells:  # an empty line
            continue
        empty = False
        line = reader.line_num
        if len(cells) != len(header):
            problems.add(line, "", f"has {len(cells)} cells; the header names {len(header)} columns")
            continue
        values = dict(defaults)
        read = [_read(cells[place].strip(), column, line, values, problems) for column, place in at]
        if all(read):
            yield line, values
    if empty:
        problems.add(1, "", "there is no row after the header")
    problems.check()


def _next(reader: Any, problems: Problems) -> list[str] | None:
    try:
        cells: list[str] | None = next(reader, None)
    except csv.Error as error:
        problems.add(reader.line_num, "", f"is no CSV ({error}); a cell with a quote in it is quoted")
        problems.check()
        raise AssertionError from error
    return cells


def _places(header: list[str], columns: Sequence[Column], problems: Problems) -> list[tuple[Column, int]]:
    """Where each column is."""
    names = [name.strip() for name in header]
    known = {column.name: column for column in columns}
    for place, name in enumerate(names):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {_names(columns)}"
            problems.add(1, shown(name), f"unknown column; {hint}")
        elif name in names[:place]:
            problems.add(1, name, "is there twice; remove one")
    for column in columns:
        if column.default is REQUIRED and column.name not in names:
            problems.add(1, column.name, "this column is missing, and there is no default for it")
    problems.check()
    return [(known[name], place) for place, name in enumerate(names)]


def _read(text: str, column: Column, line: int, values: dict[str, Any], problems: Problems) -> bool:
    """Put the cell's value where it belongs; False after a note of what is wrong."""
    if not text:
        if column.default is REQUIRED:
            problems.add(line, column.name, "is empty, and there is no default for it")
            return False
        return True
    try:
        values[column.name] = column.parse(text)
    except ValueError as error:
        problems.add(line, column.name, f"{error}, is {shown(text)}")
        return False
    return True


def shown(text: str) -> str:
    """A cell as a message shows it: quoted, cut short, nothing in it that a terminal would obey."""
    cut = text if len(text) <= _SHOWN_CHARACTERS_MAX else text[: _SHOWN_CHARACTERS_MAX - 3] + "..."
    return repr(cut)


def _names(columns: Sequence[Column]) -> str:
    return ", ".join(column.name for column in columns)


# Cells -----------------------------------------------------------------------------------------


def number(low: float, high: float, *, infinite: bool = False) -> Parse:
    """A number between two limits; `inf` too where it is allowed."""
    words = f"must be a number from {low:g} to {high:g}" + (" or inf" if infinite else "")

    def parse(text: str) -> float:
        value = _float(text, words)
        if not low <= value <= high and not (infinite and value == math.inf):
            raise ValueError(words)
        return value

    return parse


def whole(low: int, high: int) -> Parse:
    """A whole number between two limits."""
    words = f"must be a whole number from {low} to {high}"

    def parse(text: str) -> int:
        value = _float(text, words)
        if not low <= value <= high or value != int(value):
            raise ValueError(words)
        return int(value)

    return parse


def thousandths(high: int) -> Parse:
    """A number from 0 with at most three decimals, as a whole number of thousandths."""
    words = f"must be a number from 0 to {high} with at most three decimals"

    def parse(text: str) -> int:
        value = _float(text, words)
        milli = round(value * 1000) if 0 <= value <= high else -1
        if milli < 0 or abs(value * 1000 - milli) > 1e-6:
            raise ValueError(words)
        return milli

    return parse


def boolean(text: str) -> bool:
    """`true` or `false`."""
    found = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
    if found is None:
        raise ValueError("must be true or false")
    return found


def name(characters_max: int) -> Parse:
    """A name of printable characters."""

    def parse(text: str) -> str:
        if len(text) > characters_max or not text.isprintable():
            raise ValueError(f"must be at most {characters_max} printable characters")
        return text

    return parse


def _float(text: str, words: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(words) from None
    if math.isnan(value) or "_" in text:  # Python reads 1_000; nobody else does
        raise ValueError(words)
    return value
