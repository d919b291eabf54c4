"""What an error of a GPU means for us: one table, versioned, after the driver's own verdict.

Numbers are NVIDIA's catalogue of XIDs for Ampere and newer [as of 2025-10]; where other tables (NVSentinel)
are more careful, theirs counts. `docs/operating/health.md` says the same for operators.
"""

from enum import IntEnum

TABLE_VERSION = "2025-10.1"


class Outcome(IntEnum):
    """What is to be done; a larger one outweighs a smaller."""

    IGNORE = 0  # counted
    RESTART_JOB = 1  # the job's own fault or one that ends with it: the GPU stays
    RESET = 2  # nothing may run on it before it was reset
    REBOOT = 3  # it is gone until the node, or its bus, was started anew
    SERVICE = 4  # a person must look


def _numbers(*parts: int | range) -> frozenset[int]:
    return frozenset(n for part in parts for n in (part if isinstance(part, range) else (part,)))


# 45 is logged for each context that is ended while it works, so for each of our own kills; what caused it
# otherwise comes with a number of its own. 43 is its sister. 154 says that the recovery action changed, which
# is read with the next sample.
OWN_KILLS = frozenset({43, 45})
_XIDS: dict[Outcome, frozenset[int]] = {
    Outcome.IGNORE: OWN_KILLS
    | _numbers(14, 37, 38, 44, 63, 66, 67, 92, 93, 106, 107, 121, 137, 141, 152, 153, 154, 157, 161),
    Outcome.RESTART_JOB: _numbers(
        *(8, 11, 13, 25, 31, 32, range(39, 42), 60, range(68, 73), range(75, 78), 80, range(82, 87), 88, 89),
        *(94, range(96, 106), range(126, 136), 139),
    ),
    Outcome.RESET: _numbers(
        *(46, 48, 62, 64, 74, 95, 108, 109, 110, 119, 120, 136, 140, 143, range(144, 151), 155, 156, 158),
        *(159, 171, 172),
    ),
    Outcome.REBOOT: _numbers(79, 151, 160),
    Outcome.SERVICE: _numbers(54, 78, range(162, 166)),
}
_BY_XID = {number: outcome for outcome, numbers in _XIDS.items() for number in numbers}
_BY_RECOVERY_ACTION = {
    0: Outcome.IGNORE,
    1: Outcome.RESET,
    2: Outcome.REBOOT,
    3: Outcome.RESET,  # drain the links to its peers
    4: Outcome.RESET,
    5: Outcome.SERVICE,  # recover the IMEX domain
    6: Outcome.RESET,  # of the bus
    7: Outcome.REBOOT,
}
_BY_EVENT = {
    "ecc_double_bit": Outcome.RESET,
    "unavailable": Outcome.RESET,
    "recovery_action": Outcome.IGNORE,  # the action itself is read with the next sample
    "mig_changed": Outcome.IGNORE,
}


def outcome_of_xid(number: int) -> Outcome:
    """What an XID asks for; one that the table does not know asks for a person."""
    return _BY_XID.get(number, Outcome.SERVICE)


def is_known_xid(number: int) -> bool:
    """Whether the table names it."""
    return number in _BY_XID


def outcome_of_event(kind: str, code: int) -> Outcome:
    """What an event of the driver asks for."""
    return outcome_of_xid(code) if kind == "xid" else _BY_EVENT[kind]


def outcome_of_recovery_action(action: int) -> Outcome:
    """What the driver itself asks for; a word that we do not know asks for a person."""
    return _BY_RECOVERY_ACTION.get(action, Outcome.SERVICE)
