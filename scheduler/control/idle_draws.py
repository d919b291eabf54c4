"""What boards draw while no job of ours is on them, learned from readings of empty ones."""

from scheduler.control.board import GpuBoard
from scheduler.control.limits import Limits
from scheduler.model.gpus import GpuIdentity

# Where no board of its model was seen empty: no common one draws more when idle.
IDLE_W_UNKNOWN = 100.0
# A V100S drew twice its idle watts for several seconds after the work had ended (NVIDIA/cuda-samples#74).
IDLE_AFTER_S = 10.0
# How fast the least that was seen is forgotten, with each reading above it.
FORGOTTEN_RATIO = 0.01


class IdleDraws:
    """Idle draw by board, in watts."""

    def __init__(self, board: GpuBoard, limits: Limits) -> None:
        self._board = board
        self._limits = limits
        self._idle_w: dict[str, float] = {}
        self._empty_since_s: dict[str, float] = {}

    def of(self, gpu: GpuIdentity) -> float:
        """What a board counts for while no job of ours is on it: a stranger's may draw up to the limit."""
        if self._board.foreign.get(gpu.uuid):
            return self._limits.in_force_w(gpu)
        if gpu.uuid in self._idle_w:
            return self._idle_w[gpu.uuid]
        # Boards of a model are alike, and no plan may prefer one of them for what is not known.
        alike = [
            self._idle_w[one.uuid]
            for one in self._board.identities
            if one.model == gpu.model and one.uuid in self._idle_w
        ]
        return min(max(alike, default=IDLE_W_UNKNOWN), self._limits.in_force_w(gpu))

    def declare(self, idle_w: dict[str, float]) -> None:
        """Take what is known beforehand, by UUID; what is seen goes on from there."""
        self._idle_w |= idle_w

    def was_seen(self, uuid: str) -> bool:
        """Whether the board was read since it came free."""
        return uuid in self._empty_since_s

    def occupied(self, uuid: str) -> None:
        """Somebody is on the board."""
        self._empty_since_s.pop(uuid, None)

    def empty(self, uuid: str, watts: float | None, now_s: float) -> None:
        """Nobody is: the draw falls for seconds yet; after that the least counts, slowly forgotten."""
        if watts is None or now_s - self._empty_since_s.setdefault(uuid, now_s) < IDLE_AFTER_S:
            return
        known = self._idle_w.get(uuid, watts)
        self._idle_w[uuid] = watts if watts < known else known + FORGOTTEN_RATIO * (watts - known)

    def clock_was_set_back(self) -> None:
        """Nobody knows any more since when boards are empty."""
        self._empty_since_s.clear()
