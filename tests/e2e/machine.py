"""A machine of one's own: this one's files under an overlay, booted with systemd as PID 1.

Nothing that happens in it reaches the files of the host. It has a network of its own (loopback only); a
command may be run with the host's, to install packages.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

BOOT_S = 60.0
SHUTDOWN_S = 30.0
POLL_S = 0.02
# Of the host's units none is wanted, and these would ask or wait.
MASKED = ("systemd-firstboot.service", "systemd-networkd-wait-online.service", "systemd-resolved.service")
TOOLS = ("systemd-nspawn", "nsenter", "mount")

ROOT = "root's rights"
CAP_SYS_ADMIN = 21  # linux/capability.h
CLONE_NEWNS = 0x20000  # linux/sched.h

_T = TypeVar("_T")


def missing() -> str:
    """What this machine lacks to boot another; empty where it lacks nothing."""
    if os.geteuid() != 0 or not _may_mount():
        return ROOT
    tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    if tools:
        return f"{', '.join(tools)} (Debian: apt-get install systemd-container)"
    if not Path("/lib/systemd/systemd").exists():
        return "systemd (Debian: apt-get install systemd)"
    return ""


def _may_mount() -> bool:
    """Whether this root is one: in a container it may not be."""
    effective = re.search(r"^CapEff:\s*(\w+)$", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert effective is not None
    return bool(int(effective[1], 16) >> CAP_SYS_ADMIN & 1)


def _mounts_of_its_own() -> None:
    """Part from the host's mounts: what is mounted from now on ends with this process, however that ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no mounts of its own for this process")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


class Machine:
    """One booted machine; `close` ends it and leaves nothing behind but its console's log in `directory`."""

    def __init__(self, directory: Path, read_only: Sequence[Path] = ()) -> None:
        """Boot it; `read_only` are directories of the host that it sees at the same place."""
        self.root = directory / "root"
        self._read_only = read_only
        self._console = (directory / "console.log").open("w+b")
        for name in ("root", "upper", "work"):
            (directory / name).mkdir()
        layers = f"lowerdir=/,upperdir={directory}/upper,workdir={directory}/work"
        _mounts_of_its_own()
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, self.root], check=True)
        self._nspawn: subprocess.Popen[bytes] | None = None
        try:
            self._prepare()
            self._boot()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        etc = self.root / "etc"
        for wants in (etc / "systemd/system").glob("*.wants"):
            shutil.rmtree(wants)
        # An absent or empty one would make this the first boot, with presets and questions.
        (etc / "machine-id").write_text(os.urandom(16).hex() + "\n")
        for unit in MASKED:
            link = etc / "systemd/system" / unit
            link.unlink(missing_ok=True)
            link.symlink_to("/dev/null")
        # Journald keeps the host's journal out of it, and ours in memory.
        (etc / "systemd/journald.conf.d").mkdir(exist_ok=True)
        (etc / "systemd/journald.conf.d/test.conf").write_text(
            "[Journal]\nStorage=volatile\nRateLimitBurst=0\n"
        )

    def _boot(self) -> None:
        command = ["systemd-nspawn", "--quiet", "-D", str(self.root), "--boot", "--private-network"]
        command += ["--register=no", "--console=pipe", "--hostname=node"]
        # With these systemd can load the BPF programs by which it keeps units from devices.
        command += ["--capability=CAP_BPF,CAP_PERFMON,CAP_NET_ADMIN", "--system-call-filter=bpf"]
        command += [f"--bind-ro={path}" for path in self._read_only]
        if not Path("/run/systemd/system").is_dir():
            command.append("--keep-unit")  # nobody here could make a scope for it
        self._nspawn = subprocess.Popen(
            command,
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._console,
            stderr=subprocess.STDOUT,
        )
        self.until(self._find_init, "systemd starts", BOOT_S)
        self.until(lambda: self._is_up() or None, "the machine is up", BOOT_S)

    def _find_init(self) -> int | None:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise AssertionError(f"systemd-nspawn ended with {self._nspawn.returncode}:\n{self.console()}")
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        for child in children:
            try:
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
            except OSError:
                continue
        return None

    def _is_up(self) -> bool:
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def console(self) -> str:
        """What the machine wrote on its console so far."""
        self._console.flush()
        return Path(self._console.name).read_text(errors="replace")

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        timeout_s: float = 60.0,
        network_of_host: bool = False,
        user: str = "",
        environ: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine.

        Raises:
            AssertionError: It failed; the message has its output.
        """
        init = self._find_init()
        assert init is not None
        namespaces = ["-m", "-u", "-i", "-p", "-C", "-r", "-w"] + ([] if network_of_host else ["-n"])
        words: list[str] = ["nsenter", "-t", str(init), *namespaces, "--"]
        if user:
            words += ["runuser", "-u", user, "--"]
        words += [str(word) for word in command]
        result = subprocess.run(
            words,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", "LANG": "C.UTF-8"}
            | dict(environ or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and result.returncode:
            said = result.stdout + result.stderr
            raise AssertionError(f"{' '.join(map(str, command))} ended with {result.returncode}:\n{said}")
        return result

    def until(self, look: Callable[[], _T | None], what: str, timeout_s: float = 30.0) -> _T:
        """Return what `look` finds, as soon as that is not None.

        Raises:
            AssertionError: It found nothing in time; the message says what was waited for.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            found = look()
            if found is not None:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout_s} s in vain until {what}")
            time.sleep(POLL_S)

    def journal(self, unit: str, *options: str) -> list[str]:
        """The messages of a unit, oldest first."""
        command: Sequence[str] = ("journalctl", "--unit", unit, "--output=cat", "--no-pager", *options)
        self.run("journalctl", "--sync")
        return self.run(*command).stdout.splitlines()

    def unit(self, name: str, key: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={key}", name).stdout.strip()

    def write(self, path: str, text: str) -> None:
        """Write a file of the machine, with its directory."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def close(self) -> None:
        """Turn it off."""
        if self._nspawn is not None and self._nspawn.poll() is None:
            self._nspawn.send_signal(signal.SIGTERM)  # systemd-nspawn asks for a shutdown
            try:
                self._nspawn.wait(SHUTDOWN_S)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait(SHUTDOWN_S)
        self._console.close()
        subprocess.run(["umount", "--lazy", self.root], check=True)
        for layer in ("upper", "work"):  # hundreds of MiB, of which pytest would keep those of three runs
            shutil.rmtree(self.root.parent / layer, ignore_errors=True)
