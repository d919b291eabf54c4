"""The node's settings as values, every default filled in. `config.py` reads them from TOML.

Field names are the keys of `wattshift.toml`; `deploy/wattshift.toml` says what each one means.
"""

import ipaddress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from scheduler.model.jobs import SHARE_MILLI_WHOLE, JobClass, JobSpec, OnPreempt, RestartRule
from scheduler.model.mining import Miner, MinerApi
from scheduler.model.policy import Policy

MICROUSD_PER_USD = 1_000_000
PRIORITY_DEFAULT = 500
PORT_MAX = 65_535

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """`[node]`: who and how big this node is."""

    name: str = ""  # empty = the host name, filled in by `config.load`
    cpus: int | None = None  # that jobs may book; None = all that this machine has
    memory_mib: int | None = None  # host memory that jobs may book; None = all


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """`[server]`: where the daemon listens, and its limits."""

    listen: tuple[str, ...] = ()  # unix:///path or host:port; empty = the default socket
    socket_mode: int = 0o660
    insecure_loopback: bool = False
    metrics_listen: str = "127.0.0.1:9477"  # host:port; empty = no metrics
    metrics_beyond_loopback: bool = False
    message_bytes_max: int = 16 * 1024 * 1024
    concurrent_rpcs_max: int = 1024
    connection_streams_max: int = 100


@dataclass(frozen=True, slots=True)
class StateConfig:
    """`[state]`: where the journal lives and how long things are kept."""

    directory: Path | None = None  # None = the default state directory
    finished_jobs_kept_s: float = 7 * 86_400.0
    finished_jobs_kept_max: int = 100_000
    watch_revisions_kept_max: int = 100_000
    journal_segment_events_max: int = 1_000_000
    journal_segments_kept_max: int = 16
    free_mib_min: int = 128


@dataclass(frozen=True, slots=True)
class JobsConfig:
    """`[jobs]`: as whom jobs run, and their limits."""

    user: str = ""  # empty = the daemon's own user
    pending_max: int = 100_000
    grace_s_max: float = 3600.0
    environment_bytes_max: int = 64 * 1024
    log_bytes_max: int = 8 * 1024 * 1024  # of one file, before it is rotated
    log_files_kept: int = 4  # per job, with the one being written


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """`[sampling]`: how often the GPUs are read."""

    period_s: float = 1.0
    processes_period_s: float = 5.0


class ForeignAction(StrEnum):
    """What is done about a process on a GPU that Wattshift did not start."""

    PROTECT = "protect"  # the GPU is not schedulable while it lives
    IGNORE = "ignore"  # its memory is part of the baseline
    EVICT = "evict"  # it is ended


@dataclass(frozen=True, slots=True)
class ForeignRule:
    """`[[foreign.rules]]`: what to do about the processes of a user, of a command, or of both."""

    action: ForeignAction
    user: str = ""  # empty = any
    command: str = ""  # base name of the executable; empty = any


FOREIGN_RULES_BUILT_IN = tuple(
    ForeignRule(ForeignAction.IGNORE, command=command)
    for command in ("Xorg", "gnome-shell", "nvidia-cuda-mps-server", "nvidia-persistenced")
)


@dataclass(frozen=True, slots=True)
class ForeignConfig:
    """`[foreign]`: processes that Wattshift did not start."""

    default: ForeignAction = ForeignAction.PROTECT
    rules: tuple[ForeignRule, ...] = ()

    def action(self, user: str, command: str) -> ForeignAction:
        """What to do about a process: its first rule, else the built-in one, else the default."""
        for rule in (*self.rules, *FOREIGN_RULES_BUILT_IN):
            if rule.user in ("", user) and rule.command in ("", command):
                return rule.action
        return self.default


class ChangedLimits(StrEnum):
    """What is done about a power limit that somebody else has changed."""

    RESPECT = "respect"  # theirs is the most from then on
    REASSERT = "reassert"  # ours is set again


