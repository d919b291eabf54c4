"""The first pass: the tables of a TOML document made into settings."""

import difflib
import enum
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from scheduler.config.rules import CLASS_KEYS, Problem, limits_of, shown
from scheduler.config.toml_lines import KeyPath, key_name
from scheduler.model.jobs import JobClass
from scheduler.model.policy import ClassDefaults, Policy
from scheduler.model.power import CurvePoint
from scheduler.model.settings import (
    Config,
    ForeignConfig,
    JobsConfig,
    MiningConfig,
    NodeConfig,
    OpenAdrConfig,
    PowerConfig,
    SamplingConfig,
    ServerConfig,
    StandingJob,
    StateConfig,
)

TEXT_CHARACTERS_MAX = 4096  # of one string
LIST_LENGTH_MAX = 1024  # of one array

_KEYS_BY_FIELD = {"job_class": "class"}  # where a key is no Python name


class Reader:
    """Makes dataclasses of TOML tables, and keeps the problems that it meets on the way."""

    def __init__(self, classes: Mapping[JobClass, ClassDefaults]) -> None:
        """`classes`: what a class's jobs get where no table says it."""
        self._class_defaults = classes
        self.problems: list[Problem] = []

    def config(self, document: dict[str, Any]) -> Config:
        """All settings; meaningless where `problems` is not empty afterwards."""
        known = ["classes", *(field.name for field in fields(Config))]
        self._refuse_unknown((), document, known)
        policy = self._table(("policy",), Policy, document.get("policy", {}), hidden=("classes",))
        return Config(
            node=self._table(("node",), NodeConfig, document.get("node", {})),
            server=self._table(("server",), ServerConfig, document.get("server", {})),
            state=self._table(("state",), StateConfig, document.get("state", {})),
            jobs=self._table(("jobs",), JobsConfig, document.get("jobs", {})),
            sampling=self._table(("sampling",), SamplingConfig, document.get("sampling", {})),
            policy=replace(policy, classes=self._classes(document.get("classes", {}))),
            power=self._table(("power",), PowerConfig, document.get("power", {})),
            mining=self._table(("mining",), MiningConfig, document.get("mining", {})),
            openadr=self._table(("openadr",), OpenAdrConfig, document.get("openadr", {})),
            foreign=self._table(("foreign",), ForeignConfig, document.get("foreign", {})),
            standing_jobs=self._tables(("standing_jobs",), StandingJob, document.get("standing_jobs", [])),
        )

    def _classes(self, table: Any) -> dict[JobClass, ClassDefaults]:
        classes = dict(self._class_defaults)
        if not isinstance(table, dict):
            self._problem(("classes",), f"must be tables such as [classes.mining], is {shown(table)}")
            return classes
        self._refuse_unknown(("classes",), table, list(CLASS_KEYS))
        for name, job_class in CLASS_KEYS.items():
            if name in table:
                base = self._class_defaults[job_class]
                classes[job_class] = self._table(("classes", name), ClassDefaults, table[name], base=base)
        return classes

    def _tables(self, key: KeyPath, kind: Any, value: Any) -> tuple[Any, ...]:
        """An array of tables."""
        if not isinstance(value, list):
            self._problem(key, f"must be an array of tables, [[{key_name(key)}]], is {shown(value)}")
            return ()
        rows = (self._table((*key, number), kind, row) for number, row in enumerate(value))
        return tuple(row for row in rows if row is not None)

    def _table(
        self, key: KeyPath, kind: Any, table: Any, base: Any = None, hidden: tuple[str, ...] = ()
    ) -> Any:
        """A `kind` of a TOML table.

        What is not said is `base`'s, else the default. A row that lacks what it must have is None.
        """
        base = base or _all_defaults(kind)
        if not isinstance(table, dict):
            self._problem(key, f"must be a table, [{key_name(key)}], is {shown(table)}")
            return base
        hints = get_type_hints(kind)
        by_key = {_KEYS_BY_FIELD.get(f.name, f.name): f for f in fields(kind) if f.name not in hidden}
        self._refuse_unknown(key, table, list(by_key))
        found: dict[str, Any] = {}
        for name, field in by_key.items():
            if name in table:
                value = self._value((*key, name), hints[field.name], table[name])
                if value is not _WRONG:
                    found[field.name] = value
            elif base is None and _is_required(field):
                self._problem((*key, name), "is missing; " + _wanted((*key, name), hints[field.name]))
        if base is not None:
            return replace(base, **found)
        complete = all(field.name in found for field in fields(kind) if _is_required(field))
        return kind(**found) if complete else None

    def _value(self, key: KeyPath, kind: Any, value: Any) -> Any:
        """The value of one key, or `_WRONG` after a note of the problem."""
        row = _row_type(kind)
        if row is not None:
            return self._tables(key, row, value)
        try:
            converted = _converted(kind, value)
        except (msgspec.ValidationError, KeyError):
            converted = _WRONG
        if converted is _WRONG or not _is_within(key, converted):
            self._problem(key, f"{_wanted(key, kind)}, is {shown(value)}")
            return _WRONG
        return converted

    def _refuse_unknown(self, key: KeyPath, table: dict[str, Any], known: list[str]) -> None:
        for name in table:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
                self._problem((*key, name), f"unknown key; {hint}")

    def _problem(self, key: KeyPath, remedy: str) -> None:
        self.problems.append((key, remedy))


