"""What mining earns over gRPC: hashprices in, and miners as clients see them."""

from collections.abc import Iterable
from typing import Any

from scheduler.api import convert
from scheduler.api.submission import Violations
from scheduler.control.loop import Controller
from scheduler.control.mining_view import MinerView
from scheduler.model.mining import Hashprice, MinerDoubt, checked_hashprices
from scheduler.model.settings import MICROUSD_PER_USD
from scheduler.v1 import power_pb2

_DOUBTS: dict[MinerDoubt | None, Any] = {None: power_pb2.MINER_DOUBT_UNSPECIFIED} | {
    doubt: power_pb2.MinerDoubt.Value(f"MINER_DOUBT_{doubt.name}") for doubt in MinerDoubt
}


def hashprices(messages: Iterable[power_pb2.Hashprice], now_s: float) -> tuple[Hashprice, ...]:
    """The hashprices that a client sends.

    Raises:
        InvalidRequest: They are none; the words say which is wrong.
    """
    found = Violations()
    try:
        return checked_hashprices(
            Hashprice(
                one.algorithm,
                one.unit,
                one.usd_per_day,
                min(now_s, convert.seconds(one.at)) if one.HasField("at") else now_s,
            )
            for one in messages
        )
    except ValueError as error:
        found.add("hashprices", str(error))
    found.check()
    raise AssertionError("check raises")


def mining(control: Controller) -> power_pb2.Mining | None:
    """What mining earns; None where nobody knows and no miner says anything."""
    polled, known, views = control.mining.polled, control.mining.hashprices, control.mining.views()
    if polled.feed is None and not known and not views:
        return None
    return power_pb2.Mining(
        hashprices=[
            power_pb2.Hashprice(
                algorithm=one.algorithm,
                unit=one.unit,
                usd_per_day=one.usd_per_day,
                at=convert.timestamp(one.at_s),
            )
            for one in known
        ],
        source=polled.name,
        problem=polled.problem,
        miners=[_miner(view) for view in views],
    )


def _miner(view: MinerView) -> power_pb2.MinerStatus:
    return power_pb2.MinerStatus(
        job_id=view.job_id,
        gpus=view.gpus,
        api=convert.miner_api(view.api),
        port=view.port or 0,
        algorithm=view.algorithm,
        hashrate_hs=view.hashrate_hs,
        proved_hashrate_hs=view.proved_hs,
        accepted_shares=view.proof.accepted_sum,
        refused_shares=view.proof.refused_sum,
        silent_s=view.proof.silent_s,
        patience_s=view.proof.patience_s,
        answer_age_s=view.answer_age_s,
        value_usd_per_gpu_hour=view.value_microusd_per_gpu_hour / MICROUSD_PER_USD,
        doubt=_DOUBTS[view.doubt],
        problem=view.words,
        retry_at=convert.timestamp(view.retry_s),
    )
