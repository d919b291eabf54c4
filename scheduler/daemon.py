"""The daemon: composition root of the real world, and of `serve --simulate`.

Start-up order: the journal and its lock, the launcher (adopt what runs), the GPUs, then listeners.
"""

import asyncio
import importlib.metadata
import logging
import os
import pwd
import signal
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from scheduler import config as configuration
from scheduler import paths
from scheduler.api.http import MetricsServer
from scheduler.api.job_service import JobService
from scheduler.api.logs import LogReader
from scheduler.api.metrics import NodeMetrics
from scheduler.api.node_service import NodeService
from scheduler.api.power_service import PowerService
from scheduler.api.server import Server
from scheduler.api.usage_service import UsageService
from scheduler.control.board import NodeSize
from scheduler.control.loop import Controller, Effects, Site
from scheduler.effects.clock import SystemClock, boot_id
from scheduler.effects.collector import calm_collector
from scheduler.effects.gpus import Gpus
from scheduler.effects.job_files import remove_job
from scheduler.effects.journal_sqlite import SqliteJournal
from scheduler.effects.launcher import Launcher
from scheduler.effects.launcher_client import LauncherClient
from scheduler.effects.nvml_client import NvmlGpus
from scheduler.effects.processes import ProcProcesses
from scheduler.effects.systemd import Notifier, set_up_logging, watchdog_period_s
from scheduler.errors import ConfigError, InstallationError, NodeError, WattshiftError
from scheduler.model.jobs import job_number
from scheduler.model.settings import Config
from scheduler.simulation.boards import parse
from scheduler.simulation.gpus import ObservingLauncher, SimulatedGpus

log = logging.getLogger("wattshift")

# Keys outside [policy], [classes], [power], [foreign] and [[standing_jobs]] that a reload applies.
RELOADED_KEYS = frozenset(
    {
        "state.finished_jobs_kept_s",
        "state.finished_jobs_kept_max",
        "state.free_mib_min",
        "jobs.pending_max",
        "jobs.grace_s_max",
        "jobs.environment_bytes_max",
        "sampling.processes_period_s",
    }
)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 78  # sysexits.h; the unit does not try again, for it would be wrong the next second, too
LAUNCHER_SOCKET = "launcher.sock"
JOBS_DIRECTORY = "jobs"
JOB_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PID_NAMESPACE_PROBLEM = (
    "the daemon runs in a PID namespace of its own, and the driver tells the host's PIDs: nobody on a GPU "
    "can be named or evicted, and shares are not given on; run it in the host's (docker run --pid=host)"
)
# Set by the unit where systemd owns the launcher's socket.
LAUNCHER_SOCKET_VARIABLE = "WATTSHIFT_LAUNCHER_SOCKET"


@dataclass(frozen=True, slots=True)
class Options:
    """The command line of `wattshift serve`; None = as the configuration says."""

    config_path: Path | None
    simulate: str | None
    state_dir: Path | None
    listen: str | None
    metrics_listen: str | None


def serve(
    *,
    config_path: Path | None = None,
    simulate: str | None = None,
    state_dir: Path | None = None,
    listen: str | None = None,
    metrics_listen: str | None = None,
    log_level: str = "info",
) -> int:
    """Run the daemon until SIGTERM or SIGINT; returns the exit status. None = as the configuration says."""
    options = Options(config_path, simulate, state_dir, listen, metrics_listen)
    set_up_logging(log_level)
    # grpc's fork handlers are what deadlocks; nothing here forks once it runs.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
    try:
        _check_installation()
        return asyncio.run(_Daemon(options).run())
    except WattshiftError as error:
        log.error("%s", error)
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED


def _check_installation() -> None:
    """Refuse to run beside PyPI's other `scheduler` package: each would overwrite the other's files."""
    try:
        importlib.metadata.distribution("scheduler")
    except importlib.metadata.PackageNotFoundError:
        return
    raise InstallationError(
        "the package `scheduler` is installed in this environment and uses the same import name; "
        "uninstall both, then install wattshift into an environment of its own"
    )


