"""When a task whose worker has died may be taken: alone, by an instance that holds nothing else.

Whatever made its worker die may do so again, and would take the instance's other tasks along.
"""

from __future__ import annotations

import enum
import math
import random
import time
from collections.abc import Callable, Iterable

PATIENCE = 10.0
"""Seconds, or up to three times as many, for which they wait while there are other tasks."""
DRAIN = 30.0
"""Seconds for which the instance then takes nothing new, so as to become free for them.

Where its other tasks take longer, it takes one suspect beside them.
"""
PAUSE = 300.0
"""Seconds until it does that again."""
SOLITUDE = 60.0
"""Seconds for which nothing is taken beside a suspect; what kills its worker does so before."""

LATELY = 15.0  # seconds, a little longer than between two looks for them


class Choice(enum.Enum):
    """What a claim may take."""

    OTHERS = enum.auto()
    SUSPECT = enum.auto()
    NOTHING = enum.auto()


class Suspects:
    """Which queues have suspects waiting, as far as this instance has seen."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen_at = -math.inf
        self._queues: dict[str, float] = {}  # when the instance next makes room for them
        self._desperate: set[str] = set()
        self._served: set[str] = set()

    def saw(self, queues: Iterable[str]) -> None:
        """These queues have some, all others none."""
        self._seen_at = now = self._clock()
        # At different times, lest all instances make room at once.
        room_at = now + PATIENCE * random.uniform(1, 3)  # noqa: S311
        self._queues = {queue: self._queues.get(queue, room_at) for queue in queues}

    @property
    def seen_lately(self) -> bool:
        """Whether `saw` is up to date."""
        return self._clock() - self._seen_at < LATELY

    def took(self, queue: str, *, found: bool) -> None:
        """A suspect was taken, or (not found) there was none left."""
        self._desperate.discard(queue)
        if found:
            self._queues[queue] = self._clock() + PATIENCE
        else:
            self._queues.pop(queue, None)

    def choose(self, queue: str, *, free: bool, holds_suspect: bool) -> Choice:
        """What may be taken from `queue` now; `free`: the instance holds nothing."""
        self._served.add(queue)
        if holds_suspect:
            return Choice.NOTHING
        # Beside what takes longer than anybody can wait for: better than never.
        if queue in self._queues and (free or queue in self._desperate):
            return Choice.SUSPECT
        return Choice.NOTHING if self._makes_room() else Choice.OTHERS

    def _makes_room(self) -> bool:
        now = self._clock()
        for queue, since in self._queues.items():
            if queue not in self._served:
                continue  # room made here would help no task there
            if now >= since + DRAIN:
                self._queues[queue] = now + PAUSE
                self._desperate.add(queue)
            elif now >= since:
                return True
        return False
