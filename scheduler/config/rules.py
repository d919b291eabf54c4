"""What settings may be: the range of every number, and what contradicts what."""

import itertools
import json
import pwd
import re
from collections.abc import Iterator
from typing import Any

from scheduler.config.toml_lines import KeyPath
from scheduler.model.jobs import JobClass
from scheduler.model.mining import MINER_PORT_MAX, MINER_PORTS, is_algorithm
from scheduler.model.policy import PRIORITY_MAX
from scheduler.model.power import CurvePoint
from scheduler.model.prices import PRICE_USD_PER_KWH_MAX
from scheduler.model.settings import (
    Config,
    ForeignRule,
    StandingJob,
    is_loopback,
    split_host_port,
    url_problem,
)

# A key and what would be right.
Problem = tuple[KeyPath, str]

STANDING_JOBS_MAX = 64
LISTENERS_MAX = 16
CLASS_KEYS = {job_class.name.lower(): job_class for job_class in JobClass}

_DAY_S = 86_400.0
_YEAR_S = 366 * _DAY_S
_MIB_MAX = 2**31  # 2 PiB
_USD_PER_GPU_HOUR_MAX = 10_000.0
_MIB = 1024 * 1024
_SITE_W_MAX = 1e9
_CURVE_POINTS_MAX = 16

# What every number may be, by key; a `*` stands for a class or the number of an array's element.
RANGES: dict[str, tuple[float, float]] = {
    "node.cpus": (1, 65_536),
    "node.memory_mib": (1, _MIB_MAX),
    "server.socket_mode": (0, 0o777),
    "server.message_bytes_max": (64 * 1024, 1024 * _MIB),
    "server.concurrent_rpcs_max": (8, 65_536),
    "server.connection_streams_max": (1, 65_536),
    "state.finished_jobs_kept_s": (0, 10 * _YEAR_S),
    "state.finished_jobs_kept_max": (0, 10_000_000),
    "state.watch_revisions_kept_max": (1, 10_000_000),
    "state.journal_segment_events_max": (1_000, 1_000_000_000),
    "state.journal_segments_kept_max": (1, 1_000_000),
    "state.free_mib_min": (1, _MIB_MAX),
    "jobs.pending_max": (1, 10_000_000),
    "jobs.grace_s_max": (0, 7 * _DAY_S),
    "jobs.environment_bytes_max": (0, _MIB),  # Linux takes 2 MiB of arguments and environment
    "jobs.log_bytes_max": (4096, 1024 * 1024 * _MIB),
    "jobs.log_files_kept": (1, 100),
    "sampling.period_s": (0.05, 60),  # boards refresh 10 times a second at best
    "sampling.processes_period_s": (0.05, 600),
    "policy.hysteresis_ratio": (0, 10),
    "policy.assumed_checkpoint_interval_s": (0, 30 * _DAY_S),
    "policy.aging_after_preemptions": (1, 1_000_000),
    "policy.aging_priority_step": (0, PRIORITY_MAX),
    "policy.preemption_backoff_s": (0, _DAY_S),
    "policy.preemption_backoff_s_max": (0, _DAY_S),
    "policy.restart_backoff_s": (0, _DAY_S),
    "policy.restart_backoff_s_max": (0, _DAY_S),
    "policy.restart_attempts_max": (0, 1_000_000),
    "policy.restart_reset_s": (0, 30 * _DAY_S),
    "policy.handover_timeout_s": (1, 3600),
    "policy.live_jobs_max": (1, 65_536),
    "classes.*.value_usd_per_gpu_hour": (0, _USD_PER_GPU_HOUR_MAX),
    "classes.*.grace_s": (0, 7 * _DAY_S),
    "classes.*.min_runtime_s": (0, _YEAR_S),
    "classes.*.restart_loss_s": (0, _YEAR_S),
    "classes.*.cpus": (0, 65_536),
    "classes.*.memory_mib": (0, _MIB_MAX),
    "classes.*.gpu_memory_mib": (0, _MIB_MAX),
    "classes.*.power_curve": (0, 1),
    "power.budget_w": (1, _SITE_W_MAX),
    "power.safe_budget_w": (1, _SITE_W_MAX),
    "power.base_w": (0, _SITE_W_MAX),
    "power.pue": (1, 10),
    "power.margin_ratio": (0, 1),
    "power.emergency_grace_s": (0, 60),
    "power.return_w_per_s": (1, _SITE_W_MAX),
    "power.return_jitter_s": (0, 3600),
    "power.price_poll_s": (1, _DAY_S),
    "power.price_max_age_s": (1, 30 * _DAY_S),
    "power.price_unknown_usd_per_kwh": (0, PRICE_USD_PER_KWH_MAX),
    "mining.hashprice_poll_s": (1, _DAY_S),
    "mining.hashprice_max_age_s": (1, 30 * _DAY_S),
    "mining.stale_value_usd_per_gpu_hour": (0, _USD_PER_GPU_HOUR_MAX),
    "mining.value_usd_per_gpu_hour_max": (0, _USD_PER_GPU_HOUR_MAX),
    "openadr.poll_s": (1, 3600),
    "openadr.contact_lost_s": (1, _DAY_S),
    "openadr.subscription_w": (1, _SITE_W_MAX),
    "openadr.normal_w": (1, _SITE_W_MAX),
    "openadr.simple_moderate_w": (1, _SITE_W_MAX),
    "openadr.simple_high_w": (1, _SITE_W_MAX),
    "openadr.simple_emergency_w": (1, _SITE_W_MAX),
    "standing_jobs.*.value_usd_per_gpu_hour": (0, _USD_PER_GPU_HOUR_MAX),
    "standing_jobs.*.priority": (0, PRIORITY_MAX),
    "standing_jobs.*.gpu_memory_mib": (0, _MIB_MAX),
    "standing_jobs.*.cpus": (0, 65_536),
    "standing_jobs.*.memory_mib": (0, _MIB_MAX),
    "standing_jobs.*.grace_s": (0, 7 * _DAY_S),
    "standing_jobs.*.min_runtime_s": (0, _YEAR_S),
    "standing_jobs.*.restart_loss_s": (0, _YEAR_S),
    "standing_jobs.*.draw_w": (1, 100_000),
    "standing_jobs.*.miner_port": (1, MINER_PORT_MAX),
    "standing_jobs.*.miner_fee_ratio": (0, 1),
}

