"""News for other processes, a little of it at a time."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable

from . import _waiting, _wakeups

logger = logging.getLogger("sheppy_sql")

PAUSE, LONGEST_PAUSE = 0.002, 0.02
"""Seconds between two notifications: of lone events, and where many come between any two.

PostgreSQL lets one transaction of a database at a time commit that notifies.
"""
MOST_MARKS = 60
"""In one notification, which so stays below 1,000 bytes."""


class Announcer:
    """Sends what is given to it: the first at once, what comes meanwhile together in the next."""

    def __init__(self, send: Callable[[list[str]], Awaitable[None]]) -> None:
        """`send` gets the marks of topics, and raises nothing."""
        self._send = send
        # By the mark of a group; an empty one stands for all of the group.
        self._news: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self._sending: asyncio.Task[None] | None = None
        self._in_hurry = asyncio.Event()
        self._came = 0
        self._pause = PAUSE
        self._next_at = 0.0

    def announce(self, topics: Iterable[_wakeups.Topic]) -> None:
        """Send that something has come of these topics; in the event loop, and without waiting."""
        for topic in topics:
            self._came += 1
            group = _wakeups.group(topic)
            in_group, known = _wakeups.mark(group), self._news
            if topic == group:
                known[in_group] = {}
            elif in_group not in known or known[in_group]:
                known[in_group][_wakeups.mark(topic)] = None
                if len(known[in_group]) > MOST_MARKS:
                    known[in_group] = {}
        if self._news and self._sending is None:
            loop = asyncio.get_running_loop()
            # In a context of its own: it outlives whoever happens to start it.
            self._sending = contextvars.Context().run(loop.create_task, self._send_all())

    def carry(self, topics: Iterable[_wakeups.Topic]) -> list[str] | None:
        """The marks of topics for a statement to send with its commit; None: announce them later.

        That is sooner than a statement of its own. But the commit then holds what one transaction
        at a time can have, so not where many come.
        """
        if self._news or self._sending is not None or self._wait() > 0:
            return None
        marks = [_wakeups.mark(topic) for topic in topics]
        self._came += len(marks)
        self._sent()
        return marks

    async def flush(self) -> None:
        """Return when all is sent that was announced."""
        self._in_hurry.set()
        try:
            while self._sending is not None:
                await asyncio.wait([self._sending])
        finally:
            self._in_hurry.clear()

    async def _send_all(self) -> None:
        try:
            while self._news:
                if (wait := self._wait()) > 0:
                    await _waiting.sleep_until(self._in_hurry, wait)
                await self._send(self._take())
                self._sent()
        finally:
            self._sending = None

    def _wait(self) -> float:
        """Seconds to the next notification."""
        return self._next_at - asyncio.get_running_loop().time()

    def _sent(self) -> None:
        self._pause = min(2 * self._pause, LONGEST_PAUSE) if self._came > 1 else self._pause / 2
        self._pause, self._came = max(PAUSE, self._pause), 0
        self._next_at = asyncio.get_running_loop().time() + self._pause

    def _take(self) -> list[str]:
        """As much as goes into one notification."""
        marks: list[str] = []
        for group, topics in list(self._news.items()):
            some = list(topics) or [group]
            if marks and len(marks) + len(some) > MOST_MARKS:
                break
            marks += some
            del self._news[group]
        return marks
