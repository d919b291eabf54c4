"""The installed service under a real systemd: what happens to the daemon never happens to a job.

One machine is booted for all of these, and Wattshift is installed in it as an operator would.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.daemon import PID_NAMESPACE_PROBLEM
from tests.e2e.machine import CAP_SYS_ADMIN, ROOT, Machine, missing
from tests.fakes.nvml import build
from tests.fakes.nvml.fake import FakeNvml
from tests.fakes.nvml.reading import needs_gcc

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALL_S = 400.0
SOCKET = "/run/wattshift/wattshift.sock"
CONFIG = "/etc/wattshift/wattshift.toml"
DROP_INS = "/etc/systemd/system/wattshift.service.d"
EXPOSURE_MAX = {"wattshift.service": 2.0, "wattshift-launcher.service": 4.0}
ALL_UNITS = ("wattshift.service", "wattshift-launcher.socket", "wattshift-launcher.service")
EX_CONFIG = "78"
# One command for all of it: to enter the machine takes as long as each of these.
CLEAN_UP = f"""
systemctl stop {" ".join(ALL_UNITS)}
systemctl reset-failed {" ".join(ALL_UNITS)}
exec find /var/lib/wattshift -mindepth 1 -delete
"""

pytestmark = [pytest.mark.root, pytest.mark.systemd, pytest.mark.timeout(600)]


def make_install(machine: Machine) -> str:
    """Run `make install`, with the host's network: the machine's own has no package index."""
    passed_on = ("PIP_", "SSL_", "HTTP_", "HTTPS_", "NO_", "http", "no_proxy")
    environ = {name: value for name, value in os.environ.items() if name.startswith(passed_on)}
    command = ("make", "-C", REPOSITORY, "install")
    return machine.run(*command, environ=environ, network_of_host=True, timeout_s=INSTALL_S).stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    lacking = missing()
    if lacking:
        # Root in CI can install what is missing, so there it is a failure.
        say = pytest.fail if os.environ.get("CI") and lacking != ROOT else pytest.skip
        say(f"to boot a machine this one lacks {lacking}")
    machine = Machine(tmp_path_factory.mktemp("machine"), read_only=[REPOSITORY])
    try:
        make_install(machine)
        machine.run("useradd", "--create-home", "stranger")
        yield machine
    finally:
        machine.close()


class Node:
    """An installed Wattshift on simulated GPUs, as its operator sees it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._since = ""
        self._drop_in = machine.root / f"{DROP_INS[1:]}/test.conf"

    def start(self, *, simulate: str = "--simulate 8xH100", watchdog_s: int = 30, more: str = "") -> None:
        """Start afresh: nothing of an earlier test is left, and the log begins here.

        Args:
            more: Lines for the [Service] section of the daemon's unit.
        """
        run = self.machine.run
        run("sh", "-c", CLEAN_UP)
        self.configure("")
        drop_in = (
            "[Service]\nExecStart=\nExecStart=/opt/wattshift/current/bin/wattshift serve "
            f"--config {CONFIG} {simulate}\nWatchdogSec={watchdog_s}s\n{more}\n"
        )
        if not self._drop_in.exists() or self._drop_in.read_text() != drop_in:
            self.machine.write(f"{DROP_INS}/test.conf", drop_in)
            run("systemctl", "daemon-reload")
        self._since = run("date", "+%s.%N").stdout.strip()
        started = run("systemctl", "start", "wattshift-launcher.socket", "wattshift.service", check=False)
        said = [*self.log(), *self.log("wattshift-launcher.service")]
        assert started.returncode == 0, "\n".join(said)

    def configure(self, text: str) -> None:
        """Write the configuration in place, so that its owner and mode stay."""
        self.machine.write(CONFIG, f"{text}\n")

    def cli(self, command: str, *arguments: str) -> Any:
        return json.loads(self.machine.run("wattshift", command, "-o", "json", *arguments).stdout)

    def submit(self, *arguments: str) -> str:
        """Submit a job and return its id once it runs."""
        job = self.cli("submit", *arguments)["job"]["id"]
        self.machine.until(lambda: self.pid(job) or None, f"{job} runs")
        return str(job)

    def job(self, job: str) -> Any:
        return self.cli("show", job)["job"]

    def pid(self, job: str) -> int:
        """The process of a running job; 0 where there is none."""
        found = self.job(job)
        return int(found["attempts"][-1]["pid"]) if found["state"] == "JOB_STATE_RUNNING" else 0

    def is_alive(self, pid: int) -> bool:
        return (self.machine.root / "proc").is_dir() and self.machine.run(
            "kill", "-0", str(pid), check=False
        ).returncode == 0

    @property
    def daemon_pid(self) -> int:
        return int(self.machine.unit("wattshift.service", "MainPID"))

    def until_back(self, old_pid: int) -> None:
        """Wait until another daemon than this one is ready."""

        def is_back() -> bool | None:
            state = self.machine.unit("wattshift.service", "ActiveState")
            return (state == "active" and self.daemon_pid not in (0, old_pid)) or None

        self.machine.until(is_back, "the daemon is back")

    def log(self, unit: str = "wattshift.service") -> list[str]:
        return self.machine.journal(unit, f"--since=@{self._since}")


