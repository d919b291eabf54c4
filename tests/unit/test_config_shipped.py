"""`deploy/wattshift.toml` documents exactly the keys that exist, each with its default and its range."""

import enum
import re
import tomllib
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from scheduler import config
from scheduler.config import rules
from scheduler.config.toml_lines import key_lines, key_name
from scheduler.model.jobs import JobClass
from scheduler.model.policy import CLASS_DEFAULTS, Policy
from scheduler.model.settings import Config, ForeignAction, ForeignConfig, ForeignRule, StandingJob

SHIPPED = Path(__file__).resolve().parents[2] / "deploy/wattshift.toml"
A_COMMENTED_KEY = re.compile(r"^#(?=\[\[|[a-z_]+ = )", re.MULTILINE)


def shipped_document() -> dict[str, Any]:
    """What the shipped file would say if every line of it were in force."""
    return tomllib.loads(A_COMMENTED_KEY.sub("", SHIPPED.read_text()))


def keys_of(kind: Any, prefix: str) -> set[str]:
    """Every key that a table of settings has, `*` for an element of an array."""
    found = set()
    for name, hint in get_type_hints(kind).items():
        key = f"{prefix}{'class' if name == 'job_class' else name}"
        element = get_args(hint)[0] if get_args(hint) else None
        if name == "classes":
            continue
        if is_dataclass(hint):
            found |= keys_of(hint, f"{key}.")
        elif is_dataclass(element):
            found |= keys_of(element, f"{key}.*.")
        else:
            found.add(key)
    return found


def every_key() -> set[str]:
    classes = {f"classes.{c.name.lower()}.{f.name}" for c in JobClass for f in fields(CLASS_DEFAULTS[c])}
    return keys_of(Config, "") | classes


def documented() -> dict[str, Any]:
    """Each key of the shipped file and its value."""

    def walk(value: Any, key: str) -> dict[str, Any]:
        if isinstance(value, dict) and not key.endswith(".environment"):
            return {k: v for name, item in value.items() for k, v in walk(item, f"{key}.{name}").items()}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            assert len(value) == 1
            return walk(value[0], f"{key}.*")
        return {key.removeprefix("."): value}

    return walk(shipped_document(), "")


def comment_above(key: str) -> str:
    """The comment of a key: the lines of prose right above it."""
    lines = SHIPPED.read_text().splitlines()
    at = key_lines(A_COMMENTED_KEY.sub("", SHIPPED.read_text()))
    (number,) = {line for path, line in at.items() if re.sub(r"\[\d+\]", ".*", key_name(path)) == key}
    prose: list[str] = []
    for line in reversed(lines[: number - 1]):
        if not line.startswith("# "):
            break
        prose.insert(0, line.removeprefix("# "))
    return " ".join(prose)


def test_the_shipped_file_as_it_is_sets_nothing() -> None:
    assert config.load(SHIPPED) == config.load(None)


def test_the_shipped_file_documents_exactly_the_keys_that_exist() -> None:
    assert set(documented()) == every_key()


def default_of(key: str) -> Any:
    """What a key is where the file does not say; MISSING where it must."""
    owner, _, name = key.rpartition(".")
    if owner.startswith("classes."):
        return getattr(CLASS_DEFAULTS[JobClass[owner.removeprefix("classes.").upper()]], name)
    if not owner.endswith(".*"):
        return getattr(getattr(Config(), owner), name)
    row = {"standing_jobs.*": StandingJob, "foreign.rules.*": ForeignRule}[owner]
    (field,) = (f for f in fields(row) if f.name == {"class": "job_class"}.get(name, name))
    return field.default.name.lower() if isinstance(field.default, JobClass) else field.default


def as_toml(value: Any) -> Any:
    if isinstance(value, enum.StrEnum):
        return value.value.lower()
    return [as_toml(each) for each in value] if isinstance(value, tuple) else value


# Their values are examples: a rule says at least two of the three, an environment is empty at first.
EXAMPLES = {
    "foreign.rules.*.user",
    "foreign.rules.*.command",
    "standing_jobs.*.environment",
    "standing_jobs.*.miner_algorithm",
    "node.name",
}


def test_every_key_of_the_shipped_file_is_at_its_default() -> None:
    for key, value in documented().items():
        default = default_of(key)
        if default is None:
            assert "Default: " in comment_above(key), f"{key} has no default value, so its comment must say"
        elif key not in EXAMPLES and default is not MISSING:
            assert value == as_toml(default), key
            assert isinstance(as_toml(default), type(value)), key


def test_every_line_of_the_shipped_file_in_force_is_a_valid_configuration() -> None:
    loaded = config.parse(A_COMMENTED_KEY.sub("", SHIPPED.read_text()), "w.toml")
    assert loaded.policy == Policy()
    assert loaded.server == Config().server
    assert loaded.jobs == Config().jobs
    assert loaded.sampling == Config().sampling
    assert loaded.state.directory == Path("/var/lib/wattshift")
    assert loaded.foreign == ForeignConfig(
        rules=(ForeignRule(ForeignAction.IGNORE, "dcgm", "nv-hostengine"),)
    )
    assert [job.name for job in loaded.standing_jobs] == ["miner"]


@pytest.mark.parametrize("key", sorted(set(rules.RANGES) - {"server.socket_mode"}))
def test_the_shipped_file_says_the_range_of(key: str) -> None:
    low, high = rules.RANGES[key]
    stated = f"{low:g} to {int(high)}"
    if key.startswith("classes."):
        _, _, name = key.rpartition(".")
        (line,) = re.findall(rf"^#   {name} +(.*)$", SHIPPED.read_text(), flags=re.MULTILINE)
        assert stated in line
    else:
        assert stated in comment_above(key)


def is_number(value: Any) -> bool:
    """Whether it is a number, or an array of them."""
    if isinstance(value, list) and value:
        return all(map(is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_every_number_has_a_range() -> None:
    numbers = {
        re.sub(r"^classes\.\w+\.", "classes.*.", key)
        for key, value in documented().items()
        if is_number(value)
    }
    assert numbers == set(rules.RANGES)
