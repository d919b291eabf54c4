"""The whole product at work on this machine, in one command: `make demo`.

A real daemon on eight simulated GPUs runs real processes. Standing miners fill the node; training and
inference arrive and preempt just what they need; the daemon is killed and comes back; mining returns.
Everything that is claimed is checked: the exit status is not 0 if something did not happen.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import grpc

from scheduler.v1 import (
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    node_pb2,
    node_service_pb2,
    node_service_pb2_grpc,
    power_pb2,
    power_service_pb2,
    power_service_pb2_grpc,
)

WAIT_S = 20.0
GRID_W = 2600.0
MET = power_pb2.SHED_STATE_MET
WATTSHIFT = Path(sys.executable).with_name("wattshift")

CONFIG = """\
[power]
return_w_per_s = 1000.0
return_jitter_s = 1.0

[[standing_jobs]]
name = "miner"
class = "mining"
command = ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.2 & wait; done"]
"""

# A trainer that saves when it is told to give way, says so, and goes on from there in its next attempt.
TRAINER = """\
trap 'echo "step $step saved"; echo $step > $WATTSHIFT_CHECKPOINT_DIR/step; touch $WATTSHIFT_ACK_FILE' TERM
step=$(cat $WATTSHIFT_CHECKPOINT_DIR/step 2>/dev/null || echo 0)
echo "attempt $WATTSHIFT_ATTEMPT begins at step $step on $CUDA_VISIBLE_DEVICES"
while :; do step=$((step + 1)); sleep 0.05; done
"""


class NotShown(Exception):
    """Something that the demo claims did not happen."""


class Demo:
    """One run: its daemon, its clients, its clock."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "wattshift.sock"
        self.config = directory / "wattshift.toml"
        self.config.write_text(CONFIG)
        self.daemon: subprocess.Popen[bytes] | None = None
        self.metrics_port = 0
        self.begun = time.perf_counter()
        self.channel = grpc.insecure_channel(f"unix://{self.socket}")
        self.jobs = job_service_pb2_grpc.JobServiceStub(self.channel)
        self.node = node_service_pb2_grpc.NodeServiceStub(self.channel)
        self.power = power_service_pb2_grpc.PowerServiceStub(self.channel)

    # Words ------------------------------------------------------------------------------------

    def title(self, text: str) -> None:
        print(f"\n{text}", flush=True)

    def say(self, text: str) -> None:
        print(f"  {time.perf_counter() - self.begun:7.3f} s  {text}", flush=True)

    def claim(self, holds: bool, text: str) -> None:
        if not holds:
            raise NotShown(text)
        self.say(f"ok: {text}")

    def until(self, text: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not holds():
            if time.monotonic() > deadline:
                raise NotShown(f"{text} (waited {WAIT_S:g} s)")
            time.sleep(0.01)
        self.claim(True, text)

    # The daemon -------------------------------------------------------------------------------

    def start(self) -> None:
        begun = time.perf_counter()
        self.daemon = subprocess.Popen(
            [
                WATTSHIFT, "serve", "--simulate", "8xH100", "--config", self.config,
                "--state-dir", self.directory / "state", "--listen", f"unix://{self.socket}",
                "--metrics-listen", f"127.0.0.1:{self.metrics_port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=(self.directory / "daemon.log").open("ab"),
        )  # fmt: skip
        self.node.GetNode(node_service_pb2.GetNodeRequest(), wait_for_ready=True, timeout=WAIT_S)
        self.say(f"the daemon answers, {1000 * (time.perf_counter() - begun):.0f} ms after its start")

    def stop(self) -> None:
        """Leave nothing running, whatever happened."""
        with suppress(grpc.RpcError):
            self.node.DrainNode(node_service_pb2.DrainNodeRequest(stop_jobs=True), timeout=5)
            deadline = time.monotonic() + WAIT_S
            while self.get_node().live_jobs and time.monotonic() < deadline:
                time.sleep(0.02)
        if self.daemon is not None:
            self.daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.daemon.wait(10)
            self.daemon.kill()
            self.daemon.wait()
        self.channel.close()

    # Looks ------------------------------------------------------------------------------------

    def get(self, job_id: str) -> job_pb2.Job:
        return self.jobs.GetJob(job_service_pb2.GetJobRequest(job_id=job_id), timeout=5).job

    def log_of(self, job_id: str, attempt: int) -> str:
        request = job_service_pb2.ReadLogsRequest(job_id=job_id, attempt=attempt)
        return b"".join(piece.data for piece in self.jobs.ReadLogs(request, timeout=5)).decode()

    def get_node(self) -> node_pb2.Node:
        return self.node.GetNode(node_service_pb2.GetNodeRequest(), timeout=5).node

    def running(self, name: str = "") -> list[job_pb2.Job]:
        request = job_service_pb2.ListJobsRequest(states=[job_pb2.JOB_STATE_RUNNING], name=name)
        return list(self.jobs.ListJobs(request, timeout=5).jobs)

    def pids(self) -> dict[str, int]:
        return {job.id: job.attempts[-1].pid for job in self.running()}

    def submit(self, spec: job_pb2.JobSpec) -> job_pb2.Job:
        begun = time.perf_counter()
        job = self.jobs.SubmitJob(job_service_pb2.SubmitJobRequest(spec=spec), timeout=5).job
        self.say(
            f"submitted {job.id} ({spec.name}, {spec.gpus} GPUs): on disk and planned "
            f"after {1000 * (time.perf_counter() - begun):.1f} ms"
        )
        return job

    def tell_preemption(self, job_id: str, victims: int) -> None:
        """Wait until a job that had to preempt runs; check and print what it took."""
        self.until(f"{job_id} runs", lambda: self.get(job_id).state == job_pb2.JOB_STATE_RUNNING)
        job = self.get(job_id)
        preempted = [self.get(victim) for victim in job.attempts[-1].preempted]
        self.claim(
            len(preempted) == victims, f"just {victims} miners gave way: {', '.join(v.id for v in preempted)}"
        )
        for victim in preempted:
            attempt = next(a for a in reversed(victim.attempts) if a.preempted_by == job_id)
            stages = {
                "signalled": attempt.signalled_at,
                "exited": attempt.exited_at,
                "verified": attempt.verified_at,
                "successor started": attempt.successor_started_at,
            }
            since = attempt.notice.decided_at.ToMicroseconds()
            words = ", ".join(
                f"{name} +{(stamp.ToMicroseconds() - since) / 1000:.1f} ms" for name, stamp in stages.items()
            )
            self.say(f"   {victim.id} on {attempt.gpus[0][:12]}: {words}")
            self.claim(
                all(stamp.seconds for stamp in stages.values()), f"every stage of {victim.id} is measured"
            )
        self.claim(
            set(job.attempts[-1].gpus)
            == {a.gpus[0] for v in preempted for a in v.attempts if a.preempted_by == job_id},
            f"{job_id} runs on the GPUs that they left",
        )

    # The story --------------------------------------------------------------------------------

    def tell(self) -> None:
        self.title("1. A node with eight GPUs; its miners need nobody to start them")
        self.start()
        self.until("eight standing miners fill the node", lambda: len(self.running("miner")) == 8)

        self.title("2. A training gang of four arrives: all or nothing, and nobody needless stops")
        trainer = job_pb2.JobSpec(name="train", command=["/bin/sh", "-c", TRAINER], gpus=4)
        setattr(trainer, "class", job_pb2.JOB_CLASS_TRAINING)
        training = self.submit(trainer)
        self.tell_preemption(training.id, 4)

        self.title("3. An inference job needs one GPU")
        server = job_pb2.JobSpec(name="serve-llm", command=["/bin/sleep", "600"], gpus=1)
        setattr(server, "class", job_pb2.JOB_CLASS_INFERENCE)
        inference = self.submit(server)
        self.tell_preemption(inference.id, 1)
        self.claim(len(self.running("miner")) == 3, "three miners go on undisturbed")

        self.title("4. kill -9 of the daemon: the jobs do not notice")
        self.crash()

        self.title("5. What a dashboard sees")
        self.scrape()

        self.title(
            "6. An inference burst takes the trainer's GPUs: it saves, says so, and its grace ends early"
        )
        burst = job_pb2.JobSpec(name="burst", command=["/bin/sleep", "600"], gpus=7)
        setattr(burst, "class", job_pb2.JOB_CLASS_INFERENCE)
        self.burst(self.submit(burst), training.id)

        self.title("7. The paying jobs leave: training goes on where it was, mining returns by itself")
        self.return_of_mining(training.id, inference.id)

        self.title("8. The grid calls for less: the least valuable work goes, and comes back")
        self.shed()

        self.title("9. The journal: every decision, in one chain")
        verified = subprocess.run(
            [WATTSHIFT, "journal", "verify", "--state-dir", self.directory / "state"],
            capture_output=True,
            check=False,
        )
        self.claim(verified.returncode == 0, f"journal verify: {verified.stdout.decode().strip()}")

    def crash(self) -> None:
        before = self.pids()
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGKILL)
        self.daemon.wait()
        self.say(f"daemon killed while {len(before)} jobs ran")
        self.claim(
            all(_is_alive(pid) for pid in before.values()), "every process is alive without the daemon"
        )
        self.start()
        self.claim(self.pids() == before, "every job is adopted: same ids, same PIDs")

    def scrape(self) -> None:
        port = _metrics_port(self.directory / "daemon.log")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            text = page.read().decode()
        for line in text.splitlines():
            if line.startswith(("wattshift_jobs{", "wattshift_gpu_power_watts{")) and not line.endswith(
                " 0.0"
            ):
                self.say(f"   {line}")
        self.claim(
            'wattshift_jobs{class="training",state="running"} 1.0' in text,
            "the metrics page tells the same story",
        )

    def burst(self, burst: job_pb2.Job, training_id: str) -> None:
        self.until(f"{burst.id} runs", lambda: self.get(burst.id).state == job_pb2.JOB_STATE_RUNNING)
        attempt = self.get(training_id).attempts[0]
        early = attempt.notice.deadline.ToMicroseconds() - attempt.exited_at.ToMicroseconds()
        self.claim(attempt.HasField("acknowledged_at"), "the trainer acknowledged its notice")
        self.claim(early > 50e6, f"its grace of 60 s ended {early / 1e6:.1f} s early")
        self.claim(attempt.preempted_by == burst.id, "both directions of the link are recorded")
        self.claim(
            self.get(training_id).state == job_pb2.JOB_STATE_PENDING,
            f"{training_id} waits under its own id, not lost",
        )
        self.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=burst.id), timeout=5)

    def return_of_mining(self, training_id: str, inference_id: str) -> None:
        self.until("the trainer runs again", lambda: self.get(training_id).state == job_pb2.JOB_STATE_RUNNING)
        self.until("its log has begun", lambda: "begins at step" in self.log_of(training_id, 2))
        words = self.log_of(training_id, 2).split(" on GPU")[0]
        self.say(f"   its log: {words} on the GPUs {self.get(training_id).attempts[-1].gpus[0][:12]} ...")
        self.claim("begins at step 0" not in words, "it goes on from its checkpoint")
        for job_id in (training_id, inference_id):
            self.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=job_id), timeout=5)
        self.until("eight miners mine again", lambda: len(self.running("miner")) == 8)

    def shed(self) -> None:
        trainer = job_pb2.JobSpec(name="train", command=["/bin/sleep", "600"], gpus=4)
        setattr(trainer, "class", job_pb2.JOB_CLASS_TRAINING)
        training = self.submit(trainer)
        self.tell_preemption(training.id, 4)
        pid = self.get(training.id).attempts[-1].pid
        self.until("the site draws more than 4 kW", lambda: self.draw_w() > 4000)

        event = power_pb2.GridEvent(id="grid-1", budget_w=GRID_W)
        event.start.FromMicroseconds(round((time.time() + 6) * 1e6))
        event.end.FromMicroseconds(round((time.time() + 12) * 1e6))
        self.power.SubmitGridEvent(power_service_pb2.SubmitGridEventRequest(event=event), timeout=5)
        self.say(f"accepted: at most {GRID_W:g} W from 6 s on, for 6 s")
        self.until("measured watts say that it is met", lambda: self.grid_event().state == MET)
        met = self.grid_event()
        early_s = (met.start.ToMicroseconds() - met.shed_ended_at.ToMicroseconds()) / 1e6
        self.say(f"   {met.measured_w:.0f} W measured on all boards, {early_s:.1f} s before it had to be")
        self.claim(met.measured_w <= GRID_W, "the site draws no more than was asked")
        self.claim(self.get(training.id).attempts[-1].pid == pid, "training went on all the while")
        self.claim(len(self.running("miner")) < 4, "miners gave way")
        self.until("the event is over and four miners mine again", lambda: len(self.running("miner")) == 4)
        self.jobs.CancelJob(job_service_pb2.CancelJobRequest(job_id=training.id), timeout=5)

    def draw_w(self) -> float:
        return self.power.GetPower(power_service_pb2.GetPowerRequest(), timeout=5).power.draw_w

    def grid_event(self) -> power_pb2.GridEvent:
        request = power_service_pb2.ListGridEventsRequest(all=True)
        return self.power.ListGridEvents(request, timeout=5).events[0]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _metrics_port(log: Path) -> int:
    lines = [line for line in log.read_text().splitlines() if "metrics on http://" in line]
    return int(lines[-1].rpartition("/metrics")[0].rpartition(":")[2])