UNIX_PREFIX = "unix://"
UNIX_PATH_BYTES_MAX = 107  # sun_path, less its closing zero
TENANT_CHARACTERS_MAX = 64
# What a job's process is told about its GPUs; a standing job that set it would run elsewhere.
RESERVED_ENVIRONMENT = frozenset({"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"})

_SOCKET_MODES = (0o600, 0o660)
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def limits_of(key: KeyPath) -> tuple[float, float]:
    """Least and greatest number that a key may have."""
    names = ["*" if isinstance(part, int) else part for part in key]
    if names[0] == "classes":
        names[1] = "*"
    return RANGES[".".join(names)]


def shown(value: Any) -> str:
    """A value as TOML would write it, cut short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a table"
    is_text = isinstance(value, str | list)
    text = json.dumps(value, ensure_ascii=False, default=str) if is_text else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def contradictions(config: Config) -> Iterator[Problem]:
    """What can't be true together, or not on this machine."""
    yield from _node_problems(config)
    yield from _server_problems(config)
    yield from _policy_problems(config)
    yield from _power_problems(config)
    yield from _openadr_problems(config)
    yield from _foreign_problems(config)
    yield from _standing_problems(config)


def _node_problems(config: Config) -> Iterator[Problem]:
    if config.node.name and not _NODE_NAME.fullmatch(config.node.name):
        yield ("node", "name"), "must be 1 to 253 letters, digits, dots, dashes and underscores"
    directory = config.state.directory
    if directory is not None and not directory.is_absolute():
        yield ("state", "directory"), f"must be an absolute path, is {shown(str(directory))}"
    if config.jobs.user:
        try:
            pwd.getpwnam(config.jobs.user)
        except KeyError:
            yield (
                ("jobs", "user"),
                f"no user {shown(config.jobs.user)} on this machine; make the user first (useradd --system)",
            )
    if config.sampling.processes_period_s < config.sampling.period_s:
        yield (
            ("sampling", "processes_period_s"),
            f"must be at least sampling.period_s ({config.sampling.period_s} s)",
        )


