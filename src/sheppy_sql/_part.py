"""A step that is repeated in the background while a backend is connected."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from collections.abc import Awaitable, Callable

from sheppy import BackendError

logger = logging.getLogger("sheppy_sql")

_abandoned: list[asyncio.Task[None] | None] = []

JITTER = 0.25  # share of an interval, so that instances do not fall into step


class Part:
    """Repeats `step` about every `interval` seconds, from `start` to `close`.

    A step that fails is repeated as well; what it failed of is logged once.
    """

    def __init__(self, name: str, step: Callable[[], Awaitable[object]], interval: float) -> None:
        self._name = name
        self._step = step
        self._interval = interval
        self._running: asyncio.Task[None] | None = None
        self._complaint: str | None = None

    def start(self) -> None:
        """Begin; harmless where it has begun."""
        if self._running is None:
            loop = asyncio.get_running_loop()
            # In a context of its own: it outlives whoever happens to start it.
            self._running = contextvars.Context().run(loop.create_task, self._repeat())

    async def close(self) -> None:
        """Stop; a step that is under way is cancelled."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def _repeat(self) -> None:
        while True:
            pause = self._interval * random.uniform(1 - JITTER, 1)  # noqa: S311
            await asyncio.sleep(pause)
            try:
                await self._step()
            except BackendError as error:
                self._complain(str(error))
            except Exception as error:  # noqa: BLE001  # one bad step must not end the others
                self._complain(f"{type(error).__name__}: {error}")
            else:
                self._complaint = None

    def abandon(self) -> None:
        """Its event loop is closed, or the parent's: keep it from complaining at its end."""
        _abandoned.append(self._running)

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            logger.warning("Failed to %s, and will try again: %s", self._name, complaint)
        self._complaint = complaint