@dataclass(frozen=True, slots=True)
class PowerConfig:
    """`[power]`: what the site may draw, and how it is kept. Watts of the site unless said otherwise."""

    budget_w: float | None = None  # None = no budget is configured
    safe_budget_w: float | None = None  # while the signal of a source is lost; None = the configured one
    base_w: float = 0.0  # what the node draws beside its GPU boards
    pue: float = 1.0  # the site's draw over its computers'
    margin_ratio: float = 0.02  # by how much a limit lies above a job's natural draw
    limit_inference: bool = False  # whether a shed may lower the limits of inference
    emergency_grace_s: float = 1.0  # the longest grace in an emergency
    return_w_per_s: float = 200.0  # how fast watts come back after a shed
    return_jitter_s: float = 10.0  # they begin to after up to so long
    changed_limits: ChangedLimits = ChangedLimits.RESPECT
    price_source: str = ""  # an absolute path or a URL that prices come from; empty = clients
    price_poll_s: float = 300.0
    price_max_age_s: float = 3600.0  # how long the last known price holds
    price_unknown_usd_per_kwh: float = 1.0  # what a kilowatt-hour counts for after that


class OperatingPoint(StrEnum):
    """Which power limits mining runs under while energy has a price."""

    BEST = "best"  # those at which it earns most
    FULL = "full"  # those of its natural draw


@dataclass(frozen=True, slots=True)
class MiningConfig:
    """`[mining]`: what mining earns, and where it runs best."""

    hashprice_source: str = ""  # an absolute path or a URL that hashprices come from; empty = clients
    hashprice_poll_s: float = 300.0
    hashprice_max_age_s: float = 21_600.0  # how long a hashprice holds
    stale_value_usd_per_gpu_hour: float = 0.0  # what a GPU-hour of mining counts for after that
    value_usd_per_gpu_hour_max: float = 1.0  # a miner that would be worth more is not believed
    operating_point: OperatingPoint = OperatingPoint.BEST


@dataclass(frozen=True, slots=True)
class OpenAdrConfig:
    """`[openadr]`: an OpenADR 3.1 VTN whose events are grid events here. Watts of the site."""

    vtn_url: str = ""  # the API's base; empty = none
    client_id: str = ""  # empty = the VTN asks for no token
    client_secret_file: Path | None = None  # holds the secret and nothing else
    program: str = ""  # name or id
    targets: tuple[str, ...] = ()  # that the VTN has granted to this VEN
    poll_s: float = 10.0
    webhook_listen: str = ""  # host:port; empty = poll only
    webhook_url: str = ""  # under which the VTN reaches it
    contact_lost_s: float = 300.0  # without an answer for so long, contact is lost
    subscription_w: float | None = None  # where the VTN names none; None = not known
    normal_w: float | None = None  # what offsets and relative setpoints change; None = they can't be followed
    simple_moderate_w: float | None = None  # SIMPLE 1; None = it can't be followed
    simple_high_w: float | None = None
    simple_emergency_w: float | None = None  # SIMPLE 3 and ALERT_GRID_EMERGENCY; None = as little as can be