@pytest.fixture
def node(installed: Machine) -> Node:
    found = Node(installed)
    found.start()
    return found


# Running -----------------------------------------------------------------------------------------


def test_the_service_is_ready_when_systemd_says_so(node: Node) -> None:
    assert node.machine.unit("wattshift.service", "ActiveState") == "active"
    assert node.machine.unit("wattshift.service", "StatusText") == "8 GPUs"
    assert len(node.cli("gpus")["node"]["gpus"]) == 8


def test_daemon_launcher_and_jobs_run_as_the_user_wattshift(node: Node) -> None:
    job = node.submit("--class", "batch", "--", "sleep", "1000")
    launcher = node.machine.unit("wattshift-launcher.service", "MainPID")
    processes = [f"/proc/{pid}" for pid in (node.daemon_pid, launcher, node.pid(job))]
    assert node.machine.run("stat", "-c", "%U", *processes).stdout.split() == ["wattshift"] * 3


def test_a_job_lives_in_the_launcher_s_cgroup(node: Node) -> None:
    pid = node.pid(node.submit("--class", "batch", "--", "sleep", "1000"))
    cgroup = node.machine.run("sed", "-n", "s/^0:://p", f"/proc/{pid}/cgroup").stdout
    assert "/wattshift-launcher.service/" in cgroup


def test_a_job_sees_its_gpu_its_directory_and_nothing_of_the_daemon_s(node: Node) -> None:
    job = node.cli("submit", "--class", "batch", "--", "env")["job"]["id"]
    node.machine.run("wattshift", "wait", job)
    names = {line.split("=")[0] for line in node.machine.run("wattshift", "logs", job).stdout.splitlines()}
    assert {"CUDA_VISIBLE_DEVICES", "WATTSHIFT_JOB_ID", "PATH", "HOME"} <= names
    leaked = {
        "NOTIFY_SOCKET",
        "LISTEN_FDS",
        "LISTEN_PID",
        "WATCHDOG_USEC",
        "INVOCATION_ID",
        "XDG_RUNTIME_DIR",
    }
    assert names & leaked == set()


def test_the_log_is_in_the_journal_with_priorities(node: Node) -> None:
    node.machine.run("journalctl", "--sync")
    shown = node.machine.run("journalctl", "-u", "wattshift", f"--since=@{node._since}", "-o", "json").stdout
    entries = [json.loads(line) for line in shown.splitlines()]
    ours = [entry for entry in entries if entry.get("_COMM") == "wattshift"]
    (serving,) = [entry for entry in ours if " serves on unix://" in entry["MESSAGE"]]
    assert serving["PRIORITY"] == "6"
    assert serving["MESSAGE"].startswith("wattshift ")


def test_without_a_driver_the_daemon_serves_and_says_so(installed: Machine) -> None:
    node = Node(installed)
    node.start(simulate="")
    assert node.machine.unit("wattshift.service", "ActiveState") == "active"
    found = node.cli("gpus")["node"]
    assert found["gpus"] == []
    assert any("no GPU can be read" in problem for problem in found["problems"])
    job = node.cli("submit", "--class", "batch", "--gpus", "0", "--", "true")["job"]["id"]
    assert node.machine.run("wattshift", "wait", job).returncode == 0


