"""What mining earns, as it really earns: hashprices times the hashrates that accepted shares have proved.

Three things are known of a miner, each from another place: that it runs (the launcher), what it says (its
API), what it is paid for (the shares that the pool accepted). A dead API is no dead miner: what was proved
goes on counting. A hashrate without accepted shares is worth nothing. What was never known leaves the
configured value; the doubt has a name.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from scheduler.control.inbox import HashpricesRead, MinerRead, MiningItem, SetHashprices
from scheduler.control.mining_view import MinerView, words_of
from scheduler.control.polling import Polled
from scheduler.effects.feed import feed_of
from scheduler.effects.hashprice_feed import parse_hashprices
from scheduler.effects.miners import TOKEN_CHARACTERS_MAX, read_miner
from scheduler.errors import FeedError
from scheduler.model.jobs import Job, JobState
from scheduler.model.mining import Hashprice, Miner, MinerDoubt, MinerReading, Proof
from scheduler.model.power_events import HashpricesSet, HashratesLearned
from scheduler.model.settings import MICROUSD_PER_USD

if TYPE_CHECKING:
    from scheduler.control.loop import Controller

PORT_VARIABLE = "WATTSHIFT_MINER_PORT"
# lolMiner has new figures every ten seconds; the others sooner.
LOOK_S = 10.0
# An API that has not answered for so long counts as dead; a miner makes its tables before it answers.
API_DEAD_S = 60.0
# A hashrate is the median of the last readings, and news when it has moved by more than this part.
READINGS_KEPT = 12
READINGS_MIN = 3
NEWS_RATIO = 0.05
# A miner whose shares have stopped is tried again after so long, doubled each time.
RETRY_S = 600.0
RETRY_S_MAX = 21_600.0


@dataclass(slots=True)
class _Watch:
    """What is known of a job's miner."""

    attempt: int = 0
    port: int | None = None  # of the attempt
    token: str = ""
    since_s: float = 0.0  # when the attempt was first seen to run
    asked_s: float = 0.0
    is_asked: bool = False  # and has not answered yet
    reading: MinerReading | None = None  # the newest of the attempt
    answered_s: float | None = None
    error: str = ""
    rates_hs: deque[float] = field(default_factory=lambda: deque(maxlen=READINGS_KEPT))
    proof: Proof = field(default_factory=Proof)
    is_barren: bool = False  # worth nothing: its shares have stopped
    retry_s: float | None = None  # when it is tried again; None = it runs, or was never stopped for that
    trials: int = 0
    value: int | None = None  # as the planner has it
    doubt: MinerDoubt | None = None