_WRONG: Any = object()  # stands for a value that could not be made


def _converted(kind: Any, value: Any) -> Any:
    kind = _without_none(kind)
    if kind is JobClass:
        return CLASS_KEYS[value] if isinstance(value, str) else _WRONG
    if _is_word(kind):
        return _words(kind).get(value, _WRONG) if isinstance(value, str) else _WRONG
    if kind is Path:
        return Path(msgspec.convert(value, str))
    return msgspec.convert(value, kind)


def _is_within(key: KeyPath, value: Any) -> bool:
    if isinstance(value, bool | enum.Enum):
        return True
    if isinstance(value, int | float):
        low, high = limits_of(key)
        return low <= value <= high  # false for NaN
    if isinstance(value, str | Path):
        return len(str(value)) <= TEXT_CHARACTERS_MAX and "\0" not in str(value)
    if isinstance(value, dict):
        value = (*value.keys(), *value.values())
    return len(value) <= LIST_LENGTH_MAX and all(_is_within(key, item) for item in value)


def _wanted(key: KeyPath, kind: Any) -> str:
    """What a key must be, for a person."""
    kind = _without_none(kind)
    if kind is bool:
        return "must be true or false"
    if kind is JobClass:
        return f"must be one of {', '.join(CLASS_KEYS)}"
    if _is_word(kind):
        return f"must be one of {', '.join(_words(kind))}"
    if kind in (int, float):
        low, high = limits_of(key)
        return f"must be a {'whole ' if kind is int else ''}number from {_number(low)} to {_number(high)}"
    if kind == tuple[CurvePoint, ...]:
        return "must be an array of [draw, work] pairs such as [[1.0, 1.0], [0.7, 0.85]], each from 0 to 1"
    if get_origin(kind) is tuple:
        return f"must be an array of at most {LIST_LENGTH_MAX} strings"
    if get_origin(kind) is dict:
        return f"must be a table of at most {LIST_LENGTH_MAX // 2} strings"
    return f"must be a string of at most {TEXT_CHARACTERS_MAX} characters"


def _is_word(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.StrEnum)


def _words(kind: type[enum.StrEnum]) -> dict[str, enum.StrEnum]:
    """What a word may be; in a configuration all are written small."""
    return {one.value.lower(): one for one in kind}


def _without_none(kind: Any) -> Any:
    """The type that is not None in `X | None`."""
    return next(a for a in get_args(kind) if a is not type(None)) if isinstance(kind, UnionType) else kind


def _row_type(kind: Any) -> Any:
    """The dataclass of an array of tables; None for any other type."""
    element = get_args(kind)[0] if get_origin(kind) is tuple else None
    return element if is_dataclass(element) else None


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _all_defaults(kind: Any) -> Any:
    """A `kind` that says nothing; None where it must say something."""
    return None if any(_is_required(field) for field in fields(kind)) else kind()


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)
