"""The mining part of the metrics page."""

from collections import Counter

from scheduler.api.exposition import Page
from scheduler.api.gpu_metrics import GPU
from scheduler.control.loop import Controller
from scheduler.model.mining import MinerDoubt
from scheduler.model.settings import MICROUSD_PER_USD


def put_mining(page: Page, control: Controller, now_s: float) -> None:
    """Add what the miners do and earn. A miner of several GPUs is shown at its first."""
    views = control.mining.views()
    running = [((view.gpus[0],), view) for view in views if view.gpus]
    page.gauge(
        "mining_hashrate_hashes_per_second",
        "What the miner says; absent while it doesn't.",
        ((gpu, view.hashrate_hs) for gpu, view in running if view.hashrate_hs is not None),
        GPU,
    )
    page.gauge(
        "mining_value_usd_per_gpu_hour",
        "What a GPU-hour of mining counts for now.",
        ((gpu, view.value_microusd_per_gpu_hour / MICROUSD_PER_USD) for gpu, view in running),
        GPU,
    )
    row = control.board.row
    page.counter(
        "mining_shares",
        "Shares that the pool accepted, and those that it refused: rejected, stale, invalid.",
        ((key, count) for key, count in sorted(control.meters.mining_shares.items()) if key[0] in row),
        ("gpu", "result"),
    )
    doubts = Counter(view.doubt for view in views)
    page.gauge(
        "mining_doubts",
        "Miners of which something is not known.",
        (((doubt.value,), doubts[doubt]) for doubt in MinerDoubt) if views else [],
        ("doubt",),
    )
    oldest_s = min((one.at_s for one in control.mining.hashprices), default=None)
    page.gauge(
        "mining_hashprice_age_seconds",
        "Age of the oldest hashprice; absent where none is known.",
        [] if oldest_s is None else [((), max(0.0, now_s - oldest_s))],
    )