def _server_problems(config: Config) -> Iterator[Problem]:
    server = config.server
    if server.socket_mode not in _SOCKET_MODES:
        modes = " or ".join(f"0o{mode:o}" for mode in _SOCKET_MODES)
        yield (
            ("server", "socket_mode"),
            f"must be {modes}, is 0o{server.socket_mode:o}: whoever may open the socket is an operator",
        )
    if len(server.listen) > LISTENERS_MAX:
        yield ("server", "listen"), f"must be at most {LISTENERS_MAX} addresses, are {len(server.listen)}"
    for number, address in enumerate(server.listen):
        remedy = listen_problem(address, server.insecure_loopback)
        if not remedy and address in server.listen[:number]:
            remedy = f"{shown(address)} is listed twice"
        if remedy:
            yield ("server", "listen", number), remedy
    remedy = metrics_listen_problem(server.metrics_listen, server.metrics_beyond_loopback)
    if remedy:
        yield ("server", "metrics_listen"), remedy


def listen_problem(address: str, insecure_loopback: bool) -> str:
    """What is wrong with an address of the API; empty where nothing is."""
    if address.startswith(UNIX_PREFIX):
        path = address.removeprefix(UNIX_PREFIX)
        if not path.startswith("/") or len(path.encode()) > UNIX_PATH_BYTES_MAX:
            return (
                f"must be unix:// and an absolute path of at most {UNIX_PATH_BYTES_MAX} bytes, "
                f"is {shown(address)}"
            )
        return ""
    try:
        host, _port = split_host_port(address)
    except ValueError as error:
        return f"must be unix:///path or host:port, is {shown(address)}: {error}"
    if not is_loopback(host):
        return f"{shown(address)} is not loopback: the API has no authentication; use a Unix socket"
    if not insecure_loopback:
        return (
            f"{shown(address)}: every user of this machine could submit jobs as the daemon's user; "
            "set server.insecure_loopback = true if that is meant, or use a Unix socket"
        )
    return ""


def metrics_listen_problem(address: str, beyond_loopback: bool) -> str:
    """What is wrong with the address of the metrics; empty where nothing is."""
    if not address:
        return ""
    try:
        host, _port = split_host_port(address)
    except ValueError as error:
        return f'must be host:port, or "" for no metrics, is {shown(address)}: {error}'
    if not is_loopback(host) and not beyond_loopback:
        return (
            f"{shown(address)} is not loopback: anyone who reaches it reads the metrics; "
            "set server.metrics_beyond_loopback = true if that is meant"
        )
    return ""


def _policy_problems(config: Config) -> Iterator[Problem]:
    policy = config.policy
    for name in ("preemption_backoff_s", "restart_backoff_s"):
        base_s, cap_s = getattr(policy, name), getattr(policy, f"{name}_max")
        if base_s > cap_s:
            yield ("policy", name), f"must be at most policy.{name}_max ({cap_s} s), is {base_s}"
    for name, job_class in CLASS_KEYS.items():
        remedy = _grace_problem(policy.classes[job_class].grace_s, config)
        if remedy:
            yield ("classes", name, "grace_s"), remedy
        if not _is_curve(policy.classes[job_class].power_curve):
            yield (
                ("classes", name, "power_curve"),
                (
                    f"must be 1 to {_CURVE_POINTS_MAX} pairs of draw and work that begin with [1.0, 1.0], "
                    "the draw falling, the work never rising"
                ),
            )


