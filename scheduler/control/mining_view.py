"""A miner as somebody who looks at the node sees it, and what is not known of it in words."""

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.model.mining import MinerApi, MinerDoubt, Proof

# Miners that a problem names; a rig has no more.
NAMED_MAX = 8
_S_PER_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class MinerView:
    """A job's miner. None = not known."""

    job_id: str
    gpus: tuple[str, ...]  # empty while it waits to be tried again
    api: MinerApi
    port: int | None
    algorithm: str
    hashrate_hs: float | None  # as it says
    proved_hs: float | None  # as its shares have proved
    proof: Proof
    answer_age_s: float | None
    error: str  # why it could not be read last
    retry_s: float | None
    value_microusd_per_gpu_hour: int
    doubt: MinerDoubt | None

    @property
    def words(self) -> str:
        """What is not known of it, and what that does; empty where nothing is."""
        match self.doubt:
            case None:
                return ""
            case MinerDoubt.API:
                why = self.error or "it has not answered yet"
                return f"its API is dead ({why}); it runs, and counts as before"
            case MinerDoubt.FIGURES:
                return f"its API says no hashrate or no shares of {self.algorithm}; it counts as before"
            case MinerDoubt.SHARES:
                silent = self.proof.silent_s / _S_PER_MINUTE
                patience = self.proof.patience_s / _S_PER_MINUTE
                return (
                    f"no share was accepted for {silent:.0f} minutes, and chance explains {patience:.0f}: "
                    "it is worth nothing until one is; look at its pool and wallet"
                )
            case MinerDoubt.IMPLAUSIBLE:
                return (
                    "its hashrate would make it worth more than [mining] value_usd_per_gpu_hour_max; it "
                    "counts with its configured value"
                )
            case MinerDoubt.HASHPRICE:
                return f"no hashprice of {self.algorithm} is known that is not too old"
            case MinerDoubt.PORT:
                return f"another job's miner is expected at port {self.port}, too; give it another miner_port"


def words_of(doubtful: Sequence[MinerView]) -> str:
    """The problem of these miners, in one line."""
    named = [f"miner of job {view.job_id}: {view.words}" for view in doubtful[:NAMED_MAX]]
    more = len(doubtful) - len(named)
    return "; ".join([*named, *([f"and {more} more miners"] if more > 0 else [])])
