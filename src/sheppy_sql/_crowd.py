"""Idle workers that hear of the same task: not all of them are to look for it at once."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from . import _wakeups

if TYPE_CHECKING:
    from ._wakeups import Wakeups

STEP = 0.002
"""Seconds for each idle worker, about as long as one needs to take a task."""
LONGEST = 0.1  # seconds


class Crowd:
    """The others, as far as one instance knows: those of its process, and by who was first.

    Whoever comes too late waits a step longer the next time, and whoever gets a task half as long.
    So with `n` idle workers anywhere each comes to wait up to about `2 * n` steps, at random, and
    the first of them about as long as if it were alone.
    """

    def __init__(self, wakeups: Wakeups) -> None:
        self._wakeups = wakeups
        self._learned: dict[str, float] = {}

    def is_alone(self, queue: str) -> bool:
        return not self._longest_wait(queue)

    async def give_way(self, queue: str) -> bool:
        """Wait a moment before a look that others are likely to make as well; whether it did."""
        longest = self._longest_wait(queue)
        if longest:
            await asyncio.sleep(random.uniform(0, longest))  # noqa: S311
        return longest > 0

    def saw(self, queue: str, *, found: bool) -> None:
        """Learn from how a look ended that a signal brought."""
        learned = self._learned.pop(queue, 0.0)
        learned = learned / 2 if found else min(learned + STEP, LONGEST)
        if learned >= STEP / 2:
            self._learned[queue] = learned

    def _longest_wait(self, queue: str) -> float:
        here = self._wakeups.count(_wakeups.pending(queue)) - 1
        return min(max(self._learned.get(queue, 0.0), here * STEP), LONGEST)