def _left_running(directory: Path) -> list[str]:
    """Processes that still name the demo's directory in their command line or environment."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with suppress(OSError):
                text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
                if str(directory).encode() in text:
                    found.append(process.name)
    return found


def main() -> int:
    """Tell the story; returns the exit status."""
    directory = Path(tempfile.mkdtemp(prefix="wattshift-demo-"))
    demo = Demo(directory)
    failure = ""
    try:
        demo.tell()
    except (NotShown, grpc.RpcError) as error:
        failure = error.details() if isinstance(error, grpc.RpcError) else str(error)  # type: ignore[attr-defined]
    demo.title("10. Nothing stays")
    demo.stop()
    deadline = time.monotonic() + WAIT_S
    while (left := _left_running(directory)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left and not failure:
        failure = f"processes {', '.join(left)} are still there"
    for pid in left:
        with suppress(OSError):
            os.kill(int(pid), signal.SIGKILL)
    if failure:
        print(f"\nNOT SHOWN: {failure}\n\nThe daemon's log:", file=sys.stderr)
        print((directory / "daemon.log").read_text(), file=sys.stderr)
        return 1
    demo.claim(True, "no process of the demo is left")
    shutil.rmtree(directory)
    print(
        "\nShown: standing miners filled eight GPUs; a gang of four and an inference job preempted exactly\n"
        "what they needed, each hand-over verified; a kill -9 of the daemon cost no job; a trainer saved,\n"
        "acknowledged and came back from its checkpoint; mining returned by itself; a grid event was met by\n"
        "measured watts, and the work came back; the journal's chain is whole."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
