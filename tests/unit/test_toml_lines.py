"""Where each key of a TOML text stands."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.config.toml_lines import KeyPath, key_lines, key_name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# a = 1\n\n", {}),
        ("a = 1\n\nb = 2", {("a",): 1, ("b",): 3}),
        ("a.b.c = 1", {("a",): 1, ("a", "b"): 1, ("a", "b", "c"): 1}),
        ("[t]\nx = 1\n[t.u]\ny = 1", {("t",): 1, ("t", "x"): 2, ("t", "u"): 3, ("t", "u", "y"): 4}),
        ("[ t . 'u v' ]", {("t",): 1, ("t", "u v"): 1}),
        ("\"a.b\" = 1\n'c#' = 2", {("a.b",): 1, ("c#",): 2}),
        ('"\\u00e9\\"" = 1', {('é"',): 1}),
        (
            "[[r]]\nx = 1\n[[r]]\nx = 1",
            {("r",): 1, ("r", 0): 1, ("r", 0, "x"): 2, ("r", 1): 3, ("r", 1, "x"): 4},
        ),
        ("[[r]]\n[r.t]\nx = 1", {("r",): 1, ("r", 0): 1, ("r", 0, "t"): 2, ("r", 0, "t", "x"): 3}),
        (
            "[[r]]\n[[r.s]]\n[[r.s]]",
            {("r",): 1, ("r", 0): 1, ("r", 0, "s"): 2, ("r", 0, "s", 0): 2, ("r", 0, "s", 1): 3},
        ),
        ("a = [\n1, # one ]\n2,\n]\nb = 1", {("a",): 1, ("a", 0): 2, ("a", 1): 3, ("b",): 5}),
        ("a = { x = 1, y.z = [] }", {("a",): 1, ("a", "x"): 1, ("a", "y"): 1, ("a", "y", "z"): 1}),
        ('a = "] # = "\nb = 1', {("a",): 1, ("b",): 2}),
        ('a = """\n[x]\n\\"""\nb = 1 """ # c\nd = 1', {("a",): 1, ("d",): 5}),
        ('a = """x""""" # two quotes of its own\nb = 1', {("a",): 1, ("b",): 2}),
        ("a = '''\nx\\'''\nb = 1", {("a",): 1, ("b",): 3}),
        ("a = 1979-05-27 07:32:00 # t\nb = -inf", {("a",): 1, ("b",): 2}),
        ("a = 1\r\nb = 2\r\n", {("a",): 1, ("b",): 2}),
    ],
)
def test_every_key_is_found_where_it_stands(text: str, expected: dict[KeyPath, int]) -> None:
    tomllib.loads(text)  # the scanner's promise holds for valid texts only
    assert key_lines(text) == expected


def test_a_key_is_written_as_a_person_writes_it() -> None:
    assert key_name(("standing_jobs", 1, "environment", "A")) == "standing_jobs[1].environment.A"
    assert key_name(("node",)) == "node"
    assert key_name(("a b", "", "c\nd")) == '"a b".""."c\\nd"'


# Any document --------------------------------------------------------------------------------------

NAMES = st.text("abcABC019_-", min_size=1, max_size=4) | st.text("#=[]{}.,'\" é", min_size=1, max_size=4)
TEXTS = st.text("ab#=[]{}\"'\\\n,. ", max_size=12)
SCALARS = st.integers() | st.booleans() | st.floats(allow_nan=False) | TEXTS
INLINE = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
TABLES = st.recursive(
    st.dictionaries(NAMES, INLINE, max_size=3),
    lambda inner: st.dictionaries(
        NAMES, INLINE | inner | st.lists(inner, min_size=1, max_size=3), max_size=3
    ),
    max_leaves=6,
)


class Writer:
    """Writes a document as TOML in a way that `draw` chooses, and notes each key's line as it goes."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.text = ""
        self.lines: dict[KeyPath, int] = {}

    def choose(self, *ways: str) -> str:
        return self.data.draw(st.sampled_from(ways))

    def note(self, path: KeyPath) -> None:
        self.lines.setdefault(path, self.text.count("\n") + 1)

    def name(self, name: str) -> str:
        bare = name.replace("_", "a").replace("-", "a").isalnum() and name.isascii()
        return name if bare and self.choose("bare", "quoted") == "bare" else self.basic(name)

    @staticmethod
    def basic(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'

    def string(self, text: str) -> str:
        way = self.choose("basic", "multi-line", "literal", "multi-line literal")
        if way == "multi-line":
            return '"""\n' + text.replace("\\", "\\\\").replace('"', '\\"') + '"""'
        if way == "literal" and not set(text) & set("'\n"):
            return f"'{text}'"
        if way == "multi-line literal" and "'" not in text:
            return f"'''\n{text}'''"
        return self.basic(text)

    def scalar(self, value: Any) -> str:
        if isinstance(value, str):
            return self.string(value)
        return str(value).lower() if isinstance(value, bool) else repr(value)

    def table(self, path: KeyPath, header: str, table: dict[str, Any]) -> None:
        inline, below = {}, {}
        for name, value in table.items():
            rows = isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
            is_below = (rows or isinstance(value, dict)) and self.choose("below", "inline") == "below"
            (below if is_below else inline)[name] = value
        for name, value in inline.items():
            self.note((*path, name))
            self.text += f"{self.name(name)} = "
            self.value((*path, name), value, can_break=True)
            self.text += self.choose("\n", ' # [x] = "\n', "\n\n")
        for name, value in below.items():
            inner = f"{header}.{self.name(name)}" if header else self.name(name)
            if isinstance(value, dict):
                self.note((*path, name))
                self.text += f"[{inner}]\n"
                self.table((*path, name), inner, value)
                continue
            for number, row in enumerate(value):
                self.note((*path, name))
                self.note((*path, name, number))
                self.text += f"[[{inner}]]\n"
                self.table((*path, name, number), inner, row)

    def value(self, path: KeyPath, value: Any, can_break: bool) -> None:
        if isinstance(value, dict):
            self.text += "{"
            for number, (name, item) in enumerate(value.items()):
                self.text += ", " if number else " "
                self.note((*path, name))
                self.text += f"{self.name(name)} = "
                self.value((*path, name), item, can_break=False)
            self.text += "}"
        elif isinstance(value, list):
            self.text += "["
            for number, item in enumerate(value):
                self.text += self.choose(" ", "\n", " # ]\n") if can_break else ""
                self.note((*path, number))
                self.value((*path, number), item, can_break)
                self.text += ", "
            self.text += "]"
        else:
            self.text += self.scalar(value)


@given(TABLES, st.data())
def test_every_key_of_any_document_is_found_on_its_line(
    document: dict[str, Any], data: st.DataObject
) -> None:
    writer = Writer(data)
    writer.table((), "", document)
    assert tomllib.loads(writer.text) == document
    assert key_lines(writer.text) == writer.lines