def _is_curve(points: tuple[CurvePoint, ...]) -> bool:
    return (
        0 < len(points) <= _CURVE_POINTS_MAX
        and points[0] == (1.0, 1.0)
        and all(
            after[0] < before[0] and after[1] <= before[1] for before, after in itertools.pairwise(points)
        )
    )


def _power_problems(config: Config) -> Iterator[Problem]:
    power = config.power
    if power.safe_budget_w is not None and power.safe_budget_w < power.base_w * power.pue:
        yield (
            ("power", "safe_budget_w"),
            f"must be at least base_w times pue ({power.base_w * power.pue:g} W)",
        )
    if power.budget_w is not None and power.budget_w < power.base_w * power.pue:
        yield ("power", "budget_w"), f"must be at least base_w times pue ({power.base_w * power.pue:g} W)"
    sources = (
        ("power", "price_source", power.price_source),
        (
            "mining",
            "hashprice_source",
            config.mining.hashprice_source,
        ),
    )
    for table, key, source in sources:
        if source and not source.startswith(("/", "http://", "https://")):
            yield (table, key), f"must be an absolute path, or begin with http:// or https://, is {source!r}"


def _openadr_problems(config: Config) -> Iterator[Problem]:
    openadr = config.openadr
    if not openadr.vtn_url:
        for name in ("program", "client_id", "webhook_listen"):
            if getattr(openadr, name):
                yield ("openadr", name), "does nothing without openadr.vtn_url; set that, or leave this out"
        return
    if remedy := url_problem(openadr.vtn_url):
        yield ("openadr", "vtn_url"), remedy
    if not openadr.program:
        yield ("openadr",), "program is missing; give the name or the id of the VTN's program"
    secret = openadr.client_secret_file
    if (secret is None) != (not openadr.client_id):
        yield ("openadr",), "client_id and client_secret_file go together; give both or none"
    if secret is not None and not secret.is_absolute():
        yield ("openadr", "client_secret_file"), f"must be an absolute path, is {shown(str(secret))}"
    if bool(openadr.webhook_listen) != bool(openadr.webhook_url):
        yield ("openadr",), "webhook_listen and webhook_url go together; give both or none"
    if openadr.webhook_url and (remedy := url_problem(openadr.webhook_url)):
        yield ("openadr", "webhook_url"), remedy
    if openadr.webhook_listen:
        try:
            split_host_port(openadr.webhook_listen)
        except ValueError as error:
            words = f"must be host:port, is {shown(openadr.webhook_listen)}: {error}"
            yield ("openadr", "webhook_listen"), words
    if openadr.contact_lost_s <= openadr.poll_s:
        yield ("openadr", "contact_lost_s"), f"must be more than openadr.poll_s ({openadr.poll_s:g} s)"


def _grace_problem(grace_s: float, config: Config) -> str:
    cap_s = config.jobs.grace_s_max
    return f"must be at most jobs.grace_s_max ({cap_s} s), is {grace_s}" if grace_s > cap_s else ""


def _foreign_problems(config: Config) -> Iterator[Problem]:
    rules = config.foreign.rules
    for number, rule in enumerate(rules):
        key = ("foreign", "rules", number)
        if not rule.user and not rule.command:
            yield key, "must name a user, a command or both; what holds for all is foreign.default"
        if "/" in rule.command:
            yield (*key, "command"), f"must be the base name of an executable, is {shown(rule.command)}"
        same = [i for i, other in enumerate(rules[:number]) if _matches_same(rule, other)]
        if same:
            yield key, f"is never reached: foreign.rules[{same[0]}] is about the same processes"


def _matches_same(rule: ForeignRule, other: ForeignRule) -> bool:
    return (rule.user, rule.command) == (other.user, other.command)


