"""`wattshift.toml` read into `Config`: every error names the file, the line, the key and the remedy.

The file is checked in two passes. The first makes values of keys (`reader`): unknown keys, types,
ranges. The second looks for contradictions between them (`rules`). Each pass reports all that it
finds, so that a file is put right in one go.
"""

import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from scheduler.config.reader import Reader
from scheduler.config.rules import Problem, contradictions, listen_problem, metrics_listen_problem
from scheduler.config.toml_lines import KeyPath, key_lines, key_name
from scheduler.errors import ConfigError
from scheduler.model.jobs import JobClass
from scheduler.model.policy import CLASS_DEFAULTS, ClassDefaults
from scheduler.model.settings import Config

CONFIG_BYTES_MAX = 1024 * 1024  # a file beyond that is not a configuration
PROBLEMS_SHOWN_MAX = 20


def load(path: Path | None, classes: Mapping[JobClass, ClassDefaults] = CLASS_DEFAULTS) -> Config:
    """The settings in a file; all defaults where there is none (`None`). `classes` are the defaults of each.

    Raises:
        ConfigError: The file can't be read, or something in it is wrong; all of it is named.
    """
    if path is None:
        return parse("", "built-in defaults", classes)
    try:
        with path.open("rb") as file:
            raw = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    if len(raw) > CONFIG_BYTES_MAX:
        raise ConfigError(f"{path}: is larger than {CONFIG_BYTES_MAX} bytes; is this the right file?")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8; save the file as UTF-8") from None
    return parse(text, str(path), classes)


def parse(text: str, file_name: str, classes: Mapping[JobClass, ClassDefaults] = CLASS_DEFAULTS) -> Config:
    """The settings in a text; `file_name` is for the messages.

    Raises:
        ConfigError: Something is wrong; all of it is named.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax_error(str(error), text, file_name) from None
    lines = key_lines(text)
    reader = Reader(classes)
    config = reader.config(document)
    problems = reader.problems or list(contradictions(config))
    if problems:
        raise ConfigError(_report(problems, lines, file_name))
    return replace(config, node=replace(config.node, name=config.node.name or socket.gethostname()))


def overridden(
    config: Config,
    *,
    listen: tuple[str, ...] | None = None,
    metrics_listen: str | None = None,
    state_directory: Path | None = None,
) -> Config:
    """The settings with what the command line said instead; None = nothing.

    Raises:
        ConfigError: An option is wrong, or the settings do not allow it.
    """
    server, state = config.server, config.state
    if listen is not None:
        for address in listen:
            if remedy := listen_problem(address, server.insecure_loopback):
                raise ConfigError(f"--listen: {remedy}")
        server = replace(server, listen=listen)
    if metrics_listen is not None:
        if remedy := metrics_listen_problem(metrics_listen, server.metrics_beyond_loopback):
            raise ConfigError(f"--metrics-listen: {remedy}")
        server = replace(server, metrics_listen=metrics_listen)
    if state_directory is not None:
        state = replace(state, directory=state_directory.absolute())
    return replace(config, server=server, state=state)


def _syntax_error(message: str, text: str, file_name: str) -> ConfigError:
    # "Expected '=' after a key in a key/value pair (at line 3, column 5)", or "(at end of document)"
    place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    line = int(place[1]) if place and place[1] else text.count("\n") + 1
    what = message[: place.start()] if place else message
    column = f", column {place[2]}" if place and place[2] else ""
    return ConfigError(f"{file_name}:{line}{column}: not TOML: {what}")


def _report(problems: list[Problem], lines: dict[KeyPath, int], file_name: str) -> str:
    def line(key: KeyPath) -> int:
        """Of the key, or of the table that it is missing from."""
        while key and key not in lines:
            key = key[:-1]
        return lines.get(key, 1)

    ordered = sorted((line(key), key_name(key), remedy) for key, remedy in problems)
    shown = [f"{file_name}:{number}: {key}: {remedy}" for number, key, remedy in ordered[:PROBLEMS_SHOWN_MAX]]
    if len(ordered) > PROBLEMS_SHOWN_MAX:
        shown.append(f"{file_name}: and {len(ordered) - PROBLEMS_SHOWN_MAX} more")
    return "\n".join(shown)
