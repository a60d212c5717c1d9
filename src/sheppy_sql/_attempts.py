"""Trying again what a conflict or an outage has ended."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from ._errors import (
    Fault,
    LockedError,
    backend_error,
    fault,
    is_cancellation,
    is_driver_error,
    is_lock_timeout,
    is_starting,
)
from ._waiting import sleep_until

T = TypeVar("T")

CONFLICT_ATTEMPTS = 20
CONFLICT_PAUSE = 0.005  # seconds; grows with every attempt
OUTAGE_PAUSES = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Seconds before each further attempt, the last for all that follow.

The first follows at once: it finds another connection where only the pooled one was gone.
"""
CANCELLED_EARLY = 1.0
"""Seconds within which the end of a statement by request may be that by its own lock timeout.

PostgreSQL takes the one for the other where the timeout strikes just as a wait for a lock has ended
and the next one begins: 3 times in 79,000 on PostgreSQL 15.
"""


class Attempts:
    """Of the operations on one database; it knows how long that has been reached."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, outage_grace: float, *, reached: bool
    ) -> None:
        """`outage_grace`: for how many seconds each operation may outlast an outage."""
        self._loop = loop
        self._outage_grace = outage_grace
        self._reached = reached
        self._out_until = loop.time()
        self._unwanted: set[asyncio.Task[Any]] = set()
        self._leaving = asyncio.Event()

    @property
    def reached_for(self) -> float:
        """Seconds since when the database has been known to be there without an outage."""
        return self._loop.time() - self._out_until

    def give_up(self, work: asyncio.Task[Any]) -> None:
        """Have what is under way not be tried again; its caller is gone."""
        if not work.done():
            self._unwanted.add(work)

    def forget(self, work: asyncio.Task[Any]) -> None:
        """What has ended."""
        self._unwanted.discard(work)

    def leave(self) -> None:
        """Have nothing be tried again from now on."""
        self._leaving.set()

    async def repeat(
        self, action: str, attempt: Callable[[bool], Awaitable[T]], *, patient: bool
    ) -> T:
        """The outcome of `attempt`, which is told whether an outage ended one before it.

        Unless `patient`, LockedError where the statement's own lock timeout has ended it;
        BackendError names `action`.
        """
        conflicts = outages = 0
        gives_up_at = math.inf
        while True:
            began = self._loop.time()
            try:
                # A conflict was rolled back: what it tried is certainly not committed.
                outcome = await attempt(outages > 0)
            except Exception as error:
                if not is_driver_error(error):
                    raise
                if not patient and is_lock_timeout(error):
                    raise LockedError from None
                now = self._loop.time()
                kind = fault(error)
                if not patient and is_cancellation(error) and now - began < CANCELLED_EARLY:
                    kind = Fault.CONFLICT
                if kind is Fault.CONFLICT and conflicts < CONFLICT_ATTEMPTS - 1:
                    conflicts += 1
                    pause = CONFLICT_PAUSE * conflicts
                elif (
                    kind is Fault.OUTAGE
                    and now < gives_up_at
                    and self._rides_out(error, first=not outages)
                ):
                    # Counted from the first one: before, all was well.
                    gives_up_at = min(gives_up_at, now + self._outage_grace)
                    pause = OUTAGE_PAUSES[min(outages, len(OUTAGE_PAUSES) - 1)]
                    outages += 1
                    if outages > 1:  # else it was no more than a connection that had died
                        self._out_until = now
                else:
                    # From None: what SQLAlchemy and the driver say may quote payloads.
                    raise backend_error(action, error) from None
            else:
                self._reached = True
                if outages > 1:
                    self._out_until = self._loop.time()
                return outcome
            await sleep_until(self._leaving, pause * random.uniform(0.5, 1.5))  # noqa: S311

    def _rides_out(self, error: Exception, *, first: bool) -> bool:
        """Whether it is worth while to wait for the end of an outage.

        Once always: it may be no more than a connection that died in the pool.
        """
        unwanted = self._leaving.is_set() or asyncio.current_task() in self._unwanted
        if unwanted and not first:
            return False
        # Nobody has got through yet: it may as well be the wrong address.
        return self._reached or is_starting(error)