@needs_gcc
def test_the_closed_unit_reads_gpus_through_nvml_and_runs_jobs_on_them(installed: Machine) -> None:
    folder = installed.root / "srv/nvml"
    folder.mkdir()
    fake = FakeNvml(folder, gpus=2)
    shutil.copy(build.build(), folder)
    installed.run("chmod", "-R", "a+rwX", "/srv/nvml")
    state = fake.environment()["WATTSHIFT_FAKE_NVML_STATE"].removeprefix(str(installed.root))
    node = Node(installed)
    # A driver's memory is the kernel's; this one's is a file, which the daemon has to reach.
    node.start(
        simulate="",
        more="ReadWritePaths=/srv/nvml\n"
        f"Environment=LD_LIBRARY_PATH=/srv/nvml WATTSHIFT_FAKE_NVML_STATE={state}",
    )
    found = node.cli("gpus")["node"]
    assert [gpu["uuid"] for gpu in found["gpus"]] == [gpu.uuid for gpu in fake.gpus[:2]]
    # This machine is a container, whose PIDs no driver tells: said, and all else goes on.
    assert found["problems"] == [PID_NAMESPACE_PROBLEM]
    job = node.submit("--class", "batch", "--", "sleep", "1000")
    node.machine.run("wattshift", "cancel", job)
    assert node.machine.run("wattshift", "wait", job, check=False).returncode != 0


# What happens to the daemon does not happen to jobs --------------------------------------------------


def test_a_killed_daemon_comes_back_to_the_same_jobs(node: Node) -> None:
    jobs = [node.submit("--class", "batch", "--", "sleep", "1000") for _ in range(3)]
    pids = [node.pid(job) for job in jobs]
    old = node.daemon_pid
    node.machine.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", "wattshift")
    node.until_back(old)
    assert [node.pid(job) for job in jobs] == pids
    assert all(map(node.is_alive, pids))
    assert node.machine.unit("wattshift.service", "NRestarts") == "1"


def test_a_restart_keeps_jobs_and_their_exit_codes(node: Node) -> None:
    job = node.submit(
        "--class", "batch", "--", "sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.05; done; exit 7"
    )
    pid = node.pid(job)
    node.machine.run("systemctl", "restart", "wattshift")
    assert node.pid(job) == pid
    node.machine.run("systemctl", "stop", "wattshift")
    node.machine.run("touch", "/tmp/go")  # it ends while nobody looks
    node.machine.until(lambda: None if node.is_alive(pid) else True, "the job ends")
    node.machine.run("systemctl", "start", "wattshift")
    assert node.machine.run("wattshift", "wait", job, check=False).returncode == 7
    assert node.job(job)["exit_code"] == 7


def test_a_stopped_daemon_leaves_its_jobs(node: Node) -> None:
    job = node.submit("--class", "training", "--gpus", "4", "--", "sleep", "1000")
    pid = node.pid(job)
    node.machine.run("systemctl", "stop", "wattshift")
    assert node.machine.unit("wattshift.service", "Result") == "success"
    assert node.is_alive(pid)
    assert node.machine.unit("wattshift-launcher.service", "ActiveState") == "active"
    node.machine.run("systemctl", "start", "wattshift")
    assert node.pid(job) == pid


def test_the_watchdog_ends_a_daemon_that_hangs_and_no_job(installed: Machine) -> None:
    node = Node(installed)
    # It takes no signal while it is stopped, SIGABRT included.
    node.start(watchdog_s=2, more="TimeoutAbortSec=1s")
    job = node.submit("--class", "batch", "--", "sleep", "1000")
    pid, old = node.pid(job), node.daemon_pid
    node.machine.run("kill", f"-{signal.SIGSTOP.value}", str(old))
    node.until_back(old)
    assert any("Watchdog timeout" in line for line in node.log())
    assert node.pid(job) == pid


def test_a_stop_of_the_launcher_ends_every_job(node: Node) -> None:
    polite = node.submit("--class", "batch", "--", "sleep", "1000")
    deaf = node.submit("--class", "batch", "--", "sh", "-c", 'trap "" TERM; while :; do sleep 0.1; done')
    pids = [node.pid(polite), node.pid(deaf)]
    node.machine.run("systemctl", "stop", "wattshift")
    node.machine.run("systemctl", "stop", "wattshift-launcher.socket", "wattshift-launcher.service")
    assert [pid for pid in pids if node.is_alive(pid)] == []
    assert node.machine.unit("wattshift-launcher.service", "ActiveState") in ("inactive", "failed")


def test_a_launcher_that_dies_is_started_again_by_its_socket(node: Node) -> None:
    job = node.submit("--class", "batch", "--restart", "on-failure", "--", "sleep", "1000")
    pid = node.pid(job)
    node.machine.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", "wattshift-launcher")
    again = node.machine.until(
        lambda: found if (found := node.pid(job)) not in (0, pid) else None, "the job runs again"
    )
    assert not node.is_alive(pid)
    assert node.is_alive(again)


