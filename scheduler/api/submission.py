"""What clients submit, checked once at the border: the only place that doubts a specification."""

import math
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from scheduler.errors import FieldViolation, InvalidRequest
from scheduler.model.jobs import (
    SHARE_MILLI_WHOLE,
    JobClass,
    JobSpec,
    JobState,
    OnPreempt,
    RestartRule,
)
from scheduler.model.mining import ALGORITHM_CHARACTERS_MAX, MINER_PORT_MAX, Miner, MinerApi, is_algorithm
from scheduler.model.policy import PRIORITY_MAX, Policy
from scheduler.model.settings import MICROUSD_PER_USD, PRIORITY_DEFAULT, JobsConfig
from scheduler.v1 import job_pb2

NAME_CHARS_MAX = 128
TENANT_CHARS_MAX = 64
REQUEST_ID_CHARS_MAX = 128
COMMAND_WORDS_MAX = 1024
COMMAND_BYTES_MAX = 128 * 1024  # Linux takes no longer single string
GPUS_MAX = 4096
MODELS_MAX = 16
VALUE_USD_MAX = 1_000_000.0
DURATION_S_MAX = 10 * 365 * 86_400.0
MEMORY_MIB_MAX = 1 << 40
DRAW_W_MAX = 100_000.0
CPUS_MAX = 1_000_000
DURATION_S_MIN = 0.001
PATH_CHARS_MAX = 4096

CLASSES: dict[int, JobClass] = {job_pb2.JobClass.Value(f"JOB_CLASS_{c.name}"): c for c in JobClass}
_STATES: dict[int, JobState] = {job_pb2.JobState.Value(f"JOB_STATE_{s.value}"): s for s in JobState}
# 0 is what was not said.
_ON_PREEMPT: dict[int, OnPreempt] = {0: OnPreempt.REQUEUE} | {
    job_pb2.OnPreempt.Value(f"ON_PREEMPT_{kind.value}"): kind for kind in OnPreempt
}
_RESTART: dict[int, RestartRule] = {0: RestartRule.NEVER} | {
    job_pb2.RestartRule.Value(f"RESTART_RULE_{rule.value}"): rule for rule in RestartRule
}
_MINER_APIS: dict[int, MinerApi] = {job_pb2.MinerApi.Value(f"MINER_API_{api.name}"): api for api in MinerApi}

_T = TypeVar("_T")


class Violations:
    """Collects what is wrong, so that a caller learns all of it at once."""

    def __init__(self) -> None:
        self.found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        self.found.append(FieldViolation(field, description))

    def number(self, field: str, value: float, low: float, high: float, unit: str) -> float:
        """The value, if it is a number between low and high; low otherwise, noted."""
        if not math.isfinite(value) or not low <= value <= high:
            self.add(field, f"is {value:g}; give {low:g} to {high:g} {unit}".rstrip())
            return low
        return value

    def text(self, field: str, value: str, chars_max: int) -> str:
        """The text, if it is short enough and has no control characters."""
        if len(value) > chars_max:
            self.add(field, f"has {len(value)} characters; give at most {chars_max}")
        elif any(unicodedata.category(char) == "Cc" for char in value):
            self.add(field, "has control characters; leave them out")
        return value

    def words(self, field: str, words: tuple[str, ...]) -> tuple[str, ...]:
        """argv, if an exec can take it."""
        if len(words) > COMMAND_WORDS_MAX:
            self.add(field, f"has {len(words)} words; give at most {COMMAND_WORDS_MAX}")
        for index, word in enumerate(words):
            if "\0" in word:
                self.add(f"{field}[{index}]", "has a NUL byte; no program can receive it")
        if sum(len(word.encode(errors="surrogatepass")) + 1 for word in words) > COMMAND_BYTES_MAX:
            self.add(field, f"is longer than {COMMAND_BYTES_MAX} bytes; put the data into a file")
        return words

    def check(self) -> None:
        """Raise InvalidRequest if anything is wrong."""
        if self.found:
            raise InvalidRequest(*self.found)


def job_spec(
    message: job_pb2.JobSpec, policy: Policy, limits: JobsConfig, now_s: float, prefix: str
) -> tuple[JobSpec, dict[str, str]]:
    """The job that a message describes, defaults filled in, and its environment.

    `now_s` 0 = the deadline was checked when the same request came first.

    Raises:
        InvalidRequest: Fields are wrong; each is named, under `prefix`.
    """
    reader = _Reader(message, policy, limits, now_s, prefix)
    spec, environment = reader.spec(), reader.environment()
    reader.found.check()
    return spec, environment


def with_environment_digest(spec: JobSpec, digest: str) -> JobSpec:
    """The specification with the salted digest of its environment."""
    return replace(spec, environment_digest=digest)


