"""Time that passes when the test says so."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import datetime, timedelta, timezone
from typing import ClassVar

from .. import _host


class Clock:
    """A clock that stands still until it is moved.

    In its `with` block all of sheppy in this process takes the time from it: what is scheduled
    by a timedelta, when a retry is due, what is due in `drain`. Your own calls of
    `datetime.now()` and the database's clock, which decides on rate limits and on when results
    expire, go on by themselves.

    Args:
        start: Aware; None for the machine's time.
    """

    _in_use: ClassVar[list[Clock]] = []

    def __init__(self, start: datetime | None = None) -> None:
        if start is not None and start.tzinfo is None:
            raise ValueError("start must be timezone-aware: use datetime(.., tzinfo=timezone.utc)")
        self._now = (start or datetime.now(timezone.utc)).astimezone(timezone.utc)
        self._exits = ExitStack()

    @classmethod
    def in_use(cls) -> Clock | None:
        """The innermost whose `with` block runs."""
        return cls._in_use[-1] if cls._in_use else None

    def now(self) -> datetime:
        """The moment at which it stands, in UTC."""
        return self._now

    def advance(self, by: timedelta) -> datetime:
        """Move it forward; returns the new time."""
        return self.advance_to(self._now + by)

    def advance_to(self, moment: datetime) -> datetime:
        """Move it forward to an aware moment; ValueError for one in its past."""
        if moment.tzinfo is None:
            raise ValueError("moment must be timezone-aware: use datetime(.., tzinfo=timezone.utc)")
        if moment < self._now:
            raise ValueError("A clock only moves forward: begin with an earlier `start`")
        self._now = moment.astimezone(timezone.utc)
        return self._now

    def __enter__(self) -> Clock:
        self._in_use.append(self)
        self._exits.enter_context(_host.time_told_by(self.now))
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()
        self._in_use.remove(self)