class Mining:
    """The value of every job that tells what it mines."""

    def __init__(self, controller: "Controller") -> None:
        self._control = controller
        self.polled = Polled(
            controller,
            "hashprices",
            "[mining] hashprice_source",
            lambda: feed_of(
                controller.config.mining.hashprice_source,
                lambda body, name: parse_hashprices(body, name, controller.effects.clock.now_s()),
            ),
            lambda: controller.config.mining.hashprice_poll_s,
            lambda found, source: controller.inbox.put(HashpricesRead(found, source)),
        )
        self._watches: dict[int, _Watch] = {}  # by job number
        self._now_s = 0.0
        controller.ledger.table.value = self.value

    @property
    def hashprices(self) -> tuple[Hashprice, ...]:
        """Those that count, if they are not too old."""
        state = self._control.ledger.power
        return state.hashprices if state.hashprices_from == self.polled.name else ()

    def value(self, job: Job) -> int:
        """What a GPU-hour of the job is worth now, micro-USD."""
        if job.spec.miner is None:
            return job.spec.value_microusd_per_gpu_hour
        return self._judged(job, job.spec.miner, self._watches.get(job.number))[0]

    def variables(self, job: Job, gpus: tuple[str, ...]) -> dict[str, str]:
        """What a job is told on these GPUs: at which port its miner's API is expected."""
        port = None if job.spec.miner is None else self._port(job.spec.miner, gpus)
        return {} if port is None else {PORT_VARIABLE: str(port)}

    # A tick -------------------------------------------------------------------------------------

    def advance(self, now_s: float) -> None:
        """Ask the miners whose turn it is; tell the planner of values that changed."""
        self._now_s = now_s
        table, jobs = self._control.ledger.table, self._control.ledger.jobs
        for number in [number for number in self._watches if number not in table.miners]:
            del self._watches[number]
        for number in table.miners:
            job = jobs[number]
            assert job.spec.miner is not None
            watch = self._watches.setdefault(number, _Watch())
            self._follow(job, job.spec.miner, watch)
        self._note_ports()
        for number in table.miners:
            job, watch = jobs[number], self._watches[number]
            assert job.spec.miner is not None
            value, watch.doubt = self._judged(job, job.spec.miner, watch)
            if value != watch.value:
                watch.value = value
                table.put(job)
                table.values_changed += 1
        self._tell()

    def wake_s(self, now_s: float) -> float | None:
        """When a miner is to be asked or tried again, or a hashprice is too old."""
        moments = [
            moment
            for watch in self._watches.values()
            for moment in (watch.retry_s, watch.asked_s + LOOK_S if watch.since_s else None)
            if moment is not None
        ]
        max_age_s = self._control.config.mining.hashprice_max_age_s
        if self._watches:
            moments += [one.at_s + max_age_s for one in self.hashprices]
        return min((moment for moment in moments if moment > now_s), default=None)

    def _follow(self, job: Job, miner: Miner, watch: _Watch) -> None:
        """Keep the watch in step with the job: its attempt, its API, whether it is tried again."""
        now_s = self._now_s
        if job.state is not JobState.RUNNING:
            if watch.since_s:
                watch.since_s = 0.0
                if watch.is_barren:
                    watch.retry_s = now_s + min(RETRY_S_MAX, RETRY_S * 2**watch.trials)
                    watch.trials += 1
            if watch.retry_s is not None and now_s >= watch.retry_s:
                watch.retry_s, watch.is_barren = None, False
                watch.proof = watch.proof.forgiven()
            return
        if not watch.since_s or job.attempt != watch.attempt:
            watch.attempt, watch.since_s, watch.retry_s = job.attempt, now_s, None
            watch.port = self._port(miner, job.attempts[-1].gpus)
            variables = self._control.ledger.environment(job.number) if miner.token_variable else {}
            watch.token = variables.get(miner.token_variable, "")[:TOKEN_CHARACTERS_MAX]
            watch.reading, watch.answered_s, watch.error, watch.is_asked = None, None, "", False
            watch.asked_s = 0.0
            watch.rates_hs.clear()
            watch.proof = watch.proof.begun_again()
        wait_s = API_DEAD_S if watch.is_asked else LOOK_S
        if watch.port is not None and not 0.0 <= now_s - watch.asked_s < wait_s:
            watch.asked_s, watch.is_asked = now_s, True
            self._control.spawn(self._ask(job.number, job.attempt, miner, watch.port, watch.token))

    def _port(self, miner: Miner, gpus: tuple[str, ...]) -> int | None:
        """Where the instance on these GPUs listens; None where one of them was never seen."""
        board = self._control.board
        if not gpus or any(uuid not in board.row for uuid in gpus):
            return None
        return miner.port + min(board.identities[board.row[uuid]].index for uuid in gpus)

    async def _ask(self, number: int, attempt: int, miner: Miner, port: int, token: str) -> None:
        try:
            reading = await read_miner(miner, port, token)
        except FeedError as error:
            self._control.inbox.put(MinerRead(number, attempt, None, str(error)))
        else:
            self._control.inbox.put(MinerRead(number, attempt, reading))

    # What comes ---------------------------------------------------------------------------------

    def set(self, command: SetHashprices, now_s: float) -> None:
        """A client says what hashrate earns.

        Raises:
            IllegalMove: The configuration names another source.
        """
        self.polled.refuse_clients()
        self._keep(command.hashprices, "", now_s)

    def take(self, item: MiningItem, now_s: float) -> None:
        """Take what the source or a miner says."""
        match item:
            case HashpricesRead():
                if item.source == self.polled.name:
                    self._keep(item.hashprices, item.source, now_s)
            case MinerRead():
                self._answered(item, now_s)

    def _keep(self, hashprices: tuple[Hashprice, ...], source: str, now_s: float) -> None:
        state = self._control.ledger.power
        if (hashprices, source) != (state.hashprices, state.hashprices_from):
            self._control.ledger.apply(HashpricesSet(now_s, hashprices, source))

    def _answered(self, item: MinerRead, now_s: float) -> None:
        watch = self._watches.get(item.number)
        job = self._control.ledger.jobs.get(item.number)
        if watch is None or job is None or watch.attempt != item.attempt or not watch.since_s:
            return
        watch.is_asked, watch.error = False, item.error
        if item.reading is None:
            return
        before, watch.proof = watch.proof, watch.proof.after(item.reading, now_s)
        watch.reading, watch.answered_s = item.reading, now_s
        came = watch.proof.accepted_sum - before.accepted_sum
        refused = watch.proof.refused_sum - before.refused_sum
        for uuid in job.attempts[-1].gpus[:1]:
            self._control.meters.mining_shares[uuid, "accepted"] += came
            self._control.meters.mining_shares[uuid, "refused"] += refused
        watch.is_barren = watch.proof.is_barren
        if came:
            watch.trials = 0
        if item.reading.hashrate_hs:
            watch.rates_hs.append(item.reading.hashrate_hs)
        if watch.proof.shares and not watch.is_barren:
            self._learn(job, watch, now_s)

    def _learn(self, job: Job, watch: _Watch, now_s: float) -> None:
        """Journal a proved hashrate that is news, and forget those of jobs that are no more."""
        if len(watch.rates_hs) < READINGS_MIN:
            return
        rate_hs = median(watch.rates_hs) * watch.proof.accepted_ratio
        known = self._control.ledger.power.hashrates_hs
        names = [job.id, *([_kind(job)] if job.standing else [])]
        news = {
            name: rate_hs
            for name in names
            if abs(rate_hs - known.get(name, 0.0)) > NEWS_RATIO * known.get(name, 0.0)
        }
        if news:
            live = {name for one in self._control.ledger.jobs.values() for name in (one.id, _kind(one))}
            gone = {name: 0.0 for name in known if name not in live}
            self._control.ledger.apply(HashratesLearned(now_s, gone | news))

    # What follows -------------------------------------------------------------------------------

    def _judged(self, job: Job, miner: Miner, watch: _Watch | None) -> tuple[int, MinerDoubt | None]:
        """What a GPU-hour of the job is worth, micro-USD, and what is not known of it."""
        config, said = self._control.config.mining, job.spec.value_microusd_per_gpu_hour
        if watch is not None and watch.is_barren:
            return 0, MinerDoubt.SHARES
        unsure = self._unsure(watch)
        if self.polled.feed is None and not self.hashprices:
            return said, unsure
        price = next((one for one in self.hashprices if one.algorithm == miner.algorithm), None)
        if price is None and self.hashprices:
            return said, MinerDoubt.HASHPRICE
        if price is None or self._now_s - price.at_s >= config.hashprice_max_age_s:
            return round(config.stale_value_usd_per_gpu_hour * MICROUSD_PER_USD), MinerDoubt.HASHPRICE
        proved_hs = self.proved_hs(job)
        if proved_hs is None:
            return said, unsure
        value_usd = price.usd_per_hour(proved_hs) * (1.0 - miner.fee_ratio) / max(1, job.spec.gpus)
        if value_usd > config.value_usd_per_gpu_hour_max:
            return said, MinerDoubt.IMPLAUSIBLE
        return round(value_usd * MICROUSD_PER_USD), unsure

    def proved_hs(self, job: Job) -> float | None:
        """The hashrate that the job, or else an instance of the same standing job, has proved."""
        known = self._control.ledger.power.hashrates_hs
        return known.get(job.id, known.get(_kind(job)))

    def _unsure(self, watch: _Watch | None) -> MinerDoubt | None:
        """What is wrong with a running miner's API."""
        if watch is None or not watch.since_s:
            return None
        if watch.doubt is MinerDoubt.PORT:
            return MinerDoubt.PORT
        heard_s = watch.since_s if watch.answered_s is None else watch.answered_s
        if self._now_s - heard_s >= API_DEAD_S:
            return MinerDoubt.API
        reading = watch.reading
        if reading is not None and (reading.hashrate_hs is None or reading.accepted is None):
            return MinerDoubt.FIGURES
        return None

    def _note_ports(self) -> None:
        """Find running miners that name one port: only one of them answers there."""
        ports = [watch.port for watch in self._watches.values() if watch.since_s]
        for watch in self._watches.values():
            twice = watch.since_s and watch.port is not None and ports.count(watch.port) > 1
            watch.doubt = MinerDoubt.PORT if twice else None

    def _tell(self) -> None:
        """Say of whom something is not known."""
        problems = self._control.problems
        if any(watch.doubt is not None for watch in self._watches.values()):
            problems["miners"] = words_of([view for view in self.views() if view.doubt is not None])
        else:
            problems.pop("miners", None)

    def views(self) -> list[MinerView]:
        """The miners that run, or wait until they are tried again, by job."""
        found = []
        for number in sorted(self._watches):
            watch, job = self._watches[number], self._control.ledger.jobs.get(number)
            if job is None or job.spec.miner is None or not (watch.since_s or watch.retry_s):
                continue
            found.append(
                MinerView(
                    job_id=job.id,
                    gpus=job.attempts[-1].gpus if watch.since_s else (),
                    api=job.spec.miner.api,
                    port=watch.port,
                    algorithm=job.spec.miner.algorithm,
                    hashrate_hs=watch.reading.hashrate_hs if watch.reading else None,
                    proved_hs=self.proved_hs(job),
                    proof=watch.proof,
                    answer_age_s=None if watch.answered_s is None else self._now_s - watch.answered_s,
                    error=watch.error,
                    retry_s=watch.retry_s,
                    value_microusd_per_gpu_hour=self.value(job),
                    doubt=watch.doubt,
                )
            )
        return found


def _kind(job: Job) -> str:
    """Under which name the hashrate of a standing job's instances is known; no job's id has a space."""
    return f"{job.standing} {job.spec.miner.algorithm if job.spec.miner else ''}"