def test_a_deadly_signal_to_all_of_the_daemon_s_unit_reaches_no_job(node: Node) -> None:
    job = node.submit("--class", "batch", "--", "sleep", "1000")
    pid, old = node.pid(job), node.daemon_pid
    node.machine.run("systemctl", "kill", "--kill-whom=all", "-s", "KILL", "wattshift")
    node.until_back(old)
    assert node.pid(job) == pid


# Configuration -----------------------------------------------------------------------------------


def test_a_reload_goes_by_the_new_settings(node: Node) -> None:
    pid = node.daemon_pid
    node.configure("[classes.batch]\ngrace_s = 17")
    node.machine.run("systemctl", "reload", "wattshift")
    node.machine.until(
        lambda: any("configuration reloaded" in line for line in node.log()) or None, "it reloads"
    )
    job = node.submit("--class", "batch", "--", "sleep", "1000")
    assert node.job(job)["spec"]["grace_s"] == 17.0
    assert node.daemon_pid == pid


def test_a_reload_of_a_wrong_file_fails_and_names_the_line(node: Node) -> None:
    pid = node.daemon_pid
    node.configure("[classes.batch]\ngrace = 17")
    reload = node.machine.run("systemctl", "reload", "wattshift", check=False)
    assert reload.returncode != 0
    why = f"{CONFIG}:2: classes.batch.grace: unknown key; did you mean grace_s?"
    node.machine.until(lambda: any(why in text for text in node.log()) or None, "the journal says why")
    assert node.daemon_pid == pid
    assert node.machine.unit("wattshift.service", "ActiveState") == "active"
    job = node.submit("--class", "batch", "--", "sleep", "1000")
    assert node.job(job)["spec"]["grace_s"] == 10.0


def test_the_daemon_itself_refuses_a_wrong_file_and_keeps_the_old(node: Node) -> None:
    node.configure("[policy]\norder = 'rank'")
    node.machine.run("systemctl", "kill", "--kill-whom=main", "-s", "HUP", "wattshift")

    def refusal() -> str | None:
        return next((line for line in node.log() if "was not reloaded" in line), None)

    assert 'policy.order: must be one of class, value, is "rank"' in node.machine.until(refusal, "it refuses")
    assert node.cli("gpus")["node"]["problems"] != []


def test_a_launcher_that_a_wrong_file_keeps_from_starting_says_so_to_the_daemon(node: Node) -> None:
    node.configure("[polcy]")
    node.machine.run("systemctl", "kill", "--kill-whom=main", "-s", "KILL", "wattshift-launcher")

    def complaint() -> str | None:
        problems = node.cli("gpus")["node"]["problems"]
        return next((problem for problem in problems if "polcy: unknown key" in problem), None)

    node.machine.until(complaint, "the daemon says why there is no launcher")
    node.configure("")
    node.submit("--class", "batch", "--", "sleep", "1000")


def test_a_wrong_file_at_the_start_is_said_once_and_not_tried_again(node: Node) -> None:
    node.machine.run("systemctl", "stop", "wattshift")
    node.configure("[polcy]")
    assert node.machine.run("systemctl", "start", "wattshift", check=False).returncode != 0
    assert node.machine.unit("wattshift.service", "ExecMainStatus") == EX_CONFIG
    assert node.machine.unit("wattshift.service", "SubState") == "failed"
    assert len([line for line in node.log() if "polcy: unknown key; did you mean policy?" in line]) == 1


# Rights ------------------------------------------------------------------------------------------


def test_the_group_may_use_the_api_and_others_may_not(node: Node) -> None:
    address = f"unix://{SOCKET}"
    command = ("wattshift", "--address", address, "--connect-timeout", "1", "jobs")
    refused = node.machine.run(*command, user="stranger", check=False)
    assert refused.returncode != 0
    node.machine.run("usermod", "-aG", "wattshift", "stranger")
    assert node.machine.run(*command, user="stranger").returncode == 0
    node.machine.run("gpasswd", "-d", "stranger", "wattshift")


def test_others_read_neither_state_nor_configuration_nor_the_launcher_s_socket(node: Node) -> None:
    for path in ("/var/lib/wattshift", CONFIG, "/run/wattshift/launcher.sock"):
        test = node.machine.run("test", "-r", path, user="stranger", check=False)
        assert test.returncode == 1, path