@dataclass(frozen=True, slots=True)
class StandingJob:
    """`[[standing_jobs]]`: a job that is kept alive, one instance per idle GPU.

    None = what its class says.
    """

    name: str
    command: tuple[str, ...]
    job_class: JobClass = JobClass.MINING  # the key is `class`
    value_usd_per_gpu_hour: float | None = None
    priority: int = PRIORITY_DEFAULT
    environment: dict[str, str] = field(default_factory=dict)
    working_directory: str = ""
    stop_command: tuple[str, ...] = ()
    gpu_models: tuple[str, ...] = ()
    gpu_memory_mib: int | None = None
    cpus: int | None = None
    memory_mib: int | None = None
    grace_s: float | None = None
    min_runtime_s: float | None = None
    restart_loss_s: float | None = None
    on_preempt: OnPreempt | None = None
    draw_w: float | None = None  # None = not known
    tenant: str = ""
    miner_api: MinerApi | None = None  # None = it tells nobody what it mines
    miner_port: int | None = None
    miner_algorithm: str = ""
    miner_fee_ratio: float = 0.0
    miner_token_variable: str = ""

    @property
    def miner(self) -> Miner | None:
        """Where an instance tells what it mines."""
        if self.miner_api is None or self.miner_port is None:
            return None
        return Miner(
            self.miner_api,
            self.miner_port,
            self.miner_algorithm.lower(),
            self.miner_fee_ratio,
            self.miner_token_variable,
        )

    def spec(self, policy: Policy, environment_digest: str = "") -> JobSpec:
        """One instance of it as a job: a whole GPU, kept alive, gives way like any job."""
        defaults = policy.classes[self.job_class]
        value_usd = _or(self.value_usd_per_gpu_hour, defaults.value_usd_per_gpu_hour)
        return JobSpec(
            name=self.name,
            command=self.command,
            job_class=self.job_class,
            priority=self.priority,
            value_microusd_per_gpu_hour=round(value_usd * MICROUSD_PER_USD),
            gpus=1,
            gpu_share_milli=SHARE_MILLI_WHOLE,
            gpu_memory_mib=_or(self.gpu_memory_mib, defaults.gpu_memory_mib),
            gpu_models=self.gpu_models,
            cpus=_or(self.cpus, defaults.cpus),
            memory_mib=_or(self.memory_mib, defaults.memory_mib),
            preemptible=True,
            on_preempt=_or(self.on_preempt, defaults.on_preempt),
            grace_s=_or(self.grace_s, defaults.grace_s),
            min_runtime_s=_or(self.min_runtime_s, defaults.min_runtime_s),
            restart_loss_s=_or(self.restart_loss_s, defaults.restart_loss_s),
            exit_zero_is_done=False,
            restart=RestartRule.ALWAYS,
            working_directory=self.working_directory,
            stop_command=self.stop_command,
            draw_w=self.draw_w,
            tenant=self.tenant,
            environment_digest=environment_digest,
            miner=self.miner,
        )


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of a node."""

    node: NodeConfig = field(default_factory=NodeConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    state: StateConfig = field(default_factory=StateConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    policy: Policy = field(default_factory=Policy)  # with `[classes.*]`
    power: PowerConfig = field(default_factory=PowerConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    openadr: OpenAdrConfig = field(default_factory=OpenAdrConfig)
    foreign: ForeignConfig = field(default_factory=ForeignConfig)
    standing_jobs: tuple[StandingJob, ...] = ()


def split_host_port(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`, the host without brackets; port 0 = any free one.

    Raises:
        ValueError: It is not of that form.
    """
    host, colon, digits = address.rpartition(":")
    if not colon or not digits.isascii() or not digits.isdecimal() or int(digits) > PORT_MAX:
        raise ValueError(f"the port must be a number from 0 to {PORT_MAX}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 host needs brackets: [::1]:9477")
    if not host or "/" in host or host.strip() != host:
        raise ValueError("the host is missing; 127.0.0.1 is this machine alone")
    return host, int(digits)


def is_loopback(host: str) -> bool:
    """Whether a host can be reached from this machine only; names other than localhost are not asked."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_problem(url: str) -> str:
    """What is wrong with a URL that secrets may go to; empty where nothing is."""
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname or "", parts.port
    except ValueError as error:
        return f"must be a URL, is {url!r}: {error}"
    if not host or parts.scheme not in ("http", "https") or parts.username or parts.query or parts.fragment:
        return f"must be https://host/path without user, query and fragment, is {url!r}"
    if parts.scheme == "http" and not is_loopback(host):
        return f"must begin with https:// (http is for this machine only), is {url!r}"
    return ""


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value
