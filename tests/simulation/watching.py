"""What all that watches a world has in common."""

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.simulation.world import World


class Violation(Exception):
    """Something happened that must never happen."""


class Watch:
    """Looks at one world, and says so where something is not as it must be."""

    def __init__(self, world: "World") -> None:
        self._world = world

    def _now_s(self) -> float:
        """Virtual time, whatever the clock has been set to."""
        return asyncio.get_running_loop().time()

    def _demand(self, holds: bool, words: str) -> None:
        if not holds:
            violation = Violation(words)
            self._world.failed(violation)  # the loop catches everything
            raise violation
