"""Where each key of a TOML text stands: `tomllib` tells it for syntax errors only.

A scanner for text that `tomllib` has accepted: it trusts the syntax and looks only at what moves
the place: keys, brackets, strings, comments, line ends.
"""

import json
import re
import tomllib

# A key's path: names, and a number for each element of an array of tables.
KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY_PART = re.compile(r"""[ \t]*("(?:\\.|[^"\\\n])*"|'[^'\n]*'|[A-Za-z0-9_-]+)[ \t]*""")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'  # a multi-line string may end in up to two quotes of its own
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line (from 1) of every key and table of a valid TOML text, inline ones included.

    A table stands where it is first named. Elements of an array are numbered, so that
    `("standing_jobs", 1, "name")` is the name in the second `[[standing_jobs]]`.
    """
    return _Scanner(text).scan()


def key_name(key: KeyPath) -> str:
    """A key as a person writes it: `standing_jobs[1].name`, counted from 0; odd names in quotes."""
    name = ""
    for part in key:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            quoted = part if _BARE_KEY.fullmatch(part) else json.dumps(part)
            name += ("." if name else "") + quoted
    return name


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[KeyPath, int] = {}
        self.array_lengths: dict[KeyPath, int] = {}

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        while self.skip_blank():
            if self.text.startswith("[[", self.at):
                self.at += 2
                table = self.array_element(self.key())
                self.at += 2
            elif self.text[self.at] == "[":
                self.at += 1
                table = self.header(self.key())
                self.at += 1
            else:
                self.pair(table)
        return self.lines

    def skip_blank(self) -> bool:
        """Go to the next token; False at the end of the text."""
        blank = _BLANK.match(self.text, self.at)
        assert blank is not None
        self.at = blank.end()
        return self.at < len(self.text)

    def note(self, path: KeyPath) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, self.at) + 1)

    def key(self) -> tuple[str, ...]:
        """Read a dotted key, up to the first character after it."""
        parts: list[str] = []
        while True:
            part = _KEY_PART.match(self.text, self.at)
            assert part is not None
            word = part[1]
            # A quoted key is written like a string, and tomllib knows how to read one.
            parts.append(tomllib.loads(f"k = {word}")["k"] if word[0] in "\"'" else word)
            self.at = part.end()
            if not self.text.startswith(".", self.at):
                return tuple(parts)
            self.at += 1

    def header(self, names: tuple[str, ...]) -> KeyPath:
        """The full path of `[names]`: inside an array of tables, its last element is meant."""
        path: KeyPath = ()
        for name in names:
            path = (*path, name)
            self.note(path)
            if path in self.array_lengths:
                path = (*path, self.array_lengths[path] - 1)
        return path

    def array_element(self, names: tuple[str, ...]) -> KeyPath:
        array = (*self.header(names[:-1]), names[-1])
        self.note(array)
        number = self.array_lengths.get(array, 0)
        self.array_lengths[array] = number + 1
        self.note((*array, number))
        return (*array, number)

    def pair(self, table: KeyPath) -> None:
        line_start = self.at
        path = table
        for name in self.key():
            path = (*path, name)
            end, self.at = self.at, line_start
            self.note(path)
            self.at = end
        self.at += 1  # =
        self.value(path)

    def value(self, path: KeyPath) -> None:
        self.skip_blank()
        if self.text[self.at] == "[":
            self.array(path)
        elif self.text[self.at] == "{":
            self.inline_table(path)
        else:
            token = _STRING.match(self.text, self.at) or _SCALAR.match(self.text, self.at)
            assert token is not None
            self.at = token.end()

    def array(self, path: KeyPath) -> None:
        self.at += 1
        number = 0
        while self.skip_blank() and self.text[self.at] != "]":
            self.note((*path, number))
            self.value((*path, number))
            number += 1
            self.skip_blank()
            if self.text[self.at] == ",":
                self.at += 1
        self.at += 1

    def inline_table(self, path: KeyPath) -> None:
        self.at += 1
        while self.skip_blank() and self.text[self.at] != "}":
            self.pair(path)
            self.skip_blank()
            if self.text[self.at] == ",":
                self.at += 1
        self.at += 1