def _standing_problems(config: Config) -> Iterator[Problem]:
    jobs = config.standing_jobs
    if len(jobs) > STANDING_JOBS_MAX:
        yield ("standing_jobs",), f"must be at most {STANDING_JOBS_MAX}, are {len(jobs)}"
    names = [job.name for job in jobs]
    for number, job in enumerate(jobs):
        key = ("standing_jobs", number)
        if not _JOB_NAME.fullmatch(job.name):
            yield (*key, "name"), "must be 1 to 64 letters, digits, dots, dashes and underscores"
        elif job.name in names[:number]:
            first = names.index(job.name)
            yield (*key, "name"), f"{shown(job.name)} is the name of standing_jobs[{first}] already"
        yield from _command_problems(key, job)
        yield from _environment_problems(key, job.environment, config.jobs.environment_bytes_max)
        if not config.policy.classes[job.job_class].preemptible:
            name = job.job_class.name.lower()
            yield (
                (*key, "class"),
                f"{name} is not preemptible (classes.{name}.preemptible), and a standing job must give way",
            )
        remedy = _grace_problem(job.grace_s or 0.0, config)
        if remedy:
            yield (*key, "grace_s"), remedy
        yield from _miner_problems(key, job, jobs[:number])


def _miner_problems(key: KeyPath, job: StandingJob, earlier: tuple[StandingJob, ...]) -> Iterator[Problem]:
    if job.miner_api is None:
        for name in ("miner_port", "miner_algorithm", "miner_fee_ratio", "miner_token_variable"):
            if getattr(job, name):
                yield (*key, name), "does nothing without miner_api; set that, or leave this out"
        return
    if job.job_class is not JobClass.MINING:
        yield (*key, "miner_api"), 'is for class = "mining" only'
    if job.miner_port is None:
        yield key, "miner_port is missing; give the port of the API of the instance on GPU 0"
    elif near := [one.name for one in earlier if _meet(one.miner_port, job.miner_port)]:
        yield (
            (*key, "miner_port"),
            (
                f"meets the ports of {shown(near[0])} on other GPUs; give both the same (a GPU has one of "
                f"them at a time), or one that is {MINER_PORTS} higher"
            ),
        )
    if not is_algorithm(job.miner_algorithm):
        yield (
            (*key, "miner_algorithm"),
            'must be the name that the hashprices have for it, such as "kawpow"',
        )
    if job.miner_token_variable and job.miner_token_variable not in job.environment:
        yield (
            (*key, "miner_token_variable"),
            f"must be a name in environment, is {shown(job.miner_token_variable)}",
        )


def _meet(one: int | None, other: int) -> bool:
    """Whether two standing jobs could have a port in common, each on a GPU of its own."""
    return one is not None and 0 < abs(one - other) < MINER_PORTS


def _command_problems(key: KeyPath, job: StandingJob) -> Iterator[Problem]:
    if not job.command or not job.command[0]:
        yield (*key, "command"), 'must name a program: ["/usr/bin/miner", "--option"]; no shell is involved'
    if job.stop_command and not job.stop_command[0]:
        yield (*key, "stop_command"), "must name a program, or be left out"
    if job.working_directory and not job.working_directory.startswith("/"):
        yield (*key, "working_directory"), f"must be an absolute path, is {shown(job.working_directory)}"
    if not all(model.strip() for model in job.gpu_models):
        yield (*key, "gpu_models"), 'must be words of GPU names such as "H100"; leave it out for all GPUs'
    if len(job.tenant) > TENANT_CHARACTERS_MAX:
        yield (*key, "tenant"), f"must be at most {TENANT_CHARACTERS_MAX} characters"


def _environment_problems(key: KeyPath, environment: dict[str, str], bytes_max: int) -> Iterator[Problem]:
    for name in environment:
        if not _ENVIRONMENT_NAME.fullmatch(name):
            yield (*key, "environment", name), "is no name of an environment variable"
        elif name.startswith("WATTSHIFT_") or name in RESERVED_ENVIRONMENT:
            yield (*key, "environment", name), "is set by Wattshift for each job; remove it"
    size = sum(len(name.encode()) + len(value.encode()) + 2 for name, value in environment.items())
    if size > bytes_max:
        yield (
            (*key, "environment"),
            f"takes {size} bytes; jobs.environment_bytes_max is {bytes_max}",
        )