def job_classes(values: Iterable[int], field: str) -> tuple[int, ...]:
    """The classes that a filter names."""
    return tuple(int(_known(CLASSES, value, field)) for value in values)


def job_states(values: Iterable[int], field: str) -> tuple[str, ...]:
    """The states that a filter names."""
    return tuple(_known(_STATES, value, field).value for value in values)


def _known(table: Mapping[int, _T], value: int, field: str) -> _T:
    known = table.get(value)
    if known is None:
        raise InvalidRequest(FieldViolation(field, f"has the unknown value {value}"))
    return known


class _Reader:
    """Reads one message: what is left out takes the class's default, what is wrong is noted."""

    def __init__(
        self, message: job_pb2.JobSpec, policy: Policy, limits: JobsConfig, now_s: float, prefix: str
    ) -> None:
        self.message = message
        self.limits = limits
        self.now_s = now_s
        self.prefix = prefix
        self.found = Violations()
        job_class = CLASSES.get(getattr(message, "class"))
        if job_class is None:
            self.wrong("class", f"is unknown; give one of {', '.join(c.name for c in JobClass)}")
        self.job_class = JobClass.BATCH if job_class is None else job_class
        self.defaults = policy.classes[self.job_class]

    def wrong(self, field: str, description: str) -> None:
        """Note that a field is wrong."""
        self.found.add(self.prefix + field, description)

    def number(self, field: str, default: float, high: float, unit: str) -> float:
        """A number from 0 to `high`."""
        value = getattr(self.message, field) if self.message.HasField(field) else default
        return self.found.number(self.prefix + field, value, 0.0, high, unit)

    def whole(self, field: str, default: int, high: int, unit: str) -> int:
        """A whole number from 0 to `high`."""
        return int(self.number(field, default, high, unit))

    def seconds(self, field: str, default: float, high: float = DURATION_S_MAX) -> float:
        """A duration, perhaps none."""
        return self.number(field, default, high, "seconds")

    def positive(self, field: str) -> float | None:
        """A duration that is not none; None where nothing is said."""
        if not self.message.HasField(field):
            return None
        value = getattr(self.message, field)
        return self.found.number(self.prefix + field, value, DURATION_S_MIN, DURATION_S_MAX, "seconds")

    def spec(self) -> JobSpec:
        """The job; what is wrong is in `found`."""
        message, defaults = self.message, self.defaults
        command = self._command()
        share, gpus = self._gpus()
        value_usd = self.number(
            "value_usd_per_gpu_hour", defaults.value_usd_per_gpu_hour, VALUE_USD_MAX, "USD per GPU-hour"
        )
        return JobSpec(
            name=self._text("name", NAME_CHARS_MAX) or _base_name(command),
            command=command,
            job_class=self.job_class,
            priority=self.whole("priority", PRIORITY_DEFAULT, PRIORITY_MAX, ""),
            value_microusd_per_gpu_hour=round(value_usd * MICROUSD_PER_USD),
            gpus=gpus,
            gpu_share_milli=share,
            gpu_memory_mib=self.whole("gpu_memory_mib", defaults.gpu_memory_mib, MEMORY_MIB_MAX, "MiB"),
            gpu_models=self._models(),
            cpus=self.whole("cpus", defaults.cpus, CPUS_MAX, "CPUs"),
            memory_mib=self.whole("memory_mib", defaults.memory_mib, MEMORY_MIB_MAX, "MiB"),
            preemptible=message.preemptible if message.HasField("preemptible") else defaults.preemptible,
            on_preempt=self._enum("on_preempt", _ON_PREEMPT, defaults.on_preempt),
            grace_s=self.seconds("grace_s", defaults.grace_s, self.limits.grace_s_max),
            min_runtime_s=self.seconds("min_runtime_s", defaults.min_runtime_s),
            restart_loss_s=self.seconds("restart_loss_s", defaults.restart_loss_s),
            exit_zero_is_done=message.exit_zero_is_done,
            restart=self._enum("restart", _RESTART, RestartRule.NEVER),
            working_directory=self._directory(),
            stop_command=self.found.words(self.prefix + "stop_command", tuple(message.stop_command)),
            expected_duration_s=self.positive("expected_duration_s"),
            deadline_s=self._deadline(),
            time_limit_s=self.positive("time_limit_s"),
            draw_w=self.number("draw_w", 0.0, DRAW_W_MAX, "W") if message.HasField("draw_w") else None,
            pinned_memory_mib=int(
                self.found.number(
                    self.prefix + "pinned_memory_mib", message.pinned_memory_mib, 0, MEMORY_MIB_MAX, "MiB"
                )
            ),
            tenant=self._text("tenant", TENANT_CHARS_MAX),
            miner=self._miner(share, gpus),
        )

    def environment(self) -> dict[str, str]:
        """The job's own environment."""
        environment = dict(self.message.environment)
        size = 0
        for name, value in environment.items():
            size += len(name.encode(errors="surrogatepass")) + len(value.encode(errors="surrogatepass")) + 2
            if not name or "=" in name or "\0" in name or "\0" in value:
                shown = name.replace("\0", "\\0")[:NAME_CHARS_MAX]
                self.wrong(
                    f"environment[{shown}]", "names are not empty, without '='; nothing holds a NUL byte"
                )
        limit = self.limits.environment_bytes_max
        if size > limit:
            self.wrong("environment", f"has {size} bytes; jobs.environment_bytes_max is {limit}. Use a file")
        return environment

    def _text(self, field: str, chars_max: int) -> str:
        return self.found.text(self.prefix + field, getattr(self.message, field), chars_max)

    def _enum(self, field: str, known: Mapping[int, _T], default: _T) -> _T:
        value = known.get(getattr(self.message, field))
        if value is None:
            self.wrong(field, f"is unknown; give one of {', '.join(str(word) for word in known.values())}")
            return default
        return value

    def _command(self) -> tuple[str, ...]:
        command = self.found.words(self.prefix + "command", tuple(self.message.command))
        if not command or not command[0]:
            self.wrong("command", "is empty; give the program and its arguments")
        return command

    def _gpus(self) -> tuple[int, int]:
        message = self.message
        share = message.gpu_share_milli or SHARE_MILLI_WHOLE
        gpus = message.gpus if message.HasField("gpus") else 1
        self.found.number(self.prefix + "gpus", gpus, 0, GPUS_MAX, "GPUs")
        self.found.number(
            self.prefix + "gpu_share_milli", share, 1, SHARE_MILLI_WHOLE, "thousandths of a GPU"
        )
        if share < SHARE_MILLI_WHOLE and gpus != 1:
            self.wrong(
                "gpu_share_milli", f"is a share of one GPU, but gpus is {gpus}; give gpus = 1 or no share"
            )
        return share, gpus

    def _models(self) -> tuple[str, ...]:
        models = self.message.gpu_models
        if len(models) > MODELS_MAX:
            self.wrong("gpu_models", f"names {len(models)} models; give at most {MODELS_MAX}")
        for index, model in enumerate(models):
            self.found.text(f"{self.prefix}gpu_models[{index}]", model, NAME_CHARS_MAX)
            if not model.strip():
                self.wrong(f"gpu_models[{index}]", "is empty; name a model such as H100")
        return tuple(sorted(set(models)))

    def _directory(self) -> str:
        path = self.message.working_directory
        if path and (not path.startswith("/") or "\0" in path or len(path) > PATH_CHARS_MAX):
            self.wrong("working_directory", "is not an absolute path; begin with /")
        return path

    def _miner(self, share: int, gpus: int) -> Miner | None:
        """Where the job tells what it mines."""
        said = self.message.miner
        if not self.message.HasField("miner"):
            return None
        if self.job_class is not JobClass.MINING or share < SHARE_MILLI_WHOLE or not gpus:
            self.wrong("miner", "is of a mining job with whole GPUs; leave it out")
        api = _MINER_APIS.get(said.api)
        if api is None:
            self.wrong("miner.api", f"is unknown; give one of {', '.join(one.name for one in MinerApi)}")
        if not is_algorithm(said.algorithm):
            self.wrong(
                "miner.algorithm",
                "is no name of an algorithm; give what the hashprices call it, up to "
                f"{ALGORITHM_CHARACTERS_MAX} letters, digits and ._/+-",
            )
        port = self.found.number(self.prefix + "miner.port", said.port, 1, MINER_PORT_MAX, "")
        fee = self.found.number(self.prefix + "miner.fee_ratio", said.fee_ratio, 0.0, 1.0, "")
        if said.token_variable and said.token_variable not in self.message.environment:
            self.wrong("miner.token_variable", "names no variable of environment; add it there")
        return Miner(api or MinerApi.T_REX, int(port), said.algorithm.lower(), fee, said.token_variable)

    def _deadline(self) -> float | None:
        if not self.message.HasField("deadline"):
            return None
        deadline_s = float(self.message.deadline.seconds + self.message.deadline.nanos / 1e9)
        if deadline_s <= self.now_s:
            self.wrong("deadline", "is in the past; give a moment to come, or none")
        latest_s = self.now_s + DURATION_S_MAX
        if self.now_s:
            self.found.number(self.prefix + "deadline", deadline_s, 0.0, latest_s, "seconds since 1970")
        return deadline_s


def _base_name(command: tuple[str, ...]) -> str:
    name = command[0].rpartition("/")[2] if command else ""
    return "".join(char if char.isprintable() else "?" for char in name)[:NAME_CHARS_MAX]
