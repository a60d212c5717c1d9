"""Where a look into a queue may begin: above what is known to be gone, dead index entries and all.

While a long transaction anywhere in the database keeps vacuum away, an index keeps an entry for
each row that was taken. A scan in the order of positions would walk over all of them each time.
"""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

P = TypeVar("P")

LONGEST_LIFE = 60.0
"""Seconds after which a floor is found anew, from the ground.

So a row is found in time that was made takeable by somebody who knows nothing of floors, such as
a worker of an older release, or a person with psql.
"""
_SEEN_BY = "sheppy_sql_floors"


@dataclass(frozen=True, slots=True)
class Floor(Generic[P]):
    """No row of the queue needs to be looked for, now or later, but those that are

    at `start` or above it, or made takeable by a transaction from `next_xid` on, or by one of
    those `running`.

    The rows that a snapshot shows are at or above the first of them. A row that it does not show
    is not committed yet, or not written: its transaction has an id that was not assigned, or was
    running, when the snapshot was taken. And each row that is made takeable again gets the id of
    the transaction that does so.
    """

    start: P
    next_xid: int = 0
    running: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen(Generic[P]):
    """What a statement saw: its snapshot, and where the next look may begin."""

    start: P
    snapshot: str
    """As pg_snapshot is written: xmin:xmax:ids of those running."""
    own_xid: int | None
    """Of its own transaction, which no snapshot counts among those running.

    It is older than the snapshot only where it did not begin with this statement.
    """

    @property
    def floor(self) -> Floor[P]:
        _, next_xid, running = self.snapshot.split(":")
        xids = {int(xid) for xid in running.split(",") if xid}
        if self.own_xid is not None and self.own_xid < int(next_xid):
            xids.add(self.own_xid)
        return Floor(self.start, int(next_xid), tuple(sorted(xids)))


@dataclass(frozen=True, slots=True)
class _Kept(Generic[P]):
    floor: Floor[P]
    ends_at: float


class Floors(Generic[P]):
    """The floors of one backend instance, by queue, under whatever `ground` is.

    They hold on one timeline of one server: after a crash or a failover the same ids are given
    out again. So all are forgotten with each new connection.
    """

    def __init__(self, ground: P, clock: Callable[[], float] = time.monotonic) -> None:
        self._ground: Floor[P] = Floor(ground)
        self._clock = clock
        self._kept: dict[Hashable, _Kept[P]] = {}
        self._timeline = object()

    def look(self, queue: str) -> Look[P]:
        """For one call, which may need several tries."""
        return Look(self, queue)

    def _begin(
        self, queue: str, connection: AsyncConnection | Connection
    ) -> tuple[object, _Kept[P]]:
        known = getattr(connection, "sync_connection", connection)
        if known is None:
            raise ValueError("The connection is not open")
        # SQLAlchemy keeps this as long as the driver's connection lives.
        seen_by = known.info.setdefault(_SEEN_BY, weakref.WeakSet())
        if self not in seen_by:
            seen_by.add(self)
            self._forget()
        kept, now = self._kept.get(queue), self._clock()
        if kept is None or now >= kept.ends_at:
            # Not all instances at one time.
            life = LONGEST_LIFE * random.uniform(0.75, 1)  # noqa: S311
            kept = _Kept(self._ground, now + life)
        return self._timeline, kept

    def _end(self, queue: str, timeline: object, used: _Kept[P], floor: Floor[P]) -> None:
        if timeline is not self._timeline:
            return
        if floor.next_xid < used.floor.next_xid:
            # Ids go backwards only where the server is another one, behind a pooler perhaps.
            self._forget()
            return
        kept = self._kept.get(queue)
        # Of two that looked at a time each has a floor that holds; a mixture of them would not.
        if kept is None or kept.floor.next_xid <= floor.next_xid:
            self._kept[queue] = _Kept(floor, used.ends_at)

    def _forget(self) -> None:
        self._kept.clear()
        self._timeline = object()


class Look(Generic[P]):
    """One look into a queue: where it begins, and the floor that it finds for the next one."""

    def __init__(self, floors: Floors[P], queue: str) -> None:
        self._floors = floors
        self._queue = queue
        self._used: tuple[object, _Kept[P]] | None = None
        self._found: Floor[P] | None = None

    def begin(self, connection: AsyncConnection | Connection) -> Floor[P]:
        """Where this try begins, which is about to be made on the connection."""
        self._found = None
        self._used = self._floors._begin(self._queue, connection)
        return self._used[1].floor

    def saw(self, seen: Seen[P]) -> None:
        self._found = seen.floor

    def keep(self) -> None:
        """Raise the floor to what was found. Only once the transaction is committed.

        What it took itself counts as gone.
        """
        if self._used is not None and self._found is not None:
            self._floors._end(self._queue, *self._used, self._found)