PROBE = """
import errno, os
def attempt(what, *how):
    try:
        os.close(os.open(what, *how))
        return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
for path in ("/dev/nvidia250", "/dev/wattshift-other"):
    print(path, attempt(path, os.O_RDWR))
for path in ("/etc/probe", "/usr/probe", "/home/probe", "/var/lib/wattshift/probe", "/run/wattshift/probe"):
    print(path, attempt(path, os.O_WRONLY | os.O_CREAT, 0o600))
print("capabilities", [l.split()[1] for l in open("/proc/self/status") if l.startswith("CapBnd")][0])
"""


def probe(node: Node, unit: str) -> dict[str, str]:
    """What a process in a unit's sandbox may do."""
    node.machine.write("/usr/local/share/probe.py", PROBE)
    directory = f"/etc/systemd/system/{unit}.d"
    node.machine.write(
        f"{directory}/probe.conf",
        "[Service]\nExecStartPre=\nExecStartPre=/usr/bin/python3 /usr/local/share/probe.py\n",
    )
    node.machine.run("systemctl", "stop", *ALL_UNITS)
    node.machine.run("systemctl", "daemon-reload")
    node.machine.run("systemctl", "start", "wattshift-launcher.socket", unit)
    (node.machine.root / directory[1:] / "probe.conf").unlink()
    if unit != "wattshift.service":
        (node.machine.root / directory[1:]).rmdir()
    node.machine.run("systemctl", "daemon-reload")
    lines = [
        line.rpartition(" ")
        for line in node.log(unit)
        if re.match(r"/dev|/etc|/usr|/home|/var|/run|cap", line)
    ]
    return {what: result for what, _, result in lines}


# Fails where the other device is out of reach.
OPEN_OTHER = """
import errno, os
try:
    os.open("/dev/wattshift-other", os.O_RDWR)
except OSError as error:
    raise SystemExit(error.errno == errno.EPERM)
"""


@pytest.fixture
def devices(node: Node) -> None:
    """Two device nodes of which only the first is NVIDIA's; neither has a driver here.

    So an open that is let through says "no such device" (ENXIO), and one that is not, EPERM.
    """
    run = node.machine.run
    for path, major in (("/dev/nvidia250", "195"), ("/dev/wattshift-other", "196")):
        run("rm", "-f", path)
        run("mknod", "-m", "0666", path, "c", major, "250")
    command = ("systemd-run", "-q", "--wait", "-p", "DevicePolicy=closed", "--", "python3", "-c", OPEN_OTHER)
    if run(*command, check=False).returncode == 0:
        pytest.skip("this kernel does not let a machine's systemd keep units from devices")


@pytest.mark.usefixtures("devices")
def test_the_daemon_reaches_gpus_and_no_other_device_even_before_the_driver_is_loaded(node: Node) -> None:
    found = probe(node, "wattshift.service")
    assert (found["/dev/nvidia250"], found["/dev/wattshift-other"]) == ("ENXIO", "EPERM")


@pytest.mark.usefixtures("devices")
def test_a_job_reaches_gpus_even_before_the_driver_is_loaded(node: Node) -> None:
    assert probe(node, "wattshift-launcher.service")["/dev/nvidia250"] == "ENXIO"


def test_the_daemon_has_no_capabilities_and_writes_nothing_but_its_state(node: Node) -> None:
    found = probe(node, "wattshift.service")
    assert found["capabilities"] == "0000000000000000"
    assert found["/etc/probe"] in ("EROFS", "EACCES")
    assert found["/usr/probe"] in ("EROFS", "EACCES")
    assert found["/home/probe"] in ("EROFS", "EACCES")
    assert found["/var/lib/wattshift/probe"] == "ok"
    assert found["/run/wattshift/probe"] == "ok"


def test_a_job_has_no_capabilities_and_does_not_write_to_the_system(node: Node) -> None:
    found = probe(node, "wattshift-launcher.service")
    assert found["capabilities"] == "0000000000000000"
    assert found["/etc/probe"] in ("EROFS", "EACCES")
    assert found["/usr/probe"] in ("EROFS", "EACCES")
    assert found["/var/lib/wattshift/probe"] == "ok"


@pytest.mark.parametrize("unit", sorted(EXPOSURE_MAX))
def test_the_unit_is_as_closed_as_its_documentation_says(installed: Machine, unit: str) -> None:
    analysis = installed.run("systemd-analyze", "security", "--no-pager", unit).stdout
    (figure,) = re.findall(rf"Overall exposure level for {unit}: ([0-9.]+)", analysis)
    assert float(figure) <= EXPOSURE_MAX[unit]
    documented = (REPOSITORY / "docs/operating/systemd.md").read_text()
    assert re.search(rf"`{unit}` \| {figure} ", documented), f"{unit} is at {figure}"