class _Daemon:
    """All that one run of the daemon holds."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._config_path = _config_path(options)
        self._config = self._load()
        self._simulated = options.simulate is not None
        defaults = paths.for_daemon()
        self._state_dir = self._config.state.directory or defaults.state_dir
        self._listen = self._config.server.listen or (defaults.address,)
        self._notifier = Notifier()
        self._stop = asyncio.Event()

    def _load(self) -> Config:
        options = self._options
        return configuration.overridden(
            configuration.load(self._config_path),
            listen=(options.listen,) if options.listen else None,
            metrics_listen=options.metrics_listen,
            state_directory=options.state_dir,
        )

    async def run(self) -> int:
        """Serve until told to stop."""
        _check_user(self._config, self._simulated)
        state_dir = self._state_dir.absolute()
        clock = SystemClock()
        state = self._config.state
        journal = SqliteJournal(
            state_dir,
            now_s=clock.now_s(),
            segment_events=state.journal_segment_events_max,
            segments_kept=state.journal_segments_kept_max,
            watch_kept=state.watch_revisions_kept_max,
            first_number=_last_number(state_dir / JOBS_DIRECTORY) + 1,
        )
        try:
            launcher, gpus = self._effects(state_dir, clock)
            effects = Effects(clock, journal, launcher, gpus, ProcProcesses())
            controller = Controller(effects, self._config, self._site(state_dir))
            if not self._simulated and not effects.processes.knows_host_pids():
                controller.problems["pid_namespace"] = PID_NAMESPACE_PROBLEM
            await self._serve(controller, state_dir, clock.now_s())
        finally:
            journal.close()
        return EXIT_OK

    async def _serve(self, controller: Controller, state_dir: Path, now_s: float) -> None:
        logs = LogReader(controller, state_dir / JOBS_DIRECTORY)
        server = Server(
            self._config.server,
            self._listen,
            JobService(controller, logs),
            NodeService(controller, simulated=self._simulated, started_s=now_s),
            PowerService(controller),
            UsageService(controller),
        )
        metrics = MetricsServer(NodeMetrics(controller).page, lambda: _not_ready(controller))
        self._handle_signals(controller)
        try:
            await controller.start()
            addresses = await server.start()
            log.info("wattshift %s serves on %s", controller.site.version, ", ".join(addresses))
            if self._config.server.metrics_listen:
                host, _, port = self._config.server.metrics_listen.rpartition(":")
                bound = await metrics.start(host.strip("[]"), int(port))
                log.info("metrics on http://%s:%d/metrics", *bound)
            calm_collector()
            self._notifier.ready(f"{len(controller.board.identities)} GPUs")
            watchdog = asyncio.get_running_loop().create_task(self._watchdog())
            await self._stop.wait()
            watchdog.cancel()
            self._notifier.stopping()
        finally:
            metrics.close()
            await server.stop()
            await controller.power.leave()
            controller.stop()
            await controller.effects.gpus.close()
            await controller.effects.launcher.close()

    def _effects(self, state_dir: Path, clock: SystemClock) -> tuple[Launcher, Gpus]:
        jobs = self._config.jobs
        owned = os.environ.get(LAUNCHER_SOCKET_VARIABLE)
        launcher = LauncherClient(
            Path(owned) if owned else state_dir / LAUNCHER_SOCKET,
            state_dir / JOBS_DIRECTORY,
            user=jobs.user,
            log_bytes_max=jobs.log_bytes_max,
            log_files_max=jobs.log_files_kept,
            spawn=owned is None,
        )
        if self._options.simulate is None:
            return launcher, NvmlGpus()
        gpus = SimulatedGpus(parse(self._options.simulate), clock, node=self._config.node.name)
        return ObservingLauncher(launcher, gpus), gpus

    def _site(self, state_dir: Path) -> Site:
        node = self._config.node
        user = pwd.getpwnam(self._config.jobs.user) if self._config.jobs.user else pwd.getpwuid(os.geteuid())
        jobs_dir = state_dir / JOBS_DIRECTORY
        return Site(
            sizes=(
                NodeSize(
                    cpus=node.cpus or len(os.sched_getaffinity(0)),
                    memory_mib=node.memory_mib
                    or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
                    live_jobs_max=self._config.policy.live_jobs_max,
                ),
            ),
            base_environment={"PATH": JOB_PATH, "HOME": user.pw_dir, "USER": user.pw_name, "LANG": "C.UTF-8"},
            remove_job=partial(remove_job, jobs_dir),
            was_begun=partial(_was_begun, jobs_dir),
            boot_id=boot_id(),
            version=importlib.metadata.version("wattshift"),
            pid=os.getpid(),
        )

    def _handle_signals(self, controller: Controller) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload, controller)

    def _reload(self, controller: Controller) -> None:
        """Go by the configuration file as it is now, or keep the old one and say why."""
        self._notifier.reloading()
        try:
            config = self._load()
            controller.reload(config)
            log.info("configuration reloaded")
            if late := _needs_restart(self._config, config):
                log.warning("these keys changed and need a restart: %s", ", ".join(late))
            self._config = config
            controller.problems.pop("config", None)
        except NodeError as error:
            log.error("the configuration was not reloaded, the old one stays: %s", error)
            controller.problems["config"] = f"not reloaded: {error}"
        self._notifier.ready()

    async def _watchdog(self) -> None:
        """Tell systemd that the loop turns."""
        period_s = watchdog_period_s()
        if period_s is None:
            return
        while True:
            self._notifier.watchdog()
            await asyncio.sleep(period_s)


def _config_path(options: Options) -> Path | None:
    if options.config_path is not None:
        return options.config_path
    default = paths.for_daemon().config
    return default if default.exists() else None


def _needs_restart(old: Config, new: Config) -> list[str]:
    """Keys that differ and are read only at the start."""
    late = []
    for table in ("node", "server", "state", "jobs", "sampling"):
        before, after = getattr(old, table), getattr(new, table)
        for field in fields(before):
            key = f"{table}.{field.name}"
            if getattr(before, field.name) != getattr(after, field.name) and key not in RELOADED_KEYS:
                late.append(key)
    return late


def _check_user(config: Config, simulated: bool) -> None:
    """Jobs do not run as root unless somebody wrote that down; a trial on simulated GPUs may."""
    user = config.jobs.user
    if os.geteuid() != 0:
        own = pwd.getpwuid(os.geteuid()).pw_name
        if user not in ("", own):
            raise ConfigError(
                f"jobs.user is {user!r}, but only root may start jobs as another user; this is {own!r}: "
                "leave the key out, or run the daemon as that user"
            )
        return
    if user:
        return
    if not simulated:
        raise ConfigError(
            "the daemon runs as root and jobs.user is not set: name the user that jobs run as "
            '(`[jobs] user = "..."` in wattshift.toml), or run the daemon as that user'
        )
    log.warning("jobs run as root, because this is a trial with --simulate; set jobs.user for real work")


def _was_begun(jobs_dir: Path, job_id: str, attempt: int) -> bool:
    """Whether the launcher began the attempt: it makes its directory first. True where it can't be told."""
    try:
        (jobs_dir / job_id / str(attempt)).lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _last_number(jobs_dir: Path) -> int:
    """The last number that a job had here: what it left must never be taken for another job's."""
    try:
        return max((job_number(path.name) or 0 for path in jobs_dir.iterdir()), default=0)
    except OSError:  # the launcher makes it, and says what is wrong with it
        return 0


def _not_ready(controller: Controller) -> str:
    """Why the node is not ready to take jobs; empty where it is."""
    return "; ".join(
        text
        for kind, text in sorted(controller.problems.items())
        if kind in ("driver", "launcher", "journal")
    )