# Installation ------------------------------------------------------------------------------------


def test_an_upgrade_touches_neither_jobs_nor_the_configuration(node: Node) -> None:
    node.configure("[classes.batch]\ngrace_s = 18")
    job = node.submit("--class", "batch", "--", "sleep", "1000")
    pid, daemon = node.pid(job), node.daemon_pid
    before = node.machine.run("readlink", "/opt/wattshift/current").stdout
    said = make_install(node.machine)
    assert "no job is touched by: systemctl restart wattshift" in said
    assert node.machine.run("readlink", "/opt/wattshift/current").stdout != before
    assert (node.daemon_pid, node.pid(job)) == (daemon, pid)
    assert "grace_s = 18" in (node.machine.root / CONFIG[1:]).read_text()
    node.machine.run("systemctl", "restart", "wattshift")
    assert node.pid(job) == pid
    assert node.machine.run("stat", "-c", "%U:%G %a", CONFIG).stdout == "root:wattshift 640\n"


@pytest.mark.last  # what it removes is what the others share
def test_uninstall_refuses_while_jobs_run_and_then_leaves_nothing(node: Node) -> None:
    script = REPOSITORY / "deploy/install.sh"
    node.submit("--class", "batch", "--", "sleep", "1000")
    refused = node.machine.run(script, "--uninstall", check=False)
    assert refused.returncode != 0
    assert "the launcher may hold jobs" in refused.stderr
    node.machine.run("systemctl", "stop", *ALL_UNITS)
    node.machine.run(script, "--uninstall")
    assert (node.machine.root / "var/lib/wattshift").is_dir()
    assert (node.machine.root / CONFIG[1:]).is_file()
    node.machine.run(script, "--uninstall", "--purge")
    places = ["etc", "opt", "usr/local", "var/lib"]
    left = [found for place in places for found in (node.machine.root / place).rglob("*wattshift*")]
    # The drop-ins are the operator's own.
    assert [path for path in left if not path.is_relative_to(node.machine.root / DROP_INS[1:])] == []
    assert node.machine.run("getent", "passwd", "wattshift", check=False).returncode != 0


def test_what_is_installed_completes_in_the_shell(installed: Machine) -> None:
    script = "/usr/local/share/bash-completion/completions/wattshift"
    installed.run("bash", "-c", f"source {script} && complete -p wattshift")


# Documentation -----------------------------------------------------------------------------------


def drop_ins() -> dict[str, str]:
    """The drop-ins that docs/operating/systemd.md offers, by path."""
    text = (REPOSITORY / "docs/operating/systemd.md").read_text()
    blocks = "\n".join(re.findall(r"```ini\n(.*?)```", text, flags=re.DOTALL))
    _, *parts = re.split(r"^# (/etc/systemd/system/\S+)$", blocks, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_drop_ins_of_the_documentation_do_what_they_say(node: Node) -> None:
    machine = node.machine
    offered = drop_ins()
    assert len(offered) == 4
    for path, text in offered.items():
        machine.write(path, text)
    machine.run("systemctl", "stop", *ALL_UNITS)
    machine.run("install", "-d", "-o", "wattshift", "-g", "wattshift", "/srv/wattshift")
    node.configure('[state]\ndirectory = "/srv/wattshift"')
    try:
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", "wattshift-launcher.socket", "wattshift.service")
        job = node.cli("submit", "--class", "batch", "--", "grep", "NoNewPrivs", "/proc/self/status")["job"][
            "id"
        ]
        machine.run("wattshift", "wait", job)
        assert machine.run("wattshift", "logs", job).stdout.split() == ["NoNewPrivs:", "0"]
        assert (machine.root / "srv/wattshift").is_dir()
        assert machine.run("ls", f"/srv/wattshift/jobs/{job}").stdout.split() == ["1", "checkpoint"]
        assert machine.unit("wattshift-launcher.service", "CPUWeight") == "50"
        status = machine.run("cat", f"/proc/{node.daemon_pid}/status").stdout
        assert re.search(rf"^CapEff:\s*{1 << CAP_SYS_ADMIN:016x}$", status, flags=re.MULTILINE), status
    finally:
        machine.run("systemctl", "stop", *ALL_UNITS)
        for path in offered:
            (machine.root / path[1:]).unlink()
        (machine.root / "etc/systemd/system/wattshift-launcher.service.d").rmdir()
        machine.run("systemctl", "daemon-reload")
